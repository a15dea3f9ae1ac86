"""From a plain script or a notebook: run, find, load and predict, with the same results as the
commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_cli import TIMEOUT_SECONDS, FinishedRun, environment, finished_run, taskpack
from PIL import Image

import pipeline
from pipeline.errors import RegistryError

SCRIPT = """
import json, sys
import pipeline

task_file, workdir = sys.argv[1:]
(outcome,) = pipeline.run([task_file], workdir=workdir)
(found,) = pipeline.find("bars", max_bytes=outcome.registered.size_bytes, workdir=workdir)
predictor = pipeline.load("bars@champion", workdir=workdir)
content = {"found": found == outcome.registered, "error": outcome.error}
print(json.dumps({**content, "classes": predictor.metadata.classes}))
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tmp_path_factory.getbasetemp())


def test_a_plain_script_runs_finds_and_loads(finished: FinishedRun, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-W",
        "error",
        str(script),
        str(finished.task_file),
        str(finished.workdir),
    ]
    done = subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["found"], said["error"], len(said["classes"])) == (True, None, 8)


def test_run_takes_task_files_tasks_and_overrides(finished: FinishedRun) -> None:
    task = pipeline.load_task(finished.task_file)
    stages: list[str] = []
    (from_file,) = pipeline.run([finished.task_file], workdir=finished.workdir)
    (from_task,) = pipeline.run(
        [task],
        workdir=finished.workdir,
        on_progress=lambda task, stage, share, remark: stages.append(stage),
    )
    assert from_file.registered == from_task.registered
    assert from_file.champion_id == from_task.champion_id
    assert stages[-1] == "done"
    (over,) = pipeline.run(
        [finished.task_file], workdir=finished.workdir, overrides={"budget": {"max_bytes": "1KiB"}}
    )
    assert isinstance(over.error, pipeline.TaskpackError)
    assert over.registered is None


def test_find_orders_and_filters(finished: FinishedRun) -> None:
    (pack,) = pipeline.find(workdir=finished.workdir)
    assert pipeline.find(max_bytes=pack.size_bytes - 1, workdir=finished.workdir) == []
    assert pipeline.find(
        "bars", min_metric=pack.metrics["test_metric"], workdir=finished.workdir
    ) == [pack]


def test_load_predicts_from_arrays_bytes_and_files_alike(
    finished: FinishedRun, tmp_path: Path
) -> None:
    predictor = pipeline.load("bars", workdir=finished.workdir)
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    answers = predictor.predict([array, path, str(path), path.read_bytes(), Image.fromarray(array)])
    assert len({answer["label"] for answer in answers}) == 1
    assert [answer["probability"] for answer in answers] == pytest.approx(
        [answers[0]["probability"]] * 5
    )
    assert predictor.predict([]) == []
    shown = taskpack("predict", "bars", path, "--workdir", finished.workdir, "--json").json()[0]
    assert (shown["label"], shown["probability"]) == (
        answers[0]["label"],
        pytest.approx(answers[0]["probability"]),
    )


def test_many_images_are_predicted_as_one_by_one(finished: FinishedRun) -> None:
    predictor = pipeline.load(finished.pack, workdir=finished.workdir)
    images = list(np.random.default_rng(1).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8))
    together = predictor.logits(images)
    alone = [
        predictor.logits([image])[0] for image in (images[0], images[63], images[64], images[129])
    ]
    assert together.shape == (130, 8)
    for row, single in zip((0, 63, 64, 129), alone, strict=True):
        assert together[row].numpy() == pytest.approx(single.numpy(), abs=1e-4)


def test_fetch_brings_the_registered_bytes(finished: FinishedRun) -> None:
    path = pipeline.fetch("bars@champion", workdir=finished.workdir)
    assert path.read_bytes() == finished.pack.read_bytes()
    assert pipeline.fetch(path) == path
    with pytest.raises(RegistryError, match="no task of this name"):
        pipeline.fetch("stars", workdir=finished.workdir)
