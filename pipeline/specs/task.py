"""A task: one labelled dataset, its metric, and how to adapt the backbone to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from pipeline.specs.backbone import Backbone
from pipeline.specs.data import Data, Input
from pipeline.specs.recipe import DEFAULT_RECIPE, WrittenRecipe, cools_down
from pipeline.specs.search_space import SearchSpace, default_space
from pipeline.specs.section import Bytes, Spec
from pipeline.specs.selection import Selection


class Budget(Spec):
    """What a pack may cost, and how much accuracy may be given up for a smaller one."""

    max_bytes: Bytes = 64 * 1024
    within_points: float = Field(0.5, ge=0, description="champion: the smallest pack this close to the best validation metric, in points of 0.01")


Percent = Annotated[float, Field(ge=0, le=100)]


class About(Spec):
    """Where a task's data comes from, and what others reached on it. For people: nothing is computed from it."""

    source: str = Field("", description="where to get the data")
    licence: str = Field("", description="of the data")
    paper: str = Field("", description="that introduced the data")
    published_percent: dict[str, Percent] = Field(default_factory=dict, description="test accuracies by method, each with its paper")


class Task(Spec):
    """One labelled dataset and its metric, and how to adapt the backbone to it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    description: str = ""
    about: About = About()
    data: Data
    input: Input = Input()
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of train held out for validation where the task brings no val split")
    metric: Literal["accuracy"] = "accuracy"
    backbone: Backbone
    recipe: Annotated[WrittenRecipe, AfterValidator(cools_down)] = DEFAULT_RECIPE
    search: SearchSpace = Field(default_factory=lambda validated: default_space(validated.get("recipe", DEFAULT_RECIPE)))
    selection: Selection = Selection()
    budget: Budget = Budget()
    seed: int = Field(0, ge=0)

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, name: str) -> str:
        if name == "latest" or re.fullmatch(r"v[0-9]+", name):
            raise ValueError(f"the name {name!r} is reserved by the MLflow registry; choose another")
        return name

    @field_validator("search", mode="before")
    @classmethod
    def _with_default_axes(cls, search: Any, info: ValidationInfo) -> Any:
        """A search section that names no axis (only `trials`, say) keeps the default axes."""
        axes = SearchSpace.model_fields.keys() - {"trials"}
        if isinstance(search, Mapping) and not search.keys() & axes:
            return {**default_space(info.data.get("recipe", DEFAULT_RECIPE)).axes(), **search}
        return search

    @field_validator("search")
    @classmethod
    def _changes_something(cls, search: SearchSpace, info: ValidationInfo) -> SearchSpace:
        fault = search.fault(info.data["recipe"]) if "recipe" in info.data else None  # a recipe that is not valid is reported as such
        if fault is not None:
            raise ValueError(fault)
        return search
