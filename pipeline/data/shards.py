"""Shards: WebDataset tars of `key.jpg` (or another extension of `formats.py`) and `key.cls`, or
`key.mask.png`, written byte for byte the same, read without losing a sample or running code.

Python's tar reader stops silently at a damaged header, and at a file that was cut between two
members; both would lose samples. So a shard is read as a whole, and is valid only if its members
are followed by the end mark of two zero blocks and by nothing else. Labels are numbers, names or a
field of JSON, one or several (labels.py); members that only a pickle loader could read are rejected
by name, and WebDataset's decoders, which would load them, are never called.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ["WDS_SECURE"] = "1"  # read by webdataset when it is imported

from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from pipeline.data.formats import CLOUD_EXTENSION, explain, extension_of, kind_of
from pipeline.data.images import Images
from pipeline.data.index import ShardEntry
from pipeline.data.labels import SINGLE, MemberLabels, kind_label
from pipeline.data.masks import check_kept, kept_classes
from pipeline.data.modality import Modality
from pipeline.data.quoting import listing, shortened
from pipeline.data.unpack import unpacked
from pipeline.data.urls import fetch, sha256_hex
from pipeline.errors import DataError
from pipeline.kinds import Label, TaskKind

REFUSED_EXTENSIONS = ("pkl", "pickle", "pyd", "npy", "npz", "pt", "pth", "joblib", "dill")
LABEL_EXTENSION = "cls"
MASK_EXTENSION = "mask.png"
SAMPLES_PER_SHARD = 1000
SHARD_SIZE_BYTES = 64 * 1024**2
_BLOCK_BYTES = tarfile.BLOCKSIZE

Member = TypeVar("Member", bytes, slice)
Sample = tuple[str, bytes, Label]  # key, encoded image, label
MaskedSample = tuple[str, bytes, Label, bytes]  # and the mask, as a PNG of class numbers


# --- reading --------------------------------------------------------------------------------------


def read_shard(url: str, kind: TaskKind = SINGLE) -> Iterator[Sample]:
    """The samples of the shard at a path or URL, in order: key, encoded image, label. Raises
    DataError naming the shard and the member at fault.
    """
    return samples_in(fetch(url), url, kind=kind)


def samples_in(
    content: bytes,
    url: str,
    names: Sequence[str] | None = None,
    label_field: str | None = None,
    kind: TaskKind = SINGLE,
    modality: type[Modality] = Images,
) -> Iterator[Sample]:
    """The samples of a shard whose bytes are `content`; `url` is used in errors.

    names: of the classes, where they are declared. label_field: the field of `key.json` that holds
    the label; by default the label is `key.cls`, or without one the field `label`. Of a dense
    kind, it is the classes in the mask. modality: whose files the samples are. Raises DataError.
    """
    labels = MemberLabels(names, kind)
    for key, members, image_extension in _samples(content, url, modality):
        sample = f"{url}: {shortened(key)}"
        if kind.is_dense:
            image = members[image_extension]
            yield key, image, _label_of_mask(image, _mask(members, sample), names, kind, sample)
            continue
        label_extension = (
            LABEL_EXTENSION if LABEL_EXTENSION in members and label_field is None else "json"
        )
        _check_alone(members, image_extension, label_extension, sample, modality)
        if label_extension not in members:
            raise DataError(
                f"{sample}: no member .json; expected one with the field {label_field!r}, or leave"
                " out `label_field`"
            )
        field = (label_field or "label") if label_extension == "json" else None
        yield (
            key,
            members[image_extension],
            labels.read(members[label_extension], field, f"{sample}.{label_extension}"),
        )


def images_in(content: bytes, url: str) -> Iterator[tuple[str, bytes]]:
    """Key and encoded image of each sample, in the same order; their labels are not looked at.
    Raises DataError.
    """
    for key, members, image_extension in _samples(content, url):
        yield key, members[image_extension]


def sample_spans(content: bytes, url: str, has_masks: bool) -> Iterator[tuple[str, list[slice]]]:
    """Key of each sample, in the same order, and where its image begins and ends, and its mask
    where samples have one. Raises DataError.
    """
    for key, members, image_extension in _spans(content, url):
        spans = [members[image_extension]]
        if has_masks:
            spans.append(_mask(members, f"{url}: {shortened(key)}"))
        yield key, spans


def _mask(members: dict[str, Member], sample: str) -> Member:
    if MASK_EXTENSION not in members:
        raise DataError(
            f"{sample}: no mask; expected a member with the same key and the extension"
            f" {MASK_EXTENSION}"
        )
    return members[MASK_EXTENSION]


def _label_of_mask(
    image: bytes, mask: bytes, names: Sequence[str] | None, kind: TaskKind, sample: str
) -> Label:
    where = f"{sample}.{MASK_EXTENSION}"
    check_kept(mask, image, len(names) if names is not None else None, where)
    return kind_label(kept_classes(mask, where), kind, where)


def _samples(
    content: bytes, url: str, modality: type[Modality] = Images
) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Each sample's key, members by extension, and which of them is its image."""
    tar = unpacked(content, url)
    for key, spans, image_extension in _spans(tar, url, modality):
        yield key, {name: tar[span] for name, span in spans.items()}, image_extension


def _spans(
    tar: bytes, url: str, modality: type[Modality] = Images
) -> Iterator[tuple[str, dict[str, slice], str]]:
    """As `_samples`, with the places of the members in the tar."""
    keys: set[str] = set()
    for members in _groups(tar, url, modality):
        key = str(members["__key__"])
        image_extension = _image_extension(members, f"{url}: {shortened(key)}", modality)
        if image_extension is None:
            continue
        if key in keys:
            raise DataError(
                f"{url}: {shortened(key)}: this key occurs twice; give each sample its own key, and"
                " keep its members next to each other"
            )
        keys.add(key)
        spans = {name: each for name, each in members.items() if isinstance(each, slice)}
        yield key, spans, image_extension
    if not keys:
        raise DataError(
            f"{url}: the shard holds no samples; expected members such as"
            f" 000000.{modality.extensions[0]} and 000000.{LABEL_EXTENSION}"
        )


def _groups(content: bytes, url: str, modality: type[Modality]) -> Iterator[dict[str, Any]]:
    """The places of each key's members, by extension in lower case, and WebDataset's own entries
    such as `__key__`.
    """
    members = (
        {"fname": name, "data": slice(start, end), "__url__": url}
        for name, start, end in _members(content, url, modality)
    )
    try:
        yield from group_by_keys(members)
    except ValueError as error:  # two extensions that differ in case alone
        name = shortened(str(error.args[0]).partition(": duplicate")[0])
        raise DataError(
            f"{url}: {name}: a duplicate name but for upper and lower case; give each sample its"
            " own key"
        ) from None


def _members(content: bytes, url: str, modality: type[Modality]) -> list[tuple[str, int, int]]:
    """Each file's name, and where in `content` it begins and ends.

    Raises DataError unless that is one whole, plain tar of ordinary files that may all be read
    safely.
    """
    if not content:
        raise DataError(f"{url}: the shard is empty (0 bytes); copy or prepare it again")
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    _check_member(member, members, url, modality)
                    members[member.name] = member.offset_data, member.offset_data + member.size
            end = int(archive.offset)
    except (tarfile.TarError, ValueError) as error:
        kind = kind_of(content)
        fault = (
            kind
            if kind not in (None, "a tar archive")
            else f"truncated, damaged or not a tar ({shortened(str(error), 100)})"
        )
        raise DataError(
            f"{url}: {fault}; expected a tar, uncompressed or compressed with gzip; copy or prepare"
            " it again"
        ) from None
    after = content[end:]
    if len(after) < 2 * _BLOCK_BYTES or after.strip(b"\0"):
        reason = (
            "a damaged header or a second tar"
            if after.strip(b"\0")
            else "no end mark: the file was cut short"
        )
        raise DataError(
            f"{url}: damaged at byte {end} after {len(members)} members ({reason}); copy or prepare"
            " it again"
        )
    return [(name, *place) for name, place in members.items()]


def _check_member(
    member: tarfile.TarInfo, names: Container[str], url: str, modality: type[Modality]
) -> None:
    where = f"{url}: {shortened(member.name)}"
    base, extension = os.path.basename(member.name), member.name.lower().rpartition(".")[2]
    if (
        not member.isreg() or member.issparse()
    ):  # a sparse member of a few bytes may claim terabytes
        raise DataError(
            f"{where}: not an ordinary file (a link, device or sparse file); write the shard with"
            " the files themselves"
        )
    if re.match(r"__[^/]*__($|/)", member.name):
        raise DataError(
            f"{where}: refused, WebDataset skips names that begin with __...__ without a word;"
            " rename it"
        )
    if extension in REFUSED_EXTENSIONS and extension not in modality.extensions:
        raise DataError(
            f"{where}: refused, members of this kind can run code when they are loaded; expected"
            f" {modality.noun}s and .{LABEL_EXTENSION}"
        )
    if member.name.rpartition(".")[2].startswith("__"):
        raise DataError(
            f"{where}: refused, WebDataset gives extensions that begin with two underscores another"
            " meaning; rename it"
        )
    if (
        base.startswith(".")
        and not base.startswith("._")
        and extension in (*modality.extensions, LABEL_EXTENSION)
    ):
        raise DataError(
            f"{where}: refused, WebDataset skips names that begin with a dot without a word;"
            " rename it"
        )
    if member.name in names:
        raise DataError(f"{where}: this member occurs twice; give each sample its own key")


def _image_extension(members: dict[str, Any], sample: str, modality: type[Modality]) -> str | None:
    """The member that is the sample's image, or its cloud; None if the group has neither that nor a
    label (a README). Raises DataError.
    """
    extensions = [name for name in members if not name.startswith("__")]
    images = [name for name in extensions if name in (*modality.extensions, CLOUD_EXTENSION)]
    if len(images) == 1 and not {LABEL_EXTENSION, "json", MASK_EXTENSION}.isdisjoint(members):
        return images[0]
    if not any(
        name.rpartition(".")[2] in (*modality.extensions, LABEL_EXTENSION) for name in extensions
    ):
        return None
    if len(images) > 1:
        raise DataError(
            f"{sample}: more than one {modality.noun} ({listing(extensions)}); keep one for each"
            " key"
        )
    if images:
        raise DataError(
            f"{sample}.{images[0]}: {modality.a_noun} without a label; expected a member with the"
            " same key and the extension cls or json next to it"
        )
    # The key ends at the name's first dot, so `a.v2.jpg` is not the image of `a`.
    raise DataError(
        f"{sample}: no {modality.noun}, only {listing(extensions)}; expected an extension such as"
        f" {modality.extensions[0]} right after the key, which may have no dot"
    )


def _check_alone(
    members: dict[str, bytes],
    image_extension: str,
    label: str,
    sample: str,
    modality: type[Modality],
) -> None:
    """Raise DataError if a second image of the group also has a label: `a.v2.jpg` and `a.v2.cls`
    next to `a.jpg` and `a.cls`.
    """
    for name in members:
        stem, _, extension = name.rpartition(".")
        if stem and extension in modality.extensions and f"{stem}.{label}" in members:
            raise DataError(
                f"{sample}.{shortened(name)}: a second labelled {modality.noun} next to"
                f" {sample.rpartition(': ')[2]}.{image_extension}; a key ends at the first dot of a"
                " name; rename it, without a dot in its key"
            )


# --- writing --------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    split: str,
    samples: Iterable[Sample | MaskedSample],
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> list[ShardEntry]:
    """Write `samples` to `folder` as `split-000000.tar` and so on, each of at most
    `samples_per_shard` samples and about SHARD_SIZE_BYTES.

    The same samples give the same bytes. The paths of the entries are relative to `folder`. Raises
    OSError where the disk does.
    """
    entries: list[ShardEntry] = []
    for batch in _batches(samples, samples_per_shard):
        content = _tar(batch)
        path = f"{split}-{len(entries):06d}.tar"
        (folder / path).write_bytes(content)
        labels = [sample[2] for sample in batch]
        entries.append(
            ShardEntry(
                path=path,
                samples=len(batch),
                size_bytes=len(content),
                sha256=sha256_hex(content),
                labels=labels,
            )
        )
    return entries


def _batches(
    samples: Iterable[Sample | MaskedSample], samples_per_shard: int
) -> Iterator[list[Sample | MaskedSample]]:
    batch: list[Sample | MaskedSample] = []
    size_bytes = 0
    for sample in samples:
        batch.append(sample)
        size_bytes += len(sample[1]) + (len(sample[3]) if len(sample) == 4 else 0)
        if len(batch) == samples_per_shard or size_bytes >= SHARD_SIZE_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _tar(samples: list[Sample | MaskedSample]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(
        stream, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False
    ) as writer:
        for sample in samples:
            key, image = sample[:2]
            annotation = (
                {MASK_EXTENSION: sample[3]}
                if len(sample) == 4
                else {LABEL_EXTENSION: json.dumps(sample[2]).encode()}
            )
            writer.write({"__key__": key, _extension_of(image, key): image, **annotation})
    return stream.getvalue()


def _extension_of(image: bytes, name: str) -> str:
    """The extension that matches an encoded image's first bytes, regardless of its file name.
    Raises DataError.
    """
    extension = extension_of(image)
    if extension is None:
        raise DataError(f"{name}: cannot be decoded: {explain(image)}")
    return extension
