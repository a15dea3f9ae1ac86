"""What the tests of the selection share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from helpers_selection import CRITERIA, RECOMPUTED, TOP_K

from pipeline.adaptation import SelectedIndex
from pipeline.backbones import load_backbone
from pipeline.selection import stage
from pipeline.specs import Backbone, Level, Selection
from pipeline.training import Inputs


@pytest.fixture(scope="module")
def open_with(families: dict[str, Backbone], tiny_inputs: Inputs) -> Callable[..., Inputs]:
    """A function (family, criterion, level) -> the tiny task on that backbone, with that
    selection.
    """

    def build(family: str, criterion: str, level: Level = "neuron") -> Inputs:
        backbone, chosen = families[family], {**CRITERIA[criterion], "level": level}
        if criterion not in RECOMPUTED:
            chosen["batch_size"] = 16
        task = tiny_inputs.task.model_copy(
            update={"backbone": backbone, "selection": Selection(**chosen)}
        )
        return dataclasses.replace(
            tiny_inputs, task=task, backbone=load_backbone(backbone, task.input)
        )

    return build


@pytest.fixture(scope="module")
def sums(open_with: Callable[..., Inputs]) -> Callable[[str, str], dict[str, torch.Tensor]]:
    """A function (family, criterion) -> what one worker sums over all batches; levels share it."""

    @functools.cache
    def build(family: str, criterion: str) -> dict[str, torch.Tensor]:
        inputs = open_with(family, criterion)
        return stage._sums(inputs, stage._numbered_batches(inputs))

    return build


@pytest.fixture(scope="module")
def selected(
    open_with: Callable[..., Inputs], sums: Callable[[str, str], dict[str, torch.Tensor]]
) -> Callable[..., SelectedIndex]:
    """A function (family, criterion, level) -> the selection of TOP_K."""
    return functools.cache(
        lambda family, criterion, level: stage._ranked(
            open_with(family, criterion, level), dict(sums(family, criterion)), TOP_K
        )
    )
