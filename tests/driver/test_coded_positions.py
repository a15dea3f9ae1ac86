"""Positions of connections are coded once, elsewhere, and kept beside the selection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.packing import SizePlanner
from pipeline.driver import coded_positions
from pipeline.driver.coded_positions import CodedPositions
from pipeline.specs import Connections, Recipe
from pipeline.training import Inputs

RECIPES = [
    Recipe(connections=Connections(top_k=top_k, bits=bits)) for top_k in (1, 2) for bits in (1, 8)
]


def sizes(inputs: Inputs, selected: SelectedIndex, *code: Any) -> list[int]:
    planner = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, selected, *code)
    return [planner.size_bytes(recipe) for recipe in RECIPES]


def test_positions_are_coded_elsewhere_once_and_then_read(
    tiny_inputs: Inputs,
    random_selection: Callable[..., SelectedIndex],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selected = random_selection(tiny_inputs.backbone, 2)
    expected = sizes(tiny_inputs, selected)
    calls: list[str] = []

    def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    code = CodedPositions(tmp_path / "chosen.safetensors", elsewhere)
    assert sizes(tiny_inputs, selected, code) == expected
    assert not calls, "few positions are coded here"
    monkeypatch.setattr(coded_positions, "QUICKLY_CODED", 10)
    assert sizes(tiny_inputs, selected, code) == expected
    assert calls == ["encode_positions"] * 2, "once for each number of connections"
    assert len(list(tmp_path.glob("chosen-*.positions"))) == 2
    assert sizes(tiny_inputs, selected, code) == expected
    other = random_selection(tiny_inputs.backbone, 2, seed=1)
    assert len(calls) == 2
    assert sizes(tiny_inputs, other, code) == sizes(tiny_inputs, other)
    assert len(calls) == 4, "another selection has other positions"


def test_a_process_codes_positions_once(
    tiny_inputs: Inputs,
    random_selection: Callable[..., SelectedIndex],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selected = random_selection(tiny_inputs.backbone, 2, seed=7)
    expected = sizes(tiny_inputs, selected)
    monkeypatch.setattr("pipeline.packs.parts.encode_positions", lambda *given: 1 / 0)
    assert sizes(tiny_inputs, selected) == expected
