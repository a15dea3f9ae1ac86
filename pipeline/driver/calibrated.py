"""The fitted pack of a task that states a coverage: the same values, and a calibration."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.kinds import Outcomes
from pipeline.packs import ledger, read_pack, write_pack
from pipeline.training.calibrate import calibrate
from pipeline.training.fit import PACK_FILE, FitResult

CALIBRATED_FILE = "calibrated.safetensors"


def with_calibration(
    folder: Path, fitted: FitResult, outcomes: Callable[[], Outcomes | None], coverage: float
) -> tuple[Path, FitResult]:
    """Write the pack of a fit's folder with the calibration of its trial's validation outputs: its
    file, and the fit as that of this file.

    Args:
        outcomes: reads these outputs; None if they are missing or damaged.

    Raises:
        StorageError: the outputs are missing or damaged, or the disk is full.
        SpecError: there are too few of them.
    """
    found = outcomes()
    if found is None:
        raise StorageError(
            f"{folder}: the validation outputs of this trial are missing or damaged, and coverage"
            " needs them; remove the task's study and run it again"
        )
    path = folder / CALIBRATED_FILE
    pack = dataclasses.replace(
        read_pack(folder / PACK_FILE), calibration=calibrate(found, coverage)
    )
    size_bytes = write_pack(path, pack)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, dataclasses.replace(
        fitted, pack_digest=digest, size_bytes=size_bytes, ledger=ledger(pack)
    )
