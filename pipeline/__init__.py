"""taskpack: one frozen vision backbone, hundreds of tasks, a few kilobytes each."""

from pipeline.api import export, fetch, find, import_pack, load, load_all, load_many, run
from pipeline.errors import TaskpackError
from pipeline.specs import Backbone, Budget, Recipe, SearchSpace, Task
from pipeline.specs.task_files import load_task, load_tasks

__all__ = [
    "Backbone",
    "Budget",
    "Recipe",
    "SearchSpace",
    "Task",
    "TaskpackError",
    "export",
    "fetch",
    "find",
    "import_pack",
    "load",
    "load_all",
    "load_many",
    "load_task",
    "load_tasks",
    "run",
]
