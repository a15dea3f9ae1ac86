"""Images as tables list them: each has a path or a URL and a label, is found, and is given once."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data.faults import Faults
from pipeline.data.index import SplitName
from pipeline.data.quoting import shortened_path
from pipeline.data.sources import SourceSample, read_file, stamp_of
from pipeline.data.urls import fetch, is_url
from pipeline.errors import DataError
from pipeline.redaction import without_secrets


class Entry(NamedTuple):
    """One image as it was listed: `where` names file and line or key, `place` is its path or URL."""

    where: str
    place: str
    label: int


def listed_samples(listed: Mapping[SplitName, Sequence[Entry]], repeats: bool = False) -> dict[SplitName, list[SourceSample]]:
    """The samples of each split.

    Raises DataError where an image is missing, or is given twice, unless in one split, with one label, and `repeats` allows.
    """
    faults = Faults()
    first_use: dict[str, tuple[SplitName, Entry]] = {}
    samples: dict[SplitName, list[SourceSample]] = {split: [] for split in listed}
    for split, entries in listed.items():
        for entry in entries:
            use, first = first_use.setdefault(entry.place, (split, entry))
            if first is entry:
                with faults.gathered():
                    samples[split].append(_sample(entry))
            elif not (repeats and use == split and first.label == entry.label):
                raise DataError(f"{entry.where}: {shortened_path(entry.place)}: given before, at {first.where}; give each image once")
    faults.check()
    return samples


def located(path: str, root: str) -> str:
    """Where a listed image lies: `path` itself if it is a URL, absolute or begins with `~/`, otherwise below `root`."""
    if "://" in path:
        return path
    if "://" in root:
        return f"{root.rstrip('/')}/{os.path.normpath(path)}"
    return os.path.normpath(os.path.join(root, os.path.expanduser(path) if path.startswith("~/") else path))


def _check_protocol(url: str, where: str) -> None:
    try:
        is_url(url)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _sample(entry: Entry) -> SourceSample:
    """An image behind a URL has no stamp: it is fetched once, when the dataset is prepared, and never asked for again."""
    where, place, label = entry
    if "://" in place:
        _check_protocol(place, where)
        return SourceSample(without_secrets(place), "", label, partial(fetch, place))
    try:
        status = os.stat(place)
    except OSError as error:
        advice = "write / instead of \\ in paths" if "\\" in place else "add the image, or remove it from the list"
        raise DataError(f"{where}: {shortened_path(place)}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError:  # NUL, or half a surrogate pair out of JSON
        raise DataError(f"{where}: {shortened_path(place)} holds what no path can; expected the path of an image") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{where}: {shortened_path(place)}: not an ordinary file; expected an image")
    return SourceSample(place, stamp_of(status), label, partial(read_file, Path(place)))
