"""The benchmark for GPUs runs from start to end where nobody has one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from helpers_paths import PROJECT_ROOT

PARTS = ("--parts", "steps", "selection")


def test_the_gpu_benchmark_runs_on_the_stand_in(
    standin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT_ROOT / "benchmarks"))
    benchmark = importlib.import_module("gpu")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "gpu.py",
            "--device",
            standin,
            "--smoke",
            "--parts",
            "steps",
            "selection",
            "--out",
            str(tmp_path),
        ],
    )
    benchmark.main()
    path = tmp_path / "gpu-stand-in-steps-selection-smoke.json"
    result = json.loads(path.read_text())
    rows = result["steps"]
    assert {(row["batch"], row["variant"]) for row in rows} == {
        (batch, name) for batch in (4, 8) for name in benchmark.VARIANTS
    }
    assert {
        name
        for row in rows
        for name in ["skipped" if "skipped" in row else "median_ms"]
        if row["variant"] != "LoRA r=8 (peft)"
    } == {"median_ms"}
    assert result["selection"]["alike_again"] == 1
    assert result["selection"]["alike_in_bf16"] > 0.5
    assert "| 8 | default recipe | no | bf16 |" in path.with_suffix(".md").read_text()
