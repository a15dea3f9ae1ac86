"""A pack's metadata: enough to rebuild the model from the backbone, and to say how it was made.

There are no paths and no times in it, and its JSON is canonical: the same run writes the same
bytes anywhere.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, with_config
from typing_extensions import TypedDict

from pipeline.errors import PackError

FORMAT_VERSION: Final = 5

Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class PackInput(BaseModel):
    """Preprocessing: resize to a square of `size_px`, scale to [0, 1], subtract `mean`, divide by
    `std` (R, G, B).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size_px: int = Field(ge=1)
    mean: Channels
    std: tuple[Positive, Positive, Positive]
    interpolation: str


class PackPoints(BaseModel):
    """Preprocessing of point clouds: centre them, take `points` of their farthest points with
    `channels` numbers each, and scale them to the unit sphere or not at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: int = Field(ge=1)
    channels: Literal[3, 6]
    scale: Literal["unit", "metric"]


@with_config(ConfigDict(extra="forbid"))
class PackBackbone(TypedDict):
    """Which backbone the pack belongs to: timm model name, its arguments, SHA-256 over its tensors
    (64 hex digits).

    `trail`: two hex digits a tensor, in order of name, of the hash as it stood after that tensor.
    Where a backbone is another one, the first digits that differ name the tensor at fault.
    """

    model: str
    arguments: dict[str, int | float | str | bool | list[int]]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    trail: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


class PackMetadata(BaseModel):
    """The pack's own description. `recipe` and `selection` are the resolved configuration as plain
    JSON values.

    `kind` is the task's kind, `metric` what its study maximised, `modality` what it takes; packs
    before version 5, which knew one of each, say the metric alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str = Field(min_length=1)
    classes: list[str] = Field(min_length=1)
    kind: str = Field("classification", min_length=1)
    metric: str
    modality: str = Field("images", min_length=1)
    input: PackInput | PackPoints
    recipe: dict[str, JsonValue]
    backbone: PackBackbone
    selection: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int = Field(ge=0)

    @property
    def images(self) -> PackInput:
        """The preprocessing of images. Raises PackError for a pack that takes something else."""
        if not isinstance(self.input, PackInput):
            raise PackError(
                f"the pack of task {self.task!r} takes {self.modality}; this needs a pack of images"
            )
        return self.input

    def to_json(self) -> str:
        """Compact canonical JSON: sorted keys, no spaces. Raises PackError for a number that JSON
        cannot hold.
        """
        try:
            return json.dumps(
                self.model_dump(mode="json"),
                sort_keys=True,
                separators=(",", ":"),
                ensure_ascii=False,
                allow_nan=False,
            )
        except ValueError as error:
            raise PackError(
                f"metadata of {self.task}: {error}; a pack stores finite numbers only"
            ) from None


def read_input(facts: dict[str, Any]) -> PackInput | PackPoints:
    """The preprocessing that a modality states. Raises ValidationError."""
    form = PackPoints if "points" in facts else PackInput
    return form.model_validate(facts)
