"""The registry on a server as a team has it: MLflow with users, PostgreSQL, S3. A whole batch,
look-ups, and everybody who is turned away.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import ONE_CPU, Answer, environment, taskpack, write_task
from helpers_registry import champion
from helpers_servers import ADMIN, TrackingServer, tracking_server, why_not

from pipeline.registry.failures import set_despite_race
from pipeline.registry.store import Registry, open_registry

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

# Ray's own processes and files are closed by Ray, some of them late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TASKS = ("bars", "spokes")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with tracking_server(tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.fixture(scope="module")
def batch(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Two small tasks, run by a user who is no administrator."""
    folder = tmp_path_factory.mktemp("batch")
    recipe = {
        "connections": {"top_k": 1},
        "training": {"epochs": 4, "batch_size": 16, "precision": "fp32"},
    }
    files = [
        write_task(folder, name=name, seed=seed, recipe=recipe, search={"bits": [2, 8]})
        for seed, name in enumerate(TASKS)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.as_user("writer"), **ONE_CPU}.items():
            patch.setenv(name, value)
        return taskpack("run", *files, "--workdir", folder / "work", "--json")


@pytest.fixture
def ask(server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function (arguments, user) -> the answer of a command given by that user; no answer may
    hold a secret.
    """

    def ask(*arguments: str | Path, user: str = "reader", **changes: str) -> Answer:
        for name, value in {**server.as_user(user), **changes}.items():
            monkeypatch.setenv(name, value)
        answer = taskpack(*arguments, "--workdir", tmp_path / "work")
        for secret in (
            server.admin_password,
            *server.passwords.values(),
            *server.s3.values(),
            "X-Amz-Signature=",
        ):
            if secret not in ("us-east-1", server.s3["MLFLOW_S3_ENDPOINT_URL"]):
                assert secret not in answer.out + answer.err
        return answer

    return ask


def test_a_batch_is_registered_with_its_files_in_the_store(
    batch: Answer, server: TrackingServer
) -> None:
    assert batch.code == 0, batch.err
    sizes = [outcome["registered"]["size_bytes"] for outcome in batch.json()]
    assert sorted(sizes) == sorted(
        size for key, size in server.stored().items() if key.endswith("/data/pack.safetensors")
    )


def test_packs_are_found_by_numbers_by_one_who_may_only_read(batch: Answer, ask) -> None:
    packs = {outcome["task"]: outcome["registered"] for outcome in batch.json()}
    smallest = min(pack["size_bytes"] for pack in packs.values())
    best = max(pack["metrics"]["test_metric"] for pack in packs.values())
    for arguments, found in (
        ((), set(TASKS)),
        (
            ("--max-bytes", str(smallest)),
            {name for name, pack in packs.items() if pack["size_bytes"] == smallest},
        ),
        (("--max-bytes", str(smallest - 1)), set()),
        (
            ("--min-metric", str(best)),
            {name for name, pack in packs.items() if pack["metrics"]["test_metric"] == best},
        ),
        (("--max-bytes", "1MiB", "--min-metric", "0", "--task", "spokes"), {"spokes"}),
    ):
        rows = ask("ls", *arguments, "--json").json()
        assert {row["name"] for row in rows} == found, arguments
        assert all(
            row["aliases"] == ["champion"] and row == {**packs[row["name"]], "remark": ""}
            for row in rows
        )


def test_pages_go_on_behind_a_pack(batch: Answer, ask) -> None:
    first = ask("ls", "--limit", "1")
    (row,) = ask("ls", "--limit", "1", "--json").json()
    assert f"continue with --after {row['name']}/1" in first.words
    second = ask("ls", "--limit", "1", "--after", f"{row['name']}/1", "--json")
    assert {row["name"], second.json()[0]["name"]} == set(TASKS)
    assert "--after" not in second.err


def test_ls_does_not_import_mlflow(batch: Answer, server: TrackingServer, tmp_path: Path) -> None:
    """The import takes longer than the look-up."""
    listing = ["taskpack", "ls", "--json", "--workdir", str(tmp_path)]
    script = (
        f"import sys; sys.argv = {listing}; from pipeline.cli.app import app;"
        " app(standalone_mode=False); sys.exit('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(**server.as_user("reader")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {row["name"] for row in json.loads(done.stdout)} == set(TASKS)


def test_a_pack_is_downloaded_and_opened(batch: Answer, ask) -> None:
    assert "bars@champion: valid" in ask("verify", "bars@champion").words
    assert ask("show", "spokes", "--json").json()["trials"]


def test_who_is_not_known_is_told_what_to_set(batch: Answer, ask) -> None:
    for wrong in (
        {"MLFLOW_TRACKING_PASSWORD": "not-this-one"},
        {"MLFLOW_TRACKING_USERNAME": "nobody-i-know"},
        {"MLFLOW_TRACKING_USERNAME": ""},
    ):
        answer = ask("ls", **wrong)
        assert answer.code == 8
        assert (
            "does not know this user and password; check MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD" in answer.words
        )
        assert "not-this-one" not in answer.out + answer.err


def test_who_may_only_read_is_told_so_before_anything_is_trained(
    batch: Answer, ask, tmp_path: Path
) -> None:
    answer = ask("run", write_task(tmp_path))
    assert answer.code == 8
    assert (
        "does not permit this (Permission denied); look-ups need READ, runs EDIT, on the experiment"
        " taskpack" in answer.words
    )
    assert not (tmp_path / "work" / "data").exists()


def test_one_pack_registered_by_two_at_once_is_one_version(
    batch: Answer, server: TrackingServer, tmp_path: Path, monkeypatch
) -> None:
    for name, value in server.as_user("writer").items():
        monkeypatch.setenv(name, value)
    registries = [open_registry(None, tmp_path) for _ in range(3)]
    given, start = champion(tmp_path, "raced"), threading.Barrier(3)

    def register(registry: Registry) -> int:
        start.wait(60)
        return registry.register(given).version

    with ThreadPoolExecutor(3) as pool:
        versions = list(pool.map(register, registries))
    client = registries[0].client
    (left,) = client.search_model_versions("name = 'raced'")
    assert versions == [int(left.version)] * 3
    assert left.tags["pack_digest"] == given.pack_digest
    assert client.get_registered_model("raced").aliases == {"champion": left.version}
    assert len(registries[0].search(task="raced")) == 1


def test_tags_and_aliases_that_many_set_at_once_are_set(
    batch: Answer, server: TrackingServer, tmp_path: Path, monkeypatch
) -> None:
    """PostgreSQL refuses some of these writers (about one new value in three)."""
    for name, value in server.as_user("writer").items():
        monkeypatch.setenv(name, value)
    clients = [open_registry(None, tmp_path).client for _ in range(6)]
    start = threading.Barrier(len(clients))

    def write(client: Any) -> None:
        for number in range(12):
            start.wait(60)
            set_despite_race(client.set_registered_model_tag, "bars", f"tag-{number}", "set")
            set_despite_race(client.set_registered_model_alias, "bars", f"alias-{number}", "1")

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(write, clients))
    model = clients[0].get_registered_model("bars")
    assert {f"tag-{number}" for number in range(12)} <= model.tags.keys()
    assert {f"alias-{number}" for number in range(12)} <= model.aliases.keys()


def test_what_is_away_is_named(batch: Answer, server: TrackingServer, ask, tmp_path: Path) -> None:
    """The S3 store, then PostgreSQL, then MLflow end. This test is the file's last."""
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    for process, arguments, words in (
        (server.store, ("show", "bars"), "its artifact store does not answer"),
        (
            server.postgres,
            ("ls",),
            (
                "the MLflow server cannot answer now (too many 503 error responses); see whether"
                " its database runs"
            ),
        ),
        (server.mlflow, ("ls",), "the MLflow server cannot be reached; check that it runs"),
    ):
        process.stop()
        started = time.monotonic()
        answer = ask(*arguments, user=ADMIN, **impatient)
        assert answer.code == 8
        assert words in answer.words
        assert time.monotonic() - started < 60
