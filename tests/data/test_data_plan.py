"""Splits and plans against the plain statement of what they promise."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import (
    DataIndex,
    ShardEntry,
    Split,
    deal_shards,
    evaluation_batches,
    shard_batches,
    split_samples,
    splits_of,
    training_batches,
)
from pipeline.data.splits import choose_by_class, class_quotas
from pipeline.errors import DataError
from pipeline.specs import Task

quick = settings(max_examples=60, derandomize=True, deadline=None)


def shard(number: int, labels: list[int]) -> ShardEntry:
    return ShardEntry(
        path=f"{number}.tar",
        samples=len(labels),
        size_bytes=1,
        sha256=f"{number:064x}",
        labels=labels,
    )


def make_index(
    sizes: list[int], classes: int = 3, val: list[int] | None = None, seed: int = 0
) -> DataIndex:
    rng = np.random.default_rng(seed)
    shards = [
        shard(number, rng.integers(0, classes, size).tolist()) for number, size in enumerate(sizes)
    ]
    splits = {"train": shards, "test": [shard(999, [0, 1, 2])]}
    if val is not None:
        splits["val"] = [shard(500, val)]
    return DataIndex(classes=[f"c{label}" for label in range(classes)], splits=splits)


def whole(sizes: list[int]) -> Split:
    return split_samples(make_index(sizes, val=[0, 1, 2]), 0.2, 0)["train"]


def rows(batches: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(int(number), int(position)) for batch in batches for number, position in batch]


def everything(split: Split) -> list[tuple[int, int]]:
    return sorted(rows([split.samples]))


# --- splits ---------------------------------------------------------------------------------------


@quick
@given(
    st.lists(st.integers(2, 60), min_size=2, max_size=6), st.floats(0.05, 0.95), st.integers(0, 5)
)
def test_held_out_samples_are_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(labels)
    index = DataIndex(
        classes=[str(label) for label in range(len(counts))],
        splits={"train": [shard(0, labels[:3].tolist()), shard(1, labels[3:].tolist())]},
    )
    splits = split_samples(index, fraction, seed)
    train, val = splits["train"], splits["val"]
    assert sorted(rows([train.samples, val.samples])) == everything(splits["trainval"])
    for label, count in enumerate(counts):
        held = int((val.labels == label).sum())
        assert 1 <= held <= count - 1
        assert abs(held - fraction * count) <= 1 or held in (1, count - 1)
    for split in (train, val):
        assert [
            split.shards[number].labels[position] for number, position in split.samples
        ] == split.labels.tolist()


def test_held_out_total_and_seeds() -> None:
    index = make_index([700, 300], classes=7)
    first, again, other = (
        split_samples(index, 0.2, 1),
        split_samples(index, 0.2, 1),
        split_samples(index, 0.2, 2),
    )
    assert len(first["val"]) == 200
    assert np.array_equal(first["val"].samples, again["val"].samples)
    assert not np.array_equal(first["val"].samples, other["val"].samples)
    assert first["train"].samples.dtype == np.int32
    assert first["train"].labels.dtype == np.int64


def in_folds(task: Task, folds: int, index: DataIndex, seed: int = 0) -> list[dict[str, Split]]:
    return splits_of(task.model_copy(update={"folds": folds, "seed": seed}), index)


@quick
@given(st.lists(st.integers(4, 40), min_size=2, max_size=5), st.integers(2, 4), st.integers(0, 5))
def test_every_sample_is_validated_in_one_fold(
    tiny_task: Task, counts: list[int], folds: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    index = DataIndex(
        classes=[str(label) for label in range(len(counts))],
        splits={"train": [shard(0, labels[:3].tolist()), shard(1, labels[3:].tolist())]},
    )
    splits = in_folds(tiny_task, folds, index, seed)
    whole = everything(splits[0]["trainval"])
    assert sorted(rows([each["val"].samples for each in splits])) == whole
    for each in splits:
        assert sorted(rows([each["train"].samples, each["val"].samples])) == whole
        held = np.bincount(each["val"].labels, minlength=len(counts))
        assert (np.abs(held - np.array(counts) / folds) < 1).all(), "as many of each class, to one"
        assert abs(len(each["val"]) - sum(counts) / folds) < 1


def test_folds_of_samples_with_several_classes(tiny_task: Task) -> None:
    rng = np.random.default_rng(0)
    labels = [tuple(np.flatnonzero(rng.random(4) < 0.4).tolist()) for _ in range(90)]
    entry = shard(0, [0] * 90).model_copy(update={"labels": labels})
    index = DataIndex(classes=list("abcd"), splits={"train": [entry]})
    splits = in_folds(tiny_task, 3, index)
    assert sorted(rows([each["val"].samples for each in splits])) == everything(
        splits[0]["trainval"]
    )
    for label in range(4):
        held = [sum(label in found for found in each["val"].labels) for each in splits]
        assert max(held) - min(held) <= 3


def test_folds_follow_the_seed(tiny_task: Task) -> None:
    index = make_index([70, 30])
    first, again, other = (in_folds(tiny_task, 3, index, seed)[1]["val"] for seed in (1, 1, 2))
    assert np.array_equal(first.samples, again.samples)
    assert not np.array_equal(first.samples, other.samples)


def test_folds_that_the_data_does_not_allow(tiny_task: Task) -> None:
    index = DataIndex(
        classes=["cat", "dog", "none"], splits={"train": [shard(0, [0] * 9 + [1] * 4)]}
    )
    assert len(in_folds(tiny_task, 4, index)) == 4
    said = "folds: given 5, but 'dog' has 4 training samples: give at most 4"
    with pytest.raises(DataError, match=said):
        in_folds(tiny_task, 5, index)
    with pytest.raises(DataError, match="folds: given 2, but the data has its own validation"):
        in_folds(tiny_task, 2, make_index([9], val=[0, 1]))


def test_a_given_val_split_is_used() -> None:
    splits = split_samples(make_index([5, 4], val=[2, 1]), 0.2, 0)
    assert splits["val"].labels.tolist() == [2, 1]
    assert len(splits["train"]) == 9
    assert len(splits["trainval"]) == 11
    assert len(splits["trainval"].shards) == 3
    assert splits["trainval"].samples[-1].tolist() == [2, 1]
    assert splits["trainval"].labels.tolist() == [*splits["train"].labels.tolist(), 2, 1]


def test_a_class_of_one_sample_cannot_be_split() -> None:
    index = DataIndex(classes=["a", "b"], splits={"train": [shard(0, [0, 0, 0, 1])]})
    with pytest.raises(DataError, match="only one training sample of b"):
        split_samples(index, 0.5, 0)


@quick
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 50))
def test_quotas_share_out_the_total(counts: list[int], total: int) -> None:
    counts_C = np.array(counts)
    total = min(total, int(counts_C.sum()))
    quotas = class_quotas(counts_C, total)
    assert quotas.sum() == total
    assert (quotas <= counts_C).all()
    assert (np.abs(quotas - counts_C * total / max(1, counts_C.sum())) < 1).all()
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = choose_by_class(labels, quotas, np.random.default_rng(1))
    assert np.array_equal(np.bincount(labels[chosen], minlength=len(counts)), quotas)


# --- training -------------------------------------------------------------------------------------


UNEVEN = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@quick
@given(UNEVEN, st.integers(1, 9), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 4)))
def test_training_epochs_are_exact(
    sizes: list[int], batch_size: int, world: int, window: int | None
) -> None:
    split = whole(sizes)
    ranks = [
        training_batches(split, batch_size, 3, 1, rank, world, window) for rank in range(world)
    ]
    assert sorted(rows([batch for batches in ranks for batch in batches])) == everything(split)
    steps = len(training_batches(split, batch_size, 3, 1))
    assert [len(batches) for batches in ranks] == [steps] * world
    lengths = np.array([[len(batch) for batch in batches] for batches in ranks])
    assert lengths.sum(axis=0).max() <= batch_size
    if world > 1:
        assert np.ptp(lengths, axis=1).max() <= 1
        assert np.ptp(lengths.sum(axis=0)) <= 1
    assert all(
        batch.dtype == np.int32 and batch.shape[1] == 2 for batches in ranks for batch in batches
    )


@quick
@given(UNEVEN, st.integers(1, 5), st.integers(0, 3))
def test_a_shard_is_one_ranks_in_every_epoch_and_split(
    sizes: list[int], world: int, epoch: int
) -> None:
    splits = split_samples(make_index([size + 20 for size in sizes]), 0.3, 0)
    readers: dict[int, set[int]] = {number: set() for number in range(len(sizes))}
    for rank in range(world):
        read = [
            batches
            for split in splits.values()
            if split.name != "test"
            for batches in training_batches(split, 4, 0, epoch, rank, world)
        ]
        for number, _ in rows(read + evaluation_batches(splits["val"], 4, rank, world)):
            readers[number].add(rank)
    assert all(len(ranks) <= 1 for ranks in readers.values())


@quick
@given(UNEVEN, st.integers(1, 5))
def test_ranks_have_as_many_samples_as_whole_shards_allow(sizes: list[int], world: int) -> None:
    rank_of_shard = deal_shards(whole(sizes), world)
    counts = np.bincount(rank_of_shard, weights=sizes, minlength=world)
    assert np.ptp(counts) <= max(sizes)
    assert len(set(rank_of_shard.tolist())) == min(world, len(sizes))


def test_one_rank_reads_the_usual_epoch() -> None:
    split = whole([50, 53])
    assert [len(batch) for batch in training_batches(split, 25, 0, 0)] == [25, 25, 25, 25, 3]


def test_epochs_differ_and_repeat() -> None:
    split = whole([40, 40])
    epochs = [rows(training_batches(split, 16, 0, epoch)) for epoch in range(3)]
    assert epochs[0] == rows(training_batches(split, 16, 0, 0))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert rows(training_batches(split, 16, 1, 0)) != epochs[0]
    shards_of_first_batch = {number for number, _ in epochs[0][:16]}
    assert shards_of_first_batch == {0, 1}


def test_a_window_bounds_the_shards_in_use() -> None:
    split = whole([10] * 12)
    orders = []
    for epoch in range(2):
        visited = [number for number, _ in rows(training_batches(split, 10, 0, epoch, window=3))]
        groups = [frozenset(visited[start : start + 30]) for start in range(0, 120, 30)]
        assert all(len(group) == 3 for group in groups)
        orders.append(groups)
    assert orders[0] != orders[1]


def test_plans_do_not_depend_on_the_process() -> None:
    code = (
        "import numpy as np\nfrom pipeline.data import ShardEntry, Split, training_batches,"
        " shard_batches\nsamples = np.stack([np.repeat(np.arange(4), 25), np.tile(np.arange(25),"
        " 4)], 1).astype(np.int32)\nshard = ShardEntry(path='0.tar', samples=25, size_bytes=1,"
        " sha256='0' * 64, labels=[0] * 25)\nsplit = Split('train', (shard,) * 4, samples,"
        " np.zeros(100, np.int64))\nprint([b.tolist() for b in training_batches(split, 8, 7, 3, 1,"
        " 2) + shard_batches(split, 8, 1, 2)])\n"
    )
    samples = np.stack([np.repeat(np.arange(4), 25), np.tile(np.arange(25), 4)], 1).astype(np.int32)
    split = Split("train", (shard(0, [0] * 25),) * 4, samples, np.zeros(100, np.int64))
    np.random.default_rng(1).random(5)
    here = [
        batch.tolist()
        for batch in training_batches(split, 8, 7, 3, 1, 2) + shard_batches(split, 8, 1, 2)
    ]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


# --- sums and evaluation --------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(2, 9), st.integers(1, 5))
def test_shard_batches(sizes: list[int], batch_size: int, world: int) -> None:
    split = whole(sizes)
    alone = shard_batches(split, batch_size, 0, 1)
    ranks = [shard_batches(split, batch_size, rank, world) for rank in range(world)]
    assert sorted(rows(alone)) == everything(split)
    assert sorted(rows([batch])[0] for batches in ranks for batch in batches) == sorted(
        rows([batch])[0] for batch in alone
    )
    assert sorted(map(str, (batch.tolist() for batches in ranks for batch in batches))) == sorted(
        str(batch.tolist()) for batch in alone
    )
    for batch in alone:
        assert len(set(batch[:, 0])) == 1
        assert len(batch) <= batch_size + 1
        assert len(batch) > 1 or sizes[int(batch[0, 0])] == 1


def test_shard_batches_of_a_held_out_split_follow_the_seed() -> None:
    split = split_samples(make_index([40, 30]), 0.25, 0)["train"]
    assert sorted(rows(shard_batches(split, 7))) == everything(split)
    assert rows(shard_batches(split, 7)) == rows(shard_batches(split, 7))
    assert rows(shard_batches(split, 7)) != rows(shard_batches(split, 7, seed=1))


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_reads_each_sample_once(sizes: list[int], batch_size: int, world: int) -> None:
    split = whole(sizes)
    ranks = [evaluation_batches(split, batch_size, rank, world) for rank in range(world)]
    assert sorted(rows([batch for batches in ranks for batch in batches])) == everything(split)
    assert rows(evaluation_batches(split, batch_size)) == rows([split.samples])


def test_a_hundred_shards_of_a_thousand_are_planned_quickly() -> None:
    index = make_index([1000] * 100, classes=100)
    started = time.perf_counter()
    splits = split_samples(index, 0.2, 0)
    for epoch in range(3):
        training_batches(splits["train"], 32, 0, epoch, 1, 4, window=8)
    shard_batches(splits["train"], 32)
    evaluation_batches(splits["val"], 64)
    assert time.perf_counter() - started < 5
