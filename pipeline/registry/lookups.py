"""Finding registered packs: by numbers, filtered and ordered by the server, and by reference.

A version cannot be searched by number (MLflow compares tags as text), so each belongs to a run
whose metrics the server filters and orders. MLflow's LoggedModels hold the same numbers and are not
searched: MLflow ranks all values a LoggedModel's metric ever had, and PostgreSQL may do so again
for every model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import RegistryError
from pipeline.registry.failures import absent_as_none, registry_errors
from pipeline.registry.pack_record import (
    CHAMPION_ALIAS,
    DIGEST_TAG,
    FINGERPRINT_TAG,
    METRIC_TAG,
    MODEL_ID_TAG,
    OWN_RUN_TAGS,
    TASK_TAG,
    RegisteredPack,
    named_by_role,
)
from pipeline.registry.tracking import TrackingStore

_REFERENCE = re.compile(r"(?P<name>[^/@:'\"`%\\]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>[0-9]+))?")
# More than the 50 rows of a plain `taskpack ls`; the ids of a page still fit into one address.
_PAGE = 64


class LookUps:
    """The look-ups in one store."""

    def __init__(self, store: TrackingStore) -> None:
        self._store = store

    def search(
        self,
        task: str | None = None,
        max_bytes: int | None = None,
        min_metric: float | None = None,
        metric: str | None = None,
        fingerprint: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> list[RegisteredPack]:
        """Registered packs within `max_bytes` and with a test metric of `min_metric` (0 to 1) or
        more: best first, then smallest, at most `limit`.

        With `metric`, such as `accuracy`, only packs that were chosen by it: values of two metrics
        cannot be compared. With `fingerprint`, only packs on this backbone.

        Versions deleted since are left out. `after` names the pack, such as the last one of an
        earlier answer, behind which this one begins, so packs registered meanwhile move nothing.
        Raises RegistryError.
        """
        clauses = _search_clauses(task, max_bytes, min_metric, metric, limit, fingerprint)
        order = ["metrics.test_metric DESC", "metrics.size_bytes ASC"]
        found: list[RegisteredPack] = []
        page_token: str | None = None
        with registry_errors(self._store.tracking_uri):
            last = None if after is None else _place(self._version_and_run(after)[1])
            if last is not None:
                # Packs as good as the last one are on both sides of it; rounding must not leave one
                # out.
                clauses.append(f"metrics.test_metric <= {1e-9 - last[0]:.12f}")
            while len(found) < limit:
                size = min(limit - len(found), _PAGE) if last is None else _PAGE
                page = self._search_runs(clauses, size, order, page_token)
                found += self._packs_of([run for run in page if last is None or _place(run) > last])
                page_token = page.token
                if not page_token:
                    break
        return found[:limit]

    def champions(
        self, fingerprint: str | None = None, after: str | None = None
    ) -> Iterator[RegisteredPack]:
        """Every task's champion, best first; with `fingerprint`, those on this backbone, and with
        `after`, those that follow this pack. Raises RegistryError.
        """
        while page := self.search(fingerprint=fingerprint, limit=_PAGE, after=after):
            yield from (pack for pack in page if CHAMPION_ALIAS in pack.aliases)
            after = page[-1].reference

    def versions(self, references: list[str]) -> dict[str, int]:
        """The versions that references to aliases name now; those without one are left out. A
        request per 64 names. Raises RegistryError.
        """
        wanted = {
            reference: match
            for reference in references
            if (match := _REFERENCE.fullmatch(reference)) and match["version"] is None
        }
        names = sorted({match["name"] for match in wanted.values()})
        aliases: dict[str, dict[str, Any]] = {}
        with registry_errors(self._store.tracking_uri):
            for start in range(0, len(names), _PAGE):
                page = ", ".join(f"'{name}'" for name in names[start : start + _PAGE])
                found = self._store.light.search_registered_models(
                    f"name IN ({page})", max_results=_PAGE
                )
                aliases |= {model.name: model.aliases for model in found}
        numbers = {
            reference: aliases.get(match["name"], {}).get(match["alias"] or CHAMPION_ALIAS)
            for reference, match in wanted.items()
        }
        return {reference: int(number) for reference, number in numbers.items() if number}

    def best_on_validation(self, name: str) -> list[RegisteredPack]:
        """The versions of a task that are best on validation."""
        clauses = [*_search_clauses(name, None, None, None, 1), "metrics.val_metric >= 0"]
        return self._packs_of(
            list(self._search_runs(clauses, _PAGE, ["metrics.val_metric DESC"], None))
        )

    def get(self, reference: str) -> RegisteredPack:
        """The pack at `name` (its champion), `name@alias` or `name/3`. Raises RegistryError with
        near names where there is none.
        """
        with registry_errors(self._store.tracking_uri):
            version, run = self._version_and_run(reference)
            return _merge(version, run, version.aliases)

    def holder(self, name: str) -> RegisteredPack | None:
        """The version with the alias `champion`; None where no version has it, or one that taskpack
        did not register.
        """
        reader = self._store.light
        number = reader.get_registered_model(name).aliases.get(CHAMPION_ALIAS)
        version = (
            None
            if number is None
            else absent_as_none(reader.get_model_version, name, str(int(number)))
        )
        return (
            None
            if version is None or not _is_ours(version)
            else _merge(version, self._run_of(version), version.aliases)
        )

    def _search_runs(
        self, clauses: list[str], size: int, order: list[str], page_token: str | None
    ) -> Any:
        experiments, text = [self._store.experiment_id], " AND ".join(clauses)
        return self._store.light.search_runs(
            experiments, text, max_results=size, order_by=order, page_token=page_token
        )

    def _version_and_run(self, reference: str) -> tuple[Any, Any]:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise RegistryError(
                f"{reference!r}: not a reference to a pack; give NAME, NAME@ALIAS or NAME/VERSION"
            )
        registered = absent_as_none(self._store.light.get_registered_model, match["name"])
        if registered is None:
            raise RegistryError(
                f"{reference}: no task of this name is registered;"
                f" {self._near_names(match['name'])}"
            )
        alias = match["alias"] or CHAMPION_ALIAS
        number = match["version"] or registered.aliases.get(alias)
        if number is None:
            known = self._known_versions(registered)
            raise RegistryError(
                f"{reference}: no version has the alias {alias!r}; give NAME/VERSION ({known})"
            )
        version = absent_as_none(
            self._store.light.get_model_version, registered.name, str(int(number))
        )
        if version is None:
            raise RegistryError(f"{reference}: no such version; {self._known_versions(registered)}")
        return version, self._run_of(version)

    def _run_of(self, version: Any) -> Any:
        if not _is_ours(version):
            raise RegistryError(
                f"{version.name}/{version.version}: a model that taskpack did not register;"
                " `taskpack ls` lists those it did"
            )
        return self._store.light.get_run(version.run_id)

    def _packs_of(self, runs: list[Any]) -> list[RegisteredPack]:
        """Those of `runs` whose versions are still there. Two requests at once, however many runs:
        a server that checks passwords takes a third of a second for each."""
        if not runs:
            return []
        ids = ", ".join(f"'{run.info.run_id}'" for run in runs)
        names = ", ".join(f"'{name}'" for name in sorted({run.data.tags[TASK_TAG] for run in runs}))
        reader = self._store.light
        with ThreadPoolExecutor(max_workers=2) as pool:
            searched = pool.submit(
                reader.search_model_versions, f"run_id IN ({ids})", max_results=4 * _PAGE
            )
            # A version that was searched for does not say its aliases; its registered model does.
            named = pool.submit(
                reader.search_registered_models, f"name IN ({names})", max_results=_PAGE
            )
            versions = {
                version.run_id: version for version in searched.result() if _is_ours(version)
            }
            aliases = {model.name: model.aliases for model in named.result()}
        found = []
        for run in runs:
            if version := versions.get(run.info.run_id):
                at = aliases.get(version.name, {}).items()
                found.append(
                    _merge(
                        version,
                        run,
                        [alias for alias, number in at if int(number) == int(version.version)],
                    )
                )
        return found

    def _near_names(self, name: str) -> str:
        # The first two letters are enough for the server to leave out most of the registry.
        candidates = [
            found.name
            for found in self._store.light.search_registered_models(
                f"name ILIKE '{name[:2]}%'", max_results=500
            )
        ]
        near = difflib.get_close_matches(name.lower(), candidates, n=3, cutoff=0.5)
        return f"did you mean {' or '.join(near)}?" if near else "`taskpack ls` lists what there is"

    def _known_versions(self, model: Any) -> str:
        newest = self._store.light.search_model_versions(
            f"name = '{model.name}'", max_results=1, order_by=["version_number DESC"]
        )
        return (
            f"newest version: {newest[0].version if newest else 'none'}, aliases:"
            f" {', '.join(sorted(model.aliases)) or 'none'}"
        )


def _is_ours(version: Any) -> bool:
    return MODEL_ID_TAG in version.tags and DIGEST_TAG in version.tags


def _merge(version: Any, run: Any, aliases: Iterable[str]) -> RegisteredPack:
    return RegisteredPack(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(aliases)),
        model_id=version.tags[MODEL_ID_TAG],
        task=run.data.tags[TASK_TAG],
        metrics=named_by_role(run.data.metrics),
        params=dict(run.data.params),
        tags={
            key: value
            for key, value in run.data.tags.items()
            if not key.startswith("mlflow.") and key not in OWN_RUN_TAGS
        },
        size_bytes=int(run.data.metrics["size_bytes"]),
        pack_digest=version.tags[DIGEST_TAG],
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, tz=UTC),
    )


def _place(run: Any) -> tuple[float, float, int, str]:
    """Where the server puts a run in the order of `search`: by metric, size, age and id."""
    metrics = named_by_role(run.data.metrics)
    return -metrics["test_metric"], metrics["size_bytes"], -run.info.start_time, run.info.run_id


def _search_clauses(
    task: str | None,
    max_bytes: int | None,
    min_metric: float | None,
    metric: str | None,
    limit: int,
    fingerprint: str | None = None,
) -> list[str]:
    if limit < 1:
        raise RegistryError(f"limit: given {limit}, expected 1 or more")
    if task is not None and re.search(r"['\"`\\]", task):
        raise RegistryError(
            f"task: given {task!r}, which no task can be called; quotes and backslashes are not"
            " part of names"
        )
    if metric is not None and re.search(r"['\"`\\]", metric):
        raise RegistryError(
            f"metric: given {metric!r}, which no metric is called; expected a name such as accuracy"
        )
    if min_metric is not None and not 0 <= min_metric <= 1:
        raise RegistryError(f"min_metric: given {min_metric}, expected a metric between 0 and 1")
    # The two numbers are always asked for: other runs in the experiment have none.
    numbers = [
        "metrics.size_bytes " + ("> 0" if max_bytes is None else f"<= {max_bytes}"),
        f"metrics.test_metric >= {min_metric or 0:.12f}",
    ]
    tags = {TASK_TAG: task, METRIC_TAG: metric, FINGERPRINT_TAG: fingerprint}
    wanted = [f"tags.{tag} = '{value}'" for tag, value in tags.items() if value is not None]
    return ["attributes.status = 'FINISHED'", *numbers, *wanted]
