"""Selection against its definition: the loss pair by pair, the gradient by plain autograd, the
ranking by sorting.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from helpers_cases import for_every
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.selected import topk
from pipeline.adaptation.selected.topk import top_connections
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import Images, numbered_generator, shard_batches, two_views
from pipeline.selection import select_locally, selection_key, supervised_contrastive_loss
from pipeline.selection.gradient import SAVED_BYTES, _collect_gradients, gradient_sums, saved_bytes
from pipeline.selection.losses import make_loss
from pipeline.specs import Backbone, Input, Selection
from pipeline.training import Inputs

quick = settings(max_examples=100, derandomize=True, deadline=None)
FAMILIES = ("vit", "swin", "convnext", "convnext_linear")


# --- the loss -------------------------------------------------------------------------------------


def slow_loss(features: list[list[float]], labels: list[int], temperature: float) -> float:
    """Khosla et al., equation 2, with loops over anchors, positives and all others."""
    z = [[number / math.hypot(*row) for number in row] for row in features]
    similarity = [
        [sum(a * b for a, b in zip(row, other, strict=True)) / temperature for other in z]
        for row in z
    ]
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        denominator = math.fsum(math.exp(similarity[i][a]) for a in others)
        total -= sum(math.log(math.exp(similarity[i][p]) / denominator) for p in positives) / len(
            positives
        )
    return total / len(z)


@for_every("temperature", [0.07, 0.5, 2.0])
@for_every("labels", [[0, 1, 2], [0, 0, 0, 1], [3, 1, 1, 1, 0, 2, 2], [5]])
def test_the_loss_is_the_definition(labels: list[int], temperature: float) -> None:
    features = torch.randn(
        2 * len(labels), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = slow_loss(features.tolist(), labels * 2, temperature)
    found = supervised_contrastive_loss(features, torch.tensor(labels).repeat(2), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(
        supervised_contrastive_loss(1000 * features, torch.tensor(labels).repeat(2), temperature)
    ) == pytest.approx(expected, abs=1e-9)


def test_the_losss_gradient_is_its_derivative() -> None:
    features = torch.randn(
        8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    labels = torch.tensor([0, 1, 1, 2]).repeat(2)
    assert torch.autograd.gradcheck(
        lambda features: supervised_contrastive_loss(features, labels, 0.3), (features,)
    )


def test_identical_views_and_a_low_temperature_give_finite_gradients() -> None:
    features = torch.ones(6, 3, requires_grad=True)
    supervised_contrastive_loss(features, torch.tensor([0, 1, 2, 0, 1, 2]), 0.001).backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


# --- the strongest connections --------------------------------------------------------------------


def slow_top(rows: list[list[float]], top_k: int) -> list[list[int]]:
    """Columns by importance in float32, equal ones by column."""
    chosen = []
    for row in rows:
        importance = [abs(float(np.float32(number))) for number in row]
        chosen.append(
            sorted(
                range(len(row)),
                key=lambda column, importance=importance: (-importance[column], column),
            )[:top_k]
        )
    return chosen


NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 3e38, -3.4e38, 2.0**-126]),
    st.integers(-3, 3).map(float),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@quick
@given(st.data(), st.integers(1, 5), st.integers(1, 12), st.integers(1, 15))
def test_the_strongest_come_first_and_ties_go_to_the_lowest_column(
    data: st.DataObject, rows: int, columns: int, top_k: int
) -> None:
    numbers = data.draw(
        st.lists(
            st.lists(NUMBERS, min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
    found = top_connections(torch.tensor(numbers, dtype=torch.float64), top_k)
    assert found.dtype == torch.int32
    assert found.tolist() == slow_top(numbers, top_k)


@quick
@given(st.data(), st.integers(1, 8), st.integers(1, 8))
def test_a_smaller_k_is_a_prefix_of_a_larger(data: st.DataObject, small: int, more: int) -> None:
    sums_OI = torch.tensor(
        [data.draw(st.lists(NUMBERS, min_size=10, max_size=10)) for _ in range(3)],
        dtype=torch.float64,
    )
    assert torch.equal(
        top_connections(sums_OI, small), top_connections(sums_OI, small + more)[:, :small]
    )


def test_a_wide_row_is_ranked_exactly() -> None:
    sums_OI = torch.randn(
        4, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).round(decimals=1)
    assert top_connections(sums_OI, 64).tolist() == slow_top(sums_OI.tolist(), 64)


@pytest.mark.parametrize("entries", [1, 16, 35, 1000])
def test_rows_are_ranked_alike_in_blocks_of_any_size(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums_OI = torch.randn(
        9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).round(decimals=1)
    monkeypatch.setattr(topk, "BLOCK_ENTRIES", entries)
    assert top_connections(sums_OI, 4).tolist() == slow_top(sums_OI.tolist(), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_left_as_they_were(dtype: torch.dtype) -> None:
    sums_OI = torch.randn(3, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = sums_OI.clone()
    top_connections(sums_OI, 2)
    assert torch.equal(sums_OI, before)


def test_sums_need_not_be_contiguous() -> None:
    sums_IO = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert top_connections(sums_IO.T, 3).tolist() == slow_top(sums_IO.T.tolist(), 3)


# --- the gradient ---------------------------------------------------------------------------------


def inputs_with(inputs: Inputs, backbone: Backbone) -> Inputs:
    task = inputs.task.model_copy(update={"backbone": backbone})
    return dataclasses.replace(inputs, task=task, backbone=load_backbone(backbone, task.input))


def ranked_columns(inputs: Inputs, selected: SelectedIndex) -> dict[str, list[list[int]]]:
    """For each layer, the columns of every neuron, strongest first."""
    columns: dict[str, list[list[int]]] = {}
    for name, (rows, inputs_of_row) in weight_shapes(inputs.backbone.model).items():
        ranked = sorted(
            zip(selected[name].rank_M.tolist(), selected[name].index_M.tolist(), strict=True)
        )
        columns[name] = [
            [place % inputs_of_row for _, place in ranked if place // inputs_of_row == row]
            for row in range(rows)
        ]
    return columns


def slow_sums(inputs: Inputs, *, absolute: bool = False) -> dict[str, np.ndarray]:
    """Batch by batch: autograd on a copy of the whole network, gradients added up with their sign
    (or, wrongly, without).
    """
    task, loaded = inputs.task, inputs.backbone
    model = copy.deepcopy(loaded.model)
    weights = {
        name: module.weight.requires_grad_()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    sums = {name: np.zeros((len(weight), weight[0].numel())) for name, weight in weights.items()}
    for number, samples in enumerate(
        shard_batches(inputs.splits["train"], task.selection.batch_size, seed=task.seed)
    ):
        images, labels = inputs.reader("train").read(samples)
        views = two_views(images, numbered_generator(task.seed, number), flip=task.input.flip)
        pixels = (views - torch.tensor(loaded.images.mean)[:, None, None]) / torch.tensor(
            loaded.images.std
        )[:, None, None]
        loss = supervised_contrastive_loss(
            model(pixels), torch.cat([labels, labels]), task.selection.temperature
        )
        for name, gradient in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            array = gradient.numpy().reshape(sums[name].shape).astype(np.float64)
            sums[name] += np.abs(array) if absolute else array
    return sums


@for_every("family", FAMILIES)
def test_a_selection_is_the_sorted_sum_of_plain_gradients(
    family: str, families: dict[str, Backbone], tiny_inputs: Inputs
) -> None:
    inputs = inputs_with(tiny_inputs, families[family])
    expected = {name: slow_top(sums_OI.tolist(), 3) for name, sums_OI in slow_sums(inputs).items()}
    assert ranked_columns(inputs, select_locally(inputs, 3)) == expected
    assert len(expected) > 5


def test_signs_matter(tiny_inputs: Inputs) -> None:
    """Importance is |sum of g|: with the sum of |g| other connections would be chosen, so the test
    above can tell.
    """
    assert ranked_columns(tiny_inputs, select_locally(tiny_inputs, 3)) != {
        name: slow_top(sums_OI.tolist(), 3)
        for name, sums_OI in slow_sums(tiny_inputs, absolute=True).items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shares_of_the_batches_add_up_to_the_whole(
    precision: Literal["fp32", "bf16"], tiny_inputs: Inputs
) -> None:
    task = tiny_inputs.task
    spec = Selection(batch_size=task.selection.batch_size, precision=precision)
    batches = list(
        enumerate(
            shard_batches(tiny_inputs.splits["train"], task.selection.batch_size, seed=task.seed)
        )
    )
    assert len(batches) >= 4

    def sums(share: list) -> dict[str, torch.Tensor]:
        loss = make_loss(spec, tiny_inputs.kind, tiny_inputs.backbone.width, 8, task.seed)
        read = ((number, *tiny_inputs.reader("train").read(samples)) for number, samples in share)
        return gradient_sums(tiny_inputs.backbone, read, spec, loss, seed=task.seed, flip=False)

    whole, first, second = sums(batches), sums(batches[0::2]), sums(batches[1::2])
    for name, sum_OI in whole.items():
        torch.testing.assert_close(first[name] + second[name], sum_OI, rtol=1e-12, atol=1e-15)


def test_no_gradient_outlives_its_layers_turn(tiny_inputs: Inputs) -> None:
    """A hook that runs after the one that folds: by then no layer of the network holds a
    gradient.
    """
    model = tiny_inputs.backbone.fresh_model()
    sums = _collect_gradients(model)
    alive: list[int] = []

    def count(weight: torch.Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count)
    # Not the plain sum: the last norm makes it a constant.
    model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).cumsum(
        dim=1
    ).square().sum().backward()
    assert alive == [0] * len(sums)
    assert all(sum_OI.dtype == torch.float64 and bool(sum_OI.any()) for sum_OI in sums.values())


def test_half_precision_selects_nearly_the_same(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.devices.has_bf16_units", lambda device: True)
    half = tiny_inputs.task.model_copy(
        update={"selection": tiny_inputs.task.selection.model_copy(update={"precision": "bf16"})}
    )
    full, found = (
        select_locally(tiny_inputs, 1),
        select_locally(dataclasses.replace(tiny_inputs, task=half), 1),
    )
    same = (
        torch.cat([full[name].index_M == ranked.index_M for name, ranked in found.items()])
        .float()
        .mean()
    )
    assert 0.8 < float(same) < 1, "another precision is used, and hardly matters"


def test_the_backbone_is_left_as_it_was(tiny_inputs: Inputs) -> None:
    state = torch.get_rng_state()
    select_locally(tiny_inputs, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in tiny_inputs.backbone.model.parameters()
    )


def test_the_key_names_everything_a_selection_depends_on(
    tiny_inputs: Inputs, families: dict[str, Backbone]
) -> None:
    task = tiny_inputs.task
    keys = [selection_key(tiny_inputs, top_k) for top_k in (1, 2)]
    keys.append(selection_key(inputs_with(tiny_inputs, families["swin"]), 1))
    keys += [
        selection_key(dataclasses.replace(tiny_inputs, task=task.model_copy(update=update)), 1)
        for update in (
            {"seed": 1},
            {"val_fraction": 0.3},
            {"folds": 5},
            {"selection": Selection(batch_size=8)},
            {"selection": task.selection.model_copy(update={"precision": "bf16"})},
            {"selection": task.selection.model_copy(update={"level": "layer"})},
            {"selection": task.selection.model_copy(update={"criterion": "magnitude"})},
            {"selection": task.selection.model_copy(update={"loss": "cross_entropy"})},
            {"input": Input(size_px=32, flip=True)},
        )
    ]
    keys.append(
        selection_key(
            dataclasses.replace(
                tiny_inputs,
                index=tiny_inputs.index.model_copy(update={"classes": list("abcdefgh")}),
            ),
            1,
        )
    )
    assert len(set(keys)) == len(keys)
    renamed = dataclasses.replace(
        tiny_inputs, task=task.model_copy(update={"name": "other", "description": "x"})
    )
    assert selection_key(renamed, 1) == keys[0], "its name is no part of what a task selects"


def test_a_batch_in_pieces_has_the_gradients_of_the_whole(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_inputs.task
    batches = list(
        enumerate(
            shard_batches(tiny_inputs.splits["train"], task.selection.batch_size, seed=task.seed)
        )
    )[:2]
    passed: list[int] = []

    def sums() -> dict[str, torch.Tensor]:
        loss = make_loss(task.selection, tiny_inputs.kind, tiny_inputs.backbone.width, 8, task.seed)
        read = ((number, *tiny_inputs.reader("train").read(samples)) for number, samples in batches)
        return gradient_sums(
            tiny_inputs.backbone, read, task.selection, loss, seed=task.seed, flip=False
        )

    def noted(
        backbone: LoadedBackbone, fresh: Callable[[], nn.Module] = tiny_inputs.backbone.fresh_model
    ) -> nn.Module:
        model = fresh()
        model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
        return model

    whole = sums()
    monkeypatch.setattr(LoadedBackbone, "fresh_model", noted)
    monkeypatch.setitem(SAVED_BYTES, "cpu", 5 * saved_bytes(tiny_inputs.backbone))
    in_pieces = sums()
    assert max(passed) == 5
    assert sum(passed) == 2 * 2 * sum(len(samples) for _, samples in batches), (
        "two views, passed twice"
    )
    for name, sum_OI in whole.items():
        rounding = 1e-5 * float(sum_OI.max())
        torch.testing.assert_close(in_pieces[name], sum_OI, rtol=1e-4, atol=rounding)


def test_saved_bytes_are_those_of_the_formula() -> None:
    """Of a network of one Linear layer and a ReLU on a flat image: the layer's input and the ReLU's
    output.
    """

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1)).relu()

    model = Flat()
    backbone = SimpleNamespace(model=model, fresh_model=lambda: model, takes=Images(8))
    assert saved_bytes(backbone) == 4 * (3 * 8 * 8 + 5)  # type: ignore[arg-type]
