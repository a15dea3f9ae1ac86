"""What accuracy a pack's bytes buy: recipes of every size, from the head alone upwards, on a real
ViT-S and on the demo's tasks and backbone.

    python benchmarks/sizes.py [--tasks dtd10 digits] [--recipes ...] [--seeds 0] [--epochs 8]
                               [--device cuda] [--workers 8] [--shared FOLDER]
    python benchmarks/sizes.py --page     write the page from what has been measured

Every run trains a recipe twice, as a study does: on the training set, whose answers on the
validation set are kept image by image, and on both, as a pack whose test accuracy is read once from
the reloaded file. So rules that choose by the validation set can be compared by the test set
without training anything again. All runs of a task share data and splits; nothing is tuned.

Interrupt it and start it again: finished runs are kept. The tasks of the ViT-S need their data and
its weights, by default in the folder `shared` beside the project; neither Ray nor MLflow is needed.
Writes benchmarks/results/sizes.json and .md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import open_task, select_once
from runs import Place, Run, by_task, figures, measure_missing, parse_arguments, with_seed

from pipeline.data import prepare
from pipeline.search.kept_outcomes import read_outcomes
from pipeline.search.pareto import on_front
from pipeline.search.trial import run_trial
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sizes.json"
DEMO = ("digits", "counting", "orientation")
TASKS = ("dtd10", "trashnet", "caltech101", *DEMO)
HOUSE: dict[str, Any] = {
    "connections": {"top_k": 1, "bits": 4},
    "biases": {"bits": 8},
    "norms": {"bits": 8},
    "smoa": {"experts": 4, "width": 8, "bits": 4},
    "head": {"bits": 8},
}


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes by name, from small to large within each family."""
    found: dict[str, dict[str, Any]] = {
        f"head {bits}": {"preset": "linear", "head": {"bits": bits}} for bits in (1, 2, 4, 8)
    }
    for bits in (1, 2):
        head = {"bits": bits}
        found |= {
            f"biases {bits}": {"biases": {"bits": bits}, "head": head},
            f"norms {bits}": {"norms": {"which": "all", "bits": bits}, "head": head},
            f"norms, biases {bits}": {
                "norms": {"which": "all", "bits": bits},
                "biases": {"bits": bits},
                "head": head,
            },
            **{
                f"bottleneck w={width} {bits}": {
                    "adapter": {"width": width, "bits": bits},
                    "head": head,
                }
                for width in (1, 2, 4, 8)
            },
            **{
                f"LoRA r={rank} {bits}": {"lora": {"rank": rank, "bits": bits}, "head": head}
                for rank in (1, 2, 4)
            },
            **{
                f"FacT r={rank} {bits}": {"fact": {"rank": rank, "bits": bits}, "head": head}
                for rank in (4, 8, 16)
            },
            **{
                f"DTL r={rank} {bits}": {"dtl": {"rank": rank, "bits": bits}, "head": head}
                for rank in (1, 2, 4, 8)
            },
            f"SMoA E=4 w=8 {bits}": {
                "smoa": {"experts": 4, "width": 8, "bits": bits},
                "head": head,
            },
            f"connections K=1 {bits}": {"connections": {"top_k": 1, "bits": bits}, "head": head},
        }
    return found | scaled() | combinations()


def scaled() -> dict[str, dict[str, Any]]:
    """Adapters whose output counts for more."""
    return {
        f"{name}, scale {scale}": {part: {**spec, "bits": 1, "scale": scale}, "head": {"bits": 2}}
        for name, part, spec in (
            ("bottleneck w=8", "adapter", {"width": 8}),
            ("LoRA r=4", "lora", {"rank": 4}),
        )
        for scale in (1, 4, 8)
    }


def combinations() -> dict[str, dict[str, Any]]:
    """Several parts at 1 bit, wide bottlenecks, and the house recipe."""
    head = {"bits": 2}
    biases, bottleneck = {"biases": {"bits": 1}}, {"adapter": {"width": 4, "bits": 1}}
    connections = {"connections": {"top_k": 1, "bits": 1}}
    norms, wide = {"norms": {"which": "all", "bits": 1}}, {"adapter": {"width": 8, "bits": 1}}
    return {
        "bottleneck w=4 + biases": {**bottleneck, **biases, "head": head},
        "connections + biases": {**connections, **biases, "head": head},
        "connections + bottleneck w=4": {**connections, **bottleneck, "head": head},
        "connections K=3 1": {"connections": {"top_k": 3, "bits": 1}, "head": head},
        "bottleneck w=16 1": {"adapter": {"width": 16, "bits": 1}, "head": head},
        "bottleneck w=32 1": {"adapter": {"width": 32, "bits": 1}, "head": head},
        "bottleneck w=8 + norms, biases": {**wide, **norms, **biases, "head": head},
        "connections + norms, biases": {**connections, **norms, **biases, "head": head},
        "connections + bottleneck w=8 + norms, biases": {
            **connections,
            **wide,
            **norms,
            **biases,
            "head": head,
        },
        "house 1": {
            **connections,
            "biases": {"bits": 1},
            "norms": {"bits": 1},
            "smoa": {"experts": 4, "width": 8, "bits": 1},
            "head": head,
        },
        "house": HOUSE,
    }


def open_any(name: str, place: Place) -> Inputs:
    """A task of the demo, or one of the ViT-S."""
    if name not in DEMO:
        return open_task(name, {}, place)
    task = load_task(catalogue_folder() / "demo" / f"{name}.yaml")
    prepare(task, place.workdir / name)
    return open_inputs(task, place.workdir / name)


def measure(run: Run, place: Place) -> Run:
    """One recipe: a trial, and a fit."""
    opened = open_any(run["task"], place)
    inputs = with_seed(opened, run["seed"])
    training = {"learning_rate": None, "epochs": run["epochs"]}
    recipe = inputs.task.recipe.model_validate({**recipes()[run["recipe"]], "training": training})
    selected = select_once(opened, place) if recipe.connections else None
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "outputs"
        for _ in run_trial(inputs, recipe, selected, device=place.device, kept=kept):
            pass
        outcomes = read_outcomes(kept)
        assert outcomes is not None
        result = fit(inputs, recipe, selected, Path(folder) / "fit", device=place.device)
    is_right = outcomes.outputs.argmax(axis=1) == outcomes.targets
    return {
        **run,
        "right": np.packbits(is_right).tobytes().hex(),
        "val_samples": len(is_right),
        "val_correct": int(is_right.sum()),
        **figures(result),
    }


def select_all(runs: Sequence[Run], place: Place) -> None:
    """Make the selections of all tasks that need one."""
    for task in {run["task"]: None for run in runs if "connections" in recipes()[run["recipe"]]}:
        select_once(open_any(task, place), place)


def page(runs: Sequence[Run]) -> str:
    """A table per task, by size: mean accuracies over the seeds, and what is on the front."""
    lines = [
        "# Accuracy by size",
        "",
        f"{', '.join(DEMO)}: the demo's tasks and backbone. The others: `vit_small_patch14_dinov2`",
        "at 98 px, further trained by others on saliency. The number behind a name is that of",
        "bits, those of the head included. Where there is none, the parts have 1 bit and the head",
        "has 2; the house recipe has its own. Test accuracy is read from the reloaded pack. A star",
        "marks packs that no smaller one beats on the validation set.",
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    names = {run["recipe"]: None for run in runs}
    found = []
    for name in names:
        own = [run for run in runs if run["recipe"] == name]
        val, test = (
            100 * sum(run[right] for run in own) / sum(run[samples] for run in own)
            for right, samples in (("val_correct", "val_samples"), ("correct", "samples"))
        )
        found.append((own[0]["bytes"], val, test, name, len(own)))
    found.sort()
    front = on_front([row[0] for row in found], [row[1] for row in found])
    lines = ["| recipe | bytes | validation % | test % | seeds |", "|---|---|---|---|---|"]
    for number, (size, val, test, name, seeds) in enumerate(found):
        star = " *" if number in front else ""
        lines.append(f"| {name}{star} | {size:,} | {val:.1f} | {test:.1f} | {seeds} |")
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "recipe", recipes(), (0,))
    runs = measure_missing(RESULTS, arguments, "recipe", select_all, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
