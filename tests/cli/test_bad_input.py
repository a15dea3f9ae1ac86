"""What users get wrong: each fault gives one message that says what to do and its exit code, before
any cluster is asked for anything.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers_cli import (
    BACKBONE,
    TASK,
    Answer,
    FinishedRun,
    finished_run,
    free_port,
    new_workdir,
    taskpack,
    write_task,
)
from safetensors.torch import load_file, save_file

from pipeline.data.shards import write_shards
from pipeline.data.sources import encode_png

SCRATCH_MB = 4


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def finished(base: Path) -> FinishedRun:
    return finished_run(base)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault of these may be found only after a cluster was started."""

    def refuse(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipeline.driver.stages.ray_session", refuse)


@pytest.fixture
def workdir(base: Path, tmp_path: Path) -> Path:
    return new_workdir(base, tmp_path)


def refused(answer: Answer, code: int, *words: str) -> None:
    """The command failed with this exit code and these words, which need no programmer."""
    assert answer.code == code, answer.words
    assert all(word in answer.words for word in words), answer.words
    assert "Traceback" not in answer.words
    assert "details in" not in answer.words, "an error without a name"
    assert 0 < len(answer.err.splitlines()) <= 2, answer.err


# --- data -----------------------------------------------------------------------------------------


def image(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def shard(folder: Path, split: str, labels: list[int]) -> Path:
    first = {"train": 0, "test": 10_000}[split]
    numbered = enumerate(labels)
    samples = ((f"{number:06d}", image(first + number), label) for number, label in numbered)
    write_shards(folder, split, samples)
    return folder / f"{split}-000000.tar"


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sound_shards(folder: Path) -> None:
    shard(folder, "train", [0, 1] * 20)
    shard(folder, "test", [0, 1] * 5)


def lose(folder: Path) -> None:
    (folder / "train-000000.tar").unlink()


def empty(folder: Path) -> None:
    (folder / "train-000000.tar").write_bytes(b"")


def no_samples(folder: Path) -> None:
    tar_of(folder / "train-000000.tar", {"README": b"nothing"})


def truncate(folder: Path) -> None:
    os.truncate(folder / "train-000000.tar", 5000)


def undecodable(folder: Path) -> None:
    tar_of(folder / "train-000000.tar", {"a.png": image(0)[:60], "a.cls": b"0"})


def label_outside(folder: Path) -> None:
    shard(folder, "train", [0, 1, 2] * 15)


def class_missing_from_train(folder: Path) -> None:
    shard(folder, "train", [0] * 20 + [2] * 20)


def one_class(folder: Path) -> None:
    shard(folder, "train", [0] * 40)


def few(folder: Path) -> None:
    shard(folder, "train", [0, 1] * 8)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose, ("train-000000.tar: no such shard",)),
        (empty, ("train-000000.tar", "empty (0 bytes)", "prepare it again")),
        (no_samples, ("train-000000.tar", "holds no samples")),
        (truncate, ("train-000000.tar", "truncated", "prepare it again")),
        (undecodable, ("train-000000.tar: a", "cannot be decoded")),
        (label_outside, ("label 2 is outside the 2 classes", "expected 0 to 1")),
        (one_class, ("all training samples are of one class", "expected at least two")),
        (few, ("12 training samples are fewer than", "batch_size = 16", "add samples")),
    ],
)
def test_data_that_cannot_be_used(
    harm: Callable[[Path], None], words: tuple[str, ...], workdir: Path, tmp_path: Path
) -> None:
    sound_shards(tmp_path)
    harm(tmp_path)
    data = {"train": "train-000000.tar", "test": "test-*.tar", "classes": ["left", "right"]}
    task = write_task(tmp_path, data=data, val_fraction=0.25)
    refused(taskpack("run", task, "--workdir", workdir), 3, "bars failed in prepare:", *words)


def test_more_folds_than_a_class_has_samples(workdir: Path, tmp_path: Path) -> None:
    sound_shards(tmp_path)
    data = {"train": "train-*.tar", "test": "test-*.tar", "classes": ["left", "right"]}
    task = write_task(tmp_path, data=data, folds=500)
    refused(
        taskpack("run", task, "--workdir", workdir),
        3,
        "bars failed in prepare:",
        "folds: given 500, but",
        "give at most",
    )


def test_a_class_that_train_lacks(workdir: Path, tmp_path: Path) -> None:
    sound_shards(tmp_path)
    class_missing_from_train(tmp_path)
    task = write_task(tmp_path, data={"train": "train-*.tar", "test": "test-*.tar"})
    refused(
        taskpack("run", task, "--workdir", workdir),
        3,
        "test has classes without a training sample: 1",
    )


def test_sound_shards_are_taken(workdir: Path, tmp_path: Path) -> None:
    sound_shards(tmp_path)
    task = write_task(
        tmp_path, data={"train": "train-*.tar", "test": "test-*.tar", "classes": ["left", "right"]}
    )
    answer = taskpack("plan", task, "--workdir", workdir)
    assert answer.code == 0, answer.words


def test_an_image_to_predict_that_is_none(finished: FinishedRun, tmp_path: Path) -> None:
    text = tmp_path / "note.png"
    text.write_text("not an image")
    refused(
        taskpack("predict", "bars", text, "--workdir", finished.workdir),
        3,
        "note.png: cannot be decoded",
    )
    refused(
        taskpack("predict", "bars", tmp_path / "none.png", "--workdir", finished.workdir),
        3,
        "none.png: no such image",
    )


# --- backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": "vit_tiny_patch16_225"},
            ("backbone.model: given 'vit_tiny_patch16_225'", "did you mean vit_tiny_patch16_224"),
        ),
        (
            {"weights": "none.safetensors"},
            ("none.safetensors", "no such file", "'pretrained' or 'random'"),
        ),
        ({"weights": "text.safetensors"}, ("text.safetensors", "not a readable safetensors file")),
        ({"weights": "other.safetensors"}, ("other.safetensors does not fit", "missing")),
        ({"arguments": {"depht": 2}}, ("backbone.arguments", "do not fit")),
    ],
)
def test_backbones_that_cannot_be_used(
    changes: dict[str, Any], words: tuple[str, ...], workdir: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"head.other": torch.zeros(3)}, tmp_path / "other.safetensors")
    task = write_task(tmp_path, backbone={**BACKBONE, **changes})
    refused(taskpack("run", task, "--workdir", workdir), 4, "bars failed in prepare:", *words)


def checkpoint_of_tiny(path: Path, change: float) -> Path:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE["model"], num_classes=0, **BACKBONE["arguments"])
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["norm.weight"] = state["norm.weight"] + change
    save_file(state, path)
    return path


def test_a_pack_refuses_another_backbone(finished: FinishedRun, tmp_path: Path) -> None:
    other = checkpoint_of_tiny(tmp_path / "other.safetensors", 0.5)
    assert load_file(other)
    picture = tmp_path / "picture.png"
    picture.write_bytes(image(0))
    for arguments in (("verify", "bars"), ("predict", "bars", picture), ("evaluate", "bars")):
        answer = taskpack(*arguments, "--backbone", other, "--workdir", finished.workdir)
        refused(
            answer,
            6,
            "needs the backbone vit_tiny_patch16_224 with fingerprint",
            "give the checkpoint it was trained on",
        )


# --- packs and the registry -----------------------------------------------------------------------


def test_packs_that_are_none(finished: FinishedRun, tmp_path: Path) -> None:
    foreign, cut = tmp_path / "foreign.safetensors", tmp_path / "cut.safetensors"
    foreign.write_bytes(image(0))
    cut.write_bytes(finished.pack.read_bytes()[:-100])
    save_file({"weight": torch.zeros(3)}, tmp_path / "tensors.safetensors")
    for path in (foreign, cut, tmp_path / "tensors.safetensors"):
        refused(taskpack("verify", path, "--workdir", finished.workdir), 6, str(path))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("barz", "did you mean bars"),
        ("bars/7", "newest version: 1"),
        ("bars@best", "aliases: champion"),
    ],
)
def test_names_that_are_not_registered(reference: str, words: str, finished: FinishedRun) -> None:
    for command in ("show", "verify", "evaluate"):
        refused(taskpack(command, reference, "--workdir", finished.workdir), 8, reference, words)


def test_an_mlflow_server_that_does_not_answer(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    refused(
        taskpack("run", finished.task_file, "--workdir", tmp_path / "work"),
        8,
        "the MLflow server cannot be reached",
        "MLFLOW_TRACKING_URI",
    )
    refused(taskpack("ls"), 8, "the MLflow server cannot be reached")
    assert time.monotonic() - started < 30


# --- the cluster ----------------------------------------------------------------------------------


def test_a_ray_cluster_that_does_not_answer(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cluster.session import ray_session

    monkeypatch.setattr("pipeline.driver.stages.ray_session", ray_session)
    monkeypatch.setattr(
        "ray.init", lambda **options: pytest.fail("Ray was asked, and would try for minutes")
    )
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    task, started = write_task(tmp_path), time.monotonic()
    for address, words in (
        (f"127.0.0.1:{free_port()}", "no Ray cluster answers"),
        ("ray://127.0.0.1:10001", "--address auto"),
        ("http://127.0.0.1:8265", "expected auto, or HOST:PORT"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("no-such-host.invalid:6379", "no Ray cluster answers"),
    ):
        refused(
            taskpack("run", task, "--workdir", workdir, "--address", address), 7, address, words
        )
    assert time.monotonic() - started < 30
    assert not (workdir / "data").exists()


# --- what the user wrote --------------------------------------------------------------------------


def test_a_budget_that_nothing_fits(workdir: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path, budget={"max_bytes": "1KiB"})
    refused(
        taskpack("run", task, "--workdir", workdir),
        5,
        "nothing in the search space fits the budget of 1024 bytes",
        "Raise budget.max_bytes",
    )
    sampled = write_task(
        tmp_path, budget={"max_bytes": "1KiB"}, search={**TASK["search"], "trials": 2}
    )
    refused(
        taskpack("run", sampled, "--workdir", workdir),
        5,
        "nothing in the search space fits the budget",
    )
    derived = tmp_path / "derived.yaml"
    keys = ("name", "data", "backbone")
    derived.write_text(yaml.safe_dump({key: TASK[key] for key in keys if key in TASK}))
    refused(
        taskpack("run", derived, "--workdir", workdir, "--max-bytes", "300"),
        5,
        "fits the budget of 300 bytes",
        "parts head, head_bits 1, head_bias False",
        "fewer classes or shorter class names",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serach": {"bits": [4]}}, "did you mean 'search'"),
        ({"recipe": {"connections": {"topk": 1}}}, "did you mean 'top_k'"),
        ({"search": {"bits": [9]}}, "search.bits"),
        ({"name": "Not A Name"}, "name"),
    ],
)
def test_task_files_with_a_fault(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_task(tmp_path, **changes)
    answer = taskpack("run", path, "--workdir", tmp_path / "work")
    refused(answer, 2, str(path), words)
    assert not (tmp_path / "work").exists(), (
        "a fault in a task file must be found before anything is made"
    )


def test_options_with_a_fault(finished: FinishedRun, tmp_path: Path) -> None:
    refused(
        taskpack("ls", "--max-bytes", "lots", "--workdir", finished.workdir),
        2,
        "--max-bytes: given 'lots'",
        "64KiB",
    )
    refused(taskpack("run", tmp_path / "none.yaml"), 2, "none.yaml: no such task file")
    refused(
        taskpack("run", finished.task_file, "--recipe", tmp_path / "none.yaml"),
        2,
        "none.yaml: cannot be read",
    )
    refused(
        taskpack("run", finished.task_file, "--max-bytes", "lots", "--workdir", tmp_path / "w"),
        2,
        "budget.max_bytes",
        "lots",
    )


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few MB, mounted for one test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_MB}m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no block of `disk` free."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(b"\1" * free.f_bavail * free.f_frsize)
    assert os.statvfs(disk).f_bavail == 0


def test_a_disk_that_is_full_before_the_data_is_written(
    small_disk: Path, base: Path, tmp_path: Path
) -> None:
    workdir = new_workdir(base, small_disk)
    task = write_task(tmp_path)
    assert taskpack("ls", "--workdir", workdir).code == 0
    (workdir / ".lock").touch()
    (workdir / "data").mkdir()
    fill(small_disk)
    refused(
        taskpack("run", task, "--workdir", workdir), 9, "No space left on device", "choose another"
    )
    (small_disk / "filler").unlink()
    assert taskpack("plan", task, "--workdir", workdir).code == 0


def test_a_disk_that_is_full_at_the_end_keeps_what_was_finished(
    small_disk: Path, finished: FinishedRun, base: Path
) -> None:
    workdir = new_workdir(base, small_disk)
    for name in ("data", "backbones", "selections", "studies"):
        shutil.copytree(finished.workdir / name, workdir / name)
    shutil.copy(finished.workdir / "writer.json", workdir)
    assert taskpack("ls", "--workdir", workdir).code == 0
    (workdir / ".lock").touch()
    kept = {path: path.read_bytes() for path in workdir.glob("studies/*/*/*") if path.is_file()}
    fill(small_disk)
    answer = taskpack("run", finished.task_file, "--workdir", workdir)
    refused(answer, 8, "bars failed in register", "free space")
    assert {path: path.read_bytes() for path in kept} == kept
    (small_disk / "filler").unlink()
    assert taskpack("run", finished.task_file, "--workdir", workdir).code == 0
    assert taskpack("ls", "--workdir", workdir, "--json").json()[0]["version"] == 1


# --- the time limit -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "-5m", "soon"])
def test_a_time_limit_that_is_no_duration(text: str, tmp_path: Path, workdir: Path) -> None:
    answer = taskpack("run", write_task(tmp_path), "--workdir", workdir, "--time-limit", text)
    refused(answer, 2, f"--time-limit: given '{text}'; expected a duration above 0, such as 90s")


def slow_trials(finished: FinishedRun, folder: Path) -> Path:
    """A copy of the finished work folder in which a single trial, the champion, is on record, and
    took a million seconds.
    """
    workdir = shutil.copytree(finished.workdir, folder / "work")
    (fit,) = workdir.glob("studies/*/fits/*")
    for path in workdir.glob("studies/*/trials/*.json"):
        record = json.loads(path.read_text())
        path.unlink()
        if record["id"] == fit.name:
            path.write_text(json.dumps({**record, "seconds": 1e6}))
    return workdir


def test_a_time_limit_uses_the_trials_there_are(finished: FinishedRun, tmp_path: Path) -> None:
    workdir = slow_trials(finished, tmp_path)
    answer = taskpack("run", finished.task_file, "--workdir", workdir, "--time-limit", "2h")
    assert answer.code == 0, answer.words
    assert "bars: the time limit ended the search after 1 of 8 trials" in answer.out
    assert "the same command with a longer --time-limit, or none, runs the others" in answer.words
    (champion,) = [line for line in answer.out.splitlines() if line.startswith("bars ")]
    assert "1/8" in champion.split()
    assert "1/8" in taskpack("status", "--workdir", workdir).out


def test_a_time_limit_too_short_for_the_fit(finished: FinishedRun, tmp_path: Path) -> None:
    workdir = slow_trials(finished, tmp_path)
    for fit in workdir.glob("studies/*/fits/*"):
        shutil.rmtree(fit)
    answer = taskpack("run", finished.task_file, "--workdir", workdir, "--time-limit", "2h")
    assert answer.code == 12
    assert "the time limit of 2.0 h is too short: a trial takes about 277.8 h here" in answer.words
    assert "give a longer --time-limit" in answer.words


def test_a_time_limit_over_before_a_task_began(tmp_path: Path, workdir: Path, base: Path) -> None:
    task = write_task(tmp_path)
    answer = taskpack("run", task, "--workdir", workdir, "--time-limit", "0.000001")
    refused(answer, 12, "bars: not begun within the time limit of 0 s; the same command")
