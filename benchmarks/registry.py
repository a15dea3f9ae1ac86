"""Look-ups among 10,000 registered packs, without and with the child runs of their trials, on a
server and on a SQLite file.

    python benchmarks/registry.py [--store server|sqlite] [--packs 10000] [--trials 16]
    [--auth-cache-seconds 0]

The server is MLflow with users, PostgreSQL and S3, all on this machine; look-ups are those of a
user who may only read. --auth-cache-seconds is its setting of how long it remembers that a password
was right; 0 is MLflow's default. One pack is registered as a batch does it, and its rows are copied
(registry_fill.py), ten versions per task; that the copies are found and read like registered packs,
and in the right order, is checked against a plain sort here, and against a pack that is then
registered among them. Then every pack gets --trials child runs, and the same look-ups are timed
again: the tables have the seconds without them, with them, and the ratio of the two.

On a server, each look-up is repeated more than ten times on each connection to the database, since
psycopg prepares what it is asked five times, and PostgreSQL may go over to a plan for all values
once it has made five for given ones. At the end, MLflow's LoggedModels, which hold the same
numbers, are asked the same, until an answer takes a minute.

Needs the extra `dev`, and PostgreSQL for the server. Writes benchmarks/results/registry.json and
.md, or registry-sqlite; each setting of the server keeps its own row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe_machine
from registry_fill import LEDGER, VERSIONS_PER_TASK, Database, add_child_runs, fill, made_champion

from pipeline.registry.connection import import_mlflow
from pipeline.registry.store import Registry, open_registry

HERE = Path(__file__).parent
RESULTS = {
    "server": HERE / "results" / "registry.json",
    "sqlite": HERE / "results" / "registry-sqlite.json",
}
sys.path.append(str(HERE.parent / "tests"))

from helpers_servers import ADMIN, tracking_server  # noqa: E402

MAX_BYTES, MIN_METRIC = 24 * 1024, 0.8
ROUNDS = {"server": 30, "sqlite": 5}
PROCESSES = 7
LOGGED_MODEL_ROUNDS = 60
LOGGED_MODEL_SECONDS = 60
LOOK_UPS: dict[str, dict[str, Any]] = {
    "within 24 KiB, at least 80 %": {"max_bytes": MAX_BYTES, "min_metric": MIN_METRIC},
    "the same, second page": {"max_bytes": MAX_BYTES, "min_metric": MIN_METRIC, "after": None},
    "no limit": {},
    "one task": {"task": "task-0007"},
}


def main() -> None:
    """Fill, check, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=("server", "sqlite"), default="server")
    parser.add_argument("--packs", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--auth-cache-seconds", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.store == "sqlite":
            os.environ["MLFLOW_TRACKING_URI"] = database_uri = f"sqlite:///{name}/mlflow.db"
            row = measure(arguments, Path(name), database_uri, as_reader={})
        else:
            with tracking_server(
                Path(name), auth_cache_seconds=arguments.auth_cache_seconds
            ) as server:
                os.environ.update(server.as_user(ADMIN))
                row = measure(
                    arguments, Path(name), server.database_uri, as_reader=server.as_user("reader")
                )
    save(row)


def measure(
    arguments: argparse.Namespace, folder: Path, database_uri: str, as_reader: dict[str, str]
) -> dict[str, Any]:
    """One store filled, checked and timed, without child runs and with them; look-ups are made with
    the settings `as_reader`.
    """
    registry = open_registry(None, folder)
    database = Database(database_uri)
    numbers = fill(registry, database, folder, arguments.packs)
    check(registry, numbers)
    row = {
        key: getattr(arguments, key) for key in ("store", "packs", "trials", "auth_cache_seconds")
    }
    promoted = replace(made_champion(folder, "task-0007", seed=1), promote=True)
    row["register_seconds"] = timed(lambda: registry.register(promoted))
    check_alike(registry)
    writer = dict(os.environ)
    os.environ.update(as_reader)
    rounds = ROUNDS[arguments.store]
    row["without"] = in_new_process(measure_look_ups, folder, rounds)
    os.environ.update(writer)
    row["child_runs"] = add_child_runs(registry, database, folder, arguments.trials)
    database.close()
    check_order(registry, numbers)
    row["register_seconds_with"] = timed(
        lambda: registry.register(
            made_champion(folder, "task-0008", seed=1, trials=arguments.trials)
        )
    )
    os.environ.update(as_reader)
    row |= {
        "with": in_new_process(measure_look_ups, folder, rounds),
        "commands": measure_commands(),
        "load_average": os.getloadavg()[0],
    }
    row["logged_models"] = logged_model_seconds(open_registry(None, folder)) if as_reader else []
    return row


# --- checking -------------------------------------------------------------------------------------


def check(registry: Registry, numbers: dict[str, tuple[float, int]]) -> None:
    """Copies are packs like the one registered, and the server's answers are those of a plain
    sort.
    """
    check_order(registry, numbers)
    one = registry.get("task-0007")
    assert (one.version, one.aliases) == (VERSIONS_PER_TASK, ("champion",))
    assert (len(one.params), len(one.metrics)) == (20, 6 + 1 + len(LEDGER))
    assert one == next(
        pack for pack in registry.search(task="task-0007") if pack.version == one.version
    )


def check_order(registry: Registry, numbers: dict[str, tuple[float, int]]) -> None:
    """The first pages are those of a plain sort."""
    within = [
        reference
        for reference, (accuracy, size_bytes) in numbers.items()
        if size_bytes <= MAX_BYTES and accuracy >= MIN_METRIC
    ]
    expected = sorted((-numbers[reference][0], numbers[reference][1]) for reference in within)
    pages, after = [], None
    for _ in range(3):
        page = registry.search(max_bytes=MAX_BYTES, min_metric=MIN_METRIC, limit=50, after=after)
        pages += page
        after = f"{pages[-1].name}/{pages[-1].version}"
    found = [(-pack.metrics["test_metric"], pack.size_bytes) for pack in pages]
    assert found == expected[: len(found)], "the server's order is not that of the numbers"
    assert len({(pack.name, pack.version) for pack in pages}) == len(pages)


def check_alike(registry: Registry) -> None:
    """A pack registered among the copies is the newest of its task and says of itself what they
    say.
    """
    registered, copy = registry.get("task-0007"), registry.get(f"task-0007/{VERSIONS_PER_TASK}")
    assert (registered.version, registered.aliases, copy.aliases) == (
        VERSIONS_PER_TASK + 1,
        ("champion",),
        (),
    )
    for said in ("metrics", "params", "tags"):
        assert getattr(registered, said).keys() == getattr(copy, said).keys(), said


# --- measuring ------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, smallest and largest of some runs."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": len(seconds),
    }


def in_new_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns there: a connection to SQLite keeps the statistics that it found when it
    was opened.
    """
    with ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(call, *arguments).result()


def measure_look_ups(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Pages of 50 rows and one champion, each by a client that is connected and by a new one in the
    same process.
    """
    registry = open_registry(None, folder)
    last = registry.search(max_bytes=MAX_BYTES, min_metric=MIN_METRIC, limit=50)[-1]
    calls: dict[str, Callable[[Registry], object]] = {}
    for name, options in LOOK_UPS.items():
        options = (
            {**options, "after": f"{last.name}/{last.version}"} if "after" in options else options
        )
        calls[name] = partial(Registry.search, **options, limit=51)
    calls["the champion of one task"] = partial(Registry.get, reference="task-0009@champion")
    found = {}
    for name, call in calls.items():
        warm = [timed(partial(call, registry)) for _ in range(rounds)]
        cold = [timed(lambda call=call: call(open_registry(None, folder))) for _ in range(rounds)]  # type: ignore[misc]
        found[name] = {
            "warm": spread(warm),
            "cold": spread(cold),
            "requests": requests_of(partial(call, registry)),
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
        "import mlflow": [
            "-c",
            "from pipeline.registry.connection import import_mlflow; import_mlflow()",
        ],
        "taskpack ls": [
            "-m",
            "pipeline.cli.app",
            "ls",
            "--max-bytes",
            str(MAX_BYTES),
            "--min-metric",
            str(MIN_METRIC),
        ],
    }
    return {
        name: spread([process_seconds(command) for _ in range(PROCESSES)])
        for name, command in parts.items()
    }


def process_seconds(arguments: list[str]) -> float:
    """Seconds of a Python process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return timed(
        lambda: subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=HERE.parent,
            check=True,
            capture_output=True,
        )
    )


def logged_model_seconds(registry: Registry) -> list[float | None]:
    """The second page asked of LoggedModels, again and again; None, and no more, once an answer
    takes LOGGED_MODEL_SECONDS.
    """
    import requests

    bounds = (
        f"metrics.size_bytes <= {MAX_BYTES} AND metrics.test_metric >= {MIN_METRIC} AND"
        " metrics.test_metric <= 0.95"
    )
    registered = "tags.`mlflow.modelVersions` != ''"
    order = [
        {"field_name": "metrics.test_metric", "ascending": False},
        {"field_name": "metrics.size_bytes", "ascending": True},
    ]
    content: dict[str, Any] = {
        "experiment_ids": [registry.store.experiment_id],
        "filter": f"{registered} AND {bounds}",
        "max_results": 64,
        "order_by": order,
    }
    who = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    address, session = (
        f"{registry.store.tracking_uri}/api/2.0/mlflow/logged-models/search",
        requests.Session(),
    )
    taken: list[float | None] = []
    for _ in range(LOGGED_MODEL_ROUNDS):
        try:
            taken.append(
                timed(
                    lambda: session.post(
                        address, json=content, auth=who, timeout=LOGGED_MODEL_SECONDS
                    ).raise_for_status()
                )
            )
        except requests.Timeout:
            return [*taken, None]
    return taken


# --- the page -------------------------------------------------------------------------------------


def save(row: dict[str, Any]) -> None:
    """Put one setting's row in place of its earlier one, and write the page."""
    import_mlflow()
    path = RESULTS[row["store"]]
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [
        each
        for each in kept
        if "without" in each and each["auth_cache_seconds"] != row["auth_cache_seconds"]
    ]
    rows = sorted(
        [*rows, {**row, "machine": describe_machine()}], key=lambda each: each["auth_cache_seconds"]
    )
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of all settings."""
    lines = ["# Look-ups in a full registry", ""]
    for row in rows:
        machine = row["machine"]
        options = f"--store {row['store']} --auth-cache-seconds {row['auth_cache_seconds']}"
        lines += [
            f"## {_title(row)}",
            "",
            (
                f"`python benchmarks/registry.py {options}` on {machine['cpu']}, {machine['cores']}"
                " cores,"
            ),
            (
                f"commit {machine['commit']}, beside other work (load average"
                f" {row['load_average']:.0f})."
            ),
            "",
            (
                f"{row['packs']:,} packs, {VERSIONS_PER_TASK} per task, first without child runs,"
                f" then with {row['child_runs']:,} of them."
            ),
            "Seconds, medians (smallest to largest).",
            "",
            (
                "| look-up | requests | without child runs | with child runs | ratio | with, new"
                " client |"
            ),
            "|---|---|---|---|---|---|",
            *(_line(name, row["without"][name], row["with"][name]) for name in row["with"]),
            "",
            (
                f"Registering one more pack took {row['register_seconds']:.1f} s, with"
                f" {row['trials']} trials {row['register_seconds_with']:.1f} s."
            ),
            "",
            *([logged_models_words(row["logged_models"]), ""] if row["logged_models"] else []),
            "| process | seconds |",
            "|---|---|",
            *(f"| `{name}` | {cell(each)} |" for name, each in row["commands"].items()),
            "",
        ]
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    if row["store"] == "sqlite":
        return "A SQLite file, without a server"
    cache = row["auth_cache_seconds"]
    remembered = (
        "hashes the password for every request (MLflow's default)"
        if cache == 0
        else f"remembers a password for {cache} s"
    )
    return f"MLflow with users, PostgreSQL and S3; the server {remembered}"


def _line(name: str, without: dict[str, Any], with_children: dict[str, Any]) -> str:
    ratio = with_children["warm"]["median_s"] / without["warm"]["median_s"]
    shown = [
        cell(without["warm"]),
        cell(with_children["warm"]),
        f"{ratio:.2f}",
        cell(with_children["cold"]),
    ]
    return f"| {name} | {with_children['requests']} | {' | '.join(shown)} |"


def logged_models_words(taken: list[float | None]) -> str:
    """What became of asking LoggedModels."""
    answered = [seconds for seconds in taken if seconds is not None]
    spent = f"{min(answered):.2f} to {max(answered):.2f} s" if answered else "no time"
    words = (
        f"The second page, asked of MLflow's LoggedModels instead of its runs: {len(answered)}"
        f" answers in {spent}"
    )
    return f"{words}, then none within {LOGGED_MODEL_SECONDS} s." if None in taken else f"{words}."


def cell(measured: dict[str, Any]) -> str:
    """Median with its spread."""
    return (
        f"{measured['median_s']:.2f} ({measured['min_s']:.2f} to {measured['max_s']:.2f},"
        f" {measured['runs']} runs)"
    )


if __name__ == "__main__":
    main()
