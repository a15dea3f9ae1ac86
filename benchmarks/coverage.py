"""Sets of classes: how often they hold the right class on test images, and how large they are.

    python benchmarks/coverage.py [--tasks digits counting] [--coverages 0.8 0.9 0.95 0.99]
                                  [--workdir FOLDER]

Runs demo tasks with a stated coverage to registered packs. For every coverage it then calibrates
with the validation outputs that the champion's trial kept, as a run does, and asks the pack of the
final fit about the test split. Writes benchmarks/results/coverage.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from pages import table

import pipeline
from pipeline.adaptation.packing import from_pack
from pipeline.data import Reader, read_index, split_samples
from pipeline.driver.workspace import Workspace
from pipeline.kinds import kind_named
from pipeline.packs import Pack, read_pack
from pipeline.search.kept_outcomes import read_outcomes
from pipeline.serving.predictor import load_backbone_of
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import evaluate
from pipeline.training.calibrate import calibrate, probabilities, quality_of_sets

RESULTS = Path(__file__).parent / "results" / "coverage.json"


def measure(name: str, coverages: list[float], workdir: Path) -> list[dict[str, Any]]:
    """A row per coverage."""
    task = load_task(catalogue_folder() / "demo" / f"{name}.yaml")
    task = task.model_copy(update={"coverage": coverages[0]})
    [outcome] = pipeline.run([task], workdir=workdir)
    if outcome.error is not None:
        raise outcome.error
    folder = next((workdir / "studies").glob(f"{name}-*"))
    kept = read_outcomes(next((folder / "trials").rglob(f"{outcome.champion_id}*.safetensors")))
    assert kept is not None
    tested = test_outcomes(read_pack(pipeline.fetch(name, workdir=workdir)), workdir)
    rows = []
    for coverage in coverages:
        found = calibrate(kept, coverage)
        shares_NC = probabilities(tested.outputs, found.temperature)
        sets = quality_of_sets(tested, found)
        sizes_N = (shares_NC >= found.threshold).sum(axis=1)
        rows.append(
            {
                "task": name,
                "coverage": coverage,
                "validation_samples": found.samples,
                "test_samples": len(tested),
                "test_accuracy": float((shares_NC.argmax(axis=1) == tested.targets).mean()),
                "temperature": found.temperature,
                "threshold": found.threshold,
                "held": sets.found,
                "held_error": sets.standard_error,
                "set_size": sets.mean_size,
                "empty": float((sizes_N == 0).mean()),
                "single": float((sizes_N == 1).mean()),
            }
        )
    return rows


def test_outcomes(pack: Pack, workdir: Path) -> Any:
    """The pack's logits on the test split of its task."""
    folder = Workspace(workdir).data(pack.metadata.task)
    test = split_samples(read_index(folder), 0.5, 0)["test"]
    kind = kind_named(pack.metadata.kind)
    backbone = load_backbone_of(pack.metadata)
    reader = Reader(
        folder,
        test,
        backbone.takes,
        targets=lambda labels: kind.targets(labels, len(pack.metadata.classes)),
    )
    return evaluate(from_pack(pack, backbone), reader, test, kind)


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    machine = result["machine"]
    columns = [
        "task",
        "stated coverage",
        "right class in the set, test %",
        "classes in a set, mean",
        "empty sets %",
        "sets of one class %",
        "test accuracy %",
        "temperature",
        "validation / test samples",
    ]
    rows = [
        [
            row["task"],
            f"{row['coverage']:g}",
            f"{100 * row['held']:.1f} ± {100 * row['held_error']:.1f}",
            f"{row['set_size']:.2f}",
            f"{100 * row['empty']:.1f}",
            f"{100 * row['single']:.1f}",
            f"{100 * row['test_accuracy']:.1f}",
            f"{row['temperature']:.2f}",
            f"{row['validation_samples']} / {row['test_samples']}",
        ]
        for row in result["rows"]
    ]
    lines = [
        "# Sets of classes at a stated coverage",
        "",
        f"Packs of demo tasks, calibrated with the validation outputs of the champion's trial and"
        f" tested once. {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}.",
        "Written by `python benchmarks/coverage.py`.",
        "",
        *table(columns, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["digits", "counting"])
    parser.add_argument("--coverages", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--workdir", type=Path, help="default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = (arguments.workdir or Path(temporary)).resolve()
        rows = [
            row for name in arguments.tasks for row in measure(name, arguments.coverages, workdir)
        ]
    result = {"machine": describe_machine(), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
