"""A method: one way to adapt a backbone, to be compared with others."""

from __future__ import annotations

from pydantic import (
    model_validator,
)

from pipeline.specs.recipe import WrittenRecipe
from pipeline.specs.search_space import SearchSpace
from pipeline.specs.section import Spec
from pipeline.specs.selection import Selection
from pipeline.specs.task import Task


class Method(Spec):
    """One way to adapt a backbone: a recipe, the values it is tuned over, and how its connections
    are selected.

    Training settings that the recipe does not name are the task's, and so is a selection that is
    left out.
    """

    description: str = ""
    recipe: WrittenRecipe
    search: SearchSpace
    selection: Selection | None = None

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Method:
        if fault := self.search.fault(self.recipe):
            raise ValueError(fault)
        if self.selection is not None and not self.search.max_top_k(self.recipe):
            raise ValueError(
                "selection would change nothing: the method trains no connections; leave it out, or"
                " add `connections` to `recipe`"
            )
        return self

    def on(self, task: Task) -> Task:
        """The task with this method's recipe and search space, and its selection if it has one.

        Raises:
            ValidationError: The method's training settings conflict with the task's.
        """
        own = self.recipe.training
        training = task.recipe.training.changed(
            **{key: getattr(own, key) for key in own.model_fields_set}
        )
        recipe = self.recipe.changed(training=training)
        return task.changed(
            recipe=recipe, search=self.search, selection=self.selection or task.selection
        )
