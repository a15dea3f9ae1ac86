"""Champions to register, without a training: one with a single trial, one with several."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.registry.pack_record import Champion, UsedData

STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FRONT = [
    {
        "id": "t0",
        "point": {"bits": 4},
        "size_bytes": 100,
        "state": "complete",
        "val_metric": 0.9,
        "epochs": 2,
        "seconds": 1.5,
    }
]

TRIALS: list[dict[str, Any]] = [
    {
        "id": "a",
        "point": {"bits": 1},
        "size_bytes": 60,
        "state": "complete",
        "val_metric": 0.8,
        "curve": [0.5, 0.8],
        "seconds": 9.0,
        "ended": 1e9,
    },
    {
        "id": "b",
        "point": {"bits": 4},
        "size_bytes": 100,
        "state": "complete",
        "val_metric": 0.9,
        "curve": [0.6, 0.9],
        "seconds": 8.0,
        "message": "odd",
    },
    {
        "id": "c",
        "point": {"bits": 8},
        "size_bytes": 150,
        "state": "stopped",
        "val_metric": None,
        "curve": [0.3],
        "seconds": 2.0,
    },
    {
        "id": "d",
        "point": {"bits": 16},
        "size_bytes": 160,
        "state": "failed",
        "val_metric": None,
        "curve": [],
        "message": "diverged",
    },
    {
        "id": "e",
        "point": {"bits": 32},
        "size_bytes": 999,
        "state": "rejected",
        "val_metric": None,
        "curve": [],
        "message": "over budget",
    },
]


def champion(
    folder: Path, task: str = "digits", size_bytes: int = 100, accuracy: float = 0.9, seed: int = 0
) -> Champion:
    content = hashlib.shake_256(f"{task} {seed} {accuracy}".encode()).digest(size_bytes)
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{digest[:12]}.bin"
    path.write_bytes(content)
    figure = folder / "figure.png"
    figure.write_bytes(b"\x89PNG")
    return Champion(
        task=task,
        pack_path=path,
        pack_digest=digest,
        size_bytes=size_bytes,
        ledger={"positions": 30, "head": size_bytes - 30},
        metrics={
            "test_metric": accuracy,
            "val_metric": accuracy,
            "test_metric_stderr": 0.01,
            "trained_parameters": 1234,
        },
        params={"smoa.bits": "4", "connections.top_k": "3"},
        tags={"batch": "b1", "backbone": "f" * 64},
        front=FRONT,
        front_figure=figure,
    )


def champion_with_trials(folder: Path, name: str = "digits") -> Champion:
    pack = folder / f"{name}.bin"
    pack.write_bytes(b"p" * 100)
    return Champion(
        task=name,
        pack_path=pack,
        pack_digest=f"digest of {name}",
        size_bytes=100,
        ledger={"head": 60, "biases": 40, "norms": 0},
        metrics={
            "test_metric": 0.912,
            "test_metric_stderr": 0.008,
            "val_metric": 0.9,
            "trained_values": 1234,
        },
        params={"head.bits": "4", "training.augment": "a|b"},
        tags={
            "backbone": "vit_tiny",
            "backbone_fingerprint": "f" * 64,
            "description": "handwritten digits",
            "trial": "b",
        },
        front=TRIALS,
        on_front=("a", "b"),
        data=(
            UsedData(split="train", source="digits/train", digest="d" * 64, samples=80, classes=10),
        ),
        started=STARTED,
    )
