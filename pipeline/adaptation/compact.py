"""Numbers in few bytes, without rounding: where few of them are distinct, as those of a tensor of
few bits are, each is a code into a list of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

_CODE_TYPES = (torch.uint8, torch.int16)


@dataclass(frozen=True, eq=False)
class Compact:
    """Float32 numbers: `codes_N` into the distinct ones, or themselves where there are none."""

    codes_N: torch.Tensor
    distinct_M: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes_N)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes_N.device

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.codes_N.nbytes + (0 if self.distinct_M is None else self.distinct_M.nbytes)

    def to(self, device: str | torch.device) -> Compact:
        """The same on a device."""
        distinct_M = None if self.distinct_M is None else self.distinct_M.to(device)
        return Compact(self.codes_N.to(device), distinct_M)


def compacted(values_N: torch.Tensor) -> Compact:
    """Float32 numbers, bit for bit, in the form that takes fewest bytes."""
    bits_M, codes_N = values_N.view(torch.int32).unique(return_inverse=True)
    distinct_M = bits_M.view(torch.float32)
    fitting = (each for each in _CODE_TYPES if len(distinct_M) - 1 <= torch.iinfo(each).max)
    coded = [Compact(codes_N.to(each), distinct_M) for each in fitting]
    return min([Compact(values_N), *coded], key=lambda each: each.nbytes)


def expanded(compacts: Sequence[Compact]) -> torch.Tensor:
    """The numbers of several, one after the other."""
    lists = [each.distinct_M for each in compacts if each.distinct_M is not None]
    if len(lists) < len(compacts):
        return torch.cat([_alone(each) for each in compacts])
    codes_N = torch.cat([each.codes_N for each in compacts]).int()
    starts = list(accumulate((len(each) for each in lists[:-1]), initial=0))
    starts_P = torch.tensor(starts, dtype=torch.int32, device=codes_N.device)
    lengths = [len(each) for each in compacts]
    if len(set(lengths)) == 1:  # repeating takes ten times as long as adding to rows
        codes_N.view(len(compacts), -1).add_(starts_P[:, None])
    else:
        lengths_P = torch.tensor(lengths, device=codes_N.device)
        codes_N += starts_P.repeat_interleave(lengths_P, output_size=len(codes_N))
    return torch.cat(lists).index_select(0, codes_N)


def _alone(compact: Compact) -> torch.Tensor:
    if compact.distinct_M is None:
        return compact.codes_N
    return compact.distinct_M.index_select(0, compact.codes_N.int())
