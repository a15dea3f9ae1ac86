"""Reaching MLflow: quiet settings, a SQLite store made exactly once, and errors a user can act on.

MLflow is imported late (it costs seconds) and only after its environment is set, because telemetry starts on import. A fresh SQLite store takes
seconds of migrations; two processes that both start them leave a database that no process can open. So the store is migrated under a file lock in a
draft file and moved into place when complete: whoever sees the database sees a finished one, whatever was interrupted.
"""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from pipeline.errors import RegistryAway, RegistryError, StorageError

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow logs the whole traceback of what it then raises; `registry_errors` says it in one line.
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
# MLflow's own defaults retry for minutes; a server that does not answer the first call is more likely down than busy.
_FIRST_CALL = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
_LOCK_SECONDS = 120
_AWAY = re.compile(
    r"Max retries exceeded|Connection ?(refused|error|aborted|reset)|timed out|error code 50[234]|too many 50[0-9] error|database is locked", re.I
)


def import_mlflow() -> ModuleType:
    """MLflow, without telemetry and progress bars. What the user's environment sets already is kept."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def import_pyfunc() -> ModuleType:
    """`mlflow.pyfunc`, which warns about type hints of its own when first imported."""
    import_mlflow()
    with warnings.catch_warnings(action="ignore"):
        import mlflow.pyfunc

    return mlflow.pyfunc


def resolve_tracking_uri(uri: str | None, workdir: Path) -> str:
    """The absolute tracking URI: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` under `workdir`. Raises RegistryError for a file store."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir.resolve() / 'mlflow.db'}"
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        raise RegistryError(
            f"{uri}: not a tracking URI that MLflow still writes to; give sqlite:////absolute/path/mlflow.db or the http(s):// address of a server"
        )
    path = sqlite_path(uri)
    # Ray workers run in other folders: a relative database would be another one there.
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite URI, absolute; None for any other URI. Raises RegistryError where it names no file."""
    if not uri.startswith("sqlite:"):
        return None
    match = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if match is None or match[1] == ":memory:":
        raise RegistryError(f"{uri}: names no database file; give sqlite:////absolute/path/mlflow.db")
    return Path(match[1]).resolve()


def initialise_sqlite(database: Path, artifact_root: Path) -> None:
    """Make an empty MLflow store at `database` unless one is there. Safe to call from many processes at once. Raises StorageError."""
    import_mlflow()
    from filelock import FileLock, Timeout

    # MLflow's tables use a loader that SQLAlchemy calls deprecated: a matter between the two, not one for our users.
    with warnings.catch_warnings(action="ignore"):
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
        raise RegistryError(f"{lock.lock_file}: another process has held this lock for {_LOCK_SECONDS} s; see whether it hangs") from None
    except OSError as error:
        raise StorageError(f"{database}: the registry's database cannot be written ({error.strerror}); choose another folder") from None


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


@contextmanager
def registry_errors(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or its transport raise into one RegistryError that names the store and what to check."""
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, sqlite3.Error) as error:
        kind = RegistryAway if _AWAY.search(str(error)) else RegistryError
        raise kind(_explain(tracking_uri, str(error))) from None


def _explain(tracking_uri: str, text: str) -> str:
    where = _without_password(tracking_uri)
    reason = text.strip().splitlines()[0] if text.strip() else "no reason given"
    reason = reason if len(reason) <= 300 else reason[:297] + "..."
    if _AWAY.search(text):
        return f"{where}: the MLflow server cannot be reached; check that it runs, the address and port in MLFLOW_TRACKING_URI, and any proxy"
    if re.search(r"error code (401|403)|UNAUTHENTICATED|PERMISSION_DENIED", text):
        return (
            f"{where}: the MLflow server refuses access; check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, "
            f"and the server's --allowed-hosts ({reason})"
        )
    if re.search(r"disk is full|No space left", text):
        return f"{where}: the disk is full; free space, then the same command goes on"
    if "failed with error code 404" in text:
        return f"{where}: a server answers here, but not as MLflow does; check the address, its port and its path"
    if "while downloading one or more artifacts" in text:
        return f"{where}: a file cannot be read from the artifact store; see whether it is still there and readable ({reason.rstrip(':')})"
    if "out-of-date database schema" in text:
        return f"{where}: the database belongs to another MLflow version; back it up and run `mlflow db upgrade {where}`"
    if re.search(r"file is not a database|malformed", text):
        return f"{where}: this file is not an intact SQLite database; move it away or name another"
    return f"{where}: MLflow refused: {reason}"


def _without_password(uri: str) -> str:
    password = urlsplit(uri).password
    return uri if password is None else uri.replace(f":{password}@", ":***@")
