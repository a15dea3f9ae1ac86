"""What goes into the registry and what comes out of it.

A `Champion` is a finished pack with everything measured on it; a `RegisteredPack` is what a look-up
returns. Both are plain data: nothing here knows MLflow, so reports and the command line can use
them without importing it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError

if TYPE_CHECKING:
    from pipeline.data import Modality

TASK_TAG = "task"
DIGEST_TAG = "pack_digest"
MODEL_ID_TAG = "model_id"
BEGUN_TAG = "registration_begun_ms"
WRITER_TAG = "registered_by"
CHAMPION_ALIAS = "champion"
DATA_TAG = "data_digest"
KIND_TAG, METRIC_TAG, MODALITY_TAG = "kind", "metric", "modality"
COVERAGE_TAG = "coverage"
"""The share of cases in which a pack's sets hold the right class, if it gives sets."""
FINGERPRINT_TAG = "backbone_fingerprint"
VALIDATION_TAG = "validation"
"""Which samples a pack's recipe was validated on, as a hash."""
OWN_RUN_TAGS = (BEGUN_TAG, WRITER_TAG)
"""What a registration keeps of itself; look-ups leave it out."""
OWN_TAGS = (TASK_TAG, DIGEST_TAG, MODEL_ID_TAG, *OWN_RUN_TAGS)


@dataclass(frozen=True, kw_only=True)
class UsedData:
    """One split that a pack was trained, chosen or tested on. `source` is where the user keeps it,
    `digest` that of the prepared data.
    """

    split: str
    source: str
    digest: str
    samples: int
    classes: int


@dataclass(frozen=True, kw_only=True)
class Champion:
    """A pack to register.

    `ledger` holds bytes by part and sums to `size_bytes`; `metrics` such as test_metric (0 to 1, of
    the metric that the tag `metric` names), test_metric_stderr, val_metric, trained_values,
    search_seconds, fit_seconds; `params` the recipe, flattened; `tags` kind, metric, backbone,
    backbone_fingerprint, data_digest, validation, description, trial, device; `front` one row per
    trial, of which those in `on_front` are beaten by no other in both size and metric; `started` is
    when work on the task began, None for now.

    `outcomes` is the file of the validation outputs, and `level` the budget's: by them, the pack
    competes with those registered before for the alias `champion`. With `promote` it takes the
    alias in any case.
    """

    task: str
    pack_path: Path
    pack_digest: str
    size_bytes: int
    ledger: dict[str, int]
    metrics: dict[str, float]
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    front: list[dict[str, Any]] = field(default_factory=list)
    on_front: tuple[str, ...] = ()
    front_figure: Path | None = None
    data: tuple[UsedData, ...] = ()
    started: datetime | None = None
    outcomes: Path | None = None
    level: float = 0.5
    promote: bool = False

    @property
    def modality(self) -> type[Modality]:
        """What the pack takes."""
        from pipeline.data import MODALITIES

        return MODALITIES[self.tags.get(MODALITY_TAG, "images")]

    def check(self) -> None:
        """Refuse a record that contradicts its file or itself. Raises RegistryError."""
        if not self.pack_path.is_file():
            raise RegistryError(
                f"{self.pack_path}: no such pack file; register the path that packing returned"
            )
        found_bytes = self.pack_path.stat().st_size
        if found_bytes != self.size_bytes:
            raise RegistryError(
                f"{self.pack_path}: given size_bytes {self.size_bytes}, the file has {found_bytes};"
                " pack the task again"
            )
        if sum(self.ledger.values()) != self.size_bytes:
            raise RegistryError(
                f"{self.task}: the byte ledger sums to {sum(self.ledger.values())}, the pack has"
                f" {self.size_bytes} bytes"
            )
        not_finite = sorted(
            name for name, value in self.metrics.items() if not math.isfinite(value)
        )
        if not_finite:
            raise RegistryError(
                f"{self.task}: metrics not finite: {', '.join(not_finite)}; leave out what was not"
                " measured"
            )
        reserved = sorted(set(OWN_TAGS) & self.tags.keys())
        if reserved:
            raise RegistryError(
                f"{self.task}: tags {', '.join(reserved)} are written by the registry itself;"
                " rename yours"
            )

    def all_metrics(self) -> dict[str, float]:
        """`metrics` with `size_bytes` and `bytes_<part>` added."""
        return {
            **self.metrics,
            "size_bytes": self.size_bytes,
            **{f"bytes_{part}": size for part, size in self.ledger.items()},
        }

    def all_tags(self) -> dict[str, str]:
        """`tags` with the two by which the registry finds this pack again."""
        return {**self.tags, TASK_TAG: self.task, DIGEST_TAG: self.pack_digest}


_NAMED_BEFORE = {
    "test_accuracy": "test_metric",
    "test_accuracy_stderr": "test_metric_stderr",
    "val_accuracy": "val_metric",
}


def named_by_role(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a run under their names of today: earlier releases had accuracies only, and called
    them so.
    """
    return {_NAMED_BEFORE.get(name, name): value for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class RegisteredPack:
    """One version of a task's pack, as the registry holds it. `name` is the task's; `model_id`
    names the MLflow LoggedModel with the files.

    `remark` says, where the pack has just been registered, what became of the alias `champion`.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    model_id: str
    task: str
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]
    size_bytes: int
    pack_digest: str
    created: datetime
    remark: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """Its number among the versions, in the order of time."""
        return f"{self.version:09d}"

    @property
    def val_metric(self) -> float | None:
        """The validation metric of the trial it was made of."""
        return self.metrics.get("val_metric")

    @property
    def metric(self) -> str:
        """The name of the metric that its numbers are of; packs registered before there were others
        have accuracy.
        """
        return self.tags.get(METRIC_TAG, "accuracy")

    @property
    def reference(self) -> str:
        """How the command line and the API name this version."""
        return f"{self.name}/{self.version}"

    def shown(self) -> dict[str, str]:
        """The few facts that a list of models should show, as tags."""
        tested = (
            f"{100 * self.metrics['test_metric']:.1f} ±"
            f" {100 * self.metrics.get('test_metric_stderr', 0):.1f} %"
        )
        return {
            "size": f"{self.size_bytes / 1024:.1f} KiB",
            f"test {self.metric}": tested,
            "backbone": self.tags.get("backbone", ""),
        }


def metrics_by_class(metric: str, values: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the registry, one per class: `test_mIoU/road`, with `_` for what MLflow's names
    do not allow, and a number where two classes would share one.
    """
    named: dict[str, float] = {}
    for name, value in values.items():
        allowed = re.sub(r"[^\w. -]", "_", name, flags=re.ASCII)
        key = f"test_{metric}/{allowed}"
        named[f"{key}_{len(named)}" if key in named else key] = value
    return named
