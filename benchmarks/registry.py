"""Look-ups among 10,000 registered packs, on MLflow with users, PostgreSQL and S3, all on this machine.

    python benchmarks/registry.py [--packs 10000] [--auth-cache-seconds 0]

One pack is registered as a batch does it. The rows that this wrote are found by comparing every table before and after, and are copied with other
names, ids and numbers, ten versions a task; that the copies are found and read like registered packs, and in the right order, is checked against a
plain sort here, and against a pack that is then registered among them. Look-ups are those of a user who may only read. --auth-cache-seconds is the
server's setting of how long it remembers that a password was right; 0 is MLflow's default.

Each look-up is repeated more than ten times on each of the server's connections to its database, since psycopg prepares what it is asked five times,
and PostgreSQL may go over to a plan for all values once it has made five for given ones. At the end, MLflow's LoggedModels, which hold the same
numbers, are asked the same, until an answer takes a minute.

Needs PostgreSQL and the extra `dev`. Writes benchmarks/results/registry.json and .md; each setting of the server keeps its own row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from machine import describe_machine

from pipeline.registry.connection import import_mlflow
from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry, open_registry

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "registry.json"
sys.path.append(str(HERE.parent / "tests"))

from helpers_servers import ADMIN, TrackingServer, tracking_server  # noqa: E402

VERSIONS_PER_TASK = 10
TEMPLATE = "template-task"
MAX_BYTES, MIN_METRIC = 24 * 1024, 0.8
ROUNDS = 30
PROCESSES = 7
LOGGED_MODEL_ROUNDS = 60
LOGGED_MODEL_SECONDS = 60
Row = tuple[Any, ...]
LEDGER = ("positions", "values", "biases", "norms", "experts", "router", "head", "probe", "metadata")
LOOK_UPS: dict[str, dict[str, Any]] = {
    "within 24 KiB, at least 80 %": {"max_bytes": MAX_BYTES, "min_metric": MIN_METRIC},
    "the same, second page": {"max_bytes": MAX_BYTES, "min_metric": MIN_METRIC, "after": None},
    "no limit": {},
    "one task": {"task": "task-0007"},
}


def main() -> None:
    """Fill, check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=10_000)
    parser.add_argument("--auth-cache-seconds", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, tracking_server(Path(name), auth_cache_seconds=arguments.auth_cache_seconds) as server:
        os.environ.update(server.as_user(ADMIN))
        registry, folder = open_registry(None, Path(name)), Path(name)
        numbers, fill_seconds = fill(registry, server, folder, arguments.packs)
        check(registry, numbers)
        row = {"packs": arguments.packs, "auth_cache_seconds": arguments.auth_cache_seconds, "fill_seconds": fill_seconds}
        row["register_seconds"] = timed(lambda: registry.register(made_champion(folder, "task-0007", seed=1)))
        check_alike(registry)
        os.environ.update(server.as_user("reader"))
        reader = open_registry(None, folder)
        row |= {"look_ups": measure_look_ups(reader, folder), "commands": measure_commands(), "load_average": os.getloadavg()[0]}
        row["logged_models"] = logged_model_seconds(reader)
    save(row)


# --- filling ----------------------------------------------------------------------------------------------------------------------------------


def made_champion(folder: Path, task: str, seed: int = 0) -> Champion:
    """What a batch registers, with as many numbers, parameters and tags."""
    content = hashlib.shake_256(f"{task} {seed}".encode()).digest(30_000)
    path = folder / f"{task}-{seed}.safetensors"
    path.write_bytes(content)
    ledger = dict.fromkeys(LEDGER, 3_000) | {"metadata": 30_000 - 3_000 * (len(LEDGER) - 1)}
    metrics = {"test_metric": 0.9, "test_metric_stderr": 0.01, "val_metric": 0.9, "trained_values": 4e4, "search_seconds": 60, "fit_seconds": 9}
    row = {"id": "t0", "point": {"bits": 4, "top_k": 1}, "size_bytes": 30_000, "state": "complete", "val_metric": 0.9, "epochs": 9, "seconds": 5.0}
    return Champion(
        task=task,
        pack_path=path,
        pack_digest=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        ledger=ledger,
        metrics=metrics,
        params={f"part{index // 5}.setting{index % 5}": str(index) for index in range(20)},
        tags={"backbone": "vit", "backbone_fingerprint": "f" * 64, "data_digest": "d" * 64, "description": "a task", "trial": "t0", "device": "cpu"},
        front=[row] * 12,
    )


def fill(registry: Registry, server: TrackingServer, folder: Path, packs: int) -> tuple[dict[str, tuple[float, int]], float]:
    """Register one pack, copy its rows `packs` times, delete it; accuracy and size in bytes by reference, and the seconds it took."""
    started, drawn = time.perf_counter(), random.Random(0)
    numbers: dict[str, tuple[float, int]] = {}
    registry.check_writable()
    with psycopg.connect(server.database_uri.replace("+psycopg", ""), autocommit=True) as connection:
        before = all_rows(connection)
        template = registry.register(made_champion(folder, TEMPLATE))
        written = {
            table: rows for table, all_now in all_rows(connection).items() if (rows := list((Counter(all_now) - Counter(before[table])).elements()))
        }
        copies: dict[str, list[Row]] = {table: [] for table in written}
        for index in range(packs):
            task, version = f"task-{index // VERSIONS_PER_TASK:04d}", index % VERSIONS_PER_TASK + 1
            # Accuracies are counts of 2000 test samples, so some are equal, as in life.
            accuracy, size_bytes = drawn.randint(1000, 2000) / 2000, int(1024 * 2 ** drawn.uniform(1, 8))
            numbers[f"{task}/{version}"] = accuracy, size_bytes
            for table, rows in copied(connection, written, template, task, version, {"test_metric": accuracy, "size_bytes": float(size_bytes)}):
                copies[table] += rows
        for table in sorted(copies, key=lambda table: ORDER.index(table) if table in ORDER else len(ORDER)):
            insert(connection, table, copies[table])
        connection.execute("ANALYZE")
    registry.client.delete_registered_model(TEMPLATE)
    registry.client.delete_logged_model(template.model_id)
    registry.client.delete_run(run_of(written))
    return numbers, time.perf_counter() - started


def run_of(written: dict[str, list[Row]]) -> str:
    """The id of the template's run."""
    return str(written["runs"][0][0])


ORDER = ("runs", "logged_models", "registered_models", "model_versions")  # before the tables that refer to them


def all_rows(connection: psycopg.Connection) -> dict[str, list[Row]]:
    """Every row of every table."""
    tables = connection.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'").fetchall()
    return {table: connection.execute(f'SELECT * FROM "{table}"').fetchall() for (table,) in tables}


def copied(
    connection: psycopg.Connection, written: dict[str, list[Row]], template: Any, task: str, version: int, numbers: dict[str, float]
) -> Iterator[tuple[str, list[Row]]]:
    """The template's rows for another pack; those of the registered model only with its first version, its alias only with its last."""
    texts = {
        run_of(written): uuid.uuid4().hex,
        template.model_id: f"m-{uuid.uuid4().hex}",
        template.pack_digest: hashlib.sha256(f"{task}/{version}".encode()).hexdigest(),
        TEMPLATE: task,
        '"version": 1': f'"version": {version}',
    }

    def value(given: Any, column: str, name: str | None) -> Any:
        if column == "version":
            return version
        if column == "input_uuid":
            return uuid.uuid4().hex
        if column in ("value", "metric_value") and isinstance(given, float) and name in numbers:
            return numbers[name]
        if isinstance(given, str):
            for old, new in texts.items():
                given = given.replace(old, new)
        return given

    for table, rows in written.items():
        only_with = {"registered_models": 1, "registered_model_aliases": VERSIONS_PER_TASK}.get(table, version)
        if only_with == version:
            columns = columns_of(connection, table)
            names = [next((row[at] for at, column in enumerate(columns) if column in ("key", "metric_name")), None) for row in rows]
            yield (
                table,
                [tuple(value(each, column, name) for each, column in zip(row, columns, strict=True)) for row, name in zip(rows, names, strict=True)],
            )


_COLUMNS: dict[str, list[str]] = {}


def columns_of(connection: psycopg.Connection, table: str) -> list[str]:
    """Names of a table's columns, in the order of its rows."""
    if table not in _COLUMNS:
        _COLUMNS[table] = [column.name for column in connection.execute(f'SELECT * FROM "{table}" LIMIT 0').description or ()]
    return _COLUMNS[table]


def insert(connection: psycopg.Connection, table: str, rows: list[Row]) -> None:
    """Append rows to a table."""
    with connection.cursor().copy(f'COPY "{table}" FROM STDIN') as copy:
        for row in rows:
            copy.write_row(row)


def check(registry: Registry, numbers: dict[str, tuple[float, int]]) -> None:
    """Copies are packs like the one registered, and the server's answers are those of a plain sort."""
    within = [reference for reference, (accuracy, size_bytes) in numbers.items() if size_bytes <= MAX_BYTES and accuracy >= MIN_METRIC]
    expected = sorted((-numbers[reference][0], numbers[reference][1]) for reference in within)
    pages, after = [], None
    for _ in range(3):
        page = registry.search(max_bytes=MAX_BYTES, min_metric=MIN_METRIC, limit=50, after=after)
        pages += page
        after = f"{pages[-1].name}/{pages[-1].version}"
    found = [(-pack.metrics["test_metric"], pack.size_bytes) for pack in pages]
    assert found == expected[: len(found)], "the server's order is not that of the numbers"
    assert len({(pack.name, pack.version) for pack in pages}) == len(pages)
    one = registry.get("task-0007")
    assert (one.version, one.aliases) == (VERSIONS_PER_TASK, ("champion",))
    assert (len(one.params), len(one.metrics)) == (20, 6 + 1 + len(LEDGER))
    assert one == next(pack for pack in registry.search(task="task-0007") if pack.version == one.version)


def check_alike(registry: Registry) -> None:
    """A pack registered among the copies is the newest of its task and says of itself what they say."""
    registered, copy = registry.get("task-0007"), registry.get(f"task-0007/{VERSIONS_PER_TASK}")
    assert (registered.version, registered.aliases, copy.aliases) == (VERSIONS_PER_TASK + 1, ("champion",), ())
    for said in ("metrics", "params", "tags"):
        assert getattr(registered, said).keys() == getattr(copy, said).keys(), said


# --- measuring --------------------------------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def search_anew(folder: Path, options: dict[str, Any]) -> None:
    """A look-up by a client that has yet to connect."""
    open_registry(None, folder).search(**options, limit=51)


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, smallest and largest of some runs."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": len(seconds)}


def measure_look_ups(registry: Registry, folder: Path) -> dict[str, dict[str, Any]]:
    """50 rows each: a client that is connected, and a new one in the same process."""
    last = registry.search(max_bytes=MAX_BYTES, min_metric=MIN_METRIC, limit=50)[-1]
    found = {}
    for name, options in LOOK_UPS.items():
        options = {**options, "after": f"{last.name}/{last.version}"} if "after" in options else options
        look_up = partial(registry.search, **options, limit=51)
        warm = [timed(look_up) for _ in range(ROUNDS)]
        cold = [timed(partial(search_anew, folder, options)) for _ in range(ROUNDS)]
        found[name] = {
            "warm": spread(warm),
            "cold": spread(cold),
            "requests": requests_of(look_up),
        }
    return found


def requests_of(call: Callable[[], object]) -> int:
    """How many HTTP requests a call makes."""
    import requests

    original, count = requests.Session.request, 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments, **options)

    requests.Session.request = counting  # type: ignore[method-assign]
    try:
        call()
    finally:
        requests.Session.request = original  # type: ignore[method-assign]
    return count


def measure_commands() -> dict[str, dict[str, Any]]:
    """Whole processes, from start to exit."""
    parts = {
        "python": ["-c", "pass"],
        "taskpack --help": ["-m", "pipeline.cli.app", "--help"],
        "import mlflow": ["-c", "from pipeline.registry.connection import import_mlflow; import_mlflow()"],
        "taskpack ls": ["-m", "pipeline.cli.app", "ls", "--max-bytes", str(MAX_BYTES), "--min-metric", str(MIN_METRIC)],
    }
    return {name: spread([process_seconds(command) for _ in range(PROCESSES)]) for name, command in parts.items()}


def process_seconds(arguments: list[str]) -> float:
    """Seconds of a Python process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return timed(lambda: subprocess.run([sys.executable, *arguments], env=environment, cwd=HERE.parent, check=True, capture_output=True))


def logged_model_seconds(registry: Registry) -> list[float | None]:
    """The second page asked of LoggedModels, again and again; None, and no more, once an answer takes LOGGED_MODEL_SECONDS."""
    import requests

    bounds = f"metrics.size_bytes <= {MAX_BYTES} AND metrics.test_metric >= {MIN_METRIC} AND metrics.test_metric <= 0.95"
    registered = "tags.`mlflow.modelVersions` != ''"
    order = [{"field_name": "metrics.test_metric", "ascending": False}, {"field_name": "metrics.size_bytes", "ascending": True}]
    content: dict[str, Any] = {
        "experiment_ids": [registry.store.experiment_id],
        "filter": f"{registered} AND {bounds}",
        "max_results": 64,
        "order_by": order,
    }
    who = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    address, session = f"{registry.store.tracking_uri}/api/2.0/mlflow/logged-models/search", requests.Session()
    taken: list[float | None] = []
    for _ in range(LOGGED_MODEL_ROUNDS):
        try:
            taken.append(timed(lambda: session.post(address, json=content, auth=who, timeout=LOGGED_MODEL_SECONDS).raise_for_status()))
        except requests.Timeout:
            return [*taken, None]
    return taken


# --- the page ---------------------------------------------------------------------------------------------------------------------------------


def save(row: dict[str, Any]) -> None:
    """Put one setting's row in place of its earlier one, and write the page."""
    import_mlflow()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    kept = [each for each in kept if each["auth_cache_seconds"] != row["auth_cache_seconds"]]
    rows = sorted([*kept, {**row, "machine": describe_machine()}], key=lambda each: each["auth_cache_seconds"])
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of all settings."""
    lines = ["# Look-ups in a full registry", ""]
    for row in rows:
        machine, cache = row["machine"], row["auth_cache_seconds"]
        remembered = "hashes the password for every request (MLflow's default)" if cache == 0 else f"remembers a password for {cache} s"
        lines += [
            f"## A server that {remembered}",
            "",
            f"`python benchmarks/registry.py --auth-cache-seconds {cache}` on {machine['cpu']}, {machine['cores']} cores,",
            f"commit {machine['commit']}, beside other work (load average {row['load_average']:.0f}).",
            "",
            f"{row['packs']:,} packs, {VERSIONS_PER_TASK} a task; MLflow with one worker and basic-auth, PostgreSQL",
            "and an S3 store on the same machine. Seconds, medians (smallest to largest).",
            "",
            "| 50 rows of | requests | connected client | new client |",
            "|---|---|---|---|",
            *(f"| {name} | {each['requests']} | {cell(each['warm'])} | {cell(each['cold'])} |" for name, each in row["look_ups"].items()),
            "",
            f"Registering one more pack took {row['register_seconds']:.1f} s.",
            "",
            logged_models_words(row["logged_models"]),
            "",
            "| process | seconds |",
            "|---|---|",
            *(f"| `{name}` | {cell(each)} |" for name, each in row["commands"].items()),
            "",
        ]
    return "\n".join(lines)


def logged_models_words(taken: list[float | None]) -> str:
    """What became of asking LoggedModels."""
    answered = [seconds for seconds in taken if seconds is not None]
    spent = f"{min(answered):.2f} to {max(answered):.2f} s" if answered else "no time"
    words = f"The second page, asked of MLflow's LoggedModels instead of its runs: {len(answered)} answers in {spent}"
    return f"{words}, then none within {LOGGED_MODEL_SECONDS} s." if None in taken else f"{words}."


def cell(measured: dict[str, Any]) -> str:
    """Median with its spread."""
    return f"{measured['median_s']:.2f} ({measured['min_s']:.2f} to {measured['max_s']:.2f}, {measured['runs']} runs)"


if __name__ == "__main__":
    main()
