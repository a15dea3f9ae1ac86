"""The search space: the values to try for each setting of a recipe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
)

from pipeline.specs.parts import Connections, Smoa
from pipeline.specs.recipe import ADAPTERS, Recipe
from pipeline.specs.section import Bits, Spec, first_fault


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

    `bits` sets connections and adapters together unless `connection_bits` or `adapter_bits` names
    them apart. Adapters are `smoa`, `adapter`, `lora` and `fact`; the rank of the last two counts
    as `width`. `experts: 0` leaves the SMoA bank out, `top_k: 0` the connections.
    """

    bits: _axis(Bits) = None  # type: ignore[valid-type]
    connection_bits: _axis(Bits) = None  # type: ignore[valid-type]
    adapter_bits: _axis(Bits) = None  # type: ignore[valid-type]
    head_bits: _axis(Bits) = None  # type: ignore[valid-type]
    experts: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    top_k: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    width: _axis(Annotated[int, Field(ge=1, le=1024)]) = None  # type: ignore[valid-type]
    scale: _axis(Positive) = None  # type: ignore[valid-type]
    learning_rate: _axis(Positive) = None  # type: ignore[valid-type]
    trials: int = Field(
        12,
        ge=1,
        description=(
            "number of configurations to run; a space no larger than this is enumerated, a larger"
            " one sampled"
        ),
    )

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The axes that are searched, in a fixed order."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name != "trials" and getattr(self, name) is not None
        }

    def size(self) -> int:
        """Number of points in the space."""
        count = 1
        for values in self.axes().values():
            count *= len(values)
        return count

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, in a fixed order."""
        axes = self.axes()
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def recipe(self, base: Recipe, point: dict[str, Any]) -> Recipe:
        """The recipe at one point: `base` with the point's values written in.

        Raises:
            ValidationError: There is none; `fault` tells why.
        """
        parts: dict[str, Spec | None] = {name: getattr(base, name) for name in Recipe.model_fields}
        if "top_k" in point:
            parts["connections"] = (
                (base.connections or Connections()).changed(top_k=point["top_k"])
                if point["top_k"]
                else None
            )
        if "experts" in point:
            parts["smoa"] = (
                (base.smoa or Smoa()).changed(experts=point["experts"])
                if point["experts"]
                else None
            )
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
                for name in ("lora", "fact")
            },
            "head": {"bits": point.get("head_bits")},
            "training": {"learning_rate": point.get("learning_rate")},
        }
        for name, part in parts.items():
            given = {
                key: value for key, value in changes.get(name, {}).items() if value is not None
            }
            parts[name] = part.changed(**given) if part is not None and given else part
        return base.changed(**parts)

    def fullest(self, base: Recipe) -> Recipe:
        """The recipe with every part of any recipe of the space, at the fewest bits."""
        return self.recipe(
            base,
            {
                axis: max(values) if axis in ("experts", "top_k") else min(values)
                for axis, values in self.axes().items()
            },
        )

    def max_top_k(self, base: Recipe) -> int:
        """The largest K of any trial: one selection of this K serves the whole study. 0 if no trial
        trains connections.
        """
        if self.top_k is not None:
            return int(max(self.top_k))
        return base.connections.top_k if base.connections is not None else 0

    def idle_axes(self, base: Recipe) -> list[str]:
        """Axes that change nothing because no recipe of the space has the part they belong to."""
        has_smoa = any(self.experts) if self.experts is not None else base.smoa is not None
        has_adapter = has_smoa or any(
            getattr(base, name) is not None for name in ADAPTERS if name != "smoa"
        )
        has_connections = self.max_top_k(base) > 0
        needed = {
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
    if axis.endswith("bits"):
        return value < 16
    return value if axis == "experts" else value > 0


def default_space(recipe: Recipe) -> SearchSpace:
    """The default search space of a recipe: bits, experts and K of the parts it has."""
    axes: dict[str, Any] = {}
    if any(getattr(recipe, name) is not None for name in ("connections", *ADAPTERS)):
        axes["bits"] = (1, 4)
    if recipe.smoa is not None:
        axes["experts"] = (0, max(4, recipe.smoa.top_k))
    if recipe.connections is not None:
        axes["top_k"] = (1, 3)
    return SearchSpace(**axes)
