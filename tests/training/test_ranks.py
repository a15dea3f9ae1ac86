"""Several ranks train as one process does: the same gradients, every sample once, and on from a
checkpoint as if nothing had happened.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.adaptation import attach
from pipeline.backbones import fingerprint
from pipeline.data import prepare, shards
from pipeline.errors import ClusterError
from pipeline.kinds import Score
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally
from pipeline.specs import Recipe, Task
from pipeline.training import ALONE, Inputs, Ranks, evaluate, loop, open_inputs
from pipeline.training import fit as fit_module
from pipeline.training.fit import PACK_FILE, fit
from pipeline.training.full_size import final_outcomes
from pipeline.training.run_checkpoint import Checkpoint

RECIPE = {
    "connections": {"bits": 4},
    "adapter": {"width": 4, "bits": 1, "dropout": 0.5},
    "training": {"epochs": 2, "batch_size": 16, "augment": "light", "learning_rate": 0.01},
}


OnRanks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRanks]:
    """A function (world, work, *arguments) -> what `work(*arguments, ranks)` gives on each of
    `world` processes.
    """
    folder, groups = tmp_path_factory.mktemp("ranks"), itertools.count()
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
            store = folder / str(
                next(groups)
            )  # where they meet, so that no process takes two of them
            running = [
                pool.submit(_on_rank, work, store, Ranks(rank, world), arguments)
                for rank in range(world)
            ]
            return [each.result(timeout=300) for each in running]

        yield run


def _on_rank(work: Callable[..., Any], store: Path, ranks: Ranks, arguments: Sequence[Any]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=ranks.rank, world_size=ranks.world
    )
    try:
        return work(*arguments, ranks)
    finally:
        dist.destroy_process_group()


def opened(task_json: str, data_folder: Path) -> Inputs:
    return open_inputs(Task.model_validate_json(task_json), data_folder)


# --- gradients ------------------------------------------------------------------------------------

# Steps by the samples of each of three ranks; with two, the last two are one.
STEPS = [(6, 5, 5), (7, 0, 1), (0, 3, 9)]


def gradients(
    task_json: str, data_folder: Path, ranks: Ranks
) -> list[tuple[float, list[np.ndarray]]]:
    """Loss and gradients of each of `STEPS`, without dropout, augmentation or a balance of experts,
    which know their own samples only.
    """
    inputs = opened(task_json, data_folder)
    recipe = Recipe.model_validate(
        {
            "connections": {"bits": 32},
            "smoa": {"experts": 2, "width": 4, "balance_weight": 0, "dropout": 0, "bits": 32},
            "norms": {},
            "training": {"precision": "fp32"},
        }
    )
    selected = select_locally(inputs, 2)
    model = attach(
        inputs.backbone, recipe, len(inputs.index.classes), selected=selected, seed=3
    ).train()
    optimiser = torch.optim.SGD(model.values.parameters(), lr=0.01)
    reader, samples, steps = inputs.reader("train"), inputs.splits["train"].samples, []
    for sizes in STEPS:
        first, second, third = np.split(samples[: sum(sizes)], np.cumsum(sizes)[:-1])
        parts = {
            1: [samples[: sum(sizes)]],
            2: [first, np.concatenate([second, third])],
            3: [first, second, third],
        }[ranks.world]
        loss = loop._step(
            model,
            optimiser,
            *reader.read(parts[ranks.rank]),
            recipe.training,
            inputs.kind,
            torch.float32,
            ranks,
            recipe.training.batch_size,
        )
        steps.append(
            (
                float(loss),
                [
                    each.grad.numpy().copy()
                    for each in model.values.parameters()
                    if each.grad is not None
                ],
            )
        )
    return steps


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_step_as_one_process_on_the_whole_batch(
    world: int, on_ranks: OnRanks, tiny_task: Task, tiny_data: Path
) -> None:
    alone = gradients(tiny_task.model_dump_json(), tiny_data, ALONE)
    for steps in on_ranks(world, gradients, tiny_task.model_dump_json(), tiny_data):
        for (loss, together), (expected_loss, expected) in zip(steps, alone, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            for here, there in zip(together, expected, strict=True):
                np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5 * np.abs(there).max())


# --- what ranks tell each other -------------------------------------------------------------------


def talk(ranks: Ranks) -> dict[str, Any]:
    said: dict[str, Any] = {
        "total": ranks.total(ranks.rank + 1),
        "gathered": ranks.gathered(torch.tensor([ranks.rank, 7])).tolist(),
    }
    said["content"] = [
        ranks.from_first(content if ranks.is_first else b"another") for content in (b"first", b"")
    ]
    ranks.check_agree({"same": torch.ones(3)})
    try:
        ranks.check_agree({"other": torch.tensor(ranks.rank)})
    except ClusterError as error:
        said["disagreement"] = str(error)
    return said


def test_every_rank_hears_the_same(on_ranks: OnRanks) -> None:
    first, *others = on_ranks(3, talk)
    assert all(other == first for other in others)
    assert first["total"] == 6
    assert first["gathered"] == [[0, 7], [1, 7], [2, 7]]
    assert first["content"] == [b"first", b""]
    assert "3 ranks of a trial or fit trained different values" in first["disagreement"]


def test_a_rank_alone_needs_nobody() -> None:
    assert ALONE.total(5) == 5
    assert ALONE.from_first(b"x") == b"x"
    assert ALONE.gathered(torch.tensor([1])).tolist() == [[1]]
    assert ALONE.seed(11) == 11
    ALONE.check_agree({})


def test_ranks_draw_other_numbers() -> None:
    assert len({Ranks(rank, 4).seed(11) for rank in range(4)}) == 4


# --- trials and fits ------------------------------------------------------------------------------


class Killed(Exception):
    pass


def counted_fit(
    inputs: Inputs, folder: Path, ranks: Ranks, steps_before_death: int = 1 << 30
) -> int:
    """Fit with a checkpoint at every step; how many steps were taken. Raises Killed where there are
    more than `steps_before_death`.
    """
    taken, step = 0, loop._step

    def counted(*arguments: Any) -> float:
        nonlocal taken
        if taken == steps_before_death:
            raise Killed
        taken += 1
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", counted)
        patch.setattr(
            fit_module,
            "Checkpoint",
            functools.partial(Checkpoint, every_seconds=0, cost_share=math.inf),
        )
        fit(inputs, Recipe.model_validate(RECIPE), select_locally(inputs, 2), folder, ranks=ranks)
    return taken


def interrupted_fits(
    task_json: str, data_folder: Path, folder: Path, ranks: Ranks
) -> list[tuple[int, int]]:
    """For each step after which the ranks died: that step, and how many were left to take. The last
    fit was none of several ranks before.
    """
    inputs = opened(task_json, data_folder)
    total, left = counted_fit(inputs, folder / "whole", ranks), []
    for died_after in (1, total // 2 - 1, total // 2, total // 2 + 2):
        with pytest.raises(Killed):
            counted_fit(inputs, folder / str(died_after), ranks, died_after)
        left.append((died_after, counted_fit(inputs, folder / str(died_after), ranks)))
    if ranks.is_first:
        with pytest.raises(Killed):
            counted_fit(inputs, folder / "of one", ALONE, 2)
    ranks.total(1)
    return [*left, (0, counted_fit(inputs, folder / "of one", ranks)), (0, total)]


def test_two_ranks_go_on_in_the_middle_of_an_epoch_and_give_the_same_bytes(
    on_ranks: OnRanks, tiny_task: Task, tiny_data: Path, tmp_path: Path
) -> None:
    first, second = on_ranks(2, interrupted_fits, tiny_task.model_dump_json(), tiny_data, tmp_path)
    assert first == second
    (*_, (_, total)) = first
    assert total == 2 * -(-96 // 16), "as many steps as one process takes"
    assert [taken for _, taken in first] == [total - died_after for died_after, _ in first], (
        "no step is taken twice, nor on from one process"
    )
    content = (tmp_path / "whole" / PACK_FILE).read_bytes()
    for died_after, _ in first[:-2]:
        assert (tmp_path / str(died_after) / PACK_FILE).read_bytes() == content, died_after
    assert (tmp_path / "of one" / PACK_FILE).read_bytes() == content
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["device"].startswith(
        "2 x CPU ("
    )


def scored(
    task_json: str, data_folder: Path, ranks: Ranks
) -> tuple[list[Score], list[list[float]], list[int], str]:
    """A trial's scores; outputs and labels of the model without training; the shards that this rank
    opened.
    """
    inputs = opened(task_json, data_folder)
    recipe = Recipe.model_validate({**RECIPE, "connections": None})
    scores = [found for found, _ in run_trial(inputs, recipe, None, ranks=ranks)]
    model = attach(inputs.backbone, recipe, len(inputs.index.classes), seed=1)
    reader, read = inputs.reader("val"), set()
    decoded = reader._decoded

    def noted(samples: np.ndarray, content: Any) -> Any:
        read.update(samples[:, 0].tolist())
        return decoded(samples, content)

    reader._decoded = noted  # type: ignore[method-assign]
    outcomes = evaluate(model, reader, inputs.splits["val"], inputs.kind, ranks=ranks)
    rows = np.column_stack([outcomes.outputs, outcomes.targets]).tolist()
    return scores, rows, sorted(read), fingerprint(model.values.state_dict())


def test_ranks_score_every_sample_once(
    on_ranks: OnRanks, tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_SIZE_BYTES", 60_000)
    prepare(tiny_task, tmp_path / "data")
    alone = scored(tiny_task.model_dump_json(), tmp_path / "data", ALONE)
    first, second = on_ranks(2, scored, tiny_task.model_dump_json(), tmp_path / "data")
    assert first[0] == second[0], "all ranks are told the same scores"
    assert first[1] == second[1], "all ranks are told the same outcomes"
    np.testing.assert_allclose(first[1], alone[1], rtol=1e-5, atol=1e-6)  # batches of another size
    assert not set(first[2]) & set(second[2])
    assert sorted(first[2] + second[2]) == alone[2]
    assert len(alone[2]) > 1


def masks_tested(task_json: str, data_folder: Path, ranks: Ranks) -> list[Any]:
    """What a pack of masks is tested by, as rows."""
    inputs = opened(task_json, data_folder)
    model = attach(inputs.backbone, Recipe(), len(inputs.index.classes), seed=1)
    reader, split = inputs.reader("test"), inputs.splits["test"]
    outcomes = final_outcomes(model, reader, split, inputs.kind, ranks=ranks)
    return np.concatenate([outcomes.outputs, outcomes.targets], axis=2).tolist()


def test_ranks_test_every_mask_once(
    on_ranks: OnRanks, tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_SIZE_BYTES", 5_000)
    content = tiny_task.model_dump(include={"name", "input", "backbone"})
    data = {"format": "drawn", "kind": "shapes", "train_samples": 40, "test_samples": 20}
    task = Task.model_validate({**content, "kind": "segmentation", "data": data})
    index = prepare(task, tmp_path / "data")
    assert len(index.splits["test"]) > 1
    alone = masks_tested(task.model_dump_json(), tmp_path / "data", ALONE)
    assert on_ranks(2, masks_tested, task.model_dump_json(), tmp_path / "data") == [alone] * 2
