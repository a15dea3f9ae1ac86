"""From a notebook, what the commands do: run a batch, find packs by numbers, load one, predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.driver.registrar import PATIENCE_SECONDS
from pipeline.errors import SpecError
from pipeline.specs import Task
from pipeline.specs.task_files import load_tasks

if TYPE_CHECKING:
    from pipeline.driver.batch import TaskOutcome
    from pipeline.driver.stages import OnProgress
    from pipeline.registry.pack_record import RegisteredPack
    from pipeline.serving.predictor import Predictor

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
    registry_patience_seconds: float = PATIENCE_SECONDS,
    log_trials: bool = True,
    promote: bool = False,
    on_progress: OnProgress | None = None,
) -> list[TaskOutcome]:
    """Run tasks, given as `Task`s or as task files or folders of them, to registered packs.

    Args:
        workdir: keeps every intermediate result; run again with the same one to resume.
        address: of a Ray cluster; None starts a private one on this machine.
        overrides: sections of the task files to replace, such as `{"budget": {"max_bytes": "32KiB"}, "search": {"trials": 6}}`.
        per_trial: CPUs and GPUs that each rank of a trial asks Ray for; a None takes 1 CPU, and 1 GPU where the cluster has some.
        ranks_per_trial: processes that train each trial and fit together.
        selection_workers: that select connections; None takes an equal share of the GPUs or CPUs, but none where this process is done sooner.
        tasks_at_once: None takes as many as the trials of fill the cluster, and one more.
        registry_patience_seconds: how long the end of the run waits for a tracking server that is away.
        log_trials: whether each trial becomes a child run of its pack's MLflow run.
        promote: give the alias `champion` to every pack of this run; otherwise to those better than what was registered before.

    Raises:
        TaskpackError: nothing could be run at all. What befell single tasks is in their outcomes.
    """
    from pipeline.driver.batch import run_batch
    from pipeline.driver.stages import Placement, no_progress

    placement = Placement(per_trial=per_trial, ranks_per_trial=ranks_per_trial, selection_workers=selection_workers, tasks_at_once=tasks_at_once)
    given = [task for task in tasks if isinstance(task, Task)]
    read = load_tasks([Path(task) for task in tasks if not isinstance(task, Task)], overrides=overrides)
    batch = [*given, *read]
    names = [task.name for task in batch]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SpecError(f"tasks: the name {repeated[0]!r} is given twice; give each task of a batch its own name")
    if given and overrides:
        raise SpecError("overrides: they apply to task files only; change the Task objects themselves")
    return run_batch(
        batch,
        Path(workdir),
        address=address,
        placement=placement,
        registry_patience_seconds=registry_patience_seconds,
        log_trials=log_trials,
        promote=promote,
        on_progress=on_progress or no_progress,
    )


def find(
    task: str | None = None,
    *,
    max_bytes: int | None = None,
    min_metric: float | None = None,
    limit: int = 50,
    after: str | None = None,
    workdir: str | Path = WORKDIR,
) -> list[RegisteredPack]:
    """Registered packs by numbers, best test metric first.

    Args:
        min_metric: smallest test metric, in [0, 1].
        after: the pack, as NAME/VERSION, behind which to begin: the last one of an earlier answer gives the next page.
        workdir: whose embedded registry to ask where MLFLOW_TRACKING_URI is not set.
    """
    from pipeline.registry.store import open_registry

    registry = open_registry(None, Path(workdir).resolve())
    return registry.search(task=task, max_bytes=max_bytes, min_metric=min_metric, limit=limit, after=after)


def load(reference: str | Path, *, backbone: str | Path | None = None, device: str | None = None, workdir: str | Path = WORKDIR) -> Predictor:
    """A pack ready to predict, by file or by registry reference (`NAME`, `NAME@alias`, `NAME/version`).

    Args:
        backbone: checkpoint of the pack's backbone; default: the one this machine used before, or the embedded one.
        device: where to compute, such as `cpu` or `cuda:1`; default: the GPU, where there is one.

    Raises:
        RegistryError: no such pack. PackError, BackboneError: it cannot be used here.
    """
    from pipeline.serving.predictor import load_predictor

    return load_predictor(fetch(reference, workdir=workdir), str(backbone) if backbone is not None else None, device)


def fetch(reference: str | Path, *, workdir: str | Path = WORKDIR) -> Path:
    """The pack file behind a reference: a local path as it is, a registered pack downloaded into `workdir`."""
    from pipeline.registry.store import open_registry

    if Path(reference).is_file():
        return Path(reference)
    root = Path(workdir).resolve()
    registry = open_registry(None, root)
    registered = registry.get(str(reference))
    return registry.download(registered, root / "downloads")


def export(reference: str | Path, *, to: Format, path: str | Path, backbone: str | Path | None = None, workdir: str | Path = WORKDIR) -> float | None:
    """Write a pack in another project's format, whole or not at all.

    Args:
        to: timm, a folder with the merged network as a plain checkpoint; onnx, the whole model as one file; peft, a folder with a SHiRA or LoRA
            adapter; binary-adapter, NAME.bin with NAME.yaml beside it.
        path: must not exist yet.
        backbone: as for `load`; not needed for binary-adapter.

    Returns:
        The largest difference of a probe logit between pack and export; None where the format's own program is not run.

    Raises:
        ExportError: the format has no place for a part of the pack. Otherwise as `load`; StorageError: `path` exists or cannot be written.
    """
    from pipeline.packs import read_pack

    pack, path = read_pack(fetch(reference, workdir=workdir)), Path(path)
    if to == "binary-adapter":
        from pipeline.exchange.binary_adapter import export_binary_adapter

        export_binary_adapter(pack, path)
        return None
    from pipeline.exchange.merged_checkpoint import export_checkpoint
    from pipeline.exchange.onnx import export_onnx
    from pipeline.exchange.peft import export_peft
    from pipeline.serving.predictor import load_backbone_of

    exporters = {"timm": export_checkpoint, "onnx": export_onnx, "peft": export_peft}
    return exporters[to](pack, load_backbone_of(pack.metadata, str(backbone) if backbone is not None else None), path)


def import_pack(source: str | Path, *, path: str | Path, backbone: str | Path | None = None) -> int:
    """Read a published Binary Adapter file, NAME.bin with NAME.yaml beside it, and write it as a pack; its size in bytes.

    Args:
        backbone: checkpoint of ViT-B/16 (vit_base_patch16_224.orig_in21k); default: timm's.

    Raises:
        PackError: the files are not what they should be. BackboneError: the backbone cannot be loaded. StorageError: as `export`.
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
