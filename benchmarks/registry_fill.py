"""A full registry for benchmarks: one pack registered as a batch does it, its rows copied under
other names, ids and numbers.

The rows that a registration wrote are found by comparing every table before and after. Child runs
are copied by the database itself, one statement for each row of the template, since there are
millions of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry

VERSIONS_PER_TASK = 10
TEMPLATE = "template-task"
LEDGER = (
    "positions",
    "values",
    "biases",
    "norms",
    "experts",
    "router",
    "head",
    "probe",
    "metadata",
)
EPOCHS = 9
_ORDER = (
    "runs",
    "logged_models",
    "registered_models",
    "model_versions",
)  # before the tables that refer to them
Row = tuple[Any, ...]


class Database:
    """MLflow's tables, in PostgreSQL or SQLite."""

    def __init__(self, uri: str) -> None:
        self.is_sqlite = uri.startswith("sqlite:")
        self._columns: dict[str, list[str]] = {}
        self._connection: Any = (
            sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
            if self.is_sqlite
            else psycopg.connect(uri.replace("+psycopg", ""), autocommit=True)
        )

    def close(self) -> None:
        """Let go of the database."""
        self._connection.close()

    def rows(self) -> dict[str, list[Row]]:
        """Every row of every table."""
        listing = (
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            if self.is_sqlite
            else "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        )
        tables = self.execute(listing).fetchall()
        return {table: self.execute(f'SELECT * FROM "{table}"').fetchall() for (table,) in tables}

    def columns(self, table: str) -> list[str]:
        """Names of a table's columns, in the order of its rows."""
        if table not in self._columns:
            self._columns[table] = [
                column[0] for column in self.execute(f'SELECT * FROM "{table}" LIMIT 0').description
            ]
        return self._columns[table]

    def insert(self, table: str, rows: list[Row]) -> None:
        """Append rows to a table."""
        if self.is_sqlite:
            with self.transaction():
                self._connection.executemany(
                    f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(rows[0]))})', rows
                )
            return
        with self._connection.cursor().copy(f'COPY "{table}" FROM STDIN') as copy:
            for row in rows:
                copy.write_row(row)

    def execute(self, statement: str, values: Row = ()) -> Any:
        """Run a statement whose values are written `?`."""
        return self._connection.execute(
            statement if self.is_sqlite else statement.replace("?", "%s"), values
        )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements within or none."""
        self.execute("BEGIN")
        yield
        self.execute("COMMIT")

    def analyze(self) -> None:
        """Refresh the statistics that queries are planned by, as a server does by itself after a
        while; SQLite has none unless asked.
        """
        if not self.is_sqlite:
            self.execute("ANALYZE")


def made_champion(folder: Path, task: str, seed: int = 0, trials: int = 0) -> Champion:
    """What a batch registers, with as many numbers, parameters and tags."""
    content = hashlib.shake_256(f"{task} {seed}".encode()).digest(30_000)
    path = folder / f"{task}-{seed}.safetensors"
    path.write_bytes(content)
    ledger = dict.fromkeys(LEDGER, 3_000) | {"metadata": 30_000 - 3_000 * (len(LEDGER) - 1)}
    metrics = {
        "test_metric": 0.9,
        "test_metric_stderr": 0.01,
        "val_metric": 0.9,
        "trained_values": 4e4,
        "search_seconds": 60,
        "fit_seconds": 9,
    }
    row = {
        "point": {"bits": 4, "top_k": 1, "experts": 4},
        "size_bytes": 30_000,
        "state": "complete",
        "val_metric": 0.9,
        "seconds": 5.0,
    }
    curve = [0.1 * epoch for epoch in range(1, EPOCHS + 1)]
    return Champion(
        task=task,
        pack_path=path,
        pack_digest=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        ledger=ledger,
        metrics=metrics,
        params={f"part{index // 5}.setting{index % 5}": str(index) for index in range(20)},
        tags={
            "backbone": "vit",
            "backbone_fingerprint": "f" * 64,
            "data_digest": "d" * 64,
            "description": "a task",
            "trial": "t0",
            "device": "cpu",
        },
        front=[{**row, "id": f"t{index}", "curve": curve} for index in range(trials)],
        on_front=("t0",),
    )


def fill(
    registry: Registry, database: Database, folder: Path, packs: int
) -> dict[str, tuple[float, int]]:
    """Register one pack without child runs, copy its rows `packs` times, delete it; accuracy and
    size in bytes by reference.
    """
    drawn = random.Random(0)
    numbers: dict[str, tuple[float, int]] = {}
    registry.check_writable()
    before = database.rows()
    template = registry.register(made_champion(folder, TEMPLATE), with_trials=False)
    written = _written(before, database.rows())
    run_id = str(written["runs"][0][0])
    copies: dict[str, list[Row]] = {table: [] for table in written}
    for index in range(packs):
        task, version = f"task-{index // VERSIONS_PER_TASK:04d}", index % VERSIONS_PER_TASK + 1
        # Accuracies are counts of 2000 test samples, so some are equal, as in life.
        accuracy, size_bytes = (
            drawn.randint(1000, 2000) / 2000,
            int(1024 * 2 ** drawn.uniform(1, 8)),
        )
        numbers[f"{task}/{version}"] = accuracy, size_bytes
        texts = {
            run_id: uuid.uuid4().hex,
            template.model_id: f"m-{uuid.uuid4().hex}",
            template.pack_digest: hashlib.sha256(f"{task}/{version}".encode()).hexdigest(),
            TEMPLATE: task,
            '"version": 1': f'"version": {version}',
        }
        measured = {
            "test_metric": accuracy,
            "val_metric": accuracy,
            "size_bytes": float(size_bytes),
        }
        for table, rows in _copied(database, written, texts, version, measured):
            copies[table] += rows
    for table in sorted(
        copies, key=lambda table: _ORDER.index(table) if table in _ORDER else len(_ORDER)
    ):
        database.insert(table, copies[table])
    database.analyze()
    registry.client.delete_registered_model(TEMPLATE)
    registry.client.delete_logged_model(template.model_id)
    registry.client.delete_run(run_id)
    return numbers


def add_child_runs(registry: Registry, database: Database, folder: Path, trials: int) -> int:
    """Give every run of a pack `trials` child runs, as a registration writes them; how many there
    are then.
    """
    parents = "SELECT run_uuid FROM tags WHERE key = 'pack_digest'"
    before = database.rows() if trials else {}
    template = registry.register(made_champion(folder, "task-0000", seed=1, trials=trials))
    written = _written(before, database.rows())
    parent = registry.client.get_model_version(template.name, str(template.version)).run_id
    children = [str(row[0]) for row in written["runs"] if str(row[0]) != parent]
    for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
        columns = database.columns(table)
        for row in written[table]:
            named = dict(zip(columns, row, strict=True))
            if named["run_uuid"] in children:
                number = f"{children.index(named['run_uuid']):04x}"
                values = tuple(
                    number if column == "run_uuid" else value
                    for column, value in named.items()
                    if value != parent
                )
                cells = ", ".join(_cell(column, value == parent) for column, value in named.items())
                chosen = f"SELECT run_uuid FROM ({parents}) AS found WHERE run_uuid <> ?"
                database.execute(
                    f'INSERT INTO "{table}" SELECT {cells} FROM ({chosen}) AS parent',
                    (*values, parent),
                )
    database.analyze()
    found = database.execute(
        "SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId'"
    ).fetchone()
    return int(found[0])


def _cell(column: str, is_parent: bool) -> str:
    """One value of a child run's row: its id begins as its parent's does."""
    if is_parent:
        return "parent.run_uuid"
    return "substr(parent.run_uuid, 1, 28) || ?" if column == "run_uuid" else "?"


def _written(before: dict[str, list[Row]], now: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of each table that were not there before."""
    changed = {
        table: list((Counter(rows) - Counter(before.get(table, []))).elements())
        for table, rows in now.items()
    }
    return {table: rows for table, rows in changed.items() if rows}


def _copied(
    database: Database,
    written: dict[str, list[Row]],
    texts: dict[str, str],
    version: int,
    numbers: dict[str, float],
) -> Iterator[tuple[str, list[Row]]]:
    """The template's rows for another pack; those of the registered model only with its first
    version, its alias only with its last.
    """

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
        only_with = {
            "registered_models": 1,
            "registered_model_tags": 1,
            "registered_model_aliases": VERSIONS_PER_TASK,
        }.get(table, version)
        if only_with == version:
            columns = database.columns(table)
            named = [(row, _name_in(row, columns)) for row in rows]
            yield (
                table,
                [
                    tuple(
                        value(each, column, name) for each, column in zip(row, columns, strict=True)
                    )
                    for row, name in named
                ],
            )


def _name_in(row: Row, columns: Sequence[str]) -> Any:
    """The name of the number that a row holds, None if it holds none."""
    return next(
        (
            each
            for each, column in zip(row, columns, strict=True)
            if column in ("key", "metric_name")
        ),
        None,
    )
