"""Checkpoints as people have them, of other sizes, layouts and formats; from files, folders and the
hub: loaded as timm loads them, or refused in one line."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from pipeline.backbones import load_backbone, share
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input

Arguments = dict[str, int | float | str | bool | list[int]]

State = dict[str, torch.Tensor]
VIT: Arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: Arguments = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
}


def random_state(model: str, arguments: Arguments) -> State:
    """What a checkpoint of this model holds, with its classifier."""
    torch.manual_seed(3)
    return {
        name: tensor.clone()
        for name, tensor in timm.create_model(model, **arguments).state_dict().items()
    }


def as_timm_loads_it(model: str, arguments: Arguments, path: Path) -> State:
    return timm.create_model(
        model,
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": str(path)},
        **arguments,
    ).state_dict()


def original_swin(state: State) -> State:
    """Microsoft's names: a stage's downsampling is at the end of the one before."""
    return {
        re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        ): tensor
        for name, tensor in state.items()
    }


def original_deit3(state: State) -> State:
    """Facebook's names of LayerScale."""
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in state.items()}


def original_dinov2(state: State) -> State:
    """Facebook's file has a token for training with masks, too."""
    return {
        **{name: tensor for name, tensor in state.items() if not name.startswith("head.")},
        "mask_token": torch.zeros(1, 32),
    }


def data_parallel(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def half(state: State) -> State:
    return {name: tensor.half() for name, tensor in state.items()}


def as_they_are(state: State) -> State:
    return state


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize(
    ("model", "written", "wanted", "change"),
    [
        ("vit_tiny_patch16_224", VIT, {**VIT, "img_size": 48}, as_they_are),
        ("vit_tiny_patch16_224", VIT, {**VIT, "img_size": 64}, half),
        ("vit_tiny_patch16_224", VIT, {**VIT, "patch_size": 4, "img_size": 16}, as_they_are),
        ("vit_tiny_patch16_224", VIT, VIT, data_parallel),
        ("vit_small_patch14_dinov2", {**VIT, "img_size": 48}, VIT, original_dinov2),
        ("deit3_small_patch16_224", VIT, VIT, original_deit3),
        ("beit_base_patch16_224", VIT, {**VIT, "img_size": 48}, as_they_are),
        ("swin_tiny_patch4_window7_224", SWIN, {**SWIN, "window_size": 8}, as_they_are),
        ("swin_tiny_patch4_window7_224", SWIN, SWIN, original_swin),
    ],
    ids=[
        "positions",
        "half",
        "patches",
        "data-parallel",
        "dinov2",
        "deit3",
        "beit",
        "window",
        "swin",
    ],
)
def test_a_checkpoint_loads_as_timm_loads_it(
    model: str,
    written: Arguments,
    wanted: Arguments,
    change: Callable[[State], State],
    tmp_path: Path,
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(change(random_state(model, written)), path)
    backbone = load_backbone(
        Backbone(model=model, arguments=wanted, weights=str(path)),
        Input(size_px=wanted["img_size"]),
    )
    expected = as_timm_loads_it(model, wanted, path)
    assert backbone.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state.items())
    share(backbone, tmp_path / "shared.safetensors")
    shared = Backbone(model=model, arguments=wanted, weights=str(tmp_path / "shared.safetensors"))
    again = load_backbone(shared, Input(size_px=wanted["img_size"]))
    assert again.fingerprint == backbone.fingerprint, "workers load what was loaded here"


@pytest.mark.parametrize("model", ["levit_128s", "repvit_m0_9", "deit_tiny_distilled_patch16_224"])
def test_whatever_belongs_to_the_classifier_is_left_out(model: str, tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", random_state(model, {})
    save_file(state, path)
    backbone = load_backbone(Backbone(model=model, weights=str(path)), Input(size_px=224))
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state.items())


def test_counters_that_inference_never_reads_may_be_missing(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", random_state("test_resnet", {})
    save_file(
        {
            name: tensor
            for name, tensor in state.items()
            if not name.endswith("num_batches_tracked")
        },
        path,
    )
    backbone = load_backbone(Backbone(model="test_resnet", weights=str(path)), Input(size_px=32))
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state.items())


def test_what_timm_cannot_convert_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"blocks.0.pwconv9.weight": torch.zeros(3, 3)}, path)
    for model in ("convnext_atto", "test_vit", "swin_tiny_patch4_window7_224"):
        with pytest.raises(
            BackboneError,
            match=r"does not fit .* missing \(.*unknown \(blocks\.0\.pwconv9\.weight\)",
        ):
            load_backbone(Backbone(model=model, weights=str(path)), Input(size_px=64))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "old.pth",
            pickle.dumps([1]),
            (
                r"Python pickle.*run code.*save_file\(torch\.load\('old\.pth', weights_only=True\),"
                r" 'old\.safetensors'\)"
            ),
        ),
        ("new.pth", b"PK\x03\x04...", r"PyTorch or NumPy archive.*save_file"),
        (
            "lfs.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "Git LFS pointer.*git lfs pull",
        ),
        ("page.safetensors", b"<!DOCTYPE html>", "web page"),
        (
            "short.safetensors",
            b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
            "not a readable safetensors file.*download it again",
        ),
    ],
)
def test_another_format_is_named_with_the_way_out(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load_backbone(Backbone(model="test_vit", weights=str(tmp_path / name)), Input(size_px=64))


def test_the_way_out_of_a_pickled_checkpoint_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(random_state("test_vit", {}), "weights.pth")
    with pytest.raises(BackboneError) as refusal:
        load_backbone(Backbone(model="test_vit", weights="weights.pth"), Input(size_px=160))
    command = re.search(r'python -c "(.*)"', str(refusal.value))
    assert command is not None
    exec(command[1], {})
    assert (
        load_backbone(
            Backbone(model="test_vit", weights="weights.safetensors"), Input(size_px=160)
        ).width
        == 64
    )


def test_tied_tensors_are_refused_by_name() -> None:
    """Two names of one tensor cannot be stored (safetensors#202), and a change under one name would
    change the other.
    """
    with pytest.raises(
        BackboneError,
        match=(
            r"coat_tiny.*one tensor under several names \(cpe1\.proj\.weight,"
            r" serial_blocks1\.0\.cpe\.proj\.weight\)"
        ),
    ):
        load_backbone(Backbone(model="coat_tiny", weights="random"), Input(size_px=64))


@pytest.mark.parametrize(
    ("model", "arguments", "file", "size_px"),
    [
        (
            "vit_small_patch14_dinov2",
            {"img_size": 98},
            "vit_small_patch14_dinov2.saliency.safetensors",
            98,
        ),
        ("tf_efficientnet_lite0", {}, "tf_efficientnet_lite0.imagenet1k.safetensors", 96),
    ],
)
def test_real_checkpoints_load(
    model: str, arguments: Arguments, file: str, size_px: int, shared_folder: Path
) -> None:
    path = shared_folder / "backbones" / file
    backbone = load_backbone(
        Backbone(model=model, arguments=arguments, weights=str(path)), Input(size_px=size_px)
    )
    expected = as_timm_loads_it(model, arguments, path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state.items())


# --- folders and the hub --------------------------------------------------------------------------


def saved_by_timm(folder: Path) -> State:
    """A folder as timm saves a model for the hub; `test_vit` at another depth and size than its
    own.
    """
    state = random_state("test_vit", {"depth": 2, "img_size": 64})
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    cfg = {
        "input_size": [3, 64, 64],
        "fixed_input_size": True,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "classifier": "head",
    }
    config = {
        "architecture": "test_vit",
        "num_classes": 1000,
        "model_args": {"depth": 2, "num_classes": 1000},
        "pretrained_cfg": cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """The hub's cache holds `someone/model`; what its weights are."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    state = saved_by_timm(repository / "snapshots" / "0123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")
    return state


def test_a_folder_that_timm_saved_is_a_backbone_by_its_registry_name(tmp_path: Path) -> None:
    state = saved_by_timm(tmp_path / "model")
    backbone = load_backbone(Backbone(model=f"local-dir:{tmp_path / 'model'}"), Input())
    assert (backbone.size_px, backbone.images.mean, backbone.images.std) == (
        64,
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state.items())
    assert (backbone.spec.model, backbone.spec.arguments) == (
        "test_vit",
        {"depth": 2, "img_size": 64},
    )
    assert load_backbone(backbone.spec, Input()).fingerprint == backbone.fingerprint, (
        "a pack needs no more than this"
    )


def test_a_cached_hub_model_loads_offline(cached: State) -> None:
    backbone = load_backbone(Backbone(model="hf-hub:someone/model"), Input())
    assert backbone.spec.model == "test_vit"
    assert all(torch.equal(tensor, cached[name]) for name, tensor in backbone.state.items())


def test_weights_may_be_a_folder(tmp_path: Path) -> None:
    state = saved_by_timm(tmp_path / "model")
    backbone = load_backbone(
        Backbone(
            model="test_vit",
            arguments={"depth": 2, "img_size": 64},
            weights=str(tmp_path / "model"),
        ),
        Input(),
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state.items())


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        (
            "timm/vit_tiny_patch16_224.augreg_in21k",
            "pretrained",
            "expected 'vit_tiny_patch16_224.augreg_in21k', which is timm's own name of it",
        ),
        ("someone/model", "random", r"hf-hub:OWNER/NAME.*local-dir:FOLDER"),
        (
            "test_vit",
            "https://example.com/weights.safetensors",
            "download the file and give its path",
        ),
        ("test_vit", "hf-hub:someone/model", "model: hf-hub:OWNER/NAME"),
        ("test_vit", "{folder}", r"no safetensors file; expected model\.safetensors"),
        ("local-dir:{folder}", "pretrained", r"no config\.json; expected a folder that timm saved"),
    ],
)
def test_other_sources_are_refused_with_the_way_out(
    model: str, weights: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BackboneError, match=message):
        load_backbone(
            Backbone(model=model.format(folder=tmp_path), weights=weights.format(folder=tmp_path)),
            Input(),
        )


@pytest.mark.parametrize(
    "arguments", [{"checkpoint_path": "x.pth"}, {"depth": {"a": 1}}, {"no_such": 1}]
)
def test_what_a_saved_config_asks_for_beyond_an_architecture_is_refused(
    arguments: dict[str, object], tmp_path: Path
) -> None:
    saved_by_timm(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
    with pytest.raises(BackboneError, match=next(iter(arguments))):
        load_backbone(Backbone(model=f"local-dir:{tmp_path / 'model'}"), Input())
