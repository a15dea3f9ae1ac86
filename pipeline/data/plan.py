"""Who reads which sample when: batches as rows of (shard, position), computed from the index alone.

Every plan is a pure function of its arguments: it depends neither on the process nor on the machine, so a run that is resumed, or moved to another
number of workers, knows what its other ranks do. Nothing is dropped and nothing is read twice.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.splits import Split
from pipeline.errors import DataError

Batches = list[np.ndarray]  # each int32 [B, 2]


def training_batches(split: Split, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, window: int | None = None) -> Batches:
    """One rank's batches of one epoch: every sample once over all ranks, as many batches on each rank.

    Step by step, rank r takes the r-th run of `batch_size` samples. The last step deals what remains as evenly as can be: its batches differ by one
    sample at most. Where fewer than `world` samples remain, they join the step before, some of whose batches then have `batch_size + 1`, so that no
    rank is left without. With one rank this is the usual epoch whose last batch may be smaller. `window`: mix samples within that many shards at a
    time, in an order of shards that changes with the epoch, so that no more need be in memory. Raises DataError where samples are fewer than ranks.
    """
    if len(split) < world:
        raise DataError(f"{split.name} has {len(split)} samples, fewer than the {world} workers; use fewer workers")
    order = _epoch_order(split, np.random.default_rng([seed, epoch]), window)
    per_step = batch_size * world
    full_steps = (len(order) - 1) // per_step
    if len(order) - full_steps * per_step < world:
        full_steps -= 1
    full = order[: full_steps * per_step].reshape(full_steps * world, batch_size)
    tail = np.array_split(order[full_steps * per_step :], world)
    return [split.samples[batch] for batch in [*full, *tail][rank::world]]


def _epoch_order(split: Split, rng: np.random.Generator, window: int | None) -> np.ndarray:
    """The rows of the split in the order of one epoch, int64 [N]."""
    shuffled = rng.permutation(len(split))
    if window is None:
        return shuffled
    place_of_shard = rng.permutation(len(split.shards))
    windows = place_of_shard[split.samples[shuffled, 0]] // window
    return shuffled[np.argsort(windows, kind="stable")]


def shard_batches(split: Split, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> Batches:
    """Batches that never cross shards, for sums over a dataset: over all ranks the same set of batches, whatever `world` is.

    Samples of a shard are shuffled once, by `seed` and the shard's number. A single sample left over joins the batch before it, which then has
    `batch_size + 1`: a contrastive loss needs company.
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
    """Every sample exactly once over all ranks, in stored order. Ranks may have one batch more or less than others."""
    cuts = np.arange(batch_size, len(split), batch_size)
    return np.split(split.samples, cuts)[rank::world] if len(split) else []
