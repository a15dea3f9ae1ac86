"""Reaching MLflow: quiet settings, and a SQLite store made exactly once.

MLflow is imported lazily, because that takes seconds, and after its environment is set, because
telemetry starts on import. Migrating a new SQLite store takes seconds, and two processes that both
do so leave a database that cannot be opened. So a draft file is migrated under a file lock and
moved into place when complete: no process ever sees an unfinished database.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipeline.errors import RegistryError, StorageError

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow logs the whole traceback of what it then raises; `registry/failures.py` says it in one
    # line.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_LOG_UV_FILES": "false",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
# MLflow's own defaults retry for minutes; a server that does not answer the first call is more
# likely down than busy.
_FIRST_CALL = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}
_LOCK_SECONDS = 120
_WARNINGS_LOCK = threading.RLock()
_ANALYSED_ROWS = 1000
# Where MLflow's tables keep absolute URIs of artifacts.
_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore the warnings that MLflow, pandas and SQLAlchemy give about each other. One thread at
    a time: `warnings.catch_warnings` changes the whole process, and threads that leave it in
    another order than they entered would restore the wrong filters.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings(action="ignore"):
        yield


def import_mlflow() -> ModuleType:
    """MLflow, without telemetry and progress bars. What the user's environment sets already is
    kept.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def import_pyfunc() -> ModuleType:
    """`mlflow.pyfunc`, which warns about type hints of its own when first imported."""
    import_mlflow()
    with without_warnings():
        import mlflow.pyfunc

    return mlflow.pyfunc


def resolve_tracking_uri(uri: str | None, workdir: Path) -> str:
    """The absolute tracking URI: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` under `workdir`.
    Raises RegistryError for a file store.
    """
    uri = (
        uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{workdir.resolve() / 'mlflow.db'}"
    )
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        raise RegistryError(
            f"{uri}: not a tracking URI that MLflow still writes to; give"
            " sqlite:////absolute/path/mlflow.db or the http(s):// address of a server"
        )
    path = sqlite_path(uri)
    # Ray workers run in other folders: a relative database would be another one there.
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite URI, absolute; None for any other URI. Raises RegistryError
    where it names no file.
    """
    if not uri.startswith("sqlite:"):
        return None
    match = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if match is None or match[1] == ":memory:":
        raise RegistryError(
            f"{uri}: names no database file; give sqlite:////absolute/path/mlflow.db"
        )
    return Path(match[1]).resolve()


def initialise_sqlite(database: Path, artifact_root: Path) -> None:
    """Make an empty MLflow store at `database` unless one is there. Safe to call from many
    processes at once. Raises StorageError.
    """
    import_mlflow()
    from filelock import FileLock, Timeout

    # MLflow's tables use a loader that SQLAlchemy calls deprecated: a matter between the two, not
    # one for our users.
    with without_warnings():
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.orm import configure_mappers

        configure_mappers()
    lock = FileLock(f"{database}.lock", timeout=_LOCK_SECONDS)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if database.exists() and database.stat().st_size > 0:
                return
            draft = database.with_name(database.name + ".draft")
            draft.unlink(missing_ok=True)
            draft.with_name(draft.name + "-journal").unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{draft}", artifact_root.as_uri()).engine.dispose()
            os.replace(draft, database)
    except Timeout:
        raise RegistryError(
            f"{lock.lock_file}: another process has held this lock for {_LOCK_SECONDS} s; see"
            " whether it hangs"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{database}: the registry's database cannot be written ({error.strerror}); choose"
            " another folder"
        ) from None


def rebase_artifacts(database: Path, old: str, new: str) -> None:
    """Replace the prefix `old` of every artifact URI in a SQLite store by `new`."""
    with (
        contextlib.closing(sqlite3.connect(database, timeout=_LOCK_SECONDS)) as connection,
        connection,
    ):
        for table, column in _ARTIFACT_COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR"
                f" substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )


def refresh_statistics(database: Path) -> None:
    """Update SQLite's query planner statistics; takes milliseconds, because only a part of each
    index is read.

    Without statistics, a look-up among 10,000 packs took it 20 s instead of 0.3 s.
    """
    with (
        contextlib.closing(sqlite3.connect(database, timeout=_LOCK_SECONDS)) as connection,
        connection,
    ):
        connection.execute(f"PRAGMA analysis_limit={_ANALYSED_ROWS}")
        connection.execute("ANALYZE")


@contextmanager
def short_patience() -> Iterator[None]:
    """One retry and 4 s a request, for the call that finds out whether a server is there at all."""
    before = {name: os.environ.get(name) for name in _FIRST_CALL}
    os.environ.update(_FIRST_CALL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
