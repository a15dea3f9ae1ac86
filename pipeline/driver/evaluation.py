"""Measuring a registered pack again on its test set."""

from __future__ import annotations

import functools
from pathlib import Path

from pipeline.adaptation.packing import from_pack
from pipeline.data import DataIndex, Reader, prepare, read_index, split_samples
from pipeline.driver.workspace import Workspace
from pipeline.errors import DataError
from pipeline.kinds import Score, metric_named, score
from pipeline.packs import PackMetadata, read_pack
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import open_registry
from pipeline.serving.predictor import kind_of, load_backbone_of
from pipeline.specs.task_files import load_task
from pipeline.training import evaluate
from pipeline.utils.devices import choose_device
from pipeline.utils.files import exclusive


def evaluate_pack(
    reference: str,
    *,
    workdir: Path,
    task_file: Path | None,
    weights: Path | None,
    device: str | None = None,
) -> tuple[Score, float | None]:
    """Score a pack on the test set of its task.

    Args:
        task_file: task file with the test set; default: the data prepared in `workdir`.
        device: device to compute on; default: the GPU if there is one.

    Returns:
        The score, and the registered metric (None for a file).

    Raises:
        SpecError: There is no such device.
        DataError: There is no prepared data, or it is not what the pack was registered with.
    """
    device, workspace = choose_device(device), Workspace(workdir.resolve())
    path, registered = _pack_file(reference, workspace)
    pack = read_pack(path)
    folder = workspace.data(pack.metadata.task)
    if task_file is not None:
        _prepare_again(task_file, pack.metadata.task, workspace)
    index = _prepared_index(folder, pack.metadata)
    _check_same_data(registered, index.digest, folder)
    test = split_samples(index, 0.5, 0)["test"]
    model = from_pack(
        pack, load_backbone_of(pack.metadata, str(weights) if weights is not None else None)
    )
    kind = kind_of(pack.metadata)
    targets = functools.partial(kind.targets, class_count=len(index.classes))
    reader = Reader(folder, test, pack.metadata.input.size_px, targets=targets)
    outcomes = evaluate(model.to(device), reader, test, kind, device=device)
    return score(metric_named(pack.metadata.metric, kind.name), outcomes), (
        registered.metrics["test_metric"] if registered is not None else None
    )


def _pack_file(reference: str, workspace: Workspace) -> tuple[Path, RegisteredPack | None]:
    """A pack file as given, or a registered pack, downloaded."""
    if Path(reference).is_file():
        return Path(reference), None
    registry = open_registry(None, workspace.root)
    registered = registry.get(reference)
    return registry.download(registered, workspace.root / "downloads"), registered


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
