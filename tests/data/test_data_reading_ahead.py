"""How a reader decodes: each image once, ahead of its use, in several threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_cases import for_every

from pipeline.data import (
    Images,
    Reader,
    Split,
    split_samples,
    training_batches,
    write_shards,
)
from pipeline.data import images as images_module
from pipeline.data import reader as reader_module
from pipeline.data.batch_plan import evaluation_batches
from pipeline.data.decode import decode_images
from pipeline.data.index import DataIndex, ShardEntry
from pipeline.data.reader import BATCHES_AHEAD, CACHE, JOBS_PER_DECODER
from pipeline.data.sources import encode_png
from pipeline.errors import DataError

SIZE_PX, SHARD_SAMPLES, SHARDS = 8, 10, 12
SHARD_BYTES = SHARD_SAMPLES * (3 * SIZE_PX**2 + 1)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    threads = torch.get_num_threads()
    CACHE.clear()
    yield
    CACHE.clear()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, Split]:
    rng = np.random.default_rng(0)
    samples = [
        (f"{number:06d}", encode_png(rng.integers(0, 256, (9, 7, 3), np.uint8)), number % 2)
        for number in range(SHARDS * SHARD_SAMPLES)
    ]
    written = {
        "train": write_shards(folder, "train", samples, SHARD_SAMPLES),
        "test": write_shards(folder, "test", samples[:2]),
    }
    return split_samples(DataIndex(classes=["a", "b"], splits=written), 0.25, 0)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image is decoded."""
    counts: Counter[str] = Counter()

    def count(squares: np.ndarray, contents: Iterable[tuple[str, bytes]]) -> None:
        given = list(contents)
        counts.update(name for name, _ in given)
        decode_images(squares, given)

    monkeypatch.setattr(images_module, "decode_images", count)
    return counts


@for_every("threads", (1, 2))
@for_every("shards_kept", (1, 2, 3, 4, 6, 11, 12, 13, 24, 25))
def test_no_image_is_decoded_twice_in_an_epoch_at_any_size_of_the_cache(
    shards_kept: int, threads: int, folder: Path, splits: dict[str, Split], decoded: Counter[str]
) -> None:
    CACHE.clear()
    torch.set_num_threads(threads)
    split = splits["train"]
    reader = Reader(folder, split, Images(SIZE_PX), cache_bytes=shards_kept * SHARD_BYTES)
    for epoch in range(3):
        decoded.clear()
        plan = training_batches(split, 8, seed=0, epoch=epoch, window=reader.window())
        assert sum(len(labels) for _, labels in reader.batches(plan)) == len(split)
        assert set(decoded.values()) <= {1}
        assert CACHE.size_bytes() <= max(shards_kept, 1) * SHARD_BYTES
    assert shards_kept < 2 * SHARDS or not decoded


def test_validation_between_epochs_leaves_the_training_images_in_memory(
    folder: Path, splits: dict[str, Split], decoded: Counter[str]
) -> None:
    keeps_both = 2 * SHARDS * SHARD_BYTES
    train, val = (
        Reader(folder, splits[name], Images(SIZE_PX), cache_bytes=keeps_both)
        for name in ("train", "val")
    )
    for epoch in range(3):
        plan = training_batches(splits["train"], 8, seed=0, epoch=epoch, window=train.window())
        for _ in train.batches(plan):
            pass
        for _ in val.batches(evaluation_batches(splits["val"], 16)):
            pass
    assert set(decoded.values()) == {1}


def test_a_first_batch_waits_for_its_own_images_alone(
    folder: Path, splits: dict[str, Split], decoded: Counter[str]
) -> None:
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    plan = training_batches(splits["train"], 8, seed=0, epoch=0, window=reader.window())
    assert len(np.unique(plan[0][:, 0])) > 2  # of many shards
    reader.read(plan[0])
    assert decoded.total() == 8


def test_coming_batches_are_read_while_one_is_used(
    folder: Path, splits: dict[str, Split], decoded: Counter[str]
) -> None:
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    plan = training_batches(splits["train"], 8, seed=0, epoch=0)
    batches = reader.batches(plan)
    next(batches)
    batches.close()  # what had not begun is left out
    assert 8 <= decoded.total() <= 8 * (1 + BATCHES_AHEAD)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_fault_is_raised_when_its_batch_is_reached(
    folder: Path, splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    plan = training_batches(splits["train"], 8, seed=0, epoch=0)
    read = reader.read

    def fail_third(samples: np.ndarray, *rest: object) -> object:
        if samples is plan[2]:
            raise DataError("the third batch")
        return read(samples, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "read", fail_third)
    batches = reader.batches(plan)
    assert len(next(batches)[1]) == len(next(batches)[1]) == 8
    with pytest.raises(DataError, match="the third batch"):
        next(batches)


def test_as_many_images_are_decoded_at_once_as_the_process_has_cores(
    folder: Path, splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2)

    def meet(squares: np.ndarray, contents: Iterable[tuple[str, bytes]]) -> None:
        both.wait(timeout=60)  # for other images
        decode_images(squares, contents)

    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    expected = reader.read(splits["train"].samples[:8])[0]
    CACHE.clear()
    monkeypatch.setattr(images_module, "decode_images", meet)
    assert torch.equal(reader.read(splits["train"].samples[:8])[0], expected)


def test_several_small_images_are_one_job_of_a_decoder(
    folder: Path,
    splits: dict[str, Split],
    decoded: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(2)
    jobs: list[int] = []
    pool = reader_module._decoders(2)

    def noted(do: Callable[..., None], items: list[object]) -> Iterator[None]:
        jobs.append(len(items))
        return pool.map(do, items)

    monkeypatch.setattr(reader_module, "_decoders", lambda _: SimpleNamespace(map=noted))
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    assert len(reader.read(splits["train"].samples[:40])[0]) == 40
    assert jobs[-1] == 2 * JOBS_PER_DECODER
    assert decoded.total() == len(decoded) == 40


def test_a_shard_that_loads_slowly_holds_up_no_other(
    folder: Path, splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    find, slow, go_on = reader_module.open_shard, threading.Event(), threading.Event()

    def wait_for_first(folder: Path, entry: ShardEntry, *rest: object) -> object:
        if entry.path.endswith("train-000000.tar"):
            slow.set()
            assert go_on.wait(timeout=60)
        return find(folder, entry, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reader_module, "open_shard", wait_for_first)
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    thread = threading.Thread(target=reader.read, args=(np.array([[0, 0]]),))
    thread.start()
    assert slow.wait(timeout=60)
    assert len(reader.read(np.array([[1, 0]]))[0]) == 1
    go_on.set()
    thread.join()


def test_threads_that_need_the_same_shard_open_it_once(
    folder: Path, splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, find = [], reader_module.open_shard
    monkeypatch.setattr(
        reader_module, "open_shard", lambda *given: (opened.append(1), find(*given))[1]
    )
    reader = Reader(folder, splits["train"], Images(SIZE_PX))
    images: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: images.append(reader.read(np.array([[0, 3], [0, 1]]))[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert all(torch.equal(each, images[0]) for each in images)
    assert len(images) == 4
