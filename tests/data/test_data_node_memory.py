"""Decoded images that the processes of a machine share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Images, Reader, split_samples, write_shards
from pipeline.data import encoded_shard as encoded_shard_module
from pipeline.data import images as images_module
from pipeline.data import reader as reader_module
from pipeline.data.index import DataIndex
from pipeline.data.node_memory import LIMIT_VARIABLE, NodeMemory, node_memory
from pipeline.data.reader import CACHE
from pipeline.data.sources import encode_png
from pipeline.errors import DataError

OPEN_AND_WAIT = """
import sys, time
from pathlib import Path
from pipeline.data.node_memory import NodeMemory
memory = NodeMemory(Path(sys.argv[1]), 1000)
memory.array("a", 100)[:] = 7
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
memory.leave()
"""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[NodeMemory]:
    memory = NodeMemory(tmp_path / "shared", 1000)
    yield memory
    memory.leave()


def test_an_array_is_zeros_at_first_and_then_what_anyone_wrote(memory: NodeMemory) -> None:
    first = memory.array("a", 100)
    assert first is not None
    assert (first.dtype, first.shape, first.any()) == (np.uint8, (100,), np.False_)
    first[3] = 9
    other = NodeMemory(memory.folder, 1000)
    again = other.array("a", 100)
    assert again is not None
    assert again[3] == 9
    again[4] = 8
    assert first[4] == 8
    other.leave()


def test_the_least_recently_opened_array_makes_room(memory: NodeMemory) -> None:
    kept = memory.array("a", 400)
    assert kept is not None
    for name in ("b", "a", "c"):  # "b" is the oldest when "c" comes
        time.sleep(0.01)
        assert memory.array(name, 400) is not None
    assert {path.name for path in memory.folder.iterdir()} == {"a", "c"}
    time.sleep(0.01)
    memory.array("d", 1000)
    kept[:] = 1  # whoever has an array may still use it
    assert {path.name for path in memory.folder.iterdir()} == {"d"}
    assert memory.array("e", 1001) is None


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("open", "link", "file", "missing/inner"):
        assert NodeMemory(tmp_path / name, 1000).array("a", 10) is None, name


def test_an_array_of_another_size_or_kind_is_not_followed(
    memory: NodeMemory, tmp_path: Path
) -> None:
    assert memory.array("a", 10) is not None
    target = tmp_path / "elsewhere"
    target.write_bytes(b"mine")
    (memory.folder / "b").symlink_to(target)
    assert memory.array("b", 10) is None
    assert target.read_bytes() == b"mine"


def test_the_last_process_to_leave_empties_the_folder(memory: NodeMemory) -> None:
    command = [sys.executable, "-c", OPEN_AND_WAIT, str(memory.folder)]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        array = memory.array("a", 100)
        assert array is not None
        assert (array == 7).all()
        memory.leave()
        assert [path.name for path in memory.folder.iterdir()] == ["a"]
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in memory.folder.iterdir()] == ["a"]  # it could not
    subprocess.run([*command, "0"], check=True, capture_output=True)
    assert list(memory.folder.iterdir()) == []


def test_a_run_keeps_what_its_trials_decode(memory: NodeMemory) -> None:
    trial = NodeMemory(memory.folder, 1000)
    with memory.held():
        assert trial.array("a", 100) is not None
        trial.leave()
        assert [path.name for path in memory.folder.iterdir()] == ["a"]
    assert list(memory.folder.iterdir()) == []
    with NodeMemory(memory.folder / "missing" / "inner", 1000).held():
        pass


def test_a_second_process_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = NodeMemory(tmp_path / "shared", 1 << 20)
    monkeypatch.setattr(reader_module, "node_memory", lambda: memory)
    rng = np.random.default_rng(0)
    samples = [
        (str(number), encode_png(rng.integers(0, 256, (9, 7, 3), np.uint8)), 0)
        for number in range(6)
    ]
    written = {"train": write_shards(tmp_path, "train", samples, 3)}
    written["test"] = written["train"]
    split = split_samples(DataIndex(classes=["a", "b"], splits=written), 0.3, 0)["test"]
    first = Reader(tmp_path, split, Images(8)).read(split.samples)[0]
    CACHE.clear()
    monkeypatch.setattr(images_module, "decode_images", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(encoded_shard_module, "fetch_checked", lambda *_: pytest.fail("fetched"))
    assert (Reader(tmp_path, split, Images(8)).read(split.samples)[0] == first).all()
    CACHE.clear()
    memory.leave()


def test_the_limit_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(given: str | None) -> int:
        node_memory.cache_clear()
        if given is None:
            monkeypatch.delenv(LIMIT_VARIABLE)
        else:
            monkeypatch.setenv(LIMIT_VARIABLE, given)
        return node_memory().limit_bytes

    assert (limit("0"), limit("1.5")) == (0, 1_500_000_000)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for given in ("much", "-1", "nan", "inf"):
        with pytest.raises(DataError, match="expected how many GB of decoded images"):
            limit(given)
    assert 0 <= limit(None) <= memory_bytes / 8
    node_memory.cache_clear()
