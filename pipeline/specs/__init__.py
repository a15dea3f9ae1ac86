"""What a user writes, validated: tasks, backbones, recipes, search spaces and budgets.

All models are frozen and refuse unknown keys; `task_files` reads them from YAML.

Imports: errors, kinds.
"""

from pipeline.specs.backbone import Backbone
from pipeline.specs.data import (
    ClassCount,
    ClassNames,
    CsvData,
    Data,
    DigitsData,
    DrawnData,
    FolderData,
    Input,
    JsonData,
    ListsData,
    Paths,
    ShardsData,
)
from pipeline.specs.method import Method
from pipeline.specs.parts import (
    Adapter,
    Biases,
    ClassToken,
    Connections,
    Fact,
    Full,
    Head,
    Lora,
    Norms,
    Prompts,
    Quantiser,
    Smoa,
    Ssf,
)
from pipeline.specs.recipe import (
    ADAPTERS,
    DEFAULT_PARTS,
    DEFAULT_RECIPE,
    PARTS,
    Recipe,
    WrittenRecipe,
    slot_conflict,
)
from pipeline.specs.search_space import Positive, SearchSpace, default_space
from pipeline.specs.section import (
    BITS,
    Bits,
    Bytes,
    Channels,
    Deviation,
    Deviations,
    Spec,
    UnitPixels,
    first_fault,
    parse_bytes,
)
from pipeline.specs.selection import Criterion, Level, Selection
from pipeline.specs.suite import Suite
from pipeline.specs.task import About, Budget, Percent, Task
from pipeline.specs.training import Augmentation, Training

__all__ = [
    "ADAPTERS",
    "BITS",
    "DEFAULT_PARTS",
    "DEFAULT_RECIPE",
    "PARTS",
    "About",
    "Adapter",
    "Augmentation",
    "Backbone",
    "Biases",
    "Bits",
    "Budget",
    "Bytes",
    "Channels",
    "ClassCount",
    "ClassNames",
    "ClassToken",
    "Connections",
    "Criterion",
    "CsvData",
    "Data",
    "Deviation",
    "Deviations",
    "DigitsData",
    "DrawnData",
    "Fact",
    "FolderData",
    "Full",
    "Head",
    "Input",
    "JsonData",
    "Level",
    "ListsData",
    "Lora",
    "Method",
    "Norms",
    "Paths",
    "Percent",
    "Positive",
    "Prompts",
    "Quantiser",
    "Recipe",
    "SearchSpace",
    "Selection",
    "ShardsData",
    "Smoa",
    "Spec",
    "Ssf",
    "Suite",
    "Task",
    "Training",
    "UnitPixels",
    "WrittenRecipe",
    "default_space",
    "first_fault",
    "parse_bytes",
    "slot_conflict",
]
