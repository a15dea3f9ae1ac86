"""A dataset is prepared once, whole or not at all."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path
from typing import Any

import pytest
from helpers_datasets import DIGITS, contents, task_of

from pipeline.data import (
    prepare,
    read_index,
)
from pipeline.errors import DataError, StorageError

PREPARE = importlib.import_module(
    "pipeline.data.prepare"
)  # the package gives the function this name

# --- once, whole or not at all --------------------------------------------------------------------


def test_a_prepared_folder_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = prepare(task_of(DIGITS), tmp_path / "p")
    monkeypatch.setattr(PREPARE, "write_shards", lambda *_: pytest.fail("written again"))
    assert prepare(task_of(DIGITS), tmp_path / "p") == index
    with pytest.raises(
        DataError, match=r"selection\.batch_size"
    ):  # the check is made again: the recipe may have changed
        prepare(task_of(DIGITS, selection={"batch_size": 500}), tmp_path / "p")


@pytest.mark.parametrize("harm", ["flip", "delete", "truncate"])
def test_a_damaged_folder_is_prepared_again(harm: str, tmp_path: Path) -> None:
    prepare(task_of(DIGITS), tmp_path / "p")
    before = contents(tmp_path / "p")
    shard = tmp_path / "p" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    if harm == "delete":
        shard.unlink()
    else:
        shard.write_bytes(content if harm == "flip" else content[:2000])
    prepare(task_of(DIGITS), tmp_path / "p")
    assert contents(tmp_path / "p") == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_another_source_replaces_the_dataset(tmp_path: Path) -> None:
    prepare(task_of(DIGITS), tmp_path / "p")
    index = prepare(task_of({**DIGITS, "seed": 1}), tmp_path / "p")
    assert read_index(tmp_path / "p") == index
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        prepare(task_of(DIGITS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StorageError, match="is a file"):
        prepare(task_of(DIGITS), tmp_path / "thesis.tex")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "test" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match=r"No space left.*free some space"):
            prepare(task_of(DIGITS), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    assert prepare(task_of(DIGITS), tmp_path / "p").classes == list("0123456789")


def test_an_interruption_leaves_the_former_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(task_of(DIGITS), tmp_path / "p")
    before = contents(tmp_path / "p")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PREPARE, "write_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(task_of({**DIGITS, "seed": 1}), tmp_path / "p")
    assert contents(tmp_path / "p") == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_lost_race_keeps_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PREPARE.write_shards
    winners: list[Any] = []
    folders: list[int] = []

    def slow(*arguments: Any) -> Any:
        if not winners:
            winners.append(None)
            winners[0] = prepare(task_of(DIGITS), tmp_path / "p")
            folders.append((tmp_path / "p").stat().st_ino)
        return write(*arguments)

    monkeypatch.setattr(PREPARE, "write_shards", slow)
    assert prepare(task_of(DIGITS), tmp_path / "p") == winners[0]
    assert (tmp_path / "p").stat().st_ino == folders[0]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
