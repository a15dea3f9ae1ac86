"""Measuring a registered pack again on its test set."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from pipeline.adaptation.packing import from_pack
from pipeline.data import DataIndex, Modality, Reader, Split, prepare, read_index, split_samples
from pipeline.data.points import Points
from pipeline.driver.examples import draw_masks, draw_predicted_clouds
from pipeline.driver.workspace import Workspace
from pipeline.errors import DataError, SpecError
from pipeline.kinds import Score, TaskKind, metric_named, score
from pipeline.packs import PackMetadata, read_pack
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import open_registry
from pipeline.serving.predictor import kind_of, load_backbone_of
from pipeline.specs.task_files import load_task
from pipeline.training.calibrate import SetQuality, quality_of_sets
from pipeline.training.full_size import final_outcomes
from pipeline.utils.devices import choose_device
from pipeline.utils.files import exclusive


@dataclass(frozen=True)
class Evaluation:
    """A pack's score on a test set, the metric of each class where it has one, what the registry
    has of it (None for a file), and how its sets of classes do (None for a pack without them).
    """

    score: Score
    by_class: dict[str, float]
    registered: float | None
    sets: SetQuality | None


def evaluate_pack(
    reference: str,
    *,
    workdir: Path,
    task_file: Path | None,
    weights: Path | None,
    device: str | None = None,
    figure: Path | None = None,
) -> Evaluation:
    """Score a pack on the test set of its task.

    Args:
        task_file: task file with the test set; default: the data prepared in `workdir`.
        device: device to compute on; default: the GPU if there is one.
        figure: where to draw the masks of the best, the median and the worst image, or the clouds
            whose prediction is best, median and worst.

    Raises:
        SpecError: There is no such device, or the pack has neither masks nor clouds to draw.
        DataError: There is no prepared data, or it is not what the pack was registered with.
    """
    device, workspace = choose_device(device), Workspace(workdir.resolve())
    path, registered = _pack_file(reference, workspace)
    pack = read_pack(path)
    folder, index = _test_data(pack.metadata, task_file, workspace, registered)
    test = split_samples(index, 0.5, 0)["test"]
    backbone = load_backbone_of(pack.metadata, str(weights) if weights is not None else None)
    model, takes, kind = from_pack(pack, backbone), backbone.takes, kind_of(pack.metadata)
    if figure is not None and not isinstance(takes, Points):
        _check_has_masks(kind)
    model.to(device)
    metric = metric_named(pack.metadata.metric, kind.name)
    reader = _reader(folder, test, index, kind, takes)
    outcomes = final_outcomes(model, reader, test, kind)
    if figure is not None and kind.is_dense:
        draw_masks(figure, model, metric, outcomes, folder, test, index, takes)
    elif figure is not None:
        draw_predicted_clouds(figure, outcomes, reader, test, kind, index.classes)
    return Evaluation(
        score(metric, outcomes),
        metric.values_by_class(outcomes, index.classes),
        None if registered is None else registered.metrics["test_metric"],
        None if pack.calibration is None else quality_of_sets(outcomes, pack.calibration),
    )


def _check_has_masks(kind: TaskKind) -> None:
    """Raise SpecError for a kind of which there is nothing to draw."""
    if not kind.is_dense:
        raise SpecError(f"--figure: a pack of kind {kind.name} predicts no masks; leave it out")


def _reader(folder: Path, test: Split, index: DataIndex, kind: TaskKind, takes: Modality) -> Reader:
    targets = functools.partial(kind.targets, class_count=len(index.classes))
    return Reader(folder, test, takes, targets=targets, has_masks=kind.is_dense)


def _pack_file(reference: str, workspace: Workspace) -> tuple[Path, RegisteredPack | None]:
    """A pack file as given, or a registered pack, downloaded."""
    if Path(reference).is_file():
        return Path(reference), None
    registry = open_registry(None, workspace.root)
    registered = registry.get(reference)
    return registry.download(registered, workspace.root / "downloads"), registered


def _test_data(
    metadata: PackMetadata,
    task_file: Path | None,
    workspace: Workspace,
    registered: RegisteredPack | None,
) -> tuple[Path, DataIndex]:
    """The folder and the index of the data that the pack was tested on."""
    folder = workspace.data(metadata.task)
    if task_file is not None:
        _prepare_again(task_file, metadata.task, workspace)
    index = _prepared_index(folder, metadata)
    _check_same_data(registered, index.digest, folder)
    return folder, index


def _prepare_again(task_file: Path, name: str, workspace: Workspace) -> None:
    """Prepare the data of the task file, which must be that of the task `name`."""
    task = load_task(task_file)
    if task.name != name:
        raise DataError(
            f"{task_file}: is task {task.name!r}, but the pack belongs to {name!r}; give the file"
            " of that task"
        )
    with exclusive(workspace.root):
        prepare(task, workspace.data(name))


def _prepared_index(folder: Path, metadata: PackMetadata) -> DataIndex:
    """The index of the prepared data, which must have the pack's classes."""
    if not (folder / "index.json").exists():
        raise DataError(
            f"{folder}: the data of task {metadata.task!r} was not prepared here; give its task"
            " file with --task"
        )
    index = read_index(folder)
    if index.classes != metadata.classes:
        raise DataError(
            f"{folder}: its classes are not the pack's, or in another order; give the task file the"
            " pack was made from with --task"
        )
    return index


def _check_same_data(registered: RegisteredPack | None, digest: str, folder: Path) -> None:
    wanted = registered.tags.get("data_digest") if registered is not None else None
    if wanted is not None and wanted != digest:
        raise DataError(
            f"{folder}: this data (digest {digest[:16]}...) is not what the pack was tested on"
            f" ({wanted[:16]}...); prepare that data again"
        )
