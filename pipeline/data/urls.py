"""Opening shards: local paths and fsspec URLs, and nothing that could start a program.

WebDataset's own opener sends `pipe:` URLs to a shell, runs `curl` for http and expands variables
and braces in names. Shards are opened here instead: a plain path with `open`, a URL of a known
object store or web protocol with fsspec. Every other scheme, and every chained URL (`a::b`), is
rejected by name. A store that fails is tried three times; each try ends if a web server is silent
for half a minute.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from braceexpand import braceexpand

from pipeline.data.quoting import shortened, shortened_path
from pipeline.errors import DataError
from pipeline.utils.redaction import without_secrets

PROTOCOLS = (
    "abfs",
    "abfss",
    "az",
    "file",
    "gcs",
    "gs",
    "hf",
    "http",
    "https",
    "memory",
    "s3",
    "s3a",
)
_STAMP_KEYS = (
    "mtime",
    "created",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "md5Hash",
    "Content-MD5",
    "blob_id",
)
SILENT_SECONDS = 30
"""Seconds that a web server may be silent. A download as a whole has no limit. The clients of other
stores have their own limits.
"""
PAUSES_SECONDS = (1, 5)
"""Seconds before a failed read is retried."""
_NUMBER_RANGE = re.compile(r"(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})")
_BRACES_MAX = 100_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")


class Unreachable(DataError):
    """A disk or a server does not answer, so the next file would fail too."""


def is_url(path: str) -> bool:
    """Whether `path` has a URL scheme. Raises DataError for one that is not in PROTOCOLS, such as
    `pipe:`.
    """
    scheme = _SCHEME.match(path)
    if scheme is None or os.path.isabs(path):
        return False
    if scheme[1].lower() not in PROTOCOLS or not path.startswith(f"{scheme[1]}://") or "::" in path:
        known = ", ".join(PROTOCOLS)
        raise DataError(
            f"{shortened_path(path)}: refused; expected a file's path or a URL of one of these"
            f" protocols, not chained and not a command: {known}"
        )
    return True


def resolve(folder: Path, path: str) -> str:
    """A shard's path as written in an index, made openable: URLs and absolute paths stay, others
    are relative to the index's `folder`.
    """
    return path if is_url(path) else str(folder / path)


Result = TypeVar("Result")


def fetch(url: str) -> bytes:
    """The whole content of a local file or URL. Raises DataError if it cannot be read."""
    with _named_errors(url):
        if not is_url(url):
            return Path(url).read_bytes()
        return bytes(_patiently(lambda: _call(url, "cat_file")))


def _call(url: str, method: str) -> Any:
    filesystem, path = _filesystem(url)
    try:
        return getattr(filesystem, method)(path)
    except (
        FileNotFoundError
    ) as error:  # what fsspec says, too, where a web server is silent or fails
        raise (error.__cause__ if _is_web(url) and error.__cause__ else error) from None


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    if not _is_web(url):
        return fsspec.core.url_to_fs(url)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    return fsspec.core.url_to_fs(url, client_kwargs={"timeout": timeout})


def _patiently(read: Callable[[], Result]) -> Result:
    """Call `read` and retry transient errors; a missing or forbidden file is not retried."""
    for pause_seconds in PAUSES_SECONDS:
        try:
            return read()
        except (FileNotFoundError, PermissionError, ImportError, DataError):
            raise
        except Exception:
            time.sleep(pause_seconds)
    return read()


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    """Convert errors while reading `url` to a DataError that names it."""
    name = shortened_path(without_secrets(url)) if "://" in url else url
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{name}: no such file; check the path in the task's data section"
        ) from None
    except ImportError as error:
        raise DataError(
            f"{name}: this protocol needs a package that is not installed ({error})"
        ) from None
    except (
        Exception
    ) as error:  # each store's client has errors of its own, many of which are not OSErrors
        reason = (
            f"no answer within {SILENT_SECONDS} s"
            if isinstance(error, TimeoutError)
            else getattr(error, "strerror", None)
            or shortened(str(error), 100)
            or type(error).__name__
        )
        kind = Unreachable if isinstance(error, OSError) else DataError
        raise kind(
            f"{name}: cannot be read ({reason}); check the path, the permissions and the connection"
        ) from None


def sha256_hex(content: bytes) -> str:
    """SHA-256 of `content`, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def expand(patterns: tuple[str, ...] | str, noun: str = "shard", form: str = "tar") -> list[str]:
    """Expand paths, globs and brace patterns to a list of shards, each glob in sorted order.

    Args:
        noun, form: what the files are, for error messages.

    Raises DataError if one matches nothing, or a file is repeated.
    """
    files: list[str] = []
    for written in (patterns,) if isinstance(patterns, str) else patterns:
        for pattern in _without_braces(written):
            found = _expand_url(pattern) if is_url(pattern) else _expand_local(pattern)
            if not found:
                raise DataError(
                    f"{pattern}: no such {noun}; expected a {form} file, or a glob (*, ?, [..])"
                    " that matches some"
                )
            files += found
    if not files:
        raise DataError(f"no {noun}s given; expected the path of at least one {form} file")
    most_given, times = Counter(files).most_common(1)[0]
    if times > 1:
        raise DataError(f"{most_given}: this {noun} is given more than once; list each {noun} once")
    return files


def _without_braces(pattern: str) -> list[str]:
    """The paths that a brace pattern such as `train-{000..012}.tar` stands for; a file that exists
    is taken by its name. Raises DataError.
    """
    if "{" not in pattern or os.path.exists(pattern):
        return [pattern]
    spans = [abs(int(last) - int(first)) + 1 for first, last in _NUMBER_RANGE.findall(pattern)]
    if math.prod(spans) > _BRACES_MAX:
        raise DataError(
            f"{pattern}: stands for more than {_BRACES_MAX:,} shards; expected a smaller range"
        )
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise DataError(
            f"{pattern}: a brace without its partner; expected a pattern such as"
            " train-{000..012}.tar, or the path of a file"
        ) from None


def _expand_local(pattern: str) -> list[str]:
    path = os.path.abspath(pattern)
    # A file that exists is taken by its name even where the name holds glob characters.
    return [path] if os.path.exists(path) else sorted(glob.glob(path))


def _expand_url(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    with _named_errors(pattern):
        filesystem, path = _filesystem(pattern)
        return sorted(
            str(filesystem.unstrip_protocol(match))
            for match in _patiently(lambda: filesystem.glob(path))
        )


def stamp(url: str) -> str:
    """A stamp that changes when a shard does: size and modification time, the store's tag, or else
    the content's SHA-256. Raises DataError.
    """
    with _named_errors(url):
        if not is_url(url):
            status = os.stat(url)
            return f"{status.st_size}:{status.st_mtime_ns}"
        details = _patiently(lambda: _call(url, "info"))
        tags = [f"{key}={details[key]}" for key in _STAMP_KEYS if details.get(key)]
    return f"{details.get('size')}:{':'.join(tags)}" if tags else sha256_hex(fetch(url))
