"""Registering packs on a SQLite store: round trips, every way to be interrupted, two at once."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from helpers_registry import FRONT, champion
from helpers_registry_faults import Crash, CrashingClient, counts

from pipeline.errors import RegistryError
from pipeline.registry import registration
from pipeline.registry.store import open_registry

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


def test_packs_are_found_by_their_backbone(registry, tmp_path) -> None:
    tags = {"backbone_fingerprint": "a" * 64}
    found = registry.register(replace(champion(tmp_path, task="scenes"), tags=tags))
    registry.register(champion(tmp_path))
    assert registry.search(fingerprint="a" * 64) == [found]
    assert registry.search(fingerprint="b" * 64) == []


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
    run = registry.client.get_run(registry.client.get_model_version("digits", "1").run_id)
    assert run.info.status == "FINISHED"
    assert "mlflow.source.name" not in run.data.tags
    assert run.data.params == {"smoa.bits": "4", "connections.top_k": "3"}


def test_a_better_pack_is_a_second_version_and_takes_the_alias(registry, tmp_path) -> None:
    registry.register(champion(tmp_path, accuracy=0.8))
    second = registry.register(champion(tmp_path, accuracy=0.9))
    assert second.version == 2
    assert registry.get("digits") == second
    assert registry.get("digits/1").aliases == ()


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
