"""What a task will attach and what it may cost, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adaptation import PlannedTensor, plan
from pipeline.adaptation.packing import planned_ledger, planned_size_bytes
from pipeline.data import prepare
from pipeline.search.proposer import distinct_proposals
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
    """Prepare the task's data (its classes are part of a pack), and plan. Raises as preparing and attaching do."""
    folder = Workspace(workdir).data(task.name)
    with exclusive(workdir):
        prepare(task, folder)
    inputs = open_inputs(task, folder)
    classes = inputs.index.classes
    proposals = distinct_proposals(task, lambda recipe: planned_size_bytes(task, recipe, inputs.backbone, classes))
    return TaskPlan(
        plan(inputs.backbone, task.recipe, len(classes)),
        planned_ledger(task, task.recipe, inputs.backbone, classes),
        [{"point": proposal.point, "size_bytes": proposal.size_bytes} for proposal in proposals],
    )
