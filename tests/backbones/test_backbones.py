"""Backbones: frozen, unmodified, told apart by their tensors, and refused in words where they do
not fit.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from helpers_cases import for_every
from safetensors.torch import save_file

from pipeline.backbones import (
    fingerprint,
    give_several_maps,
    giving_maps,
    known,
    load,
    load_backbone,
    share,
)
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input

SIZE = Input(size_px=32)
FAMILIES = ("vit", "swin", "convnext", "convnext_linear")


@pytest.fixture
def forget_loaded() -> Iterator[None]:
    """Backbones are loaded afresh, during the test and after it."""
    load._load_cached.cache_clear()
    yield
    load._load_cached.cache_clear()


def changed(spec: Backbone, **arguments: int | float | str | bool | list[int]) -> Backbone:
    return spec.model_copy(update={"arguments": {**spec.arguments, **arguments}})


# --- fingerprint ----------------------------------------------------------------------------------


def slow_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over `name:dtype:shape;` and the little-endian numbers of each tensor, in order of
    name.
    """
    text = b""
    for name in sorted(state):
        tensor = state[name]
        text += (
            f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode()
            + tensor.contiguous().numpy().tobytes()
        )
    return hashlib.sha256(text).hexdigest()


def test_the_fingerprint_is_a_digest_of_names_types_shapes_and_numbers() -> None:
    state = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.tensor(7),
        "c": torch.zeros(0),
        "d": torch.tensor([True, False]),
    }
    assert fingerprint(state) == slow_fingerprint(state)
    assert fingerprint(dict(reversed(state.items()))) == fingerprint(state)
    assert fingerprint({**state, "b": state["b"].T.contiguous().T}) == fingerprint(state), (
        "how a tensor lies in memory is not its value"
    )


@for_every(
    "change",
    [
        lambda state: {**state, "w": torch.nextafter(state["w"], torch.tensor(9.0))},
        lambda state: {**state, "w": state["w"].reshape(3, 2)},
        lambda state: {**state, "w": state["w"].double()},
        lambda state: {"v": state["w"]},
        lambda state: {**state, "x": torch.zeros(0)},
    ],
)
def test_any_change_changes_the_fingerprint(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3)}
    assert fingerprint(change(state)) != fingerprint(state)


def test_one_checkpoint_has_one_fingerprint_at_every_size(families: dict[str, Backbone]) -> None:
    for family in ("vit", "convnext"):
        assert (
            len(
                {
                    load_backbone(families[family], Input(size_px=size)).fingerprint
                    for size in (32, 64)
                }
            )
            == 1
        )


# --- loading --------------------------------------------------------------------------------------


@for_every("family", FAMILIES)
def test_a_backbone_is_a_frozen_feature_extractor(
    family: str, families: dict[str, Backbone]
) -> None:
    backbone = load_backbone(families[family], SIZE)
    assert backbone.model(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.width)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(
    tiny_backbone: Backbone, forget_loaded: None
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = load_backbone(tiny_backbone, SIZE).fingerprint
    assert torch.equal(torch.rand(3), expected)
    load._load_cached.cache_clear()
    assert load_backbone(tiny_backbone, SIZE).fingerprint == first


def test_a_configuration_is_loaded_once_a_process(tiny_backbone: Backbone) -> None:
    assert load_backbone(tiny_backbone, SIZE) is load_backbone(
        tiny_backbone.model_copy(), Input(size_px=32)
    )


def test_normalisation_is_the_tasks_else_the_backbones_else_timms(tiny_backbone: Backbone) -> None:
    own = tiny_backbone.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    task_input = Input(size_px=32, mean=(0.7, 0.8, 0.9), std=(0.75, 0.85, 0.95))
    config = timm.get_pretrained_cfg(tiny_backbone.model)
    assert config is not None
    cases = [(own, task_input, task_input), (own, SIZE, own), (tiny_backbone, SIZE, config)]
    for spec, size, expected in cases:
        backbone = load_backbone(spec, size)
        assert (backbone.images.mean, backbone.images.std) == (expected.mean, expected.std)


@for_every("family", FAMILIES)
def test_a_fresh_model_shares_tensors_but_not_modules(
    family: str, families: dict[str, Backbone]
) -> None:
    backbone = load_backbone(families[family], SIZE)
    copy = backbone.fresh_model()
    shared = dict(backbone.model.named_parameters())
    assert copy.state_dict().keys() == backbone.model.state_dict().keys()
    assert all(
        parameter.data_ptr() == shared[name].data_ptr()
        for name, parameter in copy.named_parameters()
    )
    assert not {id(module) for module in copy.modules()} & {
        id(module) for module in backbone.model.modules()
    }
    name = next(
        name for name, module in copy.named_modules() if isinstance(module, torch.nn.LayerNorm)
    )
    copy.set_submodule(name, torch.nn.Identity())
    assert isinstance(backbone.model.get_submodule(name), torch.nn.LayerNorm)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def state(tiny_backbone: Backbone) -> dict[str, torch.Tensor]:
    """Other weights than the random ones, as a checkpoint holds them."""
    model = load_backbone(tiny_backbone, SIZE).model
    return {name: tensor + 0.5 for name, tensor in model.state_dict().items()}


def loaded(spec: Backbone, path: Path) -> dict[str, torch.Tensor]:
    return load_backbone(spec.model_copy(update={"weights": str(path)}), SIZE).model.state_dict()


@for_every("family", FAMILIES)
def test_maps_of_a_pooling_backbone_are_those_of_one_loaded_for_maps(
    family: str, families: dict[str, Backbone]
) -> None:
    task_input = Input(size_px=64 if family == "vit" else 32)  # the positions are resampled
    pooling = load_backbone(families[family], task_input)
    made, loaded = (
        giving_maps(pooling),
        load_backbone(families[family], task_input, gives_maps=True),
    )
    assert (made.gives_maps, made.width) == (True, loaded.width)
    assert made.fingerprint == loaded.fingerprint
    assert made.model.state_dict().keys() == loaded.model.state_dict().keys()
    image = made.takes.noise(2)
    for count in (1, 3):
        both = made.fresh_model(), loaded.fresh_model()
        for model in both:
            give_several_maps(model, count)
        assert torch.equal(both[0](image), both[1](image))
    assert pooling.model(image).shape == (2, pooling.width), "the pooling one is as it was"
    own = {tensor.data_ptr() for tensor in pooling.model.parameters()}
    assert {tensor.data_ptr() for tensor in made.model.parameters()} <= own


def test_a_checkpoint_is_read_without_its_classifier(
    tiny_backbone: Backbone, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(
        {**state, "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)},
        tmp_path / "weights.safetensors",
    )
    result = loaded(tiny_backbone, tmp_path / "weights.safetensors")
    assert result.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.items())


def test_a_half_precision_checkpoint_becomes_float32(
    tiny_backbone: Backbone, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(
        {name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.safetensors"
    )
    result = loaded(tiny_backbone, tmp_path / "half.safetensors")
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, state[name].half().float())
        for name, tensor in result.items()
    )


@for_every(("family", "size_px"), [("vit", 32), ("vit", 64), ("swin", 32), ("convnext", 64)])
def test_a_shared_backbone_is_the_one_it_was_made_of(
    family: str, size_px: int, families: dict[str, Backbone], tmp_path: Path
) -> None:
    """At another size than its native one too: position tables are resampled after loading, and
    stored as they were.
    """
    path = tmp_path / "backbones" / "shared.safetensors"
    original = load_backbone(families[family], Input(size_px=size_px))
    share(original, path)
    again = load_backbone(
        families[family].model_copy(update={"weights": str(path)}), Input(size_px=size_px)
    )
    assert (
        again.fingerprint
        == original.fingerprint
        == load_backbone(families[family], SIZE).fingerprint
    )
    images = torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.model(images), original.model(images))
    assert list(path.parent.iterdir()) == [path]


def test_a_loaded_checkpoint_is_pages_of_its_file_which_no_write_reaches(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    share(load_backbone(tiny_backbone, SIZE), path)
    before = path.read_bytes()
    weight = loaded(tiny_backbone, path)["blocks.0.mlp.fc1.weight"]
    maps = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert any(first <= weight.data_ptr() < last for first, last in ranges), "nothing was copied"
    weight.detach().add_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "norm.weight"},
            r"1 missing \(norm\.weight\)",
        ),
        (lambda state: {**state, "surplus": torch.zeros(1)}, r"1 unknown \(surplus\)"),
        (
            lambda state: {**state, "cls_token": torch.zeros(1, 1, 63)},
            r"cls_token is \(1, 1, 63\), expected \(1, 1, 64\)",
        ),
    ],
    ids=["missing", "unknown", "reshaped"],
)
def test_a_checkpoint_that_does_not_fit_says_which_tensor(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
    tiny_backbone: Backbone,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    save_file(change(state), tmp_path / "weights.safetensors")
    with pytest.raises(BackboneError, match=message):
        loaded(tiny_backbone, tmp_path / "weights.safetensors")


class Trap:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_refused_and_not_run(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(BackboneError, match="is a Python pickle, which may run code"):
        loaded(tiny_backbone, tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_an_argument_cannot_bring_weights_from_elsewhere(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """timm's own `checkpoint_path` reads pickled files, and the fingerprint would be of what it
    read.
    """
    path = tmp_path / "weights.pth"
    torch.save({"cls_token": torch.zeros(1, 1, 64)}, path)
    with pytest.raises(BackboneError, match="checkpoint_path"):
        load_backbone(changed(tiny_backbone, checkpoint_path=str(path)), SIZE)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"model": "vit_tinny_patch16_224"}, "did you mean.*vit_tiny_patch16_224"),
        ({"model": "qqqq"}, r"timm\.list_models\(\)"),
        ({"weights": "absent.safetensors"}, "no such file"),
    ],
)
def test_an_unknown_backbone_is_refused(
    update: dict[str, str], message: str, tiny_backbone: Backbone
) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(tiny_backbone.model_copy(update=update), SIZE)


@for_every(
    "arguments",
    [
        {"dpth": 3},
        {"num_heads": 3},
        {"depth": "x"},
        {"num_classes": 5},
        {"patch_size": 0},
        {"embed_dim": -2},
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: dict[str, int | str], tiny_backbone: Backbone
) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.arguments: .* do not fit"):
        load_backbone(changed(tiny_backbone, **arguments), SIZE)


@pytest.mark.parametrize(("family", "arguments"), [("vit", {"patch_size": 16}), ("convnext", {})])
def test_a_size_the_model_cannot_take_is_refused(
    family: str, arguments: dict[str, int], families: dict[str, Backbone]
) -> None:
    with pytest.raises(BackboneError, match=r"input\.size_px: given 8"):
        load_backbone(changed(families[family], **arguments), Input(size_px=8))


# --- what this machine knows ----------------------------------------------------------------------


def test_weights_are_remembered_by_fingerprint_while_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.touch()
    assert known.recall("a") is None
    known.remember("a", str(checkpoint))
    known.remember("b", "random")
    assert (known.recall("a"), known.recall("b"), known.recall("c")) == (
        str(checkpoint),
        "random",
        None,
    )
    checkpoint.unlink()
    assert known.recall("a") is None


def test_runs_beside_each_other_keep_what_the_others_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fingerprints = [f"{number:064x}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(known.remember, fingerprints, ["random"] * 40))
    assert [known.recall(fingerprint) for fingerprint in fingerprints] == ["random"] * 40
