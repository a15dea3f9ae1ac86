"""Writing a pack into the store, so that an interruption at any point leaves nothing twice.

The pack's run lasts from the task's start to its registration, names the data, and has the study's
trials as its child runs. Beside it stands a LoggedModel with the same numbers, whose files are the
pack and an MLmodel that names our loader, hence neither pickle nor stored code.

Creating the version, with the pack's digest as its tag, is the one step that commits. What an
interrupted registration left before it is discarded by the next one of the same writer, which every
run and LoggedModel names in a tag; what was missing after it is made good. Two writers may register
the same pack at once: MLflow has no lock, so both create a version, and the later one is withdrawn
before it is published.
"""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.registry.card import run_note, version_card
from pipeline.registry.failures import (
    absent_as_none,
    denied_as_none,
    existing_as_none,
    set_despite_race,
)
from pipeline.registry.model_files import write_front, write_model
from pipeline.registry.pack_record import (
    BEGUN_TAG,
    DIGEST_TAG,
    MODEL_ID_TAG,
    TASK_TAG,
    WRITER_TAG,
    Champion,
)
from pipeline.registry.tracking import EXPERIMENT, TrackingStore
from pipeline.registry.trial_runs import delete_children, log_trials

_LONGEST_DIGEST = 36  # MLflow's limit
# The tag by which MLflow itself links a LoggedModel to its registered versions.
_VERSIONS_TAG = "mlflow.modelVersions"
# A registration takes seconds. One that is older and not finished has no writer any more.
_ABANDONED_SECONDS = 3600


class Registration:
    """Writes packs into one store. `writer` is the same for two of these only if they never write
    at the same time.
    """

    def __init__(self, store: TrackingStore, writer: str) -> None:
        self._store, self._writer = store, writer

    @property
    def _client(self) -> Any:
        return self._store.client

    def write(self, champion: Champion, with_trials: bool) -> Any:
        """The version of this pack, written if it is not there, and published: described, and found
        by look-ups.
        """
        version = self._find_version(champion)
        if version is None:
            version = self._settle(champion, self._create_version(champion, with_trials))
            self._store.refresh_statistics()
        self._publish(version, champion)
        return version

    def _find_version(self, champion: Champion) -> Any:
        mine = f"name = '{champion.task}' AND tags.{DIGEST_TAG} = '{champion.pack_digest}'"
        found = self._store.light.search_model_versions(
            mine, max_results=1, order_by=["version_number ASC"]
        )
        return found[0] if found else None

    def _settle(self, champion: Champion, created: Any) -> Any:
        """The version that counts: of the same pack registered twice at once, the earlier one; the
        other is withdrawn.
        """
        earliest = self._find_version(champion)
        if earliest.version == created.version:
            return created
        denied_as_none(self._client.delete_model_version, created.name, str(created.version))
        if earliest.run_id != created.run_id:  # else a request that was sent again made both
            self._discard_unfinished(champion)
        return earliest

    def _create_version(self, champion: Champion, with_trials: bool) -> Any:
        self._discard_unfinished(champion)
        model = self._log(champion)
        if with_trials:
            log_trials(self._store.light, self._store.experiment_id, model.source_run_id, champion)
        self._ensure_registered_model(champion)
        # The location rather than `models:/m-...`: MLflow's SQL store resolves the latter through
        # the process-wide tracking URI, not the client's.
        return self._store.light.create_model_version(
            champion.task,
            model.artifact_location,
            model.source_run_id,
            tags={
                DIGEST_TAG: champion.pack_digest,
                MODEL_ID_TAG: model.model_id,
                "size_bytes": str(champion.size_bytes),
            },
            model_id=model.model_id,
        )

    def _discard_unfinished(self, champion: Champion) -> None:
        """Delete unfinished registrations of this pack, and others that are too old to be in
        progress, as far as the server permits it.
        """
        experiments = [self._store.experiment_id]
        mine = (
            f"tags.{TASK_TAG} = '{champion.task}' AND tags.{DIGEST_TAG} = '{champion.pack_digest}'"
        )
        abandoned_ms = (datetime.now(UTC).timestamp() - _ABANDONED_SECONDS) * 1000
        for model in self._client.search_logged_models(experiments, filter_string=mine):
            if (
                model.tags.get(WRITER_TAG) == self._writer
                or model.creation_timestamp < abandoned_ms
            ):
                denied_as_none(self._client.delete_logged_model, model.model_id)
        for run in self._client.search_runs(experiments, filter_string=mine):
            begun_ms = int(run.data.tags.get(BEGUN_TAG, run.info.start_time))
            if run.data.tags.get(WRITER_TAG) == self._writer or begun_ms < abandoned_ms:
                # Its children first: should this be interrupted, the next try still finds them by
                # their parent.
                denied_as_none(delete_children, self._client, experiments[0], run.info.run_id)
                denied_as_none(self._client.delete_run, run.info.run_id)

    def _log(self, champion: Champion) -> Any:
        """One run and one LoggedModel with the champion's files and numbers."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        now_ms, experiment_id = _as_ms(datetime.now(UTC)), self._store.experiment_id
        started_ms = now_ms if champion.started is None else _as_ms(champion.started)
        tags = {**champion.all_tags(), WRITER_TAG: self._writer}
        run_tags = {**tags, BEGUN_TAG: str(now_ms), "mlflow.note.content": run_note(champion)}
        run_id = self._store.light.create_run(
            experiment_id, start_time=started_ms, run_name=champion.task, tags=run_tags
        ).info.run_id
        model = self._client.create_logged_model(
            experiment_id,
            name=champion.task,
            source_run_id=run_id,
            tags=tags,
            params=champion.params,
            model_type=EXPERIMENT,
        )
        with tempfile.TemporaryDirectory(prefix="taskpack-") as folder:
            self._client.log_model_artifacts(
                model.model_id, str(write_model(champion, Path(folder), model.model_id))
            )
            self._client.log_artifacts(run_id, str(write_front(champion, Path(folder))), "front")
        self._log_numbers(champion, run_id, model.model_id)
        self._log_data(champion, run_id)
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model

    def _log_numbers(self, champion: Champion, run_id: str, model_id: str) -> None:
        from mlflow.entities import Metric, Param

        now_ms = _as_ms(datetime.now(UTC))
        metrics = [
            Metric(key, float(value), now_ms, 0, model_id=model_id)
            for key, value in sorted(champion.all_metrics().items())
        ]
        self._store.light.log_batch(
            run_id,
            metrics=metrics,
            params=[Param(key, value) for key, value in sorted(champion.params.items())],
        )

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
            self._client.log_inputs(run_id, inputs)

    def _ensure_registered_model(self, champion: Champion) -> None:
        if absent_as_none(self._store.light.get_registered_model, champion.task) is None:
            existing_as_none(
                self._store.light.create_registered_model,
                champion.task,
                description=champion.tags.get("description"),
            )

    def _publish(self, version: Any, champion: Champion) -> None:
        """Finish the registration: describe the version, link the LoggedModel to it, and end the
        run, so that `search` finds it. Steps that were already done are skipped.
        """
        model_id, number = version.tags[MODEL_ID_TAG], str(version.version)
        if not version.description:
            self._store.light.update_model_version(
                version.name, number, version_card(champion, int(number))
            )
        if _VERSIONS_TAG not in self._client.get_logged_model(model_id).tags:
            set_despite_race(
                self._client.set_logged_model_tags,
                model_id,
                {_VERSIONS_TAG: json.dumps([{"name": version.name, "version": int(number)}])},
            )
        if self._store.light.get_run(version.run_id).info.status != "FINISHED":
            now_ms = _as_ms(datetime.now(UTC))
            self._store.light.set_terminated(version.run_id, "FINISHED", now_ms)


def _as_ms(when: datetime) -> int:
    return int(when.timestamp() * 1000)
