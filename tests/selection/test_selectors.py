"""What every criterion promises, on every family of backbones and at every level.

Right counts, equal at all levels; a smaller K keeps a subset; the same selection whatever was drawn
before and from any number of workers; a pack of the announced bytes, which reloads to the same
connections and logits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import for_every
from helpers_selection import CRITERIA, FAMILIES, LEVELS, RECOMPUTED, TOP_K, packed, same

from pipeline.adaptation.packing import SizePlanner, from_pack
from pipeline.adaptation.selected.ranking import kept_at, kept_indices
from pipeline.adaptation.sites import weight_shapes
from pipeline.packs import ledger, pack_to_bytes, read_pack
from pipeline.selection import select_locally, stage
from pipeline.specs import Connections, Level, Recipe

every_criterion = pytest.mark.parametrize("criterion", CRITERIA)

# --- the suite ------------------------------------------------------------------------------------


@every_criterion
@for_every("family", FAMILIES)
@for_every("level", LEVELS)
def test_every_level_keeps_as_many(
    family: str, criterion: str, level: Level, open_with: Any, selected: Any
) -> None:
    shapes, found = (
        weight_shapes(open_with(family, criterion).backbone.model),
        selected(family, criterion, level),
    )
    assert list(found) == list(shapes)
    for top_k in range(1, TOP_K + 1):
        places = {name: ranked.at(top_k).numpy() for name, ranked in found.items()}
        assert all(
            (np.diff(index_N) > 0).all() and (index_N >= 0).all() for index_N in places.values()
        )
        assert all(
            index_N.max(initial=0) < shapes[name][0] * shapes[name][1]
            for name, index_N in places.items()
        )
        assert sum(map(len, places.values())) == sum(
            rows * min(top_k, columns) for rows, columns in shapes.values()
        )
        if level != "network":
            assert {name: len(index_N) for name, index_N in places.items()} == {
                name: kept_at(shape, top_k) for name, shape in shapes.items()
            }
        if level == "neuron":
            assert all(
                (np.bincount(places[name] // columns) == min(top_k, columns)).all()
                for name, (_, columns) in shapes.items()
            )


@every_criterion
@for_every("family", FAMILIES)
@for_every("level", LEVELS)
def test_a_smaller_k_keeps_a_subset_and_is_what_would_be_selected(
    family: str, criterion: str, level: Level, open_with: Any, sums: Any, selected: Any
) -> None:
    inputs, found = open_with(family, criterion, level), selected(family, criterion, level)
    for top_k in range(1, TOP_K):
        fewer = stage._ranked(inputs, dict(sums(family, criterion)), top_k)
        for name, ranked in found.items():
            assert torch.equal(ranked.at(top_k), fewer[name].at(top_k))
            assert torch.equal(fewer[name].at(top_k), fewer[name].at(TOP_K)), (
                "nothing beyond its K is in a selection"
            )
            assert set(ranked.at(top_k).tolist()) <= set(ranked.at(top_k + 1).tolist())


@every_criterion
@for_every("family", FAMILIES)
def test_it_repeats_whatever_was_drawn_before(
    family: str, criterion: str, open_with: Any, selected: Any
) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(
        select_locally(open_with(family, criterion, "network"), TOP_K),
        selected(family, criterion, "network"),
    )
    assert torch.equal(torch.get_rng_state(), state)


@every_criterion
@for_every("family", FAMILIES)
@for_every("level", LEVELS)
def test_any_number_of_workers_selects_the_same(
    family: str, criterion: str, level: Level, open_with: Any, sums: Any, selected: Any
) -> None:
    if criterion in RECOMPUTED:
        assert sums(family, criterion) == {}
        return
    inputs = open_with(family, criterion, level)
    for workers in (2, 3):
        shares = _shares(family, criterion, workers, open_with)
        totals = {name: sum(share[name] for share in shares) for name in shares[0]}
        assert same(stage._ranked(inputs, totals, TOP_K), selected(family, criterion, level))


@functools.cache
def _shares(
    family: str, criterion: str, workers: int, open_with: Any
) -> list[dict[str, torch.Tensor]]:
    inputs = open_with(family, criterion)
    batches = stage._numbered_batches(inputs)
    assert len(batches) >= workers
    return [stage._sums(inputs, batches[rank::workers]) for rank in range(workers)]


@every_criterion
@for_every("family", FAMILIES)
@for_every("level", LEVELS)
def test_its_pack_has_the_announced_bytes_and_reloads(
    family: str, criterion: str, level: Level, open_with: Any, selected: Any
) -> None:
    inputs, found = open_with(family, criterion, level), selected(family, criterion, level)
    recipe = Recipe(connections=Connections(top_k=2, bits=4))
    pack, model = packed(inputs, recipe, found)
    content = pack_to_bytes(pack)
    planner = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, found)
    assert planner.size_bytes(recipe) == len(content)
    assert planner.ledger(recipe) == ledger(pack)
    before = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes).size_bytes(recipe)
    assert before <= len(content), "known before the selection is: a lower bound"
    assert (ledger(pack).get("positions", 0) == 0) == (criterion in RECOMPUTED)
    if criterion in RECOMPUTED:
        assert before == len(content)
    reloaded = from_pack(read_pack(content), inputs.backbone)
    assert reloaded.positions().keys() == kept_indices(found, 2).keys()
    assert all(
        torch.equal(index_N, found[name].at(2)) for name, index_N in reloaded.positions().items()
    )
    images = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        expected = model.eval()(images)
        torch.testing.assert_close(
            reloaded.eval()(images),
            expected,
            rtol=1e-5,
            atol=1e-5 * max(1.0, float(expected.abs().max())),
        )
