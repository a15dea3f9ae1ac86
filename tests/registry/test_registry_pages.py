"""What a user of MLflow's own pages sees of a pack: signature, description, tags, data, times, and
the trials as child runs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_registry import STARTED, champion_with_trials

from pipeline.registry import trial_runs
from pipeline.registry.card import version_card
from pipeline.registry.store import Registry, open_registry


@pytest.fixture
def registry(template: Path, tmp_path: Path) -> Registry:
    shutil.copyfile(template, tmp_path / "mlflow.db")
    return open_registry(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


def children(registry: Registry) -> list[Any]:
    found = registry.client.search_runs([registry.store.experiment_id], "tags.trial_id != ''")
    return sorted(found, key=lambda run: run.data.tags["trial_id"])


def test_a_registered_pack_speaks_for_itself_in_mlflows_pages(
    registry: Registry, tmp_path: Path
) -> None:
    registered = registry.register(champion_with_trials(tmp_path))
    client = registry.client
    version = client.get_model_version("digits", "1")
    assert version.description == version_card(champion_with_trials(tmp_path), 1)
    model = client.get_registered_model("digits")
    assert model.description == "handwritten digits"
    assert model.tags == {
        "size": "0.1 KiB",
        "test accuracy": "91.2 ± 0.8 %",
        "backbone": "vit_tiny",
    }
    run = client.get_run(version.run_id)
    assert run.data.tags["mlflow.note.content"].startswith(
        "handwritten digits\n\n**0.1 KiB** (100 bytes) · test accuracy **91.2"
    )
    experiment = client.get_experiment(registry.store.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.tags["mlflow.note.content"].startswith("One run per registered pack")
    assert run.info.start_time == STARTED.timestamp() * 1000
    assert run.info.end_time > run.info.start_time
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits train", "d" * 36)
    assert json.loads(used.dataset.profile) == {"num_rows": 80, "num_classes": 10}
    assert [tag.value for tag in used.tags] == ["train"]
    assert registered.tags.keys() == {
        "backbone",
        "backbone_fingerprint",
        "description",
        "trial",
        "task",
        "pack_digest",
    }
    assert [pack.name for pack in registry.search()] == ["digits"]


def test_every_trial_that_ran_is_a_child_run(registry: Registry, tmp_path: Path) -> None:
    registry.register(champion_with_trials(tmp_path))
    runs = children(registry)
    assert [run.data.tags["trial_id"] for run in runs] == ["a", "b", "c", "d"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED", "KILLED", "FAILED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {
        registry.client.get_model_version("digits", "1").run_id
    }
    first = runs[0]
    assert first.data.params == {"bits": "1"}
    assert first.data.metrics == {"val_metric": 0.8, "pack_bytes": 60, "seconds": 9}
    assert (first.info.start_time, first.info.end_time) == (int(1e12) - 9000, int(1e12))
    curve = registry.client.get_metric_history(first.info.run_id, "val_metric")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.8)]
    assert runs[3].data.tags["message"] == "diverged"
    assert [run.data.tags["on_front"] for run in runs] == ["true", "true", "false", "false"]
    assert [run.data.tags["champion"] for run in runs] == ["false", "true", "false", "false"]


def test_a_trials_run_says_how_fast_it_was_and_what_its_gpu_did(
    registry: Registry, tmp_path: Path
) -> None:
    usage = {"images_per_second": 2190.5, "waiting": 0.1, "gpu_busy": 0.9, "gpu_memory_bytes": 7}
    champion = champion_with_trials(tmp_path)
    first, *others = champion.front
    registry.register(replace(champion, front=[{**first, **usage}, *others]))
    found = [run.data.metrics for run in children(registry)]
    assert found[0].items() >= usage.items()
    assert not usage.keys() & found[1].keys(), "unknown"


def test_trials_may_be_left_out(registry: Registry, tmp_path: Path) -> None:
    registry.register(champion_with_trials(tmp_path), with_trials=False)
    assert children(registry) == []


@pytest.mark.parametrize("cut", ["a", "c"])
def test_a_registration_that_was_cut_off_logs_no_trial_twice(
    cut: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trial_runs._log_trial

    def cut_off(client: Any, *arguments: Any) -> None:
        if arguments[2]["id"] == cut:  # in the middle of one: created, not ended
            monkeypatch.setattr(
                client, "set_terminated", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        whole(client, *arguments)

    monkeypatch.setattr(trial_runs, "_log_trial", cut_off)
    with pytest.raises(KeyboardInterrupt):
        registry.register(champion_with_trials(tmp_path))
    assert registry.search() == []
    monkeypatch.undo()
    for _ in range(2):
        registry.register(champion_with_trials(tmp_path))
    runs = children(registry)
    assert [run.data.tags["trial_id"] for run in runs] == ["a", "b", "c", "d"]
    assert "RUNNING" not in {run.info.status for run in runs}
    assert len(registry.search()) == 1


def test_the_models_tags_follow_the_champion(registry: Registry, tmp_path: Path) -> None:
    registry.register(champion_with_trials(tmp_path))
    better = replace(
        champion_with_trials(tmp_path),
        pack_digest="other",
        metrics={"test_metric": 0.95, "test_metric_stderr": 0.006, "val_metric": 0.95},
    )
    registry.register(better)
    registry.register(replace(champion_with_trials(tmp_path), pack_digest="worse"))
    assert registry.client.get_registered_model("digits").tags["test accuracy"] == "95.0 ± 0.6 %"


def test_the_card_is_whole_markdown(tmp_path: Path) -> None:
    card = version_card(champion_with_trials(tmp_path), 3)
    assert "**0.1 KiB** (100 bytes) · test accuracy **91.2 ± 0.8 %** (standard error)" in card
    assert "| head | 60 | 60.0 % |\n| biases | 40 | 40.0 % |\n| **file** | **100** |  |" in card
    assert "| training.augment | a\\|b |" in card
    assert "taskpack predict digits/3 image.jpg" in card
    assert "| bits 1 | 60 | 80.0 % |\n| **bits 4** | 100 | 90.0 % |\n" in card
    assert (
        "| part | &emsp;bytes | &emsp;share |\n| --- | ---: | ---: |\n| head | 60 | 60.0 % |"
        in card
    )
    assert "bits 8" not in card
