"""The numbers of a run among the metrics of Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers_paths import PROJECT_ROOT
from helpers_watch import end_trial, make_study

from pipeline.driver.monitor.batch_watch import BatchWatch
from pipeline.driver.monitor.metrics import GAUGES, STAGES, RayMetrics, ray_metrics
from pipeline.driver.stages import no_progress
from pipeline.specs import Task

RAY_CPUS = 1


def test_without_ray_there_are_no_metrics() -> None:
    import ray

    assert not ray.is_initialized()
    assert ray_metrics("b") is None


def metric_values(text: str) -> dict[tuple[str, str, str], float]:
    """(name, task, state) -> value, of taskpack's series."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name.startswith("ray_taskpack_") and not name.endswith(
            ("_bucket", "_sum")
        ):  # Ray makes the sum up from the buckets
            labels, _, value = rest.rpartition("} ")
            tags = dict(pair.split("=", 1) for pair in labels.split(",") if "=" in pair)
            found[
                name.removeprefix("ray_taskpack_"),
                tags.get("task", '""').strip('"'),
                tags.get("state", '""').strip('"'),
            ] = float(value)
    return found


@pytest.mark.skipif(
    find_spec("aiohttp_cors") is None, reason="a node hands out its metrics with ray[default]"
)
def test_a_node_hands_out_what_the_driver_set(
    local_ray: None, tiny_task: Task, tmp_path: Path
) -> None:
    import ray

    with BatchWatch(tmp_path, "b.1", ["tiny", "other"], on_progress=no_progress) as watch:
        watch.progress("tiny", "search", 0.0, "")
        study = make_study(tiny_task, tmp_path)
        end_trial(study, study.next_trial(), 0.5, 4.0)
        study.next_trial()
        watch.study(study, samples=80, fit_samples=100)
        (node,) = ray.nodes()
        expected = {
            ("stage", "tiny", ""): STAGES.index("search") - 1,
            ("stage", "other", ""): 0,
            ("trials_running", "tiny", ""): 1,
            ("images_per_second", "tiny", ""): 40,
            ("champion_bytes", "tiny", ""): 1000,
            ("champion_val_metric", "tiny", ""): 0.5,
            ("trials_total", "tiny", "complete"): 1,
            ("trial_seconds_count", "", ""): 1,
        }
        deadline = time.monotonic() + 60
        values: dict[tuple[str, str, str], float] = {}
        while values.keys() < expected.keys() and time.monotonic() < deadline:
            time.sleep(0.5)
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            values = metric_values(urllib.request.urlopen(url, timeout=10).read().decode())
        assert values == expected


def test_the_documentation_lists_the_metrics_and_the_numbers_of_stages() -> None:
    page = (PROJECT_ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    names = {*GAUGES, "trials_total", "trial_seconds"}
    assert set(re.findall(r"`ray_taskpack_([a-z_]+)`", page)) == names
    assert ", ".join(f"{number} {stage}" for number, stage in enumerate(STAGES, start=-1)) in page


def test_setting_metrics_costs_microseconds(local_ray: None) -> None:
    metrics = RayMetrics("timed")
    started = time.perf_counter()
    for number in range(1000):
        metrics.set("tiny", champion_bytes=number)
    assert time.perf_counter() - started < 1.0
