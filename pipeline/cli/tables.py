"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a table of packs must not wait for torch
    from pipeline.adaptation import PlannedTensor
    from pipeline.driver.batch import TaskOutcome
    from pipeline.driver.jobs import Attempt
    from pipeline.registry.pack_record import RegisteredPack
    from pipeline.reports.comparison_row import Comparison
    from pipeline.specs import Task

BAR_CELLS = 30


def kib(size_bytes: float) -> str:
    """Bytes as KiB with one decimal."""
    return f"{size_bytes / 1024:.1f} KiB"


def percent_with_error(metrics: dict[str, float]) -> str:
    """Test metric in percent with its standard error."""
    return f"{100 * metrics['test_metric']:.1f} ± {100 * metrics['test_metric_stderr']:.1f}"


def table(*columns: str, title: str | None = None, numbers_from: int = 1) -> Table:
    """An empty table whose columns from `numbers_from` on are right-aligned."""
    built = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for index, column in enumerate(columns):
        is_number = index >= numbers_from
        built.add_column(
            column, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number
        )
    return built


def about_table(task: Task) -> Table:
    """Source of a task's data and published accuracies on it; without a header row."""
    built = table("", "", title=task.description or task.name, numbers_from=9)
    built.show_header = False
    for label, text in (
        ("source", task.about.source),
        ("licence", task.about.licence),
        ("paper", task.about.paper),
    ):
        if text:
            built.add_row(label, text)
    for method, percent in task.about.published_percent.items():
        built.add_row("published %", f"{percent:<5g}  {method}")
    return built


def champions_table(outcomes: Sequence[TaskOutcome]) -> Table:
    """One row per registered task: metric, size, and cost of the search."""
    built = table(
        "task",
        "metric",
        "test %",
        "val %",
        "pack",
        "trained",
        "trials",
        "search s",
        title="Champions",
        numbers_from=2,
    )
    for outcome in outcomes:
        if outcome.registered is None:
            continue
        metrics = outcome.registered.metrics
        built.add_row(
            outcome.task,
            outcome.registered.metric,
            percent_with_error(metrics),
            f"{100 * metrics['val_metric']:.1f}",
            kib(outcome.registered.size_bytes),
            f"{metrics['trained_values']:,.0f}",
            f"{outcome.ran}/{len(outcome.trials) + outcome.trials_left}",
            f"{metrics['search_seconds']:.0f}",
        )
    return built


def attempts_table(attempts: Sequence[Attempt]) -> Table:
    """One row per attempt of a batch on a cluster; times in this machine's time zone."""
    built = table("batch", "state", "attempt", "tasks", "started", "minutes", numbers_from=2)
    for attempt in attempts:
        started = (
            datetime.fromtimestamp(attempt.started).strftime("%Y-%m-%d %H:%M")
            if attempt.started
            else "-"
        )
        minutes = (
            f"{(attempt.ended - attempt.started) / 60:.1f}"
            if attempt.started and attempt.ended
            else "-"
        )
        built.add_row(
            attempt.batch,
            attempt.state.lower(),
            str(attempt.attempt),
            str(attempt.tasks),
            started,
            minutes,
        )
    return built


def packs_table(packs: Sequence[RegisteredPack]) -> Table:
    """One row per registered pack."""
    built = table(
        "pack", "alias", "metric", "test %", "bytes", "trained", "registered", numbers_from=3
    )
    for pack in packs:
        built.add_row(
            f"{pack.name}/{pack.version}",
            ", ".join(pack.aliases),
            pack.metric,
            percent_with_error(pack.metrics),
            f"{pack.size_bytes:,}",
            f"{pack.metrics['trained_values']:,.0f}",
            f"{pack.created:%Y-%m-%d %H:%M}",
        )
    return built


def ledger_table(ledger: dict[str, int], title: str = "Bytes") -> Table:
    """Bytes by part, with bars; the sum is the file's size."""
    built = table("part", "bytes", "share", "", title=title)
    built.columns[-1].justify = "left"
    total, largest = sum(ledger.values()), max(ledger.values())
    for part, size_bytes in ledger.items():
        if size_bytes:
            bar = Text("█" * max(1, round(BAR_CELLS * size_bytes / largest)), style="cyan")
            built.add_row(part, f"{size_bytes:,}", f"{size_bytes / total:.1%}", bar)
    built.add_row("file", f"{total:,}", "", "", style="bold")
    return built


def plan_table(tensors: Sequence[PlannedTensor], subject: str, *, by_module: bool) -> Table:
    """What a recipe trains: one row per part, or one per tensor."""
    if by_module:
        built = table("part", "module", "shape", "bits", "values", numbers_from=2)
        for tensor in tensors:
            built.add_row(
                tensor.part,
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                str(tensor.bits),
                f"{tensor.values:,}",
            )
        return built
    built = table("part", "bits", "modules", "values", title=f"What the {subject} trains")
    for part, bits in dict.fromkeys((tensor.part, tensor.bits) for tensor in tensors):
        group = [tensor for tensor in tensors if (tensor.part, tensor.bits) == (part, bits)]
        built.add_row(
            part, str(bits), str(len(group)), f"{sum(tensor.values for tensor in group):,}"
        )
    built.add_row(
        "all", "", str(len(tensors)), f"{sum(tensor.values for tensor in tensors):,}", style="bold"
    )
    return built


def _axes_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The axes that any of these points has, in the order of a search space."""
    from pipeline.specs.search_space import AXES

    found = dict.fromkeys(name for row in rows for name in row["point"])
    return sorted(found, key=lambda name: AXES.index(name) if name in AXES else len(AXES))


def space_table(rows: Sequence[dict[str, Any]], max_bytes: int) -> Table:
    """The configurations of a search space with their exact sizes, or bounds of them."""
    names = _axes_of(rows)
    sizes = (
        {"size_bytes": "bytes"}
        if not rows or "size_bytes" in rows[0]
        else {"at_least_bytes": "at least", "at_most_bytes": "at most"}
    )
    built = table(
        *names,
        *sizes.values(),
        "budget",
        title=f"Search space, budget {max_bytes:,} bytes",
        numbers_from=0,
    )
    for row in rows:
        bounds = [row[size] for size in sizes]
        verdict = (
            "over" if bounds[0] > max_bytes else "fits" if bounds[-1] <= max_bytes else "may fit"
        )
        cells = [
            *(str(row["point"].get(name, "")) for name in names),
            *(f"{size:,}" for size in bounds),
            verdict,
        ]
        built.add_row(*cells, style="dim" if verdict == "over" else "")
    return built


def trials_table(rows: Sequence[dict[str, Any]], champion: str | None) -> Table:
    """One row per trial, sorted by size."""
    names = _axes_of(rows)
    built = table(
        *names, "bytes", "val %", "epochs", "seconds", "state", title="Trials", numbers_from=0
    )
    for row in sorted(rows, key=lambda row: (row["size_bytes"], row["id"])):
        metric = (
            row["val_metric"]
            if row["val_metric"] is not None
            else (row["curve"][-1] if row["curve"] else None)
        )
        values = [str(row["point"].get(name, "")) for name in names]
        shown = "" if metric is None else f"{100 * metric:.1f}"
        state = "champion" if row["id"] == champion else row["state"]
        seconds = f"{row['seconds']:.0f}" if row["epochs"] else ""
        built.add_row(
            *values,
            f"{row['size_bytes']:,}",
            shown,
            str(row["epochs"] or ""),
            seconds,
            state,
            style="bold" if row["id"] == champion else "",
        )
    return built


def predictions_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per image or cloud, which each row's first key names; of a multi-label pack the
    labels that it predicts, each with its probability; of a segmentation pack the classes of its
    mask, each with its share of the pixels.
    """
    if "areas" in rows[0]:
        return _areas_table(rows)
    column = next(iter(rows[0]))
    built = table(
        column, *(["labels"] if "labels" in rows[0] else ["label", "probability"]), numbers_from=2
    )
    has_sets = "set" in rows[0]
    if has_sets:
        built.add_column("set")
    for row in rows:
        if "labels" in row:
            shown = [f"{label} {row['probabilities'][label]:.3f}" for label in row["labels"]]
            built.add_row(row[column], ", ".join(shown) or "-")
        else:
            sets = [", ".join(row["set"]) or "-"] if has_sets else []
            built.add_row(row[column], row["label"], f"{row['probability']:.3f}", *sets)
    return built


def all_predictions_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per image or cloud and task: the label, or every label, with its probability; of a
    segmentation pack every class of the mask with its share of the pixels.
    """
    column = next(iter(rows[0]))
    built = table(column, "task", "answer", numbers_from=3)
    has_sets = any("set" in row for row in rows)
    if has_sets:
        built.add_column("set")
    for row in rows:
        said = ", ".join(f"{name} {share:.3f}" for name, share in _said(row).items()) or "-"
        sets = [", ".join(row.get("set", [])) or "-"] if has_sets else []
        built.add_row(row[column], row["task"], said, *sets)
    return built


def _said(row: dict[str, Any]) -> dict[str, float]:
    """What a row says: its label or labels with their probabilities, or classes with their shares
    of the pixels.
    """
    if "areas" in row:
        return {name: share for name, share in row["areas"].items() if share}
    if "labels" in row:
        return {label: row["probabilities"][label] for label in row["labels"]}
    return {row["label"]: row["probability"]}


def _areas_table(rows: Sequence[dict[str, Any]]) -> Table:
    built = table("image", "areas %", *(["mask"] if "mask" in rows[0] else []), numbers_from=3)
    for row in rows:
        shown = [f"{name} {100 * share:.1f}" for name, share in row["areas"].items() if share]
        built.add_row(row["image"], ", ".join(shown), *([row["mask"]] if "mask" in row else []))
    return built


def comparison_table(rows: Sequence[Comparison], *, title: str) -> Table:
    """One row per method of one task, smallest pack first."""
    from pipeline.reports.comparison import COLUMNS, by_size, shown_cells

    built = table(*COLUMNS[:7], title=title)
    for row in sorted(rows, key=by_size):
        built.add_row(*([row.method, "failed"] if row.error else shown_cells(row)))
    return built
