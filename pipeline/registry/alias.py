"""Which version of a task has the alias `champion`.

It is the rule by which a study chooses its champion: of all versions, the smallest that is not
significantly worse than the best on the validation samples. The test metric has no part in it, nor
has `max_bytes`: a pack made under a smaller budget takes the alias from a larger one only if it is
as good as far as the samples tell. The alias moves to nothing but the pack just registered, so a
version that was promoted keeps it until a better one comes. Validation metrics of other data, or of
other samples held out, are not compared; then the alias stays. Versions without stored validation
outputs are compared by the metric alone.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence

from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import metric_named
from pipeline.registry.failures import set_despite_race
from pipeline.registry.lookups import LookUps
from pipeline.registry.model_files import OUTCOMES_FILE
from pipeline.registry.pack_record import (
    CHAMPION_ALIAS,
    DATA_TAG,
    KIND_TAG,
    VALIDATION_TAG,
    Champion,
    RegisteredPack,
)
from pipeline.registry.tracking import TrackingStore
from pipeline.search.champion import not_worse_than_best
from pipeline.search.kept_outcomes import read_outcomes


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
        outcomes = functools.cache(lambda version: self._outcomes(mine.name, version))

        def placed(holder: RegisteredPack | None) -> tuple[RegisteredPack, str]:
            others = self._lookups.best_on_validation(mine.name)
            return place_alias(
                mine, holder, others, lambda pack: outcomes(pack.version), champion.level
            )

        chosen, remark = placed(holder)
        while holder is None or holder.version != chosen.version:
            self._point_at(chosen)
            holder = chosen
            # Another driver may have published a better version, and have moved the alias before
            # this one did.
            chosen, again = placed(None)
            remark = remark if chosen.version == holder.version else again
        return remark

    def _outcomes(self, name: str, version: int) -> Outcomes | None:
        """The validation outputs that a version was registered with; None where there are none."""
        client = self._store.client
        run_id = client.get_model_version(name, str(version)).run_id
        path = f"front/{OUTCOMES_FILE}"
        if path not in {file.path for file in client.list_artifacts(run_id, "front")}:
            return None
        with tempfile.TemporaryDirectory(prefix="taskpack-") as folder:
            return read_outcomes(self._store.fetch_of_run(run_id, path, folder))

    def _point_at(self, pack: RegisteredPack) -> None:
        """Move the alias, after the tags that show the champion's numbers in MLflow's list of
        models: after an interruption in between, the next move of the alias repairs it."""
        client = self._store.light
        version = client.get_model_version(pack.name, str(pack.version))
        if CHAMPION_ALIAS not in version.aliases:
            for key, value in pack.shown().items():
                set_despite_race(client.set_registered_model_tag, pack.name, key, value)
            set_despite_race(
                client.set_registered_model_alias, pack.name, CHAMPION_ALIAS, str(pack.version)
            )


def place_alias(
    mine: RegisteredPack,
    holder: RegisteredPack | None,
    others: Sequence[RegisteredPack],
    outcomes: Callable[[RegisteredPack], Outcomes | None],
    level: float,
) -> tuple[RegisteredPack, str]:
    """The version to have the alias after `mine` was registered, and why.

    Args:
        holder: the version that has it now, if any.
        others: versions of the task, the best on validation among them.
        outcomes: the validation outputs of a version, where they are known.
        level: see `pipeline.search.champion`.
    """
    if holder is not None and holder.version == mine.version:
        return mine, f"champion: {mine.reference}"
    rivals = [
        each for each in others if each.version != mine.version and not _difference(mine, each)
    ]
    if holder is None:
        chosen = _choose([mine, *rivals], outcomes, level) if rivals else mine
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
    versions = {pack.version: pack for pack in (mine, holder, *rivals)}
    chosen = _choose(list(versions.values()), outcomes, level)
    if chosen == mine:
        return mine, f"champion: {_numbers(mine)} instead of {_numbers(holder)}"
    return (
        holder,
        (
            f"{stays}{_numbers(chosen)} is a better choice than {_numbers(mine)} (--promote moves"
            " the alias nevertheless)"
        ),
    )


def _choose(
    packs: Sequence[RegisteredPack],
    outcomes: Callable[[RegisteredPack], Outcomes | None],
    level: float,
) -> RegisteredPack:
    metric = metric_named(packs[0].metric, packs[0].tags.get(KIND_TAG, "classification"))
    return next(not_worse_than_best(packs, outcomes, metric, level))


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
