"""The page of `scale.py`, and its tables in docs/scale.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pages import table

DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    machine = result["machine"]
    lines = [
        "# Scale, on paper",
        "",
        (
            f"{machine['cpu']}, {machine['cores']} cores shared with other work; torch"
            f" {machine['torch']}; commit {machine['commit']}."
            + "".join(f" {part}: commit {commit}." for part, commit in result["again"].items())
        ),
        (
            f"Simulated: {result['tasks']:,} tasks of {result['trials']} trials on"
            f" {result['gpus']} GPUs."
        ),
        "",
        markdown_tables(result),
        "",
    ]
    return "\n".join(lines)


def write_document(result: dict[str, Any]) -> None:
    """Put the tables between the marks of docs/scale.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    marked = f"<!-- tables -->\n\n{markdown_tables(result)}\n\n<!-- end of tables -->"
    DOCUMENT.write_text(
        re.sub(r"<!-- tables -->.*<!-- end of tables -->", lambda _: marked, text, flags=re.DOTALL),
        encoding="utf-8",
    )


def markdown_tables(result: dict[str, Any]) -> str:
    """The tables of costs, of limits and of simulated batches."""
    measured, tasks = result["measured"], result["tasks"]
    seconds, sizes = _seconds(measured, tasks), _sizes(measured, tasks)
    kib = ((name, f"{size / 1024:,.1f}") for name, size in sizes.items())
    limits = ((line["part"], line["asked"], line["limit"]) for line in result["limits"])
    lines = [
        *table(
            ("the driver's time for", "ms"),
            ((name, f"{1000 * taken:,.3g}") for name, taken in seconds.items()),
        ),
        "",
        *table(("bytes of", "KiB"), kib),
        "",
        *table(("part", "asked of it", "limit"), limits),
        "",
        *_batches(result["simulated"]),
    ]
    return "\n".join(lines)


def _seconds(measured: dict[str, Any], tasks: int) -> dict[str, float]:
    study, watch, registry = (measured[key] for key in ("study", "watch", "registry"))
    task = measured["task"]["seconds"]
    return {
        "a result of a trial, after every epoch": study["result"],
        "a trial: started, ended, its record written": study["trial"],
        "a study: set up and taken down": study["study"],
        "a second of one study in which nothing comes": study["silent_second"],
        "open a task of 1,000 images": task["open"],
        "propose 16 trials": task["plan"],
        "derive a search space for ViT-B and rehearse its recipes, in a worker": task["check"],
        "code the positions of a selection of ViT-B, in a worker": task["code"],
        "size 36 recipes of ViT-B, in a worker": task["list"],
        "read a selection of ViT-B, K = 3": task["selection_read"],
        "choose among 16 trials by 10,000 images of 100 classes, in a worker": task["champion"],
        "draw a front, in a worker": task["front"],
        "write a trial's record": task["record_write"],
        "report progress to the watch": watch["report"],
        f"write the state of {tasks:,} tasks, once a second": watch["state_write"],
        "register a pack of 16 trials, embedded registry": registry["embedded_register_driver"],
        "register a pack of 16 trials, server": registry["server_register_driver"],
        "register a pack, embedded registry (wall time)": registry["embedded_register"],
        "register a pack, server (wall time)": registry["server_register"],
        "look packs up by numbers, server (wall time)": registry["server_search"],
    }


def _sizes(measured: dict[str, Any], tasks: int) -> dict[str, int]:
    sizes = measured["task"]["bytes"]
    return {
        "backbone ViT-B": sizes["backbone"],
        "selection, K = 3": sizes["selection"],
        "shards of 1,000 drawn images of 224 px": sizes["shards"],
        "pack, connections at 4 bits and K = 3, random places": sizes["pack"],
        "record of a trial": sizes["record"],
        "arguments of a trial": sizes["arguments"],
        "result of an epoch": sizes["result"],
        "result of a fit": sizes["fit_result"],
        f"state of {tasks:,} tasks": measured["watch"]["state_bytes"],
    }


def _batches(rows: list[dict[str, Any]]) -> list[str]:
    columns = (
        "tasks",
        "GPUs",
        "studies at once",
        "search spaces",
        "trial, s",
        "batch, h",
        "GPUs held",
        "GPUs at work",
        "driver at work",
        "results a s",
        "mean wait, ms",
        "longest, s",
        "registry at work",
    )
    cells = (
        (
            f"{row['tasks']:,}",
            row["gpus"],
            row["studies"],
            row["space"],
            f"{row['trial_seconds']:g}",
            f"{row['hours']:.1f}",
            f"{row['held_share']:.0%}",
            f"{row['gpu_share']:.0%}",
            f"{row['driver_share']:.0%}",
            f"{row['results_a_second']:.1f}",
            f"{1000 * row['mean_wait_seconds']:.1f}",
            f"{row['max_wait_seconds']:.1f}",
            f"{row['registry_share']:.1%}",
        )
        for row in rows
    )
    return table(columns, cells)
