"""The page of `packs.py`: one section per measurement."""

from __future__ import annotations

import statistics
from typing import Any

from pages import table

FILE_PARTS = ("positions", "values", "head", "probe", "metadata")
TIMES = ("encode_s", "open_s", "open_and_apply_s", "apply_s", "apply_and_undo_s")


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = result["machine"]
    lines = [
        "# Packs",
        "",
        (
            f"`python benchmarks/packs.py` on {machine['cpu']}, {machine['cores']} cores,"
            f" commit {machine['commit']}."
        ),
        "",
        *_positions(result["positions"]),
        *_files(result["files"]),
        *_formats(result["formats"]),
        *_bottleneck(result["bottleneck"]),
        *_time(result["time"]),
        *_simulated(result["simulated"]),
        *_codes(result["codes"]),
        *_sharing(result["sharing"]),
    ]
    return "\n".join(lines)


def _positions(rows: list[dict[str, Any]]) -> list[str]:
    columns = (
        "task",
        "K",
        "positions",
        "coded bytes",
        "bits a position",
        "entropy bytes",
        "coded / entropy",
        "fixed bytes",
        "coded / fixed",
    )
    cells = (
        (
            row["task"],
            row["K"],
            row["positions"],
            row["coded_bytes"],
            f"{row['bits_a_position']:.2f}",
            f"{row['entropy_bytes']:.0f}",
            f"{row['to_entropy']:.3f}",
            f"{row['fixed_bytes']:.0f}",
            f"{row['to_fixed']:.3f}",
        )
        for row in rows
    )
    return [
        "## Positions of real selections",
        "",
        (
            "Embedded ViT (width 192, depth 6). *Entropy*: empirical, of each layer's columns,"
            " their distribution for free. *Fixed*: columns at"
        ),
        "a fixed width. *Coded*: everything that a reader needs.",
        "",
        *table(columns, cells),
        "",
    ]


def _files(rows: list[dict[str, Any]]) -> list[str]:
    cells = (
        (
            row["task"],
            *(row["ledger"][part] for part in FILE_PARTS),
            row["file_bytes"],
            f"{row['bound_bytes']:.0f}",
            f"{row['limit_bytes']:.0f}",
        )
        for row in rows
    )
    return [
        "## Whole files: K = 1, connections and head at 1 bit",
        "",
        (
            "Bound: the positions' entropy, and the codes at their bits. Limit: 1.03 times the"
            " bound, and 1 KiB."
        ),
        "",
        *table(("task", *FILE_PARTS, "file", "bound", "limit"), cells),
        "",
    ]


def _formats(rows: list[dict[str, Any]]) -> list[str]:
    cells = ((row["format"], row["bytes"], f"{row['bytes_a_value']:.2f}") for row in rows)
    return [
        (
            f"## Other layouts of the same connections ({rows[0]['task']}, K = 1,"
            " positions and values)"
        ),
        "",
        *table(("layout", "bytes", "bytes a value"), cells),
        "",
    ]


def _bottleneck(rows: list[dict[str, Any]]) -> list[str]:
    published = statistics.mean(row["published_bytes"] for row in rows)
    ours = statistics.mean(row["file_bytes"] for row in rows)
    most = max(row["file_bytes"] - row["published_bytes"] for row in rows)
    return [
        (
            "## 1-bit bottlenecks of width 32 and a 1-bit head without bias, ViT-B, the 19"
            " tasks of VTAB-1k"
        ),
        "",
        (
            f"Mean of the published layout: {published / 1024:.1f} KiB (task mean; no metadata,"
            f" no check). Mean of packs: {ours / 1024:.1f} KiB, {ours - published:.0f} bytes"
            f" more; at most {most} more, metadata, probe and digest included."
        ),
        "",
    ]


def _time(clock: dict[str, Any]) -> list[str]:
    columns = (
        "bytes",
        "encode ms",
        "open and check ms",
        "open, check and apply ms",
        "apply alone ms",
        "apply and undo ms",
    )
    cells = (clock["bytes"], *(f"{1000 * clock[key]:.1f}" for key in TIMES))
    return [
        "## Time: connections of ViT-B/16 at K = 1 and 1 bit, one core, medians",
        "",
        *table(columns, [cells]),
        "",
    ]


def _simulated(rows: list[dict[str, Any]]) -> list[str]:
    parts = [part for part in rows[0]["ledger"] if any(row["ledger"][part] for row in rows)]
    cells = (
        (
            *(row[key] for key in ("model", "K", "bits", "experts")),
            *(row["ledger"][part] for part in parts),
            sum(row["ledger"].values()),
        )
        for row in rows
    )
    return [
        "## ViT-B/16 and ViT-L/16, simulated, 100 classes, biases at 8 bits",
        "",
        (
            "Columns drawn by Zipf's law, as unequal as those measured. `bits` are those of"
            " connections, adapters and head."
        ),
        "",
        *table(("model", "K", "bits", "experts", *parts, "file"), cells),
        "",
        "![Bytes by part](packs.png)",
        "",
    ]


def _codes(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("bits", *(row["bits"] for row in rows))
    return [
        "## What an entropy coder would save on codes of normal values",
        "",
        *table(columns, [("saved", *(f"{row['saved_share']:.1%}" for row in rows))]),
        "",
    ]


def _sharing(rows: list[dict[str, Any]]) -> list[str]:
    columns = (
        "K",
        "files bytes",
        "positions bytes",
        "column models",
        "identical positions",
        "descriptions",
        "best, of the total",
    )
    cells = (
        (
            *(row[key] for key in ("K", "files_bytes", "positions_bytes")),
            *(f"{size_bytes:.0f}" for size_bytes in row["saved_bytes"].values()),
            f"{row['best_share']:.1%}",
        )
        for row in rows
    )
    return [
        "## One store for many tasks: what a common base would save",
        "",
        (
            "Six tasks on one backbone, connections and head at 1 bit. Column models and"
            " identical positions exclude each other."
        ),
        "",
        *table(columns, cells),
        "",
    ]
