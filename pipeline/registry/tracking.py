"""The tracking store of a registry: its clients, its experiment, and the location of its artifacts.

MLflow's tables hold absolute URIs. Those of a SQLite store are read as if the work folder had never
been moved: files are read next to the database, and the next registration writes the new location
into the tables.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError
from pipeline.registry.connection import (
    import_mlflow,
    rebase_artifacts,
    refresh_statistics,
    short_patience,
    sqlite_path,
)
from pipeline.registry.failures import existing_as_none, registry_errors
from pipeline.registry.rest import plain_rest

EXPERIMENT = "taskpack"
_EXPERIMENT_TAGS = {
    # MLflow's pages otherwise take an experiment for one of generative models.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "One run per registered pack of taskpack; its child runs are the trials of the pack's"
        " study. The packs are under Model registry."
    ),
}


class TrackingStore:
    """An MLflow store and taskpack's experiment in it.

    Args:
        tracking_uri: absolute; of a server or a SQLite file.
        artifact_root: where files go for a store without a server; a server decides for itself
            (None).

    Raises:
        RegistryError: it cannot be reached, or the experiment is deleted.
    """

    def __init__(self, tracking_uri: str, artifact_root: Path | None) -> None:
        self.tracking_uri = tracking_uri
        with registry_errors(tracking_uri), short_patience():
            self._rest = plain_rest(tracking_uri)
            self._artifacts_here = "" if artifact_root is None else artifact_root.resolve().as_uri()
            experiment = self._find_or_create_experiment()
            self.experiment_id = str(experiment.experiment_id)
            self._artifacts_recorded = str(experiment.artifact_location)

    @functools.cached_property
    def client(self) -> Any:
        """MLflow's own client, for files, LoggedModels, and what is rarely asked."""
        return import_mlflow().MlflowClient(
            tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri
        )

    @property
    def light(self) -> Any:
        """The client for what every registration and look-up asks: over REST without MLflow where
        that is possible.
        """
        return self._rest or self.client

    def _find_or_create_experiment(self) -> Any:
        experiment = self.light.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # Two processes may both get here; the second one finds what the first has made.
            location = self._artifacts_here or None
            existing_as_none(
                self.client.create_experiment,
                EXPERIMENT,
                artifact_location=location,
                tags=_EXPERIMENT_TAGS,
            )
            experiment = self.light.get_experiment_by_name(EXPERIMENT)
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"the MLflow experiment {EXPERIMENT!r} is deleted; restore it: mlflow experiments"
                f" restore -x {experiment.experiment_id}"
            )
        return experiment

    def refresh_statistics(self) -> None:
        """Update the query planner's statistics after a registration, if the store is a SQLite
        file; a server's database does so by itself.
        """
        if (database := sqlite_path(self.tracking_uri)) is not None:
            refresh_statistics(database)

    # --- artifacts --------------------------------------------------------------------------------

    def rebase_moved(self) -> None:
        """Write the new path of a moved or copied work folder into its database, so that new
        artifacts do not go to the old path.
        """
        if (database := sqlite_path(self.tracking_uri)) is None:
            return
        self._artifacts_recorded = self.client.get_experiment(self.experiment_id).artifact_location
        if self._was_moved():
            rebase_artifacts(database, self._artifacts_recorded, self._artifacts_here)
            self._artifacts_recorded = self._artifacts_here

    def _was_moved(self) -> bool:
        """Whether the SQLite store was made when its folder lay elsewhere. Artifacts kept apart
        from the database on purpose stay there.
        """
        recorded = self._artifacts_recorded
        return (
            self._artifacts_here not in ("", recorded)
            and recorded.startswith("file:")
            and recorded.endswith("/artifacts")
        )

    def fetch(self, location: str, path: str, folder: str) -> Path:
        """Download the file `path` below an artifact location into `folder`."""
        # By location: `models:/` and `runs:/` would look in the process-wide store.
        uri = f"{self._location_now(location).rstrip('/')}/{path}"
        with registry_errors(self.tracking_uri):
            return Path(
                import_mlflow().artifacts.download_artifacts(
                    uri, dst_path=folder, tracking_uri=self.tracking_uri
                )
            )

    def fetch_of_run(self, run_id: str, path: str, folder: str) -> Path:
        """Download the file `path` among the artifacts of a run into `folder`."""
        with registry_errors(self.tracking_uri):
            location = self.client.get_run(run_id).info.artifact_uri
        return self.fetch(location, path, folder)

    def _location_now(self, location: str) -> str:
        """Where an artifact lies that was recorded before the folder was moved or copied."""
        former = f"{self._artifacts_recorded}/"
        is_former = self._was_moved() and location.startswith(former)
        return f"{self._artifacts_here}/{location.removeprefix(former)}" if is_former else location
