"""The search space: the values to try for each setting of a recipe."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.specs.parts import Connections, Smoa
from pipeline.specs.recipe import ADAPTERS, PARTS, Recipe, part_of_one_bit
from pipeline.specs.section import Bits, Spec, first_fault

HEAD_ALONE = "head"
"""The value of the axis `parts` for no part at all."""


def names_in(parts: str) -> tuple[str, ...]:
    """The parts of a value of the axis `parts`."""
    return () if parts == HEAD_ALONE else tuple(parts.split("+"))


def joined(names: Iterable[str]) -> str:
    """The value of the axis `parts` for these parts."""
    return "+".join(name for name in PARTS if name in set(names)) or HEAD_ALONE


def _as_parts(value: str) -> str:
    names = [name.strip() for name in value.split("+")]
    unknown = [name for name in names if name not in (*PARTS, HEAD_ALONE)]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no part; expected `head` for the head alone, or parts joined by"
            f" `+`: {', '.join(PARTS)}"
        )
    return joined(names)


def _as_tuple(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError(
            "expected at least one value to try; leave the key out to keep the recipe's value"
        )
    if isinstance(value, (list, tuple)) and any(value.count(item) > 1 for item in value):
        raise ValueError("a value is given twice; give each value once")
    return value if value is None or isinstance(value, (list, tuple)) else (value,)


def _axis(kind: Any) -> Any:
    return Annotated[tuple[kind, ...] | None, BeforeValidator(_as_tuple)]


Positive = Annotated[float, Field(gt=0)]


class SearchSpace(Spec):
    """The values to try for each part of the recipe; an axis left out keeps the recipe's value.

    `parts` are the parts to train, such as `head`, `adapter` or `adapter+norms+biases`; a part that
    the recipe lacks is taken at 1 bit. `bits` sets connections and adapters together unless
    `connection_bits` or `adapter_bits` names them apart. Adapters are `smoa`, `adapter`, `lora`,
    `fact` and `dtl`; the rank of the last three counts as `width`. `experts: 0` leaves the SMoA
    bank out, `top_k: 0` the connections.

    Instead of axes, `configurations` lists the points themselves, the most promising first.
    """

    parts: _axis(Annotated[str, AfterValidator(_as_parts)]) = None  # type: ignore[valid-type]
    bits: _axis(Bits) = None  # type: ignore[valid-type]
    connection_bits: _axis(Bits) = None  # type: ignore[valid-type]
    adapter_bits: _axis(Bits) = None  # type: ignore[valid-type]
    bias_bits: _axis(Bits) = None  # type: ignore[valid-type]
    norm_bits: _axis(Bits) = None  # type: ignore[valid-type]
    head_bits: _axis(Bits) = None  # type: ignore[valid-type]
    head_rank: _axis(Annotated[int, Field(ge=1)]) = None  # type: ignore[valid-type]
    head_bias: _axis(bool) = None  # type: ignore[valid-type]
    head_fuse: _axis(Annotated[int, Field(ge=1, le=1024)]) = None  # type: ignore[valid-type]
    experts: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    top_k: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    width: _axis(Annotated[int, Field(ge=1, le=1024)]) = None  # type: ignore[valid-type]
    scale: _axis(Positive) = None  # type: ignore[valid-type]
    from_block: _axis(Annotated[int, Field(ge=0)]) = None  # type: ignore[valid-type]
    learning_rate: _axis(Positive) = None  # type: ignore[valid-type]
    configurations: tuple[dict[str, Any], ...] | None = Field(
        None, description="points to try, each with a value for some axes"
    )
    trials: int = Field(
        16,
        ge=1,
        description=(
            "number of configurations to run; a space no larger than this is enumerated, a larger"
            " one sampled"
        ),
    )

    @field_validator("configurations")
    @classmethod
    def _are_points(cls, given: Any) -> Any:
        """Each is a space of one point."""
        if given is None:
            return None
        if not given:
            raise ValueError("expected at least one configuration; leave the key out for axes")
        points = []
        for number, point in enumerate(given, start=1):
            if unknown := point.keys() - set(AXES):
                raise ValueError(f"configuration {number}: {min(unknown)!r} is no axis")
            try:
                (values,) = cls(**point).points()
            except ValidationError as error:
                raise ValueError(f"configuration {number}: {first_fault(error)}") from None
            except (TypeError, ValueError):
                raise ValueError(f"configuration {number}: expected one value per axis") from None
            points.append(values)
        return tuple(points)

    @model_validator(mode="after")
    def _is_of_one_form(self) -> SearchSpace:
        if self.configurations is not None and self.axes():
            raise ValueError(
                f"configurations and {', '.join(self.axes())} are given; give points, or the axes"
                " of a space"
            )
        return self

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The axes that are searched, in a fixed order; none of a list of configurations."""
        return {name: getattr(self, name) for name in AXES if getattr(self, name) is not None}

    @property
    def is_empty(self) -> bool:
        """Whether neither axes nor configurations are given: the recipe is the only point."""
        return not self.axes() and self.configurations is None

    def size(self) -> int:
        """Number of points in the space."""
        if self.configurations is not None:
            return min(self.trials, len(self.configurations))
        count = 1
        for values in self.axes().values():
            count *= len(values)
        return count

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, in a fixed order; of configurations, the first `trials`."""
        if self.configurations is not None:
            yield from self.configurations[: self.trials]
            return
        axes = self.axes()
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def recipe(self, base: Recipe, point: dict[str, Any]) -> Recipe:
        """The recipe at one point: `base` with the point's values written in.

        Raises:
            ValidationError: There is none; `fault` tells why.
        """
        parts: dict[str, Any] = self._parts(base, point)
        if "from_block" in point:
            parts["from_block"] = point["from_block"]
        connection_bits = point.get("connection_bits", point.get("bits"))
        adapter_bits = point.get("adapter_bits", point.get("bits"))
        changes: dict[str, dict[str, Any]] = {
            "connections": {"bits": connection_bits},
            **{
                name: {
                    "bits": adapter_bits,
                    "width": point.get("width"),
                    "scale": point.get("scale"),
                }
                for name in ADAPTERS
            },
            **{
                name: {
                    "bits": adapter_bits,
                    "rank": point.get("width"),
                    "scale": point.get("scale"),
                }
                for name in ("lora", "fact", "dtl")
            },
            "biases": {"bits": point.get("bias_bits")},
            "norms": {"bits": point.get("norm_bits")},
            "head": {
                "bits": point.get("head_bits"),
                "rank": point.get("head_rank"),
                "bias": point.get("head_bias"),
                "fuse": point.get("head_fuse"),
            },
            "training": {"learning_rate": point.get("learning_rate")},
        }
        for name, part in parts.items():
            given = {
                key: value for key, value in changes.get(name, {}).items() if value is not None
            }
            parts[name] = part.changed(**given) if part is not None and given else part
        return base.changed(**parts)

    def _parts(self, base: Recipe, point: Mapping[str, Any]) -> dict[str, Spec | None]:
        """The sections of the recipe at one point, before its other values are written in."""
        parts: dict[str, Spec | None] = {name: getattr(base, name) for name in Recipe.model_fields}
        wanted = names_in(point["parts"]) if "parts" in point else None
        if wanted is not None:
            for name in PARTS:
                parts[name] = (parts[name] or part_of_one_bit(name)) if name in wanted else None
        for name, axis, default in (
            ("connections", "top_k", Connections()),
            ("smoa", "experts", Smoa()),
        ):
            if axis in point and (wanted is None or name in wanted):
                count = point[axis]
                parts[name] = (parts[name] or default).changed(**{axis: count}) if count else None
        return parts

    def fullest(self, base: Recipe) -> list[Recipe]:
        """Recipes that have, together, every part of any recipe of the space: one for each set of
        parts that no other holds, at the fewest bits.
        """
        points = list(self.points()) if self.configurations is not None else self._smallest_points()
        found: dict[frozenset[str], Recipe] = {}
        for point in points:
            recipe = self.recipe(base, point)
            names = frozenset(name for name in PARTS if getattr(recipe, name) is not None)
            found.setdefault(names, recipe)
        return [recipe for names, recipe in found.items() if not any(names < n for n in found)]

    def _smallest_points(self) -> list[dict[str, Any]]:
        """A point for each value of `parts`, with all the parts it can have, at the fewest bits."""
        point = {
            axis: max(values) if axis in ("experts", "top_k") else min(values)
            for axis, values in self.axes().items()
        }
        return [{**point, "parts": parts} for parts in self.parts] if self.parts else [point]

    def max_top_k(self, base: Recipe) -> int:
        """The largest K of any trial: one selection of this K serves the whole study. 0 if no trial
        trains connections.
        """
        if self.configurations is not None:
            recipes = [self.recipe(base, point) for point in self.points()]
            return max(each.connections.top_k if each.connections else 0 for each in recipes)
        if not self._may_have("connections", base):
            return 0
        if self.top_k is not None:
            return int(max(self.top_k))
        return (base.connections or Connections()).top_k

    def _may_have(self, part: str, base: Recipe) -> bool:
        """Whether a recipe of the space can have this part."""
        counts = {"connections": self.top_k, "smoa": self.experts}.get(part)
        if counts is not None and not any(counts):
            return False
        if self.parts is not None:
            return any(part in names_in(parts) for parts in self.parts)
        return counts is not None or getattr(base, part) is not None

    def idle_axes(self, base: Recipe) -> list[str]:
        """Axes that change nothing because no recipe of the space has the part they belong to."""
        has_adapter = any(self._may_have(name, base) for name in ADAPTERS)
        has_connections = self._may_have("connections", base)
        needed = {
            "top_k": self.parts is None or has_connections,
            "experts": self.parts is None or self._may_have("smoa", base),
            "bias_bits": self._may_have("biases", base),
            "norm_bits": self._may_have("norms", base),
            "bits": (
                (has_connections and self.connection_bits is None)
                or (has_adapter and self.adapter_bits is None)
            ),
            "connection_bits": has_connections,
            "adapter_bits": has_adapter,
            "width": has_adapter,
            "scale": has_adapter,
        }
        return [name for name in self.axes() if not needed.get(name, True)]

    def fault(self, base: Recipe) -> str | None:
        """Return a message if this space cannot be searched with the recipe `base`, else None."""
        if idle := self.idle_axes(base):
            return (
                f"{', '.join(idle)} would change nothing: no recipe of this space has that part;"
                " leave it out, or add the part to `recipe`"
            )
        for point in self._deciding_points():
            try:
                self.recipe(base, point)
            except ValidationError as error:
                return (
                    f"at {', '.join(f'{axis} {value}' for axis, value in point.items())}:"
                    f" {first_fault(error)}"
                )
        return None

    def _deciding_points(self) -> Iterator[dict[str, Any]]:
        """One point for each combination of values that the checks of a recipe distinguish: few,
        even if the space has millions of points.
        """
        if self.configurations is not None:
            yield from self.configurations
            return
        axes: dict[str, dict[Any, Any]] = {}
        for axis, values in self.axes().items():
            axes[axis] = {
                _kind(axis, value): value for value in reversed(values)
            }  # of each kind, the first
        for values in itertools.product(*(kinds.values() for kinds in axes.values())):
            yield dict(zip(axes, values, strict=True))


def _kind(axis: str, value: Any) -> Any:
    """What the checks of a recipe depend on in an axis's value: whether it is rounded, or whether
    the part is there.
    """
    if axis == "parts":
        return value
    if axis.endswith("bits"):
        return value < 16
    return value if axis == "experts" else value > 0


AXES = tuple(name for name in SearchSpace.model_fields if name not in ("configurations", "trials"))
"""The axes of a search space."""


def default_space(recipe: Recipe) -> SearchSpace:
    """The default search space of a recipe whose parts are named: bits, experts and K of these. Of
    a preset's, it is empty, and derived once backbone and classes are known.
    """
    if recipe.preset:
        return SearchSpace()
    axes: dict[str, Any] = {}
    if any(getattr(recipe, name) is not None for name in ("connections", *ADAPTERS)):
        axes["bits"] = (1, 4)
    if recipe.smoa is not None:
        axes["experts"] = (0, max(4, recipe.smoa.top_k))
    if recipe.connections is not None:
        axes["top_k"] = (1, 3)
    return SearchSpace(**axes)
