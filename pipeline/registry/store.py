"""The registry: packs as versions of an MLflow registered model, found again by numbers.

One registered model a task, one version a pack, the alias `champion` on the best of them (alias.py). A version alone cannot be searched by number
(MLflow compares tags as text), so each belongs to a run whose metrics (accuracy, `size_bytes`, `bytes_<part>`) the server filters and orders.
That run lasts from the task's start to its registration, names the data, and has the study's trials as its child runs.
Beside it stands a LoggedModel with the same numbers, whose files are the pack and an MLmodel that names our loader, hence neither pickle nor stored
code. It is not searched: MLflow ranks all values a LoggedModel's metric ever had, and PostgreSQL may do so again for every model.

Writing happens in one process, the driver. Creating the version, with the pack's digest as its tag, is the one step that commits: what an interrupted
`register` left before it is discarded by the next, what was missing after it is made good. Two drivers may register the same pack at once: MLflow has
no lock, so both create a version, and the later one is withdrawn before it is published. Whoever has moved the alias looks again, in case another has
published a better pack meanwhile.

MLflow's tables hold absolute URIs. Those of a SQLite store are taken for what they were when the work folder lay elsewhere: files are read from
beside the database, and the next registration writes the new place into the tables.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError, StorageError
from pipeline.registry.alias import place_alias
from pipeline.registry.card import version_card
from pipeline.registry.connection import (
    import_mlflow,
    initialise_sqlite,
    rebase_artifacts,
    resolve_tracking_uri,
    short_patience,
    sqlite_path,
)
from pipeline.registry.failures import registry_errors
from pipeline.registry.model_files import PACK_FILE, write_front, write_model
from pipeline.registry.pack_record import BEGUN_TAG, DIGEST_TAG, MODEL_ID_TAG, TASK_TAG, Champion, RegisteredPack
from pipeline.registry.rest import plain_rest
from pipeline.registry.trial_runs import delete_children, log_trials

EXPERIMENT = "taskpack"
CHAMPION_ALIAS = "champion"
_LONGEST_DIGEST = 36  # MLflow's limit
# The tag by which MLflow itself links a LoggedModel to its registered versions.
_VERSIONS_TAG = "mlflow.modelVersions"
_REFERENCE = re.compile(r"(?P<name>[^/@:'\"`%\\]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>[0-9]+))?")
# More than the 50 rows of a plain `taskpack ls`; the ids of a page still fit into one address.
_PAGE = 64
# A registration takes seconds. One that is older and not finished is nobody's.
_ABANDONED_SECONDS = 3600


def open_registry(uri: str | None, workdir: Path) -> Registry:
    """The registry at `uri`, else at MLFLOW_TRACKING_URI, else in a SQLite file under `workdir`, made on first use with artifacts beside it.

    Raises RegistryError where the server cannot be reached (within about 10 s), StorageError where the database cannot be written.
    """
    tracking_uri = resolve_tracking_uri(uri, workdir)
    database = sqlite_path(tracking_uri)
    if database is None:
        return Registry(tracking_uri, None)
    artifact_root = database.parent / "artifacts"
    with registry_errors(tracking_uri):
        initialise_sqlite(database, artifact_root)
    return Registry(tracking_uri, artifact_root)


class Registry:
    """The only writer to MLflow. `artifact_root` is where files go for a store without a server; a server decides for itself (None)."""

    def __init__(self, tracking_uri: str, artifact_root: Path | None) -> None:
        self.tracking_uri = tracking_uri
        # Runs and LoggedModels of this process; where their registration did not finish, its next try discards them.
        self._begun: set[str] = set()
        with registry_errors(tracking_uri), short_patience():
            self._rest = plain_rest(tracking_uri)
            self._artifacts_here = "" if artifact_root is None else artifact_root.resolve().as_uri()
            experiment = self._find_or_create_experiment()
            self._experiment_id, self._artifacts_recorded = str(experiment.experiment_id), str(experiment.artifact_location)

    @functools.cached_property
    def client(self) -> Any:
        """MLflow's own client, for all that writes."""
        return import_mlflow().MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    @property
    def _reader(self) -> Any:
        return self._rest or self.client

    # --- writing ----------------------------------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write a tag to a server, so that a user who may only read is refused before hours of training. Raises RegistryRefused."""
        if sqlite_path(self.tracking_uri) is not None:
            return
        with registry_errors(self.tracking_uri):
            self.client.set_experiment_tag(self._experiment_id, "written_by", EXPERIMENT)

    def register(self, champion: Champion, *, with_trials: bool = True) -> RegisteredPack:
        """Make `champion` the newest version of its task, and point the alias `champion` at it if it is the one to choose, or to be promoted.

        A pack already registered for the task (same digest) is not written again; it competes for the alias all the same. Raises RegistryError.

        Args:
            with_trials: whether each trial of the study becomes a child run.
        """
        champion.check()
        with registry_errors(self.tracking_uri):
            self._settle_here()
            version = self._find_version(champion) or self._settle(champion, self._create_version(champion, with_trials))
            self._publish(version, champion)
            mine = self.get(f"{version.name}/{version.version}")
            remark = self._place_alias(mine, champion)
            return replace(self.get(mine.reference), remark=remark)

    def _settle_here(self) -> None:
        """Write the place of a moved or copied work folder into its database: what is registered now must not go to the former place."""
        if (database := sqlite_path(self.tracking_uri)) is None:
            return
        self._artifacts_recorded = self.client.get_experiment(self._experiment_id).artifact_location
        if self._lies_elsewhere():
            rebase_artifacts(database, self._artifacts_recorded, self._artifacts_here)
            self._artifacts_recorded = self._artifacts_here

    def _lies_elsewhere(self) -> bool:
        """Whether the SQLite store was made when its folder lay elsewhere. Artifacts that somebody keeps apart from the database stay there."""
        recorded = self._artifacts_recorded
        return self._artifacts_here not in ("", recorded) and recorded.startswith("file:") and recorded.endswith("/artifacts")

    def _find_version(self, champion: Champion) -> Any:
        mine = f"name = '{champion.task}' AND tags.{DIGEST_TAG} = '{champion.pack_digest}'"
        found = self.client.search_model_versions(mine, max_results=1, order_by=["version_number ASC"])
        return found[0] if found else None

    def _settle(self, champion: Champion, created: Any) -> Any:
        """The version that counts: of the same pack registered twice at once, the earlier one; the other is withdrawn."""
        earliest = self._find_version(champion)
        if earliest.version == created.version:
            return created
        _denied_as_none(self.client.delete_model_version, created.name, str(created.version))
        self._discard_unfinished(champion)
        return earliest

    def _create_version(self, champion: Champion, with_trials: bool) -> Any:
        self._discard_unfinished(champion)
        model = self._log(champion)
        if with_trials:
            log_trials(self.client, self._experiment_id, model.source_run_id, champion.front, _as_ms(datetime.now(UTC)))
        self._ensure_registered_model(champion)
        # The location rather than `models:/m-...`: MLflow's SQL store resolves the latter through the process-wide tracking URI, not the client's.
        return self.client.create_model_version(
            champion.task,
            source=model.artifact_location,
            run_id=model.source_run_id,
            tags={DIGEST_TAG: champion.pack_digest, MODEL_ID_TAG: model.model_id, "size_bytes": str(champion.size_bytes)},
            model_id=model.model_id,
        )

    def _discard_unfinished(self, champion: Champion) -> None:
        """Delete what earlier tries of this registry left, and what is too old to be another batch's at work; as far as the server permits it."""
        mine = f"tags.{TASK_TAG} = '{champion.task}' AND tags.{DIGEST_TAG} = '{champion.pack_digest}'"
        abandoned_ms = (datetime.now(UTC).timestamp() - _ABANDONED_SECONDS) * 1000
        for model in self.client.search_logged_models([self._experiment_id], filter_string=mine):
            if model.model_id in self._begun or model.creation_timestamp < abandoned_ms:
                _denied_as_none(self.client.delete_logged_model, model.model_id)
        for run in self.client.search_runs([self._experiment_id], filter_string=mine):
            begun_ms = int(run.data.tags.get(BEGUN_TAG, run.info.start_time))
            if run.info.run_id in self._begun or begun_ms < abandoned_ms:
                _denied_as_none(delete_children, self.client, self._experiment_id, run.info.run_id)
                _denied_as_none(self.client.delete_run, run.info.run_id)

    def _log(self, champion: Champion) -> Any:
        """One run and one LoggedModel with the champion's files and numbers."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        now_ms = _as_ms(datetime.now(UTC))
        started_ms = now_ms if champion.started is None else _as_ms(champion.started)
        tags = {**champion.all_tags(), BEGUN_TAG: str(now_ms)}
        run_id = self.client.create_run(self._experiment_id, start_time=started_ms, run_name=champion.task, tags=tags).info.run_id
        self._begun.add(run_id)
        model = self.client.create_logged_model(
            self._experiment_id,
            name=champion.task,
            source_run_id=run_id,
            tags=champion.all_tags(),
            params=champion.params,
            model_type=EXPERIMENT,
        )
        self._begun.add(model.model_id)
        with tempfile.TemporaryDirectory(prefix="taskpack-") as folder:
            self.client.log_model_artifacts(model.model_id, str(write_model(champion, Path(folder), model.model_id)))
            self.client.log_artifacts(run_id, str(write_front(champion, Path(folder))), "front")
        self._log_numbers(champion, run_id, model.model_id)
        self._log_data(champion, run_id)
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model

    def _log_numbers(self, champion: Champion, run_id: str, model_id: str) -> None:
        from mlflow.entities import Metric, Param

        now_ms = _as_ms(datetime.now(UTC))
        metrics = [Metric(key, float(value), now_ms, 0, model_id=model_id) for key, value in sorted(champion.all_metrics().items())]
        self.client.log_batch(run_id, metrics=metrics, params=[Param(key, value) for key, value in sorted(champion.params.items())])

    def _log_data(self, champion: Champion, run_id: str) -> None:
        """The splits as the run's datasets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=f"{champion.task} {used.split}",
                    digest=used.digest[:_LONGEST_DIGEST],
                    source_type="local",
                    source=json.dumps({"uri": used.source}),
                    profile=json.dumps({"num_rows": used.samples, "num_classes": used.classes}),
                ),
                tags=[InputTag("mlflow.data.context", used.split)],
            )
            for used in champion.data
        ]
        if inputs:
            self.client.log_inputs(run_id, inputs)

    def _ensure_registered_model(self, champion: Champion) -> None:
        if _absent_as_none(self.client.get_registered_model, champion.task) is None:
            _existing_as_none(self.client.create_registered_model, champion.task, description=champion.tags.get("description"))

    def _publish(self, version: Any, champion: Champion) -> None:
        """Do whatever is not done yet: describe the version, tell the LoggedModel of it, end the run, by which `search` finds it from now on."""
        model_id, number = version.tags[MODEL_ID_TAG], str(version.version)
        if not version.description:
            self.client.update_model_version(version.name, number, version_card(champion, int(number)))
        if _VERSIONS_TAG not in self.client.get_logged_model(model_id).tags:
            self.client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps([{"name": version.name, "version": int(number)}])})
        if self.client.get_run(version.run_id).info.status != "FINISHED":
            self.client.set_terminated(version.run_id)

    # --- the alias --------------------------------------------------------------------------------------------------------------------------

    def _place_alias(self, mine: RegisteredPack, champion: Champion) -> str:
        """Point the alias at the version that is to have it after `mine` was registered; say which, and why."""
        if champion.promote:
            self._point_alias_at(mine)
            return f"champion: {mine.reference}, promoted"
        holder = self._holder(mine.name)
        chosen, remark = place_alias(mine, holder, self._best_versions(mine.name), champion.within_points)
        while holder is None or holder.version != chosen.version:
            self._point_alias_at(chosen)
            holder = chosen
            # Another driver may have published a better version, and have moved the alias before this one did.
            chosen, again = place_alias(mine, None, self._best_versions(mine.name), champion.within_points)
            remark = remark if chosen.version == holder.version else again
        return remark

    def _holder(self, name: str) -> RegisteredPack | None:
        """The version that has the alias; None where none has, or one that taskpack did not register."""
        registered = self._reader.get_registered_model(name)
        number = registered.aliases.get(CHAMPION_ALIAS)
        version = None if number is None else _absent_as_none(self._reader.get_model_version, name, str(int(number)))
        return None if version is None or not _is_ours(version) else _merge(version, self._run_of(version), version.aliases)

    def _best_versions(self, name: str) -> list[RegisteredPack]:
        """The versions of a task that are best on validation."""
        clauses = " AND ".join([*_search_clauses(name, None, None, 1), "metrics.val_accuracy >= 0"])
        best_first = ["metrics.val_accuracy DESC"]
        runs = self._reader.search_runs([self._experiment_id], clauses, max_results=_PAGE, order_by=best_first, page_token=None)
        return self._registered_from_runs(list(runs))

    def _point_alias_at(self, pack: RegisteredPack) -> None:
        if CHAMPION_ALIAS not in self.client.get_model_version(pack.name, str(pack.version)).aliases:
            self.client.set_registered_model_alias(pack.name, CHAMPION_ALIAS, str(pack.version))
            self._show_champion(pack)

    def _show_champion(self, pack: RegisteredPack) -> None:
        """What the champion costs and reaches as tags of the registered model, which MLflow's list of models shows."""
        for key, value in pack.shown().items():
            self.client.set_registered_model_tag(pack.name, key, value)

    def _find_or_create_experiment(self) -> Any:
        experiment = self._reader.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # Two processes may both get here; the one that comes second finds the other's.
            _existing_as_none(self.client.create_experiment, EXPERIMENT, artifact_location=self._artifacts_here or None)
            experiment = self._reader.get_experiment_by_name(EXPERIMENT)
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"the MLflow experiment {EXPERIMENT!r} is deleted; restore it: mlflow experiments restore -x {experiment.experiment_id}"
            )
        return experiment

    # --- looking up -------------------------------------------------------------------------------------------------------------------------

    def search(
        self,
        task: str | None = None,
        max_bytes: int | None = None,
        min_metric: float | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> list[RegisteredPack]:
        """Registered packs within `max_bytes` and of at least `min_metric` test accuracy (0 to 1): best first, then smallest, at most `limit`.

        The server filters and orders by number; versions deleted since are left out. `after` names the pack, such as the last one of an earlier
        answer, behind which this one begins, so packs registered meanwhile move nothing. Raises RegistryError.
        """
        clauses = _search_clauses(task, max_bytes, min_metric, limit)
        order = ["metrics.test_accuracy DESC", "metrics.size_bytes ASC"]
        found: list[RegisteredPack] = []
        page_token: str | None = None
        with registry_errors(self.tracking_uri):
            last = None if after is None else _place(self._version_and_run(after)[1])
            if last is not None:
                # Packs as good as the last one are on both sides of it; rounding must not leave one out.
                clauses.append(f"metrics.test_accuracy <= {1e-9 - last[0]:.12f}")
            while len(found) < limit:
                size = min(limit - len(found), _PAGE) if last is None else _PAGE
                page = self._reader.search_runs([self._experiment_id], " AND ".join(clauses), max_results=size, order_by=order, page_token=page_token)
                found += self._registered_from_runs([run for run in page if last is None or _place(run) > last])
                page_token = page.token
                if not page_token:
                    break
        return found[:limit]

    def get(self, reference: str) -> RegisteredPack:
        """The pack at `name` (its champion), `name@alias` or `name/3`. Raises RegistryError with near names where there is none."""
        with registry_errors(self.tracking_uri):
            version, run = self._version_and_run(reference)
            return _merge(version, run, version.aliases)

    def _version_and_run(self, reference: str) -> tuple[Any, Any]:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise RegistryError(f"{reference!r}: not a reference to a pack; give NAME, NAME@ALIAS or NAME/VERSION")
        registered = _absent_as_none(self._reader.get_registered_model, match["name"])
        if registered is None:
            raise RegistryError(f"{reference}: no task of this name is registered; {self._near_names(match['name'])}")
        number = match["version"] or registered.aliases.get(match["alias"] or CHAMPION_ALIAS)
        version = None if number is None else _absent_as_none(self._reader.get_model_version, registered.name, str(int(number)))
        if version is None:
            raise RegistryError(f"{reference}: no such version; {self._known_versions(registered)}")
        return version, self._run_of(version)

    def download(self, registered: RegisteredPack, folder: Path) -> Path:
        """Copy the pack file into `folder` as NAME-VERSION.safetensors. Raises RegistryError where the copy is not whole."""
        target = folder / f"{registered.name}-{registered.version}.safetensors"
        with tempfile.TemporaryDirectory(prefix="taskpack-") as temporary:
            copy = self._fetch(self._model(registered).artifact_location, f"data/{PACK_FILE}", temporary)
            if copy.stat().st_size != registered.size_bytes:
                raise RegistryError(
                    f"{registered.name}/{registered.version}: the stored pack has {copy.stat().st_size} bytes, registered were "
                    f"{registered.size_bytes}; the artifact store is damaged, delete this version and register the pack again"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(copy, target)
            except OSError as error:
                raise StorageError(f"{target}: the pack cannot be written ({error.strerror}); choose another folder") from None
        return target

    def front(self, registered: RegisteredPack) -> list[dict[str, Any]]:
        """The study's rows, one a trial, as they were when the pack was registered. Raises RegistryError."""
        with registry_errors(self.tracking_uri):
            location = self.client.get_run(self._model(registered).source_run_id).info.artifact_uri
        with tempfile.TemporaryDirectory(prefix="taskpack-") as temporary:
            rows: list[dict[str, Any]] = json.loads(self._fetch(location, "front/front.json", temporary).read_text(encoding="utf-8"))
        return rows

    def _model(self, registered: RegisteredPack) -> Any:
        with registry_errors(self.tracking_uri):
            return self.client.get_logged_model(registered.model_id)

    def _fetch(self, location: str, path: str, folder: str) -> Path:
        # By location, for the same reason as in `_create_version`: `models:/` and `runs:/` would look in the process-wide store.
        uri = f"{self._found_here(location).rstrip('/')}/{path}"
        with registry_errors(self.tracking_uri):
            return Path(import_mlflow().artifacts.download_artifacts(uri, dst_path=folder, tracking_uri=self.tracking_uri))

    def _found_here(self, location: str) -> str:
        """Where an artifact is whose place the store recorded before its folder was moved or copied."""
        former = f"{self._artifacts_recorded}/"
        is_former = self._lies_elsewhere() and location.startswith(former)
        return f"{self._artifacts_here}/{location.removeprefix(former)}" if is_former else location

    def _run_of(self, version: Any) -> Any:
        """The run of a version."""
        if not _is_ours(version):
            raise RegistryError(f"{version.name}/{version.version}: a model that taskpack did not register; `taskpack ls` lists those it did")
        return self._reader.get_run(version.run_id)

    def _registered_from_runs(self, runs: list[Any]) -> list[RegisteredPack]:
        """Those of `runs` whose versions are still there. Two requests at once, however many runs: a server that checks passwords takes a third of a
        second for each."""
        if not runs:
            return []
        ids = ", ".join(f"'{run.info.run_id}'" for run in runs)
        names = ", ".join(f"'{name}'" for name in sorted({run.data.tags[TASK_TAG] for run in runs}))
        with ThreadPoolExecutor(max_workers=2) as pool:
            searched = pool.submit(self._reader.search_model_versions, f"run_id IN ({ids})", max_results=4 * _PAGE)
            # A version that was searched for does not say its aliases; its registered model does.
            named = pool.submit(self._reader.search_registered_models, f"name IN ({names})", max_results=_PAGE)
            versions = {version.run_id: version for version in searched.result() if _is_ours(version)}
            aliases = {model.name: model.aliases for model in named.result()}
        found = []
        for run in runs:
            if version := versions.get(run.info.run_id):
                at = aliases.get(version.name, {}).items()
                found.append(_merge(version, run, [alias for alias, number in at if int(number) == int(version.version)]))
        return found

    def _near_names(self, name: str) -> str:
        # The first two letters are enough for the server to leave out most of the registry.
        candidates = [found.name for found in self._reader.search_registered_models(f"name ILIKE '{name[:2]}%'", max_results=500)]
        near = difflib.get_close_matches(name.lower(), candidates, n=3, cutoff=0.5)
        return f"did you mean {' or '.join(near)}?" if near else "`taskpack ls` lists what there is"

    def _known_versions(self, model: Any) -> str:
        newest = self._reader.search_model_versions(f"name = '{model.name}'", max_results=1, order_by=["version_number DESC"])
        return f"newest version: {newest[0].version if newest else 'none'}, aliases: {', '.join(sorted(model.aliases)) or 'none'}"


def _is_ours(version: Any) -> bool:
    return MODEL_ID_TAG in version.tags and DIGEST_TAG in version.tags


def _merge(version: Any, run: Any, aliases: Iterable[str]) -> RegisteredPack:
    return RegisteredPack(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(aliases)),
        model_id=version.tags[MODEL_ID_TAG],
        task=run.data.tags[TASK_TAG],
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        tags={key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.") and key != BEGUN_TAG},
        size_bytes=int(run.data.metrics["size_bytes"]),
        pack_digest=version.tags[DIGEST_TAG],
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, tz=UTC),
    )


def _place(run: Any) -> tuple[float, float, int, str]:
    """Where the server puts a run in the order of `search`: by accuracy, size, age and id."""
    metrics = run.data.metrics
    return -metrics["test_accuracy"], metrics["size_bytes"], -run.info.start_time, run.info.run_id


def _search_clauses(task: str | None, max_bytes: int | None, min_metric: float | None, limit: int) -> list[str]:
    if limit < 1:
        raise RegistryError(f"limit: given {limit}, expected 1 or more")
    if task is not None and re.search(r"['\"`\\]", task):
        raise RegistryError(f"task: given {task!r}, which no task can be called; quotes and backslashes are not part of names")
    if min_metric is not None and not 0 <= min_metric <= 1:
        raise RegistryError(f"min_metric: given {min_metric}, expected an accuracy between 0 and 1")
    # The two numbers are always asked for: what else somebody keeps in the experiment has none.
    numbers = ["metrics.size_bytes " + ("> 0" if max_bytes is None else f"<= {max_bytes}"), f"metrics.test_accuracy >= {min_metric or 0:.12f}"]
    return ["attributes.status = 'FINISHED'", *numbers, *([] if task is None else [f"tags.{TASK_TAG} = '{task}'"])]


def _as_ms(when: datetime) -> int:
    return int(when.timestamp() * 1000)


def _absent_as_none(call: Any, *arguments: Any) -> Any:
    return _error_as_none(("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"), call, *arguments)


def _denied_as_none(call: Any, *arguments: Any) -> Any:
    return _error_as_none(("PERMISSION_DENIED",), call, *arguments)


def _existing_as_none(call: Any, *arguments: Any, **options: Any) -> Any:
    return _error_as_none(("RESOURCE_ALREADY_EXISTS",), call, *arguments, **options)


def _error_as_none(codes: tuple[str, ...], call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except Exception as error:
        if getattr(error, "error_code", None) not in codes:
            raise
        return None
