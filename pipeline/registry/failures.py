"""Convert exceptions of MLflow, its database and its transport to named errors that say what to do.

Two kinds matter for retries: `RegistryUnreachable` may resolve itself, `RegistryRefused` does not
until a password or a permission is changed. MLflow tells them apart only
in the text of its exceptions, so that is what is read here.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError, RegistryRefused, RegistryUnreachable, TaskpackError
from pipeline.registry.connection import import_mlflow
from pipeline.utils.redaction import without_secrets

_CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_STORE_UNREACHABLE = (
    "the MLflow server runs, but its artifact store does not answer; check that store and its"
    " bucket, then give the same command again"
)
# What to look for, what to raise, what to say. The first that is found counts; the last is found in
# every text.
_KINDS: tuple[tuple[str, type[RegistryError], str], ...] = (
    (
        r"disk is full|No space left",
        RegistryError,
        "the disk is full; free space, then run the same command to continue",
    ),
    (r"mlflow-artifacts/.*too many 5\d\d error responses", RegistryUnreachable, _STORE_UNREACHABLE),
    (
        (
            r"too many (429|5\d\d) error responses|error code"
            r" (429|5\d\d)|TEMPORARILY_UNAVAILABLE|REQUEST_LIMIT_EXCEEDED|\b5\d\d Server Error"
        ),
        RegistryUnreachable,
        (
            "the MLflow server cannot answer now ({reason}); see whether its database runs, then"
            " give the same command again"
        ),
    ),
    (
        r"Max retries exceeded|Connection ?(refused|error|aborted|reset)|timed out",
        RegistryUnreachable,
        (
            "the MLflow server cannot be reached; check that it runs, the address and port in"
            " MLFLOW_TRACKING_URI, and any proxy"
        ),
    ),
    (
        r"database is locked",
        RegistryUnreachable,
        (
            "another process is writing to this database; wait for it, then give the same command"
            " again"
        ),
    ),
    (
        r"Invalid Host header",
        RegistryRefused,
        (
            "the MLflow server does not answer to this name; start it with --allowed-hosts that has"
            " it, or use another address"
        ),
    ),
    (
        r"error code 401|401 Client Error|UNAUTHENTICATED",
        RegistryRefused,
        f"the MLflow server does not know this user and password; check {_CREDENTIALS}",
    ),
    (
        r"error code 403|403 Client Error|PERMISSION_DENIED",
        RegistryRefused,
        (
            "the MLflow server does not permit this ({reason}); look-ups need READ, runs EDIT,"
            " on the experiment taskpack and on the models: ask its administrator, or be another"
            f" user with {_CREDENTIALS}"
        ),
    ),
    (
        "failed with error code 404",
        RegistryError,
        "a server answers here, but not as MLflow does; check the address, its port and its path",
    ),
    (
        "while downloading one or more artifacts|mlflow-artifacts/.*RESOURCE_DOES_NOT_EXIST",
        RegistryError,
        (
            "a file cannot be read from the artifact store; see whether it is still there and"
            " readable ({reason})"
        ),
    ),
    ("out-of-date database schema", RegistryError, "{schema}"),
    (
        r"file is not a database|malformed",
        RegistryError,
        "this file is not an intact SQLite database; move it away or name another",
    ),
    ("", RegistryError, "MLflow refused: {reason}"),
)


@contextmanager
def registry_errors(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or its transport raise into one RegistryError that names the
    store and what to check.
    """
    try:
        yield
    except TaskpackError:
        raise
    except Exception as error:
        if not isinstance(error, _foreign()):
            raise
        raise _explained(tracking_uri, str(error)) from None


def _foreign() -> tuple[type[Exception], ...]:
    """Looked up only when something was raised: a look-up over REST loads none of them but
    requests.
    """
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, sqlite3.Error


def _explained(tracking_uri: str, text: str) -> RegistryError:
    kind, message = next(
        (kind, message)
        for pattern, kind, message in _KINDS
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL)
    )
    where, reason = without_secrets(tracking_uri), _reason(without_secrets(text))
    return kind(
        f"{where}: {message.format(where=where, reason=reason, schema=_other_schema(text, where))}"
    )


def _other_schema(text: str, where: str) -> str:
    """Which MLflow wrote a database whose schema is not that of the MLflow installed here, and what
    to do: it upgrades older ones only.
    """
    schemas = re.search(r"found version (\w+), but expected (\w+)", text)
    if schemas is None:
        return ""
    mlflow = import_mlflow()
    found, expected = schemas.groups()
    installed = f"MLflow {mlflow.__version__}, which is installed here, has schema {expected}"
    if any(Path(str(mlflow.__file__)).parent.glob(f"store/db_migrations/versions/{found}_*.py")):
        return (
            f"an older MLflow wrote this database (schema {found}); {installed}. Back it up and run"
            f" `mlflow db upgrade {where}`"
        )
    return (
        f"a newer MLflow wrote this database (schema {found}); {installed} and cannot read it."
        " Install the MLflow that wrote it (`pip install --upgrade mlflow` for the newest), or"
        " name another registry"
    )


def _reason(text: str) -> str:
    """The first line, without what MLflow wraps around an answer and around its own retries."""
    body = re.search(r"Response body: '(.+?)'|Caused by \w+\('(.+?)'", text, re.DOTALL)
    line = next(
        iter((next(filter(None, body.groups())) if body else text).strip().splitlines()),
        "no reason given",
    ).rstrip(":")
    return line if len(line) <= 300 else line[:297] + "..."


def absent_as_none(call: Any, *arguments: Any) -> Any:
    """What a call of a client returns; None where MLflow says there is no such thing."""
    return _error_as_none(("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"), call, *arguments)


def denied_as_none(call: Any, *arguments: Any) -> Any:
    """What a call of a client returns; None where the user may not do that."""
    return _error_as_none(("PERMISSION_DENIED",), call, *arguments)


def existing_as_none(call: Any, *arguments: Any, **options: Any) -> Any:
    """What a call of a client returns; None where what it makes exists already."""
    return _error_as_none(("RESOURCE_ALREADY_EXISTS",), call, *arguments, **options)


def set_despite_race(call: Any, *arguments: Any) -> None:
    """Call a client's setter. Of two writers that set a new tag or alias at once, MLflow's database
    refuses the second; set again, its value replaces the first one's.
    """
    try:
        call(*arguments)
    except Exception as error:
        if not re.search(r"UniqueViolation|UNIQUE constraint|Duplicate entry", str(error)):
            raise
        call(*arguments)


def _error_as_none(codes: tuple[str, ...], call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except Exception as error:
        if getattr(error, "error_code", None) not in codes:
            raise
        return None
