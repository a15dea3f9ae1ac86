"""Importance entry by entry and ranking by sorting, against their definitions; and which settings
do not belong together."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_selection import CRITERIA, FAMILIES, LEVELS, packed, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.adaptation import RankedIndices, plan, rank_indices
from pipeline.adaptation.packing import from_pack
from pipeline.adaptation.selected import recomputed
from pipeline.adaptation.selected.ranking import first_indices
from pipeline.adaptation.selected.recomputed import random_importance
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import load_backbone
from pipeline.data import numbered_generator, shard_batches, two_views
from pipeline.errors import BackboneError, PackDamaged
from pipeline.packs import Pack
from pipeline.selection import read_selection, select_locally, stage, write_selection
from pipeline.specs import Backbone, Connections, Level, Recipe, Selection
from pipeline.training import Inputs

Importance = dict[str, np.ndarray]

# --- importance -----------------------------------------------------------------------------------


def slow_importance(inputs: Inputs) -> Importance:
    """The definition of each criterion, on a copy of the whole network, image by image or entry by
    entry.
    """
    spec = inputs.task.selection
    if spec.criterion == "gradient":
        return _slow_gradients(inputs)
    if spec.criterion == "activation":
        return _slow_activations(inputs)
    layers = tunable_layers(inputs.backbone.model).items()
    return {name: layer.weight.detach().flatten(1).abs().numpy() for name, layer in layers}


def _slow_gradients(inputs: Inputs) -> Importance:
    """Cross-entropy of a head that is drawn and left alone, its gradients summed with their
    sign.
    """
    task, loaded = inputs.task, inputs.backbone
    assert task.selection.loss == "cross_entropy"
    model = copy.deepcopy(loaded.model)
    weights = {name: layer.weight.requires_grad_() for name, layer in tunable_layers(model).items()}
    head = torch.empty(len(inputs.index.classes), loaded.width).normal_(
        0, 0.02, generator=torch.Generator().manual_seed(task.seed)
    )
    total: Importance = {
        name: np.zeros(weight.flatten(1).shape) for name, weight in weights.items()
    }
    for number, samples in enumerate(
        shard_batches(inputs.splits["train"], task.selection.batch_size, seed=task.seed)
    ):
        images, labels = inputs.reader("train").read(samples)
        views = two_views(images, numbered_generator(task.seed, number), flip=task.input.flip)
        logits = (
            model(
                (views - torch.tensor(loaded.images.mean)[:, None, None])
                / torch.tensor(loaded.images.std)[:, None, None]
            )
            @ head.T
        )
        per_view = [
            logits[view].logsumexp(0) - logits[view, label]
            for view, label in enumerate(torch.cat([labels, labels]))
        ]
        for name, gradient in zip(
            weights,
            torch.autograd.grad(sum(per_view) / len(per_view), list(weights.values())),
            strict=True,
        ):
            total[name] += gradient.flatten(1).double().numpy()
    return {name: np.abs(sum_OI) for name, sum_OI in total.items()}


def _slow_activations(inputs: Inputs) -> Importance:
    """Image by image: what each layer reads, a convolution's as unfolded patches."""
    loaded, model = inputs.backbone, copy.deepcopy(inputs.backbone.model)
    layers = tunable_layers(model)
    total: Importance = {
        name: np.zeros(layer.weight.flatten(1).shape) for name, layer in layers.items()
    }

    def watch(name: str, layer: Any) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            size = arguments[0].abs()
            if isinstance(layer, nn.Linear):
                total[name] += size.reshape(-1, size.shape[-1]).mean(dim=0).double().numpy()
                return
            patches = (
                F.unfold(size, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                .mean(dim=(0, 2))
                .view(layer.groups, -1)
            )
            total[name] += np.repeat(
                patches.double().numpy(), layer.weight.shape[0] // layer.groups, axis=0
            )

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name, layer))
    samples = inputs.splits["train"].samples
    for sample in samples:
        images, _ = inputs.reader("train").read(sample[None])
        with torch.inference_mode():
            model(
                (images.float() / 255 - torch.tensor(loaded.images.mean)[:, None, None])
                / torch.tensor(loaded.images.std)[:, None, None]
            )
    return {
        name: np.abs(layer.weight.detach().flatten(1).numpy()) * total[name]
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("family", "criterion"),
    list(itertools.product(FAMILIES, ("cross-entropy", "magnitude", "activation"))),
)
def test_importance_is_its_definition(
    family: str, criterion: str, open_with: Any, sums: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: dict[str, torch.Tensor] = {}
    for module in (stage, recomputed):
        monkeypatch.setattr(
            module, "rank_indices", lambda importance, level, top_k: ranked.update(importance) or {}
        )
    inputs = open_with(family, criterion)
    stage._ranked(inputs, dict(sums(family, criterion)), 1)
    expected = slow_importance(inputs)
    assert ranked.keys() == expected.keys()
    for name, values_OI in expected.items():
        np.testing.assert_allclose(
            ranked[name].abs().numpy(), values_OI, rtol=1e-3, atol=1e-5 * np.abs(values_OI).max()
        )


def test_random_numbers_are_the_same_for_ever() -> None:
    """Packs leave out what these numbers decide, so another stream would make them worthless."""
    numbers = random_importance(nn.Linear(3, 2), 0, "blocks.0.attn.qkv") * 2**24
    assert numbers.tolist() == [[4592994, 10042694, 12462137], [7104619, 11999984, 6900255]]
    uniform = random_importance(nn.Linear(400, 300), 5, "layer")
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.005)


def test_random_numbers_depend_on_seed_and_layer_alone() -> None:
    layer = nn.Conv2d(4, 6, 3)
    first = random_importance(layer, 0, "stem")
    assert first.shape == (6, 36)
    assert torch.equal(first, random_importance(nn.Conv2d(4, 6, 3), 0, "stem"))
    assert not torch.equal(first, random_importance(layer, 1, "stem"))
    assert not torch.equal(first, random_importance(layer, 0, "head"))


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_a_layer_whose_input_cannot_be_seen_is_refused(model: str, tiny_inputs: Inputs) -> None:
    small = {
        "beit_base_patch16_224": {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
        },
        "swinv2_tiny_window8_256": {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1],
            "num_heads": [1],
        },
    }
    backbone = Backbone(model=model, arguments=small[model], weights="random")  # type: ignore[arg-type]
    task = tiny_inputs.task.model_copy(update={"selection": Selection(criterion="activation")})
    with pytest.raises(
        BackboneError,
        match=r"cannot see the inputs of .*attn\.qkv.*choose criterion gradient or magnitude",
    ):
        select_locally(
            dataclasses.replace(
                tiny_inputs, task=task, backbone=load_backbone(backbone, task.input)
            ),
            1,
        )


# --- ranking --------------------------------------------------------------------------------------


def slow_places(importance: Importance, level: Level, top_k: int) -> dict[str, list[int]]:
    """All entries sorted by strength, then layer, then place; the first of each group that competes
    are kept.
    """
    entries = [
        (-abs(np.float32(value)), number, place, name, place // values_OI.shape[1])
        for number, (name, values_OI) in enumerate(importance.items())
        for place, value in enumerate(values_OI.ravel())
    ]
    group_of: dict[str, Callable[[str, int], Any]] = {
        "neuron": lambda name, row: (name, row),
        "layer": lambda name, row: name,
        "network": lambda name, row: None,
    }
    room: dict[Any, int] = {}
    for name, (rows, columns) in (
        (name, values_OI.shape) for name, values_OI in importance.items()
    ):
        for row in range(rows):
            room[group_of[level](name, row)] = room.get(group_of[level](name, row), 0) + min(
                top_k, columns
            )
    kept: dict[str, list[int]] = {name: [] for name in importance}
    for _, _, place, name, row in sorted(entries):
        if room[group_of[level](name, row)]:
            room[group_of[level](name, row)] -= 1
            kept[name].append(place)
    return {name: sorted(places) for name, places in kept.items()}


SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    SHAPES,
    st.integers(0, 2**32 - 1),
    st.sampled_from(LEVELS),
    st.integers(1, 8),
    st.sampled_from([1, 3, 1000]),
)
def test_ranking_is_sorting(
    shapes: list[tuple[int, int]], seed: int, level: Level, top_k: int, distinct: int
) -> None:
    """With few distinct values nearly everything ties."""
    rng = np.random.default_rng(seed)
    importance = {
        f"layer{number}": rng.integers(-distinct, distinct + 1, shape) / 7
        for number, shape in enumerate(shapes)
    }
    ranked = rank_indices(
        {name: torch.from_numpy(values_OI) for name, values_OI in importance.items()}, level, top_k
    )
    for smaller in range(1, top_k + 1):
        assert {
            name: places.at(smaller).tolist() for name, places in ranked.items()
        } == slow_places(importance, level, smaller)
    assert all(
        places.index_M.dtype == torch.int32 and places.rank_M.dtype == torch.uint8
        for places in ranked.values()
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_no_number_is_refused(level: Level, value: float) -> None:
    importance = {"first": torch.ones(2, 3), "second": torch.tensor([[1.0, value]])}
    with pytest.raises(BackboneError, match="second's connections is not finite"):
        rank_indices(importance, level, 1)


def test_ranking_leaves_its_input_alone() -> None:
    values_OI = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = values_OI.clone()
    for level in LEVELS:
        rank_indices({"layer": values_OI}, level, 2)
        assert torch.equal(values_OI, before)


def test_the_first_inputs_are_what_ranking_equal_entries_gives() -> None:
    equal = {"wide": torch.zeros(3, 5), "narrow": torch.zeros(4, 2)}
    shapes = {name: (len(values_OI), values_OI.shape[1]) for name, values_OI in equal.items()}
    for top_k in (1, 3):
        first, ranked = first_indices(shapes, top_k), rank_indices(equal, "neuron", top_k)
        assert same(first, ranked), top_k
        counts = {name: found.count(top_k) for name, found in first.items()}
        assert counts == {name: len(found.at(top_k)) for name, found in ranked.items()}


def test_a_selection_survives_its_file(selected: Any, tmp_path: Path) -> None:
    found = {
        **selected("vit", "gradient", "network"),
        "empty": RankedIndices.unranked(torch.zeros(0, dtype=torch.int64)),
    }
    write_selection(found, tmp_path / "folder" / "selection")
    assert same(read_selection(tmp_path / "folder" / "selection"), found)


# --- what does not belong together ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"criterion": "magnitude", "loss": "cross_entropy"},
            "loss would change nothing: criterion magnitude",
        ),
        (
            {"criterion": "random", "batch_size": 8, "precision": "bf16"},
            "batch_size, precision would change nothing",
        ),
        (
            {"criterion": "activation", "temperature": 0.5},
            "temperature would change nothing: criterion activation",
        ),
        (
            {"loss": "cross_entropy", "temperature": 0.5},
            "temperature would change nothing: criterion gradient with loss cross_entropy",
        ),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**chosen)


def test_every_selection_survives_being_written_out() -> None:
    for chosen, level in itertools.product(CRITERIA.values(), LEVELS):
        spec = Selection(**chosen, level=level)
        assert Selection.model_validate_json(spec.model_dump_json()) == spec


def test_a_network_plan_without_its_selection_has_the_right_sum(
    open_with: Any, selected: Any
) -> None:
    inputs, recipe = (
        open_with("swin", "gradient", "network"),
        Recipe(connections=Connections(top_k=2)),
    )
    guess = plan(inputs.backbone, recipe, 3)
    exact = plan(inputs.backbone, recipe, 3, selected("swin", "gradient", "network"))
    assert sum(tensor.values for tensor in guess) == sum(tensor.values for tensor in exact)
    assert guess != exact


@pytest.fixture
def network_pack(open_with: Any, selected: Any) -> tuple[Pack, Inputs]:
    inputs = open_with("vit", "gradient", "network")
    return packed(
        inputs, Recipe(connections=Connections(top_k=2)), selected("vit", "gradient", "network")
    )[0], inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": {"connections": {"top_k": 3}}},
            "not the 3648 that its recipe's top_k of 3 keeps",
        ),
        ({"selection": {"level": "neuron"}}, "connections"),
        ({"selection": {"level": "everywhere"}}, "selection is not valid: level"),
        (
            {"selection": {"criterion": "magnitude", "loss": "cross_entropy"}},
            "selection is not valid",
        ),
    ],
)
def test_a_pack_that_contradicts_its_selection_is_damaged(
    network_pack: tuple[Pack, Inputs], changes: dict[str, Any], message: str
) -> None:
    pack, inputs = network_pack
    changed = dataclasses.replace(pack, metadata=pack.metadata.model_copy(update=changes))
    with pytest.raises(PackDamaged, match=message):
        from_pack(changed, inputs.backbone)


def test_positions_that_nobody_can_compute_are_missing(open_with: Any, selected: Any) -> None:
    inputs = open_with("vit", "magnitude", "neuron")
    pack, _ = packed(
        inputs, Recipe(connections=Connections()), selected("vit", "magnitude", "neuron")
    )
    changed = dataclasses.replace(
        pack, metadata=pack.metadata.model_copy(update={"selection": {"criterion": "gradient"}})
    )
    with pytest.raises(
        PackDamaged, match="leaves out its positions, which criterion gradient cannot recompute"
    ):
        from_pack(changed, inputs.backbone)
