"""The index: the shards of a prepared dataset and their contents.

`index.json` is the manifest of a prepared dataset. It is written last and renamed into place, so a
folder that has one is complete. It holds every sample's label, so that batches are planned without
opening a shard, and every shard's SHA-256, so that a changed shard is noticed when it is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.urls import sha256_hex
from pipeline.errors import DataError
from pipeline.kinds import classes_in

INDEX_NAME = "index.json"
FORMAT_VERSION: Literal[1] = 1
SplitName = Literal["train", "val", "test"]
_ClassNumber = Annotated[int, Field(ge=0)]


class ShardEntry(BaseModel):
    """One shard: `path` is relative to the index's folder, or absolute, or a URL; `labels` are in
    the order of its samples: a class number for each, or a tuple of them where samples may have
    several.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    samples: int = Field(ge=1)
    size_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    labels: list[_ClassNumber] | list[tuple[_ClassNumber, ...]]

    @model_validator(mode="after")
    def _one_label_a_sample(self) -> Self:
        if len(self.labels) != self.samples:
            raise ValueError(
                f"{self.path} has {self.samples} samples but {len(self.labels)} labels"
            )
        return self

    @property
    def largest_class(self) -> int:
        """The largest class number; -1 where no sample has a label."""
        return max((each for label in self.labels for each in classes_in(label)), default=-1)


class DataIndex(BaseModel):
    """A prepared dataset.

    `source_digest` identifies what it was made from, `remarks` are warnings for the user; neither
    is part of `digest`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = FORMAT_VERSION
    classes: list[str]
    splits: dict[SplitName, list[ShardEntry]]
    source_digest: str = ""
    remarks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _labels_are_classes(self) -> Self:
        for shard in self.shards:
            if shard.largest_class >= len(self.classes):
                raise ValueError(
                    f"{shard.path} has label {shard.largest_class}, but there are"
                    f" {len(self.classes)} classes"
                )
        return self

    @property
    def shards(self) -> list[ShardEntry]:
        """All shards, in the order of the splits."""
        return [shard for shards in self.splits.values() for shard in shards]

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the content: classes, and each split's shards by their own
        SHA-256, independent of their paths.
        """
        lines = [f"class {name!r}" for name in self.classes]
        lines += [
            f"{split} {shard.sha256}"
            for split in sorted(self.splits)
            for shard in self.splits[split]
        ]
        return sha256_hex("\n".join(lines).encode())


def read_index(folder: Path) -> DataIndex:
    """Read the index of a prepared dataset. Raises DataError if it is missing, damaged or of a
    newer version.
    """
    path = folder / INDEX_NAME
    try:
        return DataIndex.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); prepare the dataset first"
        ) from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "content"
        raise DataError(
            f"{path}: not a version {FORMAT_VERSION} index ({where}: {fault['msg']}); delete it and"
            " prepare the dataset again"
        ) from None


def write_index(folder: Path, index: DataIndex) -> None:
    """Write `index` into `folder` atomically, replacing an existing one."""
    temporary = folder / f".{INDEX_NAME}.{os.getpid()}"
    try:
        temporary.write_text(index.model_dump_json() + "\n", encoding="utf-8")
        os.replace(temporary, folder / INDEX_NAME)
    finally:
        temporary.unlink(missing_ok=True)
