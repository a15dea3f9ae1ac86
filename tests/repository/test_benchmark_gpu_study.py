"""The study of the benchmark for GPUs runs from start to end on a CPU, with a GPU made up."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers_paths import PROJECT_ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RAY_CPUS = 1


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT_ROOT / "benchmarks"))
    return importlib.import_module("gpu_study")


@pytest.fixture
def results(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[dict[str, Any], str]]:
    """A function that runs the study of gpu.py on the CPU and gives its results and page."""

    def run() -> tuple[dict[str, Any], str]:
        given = ["--device", "cpu", "--smoke", "--parts", "study", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
        importlib.import_module("gpu").main()
        path = tmp_path / "gpu-cpu-study-smoke.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return run


@pytest.mark.usefixtures("local_ray")
def test_a_study_of_twelve_trials_is_timed_while_the_card_is_watched(
    study: ModuleType,
    results: Callable[[], tuple[dict[str, Any], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = itertools.chain([0.2, None], itertools.repeat(0.8))
    monkeypatch.setattr(study, "busy_share", lambda device: next(shares))
    monkeypatch.setattr(study, "SAMPLE_SECONDS", 0.05)
    result, page = results()
    found = result["study"]
    assert result["command"].startswith("python benchmarks/gpu.py --device cpu --smoke")
    assert len(found["trials"]) == study.TRIALS
    assert all(trial["images_per_second"] > 0 for trial in found["trials"])
    assert {trial["state"] for trial in found["trials"]} <= {"complete", "stopped"}
    assert found["packs_per_hour"] == pytest.approx(3600 / found["seconds"])
    assert list(found["stages"]) == ["prepare", "select", "search", "fit", "register"]
    total = sum(stage["seconds"] for stage in found["stages"].values())
    assert 0 < total <= found["seconds"] + 0.1
    times, seen = zip(*found["samples"], strict=True)
    assert seen[:2] == (0.2, 0.8)
    assert sorted(times) == list(times)
    assert found["busy"] == pytest.approx(sum(seen) / len(seen))
    assert found["stages"]["search"]["busy"] == pytest.approx(0.8)
    assert "and for 80% of the search; the goal is 70%" in page
    assert page.count("| complete |") + page.count("| stopped |") == study.TRIALS


@pytest.mark.parametrize("name", ["ray.tune", "mlflow"])
def test_where_a_package_is_missing_the_page_says_so(
    name: str,
    results: Callable[[], tuple[dict[str, Any], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    result, page = results()
    assert result["study"] == {"skipped": f"{name} is not installed"}
    assert f"Not run: {name} is not installed." in page


def test_the_task_has_twelve_recipes_and_needs_its_images(
    study: ModuleType, tiny_backbone: Any, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text("path,label\n")
    (tmp_path / "test.csv").write_text("path,label\n")
    setting = study.StudySetting(tiny_backbone, 32, tmp_path, 3, "cuda")
    assert setting.missing() == ""
    task = setting.task()
    assert len(list(task.search.points())) == study.TRIALS
    assert task.data.train == str(tmp_path / "train.csv")
    (tmp_path / "test.csv").unlink()
    assert study.measure_study(setting)["skipped"].startswith(f"there is no {tmp_path}/test.csv")
