"""A task: one labelled dataset, its metric, and how to adapt the backbone to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from pipeline.specs.backbone import Backbone
from pipeline.specs.data import CsvData, Data, Input
from pipeline.specs.recipe import DEFAULT_RECIPE, WrittenRecipe, cools_down
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


Percent = Annotated[float, Field(ge=0, le=100)]


class About(Spec):
    """Where a task's data comes from and published accuracies on it. Informative only."""

    source: str = Field("", description="where to get the data")
    licence: str = Field("", description="licence of the data")
    paper: str = Field("", description="paper that introduced the data")
    published_percent: dict[str, Percent] = Field(
        default_factory=dict, description="test accuracies by method, each with its paper"
    )


def _default_metric(validated: Mapping[str, Any]) -> str:
    """The kind's; empty where the kind is not valid, which is reported as such."""
    from pipeline.kinds import kind_named

    return kind_named(validated["kind"]).default_metric if "kind" in validated else ""


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
        description="classification: one class per image; multilabel: any number of them",
    )
    data: Data
    input: Input = Input()
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="fraction of train held out for validation if the data has no `val`",
    )
    metric: str = Field(
        default_factory=_default_metric,
        validate_default=True,
        description="what the study maximises; default: the kind's own",
    )
    backbone: Backbone
    recipe: Annotated[WrittenRecipe, AfterValidator(cools_down)] = DEFAULT_RECIPE
    search: SearchSpace = Field(
        default_factory=lambda validated: default_space(validated.get("recipe", DEFAULT_RECIPE))
    )
    selection: Selection = Selection()
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
