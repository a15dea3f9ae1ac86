"""A suite: the tasks of a benchmark."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
    field_validator,
)

from pipeline.specs.section import Spec


class Suite(Spec):
    """The tasks of a benchmark, by name, in the groups over which averages are taken."""

    name: str
    description: str = ""
    groups: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(min_length=1)

    @field_validator("groups")
    @classmethod
    def _names_each_task_once(
        cls, groups: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        names = [name for group in groups.values() for name in group]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)}: named more than once; name each task once")
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, group by group."""
        return tuple(name for group in self.groups.values() for name in group)
