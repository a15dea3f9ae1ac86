"""Whether parts beside a narrow head gain over a bare head, where a head of the whole feature would
take most of the budget.

    python benchmarks/narrow_heads.py [--tasks caltech101 caltech47] [--budgets smaller larger]
                                      [--seeds 0 1] [--epochs 8] [--shared FOLDER]
    python benchmarks/narrow_heads.py --page     write the page from what has been measured

The embedded backbone at 32 px, with as many classes as need a wide head; caltech47 is the first 47
classes of caltech101. In the default search space of these budgets, parts stand beside a head on a
subspace of the feature. Within each budget, the best is chosen by validation

    of bare heads: for each number of bits, the widest that fits;
    of parts beside a narrow head: the first bottlenecks and the first LoRA of the default space;
    of parts beside the whole head at 1 bit: the same of the space that keeps it, if anything fits,

each at several learning rates, then fitted on training and validation images, and the reloaded pack
tested once.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/narrow_heads.json
and .md.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from heads import caltech47
from image_tasks import image_task, opened
from pages import mean_difference, table
from runs import Place, Run, by_task, figures, measure_missing, parse_arguments, with_seed

from pipeline.adaptation.depth import blocks_of
from pipeline.adaptation.packing import SizePlanner, from_pack
from pipeline.inputs.learning_rate import default_learning_rate
from pipeline.packs import read_pack
from pipeline.search.trial import run_trial
from pipeline.specs import Bits, Head, Recipe
from pipeline.specs.recipe import PARTS
from pipeline.specs.search_space import HEAD_ALONE
from pipeline.training import Inputs, evaluate
from pipeline.training.fit import PACK_FILE, fit

RESULTS = Path(__file__).parent / "results" / "narrow_heads.json"
SIZE_PX = 32
BUDGETS: dict[str, dict[str, int]] = {
    "caltech101": {"smaller": 4096, "larger": 6144},
    "caltech47": {"smaller": 2048, "larger": 2560},
}
BARE, NARROW, WHOLE = "bare head", "parts, narrow head", "parts, whole head"
SETS = 2
"""Of parts: those that the default space tries first."""
BITS: tuple[Bits, ...] = (1, 2, 4)
RANK_STEP = 8
RATES = (0.5, 1, 2)
"""Of the default learning rate."""
COLUMNS = (
    "budget",
    "chosen of",
    "recipe",
    "bytes",
    "validation %",
    "test %",
    "- bare head",
    "seeds",
)


def open_run(run: Run, place: Place) -> Inputs:
    """The run's task, with the default space of its budget."""
    recipe = {"preset": "default", "training": {"epochs": run["epochs"]}}
    task = image_task("caltech101", "embedded", place.shared, SIZE_PX, recipe)
    if run["task"] == "caltech47":
        task = task.changed(name=run["task"], data=caltech47(place))
    task = task.changed(budget={"max_bytes": BUDGETS[run["task"]][run["budget"]]})
    folder = place.workdir / f"{task.name}-{SIZE_PX}"
    return with_seed(opened(task, folder, limit=1_000_000), run["seed"])


def bare_heads(inputs: Inputs, planner: SizePlanner) -> list[Recipe]:
    """For each number of bits, the widest head that fits."""
    task, width = inputs.task, inputs.backbone.width
    ranks = (None, *range(width - RANK_STEP, 0, -RANK_STEP))
    found = []
    for bits in BITS:
        heads = (Head(bits=bits, rank=rank) for rank in ranks)
        recipes = (Recipe(head=head, training=task.recipe.training) for head in heads)
        sized = (each for each in recipes if planner.size_bytes(each) <= task.budget.max_bytes)
        found.append(next(sized))
    return found


def with_parts(inputs: Inputs) -> list[Recipe]:
    """The first recipe of each of the first sets of parts in the task's space."""
    task = inputs.task
    found: dict[str, Recipe] = {}
    for point in task.search.points():
        if point["parts"] != HEAD_ALONE:
            found.setdefault(point["parts"], task.search.recipe(task.recipe, point))
    return list(found.values())[:SETS]


def beside_whole_head(inputs: Inputs, planner: SizePlanner, epochs: int) -> list[Recipe]:
    """The same of the space whose head is whole and has 1 bit, as far as they fit."""
    written = Recipe.model_validate(
        {"preset": "default", "head": {"bits": 1}, "training": {"epochs": epochs}}
    )
    found = with_parts(inputs.with_task(inputs.task.changed(recipe=written, search={})))
    return [each for each in found if planner.size_bytes(each) <= inputs.task.budget.max_bytes]


def best_of(inputs: Inputs, recipes: Sequence[Recipe], planner: SizePlanner) -> Run:
    """Every trial's validation score, and the test figures of the best; of equal ones, of the
    smallest.
    """
    default = default_learning_rate(inputs.backbone.model)
    trials = {
        f"{named(recipe)}; rate {share:g}": recipe.changed(
            training=recipe.training.changed(learning_rate=share * default)
        )
        for recipe in recipes
        for share in RATES
    }
    scores = {name: validated(inputs, recipe) for name, recipe in trials.items()}
    best = max(scores, key=lambda name: (scores[name], -planner.size_bytes(trials[name])))
    return {"trials": scores, "recipe": best, **tested(inputs, trials[best])}


def validated(inputs: Inputs, recipe: Recipe) -> float:
    """The validation score of a trial. A bare head changes no block, so that the outputs of all
    but the last are computed once for all trials.
    """
    if not any(getattr(recipe, part) for part in PARTS):
        recipe = recipe.changed(from_block=max(blocks_of(inputs.backbone).values()))
    *_, (score, _) = run_trial(inputs, recipe, None)
    return score.value


def tested(inputs: Inputs, recipe: Recipe) -> Run:
    """Figures of the fitted and reloaded pack, and which test images it has right."""
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, recipe, None, Path(folder))
        model = from_pack(read_pack((Path(folder) / PACK_FILE).read_bytes()), inputs.backbone)
    outcomes = evaluate(model, inputs.reader("test"), inputs.splits["test"], inputs.kind)
    is_right = outcomes.outputs.argmax(axis=1) == outcomes.targets
    assert int(is_right.sum()) == figures(result)["correct"], "another pack than the fit tested"
    return {"right": np.packbits(is_right).tobytes().hex(), **figures(result)}


def named(recipe: Recipe) -> str:
    """Such as `adapter 4, head of rank 64 at 1 bit`: each part with its width or rank."""
    words = []
    for part in PARTS:
        if (spec := getattr(recipe, part)) is not None:
            width = getattr(spec, "width", getattr(spec, "rank", ""))
            words.append(f"{part} {width}".strip())
    head = recipe.head
    rank = "whole head" if head.rank is None else f"head of rank {head.rank}"
    return ", ".join([*words, f"{rank} at {head.bits} bit{'s' if head.bits > 1 else ''}"])


def measure(run: Run, place: Place) -> Run:
    """The best of each group at one budget."""
    inputs = open_run(run, place)
    planner = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes)
    groups = {
        BARE: bare_heads(inputs, planner),
        NARROW: with_parts(inputs),
        WHOLE: beside_whole_head(inputs, planner, run["epochs"]),
    }
    assert all(recipe.head.rank for recipe in groups[NARROW]), "the whole head fits beside parts"
    found = {name: best_of(inputs, group, planner) for name, group in groups.items() if group}
    return {**run, "max_bytes": inputs.task.budget.max_bytes, "groups": found}


def differences(runs: Sequence[Run], group: str, other: str) -> list[np.ndarray]:
    """For each run that has both groups, the points of accuracy per test image, [N]: 100, 0 or
    -100.
    """
    return [
        100.0 * (_right(run["groups"][group]) - _right(run["groups"][other]))
        for run in runs
        if group in run["groups"] and other in run["groups"]
    ]


def _right(figures: Run) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(figures["right"]), dtype=np.uint8))
    return bits[: figures["samples"]].astype(np.float64)


def page(runs: Sequence[Run]) -> str:
    """The differences over all, and a table per task."""
    lines = [
        "# Parts beside a narrow head",
        "",
        f"The embedded backbone at {SIZE_PX} px, at budgets of which a head of the whole feature",
        "would take most, so that the default search puts parts beside a head on a subspace of the",
        "feature. Behind a part is its width or rank. Each group's best recipe and learning rate",
        f"({', '.join(map(str, RATES))} times the default) is chosen by validation; where seeds",
        "differ, all are named. Test accuracy in percent is that of reloaded packs, the mean over",
        "the seeds; the difference to the bare head is paired by image, with its standard error",
        "over the images, each averaged over the seeds.",
        "",
        "Over all tasks, budgets and seeds, with the standard error between them:",
        "",
        *table(("what", "against", "points of test accuracy", "pairs"), _over_all(runs)),
        *by_task(runs, list(BUDGETS), _rows),
    ]
    return "\n".join(lines) + "\n"


def _over_all(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, int]]:
    for group, other in ((NARROW, BARE), (WHOLE, BARE), (NARROW, WHOLE)):
        if found := differences(runs, group, other):
            points = [float(each.mean()) for each in found]
            yield group, other, mean_difference(points), len(points)


def _rows(runs: Sequence[Run]) -> list[str]:
    rows = []
    for max_bytes in sorted({run["max_bytes"] for run in runs}):
        own = [run for run in runs if run["max_bytes"] == max_bytes]
        rows += [_row(own, group) for group in (BARE, NARROW, WHOLE) if group in own[0]["groups"]]
    epochs = dict.fromkeys(str(run["epochs"]) for run in runs)
    return [f"Epochs: {', '.join(epochs)}.", "", *table(COLUMNS, rows)]


def _row(runs: Sequence[Run], group: str) -> list[str]:
    found = [run["groups"][group] for run in runs]
    recipes = dict.fromkeys(each["recipe"] for each in found)
    sizes = dict.fromkeys(f"{each['bytes']:,}" for each in found)
    difference = ""
    if group != BARE:
        points = np.mean(differences(runs, group, BARE), axis=0)
        error = points.std(ddof=1) / math.sqrt(len(points))
        difference = f"{points.mean():+.1f} ± {error:.1f}"
    return [
        f"{runs[0]['max_bytes']:,}",
        group,
        " / ".join(recipes),
        " / ".join(sizes),
        f"{100 * fmean(each['trials'][each['recipe']] for each in found):.1f}",
        f"{fmean(100 * each['correct'] / each['samples'] for each in found):.1f}",
        difference,
        str(len(found)),
    ]


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, list(BUDGETS), "budget", ("smaller", "larger"), (0, 1))
    runs = measure_missing(RESULTS, arguments, "budget", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
