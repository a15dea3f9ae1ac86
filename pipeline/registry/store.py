"""The registry: packs as versions of an MLflow registered model, found again by numbers.

One registered model per task, one version per pack, the alias `champion` on the best of them.
registration.py says how a pack is written, lookups.py how it is found, alias.py which version has
the alias.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError, StorageError
from pipeline.registry.alias import ChampionAlias
from pipeline.registry.connection import initialise_sqlite, resolve_tracking_uri, sqlite_path
from pipeline.registry.failures import registry_errors, set_despite_race
from pipeline.registry.lookups import LookUps
from pipeline.registry.model_files import PACK_FILE
from pipeline.registry.pack_record import Champion, RegisteredPack
from pipeline.registry.registration import Registration
from pipeline.registry.tracking import EXPERIMENT, TrackingStore


def open_registry(uri: str | None, workdir: Path, *, writer: str | None = None) -> Registry:
    """The registry at `uri`, else at MLFLOW_TRACKING_URI, else in a SQLite file under `workdir`,
    created on first use, with its artifacts next to it.

    Args:
        writer: names who registers, over restarts, so that what a killed process left is discarded
            by the next; see `Registration`.

    Raises:
        RegistryError: the server cannot be reached (within about 10 s).
        StorageError: the database cannot be written.
    """
    tracking_uri = resolve_tracking_uri(uri, workdir)
    database = sqlite_path(tracking_uri)
    if database is None:
        return Registry(tracking_uri, None, writer=writer)
    artifact_root = database.parent / "artifacts"
    with registry_errors(tracking_uri):
        initialise_sqlite(database, artifact_root)
    return Registry(tracking_uri, artifact_root, writer=writer)


class Registry:
    """Registered packs in one MLflow store. Arguments as for `TrackingStore` and
    `open_registry`.
    """

    def __init__(
        self, tracking_uri: str, artifact_root: Path | None, *, writer: str | None = None
    ) -> None:
        self.store = TrackingStore(tracking_uri, artifact_root)
        self._lookups = LookUps(self.store)
        self._registration = Registration(self.store, writer or secrets.token_hex(8))
        self._alias = ChampionAlias(self.store, self._lookups)

    @property
    def client(self) -> Any:
        """MLflow's own client of this store."""
        return self.store.client

    def check_writable(self) -> None:
        """Write a tag to a server, so that a user who may only read is refused before hours of
        training. Raises RegistryRefused.
        """
        if sqlite_path(self.store.tracking_uri) is not None:
            return
        with registry_errors(self.store.tracking_uri):
            set_despite_race(
                self.client.set_experiment_tag, self.store.experiment_id, "written_by", EXPERIMENT
            )

    def register(self, champion: Champion, *, with_trials: bool = True) -> RegisteredPack:
        """Make `champion` the newest version of its task, and point the alias `champion` at it if
        it is the one to choose, or to be promoted.

        A pack already registered for the task (same digest) is not written again; it competes for
        the alias all the same. Raises RegistryError.

        Args:
            with_trials: whether each trial of the study becomes a child run.
        """
        champion.check()
        with registry_errors(self.store.tracking_uri):
            self.store.rebase_moved()
            version = self._registration.write(champion, with_trials)
            mine = self.get(f"{version.name}/{version.version}")
            remark = self._alias.place(mine, champion)
            return replace(self.get(mine.reference), remark=remark)

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
        """See `LookUps.search`."""
        return self._lookups.search(task, max_bytes, min_metric, metric, fingerprint, limit, after)

    def champions(
        self, fingerprint: str | None = None, after: str | None = None
    ) -> Iterator[RegisteredPack]:
        """See `LookUps.champions`."""
        return self._lookups.champions(fingerprint, after)

    def get(self, reference: str) -> RegisteredPack:
        """See `LookUps.get`."""
        return self._lookups.get(reference)

    def versions(self, references: list[str]) -> dict[str, int]:
        """See `LookUps.versions`."""
        return self._lookups.versions(references)

    def download(self, registered: RegisteredPack, folder: Path) -> Path:
        """Copy the pack file into `folder` as NAME-VERSION.safetensors. Raises RegistryError where
        the copy is not whole.
        """
        target = folder / f"{registered.name}-{registered.version}.safetensors"
        with tempfile.TemporaryDirectory(prefix="taskpack-") as temporary:
            copy = self.store.fetch(
                self._model(registered).artifact_location, f"data/{PACK_FILE}", temporary
            )
            if copy.stat().st_size != registered.size_bytes:
                raise RegistryError(
                    f"{registered.name}/{registered.version}: the stored pack has"
                    f" {copy.stat().st_size} bytes, registered were {registered.size_bytes}; the"
                    " artifact store is damaged, delete this version and register the pack again"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(copy, target)
            except OSError as error:
                raise StorageError(
                    f"{target}: the pack cannot be written ({error.strerror}); choose another"
                    " folder"
                ) from None
        return target

    def front(self, registered: RegisteredPack) -> list[dict[str, Any]]:
        """The study's rows, one per trial, as they were when the pack was registered. Raises
        RegistryError.
        """
        run_id = self._model(registered).source_run_id
        with tempfile.TemporaryDirectory(prefix="taskpack-") as temporary:
            front = self.store.fetch_of_run(run_id, "front/front.json", temporary)
            rows: list[dict[str, Any]] = json.loads(front.read_text(encoding="utf-8"))
        return rows

    def _model(self, registered: RegisteredPack) -> Any:
        with registry_errors(self.store.tracking_uri):
            return self.client.get_logged_model(registered.model_id)
