"""Shards behind URLs: fetched once from a real server, kept by content, bounded, never believed
without their hash.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import DataIndex, Images, Reader, split_samples, training_batches, write_shards
from pipeline.data.inspection import Inspection
from pipeline.data.prepare import _scan
from pipeline.data.reader import BATCHES_AHEAD, CACHE, SHARDS_AHEAD
from pipeline.data.remote import FOLDER_VARIABLE, LIMIT_VARIABLE, ShardStore, shard_store
from pipeline.data.sources import encode_png
from pipeline.data.urls import sha256_hex
from pipeline.errors import DataError
from pipeline.kinds.registry import kind_named

SIZE_PX = 8
SHARDS = 9


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "store"))
    CACHE.clear()
    yield
    CACHE.clear()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, Counter[str]]]:
    """A folder, its URL, and how often each file of it was asked for in full."""
    folder, asked = tmp_path / "served", Counter[str]()
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def dataset(folder: Path, url: str) -> DataIndex:
    """Shards in `folder`, indexed by URL."""
    rng = np.random.default_rng(0)
    samples = [
        (f"{number:06d}", encode_png(rng.integers(0, 256, (9, 7, 3), np.uint8)), number % 2)
        for number in range(10 * SHARDS)
    ]
    splits = {
        "train": write_shards(folder, "train", samples, 10),
        "test": write_shards(folder, "test", samples[:2]),
    }
    moved = {
        name: [shard.model_copy(update={"path": f"{url}/{shard.path}"}) for shard in shards]
        for name, shards in splits.items()
    }
    return DataIndex(classes=["a", "b"], splits=moved)


def test_two_epochs_of_two_readers_ask_for_each_shard_once(
    served: tuple[Path, str, Counter[str]], tmp_path: Path
) -> None:
    folder, url, asked = served
    split = split_samples(dataset(folder, url), 0.3, 0)["train"]
    local = Reader(
        folder,
        [shard.model_copy(update={"path": Path(shard.path).name}) for shard in split.shards],
        Images(SIZE_PX),
    )
    for cache_bytes in (1 << 30, 1):  # all in memory; one shard in memory
        reader = Reader(tmp_path, split, Images(SIZE_PX), cache_bytes)
        for epoch in range(2):
            plan = training_batches(split, 8, seed=0, epoch=epoch, window=reader.window())
            CACHE.clear()
            read = list(reader.batches(plan))
            CACHE.clear()
            for (images, labels), samples in zip(read, plan, strict=True):
                expected_images, expected_labels = local.read(samples)
                assert torch.equal(images, expected_images)
                assert torch.equal(labels, expected_labels)
    assert set(asked.values()) == {1}
    assert len(asked) == SHARDS
    assert {path.name for path in (tmp_path / "store").iterdir() if not path.suffix} == {
        shard.sha256 for shard in split.shards
    }


def test_the_next_shards_are_on_their_way_while_one_is_used(
    served: tuple[Path, str, Counter[str]], tmp_path: Path
) -> None:
    folder, url, asked = served
    split = split_samples(dataset(folder, url), 0.3, 0)["train"]
    by_shard = [split.samples[split.samples[:, 0] == number] for number in range(SHARDS)]
    batches = Reader(tmp_path, split, Images(SIZE_PX)).batches(by_shard)
    next(batches)
    batches.close()  # waits for those that had started
    assert 1 <= len(asked) <= 1 + BATCHES_AHEAD + SHARDS_AHEAD < SHARDS
    assert "/train-000001.tar" in asked


def test_a_shard_that_fails_ends_the_epoch_when_its_turn_comes(
    served: tuple[Path, str, Counter[str]], tmp_path: Path
) -> None:
    folder, url, _ = served
    split = split_samples(dataset(folder, url), 0.3, 0)["train"]
    (folder / "train-000002.tar").write_bytes(b"something else")
    (folder / "train-000004.tar").unlink()
    by_shard = [split.samples[split.samples[:, 0] == number] for number in range(SHARDS)]
    reader = Reader(tmp_path, split, Images(SIZE_PX))
    seen = reader.batches(by_shard)
    assert [len(next(seen)[1]) for _ in range(2)] == [len(rows) for rows in by_shard[:2]]
    with pytest.raises(DataError, match=r"train-000002\.tar: damaged, or changed"):
        next(seen)
    with pytest.raises(DataError, match=r"train-000004\.tar: no such file"):
        reader.read(by_shard[4])


def test_training_does_not_fetch_what_preparing_has_read(
    served: tuple[Path, str, Counter[str]], tmp_path: Path
) -> None:
    folder, url, asked = served
    entries = [
        _scan(shard.path, ["a", "b"], "train", Inspection(), None, kind_named("classification"))
        for shard in dataset(folder, url).splits["train"]
    ]
    Reader(tmp_path, entries, Images(SIZE_PX)).read(
        np.array([[number, 0] for number in range(SHARDS)])
    )
    assert set(asked.values()) == {1}


# --- the store ------------------------------------------------------------------------------------


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    store, contents = ShardStore(tmp_path / "kept", 1e9), {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-000000.tar").write_bytes(name.encode() * 100)
        contents[name] = store.read(
            str(tmp_path / name / "train-000000.tar"), sha256_hex(name.encode() * 100)
        )
    assert contents == {"a": b"a" * 100, "b": b"b" * 100}


def test_the_store_is_bounded_and_drops_what_was_read_longest_ago(tmp_path: Path) -> None:
    store, urls = ShardStore(tmp_path / "kept", 250), {}
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode() * 100)
        urls[name] = (str(tmp_path / name), sha256_hex(name.encode() * 100))

    def kept() -> set[str]:
        return {path.read_text()[0] for path in store.folder.iterdir() if not path.suffix}

    for name in "aba":
        store.read(*urls[name])
    store.read(*urls["c"])
    assert kept() == {"a", "c"}
    (tmp_path / "d").write_bytes(b"d" * 1000)
    store.read(str(tmp_path / "d"), sha256_hex(b"d" * 1000))
    assert kept() == {"d"}, "one that is larger than the bound is kept alone"
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    store, source = ShardStore(tmp_path / "kept", 1e9), tmp_path / "a.tar"
    source.write_bytes(b"whole")
    store.read(str(source), sha256_hex(b"whole"))
    (store.folder / sha256_hex(b"whole")).write_bytes(b"cut")
    assert store.read(str(source), sha256_hex(b"whole")) == b"whole"
    assert (store.folder / sha256_hex(b"whole")).read_bytes() == b"whole"


def test_a_store_that_cannot_be_written_keeps_nothing_and_reads_on(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"whole")
    (tmp_path / "file").write_text("")
    assert (
        ShardStore(tmp_path / "file" / "kept", 1e9).read(
            str(tmp_path / "a.tar"), sha256_hex(b"whole")
        )
        == b"whole"
    )


def test_threads_that_want_one_shard_fetch_it_once(
    served: tuple[Path, str, Counter[str]], tmp_path: Path
) -> None:
    folder, url, asked = served
    (folder / "a.tar").write_bytes(b"whole" * 1000)
    threads = [
        threading.Thread(
            target=shard_store().read, args=(f"{url}/a.tar", sha256_hex(b"whole" * 1000))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == {"/a.tar": 1}


def test_a_bound_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "many")
    with pytest.raises(DataError, match="TASKPACK_SHARDS_GB: given 'many'"):
        shard_store()
