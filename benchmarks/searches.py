"""What benchmarks of the default search under byte budgets share: the recipes that a budget gives,
their trials, which are kept, and the champion's fit.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import train

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.packing import SizePlanner
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.kinds import score
from pipeline.search.champion import choose_champion
from pipeline.search.kept_outcomes import write_outcomes
from pipeline.search.trial import recipe_key
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Recipe, Task
from pipeline.training import Inputs, evaluate
from pipeline.training.fit import FitResult, fit

BUDGETS = {f"default search, {kib} KiB": 1024 * kib for kib in (4, 16, 64)}


@dataclass(frozen=True)
class Found:
    """What a search found: its trials, the champion, its recipe, and the tested pack."""

    records: list[TrialRecord]
    champion: TrialRecord
    recipe: Recipe
    result: FitResult

    @property
    def seconds(self) -> int:
        """Of all trials and the fit."""
        return round(sum(each.seconds for each in self.records) + self.result.train_seconds)


def within_budget(
    inputs: Inputs, max_bytes: int, training: dict[str, Any], trials: int
) -> tuple[Inputs, list[Recipe]]:
    """The task at a budget, and the first recipes of its default search."""
    content = inputs.task.model_dump(exclude={"recipe", "search", "budget"})
    recipe = {"preset": "default", "training": training}
    task = Task.model_validate({**content, "budget": {"max_bytes": max_bytes}, "recipe": recipe})
    inputs = inputs.with_task(task)
    points = itertools.islice(inputs.task.search.points(), trials)
    return inputs, [inputs.task.search.recipe(inputs.task.recipe, point) for point in points]


def search_and_fit(
    inputs: Inputs, recipes: Sequence[Recipe], folder: Path, device: str = "cpu"
) -> Found:
    """Try every recipe, choose the champion as the product does, fit and test it. Trials that are
    kept in `folder` are not run again.
    """
    recipes = [with_learning_rate(recipe, inputs.backbone) for recipe in recipes]
    folder.mkdir(parents=True, exist_ok=True)
    selected, journal = selection_of(inputs, recipes, folder), TrialJournal(folder)
    records = [tried(inputs, recipe, selected, journal, device) for recipe in recipes]
    champion = choose_champion(records, inputs.task, journal.outcomes)[0]
    (recipe,) = (each for each in recipes if recipe_key(each) == champion.id)
    with tempfile.TemporaryDirectory() as scratch:
        result = fit(inputs, recipe, selected, Path(scratch), device=device)
    return Found(records, champion, recipe, result)


def selection_of(inputs: Inputs, recipes: Sequence[Recipe], folder: Path) -> SelectedIndex | None:
    """The connections that the recipes may change, selected once per task; None where they change
    none.
    """
    top_k = max((each.connections.top_k for each in recipes if each.connections), default=0)
    if not top_k:
        return None
    path = folder / f"selection-{top_k}.safetensors"
    if not path.exists():
        write_selection(select_locally(inputs, top_k), path)
    return read_selection(path)


def tried(
    inputs: Inputs,
    recipe: Recipe,
    selected: SelectedIndex | None,
    journal: TrialJournal,
    device: str,
) -> TrialRecord:
    """The record of a trial: trained on train, measured on validation once, at the end."""
    key = recipe_key(recipe)
    if (known := journal.read().get(key)) is not None:
        return known
    began = time.monotonic()
    model = inputs.adapted(recipe, selected).to(device)
    train(model, inputs, recipe, inputs.task.seed, device)
    outcomes = evaluate(model, inputs.reader("val"), inputs.splits["val"], inputs.kind)
    write_outcomes(journal.outcomes_path(key), outcomes)
    planner = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, selected)
    record = TrialRecord(
        id=key,
        point=recipe.model_dump(exclude_defaults=True, exclude={"training", "preset"}),
        size_bytes=planner.size_bytes(recipe),
        state="complete",
        val_metric=score(inputs.metric, outcomes).value,
        seconds=time.monotonic() - began,
    )
    journal.write(record)
    return record
