"""A process killed at any write of a registration, and the next one of the same work folder: MLflow
shows everything exactly once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import environment
from helpers_paths import TESTS
from helpers_registry import TRIALS, champion_with_trials

from pipeline.registry.card import version_card
from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry, open_registry
from pipeline.registry.trial_runs import PARENT_TAG, TRIAL_TAG

RAN = {row["id"]: row for row in TRIALS if row["state"] != "rejected"}
# Registers the same pack in folder after folder, each time in a process of its own that kills
# itself before its n-th commit of something written, until one registers without being killed.
KILLED = """
import itertools, os, shutil, signal, sys
from pathlib import Path

import sqlalchemy
sys.path.insert(0, sys.argv[3])
from helpers_registry import champion_with_trials
from pipeline.registry.connection import import_mlflow, import_pyfunc
from pipeline.registry.store import open_registry

import_mlflow(), import_pyfunc()
folder, template = Path(sys.argv[1]), Path(sys.argv[2])

def register(store, commits):
    shutil.copyfile(template, store / "mlflow.db")
    registry = open_registry(f"sqlite:///{store}/mlflow.db", store, writer="this work folder")
    written, left = False, commits

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
    def note(connection, cursor, statement, *rest):
        nonlocal written
        written = written or statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE"))

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "commit")
    def kill(connection):
        nonlocal written, left
        left -= written
        written = False
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    registry.register(champion_with_trials(folder))

for commits in itertools.count(1, int(sys.argv[4])):
    store = folder / str(commits)
    store.mkdir()
    child = os.fork()
    if child == 0:
        register(store, commits)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 5])
def killed(
    template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """A folder with a store per moment, at every commit or every fifth; only the last registration
    came to its end.
    """
    folder = tmp_path_factory.mktemp("killed")
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(folder),
        str(template),
        str(TESTS),
        str(request.param),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def stores(killed: Path) -> list[Path]:
    return sorted(
        (path.parent for path in killed.glob("*/mlflow.db")), key=lambda path: int(path.name)
    )


def test_each_moment_is_one_of_the_registration(killed: Path) -> None:
    """Runs in the stores grow from none to the pack's and its four trials'; some lack a version."""
    registries = [reopened(store) for store in stores(killed)]
    runs = [len(all_runs(registry)) for registry in registries]
    assert runs == sorted(runs)
    assert (runs[0], runs[-1]) == (0, 1 + len(RAN))
    without_version = [
        len(all_runs(registry))
        for registry in registries
        if not registry.client.search_model_versions("")
    ]
    assert len(set(without_version) & set(range(1, 2 + len(RAN)))) >= 3


def reopened(store: Path) -> Registry:
    return open_registry(f"sqlite:///{store}/mlflow.db", store, writer="this work folder")


def all_runs(registry: Registry) -> list[Any]:
    return list(registry.client.search_runs([registry.store.experiment_id]))


def test_what_was_cut_off_is_there_once_after_the_next_registration(
    killed: Path, tmp_path: Path
) -> None:
    for store in stores(killed):
        copy = tmp_path / store.name
        shutil.copytree(store, copy)
        registry = reopened(copy)
        registered = registry.register(champion_with_trials(killed))
        assert (registered.version, registered.aliases) == (1, ("champion",)), store.name
        check_once(registry, champion_with_trials(killed))


def check_once(registry: Registry, given: Champion) -> None:
    client = registry.client
    (version,) = client.search_model_versions("")
    assert client.get_model_version("digits", "1").description == version_card(given, 1)
    model = client.get_registered_model("digits")
    assert model.tags == {
        "size": "0.1 KiB",
        "test accuracy": "91.2 ± 0.8 %",
        "backbone": "vit_tiny",
    }
    (logged,) = client.search_logged_models([registry.store.experiment_id])
    assert str(logged.status) == "READY"
    runs = all_runs(registry)
    (parent,) = (run for run in runs if PARENT_TAG not in run.data.tags)
    assert (parent.info.run_id, parent.info.status) == (version.run_id, "FINISHED")
    assert all(
        len(client.get_metric_history(version.run_id, key)) == 1 for key in parent.data.metrics
    )
    assert len(parent.inputs.dataset_inputs) == 1
    children = [run for run in runs if run.data.tags.get(PARENT_TAG) == version.run_id]
    assert len(children) == len(runs) - 1 == len(RAN)
    assert {run.data.tags[TRIAL_TAG] for run in children} == RAN.keys()
    for run in children:
        curve = client.get_metric_history(run.info.run_id, "val_metric")
        assert [point.value for point in curve] == RAN[run.data.tags[TRIAL_TAG]]["curve"]
        assert run.info.status in ("FINISHED", "KILLED", "FAILED")
    assert [pack.name for pack in registry.search()] == ["digits"]


def test_what_another_writer_is_at_is_left_alone(killed: Path, tmp_path: Path) -> None:
    """It may be registering the same pack at this moment."""
    store = next(
        store for store in stores(killed) if 2 <= len(all_runs(reopened(store))) <= len(RAN)
    )
    shutil.copytree(store, tmp_path / "copy")
    registry = open_registry(
        f"sqlite:///{tmp_path}/copy/mlflow.db", tmp_path / "copy", writer="another work folder"
    )
    before = {run.info.run_id for run in all_runs(registry)}
    registry.register(champion_with_trials(killed))
    assert before <= {run.info.run_id for run in all_runs(registry)}
