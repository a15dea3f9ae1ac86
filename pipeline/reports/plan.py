"""What a task will attach and what it may cost, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adaptation import PlannedTensor, plan
from pipeline.adaptation.packing import SizePlanner
from pipeline.data import prepare
from pipeline.search.proposer import distinct_proposals
from pipeline.selection import read_selection, select_here, write_selection
from pipeline.spec import Task
from pipeline.storage import exclusive
from pipeline.training import open_inputs
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class TaskPlan:
    """The base recipe's tensors and bytes by part, and one row for each distinct point of the search space."""

    tensors: tuple[PlannedTensor, ...]
    ledger: dict[str, int]
    space: list[dict[str, Any]]


def plan_task(task: Task, workdir: Path) -> TaskPlan:
    """Prepare the task's data (its classes are part of a pack), select its connections (their positions are), and plan.

    The selection is kept for a run of the task. Raises as preparing and attaching do.
    """
    workspace = Workspace(workdir)
    folder = workspace.data(task.name)
    with exclusive(workdir):
        prepare(task, folder)
        inputs = open_inputs(task, folder)
        top_k = task.search.max_top_k(task.recipe)
        selection = workspace.selection(inputs, top_k)
        if top_k and not selection.exists():
            write_selection(select_here(inputs, top_k), selection)
    classes = inputs.index.classes
    selected = read_selection(selection) if top_k else None
    planner = SizePlanner(task, inputs.backbone, classes, selected)
    return TaskPlan(
        plan(inputs.backbone, task.recipe, len(classes), selected),
        planner.ledger(task.recipe),
        [{"point": proposal.point, "size_bytes": proposal.size_bytes} for proposal in distinct_proposals(task, planner.size_bytes)],
    )
