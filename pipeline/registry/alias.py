"""Which version of a task has the alias `champion`.

It is the rule by which a study chooses its champion: of all versions, the smallest whose validation metric is within
`within_points` of the best. The test metric has no part in it, nor has `max_bytes`: a pack made under a smaller budget
takes the alias from a larger one only if it is nearly as good. The alias moves to nothing but the pack just registered,
so a version that was promoted keeps it until a better one comes. Validation metrics of other data, or of other samples
held out, are not compared; then the alias stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.registry.pack_record import DATA_TAG, VALIDATION_TAG, RegisteredPack
from pipeline.search.champion import smallest_near_best


def place_alias(
    mine: RegisteredPack, holder: RegisteredPack | None, others: Sequence[RegisteredPack], within_points: float
) -> tuple[RegisteredPack, str]:
    """The version to have the alias after `mine` was registered, and why.

    Args:
        holder: the version that has it now, if any.
        others: versions of the task, the best on validation among them.
        within_points: hundredths of the metric that may be given up for a smaller pack.
    """
    if holder is not None and holder.version == mine.version:
        return mine, f"champion: {mine.reference}"
    rivals = [each for each in others if each.version != mine.version and not _difference(mine, each)]
    if holder is None:
        chosen = smallest_near_best([mine, *rivals], within_points) if rivals else mine
        return chosen, f"champion: {chosen.reference}"
    stays = f"champion: stays {holder.reference}; "
    if reason := _difference(mine, holder):
        return holder, f"{stays}{reason}, so the two cannot be compared (--promote moves the alias to {mine.reference})"
    chosen = smallest_near_best([mine, holder, *rivals], within_points)
    if chosen == mine:
        return mine, f"champion: {_numbers(mine)} instead of {_numbers(holder)}"
    return holder, f"{stays}{_numbers(chosen)} is a better choice than {_numbers(mine)} (--promote moves the alias nevertheless)"


def _difference(mine: RegisteredPack, other: RegisteredPack) -> str:
    """Why the validation metrics of two versions cannot be compared; empty where they can."""
    for pack in (mine, other):
        if pack.val_metric is None:
            return f"no validation metric of {pack.reference} is registered"
    tags = [tag for tag in (DATA_TAG, VALIDATION_TAG) if tag in mine.tags and tag in other.tags]  # earlier releases wrote no VALIDATION_TAG
    return f"{mine.reference} was validated on other samples" if any(mine.tags[tag] != other.tags[tag] for tag in tags) else ""


def _numbers(pack: RegisteredPack) -> str:
    return f"{pack.reference} (validation {pack.val_metric or 0:.1%}, {pack.size_bytes:,} bytes)"
