"""A task's backbone, its splits and readers of their shards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import DataIndex, Reader, Split, read_index, splits_of
from pipeline.data.quoting import listing
from pipeline.errors import BackboneError
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.inputs.preset import on_backbone
from pipeline.kinds import Metric, TaskKind, classes_in, kind_named, metric_named
from pipeline.specs import Recipe, Task

CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Inputs:
    """One task, opened. `splits` has train, val, trainval and test, of the first fold.

    `task` has its backbone and recipe resolved: see `resolve_source`, `with_learning_rate` and
    `on_backbone`; `absent` are the parts that the last one left out.
    """

    task: Task
    index: DataIndex
    backbone: LoadedBackbone
    splits: dict[str, Split]
    data_folder: Path
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> TaskKind:
        """The task's kind."""
        return kind_named(self.task.kind)

    @property
    def metric(self) -> Metric:
        """What the task's study maximises."""
        return metric_named(self.task.metric, self.task.kind)

    @functools.cached_property
    def folds(self) -> list[Inputs]:
        """The task in each of its folds; this one if it has no others."""
        if self.task.folds == 1:
            return [self]
        return [replace(self, splits=splits) for splits in splits_of(self.task, self.index)]

    @property
    def trained_samples(self) -> int:
        """The number of samples that a trial trains on in an epoch, in all folds."""
        return sum(len(fold.splits["train"]) for fold in self.folds)

    @property
    def fit_ratio(self) -> float:
        """Duration of a fit relative to a trial's: the ratio of their samples."""
        return len(self.splits["trainval"]) / self.trained_samples

    @property
    def validation_samples(self) -> int:
        """The number of samples that a trial is validated on, in all folds."""
        return sum(len(fold.splits["val"]) for fold in self.folds)

    def reader(self, split: str) -> Reader:
        """A reader of one split's samples."""
        targets = functools.partial(self.kind.targets, class_count=len(self.index.classes))
        return Reader(
            self.data_folder,
            self.splits[split],
            self.backbone.takes,
            CACHE_BYTES,
            targets,
            has_masks=self.kind.is_dense,
        )

    def adapted(self, recipe: Recipe, selected: SelectedIndex | None) -> AdaptedModel:
        """The model of a recipe for this task, before it is trained."""
        return attach(
            self.backbone,
            recipe,
            len(self.index.classes),
            selected=selected,
            seed=self.task.seed,
            keeps_trunk=recipe.training.repeats_images,
        )

    def with_task(self, task: Task) -> Inputs:
        """The same data and backbone for another way to adapt it."""
        recipe = with_learning_rate(task.recipe, self.backbone)
        task, absent = on_backbone(
            task.model_copy(update={"recipe": recipe}), self.backbone, self.index.classes
        )
        return replace(self, task=task, absent=absent)

    def remarks(self) -> list[str]:
        """Messages about choices that the user did not make and should know."""
        parts_by_reason: dict[str, list[str]] = {}
        for part, reason in self.absent.items():
            parts_by_reason.setdefault(reason, []).append(part)
        left_out = [
            f"the recipe leaves out {', '.join(parts)}: {reason}"
            for reason, parts in parts_by_reason.items()
        ]
        return [*left_out, *self._classes_without_validation()]

    def _classes_without_validation(self) -> list[str]:
        """A message if the metric leaves out classes that validation has no samples of."""
        found = {
            number
            for fold in self.folds
            for label in fold.splits["val"].labels.tolist()
            for number in classes_in(label)
        }
        names = [name for number, name in enumerate(self.index.classes) if number not in found]
        if not names or not self.metric.is_mean_over_classes:
            return []
        return [
            f"validation has no sample of {len(names)} of the classes, which {self.metric.name}"
            f" leaves out: {listing(names)}"
        ]


def open_inputs(task: Task, data_folder: Path) -> Inputs:
    """Open a prepared task. Backbone and decoded images are kept by the process, so a second call
    is cheap, unless a default search space has to be derived. Raises BackboneError if the backbone
    takes other samples.
    """
    inputs = open_unresolved(task, data_folder)
    return inputs.with_task(inputs.task)


def open_unresolved(task: Task, data_folder: Path) -> Inputs:
    """Like `open_inputs`, but with recipe and search space as the task has them."""
    index = read_index(data_folder)
    splits = splits_of(task, index)[0]
    gives_maps = kind_named(task.kind).is_dense
    backbone = load_backbone(task.backbone, task.input, gives_maps=gives_maps)
    if backbone.takes.name != task.modality:
        raise BackboneError(
            f"backbone.model: {task.backbone.model} takes {backbone.takes.name}, the task's samples"
            f" are {task.modality}; choose another backbone, or write"
            f" `modality: {backbone.takes.name}`"
        )
    task = task.model_copy(update={"backbone": backbone.spec})
    return Inputs(task, index, backbone, splits, data_folder)
