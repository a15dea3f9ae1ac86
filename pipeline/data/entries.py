"""Images listed in tables: each has a path or a URL and a label, must exist, and is listed once."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data.faults import Faults
from pipeline.data.images import Images
from pipeline.data.index import SplitName
from pipeline.data.modality import Modality
from pipeline.data.quoting import shortened_path
from pipeline.data.sources import SourceSample, read_file, stamp_of
from pipeline.data.urls import fetch, is_url, sha256_hex
from pipeline.errors import DataError
from pipeline.kinds import Label
from pipeline.utils.redaction import without_secrets


class Entry(NamedTuple):
    """One image of a table: `where` names the file and its line or key, `place` is the path or URL
    of the image.
    """

    where: str
    place: str
    label: Label


def listed_samples(
    listed: Mapping[SplitName, Sequence[Entry]],
    repeats: bool = False,
    modality: type[Modality] = Images,
) -> dict[SplitName, list[SourceSample]]:
    """The samples of each split; `modality` says in error messages what they are.

    Raises DataError if an image is missing, or is listed twice, unless in one split, with one
    label, and `repeats` allows it.
    """
    faults, hosts = Faults(f"{modality.noun}s"), _Hosts()
    first_use: dict[str, tuple[SplitName, Entry]] = {}
    samples: dict[SplitName, list[SourceSample]] = {split: [] for split in listed}
    for split, entries in listed.items():
        for entry in entries:
            use, first = first_use.setdefault(entry.place, (split, entry))
            if first is entry:
                with faults.gathered():
                    samples[split].append(_sample(entry, hosts, modality))
            elif not (repeats and use == split and first.label == entry.label):
                raise DataError(
                    f"{entry.where}: {shortened_path(entry.place)}: given before, at {first.where};"
                    f" give each {modality.noun} once"
                )
    faults.check()
    return samples


def located(path: str, root: str) -> str:
    """The place of a listed image: `path` itself if it is a URL, absolute or begins with `~/`,
    otherwise below `root`.
    """
    if not path:
        return root
    if "://" in path:
        return path
    if "://" in root:
        return f"{root.rstrip('/')}/{os.path.normpath(path)}"
    return os.path.normpath(
        os.path.join(root, os.path.expanduser(path) if path.startswith("~/") else path)
    )


class _Hosts:
    """Fetch images. A host that did not answer is not tried again: a long table would wait for it
    thousands of times.
    """

    def __init__(self) -> None:
        self._silent: set[str] = set()

    def fetch(self, url: str) -> bytes:
        """The image at `url`. Raises DataError."""
        host = url.split("/")[2]
        if host in self._silent:
            raise DataError(
                f"{shortened_path(without_secrets(url))}: not asked for, because"
                f" {shortened_path(without_secrets(host))} did not answer before"
            )
        try:
            return fetch(url)
        except DataError as error:
            answered = isinstance(
                error.__context__, FileNotFoundError | PermissionError
            ) or hasattr(error.__context__, "status")
            self._silent |= set() if answered else {host}
            raise


def _url_sample(entry: Entry, hosts: _Hosts) -> SourceSample:
    """An image behind a URL, which is fetched once, when the dataset is prepared: its stamp is that
    of the URL.
    """
    where, url, label = entry
    try:
        is_url(url)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    name = f"{where}: {shortened_path(without_secrets(url))}"
    return SourceSample(
        name, sha256_hex(url.encode("utf-8", "backslashreplace")), label, partial(hosts.fetch, url)
    )


def _sample(entry: Entry, hosts: _Hosts, modality: type[Modality]) -> SourceSample:
    where, place, label = entry
    if "://" in place:
        return _url_sample(entry, hosts)
    try:
        status = os.stat(place)
    except OSError as error:
        advice = (
            "write / instead of \\ in paths"
            if "\\" in place
            else f"add the {modality.noun}, or remove it from the list"
        )
        raise DataError(
            f"{where}: {shortened_path(place)}: cannot be read ({error.strerror}); {advice}"
        ) from None
    except ValueError:  # NUL, or half a surrogate pair out of JSON
        raise DataError(
            f"{where}: {shortened_path(place)} holds what no path can; expected the path of"
            f" {modality.a_noun}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{where}: {shortened_path(place)}: not an ordinary file; expected {modality.a_noun}"
        )
    return SourceSample(place, stamp_of(status), label, partial(read_file, Path(place)))
