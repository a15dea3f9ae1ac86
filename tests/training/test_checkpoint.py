"""Checkpoints: a fit that dies at any step resumes in the middle of its epoch and gives the bytes
of one that did not.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

from pipeline.adaptation import RankedIndices
from pipeline.errors import StorageError
from pipeline.selection import select_locally
from pipeline.specs import Recipe
from pipeline.training import Inputs, loop
from pipeline.training import fit as fit_module
from pipeline.training.fit import CHECKPOINT_FILE, PACK_FILE, fit, steps_kept
from pipeline.training.run_checkpoint import Checkpoint, Progress

RECIPE = {
    "connections": {"bits": 4},
    "adapter": {"width": 4, "bits": 1, "dropout": 0.5},
    "training": {
        "epochs": 2,
        "batch_size": 16,
        "augment": "light",
        "mixup": 0.2,
        "ema": 0.9,
        "learning_rate": 0.01,
    },
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def selected(tiny_inputs: Inputs) -> dict[str, RankedIndices]:
    return select_locally(tiny_inputs, 2)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[steps taken, steps after which the next one dies]; a checkpoint follows every step."""
    monkeypatch.setattr(
        fit_module,
        "Checkpoint",
        functools.partial(Checkpoint, every_seconds=0, cost_share=math.inf),
    )
    counts, step = [0, 1 << 30], loop._step

    def counted(*arguments: object) -> tuple[float, bool]:
        if counts[0] == counts[1]:
            raise Killed
        counts[0] += 1
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", counted)
    return counts


def test_a_fit_that_dies_goes_on_and_gives_the_same_bytes(
    tiny_inputs: Inputs, selected: dict[str, RankedIndices], steps: list[int], tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(RECIPE)
    fit(tiny_inputs, recipe, selected, tmp_path / "whole")
    total, content = steps[0], (tmp_path / "whole" / PACK_FILE).read_bytes()
    per_epoch = total // 2
    for died_after in (1, per_epoch - 1, per_epoch, per_epoch + 1, total - 1):
        steps[:] = [0, died_after]
        folder = tmp_path / str(died_after)
        with pytest.raises(Killed):
            fit(tiny_inputs, recipe, selected, folder)
        assert steps_kept(folder) == died_after
        steps[:] = [0, 1 << 30]
        fit(tiny_inputs, recipe, selected, folder)
        assert steps[0] == total - died_after, "no step is taken twice"
        assert (folder / PACK_FILE).read_bytes() == content, died_after
        assert not (folder / CHECKPOINT_FILE).exists()
        assert steps_kept(folder) == math.inf


@pytest.mark.parametrize("damage", ["cut", "one bit", "foreign", "of another model"])
def test_a_checkpoint_that_cannot_be_used_is_a_fresh_start(
    damage: str,
    tiny_inputs: Inputs,
    selected: dict[str, RankedIndices],
    steps: list[int],
    tmp_path: Path,
) -> None:
    recipe = Recipe.model_validate(RECIPE)
    other = (
        recipe
        if damage != "of another model"
        else Recipe.model_validate({**RECIPE, "adapter": {"width": 3, "bits": 1, "dropout": 0.5}})
    )
    steps[1] = 2
    with pytest.raises(Killed):
        fit(tiny_inputs, other, selected, tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "one bit":
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(b"something else")
    steps[:] = [0, 1 << 30]
    fit(tiny_inputs, recipe, selected, tmp_path)
    fit(tiny_inputs, recipe, selected, tmp_path / "fresh")
    assert (tmp_path / PACK_FILE).read_bytes() == (tmp_path / "fresh" / PACK_FILE).read_bytes()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    (tmp_path / "file").write_text("")
    checkpoint = Checkpoint(tmp_path / "file" / "state", every_seconds=0)
    with pytest.raises(StorageError, match="cannot be written"):
        checkpoint.save(Progress(), torch.optim.AdamW([parameter]))


def test_it_is_written_no_more_often_than_asked(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", every_seconds=3600)
    assert not checkpoint.is_due()
    checkpoint.every_seconds = 0
    assert checkpoint.is_due()


def test_what_takes_long_to_write_is_written_less_often(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    checkpoint = Checkpoint(tmp_path / "state", every_seconds=0, cost_share=1e-9)
    assert checkpoint.is_due()
    checkpoint.save(Progress(1), torch.optim.AdamW([parameter]))
    assert checkpoint.step() == 1
    assert not checkpoint.is_due()
