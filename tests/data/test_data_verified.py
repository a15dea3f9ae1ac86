"""A shard is read once to see that it is intact, and again when its file has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers_datasets import DIGITS, contents, task_of

from pipeline.data import Images, Reader, prepare
from pipeline.data import verified as module
from pipeline.data.index import DataIndex, write_index
from pipeline.data.splits import split_samples
from pipeline.data.verified import VERIFIED_NAME, are_intact
from pipeline.errors import DataError

SHARD = "train-000000.tar"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataIndex:
    """A dataset in the folder `p`, of shards that were written a while ago."""
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    index = prepare(task_of(DIGITS), tmp_path / "p")
    time.sleep(0.02)
    return index


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A function that tells how many shards were hashed since it was last called."""
    count, sha256_hex = [0], module.sha256_hex

    def counted(content: bytes) -> str:
        count[0] += 1
        return sha256_hex(content)

    def since() -> int:
        before, count[0] = count[0], 0
        return before

    monkeypatch.setattr(module, "sha256_hex", counted)
    return since


def flip(path: Path) -> None:
    """Change a byte in place and keep what programs can keep: size, inode, modification time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


def test_a_shard_is_hashed_once(
    dataset: DataIndex, hashed: Callable[[], int], tmp_path: Path
) -> None:
    assert prepare(task_of(DIGITS), tmp_path / "p") == dataset
    assert hashed() == len(dataset.shards)
    written = (tmp_path / "p" / VERIFIED_NAME).stat().st_mtime_ns
    assert prepare(task_of(DIGITS), tmp_path / "p") == dataset
    assert hashed() == 0
    assert (tmp_path / "p" / VERIFIED_NAME).stat().st_mtime_ns == written


def test_an_edited_shard_is_found_whatever_its_modification_time_says(
    dataset: DataIndex, hashed: Callable[[], int], tmp_path: Path
) -> None:
    before = (tmp_path / "p" / SHARD).read_bytes()
    assert are_intact(tmp_path / "p", dataset)
    flip(tmp_path / "p" / SHARD)
    assert not are_intact(tmp_path / "p", dataset)
    prepare(task_of(DIGITS), tmp_path / "p")
    assert (tmp_path / "p" / SHARD).read_bytes() == before
    hashed()
    assert are_intact(tmp_path / "p", dataset)
    assert hashed() == len(dataset.shards), "the folder was written again"


def test_a_replaced_or_missing_shard_is_found(dataset: DataIndex, tmp_path: Path) -> None:
    path = tmp_path / "p" / SHARD
    assert are_intact(tmp_path / "p", dataset)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[1000] ^= 1
    path.rename(tmp_path / "aside")
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not are_intact(tmp_path / "p", dataset)
    path.unlink()
    assert not are_intact(tmp_path / "p", dataset)
    (tmp_path / "aside").rename(path)
    assert are_intact(tmp_path / "p", dataset)


def test_what_was_written_a_moment_ago_is_not_noted(
    dataset: DataIndex,
    hashed: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 3600 * 10**9)
    for _ in range(2):
        assert are_intact(tmp_path / "p", dataset)
        assert hashed() == len(dataset.shards)
    assert not (tmp_path / "p" / VERIFIED_NAME).exists()


def test_notes_are_of_one_index_and_may_be_damaged(
    dataset: DataIndex, hashed: Callable[[], int], tmp_path: Path
) -> None:
    assert are_intact(tmp_path / "p", dataset)
    train = [shard.model_copy(update={"sha256": "0" * 64}) for shard in dataset.splits["train"]]
    other = dataset.model_copy(update={"splits": {**dataset.splits, "train": train}})
    write_index(tmp_path / "p", other)
    assert not are_intact(tmp_path / "p", other)
    hashed()
    for damaged in ("[]", "{", "null", '{"train-000000.tar": 1}'):
        (tmp_path / "p" / VERIFIED_NAME).write_text(damaged)
        assert are_intact(tmp_path / "p", dataset)
        assert hashed() == len(dataset.shards)


def test_a_reader_that_meets_damage_has_all_read_again(
    dataset: DataIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that rots changes no time: what the reader says must be cured by the same command."""
    before = contents(tmp_path / "p")
    assert are_intact(tmp_path / "p", dataset)
    flip(tmp_path / "p" / SHARD)
    with monkeypatch.context() as patch:
        patch.setattr(module, "stamp_of", lambda status: "as before")
        (tmp_path / "p" / VERIFIED_NAME).write_text(
            "{" + ",".join(f'"{s.path}": "{s.sha256} as before"' for s in dataset.shards) + "}"
        )
        assert are_intact(tmp_path / "p", dataset)
        split = split_samples(dataset, 0.2, 0)["train"]
        with pytest.raises(DataError, match="damaged"):
            Reader(tmp_path / "p", split, Images(32)).read(np.array([[0, 0]]))
        prepare(task_of(DIGITS), tmp_path / "p")
    assert contents(tmp_path / "p").items() >= before.items()
