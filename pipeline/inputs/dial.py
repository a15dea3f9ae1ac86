"""The default search space, derived from the sizes of packs before anything is trained.

It covers the sizes from the head alone up to the budget. Each set of parts is a ladder of recipes,
from narrow to wide, at 1 bit. Where a head of the whole feature would take most of the budget, the
parts stand beside one of a fixed subspace, and the head alone is tried in both. The budget, halved
again and again, gives the rungs; each set has at most one recipe per rung, the largest that fits.
First come the smallest pack there is, then bottlenecks and LoRA, the best per byte where we
measured it (docs/results.md), at the largest rung and between, so that even a few trials cover the
range; then the other sets in turn, from their middle rungs outwards. FacT and DTL are left out: at
equal bytes, FacT is within the noise of LoRA, and DTL of bottlenecks
(benchmarks/results/sizes.md).

Where the backbone gives maps, the head is a small decoder of several maps, except in the smallest
pack: it is worth more than other parts (benchmarks/results/segmentation.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Recipe, SearchSpace, Task
from pipeline.specs.recipe import ADAPTERS, DEFAULT_HEAD, PARTS
from pipeline.specs.search_space import HEAD_ALONE, joined, names_in

PART_SETS = (
    ("adapter",),
    ("lora",),
    ("adapter", "norms", "biases"),
    ("connections", "adapter", "norms", "biases"),
    ("smoa", "norms", "biases"),
    ("connections", "smoa", "norms", "biases"),
    ("norms", "biases"),
    ("connections", "norms", "biases"),
    ("smoa",),
    ("connections",),
    (),
)
"""What is trained beside the head, the most promising first."""
_LEADING = 2
"""This many sets are tried at every rung before any other."""
STEPS = 12
_LORA_SCALE, _LORA_SCALE_WIDTH = 4.0, 192
"""On a backbone of this width, where a scale of 4 is 10 points better than one of 2 on the
orientation of bars, and within its noise on counting. On the ViT-S of width 384, at rank 8, one of
2 is better than 4 by 5 points on trashnet (four epochs, two seeds); other ranks differ within their
noise (benchmarks/results/learning_rate.md). Wider backbones, where nothing is measured, take the
same as the ViT-S.
"""
_LEAST_LORA_SCALE = 2.0
_HEAD_SHARE = 0.25
"""The head has 2 bits where it then takes no more of the pack than this, else 1."""
_HEAD_BITS = (1, 2, 4, 8)
_HEAD_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_OF_BUDGET = 0.4
"""Where the head of the whole feature would take more of the budget at 1 bit, other parts are
tried beside one of a subspace.
"""
_FUSED_WIDTH, _FUSED_BITS, _FUSED_RANK = 16, 2, 128
"""The decoder of several maps, and the subspace of these where it would else take more than
`_HEAD_SHARE` of the budget."""

Point = dict[str, Any]


def derived_space(
    task: Task, backbone: LoadedBackbone, classes: Sequence[str], offered: Collection[str]
) -> SearchSpace:
    """The configurations for a task that names none, the most promising first; where nothing fits
    the budget, the smallest pack there is, so that an error can name its size.

    Args:
        offered: the parts that may be left out; those of the task's recipe beside them are in every
            configuration.
    """
    ladders = _Ladders(task, backbone, classes, offered)
    chosen = ladders.in_order() or [ladders.least()]
    return SearchSpace(configurations=tuple(chosen), trials=task.search.trials)


class _Ladders:
    """The recipes of each set of parts, by rung. Arguments as for `derived_space`."""

    def __init__(
        self,
        task: Task,
        backbone: LoadedBackbone,
        classes: Sequence[str],
        offered: Collection[str],
    ) -> None:
        self._task, self._offered = task, offered
        self._named = [part for part in PARTS if getattr(task.recipe, part) and part not in offered]
        self._planner = SizePlanner(task, backbone, classes)
        self._budget, self._width = task.budget.max_bytes, backbone.width
        self._lora_scale = _lora_scale(backbone.width)
        has_several_maps = backbone.gives_maps and not backbone.has_decoder
        self._fuses = has_several_maps and not task.recipe.from_block
        self._is_head_named = task.recipe.head != DEFAULT_HEAD
        self._narrow_heads = self._heads_in_subspaces()
        fitting = [head for head in self._narrow_heads if not self._takes_most(head)]
        self._narrow: Point = next(iter([*reversed(fitting), *self._narrow_heads]), {})

    def in_order(self) -> list[Point]:
        """The configurations within the budget, each once."""
        by_set = [rungs for parts in self._sets() if (rungs := self._rungs(parts))]
        if not by_set:
            return []
        leading, others = by_set[:_LEADING], by_set[_LEADING:]
        order = _spread(sorted({rung for rungs in leading for rung in rungs}))
        smallest = self.smallest()
        points = [smallest] if self._size_bytes(smallest) <= self._budget else []
        points += [rungs[rung] for rung in order for rungs in leading if rung in rungs]
        outwards = [_middle_out(rungs) for rungs in others]
        for turn in range(max(map(len, outwards), default=0)):
            points += [rungs[turn] for rungs in outwards if turn < len(rungs)]
        return [point for number, point in enumerate(points) if point not in points[:number]]

    def smallest(self) -> Point:
        """The head that other parts stand beside and the parts that the user named, at 1 bit."""
        head = {} if self._is_head_named else self._narrow or {"head_bits": 1}
        return {**self._body(joined(self._named), 0), **head}

    def least(self) -> Point:
        """The smallest pack of all, whose head is the narrowest and has no bias."""
        if self._is_head_named:
            return self.smallest()
        narrowest = self._narrow_heads[0] if self._narrow_heads else {}
        return {**self.smallest(), **narrowest, "head_bias": False}

    def _heads_in_subspaces(self) -> list[Point]:
        """Heads narrower than the feature, where one of all of it would take most of the budget at
        1 bit.
        """
        if self._is_head_named or not self._takes_most({"head_bits": 1}):
            return []
        return [{"head_bits": 1, "head_rank": rank} for rank in _HEAD_RANKS if rank < self._width]

    def _takes_most(self, head: Point) -> bool:
        ledger = self._planner.ledger(self._recipe({"parts": HEAD_ALONE, **head}))
        return ledger["head"] > _MOST_OF_BUDGET * self._budget

    def _sets(self) -> list[str]:
        """The sets of parts that the backbone has a place for, as values of `parts`. The head alone
        is the last one, also where other sets have no place.
        """
        sets = (
            joined([*(part for part in parts if part in self._offered), *self._named])
            for parts in PART_SETS
            if not parts or {*parts} & {*self._offered}
        )
        return list(dict.fromkeys(sets))

    def _rungs(self, parts: str) -> dict[int, Point]:
        """The largest recipe of a set at each rung, by the number of doublings up to the budget:
        rung -k holds sizes of at most budget / 2^k, and more than half of it.
        """
        found: dict[int, Point] = {}
        for size_bytes, point in self._ladder(parts):
            if size_bytes > self._budget:
                break
            rung = (size_bytes - 1).bit_length() - (self._budget - 1).bit_length()
            found[rung] = point
        return found

    def _ladder(self, parts: str) -> Iterator[tuple[int, Point]]:
        """The recipes of a set, from small to large."""
        previous: Point | None = None
        for step in range(STEPS):
            try:
                point = self._point(parts, step)
                if point == previous:
                    continue
                size_bytes = self._size_bytes(point)
            except ValidationError:  # the set contradicts a part that the user named
                return
            yield size_bytes, point
            previous = point

    def _point(self, parts: str, step: int) -> Point:
        """The configuration of a set at one step of its ladder."""
        body = self._body(parts, step)
        return {**body, **self._head(body, step)}

    def _body(self, parts: str, step: int) -> Point:
        """The settings of the parts beside the head; those that the user named stay as they are."""
        names = {*names_in(parts)} & {*self._offered}
        point: Point = {"parts": parts}
        if "connections" in names:
            point["top_k"] = 1 if step < 4 else 3
        if "adapter" in names or "lora" in names:
            point["width"] = 2**step
        if "lora" in names:
            point["scale"] = self._lora_scale
        if "smoa" in names:
            point |= {"experts": 4, "width": 4 * 2 ** min(step, 4)}
        if any(part in self._named for part in ADAPTERS):  # `width` would be theirs, too
            point.pop("width", None)
            point.pop("scale", None)
        if step > 0 and names and names <= {"biases", "norms"}:
            axes = (("biases", "bias_bits"), ("norms", "norm_bits"))
            point |= {axis: 2 for part, axis in axes if part in names}
        return point

    def _head(self, body: Point, step: int) -> Point:
        """The head beside a body, wider from step to step where it is alone. One that the user
        named stays as it is.
        """
        if self._is_head_named:
            return {}
        if self._fuses:
            return self._fused_head(body["parts"], step)
        if body["parts"] == HEAD_ALONE:
            heads = [*self._narrow_heads, *({"head_bits": bits} for bits in _HEAD_BITS)]
            return heads[min(step, len(heads) - 1)]
        return self._narrow or {"head_bits": self._head_bits(body)}

    def _fused_head(self, parts: str, step: int) -> Point:
        """A decoder of several maps: alone, wider from step to step."""
        if parts == HEAD_ALONE:
            return {"head_bits": _FUSED_BITS, "head_fuse": 2**step}
        head = {"head_bits": _FUSED_BITS, "head_fuse": _FUSED_WIDTH}
        ledger = self._planner.ledger(self._recipe({"parts": HEAD_ALONE, **head}))
        is_small = ledger["head"] <= _HEAD_SHARE * self._budget
        return head if is_small else {**head, "head_rank": _FUSED_RANK}

    def _head_bits(self, point: Point) -> int:
        ledger = self._planner.ledger(self._recipe({**point, "head_bits": 2}))
        return 2 if ledger["head"] <= _HEAD_SHARE * sum(ledger.values()) else 1

    def _size_bytes(self, point: Point) -> int:
        """Upper bound of its pack's size, over all selections."""
        return self._planner.largest_bytes(self._recipe(point))

    def _recipe(self, point: Point) -> Recipe:
        return SearchSpace().recipe(self._task.recipe, point)


def _lora_scale(width: int) -> float:
    """For a backbone of this width, to one decimal."""
    scale = _LORA_SCALE * min(1.0, _LORA_SCALE_WIDTH / width)
    return round(max(_LEAST_LORA_SCALE, scale), 1)


def _spread(rungs: Sequence[int]) -> list[int]:
    """Ascending rungs in an order whose first few always cover the range: the largest, then the
    middle of the widest gap, again and again. The smallest pack of all lies below the first.
    """
    taken = [-1, *([len(rungs) - 1] if rungs else [])]
    while len(taken) <= len(rungs):
        gaps = itertools.pairwise(sorted(taken))
        low, high = max(gaps, key=lambda gap: (gap[1] - gap[0], gap))
        taken.append((low + high + 1) // 2)
    return [rungs[number] for number in taken[1:]]


def _middle_out(rungs: dict[int, Point]) -> list[Point]:
    """The points from the middle rung outwards, the smaller one first."""
    points = list(rungs.values())
    middle = (len(points) - 1) // 2
    order = sorted(range(len(points)), key=lambda number: (abs(number - middle), number))
    return [points[number] for number in order]
