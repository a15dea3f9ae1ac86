"""The command line on a finished work folder: every command says what the files and the registry
hold.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers_cli import (
    TRIALS,
    Answer,
    FinishedRun,
    finished_run,
    one,
    taskpack,
    taskpack_process,
    write_task,
)

from pipeline.data import save_samples
from pipeline.errors import SpecError
from pipeline.packs import LEDGER_KEYS, Calibration, read_pack, write_pack
from pipeline.registry.connection import import_pyfunc


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def ask(finished: FinishedRun):
    """A command on the finished work folder."""

    def run(*arguments: str | Path) -> Answer:
        return taskpack(*arguments, "--workdir", finished.workdir)

    return run


@pytest.fixture(scope="session")
def images(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_samples(
        finished.workdir / "data" / "bars", tmp_path_factory.mktemp("images"), count=6
    )


# --- run ------------------------------------------------------------------------------------------


def test_a_run_ends_well_and_says_only_what_it_should(finished: FinishedRun) -> None:
    answer = finished.answer
    assert answer.code == 0, answer.err
    assert answer.err == ""
    lines = answer.out.splitlines()
    logged = [line.split("] ")[1] for line in lines if line.startswith("[")]
    ended = [line for line in logged if line.count(": ") > 1]
    assert [line for line in logged if line not in ended] == [
        f"bars: {stage}" for stage in ("prepare", "select", "search", "fit", "register", "done")
    ]
    assert [line.split()[1] for line in ended] == ["trial"] * TRIALS + ["fit:", "registered"]
    champions = lines[len(logged) :]
    assert [line.strip() for line in champions[:1]] == ["Champions"]
    assert champions[2].startswith("bars ")
    assert f"{TRIALS}/{TRIALS}" in champions[2]
    assert champions[3] == "champion: bars/1"
    assert champions[4] == f"front of bars: {one(finished.workdir.glob('studies/*/front.png'))}"
    assert len(champions) == 5, "a table row was wrapped, or something else was printed"
    assert all(len(line) <= 80 for line in champions[:3])


def test_the_same_run_again_redoes_nothing_and_starts_no_ray(
    finished: FinishedRun, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipeline.driver.stages.ray_session", refuse)
    files = [
        path
        for pattern in ("data/**/*", "selections/*", "studies/*/trials/*", "studies/*/fits/**/*")
        for path in finished.workdir.glob(pattern)
        if path.is_file()
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    answer = ask("run", finished.task_file)
    assert answer.code == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert ask("ls", "--json").json()[0]["version"] == 1


def test_run_as_json_prints_nothing_else_on_stdout(finished: FinishedRun, ask) -> None:
    answer = ask("run", finished.task_file, "--json")
    (outcome,) = answer.json()
    assert (outcome["task"], outcome["error"]) == ("bars", None)
    assert (
        outcome["registered"]["pack_digest"] == ask("show", "bars", "--json").json()["pack_digest"]
    )
    assert len(outcome["trials"]) == TRIALS


def test_another_budget_runs_no_trial_twice(finished: FinishedRun, ask) -> None:
    trials = ask("show", "bars", "--json").json()["trials"]
    smallest = min(trial["size_bytes"] for trial in trials)
    answer = ask("run", finished.task_file, "--max-bytes", str(smallest - 1))
    assert answer.code == 5
    assert f"the smallest pack takes at least {smallest}" in answer.words


# --- ls and show ----------------------------------------------------------------------------------


def test_ls_filters_by_numbers(finished: FinishedRun, ask) -> None:
    (pack,) = ask("ls", "--json").json()
    size_bytes, accuracy = pack["size_bytes"], pack["metrics"]["test_metric"]
    assert size_bytes == finished.pack.stat().st_size
    assert "bars/1" in ask("ls").out
    for arguments, found in (
        (("--max-bytes", str(size_bytes)), 1),
        (("--max-bytes", str(size_bytes - 1)), 0),
        (("--max-bytes", "1MiB"), 1),
        (("--min-metric", str(accuracy)), 1),
        (("--min-metric", str(accuracy + 0.001)), 0),
        (("--task", "bars"), 1),
        (("--task", "stars"), 0),
    ):
        assert len(ask("ls", *arguments, "--json").json()) == found, arguments
    assert ask("ls", "--task", "stars").out.strip() == "no pack matches"


def test_show_accounts_for_every_byte(finished: FinishedRun, ask) -> None:
    content = ask("show", "bars@champion", "--json").json()
    assert (
        sum(content["metrics"][f"bytes_{part}"] for part in LEDGER_KEYS)
        == content["size_bytes"]
        == finished.pack.stat().st_size
    )
    text = ask("show", "bars/1").out
    assert f"{content['size_bytes']:,}" in text
    assert content["pack_digest"] in text, "the digest was broken over two lines"
    assert all(len(line) <= 80 for line in text.splitlines())


def test_show_lists_the_trials_and_marks_the_champion(ask) -> None:
    content = ask("show", "bars", "--json").json()
    rows = ask("show", "bars").out.partition("Trials")[2].splitlines()[2:]
    assert len(rows) == len(content["trials"]) == TRIALS
    (champion,) = [row for row in rows if row.rstrip().endswith("champion")]
    assert f"{content['size_bytes']:,}" in champion.split()


# --- predict, evaluate, verify --------------------------------------------------------------------


def test_predict_classifies_files(ask, images: list[Path]) -> None:
    rows = ask("predict", "bars@champion", *images, "--json").json()
    assert [row["image"] for row in rows] == [str(image) for image in images]
    classes = [f"{180 * number / 8:g}" for number in range(8)]
    assert all(row["label"] in classes and 1 / 8 <= row["probability"] <= 1 for row in rows)
    assert images[0].name in "".join(ask("predict", "bars", images[0]).out.split())


def test_a_pack_file_predicts_as_its_registered_copy(
    finished: FinishedRun, ask, images: list[Path]
) -> None:
    assert (
        ask("predict", finished.pack, *images, "--json").json()
        == ask("predict", "bars@champion", *images, "--json").json()
    )


def test_pyfunc_gives_the_labels_of_predict(
    finished: FinishedRun, ask, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ask("predict", "bars@champion", *images, "--json").json()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.workdir / 'mlflow.db'}")
    model = import_pyfunc().load_model("models:/bars@champion")
    predicted = model.predict({"image": [str(image) for image in images]})
    assert predicted["label"].tolist() == [row["label"] for row in rows]
    assert predicted["probability"].tolist() == pytest.approx(
        [row["probability"] for row in rows], abs=1e-6
    )


def test_evaluate_gives_the_registered_accuracy_to_the_digit(finished: FinishedRun, ask) -> None:
    registered = ask("show", "bars", "--json").json()["metrics"]["test_metric"]
    content = ask("evaluate", "bars@champion", "--json").json()
    assert content["test_metric"] == content["registered_test_metric"] == registered
    assert (content["metric"], content["samples"]) == ("accuracy", 40)
    assert "the same" in ask("evaluate", "bars@champion").out
    from_file = ask("evaluate", finished.pack, "--json").json()
    assert (from_file["test_metric"], from_file["registered_test_metric"]) == (registered, None)
    assert from_file["sets"] is None


def test_evaluate_says_how_often_a_set_holds_the_right_class(
    finished: FinishedRun, ask, tmp_path: Path
) -> None:
    whole = dataclasses.replace(read_pack(finished.pack), calibration=Calibration(0.9, 400))
    path = tmp_path / "calibrated.safetensors"
    write_pack(path, whole)
    sets = ask("evaluate", path, "--json").json()["sets"]
    assert sets == {"stated": 0.9, "found": 1.0, "standard_error": 0.0, "mean_size": 8.0}
    assert (
        "sets hold the right class in 100.0 ± 0.0 % of the samples, stated 90 %; 8.00 classes"
        in ask("evaluate", path).words
    )


def test_evaluate_refuses_other_data_than_the_pack_was_tested_on(
    finished: FinishedRun, ask, tmp_path: Path
) -> None:
    other = write_task(
        tmp_path,
        data={"format": "drawn", "kind": "orientation", "train_samples": 80, "test_samples": 41},
    )
    folder = tmp_path / "work"
    shutil.copytree(finished.workdir, folder, ignore=shutil.ignore_patterns(".lock"))
    answer = taskpack("evaluate", "bars", "--task", other, "--workdir", folder)
    assert answer.code == 3
    assert "is not what the pack was tested on" in answer.words


def test_verify_accepts_a_sound_pack(finished: FinishedRun, ask) -> None:
    answer = ask("verify", "bars@champion")
    assert answer.code == 0
    assert "bars@champion: valid" in answer.out
    assert f"{finished.pack.stat().st_size:,}" in answer.out


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_verify_refuses_a_flipped_byte(
    finished: FinishedRun, ask, tmp_path: Path, share: float
) -> None:
    content = bytearray(finished.pack.read_bytes())
    content[int(share * len(content))] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    answer = ask("verify", damaged)
    assert answer.code == 6
    assert answer.err.startswith(f"error: {damaged}: ")
    assert "Traceback" not in answer.err
    assert answer.out == ""


# --- plan and prepare -----------------------------------------------------------------------------


def test_plan_foretells_the_registered_size_to_the_byte(
    finished: FinishedRun, ask, tmp_path: Path
) -> None:
    shown = ask("show", "bars", "--json").json()
    trained = next(trial for trial in shown["trials"] if trial["id"] == shown["tags"]["trial"])
    plan = ask("plan", finished.task_file, "--json").json()
    assert {"point": trained["point"], "size_bytes": shown["size_bytes"]} in plan["space"]
    assert sorted(row["size_bytes"] for row in plan["space"]) == sorted(
        trial["size_bytes"] for trial in shown["trials"]
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(champion_recipe(finished.pack)))
    planned = ask("plan", finished.task_file, "--recipe", recipe, "--json").json()
    assert planned["ledger"] == {part: shown["metrics"][f"bytes_{part}"] for part in LEDGER_KEYS}


def champion_recipe(pack: Path) -> dict[str, object]:
    from pipeline.packs import read_pack

    return read_pack(pack).metadata.recipe


def test_plan_lists_parts_and_modules(finished: FinishedRun, ask) -> None:
    text = ask("plan", finished.task_file).out
    assert all(part in text for part in ("connections", "adapters", "head", "Search space"))
    assert text.count("fits") == TRIALS
    by_module = ask("plan", finished.task_file, "--modules").out
    assert "blocks.0.attn.qkv" in by_module
    assert "over" in ask("plan", finished.task_file, "--max-bytes", "4KB").out


def test_prepare_writes_shards_and_counts_them(finished: FinishedRun, ask, tmp_path: Path) -> None:
    answer = ask("prepare", finished.task_file, "--out", tmp_path / "bars")
    assert answer.code == 0
    assert "8 classes" in answer.out
    rows = [
        line.split()[:3] for line in answer.out.splitlines() if line.startswith(("train", "test"))
    ]
    assert rows == [["train", "80", "1"], ["test", "40", "1"]]
    same = {
        path.name: path.read_bytes() for path in (finished.workdir / "data" / "bars").glob("*.tar")
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "bars").glob("*.tar")} == same


# --- export ---------------------------------------------------------------------------------------


def test_export_writes_a_registered_pack_as_onnx(ask, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    answer = ask("export", "bars@champion", "--to", "onnx", "--out", tmp_path / "bars.onnx")
    assert answer.code == 0, answer.words
    assert f"bars.onnx: {(tmp_path / 'bars.onnx').stat().st_size:,} bytes" in answer.words
    assert "checked: its logits differ" in answer.words


def test_export_says_what_a_format_has_no_place_for(
    finished: FinishedRun, ask, tmp_path: Path
) -> None:
    answer = ask("export", finished.pack, "--to", "timm", "--out", tmp_path / "bars")
    assert answer.code == 11
    assert "cannot hold the part smoa" in answer.words
    assert ask("export", "bars", "--to", "tflite", "--out", tmp_path / "bars").code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_reaches_the_run_of_a_demo_and_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[object] = []

    def record(*_: object, **options: object) -> None:
        limits.append(options.get("time_limit_seconds", options.get("options")))
        raise SpecError("no more is needed")

    monkeypatch.setattr("pipeline.api.run", record)
    monkeypatch.setattr("pipeline.driver.jobs.describe", record)
    limited = ("--workdir", tmp_path, "--time-limit", "30m")
    task = write_task(tmp_path)
    assert "no more is needed" in taskpack("demo", *limited).err
    assert "no more is needed" in taskpack("submit", task, *limited).err
    assert limits == [1800.0, ["--time-limit", "1800"]]
    for command in (("demo",), ("submit", task)):
        answer = taskpack(*command, "--workdir", tmp_path, "--time-limit", "soon")
        assert (answer.code, "--time-limit: given 'soon'" in answer.err) == (
            SpecError.exit_code,
            True,
        )


# --- as a process ---------------------------------------------------------------------------------


def test_an_error_is_one_message_and_an_exit_code(finished: FinishedRun) -> None:
    answer = taskpack_process("show", "stars", "--workdir", finished.workdir)
    assert answer.code == 8
    assert answer.err.startswith("error: stars: no task of this name is registered")
    assert answer.err.count("\n") == 1
    assert answer.out == ""


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "demo",
        "ls",
        "show",
        "predict",
        "evaluate",
        "verify",
        "export",
        "import",
        "plan",
        "prepare",
        "submit",
        "status",
        "logs",
        "stop",
    ],
)
def test_every_command_has_help(command: str) -> None:
    answer = taskpack(command, "--help")
    assert answer.code == 0
    assert "Usage" in answer.out
