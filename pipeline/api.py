"""The public functions: run a batch, find packs by size and accuracy, load one, predict, export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.driver.retrying_registry import PATIENCE_SECONDS
from pipeline.errors import SpecError
from pipeline.specs import Task
from pipeline.specs.task_files import load_tasks

if TYPE_CHECKING:
    from pipeline.driver.batch import TaskOutcome
    from pipeline.driver.stages import OnProgress
    from pipeline.registry.pack_record import RegisteredPack
    from pipeline.serving.host import PackHost
    from pipeline.serving.predictor import Predictor
    from pipeline.utils.precision import Precision

WORKDIR = Path("runs")
Format = Literal["timm", "onnx", "peft", "binary-adapter"]


def run(
    tasks: Sequence[Task | str | Path],
    *,
    workdir: str | Path = WORKDIR,
    address: str | None = None,
    overrides: dict[str, Any] | None = None,
    per_trial: tuple[float | None, float | None] = (None, None),
    ranks_per_trial: int = 1,
    selection_workers: int | None = None,
    tasks_at_once: int | None = None,
    time_limit_seconds: float | None = None,
    registry_patience_seconds: float = PATIENCE_SECONDS,
    log_trials: bool = True,
    promote: bool = False,
    on_progress: OnProgress | None = None,
) -> list[TaskOutcome]:
    """Run tasks to registered packs. Raises TaskpackError if the batch cannot start.

    Args:
        tasks: `Task` objects, task files, or folders of them; each task gets one outcome.
        workdir: folder for all results; run again with the same one to resume.
        address: address of a Ray cluster; None starts a private one on this machine.
        overrides: sections of the task files to replace, such as `{"search": {"trials": 6}}`.
        per_trial: CPUs and GPUs per rank of a trial; None takes those that `Placement` describes.
        ranks_per_trial: processes that train each trial and fit together.
        selection_workers: ranks of the selection; None takes a share of the cluster, if faster.
        tasks_at_once: tasks to run concurrently; None takes one more than fill the cluster.
        time_limit_seconds: wall-clock limit for all tasks. Trials are left out so that the fit of
            each champion is expected to end in time; a task without time for a trial and a fit has
            a TimeLimitError.
        registry_patience_seconds: longest wait for an unreachable tracking server, at the end.
        log_trials: whether each trial becomes a child run of its pack's MLflow run.
        promote: give every new pack the alias `champion`, even if an earlier one is better.
        on_progress: called with each task's progress.
    """
    from pipeline.driver.batch import run_batch
    from pipeline.driver.stages import Placement, no_progress

    placement = Placement(per_trial, ranks_per_trial, selection_workers, tasks_at_once)
    return run_batch(
        _read_batch(tasks, overrides),
        Path(workdir),
        address=address,
        placement=placement,
        time_limit_seconds=time_limit_seconds,
        registry_patience_seconds=registry_patience_seconds,
        log_trials=log_trials,
        promote=promote,
        on_progress=on_progress or no_progress,
    )


def _read_batch(tasks: Sequence[Task | str | Path], overrides: dict[str, Any] | None) -> list[Task]:
    """The tasks given and those read from files; `overrides` apply to the latter."""
    given = [task for task in tasks if isinstance(task, Task)]
    files = [Path(task) for task in tasks if not isinstance(task, Task)]
    batch = [*given, *load_tasks(files, overrides=overrides)]
    names = [task.name for task in batch]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SpecError(
            f"tasks: the name {repeated[0]!r} is given twice; give each task of a batch its own"
            " name"
        )
    if given and overrides:
        raise SpecError(
            "overrides: these apply to task files only; change the Task objects themselves"
        )
    return batch


def find(
    task: str | None = None,
    *,
    max_bytes: int | None = None,
    min_metric: float | None = None,
    metric: str | None = None,
    limit: int = 50,
    after: str | None = None,
    workdir: str | Path = WORKDIR,
) -> list[RegisteredPack]:
    """Find registered packs by size and accuracy, best test metric first.

    Args:
        task: only packs of this task.
        max_bytes: largest size of a pack.
        min_metric: smallest test metric, in [0, 1].
        metric: only packs chosen by this metric: values of two metrics cannot be compared.
        limit: maximum number of packs.
        after: the pack, as NAME/VERSION, to start after: the last one of the previous page.
        workdir: work folder whose registry is used if MLFLOW_TRACKING_URI is not set.
    """
    from pipeline.registry.store import open_registry

    registry = open_registry(None, Path(workdir).resolve())
    return registry.search(
        task=task,
        max_bytes=max_bytes,
        min_metric=min_metric,
        metric=metric,
        limit=limit,
        after=after,
    )


def load(
    reference: str | Path,
    *,
    backbone: str | Path | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    workdir: str | Path = WORKDIR,
) -> Predictor:
    """Load a pack, ready to predict.

    Args:
        reference: a pack file, or `NAME`, `NAME@alias` or `NAME/version` in the registry.
        backbone: checkpoint of the pack's backbone; default: the one this machine used before, or
            the embedded one.
        device: device to compute on, such as `cpu` or `cuda:1`; default: the GPU if there is one.
        precision: of products, `fp32` or `bf16`, which is faster and rounds to 8 bits; float32
            replaces it on devices without units for it.
        workdir: work folder whose registry is used if MLFLOW_TRACKING_URI is not set.

    Raises:
        RegistryError: There is no such pack.
        PackError: The pack cannot be used here.
        BackboneError: Its backbone cannot be loaded.
    """
    from pipeline.serving.predictor import load_predictor

    weights = str(backbone) if backbone is not None else None
    return load_predictor(fetch(reference, workdir=workdir), weights, device, precision)


def load_many(
    references: Sequence[str | Path],
    *,
    backbone: str | Path | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    workdir: str | Path = WORKDIR,
) -> PackHost:
    """Load packs of one backbone, whose images are then predicted in one pass.

    Args:
        references: as for `load`, each the name of its pack in the requests.
        backbone: as for `load`.
        device: as for `load`.
        precision: as for `load`.
        workdir: as for `load`.

    Raises:
        RegistryError: There is no such pack.
        PackError: A pack cannot be used here, or is of another backbone than the first.
        BackboneError: The backbone cannot be loaded.
    """
    from pipeline.errors import PackError
    from pipeline.packs import read_pack
    from pipeline.serving.host import PackHost
    from pipeline.serving.predictor import load_backbone_of

    paths = {str(reference): fetch(reference, workdir=workdir) for reference in references}
    if not paths:
        raise SpecError("load_many: given no packs; give the references of one or more")

    def read(name: str) -> bytes:
        if name not in paths:
            raise PackError(f"{name}: not among the packs loaded: {', '.join(paths)}")
        return paths[name].read_bytes()

    first = read_pack(next(iter(paths.values())))
    weights = str(backbone) if backbone is not None else None
    loaded = load_backbone_of(first.metadata, weights)
    host = PackHost(loaded, read, device=device, precision=precision)
    for name in paths:
        host.packs.get(name)
    return host


def load_all(
    *,
    backbone: str | Path | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    workdir: str | Path = WORKDIR,
) -> tuple[PackHost, dict[str, str]]:
    """Load the champion of every task on one backbone, that of the registry's best.

    Args: as for `load`.

    Returns:
        The packs, whose names are those of their tasks, the best first; and by task why others on
        this backbone cannot be used.

    Raises:
        RegistryError: There is no champion that could be used.
        BackboneError: The backbone cannot be loaded.
    """
    from pipeline.errors import PackError, RegistryError
    from pipeline.packs import read_pack
    from pipeline.registry.store import open_registry
    from pipeline.serving.host import PackHost
    from pipeline.serving.predictor import kind_of, load_backbone_of

    root = Path(workdir).resolve()
    registry = open_registry(None, root)

    def read(name: str) -> bytes:
        return registry.download(registry.get(name), root / "downloads").read_bytes()

    metadata = (read_pack(read(pack.name)).metadata for pack in registry.champions())
    first = next((each for each in metadata if not kind_of(each).is_dense), None)
    if first is None:
        raise RegistryError(
            "the registry has no champion that shares a backbone with others; register one with"
            " `taskpack run`"
        )
    weights = str(backbone) if backbone is not None else None
    loaded = load_backbone_of(first, weights)
    host = PackHost(loaded, read, device=device, capacity_bytes=sys.maxsize, precision=precision)
    refused: dict[str, str] = {}
    for pack in registry.champions(loaded.fingerprint):
        try:
            host.packs.get(pack.name)
        except PackError as error:
            refused[pack.name] = str(error)
    return host, refused


def fetch(reference: str | Path, *, workdir: str | Path = WORKDIR) -> Path:
    """Return the path of a pack file, downloading a registered pack into `workdir` first."""
    from pipeline.registry.store import open_registry

    if Path(reference).is_file():
        return Path(reference)
    root = Path(workdir).resolve()
    registry = open_registry(None, root)
    registered = registry.get(str(reference))
    return registry.download(registered, root / "downloads")


def export(
    reference: str | Path,
    *,
    to: Format,
    path: str | Path,
    backbone: str | Path | None = None,
    workdir: str | Path = WORKDIR,
) -> float | None:
    """Write a pack in another project's format.

    Args:
        reference: as for `load`.
        to: `timm`, a folder with the merged network as a plain checkpoint; `onnx`, the whole model
            as one file; `peft`, a folder with a SHiRA or LoRA adapter; `binary-adapter`, NAME.bin
            with NAME.yaml next to it.
        path: file or folder to write; it must not exist.
        backbone: as for `load`; not needed for binary-adapter.
        workdir: as for `load`.

    Returns:
        The largest difference of a probe logit between pack and export; None if the format's own
        program is not run.

    Raises:
        ExportError: The format cannot express a part of the pack.
        StorageError: `path` exists or cannot be written.
    """
    from pipeline.errors import ExportError
    from pipeline.packs import read_pack

    pack, path = read_pack(fetch(reference, workdir=workdir)), Path(path)
    if pack.metadata.modality != "images":
        raise ExportError(
            f"the pack of task {pack.metadata.task!r} takes {pack.metadata.modality}; only packs of"
            " images can be exported"
        )
    if to == "binary-adapter":
        from pipeline.exchange.binary_adapter import export_binary_adapter

        export_binary_adapter(pack, path)
        return None
    from pipeline.exchange.merged_checkpoint import export_checkpoint
    from pipeline.exchange.onnx import export_onnx
    from pipeline.exchange.peft import export_peft
    from pipeline.serving.predictor import load_backbone_of

    exporters = {"timm": export_checkpoint, "onnx": export_onnx, "peft": export_peft}
    return exporters[to](
        pack, load_backbone_of(pack.metadata, str(backbone) if backbone is not None else None), path
    )


def import_pack(source: str | Path, *, path: str | Path, backbone: str | Path | None = None) -> int:
    """Import a published Binary Adapter file as a pack.

    Args:
        source: NAME.bin, with NAME.yaml next to it.
        path: pack file to write; it must not exist.
        backbone: checkpoint of ViT-B/16 (vit_base_patch16_224.orig_in21k); default: timm's.

    Returns:
        The size of the pack in bytes.

    Raises:
        PackError: The files are invalid.
        BackboneError: The backbone cannot be loaded.
        StorageError: `path` exists or cannot be written.
    """
    from pipeline.backbones import load_backbone
    from pipeline.backbones.known import remember
    from pipeline.exchange.binary_adapter import BACKBONE, INPUT, import_binary_adapter, read_files
    from pipeline.packs import pack_to_bytes
    from pipeline.utils.files import whole

    data, description = read_files(Path(source))
    spec = BACKBONE if backbone is None else BACKBONE.model_copy(update={"weights": str(backbone)})
    loaded = load_backbone(spec, INPUT)
    content = pack_to_bytes(import_binary_adapter(data, description, loaded))
    with whole(Path(path)) as scratch:
        scratch.write_bytes(content)
    remember(loaded.fingerprint, loaded.spec.weights)
    return len(content)
