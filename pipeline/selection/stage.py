"""The shared selection stage: once per task, on a Ray Train worker group, kept under its content's
hash.

Workers sum the gradients of the batches dealt to them by index; the sums are added on rank 0, layer
by layer, which ranks the connections and writes the file. The result does not depend on the number
of workers. A worker group takes longer to start than a small task takes to select, so one process
may do it alone where that is over sooner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipeline.adaptation import (
    RankedIndices,
    SelectedIndex,
    is_recomputable,
    rank_indices,
    recompute,
)
from pipeline.adaptation.sites import tunable_layers
from pipeline.data import Reader, shard_batches
from pipeline.errors import ClusterError, TaskpackError, named
from pipeline.inputs.out_of_memory import named_out_of_memory
from pipeline.inputs.task_inputs import Inputs, open_inputs
from pipeline.selection.activation import activation_importance, activation_sums
from pipeline.selection.gradient import gradient_sums
from pipeline.selection.losses import make_loss
from pipeline.specs import Task
from pipeline.utils.devices import reserved_gpu
from pipeline.utils.sending import sent

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

PlannedBatch = tuple[int, np.ndarray]  # its number, and its samples [B, 2]
OnBatch = Callable[[int, int], None]
ALGORITHM_VERSION = 2
_PLACES, _RANKS = ".places", ".ranks"
NEVER_SECONDS = 1e9
GROUP_SECONDS = 13
"""What a worker group of one machine takes to start and to end, measured on two cores."""


def selection_key(inputs: Inputs, top_k: int) -> str:
    """SHA-256 hex over everything the selection depends on."""
    task = inputs.task
    content = {
        "algorithm": ALGORITHM_VERSION,
        "backbone": inputs.backbone.fingerprint,
        "data": inputs.index.digest,
        "kind": task.kind,
        "input": [*inputs.backbone.takes.identity, task.input.flip],
        "split": [task.val_fraction if task.folds == 1 else f"{task.folds} folds", task.seed],
        "selection": task.selection.model_dump(),
        "top_k": top_k,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_selection(path: Path) -> dict[str, RankedIndices]:
    """A selection, by layer."""
    tensors = load_file(path)
    names = [name.removesuffix(_RANKS) for name in tensors if name.endswith(_RANKS)]
    return {name: RankedIndices(tensors[name + _PLACES], tensors[name + _RANKS]) for name in names}


def select(
    task: Task,
    data_folder: Path,
    top_k: int,
    path: Path,
    *,
    workers: int,
    cpus: float = 1,
    use_gpu: bool = False,
) -> Path:
    """Write the selection to `path` unless it is there. Needs a running Ray.

    Args:
        cpus: of each worker, which decode its images.

    Raises:
        DataError, BackboneError, UnexpectedError: from any worker.
        ClusterError: the worker group died more than twice.
    """
    if path.exists():
        return path
    import ray.train

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".selection-", dir=path.parent))
    config = {
        "task": task.model_dump_json(),
        "data_folder": str(data_folder),
        "top_k": top_k,
        "path": str(path),
        "cpus": cpus,
        "use_gpu": use_gpu,
    }
    try:
        error = _worker_group(config, scratch, workers, use_gpu=use_gpu).fit().return_value
    except ray.train.TrainingFailedError as failure:
        raise died_each_time(task, str(failure)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if error is not None:
        raise error
    return path


def _worker_group(
    config: dict[str, Any], scratch: Path, workers: int, *, use_gpu: bool
) -> TorchTrainer:
    """At most `workers` ranks that each run `_worker` with `config`."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _worker,
        train_loop_config=config,
        # It adds on the CPU, also where gradients come from GPUs: once per layer, not per batch.
        torch_config=TorchConfig(backend="gloo"),
        # With a node less, the group starts again with fewer workers; it is not started again to
        # grow.
        scaling_config=ray.train.ScalingConfig(
            num_workers=(1, workers),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config["cpus"]},
            elastic_resize_monitor_interval_s=NEVER_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name="selection",
            storage_path=str(scratch.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=2, controller_failure_limit=3),
        ),
    )


def died_each_time(task: Task, failure: str) -> ClusterError:
    """What to say where Ray gave a selection's workers up; `failure` is its own text."""
    if "out of memory" in failure.lower() or "OutOfMemory" in failure:
        return ClusterError(
            f"{task.name}: the selection's workers were ended three times, because their node ran "
            f"out of memory; lower selection.batch_size (it is {task.selection.batch_size}), or "
            "give fewer --selection-workers"
        )
    last = failure.splitlines()[-1][:300]
    return ClusterError(f"{task.name}: the selection's workers died three times; last: {last}")


def select_locally(
    inputs: Inputs,
    top_k: int,
    on_batch: OnBatch = lambda done, batches: None,
    device: str = "cpu",
) -> dict[str, RankedIndices]:
    """The same selection in this process, without Ray.

    Args:
        on_batch: told before each batch and at the end how many are done, and of how many.
    """
    sums = _sums(
        inputs,
        _numbered_batches(inputs),
        device,
        pace=lambda batches: _counted(batches, on_batch),
    )
    return _ranked(inputs, sums, top_k)


def _counted(batches: Sequence[PlannedBatch], on_batch: OnBatch) -> Iterator[PlannedBatch]:
    for done, batch in enumerate(batches):
        on_batch(done, len(batches))
        yield batch
    on_batch(len(batches), len(batches))


def select_locally_if_faster(
    inputs: Inputs, top_k: int, path: Path, *, workers: int, device: str = "cpu"
) -> bool:
    """Write the selection to `path` from this process, unless a group of `workers` would be done
    before; whether it was written.

    The first batch is timed. The file is the same either way.
    """
    task, batches = inputs.task, _numbered_batches(inputs)
    try:
        with named_out_of_memory(task, task.selection.batch_size, device, "selection.batch_size"):
            sums = _sums(inputs, batches, device, lambda given: _while_sooner(given, workers))
            selected = _ranked(inputs, sums, top_k)
    except _WorkersAreSooner:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_selection(selected, path)
    return True


class _WorkersAreSooner(Exception):
    """Ends a selection in this process."""


def _while_sooner(batches: Sequence[PlannedBatch], workers: int) -> Iterator[PlannedBatch]:
    started = time.monotonic()
    for done, batch in enumerate(batches):
        if (
            done == 1
            and (time.monotonic() - started) * (len(batches) - 1) * (1 - 1 / workers)
            > GROUP_SECONDS
        ):
            raise _WorkersAreSooner
        yield batch


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, wherever it is: another number of them may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbered_batches(inputs: Inputs) -> list[PlannedBatch]:
    return list(
        enumerate(
            shard_batches(
                inputs.splits["train"], inputs.task.selection.batch_size, seed=inputs.task.seed
            )
        )
    )


def _sums(
    inputs: Inputs,
    batches: Sequence[PlannedBatch],
    device: str = "cpu",
    pace: Callable[[Sequence[PlannedBatch]], Iterable[PlannedBatch]] = iter,
) -> dict[str, torch.Tensor]:
    """What the criterion adds up over batches, float64, by layer; nothing where it needs no data.
    `pace` is asked before each is read. Images are decoded by as many threads as torch has here.
    """
    if is_recomputable(inputs.task.selection):
        return {}
    reader = inputs.reader("train")
    with _one_thread():
        return _added(inputs, reader, batches, device, pace)


def _added(
    inputs: Inputs,
    reader: Reader,
    batches: Sequence[PlannedBatch],
    device: str,
    pace: Callable[[Sequence[PlannedBatch]], Iterable[PlannedBatch]],
) -> dict[str, torch.Tensor]:
    task, spec = inputs.task, inputs.task.selection
    in_order = sent(reader.batches([samples for _, samples in batches]), device)
    read = (
        (number, *tensors) for (number, _), tensors in zip(pace(batches), in_order, strict=True)
    )
    if spec.criterion == "activation":
        return activation_sums(inputs.backbone, read, spec, device=device)
    loss = make_loss(spec, inputs.kind, inputs.backbone, len(inputs.index.classes), task.seed)
    return gradient_sums(
        inputs.backbone, read, spec, loss, seed=task.seed, flip=task.input.flip, device=device
    )


@_one_thread()
def _ranked(
    inputs: Inputs, totals: dict[str, torch.Tensor], top_k: int
) -> dict[str, RankedIndices]:
    spec = inputs.task.selection
    if is_recomputable(spec):
        return recompute(inputs.backbone, spec, top_k)
    if spec.criterion == "activation":
        layers = tunable_layers(inputs.backbone.model)
        totals = {
            name: activation_importance(layers[name], total_GI) for name, total_GI in totals.items()
        }
    return rank_indices(totals, spec.level, top_k)


def _worker(config: dict[str, Any]) -> TaskpackError | None:
    """Run one rank. An error on any rank is sent to all, so that none waits for its sums, and
    returned rather than raised, so that Ray does not retry.
    """
    torch.set_num_threads(max(1, int(config["cpus"])))
    rank, world = dist.get_rank(), dist.get_world_size()
    sums: dict[str, torch.Tensor] = {}
    error: TaskpackError | None = None
    task = Task.model_validate_json(config["task"])
    try:
        device = reserved_gpu() if config["use_gpu"] else "cpu"
        with named_out_of_memory(task, task.selection.batch_size, device, "selection.batch_size"):
            inputs = open_inputs(task, Path(config["data_folder"]))
            sums = _sums(inputs, _numbered_batches(inputs)[rank::world], device)
    except Exception as fault:
        error = named(fault)
    errors: list[TaskpackError | None] = [None] * world
    dist.all_gather_object(errors, error)
    first = next((fault for fault in errors if fault is not None), None)
    if first is not None:
        return first
    totals = {name: _total(sums.pop(name)) for name in list(sums)}
    try:
        if rank == 0:
            write_selection(_ranked(inputs, totals, config["top_k"]), Path(config["path"]))
    except Exception as fault:
        return named(fault)
    return None


def _total(sum_OI: torch.Tensor) -> torch.Tensor:
    """On rank 0 the sum over all ranks, where it was; elsewhere nothing of use."""
    total_OI = sum_OI.cpu()
    dist.reduce(total_OI, dst=0)
    return total_OI.to(sum_OI.device)


def write_selection(selected: SelectedIndex, path: Path) -> None:
    """Write what `read_selection` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    places = {name + _PLACES: ranked.index_M for name, ranked in selected.items()}
    save_file(
        {**places, **{name + _RANKS: ranked.rank_M for name, ranked in selected.items()}}, scratch
    )
    os.replace(scratch, path)
