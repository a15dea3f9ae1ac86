"""The descriptions of a registered version and of its run, as MLflow's pages show them: what the
pack costs, what it reaches, how it was found, how to use it.

MLflow's pages leave no space between the columns of a table: numbers are right-aligned, and their
headings padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.registry.pack_record import METRIC_TAG, Champion

if TYPE_CHECKING:
    from pipeline.data import Modality


def version_card(champion: Champion, version: int) -> str:
    """Markdown for version number `version` of a pack."""
    sections = [
        champion.tags.get("description", ""),
        _headline(champion),
        "### Bytes",
        _table(("part", "bytes", "share"), _ledger_rows(champion), numbers=2),
        "### Recipe",
        _table(("setting", "value"), sorted(champion.params.items())),
        "### Use it",
        _usage(f"{champion.task}/{version}", champion.modality),
        (
            f"### The front of the study ({len(champion.front)} trials; all are child runs of this"
            " version's run)"
        ),
        _table(("configuration", "bytes", "validation"), _front_rows(champion), numbers=2),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def run_note(champion: Champion) -> str:
    """Markdown for the run of a pack."""
    trials = (
        "The child runs are the trials of the study that the pack was chosen from."
        if champion.front
        else ""
    )
    return (
        "\n\n".join(
            part
            for part in (champion.tags.get("description", ""), _headline(champion), trials)
            if part
        )
        + "\n"
    )


def _headline(champion: Champion) -> str:
    metrics, name = champion.metrics, champion.tags.get(METRIC_TAG, "accuracy")
    tested = (
        f"test {name} **{100 * metrics['test_metric']:.1f} ±"
        f" {100 * metrics.get('test_metric_stderr', 0):.1f} %** (standard error)"
    )
    facts = [f"**{champion.size_bytes / 1024:.1f} KiB** ({champion.size_bytes:,} bytes)", tested]
    facts += (
        [f"validation {name} {100 * metrics['val_metric']:.1f} %"]
        if "val_metric" in metrics
        else []
    )
    facts += (
        [f"{int(metrics['trained_values']):,} trained values"]
        if "trained_values" in metrics
        else []
    )
    tags = champion.tags
    backbone = (
        f"\n\nBackbone `{tags['backbone']}`, fingerprint"
        f" `{tags.get('backbone_fingerprint', '')[:16]}`"
        if "backbone" in tags
        else ""
    )
    return " · ".join(facts) + backbone


def _ledger_rows(champion: Champion) -> Iterable[tuple[str, str, str]]:
    rows = [
        (part, f"{size:,}", f"{100 * size / champion.size_bytes:.1f} %")
        for part, size in champion.ledger.items()
        if size
    ]
    return [*rows, ("**file**", f"**{champion.size_bytes:,}**", "")]


def _front_rows(champion: Champion) -> Iterable[tuple[str, str, str]]:
    """The trials on the front, that of the pack in bold."""
    for row in champion.front:
        if row["id"] in champion.on_front:
            point = (
                ", ".join(f"{name} {value}" for name, value in row["point"].items()) or "the recipe"
            )
            shown = f"**{point}**" if row["id"] == champion.tags.get("trial") else point
            yield shown, f"{row['size_bytes']:,}", f"{100 * row['val_metric']:.1f} %"


def _usage(reference: str, modality: type[Modality]) -> str:
    column, file = modality.column, modality.example_file
    return "\n".join(
        [
            "```sh",
            f"taskpack predict {reference} {file}",
            "```",
            "",
            "```python",
            "import pipeline",
            "",
            f'pipeline.load("{reference}").predict(["{file}"])',
            "```",
            "",
            "```python",
            "import mlflow, pandas as pd  # TASKPACK_BACKBONE names the backbone's checkpoint",
            "",
            (
                f'mlflow.pyfunc.load_model("models:/{reference}").predict(pd.DataFrame({{"{column}":'
                f' ["{file}"]}}))'
            ),
            "```",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table whose last columns are `numbers`."""
    texts = len(header) - numbers
    shown = [*header[:texts], *(f"&emsp;{cell}" for cell in header[texts:])]
    lines = [shown, [*["---"] * texts, *["---:"] * numbers], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
