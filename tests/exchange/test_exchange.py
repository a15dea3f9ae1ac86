"""Exported packs, loaded by the programs whose formats they are: unmodified timm, PEFT and
onnxruntime compute the pack's logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline.adaptation import AdaptedModel, attach
from pipeline.adaptation.packing import describe, to_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import ExportError, StorageError
from pipeline.exchange import merged_checkpoint
from pipeline.exchange.merged_checkpoint import export_checkpoint
from pipeline.exchange.onnx import export_onnx
from pipeline.exchange.peft import export_peft
from pipeline.packs import Pack
from pipeline.specs import Backbone, Input, Recipe, Task

CLASSES = ("one", "two", "three")
Select = Callable[..., dict[str, torch.Tensor]]
Make = Callable[..., tuple[Pack, LoadedBackbone, AdaptedModel]]


def images(size_px: int = 32) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (5, 3, size_px, size_px),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(3),
    )


@pytest.fixture(scope="module")
def make(families: dict[str, Backbone], tiny_task: Task, random_selection: Select) -> Make:
    """A function (family, recipe, size_px) -> a pack with values far from where they started, its
    backbone and its model.
    """

    def build(
        family: str, recipe: dict[str, Any], size_px: int = 32
    ) -> tuple[Pack, LoadedBackbone, AdaptedModel]:
        spec, backbone = (
            Recipe.model_validate(recipe),
            load_backbone(families[family], Input(size_px=size_px, mean=(0.4, 0.5, 0.6))),
        )
        model = attach(backbone, spec, len(CLASSES), selected=random_selection(backbone, 4))
        generator = torch.Generator().manual_seed(7)
        for parameter in model.values.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        task = tiny_task.model_copy(update={"backbone": families[family]})
        return to_pack(model, describe(task, spec, backbone, CLASSES)), backbone, model

    return build


def assert_same_logits(found: torch.Tensor, model: AdaptedModel, size_px: int = 32) -> None:
    with torch.inference_mode():
        expected = model.eval()(images(size_px))
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max()))
    )


# --- timm -----------------------------------------------------------------------------------------

WEIGHTS: dict[str, dict[str, Any]] = {
    "connections": {"connections": {"top_k": 2}, "biases": {}, "norms": {"which": "all"}},
    "lora": {
        "lora": {"rank": 3, "targets": ["fc1", "fc2"], "scale": 0.5},
        "connections": {},
        "head": {"bits": 1, "bias": False},
    },
    "ssf": {"ssf": {}, "lora": {"targets": ["fc1"]}},
    "full": {"full": {"bits": 8}},
    "linear probe": {},
    "head on a subspace": {"biases": {}, "head": {"rank": 7}},
}


PLAIN_FAMILIES = ("vit", "convnext", "convnext_linear")
PAIRS = [(family, part) for family in PLAIN_FAMILIES for part in WEIGHTS]


@pytest.mark.parametrize(("family", "part"), [*PAIRS, ("swin", "connections")])
def test_timm_loads_a_checkpoint_and_computes_the_packs_logits(
    family: str, part: str, make: Make, tmp_path: Path
) -> None:
    pack, backbone, model = make(family, WEIGHTS[part])
    export_checkpoint(pack, backbone, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    data = timm.data.resolve_data_config(model=plain)
    assert data["mean"] == pytest.approx((0.4, 0.5, 0.6))
    assert (tuple(data["input_size"]), data["crop_pct"], data["crop_mode"]) == (
        (3, 32, 32),
        1.0,
        "squash",
    )
    assert plain.pretrained_cfg["label_names"] == list(CLASSES)
    normalised = (
        images().float() / 255 - torch.tensor(data["mean"]).view(1, 3, 1, 1)
    ) / torch.tensor(data["std"]).view(1, 3, 1, 1)
    with torch.inference_mode():
        assert_same_logits(plain(normalised), model)


def test_the_tensors_have_timms_names_and_unselected_weights_their_bits(
    make: Make, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    pack, backbone, model = make("vit", {"connections": {"top_k": 1}})
    export_checkpoint(pack, backbone, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert (
        state.keys()
        == timm.create_model(tiny_backbone.model, num_classes=3, **tiny_backbone.arguments)
        .state_dict()
        .keys()
    )
    for name, places in model.positions().items():
        is_free = torch.ones(state[f"{name}.weight"].numel(), dtype=torch.bool)
        is_free[places] = False
        assert torch.equal(
            state[f"{name}.weight"].flatten()[is_free],
            backbone.state[f"{name}.weight"].flatten()[is_free],
        )
        assert not torch.equal(state[f"{name}.weight"], backbone.state[f"{name}.weight"])


def test_a_class_token_that_trained_is_written(make: Make, tmp_path: Path) -> None:
    pack, backbone, _ = make("vit", {"class_token": {}})
    assert export_checkpoint(pack, backbone, tmp_path / "model") < 1e-5
    assert not torch.equal(
        load_file(tmp_path / "model" / "model.safetensors")["cls_token"],
        backbone.state["cls_token"],
    )


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_checkpoint_is_of_the_tasks_input_size(family: str, make: Make, tmp_path: Path) -> None:
    pack, backbone, model = make(family, {"connections": {}}, 64)
    export_checkpoint(pack, backbone, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.inference_mode():
        assert_same_logits(plain(model.normalise(images(64))), model, 64)


@pytest.mark.parametrize(
    ("part", "why"),
    [("smoa", "chooses"), ("adapter", "ReLU"), ("dtl", "Swish"), ("prompts", "tokens")],
)
def test_what_no_weight_can_hold_is_refused_in_words(
    part: str, why: str, make: Make, tmp_path: Path
) -> None:
    pack, backbone, _ = make("vit", {part: {}, "norms": {}})
    with pytest.raises(ExportError, match=rf"the part {part} .*{why}.*export to onnx"):
        export_checkpoint(pack, backbone, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_computes_something_else_is_not_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, backbone, _ = make("vit", {"connections": {}})
    monkeypatch.setattr(
        merged_checkpoint, "merged_state", lambda model, original: original.state_dict()
    )
    with pytest.raises(ExportError, match="logits differ"):
        export_checkpoint(pack, backbone, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(make: Make, tmp_path: Path) -> None:
    pack, backbone, _ = make("vit", {})
    (tmp_path / "model").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        export_checkpoint(pack, backbone, tmp_path / "model")


# --- PEFT -----------------------------------------------------------------------------------------

PEFT: dict[str, dict[str, Any]] = {
    "SHIRA": {"connections": {"top_k": 3}, "norms": {}},
    "LORA": {"lora": {"rank": 3, "scale": 0.5}, "norms": {"which": "all"}},
    "LORA of several ranks": {
        "lora": {"rank": 2, "targets": ["q", "v", "fc1", "fc2"]},
        "head": {"rank": 7},
    },
}


def from_peft(folder: Path, backbone: Backbone, model: AdaptedModel) -> torch.Tensor:
    """Logits of timm's model with the adapter that PEFT reads."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    base = timm.create_model(backbone.model, num_classes=len(CLASSES), **backbone.arguments)
    base.load_state_dict(load_backbone(backbone, Input(size_px=32)).state, strict=False)
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.inference_mode():
        return adapted(model.normalise(images()))


@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks:UserWarning"
)  # of PEFT's sparse tensors
@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("family", ["vit", "convnext_linear", "convnext"])
def test_peft_loads_an_adapter_and_computes_the_packs_logits(
    family: str, method: str, make: Make, families: dict[str, Backbone], tmp_path: Path
) -> None:
    recipe = PEFT[method]
    if family != "vit" and "lora" in recipe:
        recipe = {**recipe, "lora": {**recipe["lora"], "targets": ["fc1", "fc2"]}}
    pack, backbone, model = make(family, recipe)
    if (family, method) == ("convnext", "SHIRA"):  # all its layers are convolutions
        with pytest.raises(ExportError, match="holds Linear layers"):
            export_peft(pack, backbone, tmp_path / "adapter")
        return
    export_peft(pack, backbone, tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"]
        == method.split()[0]
    )
    assert_same_logits(from_peft(tmp_path / "adapter", families[family], model), model)


def test_shiras_entries_are_the_connections_and_zeros(make: Make, tmp_path: Path) -> None:
    pack, backbone, model = make("vit", {"connections": {"top_k": 2}})
    export_peft(pack, backbone, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    name = "blocks.0.mlp.fc1"
    rows, columns = stored[f"base_model.model.{name}.shira_indices"].long()
    values, places = stored[f"base_model.model.{name}.shira_weight"], rows * 64 + columns
    assert len(values) == len(places.unique()) == rank * (256 + 64)
    assert set(model.positions()[name].tolist()) <= set(places.tolist())
    assert set(places[values != 0].tolist()) <= set(model.positions()[name].tolist())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"connections": {}, "biases": {}}, "no place for the part biases"),
        ({"lora": {}, "smoa": {}}, "no place for the part smoa"),
        ({"lora": {}, "connections": {}}, "both connections and lora"),
        ({"norms": {}}, "neither connections nor lora"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_in_words(
    recipe: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    pack, backbone, _ = make("vit", recipe)
    with pytest.raises(ExportError, match=rf"{message}.*export to timm or onnx"):
        export_peft(pack, backbone, tmp_path / "adapter")


# --- ONNX -----------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "house": (
        "vit",
        {
            "connections": {},
            "biases": {},
            "smoa": {"experts": 3, "heads": 2, "top_k": 2, "prompt_generator": True},
            "norms": {},
        },
    ),
    "biases": ("swin", {"biases": {}}),
    "head on a subspace": ("vit", {"head": {"rank": 7, "bits": 2}}),
    "side network": ("swin", {"dtl": {"rank": 3}, "norms": {}}),
    "adapters": (
        "convnext",
        {
            "adapter": {"placement": "after_mlp"},
            "lora": {"targets": ["fc1"]},
            "smoa": {},
            "ssf": {},
        },
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_onnxruntime_computes_the_packs_logits_at_any_batch_size(
    name: str, make: Make, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pack, backbone, model = make(*WHOLE[name])
    assert export_onnx(pack, backbone, tmp_path / "model.onnx") < 1e-4
    session = runtime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (given,), facts = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    assert (given.type, given.shape[1:]) == ("tensor(uint8)", [3, 32, 32])
    assert json.loads(facts["classes"]) == list(CLASSES)
    for chunk in (1, 2, 5):
        parts = [session.run(None, {"images": part.numpy()})[0] for part in images().split(chunk)]
        assert_same_logits(torch.from_numpy(np.concatenate(parts)), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_onnx_file_that_computes_something_else_is_not_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pack, backbone, _ = make("vit", {})
    monkeypatch.setattr(
        "pipeline.exchange.onnx._run",
        lambda session, images: torch.zeros(len(images), len(CLASSES)),
    )
    with pytest.raises(ExportError, match="logits differ"):
        export_onnx(pack, backbone, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
