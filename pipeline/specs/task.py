"""A task: one labelled dataset, its metric, and how to adapt the backbone to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.specs.backbone import Backbone
from pipeline.specs.data import CsvData, Data, DrawnData, Hdf5Data, Input
from pipeline.specs.recipe import DEFAULT_RECIPE, Recipe, WrittenRecipe, cools_down
from pipeline.specs.search_space import AXES, SearchSpace, default_space
from pipeline.specs.section import Bytes, Spec
from pipeline.specs.selection import Selection


class Budget(Spec):
    """The largest size of a pack, and how sure it must be that a smaller one is worse."""

    max_bytes: Bytes = Field(
        64 * 1024, description="size of the whole file, such as `65536`, `32KiB` or `1.5MB`"
    )
    level: float = Field(
        0.16,
        gt=0,
        le=0.5,
        description=(
            "the champion is the smallest pack that is not significantly worse than the best:"
            " level of the paired test on the validation samples; smaller levels choose smaller"
            " packs"
        ),
    )


Modality = Literal["images", "points"]
_INPUTS = {
    "images": ("size_px", "mean", "std", "flip"),
    "points": ("points", "scale", "up", "turn", "flip"),
}
"""The settings of `input` that a modality uses."""
_FORMATS_OF_POINTS = ("shards", "folder", "csv", "lists", "json", "hdf5", "drawn")
Percent = Annotated[float, Field(ge=0, le=100)]


class About(Spec):
    """Where a task's data comes from and published accuracies on it. Informative only."""

    source: str = Field("", description="where to get the data")
    licence: str = Field("", description="licence of the data")
    paper: str = Field("", description="paper that introduced the data")
    published_percent: dict[str, Percent] = Field(
        default_factory=dict, description="test accuracies by method, each with its paper"
    )


def _default_selection(validated: Mapping[str, Any]) -> dict[str, Any]:
    """The loss that the kind ranks connections by, where the default would not do."""
    return _with_loss_of_kind({}, validated)


def _with_loss_of_kind(selection: dict[str, Any], validated: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.kinds import kind_named

    if "kind" not in validated or selection.get("criterion", "gradient") != "gradient":
        return selection
    loss = kind_named(validated["kind"]).selection_losses[0]
    return selection if loss == Selection().loss else {"loss": loss, **selection}


def _default_metric(validated: Mapping[str, Any]) -> str:
    """The kind's; empty where the kind is not valid, which is reported as such."""
    from pipeline.kinds import kind_named

    return kind_named(validated["kind"]).default_metric if "kind" in validated else ""


def _misfit_of_points(task: Task) -> str | None:
    """Why a task cannot be one of point clouds."""
    training, data = task.recipe.training, task.data
    if task.kind == "segmentation":
        return "kind: a class per point is not supported yet; expected classification or multilabel"
    if data.format not in _FORMATS_OF_POINTS:
        formats = ", ".join(_FORMATS_OF_POINTS)
        return f"data: format {data.format} holds images; for point clouds, expected {formats}"
    if isinstance(data, DrawnData) and data.kind != "solids":
        return f"data: drawn {data.kind} are images; expected `kind: solids`"
    if training.mixup or training.cutmix:
        return "recipe.training: mixup and cutmix mix images; leave them out"
    if "crop" in (training.augment, task.selection.views):
        return "augmentation `crop` is of images; expected none, light or strong"
    return None


class Task(Spec):
    """One labelled dataset and its metric, and how to adapt the backbone to it."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
        description="lower-case letters, digits, `.`, `_`, `-`; also the registry's name",
    )
    description: str = Field("", description="one line for people")
    about: About = About()
    kind: str = Field(
        "classification",
        description=(
            "classification: one class per image; multilabel: any number of them; segmentation: a"
            " class per pixel"
        ),
    )
    modality: Modality = Field(
        "images", description="what a sample is: an image, or (`points`) a point cloud"
    )
    data: Data
    input: Input = Input()
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="fraction of train held out for validation if the data has no `val`",
    )
    folds: int = Field(
        1,
        ge=1,
        description=(
            "validate each trial on all of train: train it once per fold, on the others; costs as"
            " many times as much"
        ),
    )
    metric: str = Field(
        default_factory=_default_metric,
        validate_default=True,
        description="what the study maximises; default: the kind's own",
    )
    coverage: float | None = Field(
        None,
        ge=0.5,
        lt=1,
        description=(
            "classification: predictions also give the set of classes that are probable enough to"
            " hold the right one in this share of cases, such as 0.9"
        ),
    )
    backbone: Backbone
    recipe: Annotated[WrittenRecipe, AfterValidator(cools_down)] = DEFAULT_RECIPE
    search: SearchSpace = Field(
        default_factory=lambda validated: default_space(validated.get("recipe", DEFAULT_RECIPE))
    )
    selection: Selection = Field(default_factory=_default_selection, validate_default=True)  # type: ignore[arg-type]
    budget: Budget = Budget()
    seed: int = Field(0, ge=0)

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, name: str) -> str:
        if name == "latest" or re.fullmatch(r"v[0-9]+", name):
            raise ValueError(
                f"the name {name!r} is reserved by the MLflow registry; choose another"
            )
        return name

    @field_validator("kind")
    @classmethod
    def _is_known_kind(cls, kind: str) -> str:
        from pipeline.kinds import (
            kind_named,
        )  # brings torch, which reading a catalogue need not wait for

        return kind_named(kind).name

    @field_validator("folds")
    @classmethod
    def _holds_out_one_way(cls, folds: int, info: ValidationInfo) -> int:
        default = cls.model_fields["val_fraction"].default
        if folds > 1 and info.data.get("val_fraction", default) != default:
            raise ValueError(
                "val_fraction would change nothing, because each fold is held out in turn; leave"
                " out one or the other"
            )
        return folds

    @field_validator("data")
    @classmethod
    def _has_what_the_kind_needs(cls, data: Data, info: ValidationInfo) -> Data:
        from pipeline.kinds import kind_named

        if "kind" not in info.data or data.has_masks() is None:
            return data
        if data.has_masks() and not kind_named(info.data["kind"]).is_dense:
            raise ValueError(
                f"its samples have masks, which a task of kind {info.data['kind']} does not read;"
                " write `kind: segmentation`"
            )
        if kind_named(info.data["kind"]).is_dense and not data.has_masks():
            raise ValueError(
                f"a task of kind {info.data['kind']} needs masks: expected format masks, coco or"
                " shards, or drawn with kind shapes"
            )
        return data

    @field_validator("input")
    @classmethod
    def _is_of_the_modality(cls, given: Input, info: ValidationInfo) -> Input:
        modality = info.data.get("modality", "images")
        foreign = [
            name
            for name, field in Input.model_fields.items()
            if name not in _INPUTS[modality] and getattr(given, name) != field.default
        ]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} would change nothing for modality {modality}; leave it out"
            )
        return given

    @model_validator(mode="after")
    def _suits_points(self) -> Self:
        if self.modality == "points":
            fault = _misfit_of_points(self)
            if fault is not None:
                raise ValueError(fault)
        elif isinstance(self.data, DrawnData) and self.data.kind == "solids":
            raise ValueError("data: drawn solids are point clouds; write `modality: points`")
        elif isinstance(self.data, Hdf5Data):
            raise ValueError("data: format hdf5 holds point clouds; write `modality: points`")
        return self

    @field_validator("selection", mode="before")
    @classmethod
    def _with_loss(cls, selection: Any, info: ValidationInfo) -> Any:
        is_mapping = isinstance(selection, Mapping)
        return _with_loss_of_kind(dict(selection), info.data) if is_mapping else selection

    @field_validator("selection")
    @classmethod
    def _has_a_loss_of_the_kind(cls, selection: Selection, info: ValidationInfo) -> Selection:
        from pipeline.kinds import kind_named

        losses = kind_named(info.data["kind"]).selection_losses if "kind" in info.data else ()
        if losses and selection.criterion == "gradient" and selection.loss not in losses:
            raise ValueError(
                f"loss {selection.loss} is none of kind {info.data['kind']}; expected"
                f" {' or '.join(losses)}"
            )
        return selection

    @field_validator("data")
    @classmethod
    def _has_no_idle_separator(cls, data: Data, info: ValidationInfo) -> Data:
        from pipeline.kinds import kind_named

        default = CsvData.model_fields["label_separator"].default
        is_set = isinstance(data, CsvData) and data.label_separator != default
        if is_set and "kind" in info.data and not kind_named(info.data["kind"]).several_labels:
            raise ValueError(
                f"label_separator would change nothing: of kind {info.data['kind']}, an image has"
                " one label; write `kind: multilabel`"
            )
        return data

    @field_validator("metric")
    @classmethod
    def _is_of_the_kind(cls, metric: str, info: ValidationInfo) -> str:
        from pipeline.kinds import metric_named

        return metric_named(metric, info.data["kind"]).name if "kind" in info.data else metric

    @field_validator("recipe")
    @classmethod
    def _trains_by_a_loss_of_the_kind(cls, recipe: Recipe, info: ValidationInfo) -> Recipe:
        from pipeline.kinds import kind_named

        losses = kind_named(info.data["kind"]).losses if "kind" in info.data else ()
        if losses and recipe.training.loss not in (None, *losses):
            raise ValueError(
                f"training.loss: given {recipe.training.loss!r}, which is none of kind"
                f" {info.data['kind']}; expected {' or '.join(losses)}"
            )
        if recipe.training.distill and info.data.get("kind") not in (None, "classification"):
            raise ValueError(
                f"training.distill: given {recipe.training.distill}, but of kind"
                f" {info.data['kind']}; only classification can be distilled yet"
            )
        return recipe

    @field_validator("coverage")
    @classmethod
    def _is_of_one_class(cls, coverage: float | None, info: ValidationInfo) -> float | None:
        if coverage is not None and info.data.get("kind", "classification") != "classification":
            raise ValueError(
                f"given {coverage}, but only a task of kind classification has sets of classes;"
                " leave it out"
            )
        return coverage

    @field_validator("search", mode="before")
    @classmethod
    def _with_default_axes(cls, search: Any, info: ValidationInfo) -> Any:
        """Keep the default axes if the section names none (only `trials`, for example)."""
        if isinstance(search, Mapping) and not search.keys() & {*AXES, "configurations"}:
            return {**default_space(info.data.get("recipe", DEFAULT_RECIPE)).axes(), **search}
        return search

    @field_validator("search")
    @classmethod
    def _changes_something(cls, search: SearchSpace, info: ValidationInfo) -> SearchSpace:
        fault = (
            search.fault(info.data["recipe"]) if "recipe" in info.data else None
        )  # an invalid recipe is reported as such
        if fault is not None:
            raise ValueError(fault)
        return search
