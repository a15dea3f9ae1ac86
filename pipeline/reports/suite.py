"""The averages of a suite, by name.

Two are in use for VTAB-1k, and they differ by points because its groups have 7, 4 and 8 tasks:

    mean of tasks        (1/T) sum_t a_t                       GPS (arXiv 2312.10136), SSF (arXiv
    2210.08823) mean of group means  (1/G) sum_g (1/|g|) sum_{t in g} a_t  VPT (arXiv 2203.12119),
    Binary Adapter (arXiv 2307.16867), NOAH (arXiv 2206.04673)

So both are always given, and never without their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from pipeline.errors import SpecError
from pipeline.specs import Suite


def suite_averages(suite: Suite, scores: Mapping[str, float]) -> dict[str, float]:
    """The mean of each group, of all tasks, and of the group means, in the unit of `scores` (by
    task name). A suite of one group has one mean.

    Raises SpecError unless there is a score for every task of the suite and for no other: a mean
    over some of the tasks is another number.
    """
    missing, foreign = (
        sorted(set(suite.tasks) - scores.keys()),
        sorted(scores.keys() - set(suite.tasks)),
    )
    if missing or foreign:
        faults = [f"no score for {', '.join(missing)}"] * bool(missing) + [
            f"{', '.join(foreign)} is not of this suite"
        ] * bool(foreign)
        raise SpecError(
            f"suite {suite.name}: {'; '.join(faults)}; its averages need a score for each of its"
            f" {len(suite.tasks)} tasks, and no other"
        )
    groups = {name: fmean(scores[task] for task in tasks) for name, tasks in suite.groups.items()}
    averages = {f"mean of {len(suite.tasks)} tasks": fmean(scores[task] for task in suite.tasks)}
    if len(groups) > 1:
        averages = {
            **{f"{name} ({len(suite.groups[name])})": mean for name, mean in groups.items()},
            **averages,
        }
        averages[f"mean of {len(groups)} group means"] = fmean(groups.values())
    return averages
