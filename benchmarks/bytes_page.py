"""The page of benchmarks/bytes.py: the goals and whether they are met, and a table per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from champion import within_half_a_point
from pages import mean_difference

from pipeline.search.trial_record import TrialRecord

RESULTS = Path(__file__).parent / "results" / "bytes.json"
BUDGETS = tuple(1024 * kib for kib in (2, 4, 8, 16, 32, 64))
Cell = Mapping[str, Any]

NAMES = {
    "embedded": "Embedded ViT (width 192, depth 6)",
    "vit_small": "ViT-S (`vit_small_patch14_dinov2`, further trained by others on saliency)",
    "efficientnet": "EfficientNet-lite0",
}
WHOLE = "python benchmarks/bytes.py --seeds 0 1 2"
SHARE_OF_32_BITS = 20
POINTS_TO_32_BITS = 1.0
BD_GOAL = -0.6
TASKS_GOAL = 5 / 6
RULES = ("default", "best")
"""What is chosen of the default search: its champion, or the best trial by validation."""


def accuracy(cell: Cell, key: str | None) -> tuple[float, float] | None:
    """Test accuracy of a pack and its standard error, in points."""
    if key is None:
        return None
    test = cell["tested"][key]
    share = test["correct"] / test["samples"]
    return 100 * share, 100 * math.sqrt(share * (1 - share) / test["samples"])


Difference = tuple[float, float]
"""Points between two packs, and their standard error."""


def difference(cell: Cell, one: str | None, other: str | None) -> Difference | None:
    """Between the test accuracies of two packs. The standard error is that of two samples: since
    both read the same images, it is at most that.
    """
    first, second = accuracy(cell, one), accuracy(cell, other)
    if first is None or second is None:
        return None
    return first[0] - second[0], 0.0 if one == other else math.hypot(first[1], second[1])


def average(found: Sequence[Difference]) -> Difference:
    """The mean, and its standard error."""
    error = math.hypot(*(error for _, error in found)) / len(found)
    return fmean(points for points, _ in found), error


def at_share_of_32_bits(cell: Cell, rule: str) -> str | None:
    """What a rule chooses at the largest budget that is at most a 20th of the best 32-bit method;
    None where nothing fits.
    """
    best = cell["methods"]["32 bits"]["id"]
    most = cell["tested"][best]["bytes"] / SHARE_OF_32_BITS if best else 0.0
    found = [cell[rule][str(each)]["id"] for each in BUDGETS if each <= most]
    return next((key for key in reversed(found) if key), None)


def page(cells: Sequence[Cell]) -> str:
    """The whole page."""
    lines = [
        "# Accuracy at every size",
        "",
        "The default search at six budgets, against the space that was the default before it",
        "(eight points of connections, biases, norms and an SMoA bank at 1 and 4 bits) and the",
        "catalogue's methods. The champion is that of the product's rule. A method's recipe is",
        "that of its best trial; at each budget the method with the best validation accuracy among",
        "those that fit is shown, and of 32-bit methods the best of all. The best trial, by",
        "validation, stands beside the champion: what lies between them is the price of the rule.",
        "The BD-rate is between the fronts on the validation images, as in `taskpack compare`.",
        "Test accuracies, with their standard errors, are in percent, of reloaded packs that read",
        "the test set once.",
        "",
        f"`{WHOLE}` runs it whole: 15 epochs, all images,",
        "16 trials per budget, all points of all methods, three seeds. What was run is smaller,",
        "see the last section: few epochs favour recipes that learn fast, and a small validation",
        "set makes every choice noisier, that of a champion in particular.",
    ]
    for backbone in dict.fromkeys(cell["backbone"] for cell in cells):
        own = [cell for cell in cells if cell["backbone"] == backbone]
        lines += ["", f"## {NAMES[backbone]}", "", *goals(own)]
        lines += ["", *differences(own), "", *prices(own)]
        for cell in own:
            lines += ["", f"### {cell['task']}{_seed(cell)}", "", *table(cell)]
    return "\n".join([*lines, "", "## What was run", "", *runs(cells)]) + "\n"


def goals(cells: Sequence[Cell]) -> list[str]:
    """The goals as a table, on the tasks that ran, for the champion and the best trial."""
    lines = [
        "| goal | tasks | champion | met | best trial | met |",
        "|---|---|---|---|---|---|",
    ]
    for max_bytes in BUDGETS:
        key = str(max_bytes)
        found = [by_task(cells, rule, key) for rule in RULES]
        shown = " | ".join(map(_wins, found))
        lines.append(
            f"| at {max_bytes // 1024} KiB at or above the best method that fits on 5 of 6 tasks |"
            f" {len(found[0])} | {shown} |"
        )
    return [*lines, _goal_of_32_bits(cells), _goal_of_bd_rate(cells)]


def by_task(cells: Sequence[Cell], rule: str, key: str) -> dict[str, list[Difference]]:
    """Between what a rule chooses at a budget and the best method there, by task: one per seed."""
    points: dict[str, list[Difference]] = {}
    for cell in cells:
        chosen = at_share_of_32_bits(cell, rule) if key == "32 bits" else cell[rule][key]["id"]
        found = difference(cell, chosen, cell["methods"][key]["id"])
        if found is not None:
            points.setdefault(cell["task"], []).append(found)
    return points


def mean(points: Mapping[str, Sequence[Difference]]) -> str:
    """The mean over tasks and seeds, with its standard error between them."""
    every = [each for found in points.values() for each, _ in found]
    return f"mean {mean_difference(every)} points"


def differences(cells: Sequence[Cell]) -> list[str]:
    """Champion against the best method that fits, a row per task, a column per budget."""
    keys = [*map(str, BUDGETS), "32 bits"]
    heads = [*(f"{each // 1024} KiB" for each in BUDGETS), f"1/{SHARE_OF_32_BITS} of 32 bits"]
    lines = [
        "Champion less the best method that fits, in points, on average over the seeds, with the",
        "standard error of as many test images (at most: both packs read the same ones):",
        "",
        f"| task | seeds | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(heads)}",
    ]
    found = {key: by_task(cells, "default", key) for key in keys}
    for task in dict.fromkeys(cell["task"] for cell in cells):
        seeds = sum(cell["task"] == task for cell in cells)
        shown = (_average(found[key].get(task, [])) for key in keys)
        lines.append(f"| {task} | {seeds} | {' | '.join(shown)} |")
    return lines


def prices(cells: Sequence[Cell]) -> list[str]:
    """What the product's rule costs in test accuracy and saves in bytes, against other rules."""
    lines = [
        "The champion against what other rules choose of the same trials, on test images, over all",
        "budgets; the standard error is that between task and seed:",
        "",
        "| rule | task and seed | choices | champion less its choice, points | bytes saved |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, choice in OTHER_RULES.items():
        found = [_price(cell, choice) for cell in cells]
        points = [fmean(each for each, _ in pairs) for pairs in found if pairs]
        logs = [each for pairs in found for _, each in pairs]
        if logs:
            lines.append(
                f"| {name} | {len(points)} | {len(logs)} | {mean_difference(points, 2)} |"
                f" {1 - math.exp(fmean(logs)):.0%} |"
            )
    return lines


def _price(cell: Cell, choice: Callable[[Cell, str], str | None]) -> list[tuple[float, float]]:
    """Points of test accuracy and the logarithm of the ratio of bytes, champion to choice, at each
    budget where both were tested.
    """
    pairs = []
    for key in map(str, BUDGETS):
        champion, other = cell["default"][key]["id"], choice(cell, key)
        if champion in cell["tested"] and other in cell["tested"]:
            found = difference(cell, champion, other)
            assert found is not None
            sizes = [cell["tested"][each]["bytes"] for each in (champion, other)]
            pairs.append((found[0], math.log(sizes[0] / sizes[1])))
    return pairs


def _best(cell: Cell, key: str) -> str | None:
    found: str | None = cell["best"][key]["id"]
    return found


def _smallest_near_best(cell: Cell, key: str) -> str | None:
    """Of all trials of the default search within a budget."""
    trials = [
        TrialRecord(
            id=row["id"],
            point=row["point"],
            size_bytes=row["bytes"],
            state="complete",
            val_metric=row["val"],
        )
        for row in cell["trials"]
        if row["family"] == "default" and row["state"] == "complete" and row["bytes"] <= int(key)
    ]
    return within_half_a_point(trials).id if trials else None


OTHER_RULES: Mapping[str, Callable[[Cell, str], str | None]] = {
    "the best by validation": _best,
    "the smallest within 0.5 points of the best, the rule before": _smallest_near_best,
}


def _wins(points: Mapping[str, Sequence[Difference]]) -> str:
    """On how many tasks a rule's choice is at or above the method, on average over the seeds, and
    whether that is enough.
    """
    if not points:
        return "no method fits | -"
    means = [average(found) for found in points.values()]
    wins = sum(points >= 0 for points, _ in means)
    within = sum(-error <= points < 0 for points, error in means)
    is_met = wins >= TASKS_GOAL * len(points)
    noise = f" ({within} more within a standard error)" if within and not is_met else ""
    return f"{wins} of {len(points)}{noise}, {mean(points)} | {_met(is_met)}"


def _goal_of_32_bits(cells: Sequence[Cell]) -> str:
    shown = " | ".join(_near(by_task(cells, rule, "32 bits")) for rule in RULES)
    tasks = len(by_task(cells, RULES[0], "32 bits"))
    return (
        f"| within {POINTS_TO_32_BITS:g} point of the best 32-bit method at 1/{SHARE_OF_32_BITS} of"
        f" its bytes, on average; where there is a pack as small | {tasks} | {shown} |"
    )


def _near(points: Mapping[str, Sequence[Difference]]) -> str:
    if not points:
        return "- | -"
    mean_of_tasks = fmean(average(found)[0] for found in points.values())
    return f"{mean(points)} | {_met(mean_of_tasks >= -POINTS_TO_32_BITS)}"


def _goal_of_bd_rate(cells: Sequence[Cell]) -> str:
    """The geometric mean of the ratios of bytes; its error from those of the tasks."""
    rates = [cell["bd_rate"] for cell in cells if cell["bd_rate"] is not None]
    if not rates:
        return f"| BD-rate at most {BD_GOAL:.0%} | 0 | the fronts do not overlap | - | | |"
    rate = math.exp(fmean(math.log(1 + value) for value, _ in rates)) - 1
    error = math.sqrt(sum((error / (1 + value)) ** 2 for value, error in rates)) / len(rates)
    measured = _rate([rate, (1 + rate) * error])
    return (
        f"| BD-rate to the space of before at most {BD_GOAL:.0%}, by validation | {len(rates)} |"
        f" {measured}, all trials | {_met(rate <= BD_GOAL)} | | |"
    )


def table(cell: Cell) -> list[str]:
    """A row per budget, and what the best 32-bit method reaches."""
    points = {row["id"]: row["point"] for row in cell["trials"]}
    lines = [
        "| budget | champion's recipe | bytes | test % | best trial: bytes | test % |"
        " before: bytes | test % | method | bytes | test % | champion - method | best - method |",
        "|---|---|---:|---|---:|---|---:|---|---|---:|---|---:|---:|",
    ]
    for max_bytes in BUDGETS:
        default, best, house, method = (
            cell[name][str(max_bytes)] for name in ("default", "best", "house", "methods")
        )
        recipe = _recipe(points[default["id"]]) if default["id"] else _nothing(default)
        cells = [
            f"{max_bytes // 1024} KiB",
            recipe,
            *_tested(cell, default["id"]),
            *_tested(cell, best["id"]),
            *_tested(cell, house["id"]),
            method["name"] or "nothing fits",
            *_tested(cell, method["id"]),
            _points(difference(cell, default["id"], method["id"])),
            _points(difference(cell, best["id"], method["id"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *remarks(cell)]


def remarks(cell: Cell) -> list[str]:
    """The best 32-bit method, and the BD-rate."""
    lines = []
    best = cell["methods"]["32 bits"]
    if best["id"]:
        size, test = _tested(cell, best["id"])
        lines.append(f"Best 32-bit method: {best['name']}, {size} bytes, {test} %.")
        small = at_share_of_32_bits(cell, "default")
        if small:
            size, test = _tested(cell, small)
            apart = difference(cell, small, best["id"])
            lines.append(
                f"The champion at 1/{SHARE_OF_32_BITS} of these bytes: {size} bytes, {test} %,"
                f" {_points(apart)} points."
            )
    rate = cell["bd_rate"]
    shown = "the fronts do not overlap" if rate is None else _rate(rate)
    return [*lines, f"BD-rate to the space of before, by validation: {shown}."]


def runs(cells: Sequence[Cell]) -> list[str]:
    """What ran, and what it was shrunk to."""
    lines = [
        "| backbone | task | px | seed | classes | train + val | test | epochs | trials per budget"
        " | points per method | commit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in cells:
        samples = cell["samples"]
        lines.append(
            f"| {cell['backbone']} | {cell['task']} | {cell['size_px']} | {cell['seed']} |"
            f" {cell['classes']} | {samples['train']} + {samples['val']} | {samples['test']} |"
            f" {cell['epochs']} | {cell['trials_per_budget']} | {cell['points_per_method']} |"
            f" {cell['machine']['commit']} |"
        )
    tried: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        families = {row["family"] for row in cell["trials"]} - {"default", "house"}
        names = cell["backbone"], ", ".join(sorted(families))
        tried.setdefault(names, {})[cell["task"]] = None
    lines += [""]
    for (backbone, methods), tasks in tried.items():
        lines.append(f"Methods on {backbone}, {', '.join(tasks)}: {methods}.")
    lines += ["", "Commands:", ""]
    for cell in cells:
        machine = cell["machine"]
        line = f"- `{cell['command']}` on {machine['cpu']}, torch {machine['torch']}"
        lines += [] if line in lines else [line]
    return lines


def _points(difference: Difference | None) -> str:
    return "" if difference is None else f"{difference[0]:+.1f}"


def _average(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    points, error = average(found)
    return f"{points:+.1f} ± {error:.1f}"


def _seed(cell: Cell) -> str:
    return f", seed {cell['seed']}" if cell["seed"] else ""


def _met(is_met: bool | None) -> str:
    return "-" if is_met is None else "yes" if is_met else "**no**"


def _rate(rate: Sequence[float]) -> str:
    value, error = (100 * each for each in rate)
    return f"{value:+.0f} %" + ("" if math.isnan(error) else f" ± {error:.0f}")


def _recipe(point: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) if axis == "parts" else f"{axis} {value:g}" for axis, value in point.items()
    )


def _nothing(entry: Mapping[str, Any]) -> str:
    return f"nothing fits, the smallest takes {entry['smallest']:,}"


def _tested(cell: Cell, key: str | None) -> tuple[str, str]:
    """Bytes and test accuracy of a pack, as cells of a table."""
    found = accuracy(cell, key)
    if found is None or key is None:
        return "", ""
    return f"{cell['tested'][key]['bytes']:,}", f"{found[0]:.1f} ± {found[1]:.1f}"
