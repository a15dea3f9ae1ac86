"""Which version of a task has the alias `champion`.

It is the rule by which a study chooses its champion: of all versions, the smallest whose validation
metric is within `within_points` of the best. The test metric has no part in it, nor has
`max_bytes`: a pack made under a smaller budget takes the alias from a larger one only if it is
nearly as good. The alias moves to nothing but the pack just registered, so a version that was
promoted keeps it until a better one comes. Validation metrics of other data, or of other samples
held out, are not compared; then the alias stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.registry.failures import set_despite_race
from pipeline.registry.lookups import LookUps
from pipeline.registry.pack_record import (
    CHAMPION_ALIAS,
    DATA_TAG,
    VALIDATION_TAG,
    Champion,
    RegisteredPack,
)
from pipeline.registry.tracking import TrackingStore
from pipeline.search.champion import smallest_near_best


class ChampionAlias:
    """Moves the alias of registered models in one store."""

    def __init__(self, store: TrackingStore, lookups: LookUps) -> None:
        self._store, self._lookups = store, lookups

    def place(self, mine: RegisteredPack, champion: Champion) -> str:
        """Point the alias at the version that is to have it after `mine` was registered; say which,
        and why.
        """
        if champion.promote:
            self._point_at(mine)
            return f"champion: {mine.reference}, promoted"
        holder = self._lookups.holder(mine.name)
        chosen, remark = place_alias(
            mine, holder, self._lookups.best_on_validation(mine.name), champion.within_points
        )
        while holder is None or holder.version != chosen.version:
            self._point_at(chosen)
            holder = chosen
            # Another driver may have published a better version, and have moved the alias before
            # this one did.
            chosen, again = place_alias(
                mine, None, self._lookups.best_on_validation(mine.name), champion.within_points
            )
            remark = remark if chosen.version == holder.version else again
        return remark

    def _point_at(self, pack: RegisteredPack) -> None:
        """Move the alias, after the tags that show the champion's numbers in MLflow's list of
        models: after an interruption in between, the next move of the alias repairs it."""
        client = self._store.client
        if CHAMPION_ALIAS not in client.get_model_version(pack.name, str(pack.version)).aliases:
            for key, value in pack.shown().items():
                set_despite_race(client.set_registered_model_tag, pack.name, key, value)
            set_despite_race(
                client.set_registered_model_alias, pack.name, CHAMPION_ALIAS, str(pack.version)
            )


def place_alias(
    mine: RegisteredPack,
    holder: RegisteredPack | None,
    others: Sequence[RegisteredPack],
    within_points: float,
) -> tuple[RegisteredPack, str]:
    """The version to have the alias after `mine` was registered, and why.

    Args:
        holder: the version that has it now, if any.
        others: versions of the task, the best on validation among them.
        within_points: hundredths of the metric that may be given up for a smaller pack.
    """
    if holder is not None and holder.version == mine.version:
        return mine, f"champion: {mine.reference}"
    rivals = [
        each for each in others if each.version != mine.version and not _difference(mine, each)
    ]
    if holder is None:
        chosen = smallest_near_best([mine, *rivals], within_points) if rivals else mine
        return chosen, f"champion: {chosen.reference}"
    stays = f"champion: stays {holder.reference}; "
    if reason := _difference(mine, holder):
        return (
            holder,
            (
                f"{stays}{reason}, so the two cannot be compared (--promote moves the alias to"
                f" {mine.reference})"
            ),
        )
    chosen = smallest_near_best([mine, holder, *rivals], within_points)
    if chosen == mine:
        return mine, f"champion: {_numbers(mine)} instead of {_numbers(holder)}"
    return (
        holder,
        (
            f"{stays}{_numbers(chosen)} is a better choice than {_numbers(mine)} (--promote moves"
            " the alias nevertheless)"
        ),
    )


def _difference(mine: RegisteredPack, other: RegisteredPack) -> str:
    """Why the validation metrics of two versions cannot be compared; empty where they can."""
    for pack in (mine, other):
        if pack.val_metric is None:
            return f"no validation metric of {pack.reference} is registered"
    tags = [
        tag for tag in (DATA_TAG, VALIDATION_TAG) if tag in mine.tags and tag in other.tags
    ]  # earlier releases wrote no VALIDATION_TAG
    return (
        f"{mine.reference} was validated on other samples"
        if any(mine.tags[tag] != other.tags[tag] for tag in tags)
        else ""
    )


def _numbers(pack: RegisteredPack) -> str:
    return f"{pack.reference} (validation {pack.val_metric or 0:.1%}, {pack.size_bytes:,} bytes)"
