"""Registering and finding packs, on a SQLite store: round trips, look-ups by number, every way to
be interrupted, every way to ask wrongly.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from helpers_registry import FRONT, champion

from pipeline.errors import RegistryError
from pipeline.registry import registration
from pipeline.registry.store import Registry, open_registry
from pipeline.registry.tracking import EXPERIMENT
from pipeline.registry.trial_runs import PARENT_TAG


@pytest.fixture
def workdir(template, tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    return folder


@pytest.fixture
def registry(workdir) -> Registry:
    return open_registry(None, workdir)


# --- packs of earlier releases --------------------------------------------------------------------


def test_a_pack_registered_when_accuracy_was_the_only_metric_is_read(
    registry, workdir, tmp_path
) -> None:
    given = champion(tmp_path, accuracy=0.7)
    registry.register(given)
    with contextlib.closing(sqlite3.connect(workdir / "mlflow.db")) as database:
        for table in ("metrics", "latest_metrics"):
            for name in ("test_metric", "test_metric_stderr", "val_metric"):
                database.execute(
                    f"UPDATE {table} SET key = ? WHERE key = ?",
                    (name.replace("metric", "accuracy"), name),
                )
        database.commit()
    old = open_registry(None, workdir)
    assert old.get("digits/1").metrics == {
        **given.metrics,
        "size_bytes": 100,
        "bytes_positions": 30,
        "bytes_head": 70,
    }
    assert (old.get("digits").metric, old.get("digits").val_metric) == ("accuracy", 0.7)
    assert old.search() == [], "numbers are asked for by their names of today"
    better = old.register(champion(tmp_path, accuracy=0.9))
    assert (better.version, better.aliases) == (2, ("champion",))
    assert old.search(after="digits/2") == []


def test_packs_are_found_by_the_metric_that_chose_them(registry, tmp_path) -> None:
    tags = {"kind": "multilabel", "metric": "mAP"}
    found = registry.register(replace(champion(tmp_path, task="scenes"), tags=tags))
    registry.register(
        replace(champion(tmp_path), tags={"kind": "classification", "metric": "accuracy"})
    )
    assert registry.search(metric="mAP") == [found]
    assert found.metric == "mAP"
    assert registry.search(metric="mAP", min_metric=0.95) == []
    assert {pack.name for pack in registry.search()} == {"scenes", "digits"}
    assert "test mAP" in registry.store.client.get_registered_model("scenes").tags
    with pytest.raises(RegistryError, match="no metric is called"):
        registry.search(metric="mAP' OR '1")


# --- round trips ----------------------------------------------------------------------------------


def test_what_is_registered_is_found_again(registry, tmp_path) -> None:
    given = champion(tmp_path)
    registered = registry.register(given)
    assert (
        registered
        == registry.get("digits")
        == registry.get("digits@champion")
        == registry.get("digits/1")
    )
    assert registry.search() == [registered]
    assert (registered.name, registered.task, registered.version, registered.aliases) == (
        "digits",
        "digits",
        1,
        ("champion",),
    )
    assert registered.metrics == {
        **given.metrics,
        "size_bytes": 100,
        "bytes_positions": 30,
        "bytes_head": 70,
    }
    assert registered.params == given.params
    assert registered.tags == {**given.tags, "task": "digits", "pack_digest": given.pack_digest}
    assert (registered.size_bytes, registered.pack_digest) == (100, given.pack_digest)
    assert abs((datetime.now(UTC) - registered.created).total_seconds()) < 60
    copy = registry.download(registered, tmp_path / "new" / "folder")
    assert copy == tmp_path / "new" / "folder" / "digits-1.safetensors"
    assert copy.read_bytes() == given.pack_path.read_bytes()
    assert registry.front(registered) == FRONT
    assert os.listdir() == [], "nothing may appear in the current folder"


def test_what_is_stored_holds_neither_code_nor_pickle_nor_the_users_paths(
    registry, workdir, tmp_path
) -> None:
    registry.register(champion(tmp_path))
    stored = {
        path.relative_to(workdir / "artifacts").parts[-1]: path
        for path in (workdir / "artifacts").rglob("*")
        if path.is_file()
    }
    assert stored.keys() == {
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "pack.safetensors",
        "front.json",
        "front.png",
    } | {
        "input_example.json",
        "serving_input_example.json",
    }
    for name in ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "front.json"):
        assert str(tmp_path) not in stored[name].read_text()
    run = registry.client.search_runs(
        [registry.client.get_experiment_by_name(EXPERIMENT).experiment_id]
    )[0]
    assert run.info.status == "FINISHED"
    assert "mlflow.source.name" not in run.data.tags
    assert run.data.params == {"smoa.bits": "4", "connections.top_k": "3"}


def test_a_better_pack_is_a_second_version_and_takes_the_alias(registry, tmp_path) -> None:
    registry.register(champion(tmp_path, accuracy=0.8))
    second = registry.register(champion(tmp_path, accuracy=0.9))
    assert second.version == 2
    assert registry.get("digits") == second
    assert registry.get("digits/1").aliases == ()


def counts(registry: Registry) -> dict[str, int]:
    experiment_id = registry.client.get_experiment_by_name(EXPERIMENT).experiment_id
    return {
        "runs": sum(
            PARENT_TAG not in run.data.tags for run in registry.client.search_runs([experiment_id])
        ),
        "models": len(registry.client.search_logged_models([experiment_id])),
        "versions": len(registry.client.search_model_versions("")),
    }


def test_the_same_pack_is_written_once(registry, workdir, tmp_path) -> None:
    first = registry.register(champion(tmp_path))
    database = (workdir / "mlflow.db").read_bytes()
    assert registry.register(champion(tmp_path)) == first
    assert (workdir / "mlflow.db").read_bytes() == database


def test_an_older_pack_registered_again_is_written_once_and_takes_the_alias_only_if_promoted(
    registry, tmp_path
) -> None:
    worse = champion(tmp_path, accuracy=0.8)
    registry.register(worse)
    registry.register(champion(tmp_path, accuracy=0.9))
    again = registry.register(worse)
    assert (again.version, again.aliases, registry.get("digits").version) == (1, (), 2)
    promoted = registry.register(replace(worse, promote=True))
    assert (promoted.version, promoted.aliases, registry.get("digits").version) == (
        1,
        ("champion",),
        1,
    )
    assert counts(registry) == {"runs": 2, "models": 2, "versions": 2}


def test_equal_packs_of_two_tasks_stay_apart(registry, tmp_path) -> None:
    one = champion(tmp_path)
    registry.register(one)
    other = registry.register(replace(one, task="letters"))
    assert (other.name, other.version) == ("letters", 1)
    assert counts(registry)["versions"] == 2


# --- interruption ---------------------------------------------------------------------------------


class Crash(Exception):
    pass


class CrashingClient:
    """Lets `calls` calls through and dies before the next."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Crash(name)
            return method(*arguments, **options)

        return call


def test_a_crash_at_any_step_is_mended_by_the_next_registration(registry, tmp_path) -> None:
    client = registry.client
    registry.register(champion(tmp_path, accuracy=0.5))
    for calls in range(100):
        given = champion(tmp_path, accuracy=0.6 + calls / 1000)
        registry.store.client = CrashingClient(client, calls)
        try:
            registry.register(given)
            break
        except Crash:
            registry.store.client = client
        registered = registry.register(given)
        assert [
            found.version
            for found in client.search_model_versions(f"tags.pack_digest = '{given.pack_digest}'")
        ] == [registered.version]
        assert registry.get("digits") == registered
        assert registered in registry.search(task="digits", limit=1000)
        assert registered.version == calls + 2
    assert calls > 12, "the loop must have walked through every step"
    registry.store.client = client
    assert counts(registry) == {"runs": calls + 2, "models": calls + 2, "versions": calls + 2}


def test_an_unfinished_registration_is_not_found(registry, tmp_path) -> None:
    client = registry.client
    for calls in range(9):
        registry.store.client = CrashingClient(client, calls)
        with pytest.raises(Crash):
            registry.register(champion(tmp_path))
    registry.store.client = client
    assert registry.search() == []
    with pytest.raises(RegistryError, match="digits"):
        registry.get("digits")


def test_sqlite_knows_how_many_rows_it_plans_for(registry, workdir, tmp_path) -> None:
    """Without statistics it reads all runs for each row of a metric: minutes among 10,000 packs."""
    for seed in range(3):
        registry.register(champion(tmp_path, seed=seed))
    with contextlib.closing(sqlite3.connect(workdir / "mlflow.db")) as connection:
        for table, index in (
            ("runs", "sqlite_autoindex_runs_1"),
            ("latest_metrics", "index_latest_metrics_run_uuid"),
        ):
            (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            (stat,) = connection.execute(
                "SELECT stat FROM sqlite_stat1 WHERE tbl = ? AND idx = ?", (table, index)
            ).fetchone()
            assert int(stat.split()[0]) == rows


# --- two at once ----------------------------------------------------------------------------------


class InterleavingClient:
    """Before its call number `calls`, lets another driver do all of its work."""

    def __init__(self, client: Any, calls: int, other: Any) -> None:
        self._client, self._left, self._other = client, calls, other

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self._other()
            return method(*arguments, **options)

        return call

    @property
    def was_long_enough(self) -> bool:
        return self._left < 0


@pytest.mark.parametrize("same", [True, False])
def test_two_batches_may_register_a_task_at_once(registry, workdir, tmp_path, same) -> None:
    """Whatever step of one the other falls into: one pack is one version, two packs are two, and
    the alias is on the better one.
    """
    client, other, packs = registry.client, open_registry(None, workdir), 0
    for calls in range(0, 100, 1 if same else 4):
        mine = champion(tmp_path, accuracy=0.5 + calls / 1000)
        theirs = (
            mine
            if same
            else champion(
                tmp_path, accuracy=mine.metrics["val_metric"] + (0.0005 if calls % 8 else -0.0005)
            )
        )
        answers = []
        registry.store.client = InterleavingClient(
            client,
            calls,
            lambda theirs=theirs, answers=answers: answers.append(other.register(theirs)),
        )
        answers.append(registry.register(mine))
        if not registry.client.was_long_enough:
            break
        registry.store.client, packs = client, packs + (1 if same else 2)
        assert {answer.pack_digest for answer in answers} == {mine.pack_digest, theirs.pack_digest}
        assert (
            registry.get("digits").pack_digest
            == max(mine, theirs, key=lambda pack: pack.metrics["val_metric"]).pack_digest
        )
        found = registry.search(task="digits", limit=1000)
        assert len(found) == len({pack.pack_digest for pack in found}) == packs
    assert calls > 12, "the loop must have walked through every step"
    registry.store.client = client
    assert counts(registry) == {"runs": packs + 1, "models": packs + 1, "versions": packs + 1}


def test_what_another_batch_left_is_discarded_when_it_is_old(
    registry, workdir, tmp_path, monkeypatch
) -> None:
    client = registry.client
    registry.store.client = CrashingClient(client, 6)
    with pytest.raises(Crash):
        registry.register(champion(tmp_path))
    registry.store.client = client
    assert counts(registry) == {"runs": 1, "models": 1, "versions": 0}
    monkeypatch.setattr(registration, "_ABANDONED_SECONDS", -60)
    open_registry(None, workdir).register(champion(tmp_path))
    assert counts(registry) == {"runs": 1, "models": 1, "versions": 1}


# --- looking up -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stocked(template, tmp_path_factory) -> Registry:
    """A registry with four tasks, for tests that only read."""
    tmp_path = tmp_path_factory.mktemp("stocked")
    shutil.copyfile(template, tmp_path / "mlflow.db")
    registry = open_registry(None, tmp_path)
    for task, size_bytes, accuracy in [
        ("cars", 9000, 0.70),
        ("pets", 30000, 0.93),
        ("flowers", 9, 0.99),
        ("dtd", 10000, 0.70),
    ]:
        registry.register(champion(tmp_path, task, max(size_bytes, 31), accuracy))
    return registry


def test_numbers_are_compared_as_numbers(stocked) -> None:
    def names(**limits: Any) -> list[str]:
        return [pack.name for pack in stocked.search(**limits)]

    assert names() == ["flowers", "pets", "cars", "dtd"], "best first, of equals the smallest"
    assert names(max_bytes=9999) == [
        "flowers",
        "cars",
    ], "as text, '10000' and '30000' would come before '9999'"
    assert names(max_bytes=10000) == ["flowers", "cars", "dtd"]
    assert names(min_metric=0.93) == ["flowers", "pets"]
    assert names(min_metric=0.9, max_bytes=20000) == ["flowers"]
    assert names(min_metric=1e-9) == names()
    assert names(task="pets") == ["pets"]
    assert names(task="pets", max_bytes=100) == []
    assert names(limit=1) == ["flowers"]


def test_a_deleted_version_is_left_out_without_shortening_the_answer(registry, tmp_path) -> None:
    registry.register(champion(tmp_path, "flowers", accuracy=0.99))
    registry.register(champion(tmp_path, "pets", accuracy=0.93))
    registry.client.delete_registered_model("flowers")
    assert [pack.name for pack in registry.search(limit=1)] == ["pets"]


def test_pages_join_without_gap_or_repetition(registry, tmp_path) -> None:
    """Ties in accuracy and in size, a page that ends inside them, a version deleted, and a pack
    registered between two pages.
    """
    for seed, (size_bytes, accuracy) in enumerate(
        [(100, 0.5), (100, 0.7), (100, 0.7), (90, 0.7), (100, 0.7), (100, 1 / 3), (100, 0.0)]
    ):
        registry.register(champion(tmp_path, f"task{seed}", size_bytes, accuracy, seed))
    whole = registry.search()
    assert len(whole) == 7
    for limit in (1, 2, 3, 7):
        pages, after = [], None
        while page := registry.search(limit=limit, after=after):
            pages += page
            after = f"{page[-1].name}/{page[-1].version}"
        assert pages == whole
    registry.register(champion(tmp_path, "newest", accuracy=0.99))
    registry.client.delete_registered_model(whole[4].name)
    assert registry.search(limit=2, after=f"{whole[3].name}/1") == whole[5:7]
    with pytest.raises(RegistryError, match="no task of this name"):
        registry.search(after="nowhere/1")


def test_a_page_costs_three_requests(registry, tmp_path) -> None:
    for seed in range(5):
        registry.register(champion(tmp_path, f"task{seed}", seed=seed))
    registry.store.client = CrashingClient(registry.client, 3)
    assert len(registry.search()) == 5


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"limit": 0}, "limit"),
        ({"min_metric": 93.0}, "between 0 and 1"),
        ({"min_metric": float("nan")}, "between 0 and 1"),
        ({"task": "x' OR '1'='1"}, "quotes"),
    ],
)
def test_a_look_up_that_makes_no_sense_is_refused(registry, limits, message) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.search(**limits)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("flowres", "did you mean flowers"),
        ("FLOWERS", "did you mean flowers"),
        ("zebra", "taskpack ls"),
        ("flowers/7", "newest version: 1"),
        (
            "flowers@best",
            (
                r"no version has the alias 'best'; give NAME/VERSION \(newest version: 1, aliases:"
                r" champion\)"
            ),
        ),
        ("flowers/0", "newest version: 1"),
        ("flowers/x", "NAME/VERSION"),
        ("", "NAME/VERSION"),
        ("a'b", "NAME/VERSION"),
        ("models:/flowers/1", "NAME/VERSION"),
        ("../flowers", "NAME/VERSION"),
    ],
)
def test_an_absent_pack_is_named_with_what_there_is(stocked, reference, message) -> None:
    with pytest.raises(RegistryError, match=message):
        stocked.get(reference)


def test_a_model_of_someone_else_is_refused(registry, tmp_path) -> None:
    registry.client.create_registered_model("theirs")
    registry.client.create_model_version("theirs", (tmp_path / "theirs").as_uri())
    with pytest.raises(RegistryError, match="did not register"):
        registry.get("theirs/1")
    with pytest.raises(
        RegistryError,
        match=(
            r"no version has the alias 'champion'; give NAME/VERSION \(newest version: 1, aliases:"
            r" none\)"
        ),
    ):
        registry.get("theirs")


# --- damage and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_bytes": 99}, "size_bytes 99, the file has 100"),
        ({"ledger": {"head": 99}}, "ledger sums to 99"),
        ({"pack_path": Path("absent.bin")}, "no such pack"),
        ({"metrics": {"test_metric": float("nan")}}, "test_metric"),
        ({"tags": {"pack_digest": "x"}}, "pack_digest"),
    ],
)
def test_a_champion_that_contradicts_itself_is_refused_and_leaves_nothing(
    registry, tmp_path, change, message
) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.register(replace(champion(tmp_path), **change))
    assert counts(registry) == {"runs": 0, "models": 0, "versions": 0}


def test_a_damaged_artifact_store_is_noticed(registry, workdir, tmp_path) -> None:
    registered = registry.register(champion(tmp_path))
    (stored,) = (workdir / "artifacts").rglob("pack.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(RegistryError, match="99 bytes, registered were 100"):
        registry.download(registered, tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
    shutil.rmtree(workdir / "artifacts")
    with pytest.raises(RegistryError, match="artifact store"):
        registry.download(registered, tmp_path / "copies")
    with pytest.raises(RegistryError, match="artifact store"):
        registry.front(registered)


def test_a_deleted_experiment_is_explained(registry, workdir) -> None:
    registry.client.delete_experiment(
        registry.client.get_experiment_by_name(EXPERIMENT).experiment_id
    )
    with pytest.raises(RegistryError, match="mlflow experiments restore"):
        open_registry(None, workdir)


def test_front_json_is_deterministic(registry, workdir, tmp_path) -> None:
    registry.register(replace(champion(tmp_path), front=[dict(reversed(FRONT[0].items()))]))
    (stored,) = (workdir / "artifacts").rglob("front.json")
    assert stored.read_text() == json.dumps(FRONT, sort_keys=True, indent=1) + "\n"
