"""The processes that train one model together, and their communication.

Every rank holds the whole model and reads its own shards. Trained values are a few kilobytes, so a
step takes one sum over all ranks: of gradients, loss and samples in one tensor, after which each
takes the same step. They meet over gloo, on the CPU, in the process group that torch has as its
default; a process alone needs none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline.backbones import fingerprint
from pipeline.errors import ClusterError

Rows = TypeVar("Rows")


class RanksLost(Exception):
    """Another rank has died or no longer answers. All ranks may be restarted."""


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Context manager: raise RanksLost if a rank does not take part in a collective operation, for
    which gloo raises RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise RanksLost(
            f"a rank does not answer: {(str(error).strip().splitlines() or [''])[-1][:200]}"
        ) from error


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`, counted from 0. Each method is called by all ranks, in the same
    order, and may raise RanksLost.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """This rank's own seed; that of the first is `seed` itself."""
        return (
            seed
            if self.is_first
            else int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0] >> 1)
        )

    @torch.no_grad()
    def mean_gradients(
        self, parameters: Sequence[torch.Tensor], loss: torch.Tensor, samples: int
    ) -> torch.Tensor:
        """Replace each parameter's gradient, this rank's mean over its `samples`, by the mean over
        the samples of all ranks.

        Returns:
            The same mean of `loss` [].
        """
        if self.world == 1:
            return loss
        gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in parameters
        ]
        means_N = torch.cat(
            [
                *(gradient.reshape(-1).float() for gradient in gradients),
                loss.detach().float().reshape(1),
            ]
        )
        sums_N = torch.cat([means_N.cpu() * samples, torch.tensor([samples], dtype=torch.float32)])
        with answered():
            dist.all_reduce(sums_N)
        means_N = (sums_N[:-1] / sums_N[-1]).to(means_N.device)
        for parameter, mean in zip(
            parameters, means_N[:-1].split([each.numel() for each in parameters]), strict=True
        ):
            parameter.grad = mean.view_as(parameter)
        return means_N[-1]

    def total(self, count: int) -> int:
        """The sum over ranks."""
        return int(self.gathered(torch.tensor(count)).sum())

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor of one shape and type, [world, ...], on the CPU."""
        here = tensor.detach().cpu().contiguous()
        if self.world == 1:
            return here[None]
        everyones = [torch.empty_like(here) for _ in range(self.world)]
        with answered():
            dist.all_gather(everyones, here)
        return torch.stack(everyones)

    def rows(self, rows: list[Rows]) -> list[Rows]:
        """Every rank's list, one after the other in order of rank; they may differ in length."""
        if self.world == 1:
            return rows
        everyones: list[list[Rows]] = [[] for _ in range(self.world)]
        with answered():
            dist.all_gather_object(everyones, rows)
        return [each for rank_rows in everyones for each in rank_rows]

    def from_first(self, content: bytes) -> bytes:
        """The first rank's `content`, so that all ranks act on one reading of a file."""
        if self.world == 1:
            return content
        length = int(self.gathered(torch.tensor(len(content)))[0])
        if not length:
            return b""
        received = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.is_first
            else torch.empty(length, dtype=torch.uint8)
        )
        with answered():
            dist.broadcast(received, src=0)
        return received.numpy().tobytes()

    def check_agree(self, values: Mapping[str, torch.Tensor]) -> None:
        """Raise ClusterError where a rank's values differ from the others'."""
        if self.world == 1:
            return
        digests = self.gathered(
            torch.frombuffer(bytearray.fromhex(fingerprint(values)), dtype=torch.uint8)
        )
        if (digests != digests[0]).any():
            raise ClusterError(
                f"the {self.world} ranks of a trial or fit trained different values: their machines"
                " compute differently; use nodes of one kind, or one rank a trial"
            )


ALONE = Ranks()
