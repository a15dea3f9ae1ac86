"""The best accuracy at every size: the default search at six budgets against the space that was the
default before, and against the catalogue's methods at the same bytes and at 32 bits.

    python benchmarks/bytes.py [--backbones embedded vit_small efficientnet] [--tasks mnist ...]
                               [--epochs 15] [--trials 16] [--points 100] [--limit 1000000]
                               [--val-fraction 0.2] [--size 64] [--seeds 0] [--methods ...]
                               [--device cuda]
    python benchmarks/bytes.py --page     write the pages from what has been measured

Without options it runs whole; each option but the first two and `--device` shrinks it:

    --epochs   of every trial and fit
    --trials   of the default search, per budget
    --points   per method: those nearest to the default learning rate and a scale of 1
    --limit    training and validation images of a task together, of which `--val-fraction` are
               for validation
    --size     of images on the embedded backbone, in px

Per task and backbone, a study per budget by the product's own code, in one process: what one has
tried, the next reuses. The space of before is eight points, tried up to 1 MiB, of which only those
within a budget can be its champion. A method's recipe is that of its best trial. Test sets are read
by reloaded packs alone, once for each pack that one of the rules has chosen: the product's, or the
best validation accuracy, which shows what part of a difference is the rule's.

Interrupt it and start it again: finished trials and fits are kept in the work folder. Needs the
data and the backbones, by default in the folder `shared` beside the project. Writes
benchmarks/results/bytes.json and .md after each task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bytes_page import BUDGETS, RESULTS, page
from image_tasks import BACKBONES, SIZES_PX, TASKS, image_task, opened
from machine import describe_machine
from runs import SHARED, with_seed

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.recipe_plan import plan
from pipeline.errors import BackboneError, TrainingError
from pipeline.inputs.learning_rate import default_learning_rate
from pipeline.reports.bd_rate import BdRate, Curve, compare_curves
from pipeline.search.champion import choose_champion
from pipeline.search.proposer import Enumerated, Proposer, make_proposer
from pipeline.search.study import Study
from pipeline.search.trial import recipe_key, run_trial
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Recipe, SearchSpace, Task
from pipeline.specs.catalogue import known_methods, load_methods
from pipeline.training import Inputs
from pipeline.training.fit import fit

HERE = Path(__file__).parent
HOUSE_BYTES = 1 << 20
TOP_K = 3
"""One selection of this K serves every study."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A task on a backbone: `written` is the task before a space is derived; `inputs` its opened
    data. Trials of studies, which may be stopped, and of methods are kept apart.
    """

    written: Task
    inputs: Inputs
    selected: SelectedIndex
    folder: Path
    device: str

    def of(self, task: Task) -> Inputs:
        """The cell's data for another recipe, space or budget."""
        return self.inputs.with_task(task)

    def journal(self, name: str) -> TrialJournal:
        """The finished trials of studies or methods."""
        return TrialJournal(self.folder / name)


def open_cell(name: str, backbone: str, seed: int, options: argparse.Namespace) -> Cell:
    """Prepare a task, shrink it, and select its connections."""
    size_px = SIZES_PX.get(backbone, options.size)
    recipe = {"preset": "default", "training": {"epochs": options.epochs}}
    written = image_task(name, backbone, options.shared, size_px, recipe)
    written = written.changed(search={"trials": options.trials}, val_fraction=options.val_fraction)
    data = f"{name}-{size_px}-{options.val_fraction:g}"
    inputs = opened(written, options.workdir / data, options.limit)
    inputs = with_seed(inputs, seed)
    written = written.model_copy(update={"backbone": inputs.backbone.spec, "seed": seed})
    shrunk = (options.epochs, options.limit, options.val_fraction, size_px, seed)
    folder = options.workdir / "-".join(map(str, (name, backbone, *shrunk)))
    path = folder / "selection.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_selection(select_locally(inputs, TOP_K, device=options.device), path)
    return Cell(
        written=written,
        inputs=inputs,
        selected=read_selection(path),
        folder=folder,
        device=options.device,
    )


def planner_of(cell: Cell, inputs: Inputs) -> SizePlanner:
    """Sizes of packs, exact."""
    return SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, cell.selected)


def run_study(cell: Cell, task: Task, *, stops: bool = True) -> list[TrialRecord]:
    """Every trial of the product's study of a task, in this process.

    Args:
        stops: whether trials that earlier ones dominate end early; those of methods do not.
    """
    inputs = cell.of(task)
    size_of = planner_of(cell, inputs).size_bytes
    proposer: Proposer = (
        make_proposer(inputs.task, size_of) if stops else Enumerated(inputs.task, size_of)
    )
    study = Study(inputs.task, proposer, cell.journal("studies" if stops else "methods"))
    while (number := study.next_trial()) is not None:
        started, failure = time.process_time(), None
        proposal = study.proposals[number]
        selected = cell.selected if proposal.recipe.connections else None
        kept = study.kept(number)
        trial = run_trial(inputs, proposal.recipe, selected, device=cell.device, kept=kept)
        try:
            for epoch, (score, _) in enumerate(trial, start=1):
                goes_on = study.report(number, epoch, score.value, score.standard_error)
                if stops and not goes_on:
                    break
        except TrainingError as error:
            failure = error
        study.finish(number, time.process_time() - started, failure)
        print(f"{cell.folder.name}: {proposal.point} {study.records[number].line()}", flush=True)
    return study.all_records()


def complete(records: Sequence[TrialRecord], max_bytes: float = math.inf) -> list[TrialRecord]:
    """The complete trials within a budget."""
    return [r for r in records if r.val_metric is not None and r.size_bytes <= max_bytes]


def best_trial(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best by validation; of equal ones the smallest pack. None where there is none."""
    ordered = sorted(records, key=lambda r: (-(r.val_metric or 0.0), r.size_bytes, r.id))
    return ordered[0] if ordered else None


def champion(cell: Cell, records: Sequence[TrialRecord], task: Task) -> TrialRecord | None:
    """The product's choice, if anything fits."""
    if not complete(records, task.budget.max_bytes):
        return None
    return choose_champion(records, task, cell.journal("studies").outcomes)[0]


def at_budget(task: Task, max_bytes: int) -> Task:
    """The task with another budget."""
    budget = task.budget.model_copy(update={"max_bytes": max_bytes})
    return task.model_copy(update={"budget": budget})


def house_task(cell: Cell) -> Task:
    """The recipe and the space that were the default before, as far as the backbone has a place for
    its parts.
    """
    (method,) = load_methods(["gps_smoa"]).values()
    recipe = method.recipe.changed(training=cell.inputs.task.recipe.training)
    for part in ("connections", "biases", "norms", "smoa"):
        try:
            alone = Recipe.model_validate({part: getattr(recipe, part)})
            plan(cell.inputs.backbone, alone, len(cell.inputs.index.classes), cell.selected)
        except BackboneError:
            recipe = recipe.changed(**{part: None})
    axes = {"bits": (1, 4), "top_k": (1, 3)} | ({"experts": (0, 4)} if recipe.smoa else {})
    task = cell.written.model_copy(update={"recipe": recipe, "search": SearchSpace(**axes)})
    return at_budget(task, HOUSE_BYTES)


def nearest_points(space: SearchSpace, rate: float, count: int) -> list[dict[str, Any]]:
    """So many points of a space, nearest to a learning rate and to a scale of 1."""

    def distance(point: Mapping[str, Any]) -> float:
        scale = abs(math.log(point.get("scale", 1.0)))
        return abs(math.log(point.get("learning_rate", rate) / rate)) + scale

    return sorted(space.points(), key=distance)[:count]


def method_tasks(cell: Cell, names: Sequence[str], points: int) -> Iterator[tuple[str, Task]]:
    """The methods that the backbone has a place for, each as a task with the points to try.
    All use the selection of the task.
    """
    rate = default_learning_rate(cell.inputs.backbone.model)
    for name, method in load_methods(names).items():
        if method.selection is not None:
            continue
        task = method.on(cell.inputs.task)
        selected = cell.selected if task.recipe.connections else None
        try:
            plan(cell.inputs.backbone, task.recipe, len(cell.inputs.index.classes), selected)
        except BackboneError:
            continue
        chosen = nearest_points(method.search, rate, points)
        space = SearchSpace(configurations=tuple(chosen), trials=len(chosen))
        yield name, at_budget(task.model_copy(update={"search": space}), 1 << 40)


def curve_of(cell: Cell, records: Sequence[TrialRecord]) -> Curve:
    """The complete trials with their validation outputs."""
    journal, metric = cell.journal("studies"), cell.inputs.metric
    found = [(record, journal.outcomes(record.id)) for record in complete(records)]
    kept = [(record.size_bytes, outcomes) for record, outcomes in found if outcomes is not None]
    return Curve(
        np.array([size_bytes for size_bytes, _ in kept], dtype=np.float64),
        np.array([metric.value(outcomes) for _, outcomes in kept]),
        np.stack([metric.resampled(outcomes) for _, outcomes in kept], axis=1),
    )


def bd_rate(
    cell: Cell, house: Sequence[TrialRecord], default: Sequence[TrialRecord]
) -> BdRate | None:
    """Bytes of the default's front relative to those of the space of before, by validation."""
    if not complete(house) or not complete(default):
        return None
    return compare_curves(curve_of(cell, house), curve_of(cell, default))


def row_of(cell: Cell, journal: str, family: str, record: TrialRecord) -> dict[str, Any]:
    """A trial with its answers on the validation set, a bit per image."""
    row = {
        "id": record.id,
        "family": family,
        "point": record.point,
        "bytes": record.size_bytes,
        "state": record.state,
        "val": record.val_metric,
        "seconds": record.seconds,
    }
    outcomes = cell.journal(journal).outcomes(record.id) if record.val_metric is not None else None
    if outcomes is None:
        return row
    is_right = outcomes.outputs.argmax(axis=1) == outcomes.targets
    return row | {"right": np.packbits(is_right).tobytes().hex()}


def tested(cell: Cell, task: Task, record: TrialRecord) -> dict[str, Any]:
    """Fit a trial's recipe, read its pack back and test it, once."""
    inputs = cell.of(task)
    recipe = inputs.task.search.recipe(inputs.task.recipe, record.point)
    assert recipe_key(recipe) == record.id, "the recipe of another space"
    selected = cell.selected if recipe.connections else None
    folder = cell.folder / "fits" / record.id
    result = fit(inputs, recipe, selected, folder, device=cell.device)
    print(f"{cell.folder.name}: {record.point} {result.line()}", flush=True)
    return {
        "correct": round(result.test_metric * result.test_samples),
        "samples": result.test_samples,
        "bytes": result.size_bytes,
    }


def is_of_32_bits(recipe: Recipe) -> bool:
    """Whether every part of a recipe has 32 bits."""
    sections = (getattr(recipe, name) for name in Recipe.model_fields)
    return all(part.bits == 32 for part in sections if hasattr(part, "bits"))


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a cell."""
    result: dict[str, Any] = {
        name: {} for name in ("default", "best", "house", "methods", "tested")
    }
    trials: dict[str, TrialRecord] = {}
    tests: dict[str, tuple[Task, TrialRecord]] = {}
    for max_bytes in BUDGETS:
        task = at_budget(cell.written, max_bytes)
        records = run_study(cell, task)
        chosen = champion(cell, records, task)
        smallest = min(record.size_bytes for record in records)
        entry = {"trials": sum(r.state != "rejected" for r in records), "smallest": smallest}
        result["default"][max_bytes] = entry | {"id": chosen.id if chosen else None}
        best = best_trial(complete(records, max_bytes))
        result["best"][max_bytes] = {"id": best.id if best else None}
        tests |= {each.id: (task, each) for each in (chosen, best) if each}
        trials |= {r.id: r for r in records if r.state != "rejected"}
    house = house_task(cell)
    house_records = run_study(cell, house)
    for max_bytes in BUDGETS:
        chosen = champion(cell, house_records, at_budget(house, max_bytes))
        result["house"][max_bytes] = {"id": chosen.id if chosen else None}
        tests |= {chosen.id: (house, chosen)} if chosen else {}
    rate = bd_rate(cell, house_records, list(trials.values()))
    result["bd_rate"] = None if rate is None else [rate.value, rate.standard_error]
    rows = [("default", trials.values()), ("house", house_records)]
    result["trials"] = [row_of(cell, "studies", name, r) for name, found in rows for r in found]
    measure_methods(cell, options, result, tests)
    for key, (task, record) in tests.items():
        result["tested"][key] = tested(cell, task, record)
    return result


def measure_methods(
    cell: Cell,
    options: argparse.Namespace,
    result: dict[str, Any],
    tests: dict[str, tuple[Task, TrialRecord]],
) -> None:
    """Try every method; add to `tests` the best at each budget, and the best at 32 bits."""
    tasks = dict(method_tasks(cell, options.methods, options.points))
    best: dict[str, TrialRecord] = {}
    for name, task in tasks.items():
        records = run_study(cell, task, stops=False)
        result["trials"] += [row_of(cell, "methods", name, r) for r in records]
        if (found := best_trial(complete(records))) is not None:
            best[name] = found
    of_32_bits = {name: r for name, r in best.items() if is_of_32_bits(tasks[name].recipe)}
    candidates = [
        {name: r for name, r in best.items() if r.size_bytes <= max_bytes} for max_bytes in BUDGETS
    ]
    keys = [*map(str, BUDGETS), "32 bits"]
    for key, able in zip(keys, [*candidates, of_32_bits], strict=True):
        chosen = best_trial(list(able.values()))
        winner = next((name for name, record in able.items() if record is chosen), None)
        result["methods"][key] = {"name": winner, "id": chosen.id if chosen else None}
        if winner is not None:
            tests[able[winner].id] = (tasks[winner], able[winner])


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--limit", type=int, default=1_000_000)
    parser.add_argument("--val-fraction", type=float, default=0.2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=known_methods())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data and backbones")
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "bytes")
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    options = parser.parse_args()
    options.shared, options.workdir = options.shared.resolve(), options.workdir.resolve()
    return options


def write(cells: Sequence[Mapping[str, Any]]) -> None:
    """The results so far, and their page."""
    RESULTS.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(cells))


def main() -> None:
    """Measure what is missing; write the results after each cell."""
    options = parse_arguments()
    torch.set_num_threads(1)
    cells = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
    asked = itertools.product(options.seeds, options.backbones, options.tasks)
    for seed, backbone, task in [] if options.page else asked:
        named = {"task": task, "backbone": backbone, "seed": seed}
        if any(named.items() <= cell.items() for cell in cells):
            continue
        cell = open_cell(task, backbone, seed, options)
        figures = measure(cell, options)
        shrunk = {
            "epochs": options.epochs,
            "trials_per_budget": options.trials,
            "points_per_method": options.points,
            "size_px": cell.written.input.size_px,
            "samples": {name: len(split) for name, split in cell.inputs.splits.items()},
            "classes": len(cell.inputs.index.classes),
        }
        command = shlex.join(["python", "benchmarks/bytes.py", *sys.argv[1:]])
        origin = {"command": command, "machine": describe_machine()}
        cells.append({**named, **shrunk, **origin, **figures})
        cells = json.loads(json.dumps(cells))  # as they will be read
        write(cells)
    if options.page:
        write(cells)


if __name__ == "__main__":
    main()
