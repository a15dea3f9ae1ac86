"""What the papers claim, looked at on a real ViT-S: how connections are chosen, what regularises,
what one bit costs.

    python benchmarks/fidelity.py [--tasks dtd10 caltech101] [--seeds 0 1 2] [--epochs 8]
                                  [--variants ...] [--device cuda] [--workers 8] [--shared FOLDER]
    python benchmarks/fidelity.py --page     write the page from what has been measured

Every run trains one recipe on train and validation and reads the test set once, from the reloaded
pack. All variants of a task share data, splits and learning rate; nothing is tuned, so differences
within a group are due to the variant. Interrupt it and start it again: finished runs are kept.
Needs the data and the backbones, by default in the folder `shared` beside the project, but neither
Ray nor MLflow. Writes benchmarks/results/fidelity.json and .md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pages import mean_difference
from runs import Place, Run, figures, measure_missing, origins, parse_arguments, with_seed

from pipeline.adaptation import SelectedIndex
from pipeline.data import prepare
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Backbone, CsvData, FolderData, Input, ListsData, Recipe, Selection, Task
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fidelity.json"
TASKS = ("dtd10", "caltech101")
GPS: dict[str, Any] = {
    "connections": {"top_k": 1, "bits": 32},
    "biases": {"bits": 32},
    "head": {"bits": 32},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "gradient, GPS's views": {},
    "gradient, light views": {"views": "light"},
    "gradient, cross-entropy": {"loss": "cross_entropy"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "drop path 0.1": {"drop_path": 0.1},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "moving average 0.99": {"ema": 0.99},
}
PARTS: dict[str, dict[str, Any]] = {
    "bottleneck": {"adapter": {"width": 8}},
    "LoRA": {"lora": {"rank": 8}},
    "SMoA": {"smoa": {"experts": 4, "width": 8}},
    "connections": {"connections": {"top_k": 1}},
}


def _at_bits(part: dict[str, Any], bits: int) -> dict[str, Any]:
    return {**{name: {**spec, "bits": bits} for name, spec in part.items()}, "head": {"bits": 32}}


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"head": {"bits": 32}, "preset": "linear"}, {}),
    **{name: (GPS, selection) for name, selection in SELECTIONS.items()},
    **{name: ({**GPS, "training": training}, {}) for name, training in TRAININGS.items()},
    **{
        f"{name}, {bits} bits": (_at_bits(part, bits), {})
        for name, part in PARTS.items()
        for bits in (1, 32)
    },
}
GROUPS: dict[str, tuple[str, Sequence[str]]] = {
    "Which connections (GPS, K = 1, 32 bits)": ("gradient, GPS's views", ["linear", *SELECTIONS]),
    "Regularisation of the same recipe": (
        "gradient, GPS's views",
        ["gradient, GPS's views", *TRAININGS],
    ),
    **{
        f"One bit against 32: {name}": (f"{name}, 32 bits", [f"{name}, 32 bits", f"{name}, 1 bits"])
        for name in PARTS
    },
}


def data_of(name: str, shared: Path) -> CsvData | FolderData | ListsData:
    """A task's images as they come."""
    folder = shared / "data" / name
    if name == "trashnet":
        return FolderData(format="folder", train=str(folder / "train"), test=str(folder / "test"))
    if name == "dtd10":
        return CsvData(format="csv", train=str(folder / "train.csv"), test=str(folder / "test.csv"))
    return ListsData(format="lists", root=str(folder), classes=str(folder / "classes.txt"))


def open_task(name: str, selection: dict[str, Any], place: Place) -> Inputs:
    """The prepared task with a selection's settings."""
    weights = place.shared / "backbones" / "vit_small_patch14_dinov2.saliency.safetensors"
    task = Task(
        name=name,
        data=data_of(name, place.shared),
        input=Input(size_px=98),
        backbone=Backbone(model="vit_small_patch14_dinov2", weights=str(weights)),
        recipe=Recipe.model_validate(GPS),
        selection=Selection.model_validate(selection),
    )
    prepare(task, place.workdir / name)
    return open_inputs(task, place.workdir / name)


def select_once(inputs: Inputs, place: Place) -> SelectedIndex:
    """The selection of the task's settings, kept in a file."""
    settings = inputs.task.selection
    path = (
        place.workdir
        / f"{inputs.task.name}-{settings.criterion}-{settings.loss}-{settings.views}.safetensors"
    )
    if not path.exists():
        write_selection(select_locally(inputs, 1, device=place.device), path)
    return read_selection(path)


def measure(run: Run, place: Place) -> Run:
    """One run from training to the tested pack; splits and selection are those of seed 0."""
    parts, selection = VARIANTS[run["variant"]]
    inputs = open_task(run["task"], selection, place)
    training = {**parts.get("training", {}), "epochs": run["epochs"]}
    recipe = inputs.task.recipe.model_validate(
        {
            **parts,
            "training": {"learning_rate": inputs.task.recipe.training.learning_rate, **training},
        }
    )
    selected = select_once(inputs, place) if recipe.connections else None
    seeded = with_seed(inputs, run["seed"])
    with tempfile.TemporaryDirectory() as folder:
        return run | figures(fit(seeded, recipe, selected, Path(folder), device=place.device))


def select_all(runs: Sequence[Run], place: Place) -> None:
    """Prepare the tasks and make the selections of all runs."""
    for task, variant in {(run["task"], run["variant"]): None for run in runs}:
        parts, selection = VARIANTS[variant]
        if "connections" in parts:
            select_once(open_task(task, selection, place), place)


def page(runs: Sequence[Run]) -> str:
    """Every group as a table: mean test accuracy over the seeds, difference to the group's first
    row, bytes.
    """
    tasks = [name for name in TASKS if any(run["task"] == name for run in runs)]
    lines = [
        "# The papers' claims on a real ViT-S",
        "",
        origins(runs),
        "",
        (
            "The backbone is `vit_small_patch14_dinov2` at 98 px, further trained by others on"
            " saliency: its patch"
        ),
        "features are strong, its class token's are weak, so it is not pristine DINOv2.",
        (
            f"{_epochs(runs, tasks)} epochs; one learning rate for all, nothing tuned. Test"
            " accuracy in percent,"
        ),
        "mean over as many seeds as the number in brackets; rows without numbers were not run yet;",
        (
            "the difference to the group's reference is paired by seed, with its standard error"
            " over the seeds."
        ),
    ]
    for title, (reference, variants) in GROUPS.items():
        if not {run["variant"] for run in runs} & set(variants):
            continue
        lines += [
            "",
            f"## {title}",
            "",
            f"| variant | {' | '.join(f'{name} | difference | bytes' for name in tasks)} |",
        ]
        lines += ["|" + "---|" * (1 + 3 * len(tasks))]
        lines += [
            f"| {variant} |"
            f" {' | '.join(_cells(runs, name, variant, reference) for name in tasks)} |"
            for variant in variants
        ]
    return "\n".join(lines) + "\n"


def _epochs(runs: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """How long each task was trained."""
    found = {run["task"]: run["epochs"] for run in runs}
    return ", ".join(f"{task}: {found[task]}" for task in tasks)


def _cells(runs: Sequence[dict[str, Any]], task: str, variant: str, reference: str) -> str:
    found = {run["seed"]: run for run in runs if (run["task"], run["variant"]) == (task, variant)}
    others = {
        run["seed"]: run for run in runs if (run["task"], run["variant"]) == (task, reference)
    }
    if not found:
        return " | | "
    accuracy = {seed: 100 * run["correct"] / run["samples"] for seed, run in found.items()}
    paired = [
        accuracy[seed] - 100 * others[seed]["correct"] / others[seed]["samples"]
        for seed in accuracy
        if seed in others
    ]
    shown = f"{fmean(accuracy.values()):.1f} ({len(accuracy)})"
    difference = "" if variant == reference else mean_difference(paired)
    return f"{shown} | {difference} | {next(iter(found.values()))['bytes']:,}"


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "variant", VARIANTS, (0, 1, 2))
    runs = measure_missing(RESULTS, arguments, "variant", select_all, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
