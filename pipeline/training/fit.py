"""The final fit: the champion's recipe trained on train and validation, packed, reloaded from the
file, and tested once.

The result file is written last. Interrupted training resumes from its checkpoint. A pack without a
result was interrupted between training and testing: it is tested, not trained again.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.packing import describe, from_pack, to_pack
from pipeline.backbones import fingerprint
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.inputs.task_inputs import Inputs
from pipeline.kinds import score
from pipeline.packs import ledger, read_pack, write_pack
from pipeline.specs import Recipe
from pipeline.training.full_size import final_outcomes
from pipeline.training.loop import train_epochs
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.run_checkpoint import Checkpoint
from pipeline.training.teacher import training_source
from pipeline.utils.devices import device_name
from pipeline.utils.files import read_json, write_json

PACK_FILE = "pack.safetensors"
RESULT_FILE = "result.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A finished pack and what was measured on it: `test_metric` is the value of the task's
    `metric`, in [0, 1], for the reloaded pack.

    `device` is what trained it, and how many of them where there were several: another device or
    number may round otherwise. `test_by_class` is the metric of each class alone, where it has one.
    """

    pack_digest: str
    size_bytes: int
    ledger: dict[str, int]
    trained_values: int
    test_samples: int
    metric: str
    test_metric: float
    test_metric_stderr: float
    train_seconds: float
    device: str
    test_by_class: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Summary for a log: `test accuracy 0.8125, 3046 bytes, 12.3 s`."""
        return (
            f"test {self.metric} {self.test_metric:.4f}, {self.size_bytes} bytes,"
            f" {self.train_seconds:.1f} s"
        )


def read_fit(folder: Path) -> FitResult | None:
    """The finished fit in `folder`, or None."""
    try:
        result = FitResult(**read_json(folder / RESULT_FILE))
    except TypeError:  # none yet, or one that an older version wrote
        return None
    return result if (folder / PACK_FILE).exists() else None


def steps_kept(folder: Path) -> float:
    """Number of steps that a retry of the fit in `folder` can skip; infinite if only testing is
    left.
    """
    return (
        math.inf if (folder / PACK_FILE).exists() else Checkpoint(folder / CHECKPOINT_FILE).step()
    )


def fit(
    inputs: Inputs,
    recipe: Recipe,
    selected: SelectedIndex | None,
    folder: Path,
    *,
    device: str = "cpu",
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train, pack and test in `folder`, unless that has been done.

    Args:
        ranks: the processes that train together. The first reads and writes the folder for all.

    Raises:
        TrainingError: the loss diverges.
        StorageError: the disk is full.
        ClusterError: the ranks no longer have the same values.
    """
    done = read_fit(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    if not _read(folder / PACK_FILE, ranks):
        _train_and_pack(inputs, recipe, selected, folder, device, ranks)
    result = _test(inputs, folder, device, ranks)
    if ranks.is_first:
        write_json(folder / RESULT_FILE, asdict(result))
    return result


def _read(path: Path, ranks: Ranks) -> bytes:
    """A file's content as the first rank sees it; empty where there is none."""
    return ranks.from_first(path.read_bytes() if ranks.is_first and path.exists() else b"")


def _train_and_pack(
    inputs: Inputs,
    recipe: Recipe,
    selected: SelectedIndex | None,
    folder: Path,
    device: str,
    ranks: Ranks,
) -> None:
    task, recipe, checkpoint = (
        inputs.task,
        with_learning_rate(recipe, inputs.backbone),
        Checkpoint(folder / CHECKPOINT_FILE),
    )
    model = inputs.adapted(recipe, selected).to(device)
    before = fingerprint(model.backbone.state_dict())
    options: dict[str, Any] = {
        "seed": task.seed,
        "flip": task.input.flip,
        "device": device,
        "checkpoint": checkpoint,
        "ranks": ranks,
    }
    for _ in train_epochs(
        model,
        training_source(inputs, "trainval", recipe, device=device, ranks=ranks),
        inputs.splits["trainval"],
        recipe.training,
        inputs.kind,
        **options,
    ):
        pass
    assert fingerprint(model.backbone.state_dict()) == before, (
        "training changed the frozen backbone"
    )
    if not ranks.is_first:
        return
    write_json(folder / TRAINING_FILE, {"seconds": round(checkpoint.seconds(), 2)})
    write_pack(
        folder / PACK_FILE,
        to_pack(model.to("cpu"), describe(task, recipe, inputs.backbone, inputs.index.classes)),
    )
    checkpoint.clear()


def _test(inputs: Inputs, folder: Path, device: str, ranks: Ranks) -> FitResult:
    content = _read(folder / PACK_FILE, ranks)
    pack = read_pack(content)
    model = from_pack(pack, inputs.backbone).to(device)
    reader, split = inputs.reader("test"), inputs.splits["test"]
    outcomes = final_outcomes(model, reader, split, inputs.kind, ranks=ranks)
    tested = score(inputs.metric, outcomes)
    return FitResult(
        pack_digest=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        ledger=ledger(pack),
        trained_values=model.trained_values(),
        test_samples=tested.samples,
        metric=tested.metric,
        test_metric=tested.value,
        test_metric_stderr=tested.standard_error,
        test_by_class=inputs.metric.values_by_class(outcomes, inputs.index.classes),
        train_seconds=json.loads(_read(folder / TRAINING_FILE, ranks))["seconds"],
        device=f"{ranks.world} x {device_name(device)}" if ranks.world > 1 else device_name(device),
    )
