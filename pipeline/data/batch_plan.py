"""Batch plans: which rank reads which sample when, as rows of (shard, position), computed from the
index alone.

Every plan is a pure function of its arguments, independent of process and machine, so a run that is
resumed, or moved to another number of workers, knows what its other ranks do. Nothing is dropped
and nothing is read twice.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.splits import Split

Batches = list[np.ndarray]  # each int32 [B, 2]


def deal_shards(split: Split, world: int) -> np.ndarray:
    """Which rank of `world` reads each shard, int64 [shards].

    The largest shard is assigned first, to the rank with the fewest samples so far. Whole shards
    are counted, not the part in the split, so that the training and validation samples of a shard
    go to one rank, which opens it for both.
    """
    rank_of_shard, samples_of_rank = (
        np.zeros(len(split.shards), np.int64),
        np.zeros(world, np.int64),
    )
    for number, shard in sorted(enumerate(split.shards), key=lambda each: -each[1].samples):
        rank_of_shard[number] = rank = samples_of_rank.argmin()
        samples_of_rank[rank] += shard.samples
    return rank_of_shard


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    window: int | None = None,
) -> Batches:
    """One rank's part of every batch of one epoch: every sample once over all ranks, in as many
    steps as one rank alone would take.

    With one rank this is the usual epoch whose last batch may be smaller. Several ranks spread the
    samples of their shards evenly over the steps: a rank's parts differ by at most one sample, and
    so do whole batches. A rank with fewer samples than there are steps has empty parts. `window`:
    mix samples within this many shards at a time, in an order of shards that changes per epoch, so
    that no more need to be in memory.
    """
    rank_of_shard = deal_shards(split, world)
    rank_of_sample = rank_of_shard[split.samples[:, 0]]
    order = _epoch_order(
        split,
        np.flatnonzero(rank_of_sample == rank),
        rank_of_shard == rank,
        np.random.default_rng([seed, epoch, rank]),
        window,
    )
    steps = -(-len(split) // batch_size)
    if world == 1:
        return np.split(split.samples[order], np.arange(1, steps) * batch_size)
    # A rank's larger parts begin at the step where those of the rank before it ended: otherwise all
    # would meet in the first steps.
    first = (np.bincount(rank_of_sample, minlength=world)[:rank] % steps).sum()
    sizes = np.full(steps, len(order) // steps)
    sizes[(first + np.arange(len(order) % steps)) % steps] += 1
    return np.split(split.samples[order], np.cumsum(sizes)[:-1])


def _epoch_order(
    split: Split,
    rows: np.ndarray,
    is_read_M: np.ndarray,
    rng: np.random.Generator,
    window: int | None,
) -> np.ndarray:
    """The `rows` of the split in the given shards, in the order of one epoch."""
    shuffled = rows[rng.permutation(len(rows))]
    if window is None:
        return shuffled
    place_of_shard = np.zeros(len(is_read_M), np.int64)
    place_of_shard[is_read_M] = rng.permutation(is_read_M.sum())
    windows = place_of_shard[split.samples[shuffled, 0]] // window
    return shuffled[np.argsort(windows, kind="stable")]


def shard_batches(
    split: Split, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0
) -> Batches:
    """Batches that never cross shards, for sums over a dataset: the same set of batches for every
    `world`.

    Samples of a shard are shuffled once, by `seed` and the shard's number. A single remaining
    sample joins the previous batch, which then has `batch_size + 1`, because a contrastive loss
    needs at least two.
    """
    by_shard = np.argsort(split.samples[:, 0], kind="stable")
    numbers, starts = np.unique(split.samples[by_shard, 0], return_index=True)
    batches: Batches = []
    for number, rows in zip(numbers, np.split(by_shard, starts[1:]), strict=True):
        rows = np.random.default_rng([seed, int(number)]).permutation(rows)
        cuts = np.arange(batch_size, len(rows), batch_size)
        if len(cuts) and len(rows) - cuts[-1] == 1:
            cuts = cuts[:-1]
        batches += [split.samples[batch] for batch in np.split(rows, cuts)]
    return batches[rank::world]


def evaluation_batches(split: Split, batch_size: int, rank: int = 0, world: int = 1) -> Batches:
    """Every sample exactly once over all ranks, from each rank's own shards, in stored order. A
    rank may have none.
    """
    samples = split.samples[deal_shards(split, world)[split.samples[:, 0]] == rank]
    return (
        np.split(samples, np.arange(batch_size, len(samples), batch_size)) if len(samples) else []
    )
