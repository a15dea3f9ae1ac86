"""Shares and overlaps of selections against counting by hand; the figures are drawn and do not
change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from selection_overlap import (
    block_of,
    chance_overlap,
    draw_overlaps,
    draw_shares,
    overlap,
    share_by_block,
)

from pipeline.adaptation import RankedIndices, SelectedIndex


def selection(**places: list[int]) -> SelectedIndex:
    """The first place of each layer at K = 1, the others at K = 2."""
    return {
        name.replace("__", "."): RankedIndices(
            torch.tensor(sorted(listed), dtype=torch.int32), _ranks(listed)
        )
        for name, listed in places.items()
    }


def _ranks(listed: list[int]) -> torch.Tensor:
    first = listed[0] if listed else -1
    return torch.tensor([1 if place == first else 2 for place in sorted(listed)], dtype=torch.uint8)


FIRST = selection(
    patch_embed__proj=[4],
    blocks__0__attn__qkv=[1, 5, 7],
    blocks__0__mlp__fc1=[2],
    blocks__1__mlp__fc1=[],
)
SECOND = selection(
    patch_embed__proj=[3],
    blocks__0__attn__qkv=[5, 7],
    blocks__0__mlp__fc1=[2, 9],
    blocks__1__mlp__fc1=[0],
)


def test_layers_belong_to_blocks() -> None:
    names = {
        "blocks.10.attn.qkv": "blocks.10",
        "layers.1.blocks.0.mlp.fc1": "layers.1.blocks.0",
        "stages.2.blocks.8.conv_dw": "stages.2.blocks.8",
        "layers.1.downsample.reduction": "layers",
        "patch_embed.proj": "patch_embed",
        "stem.0": "stem",
    }
    assert {name: block_of(name) for name in names} == names


def test_shares_are_counted() -> None:
    assert share_by_block(FIRST, 2) == {"patch_embed": 1 / 5, "blocks.0": 4 / 5, "blocks.1": 0}
    assert share_by_block(FIRST, 1) == {"patch_embed": 1 / 3, "blocks.0": 2 / 3, "blocks.1": 0}


def test_overlaps_are_counted() -> None:
    assert overlap(FIRST, FIRST, 2) == 1
    assert (
        overlap(FIRST, SECOND, 2) == overlap(SECOND, FIRST, 2) == 3 / 5
    )  # 5 and 7 of qkv, 2 of fc1
    assert overlap(FIRST, SECOND, 1) == 1 / 3  # at K = 1: 4, 1, 2 and 3, 5, 2, 0


def test_chance_is_the_mean_overlap_of_random_places() -> None:
    entries = {"a": 7, "b": 5}
    generator = torch.Generator().manual_seed(0)

    def draw() -> SelectedIndex:
        return {
            name: RankedIndices.unranked(torch.randperm(entries[name], generator=generator)[:count])
            for name, count in (("a", 3), ("b", 2))
        }

    expected = chance_overlap(draw(), draw(), entries, 1)
    assert expected == pytest.approx((9 / 7 + 4 / 5) / 5)
    assert sum(overlap(draw(), draw(), 1) for _ in range(2000)) / 2000 == pytest.approx(
        expected, abs=0.02
    )


def test_the_figures_depend_on_their_data_alone(tmp_path: Path) -> None:
    shares = {
        level: share_by_block(FIRST, top_k)
        for top_k, level in enumerate(("by neuron", "by layer"), start=1)
    }
    for turn in ("first", "second"):
        draw_shares(shares, tmp_path / f"{turn}-shares.png", title="shares")
        draw_overlaps(
            {"by neuron": [[1, 0.3], [0.3, 1]]},
            ["one", "two"],
            tmp_path / f"{turn}-overlaps.png",
            title="overlaps",
        )
    for kind in ("shares", "overlaps"):
        content = (tmp_path / f"first-{kind}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / f"second-{kind}.png").read_bytes()
