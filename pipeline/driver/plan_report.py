"""What a task trains and the sizes of its packs, before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adaptation import PlannedTensor, plan
from pipeline.adaptation.packing import SizePlanner
from pipeline.data import prepare
from pipeline.driver.workspace import Workspace
from pipeline.errors import BudgetError
from pipeline.search.proposer import distinct_proposals, smallest_first
from pipeline.search.run_study import check_budget
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Task
from pipeline.training import Inputs, open_inputs
from pipeline.training.rehearsal import rehearse
from pipeline.utils.files import exclusive

OnStep = Callable[[str, int, int], None]
"""Called with the name of a step, its finished units, and their total (0 if unknown)."""


@dataclass(frozen=True)
class TaskPlan:
    """Tensors and bytes by part of the recipe or, of a list of configurations, of the largest pack,
    as `subject` says; and one row per distinct point of the search space.

    A row has `point` and `size_bytes`, or `at_least_bytes` and `at_most_bytes` if no connections
    are selected. `remarks` are for the user.
    """

    subject: str
    tensors: tuple[PlannedTensor, ...]
    ledger: dict[str, int]
    space: list[dict[str, Any]]
    is_exact: bool
    remarks: list[str]


def plan_task(
    task: Task,
    workdir: Path,
    *,
    select: bool = True,
    on_step: OnStep = lambda step, done, total: None,
) -> TaskPlan:
    """Prepare the task's data (its classes are part of a pack), select its connections (their
    positions are), and plan.

    The selection is kept for a run of the task. Raises the errors of preparing and attaching.

    Args:
        select: whether to select connections if no selection is kept yet; without one, sizes are
            bounds.
        on_step: called with the progress of slow steps.
    """
    workspace = Workspace(workdir)
    folder = workspace.data(task.name)
    with exclusive(workdir):
        on_step("preparing the data", 0, 0)
        prepare(task, folder)
        on_step("loading the backbone", 0, 0)
        inputs = open_inputs(task, folder)
        task = inputs.task
        on_step("trying one training step", 0, 0)
        for recipe in task.search.fullest(task.recipe):
            rehearse(inputs, recipe)
        top_k = task.search.max_top_k(task.recipe)
        kept = workspace.selection(inputs, top_k)
        if select and top_k and not kept.exists():
            write_selection(
                select_locally(
                    inputs, top_k, lambda done, total: on_step("selecting connections", done, total)
                ),
                kept,
            )
    on_step("computing sizes", 0, 0)
    return _planned(inputs, kept if top_k and kept.exists() else None)


def _planned(inputs: Inputs, selection: Path | None) -> TaskPlan:
    task, classes = inputs.task, inputs.index.classes
    selected = read_selection(selection) if selection is not None else None
    planner = SizePlanner(task, inputs.backbone, classes, selected)
    proposals = smallest_first(distinct_proposals(task, planner.size_bytes))
    subject, recipe = "recipe", task.recipe
    if task.search.configurations is not None:
        subject, recipe = "largest pack", proposals[-1].recipe
    is_exact = all(map(planner.is_exact, [recipe, *(proposal.recipe for proposal in proposals)]))
    space = [
        {"point": each.point, "size_bytes": each.size_bytes}
        if is_exact
        else {
            "point": each.point,
            "at_least_bytes": each.size_bytes,
            "at_most_bytes": planner.largest_bytes(each.recipe),
        }
        for each in proposals
    ]
    return TaskPlan(
        subject,
        plan(inputs.backbone, recipe, len(classes), selected),
        planner.ledger(recipe),
        space,
        is_exact,
        [*inputs.remarks(), *_faults(task, planner)],
    )


def _faults(task: Task, planner: SizePlanner) -> list[str]:
    """Why a run would try nothing, if it would."""
    try:
        check_budget(task, planner.size_bytes)
    except BudgetError as error:
        return [str(error)]
    return []
