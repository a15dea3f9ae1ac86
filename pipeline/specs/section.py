"""The base class of the sections of a task file, and the types of single settings."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]

_BYTE_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "KIB": 1024, "MIB": 1024**2}


def parse_bytes(text: str | int) -> int:
    """Parse a size such as `65536`, `64KiB` or `1.5 MB` to bytes. Raises ValueError with the known
    units.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError("expected a size in bytes such as 65536, 64KiB or 1.5MB")
    return int(Fraction(match[1]) * _BYTE_UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Spec(BaseModel):
    """A frozen section of configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, **fields: Any) -> Self:
        """A copy with other values, validated, unlike that of `model_copy`.

        Raises:
            ValidationError: The section is invalid with them.
        """
        return type(self).model_validate(
            {name: getattr(self, name) for name in self.model_fields_set} | fields
        )


def first_fault(error: ValidationError) -> str:
    """The first message of a validation error."""
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def _of_unit_pixels(value: float) -> float:
    """Check that a mean or deviation can be one of pixels in [0, 1]. Raises ValueError."""
    if not 0 <= value <= 1:
        raise ValueError(
            "expected a value for pixels in [0, 1], such as 0.485; divide values of the 0-255 scale"
            " by 255"
        )
    return value


UnitPixels = Annotated[float, AfterValidator(_of_unit_pixels)]
Deviation = Annotated[UnitPixels, Field(gt=0)]
Channels = tuple[UnitPixels, UnitPixels, UnitPixels]
Deviations = tuple[Deviation, Deviation, Deviation]
