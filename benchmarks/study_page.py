"""The page of `study.py`: what has been measured, and early stopping replayed on it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from pages import mean_difference
from study_settings import EPOCHS, FIRST_RATE, OTHER_RATES, TRAIN_PER_CLASS, VAL_PER_CLASS


def markdown(result: dict[str, Any]) -> str:
    """The tables of what has been measured."""
    machine, seeds = result["machine"], result["seeds"]
    lines = [
        "# A study of 12 trials",
        "",
        (
            f"`python benchmarks/study.py --seed N`, N = {', '.join(seeds)}, on {machine['cpu']},"
            f" {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}."
        ),
        "",
        (
            f"cifar10, {10 * TRAIN_PER_CLASS} training and {10 * VAL_PER_CLASS} validation images,"
            f" embedded ViT at 32 px, {EPOCHS} epochs; bits 1 and 4, experts 0 and 4, three"
            " learning rates. Wall seconds are of whole processes. `benchmarks/study.py` says what"
            " each column does."
        ),
        "",
        *_walls(seeds),
        *_phases(seeds),
        *_start_ups(seeds),
        *_stopping(seeds),
        *_warm(seeds),
    ]
    return "\n".join(lines) + "\n"


def _with(seeds: dict[str, Any], *modes: str) -> dict[str, Any]:
    return {
        seed: measured
        for seed, measured in seeds.items()
        if all(mode in measured for mode in modes)
    }


def _walls(seeds: dict[str, Any]) -> list[str]:
    lines = [
        (
            "| seed | study s | scripts s | ratio | loop s | ratio | best validation %: study |"
            " scripts | loop | epochs run by the study |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, measured in _with(seeds, "study", "scripts").items():
        study_seconds = measured["study"]["wall_seconds"]
        walls = [
            (measured[mode]["wall_seconds"] if mode in measured else None)
            for mode in ("scripts", "loop")
        ]
        ratios = " | ".join(
            "| " if wall is None else f"{wall:.0f} | {study_seconds / wall:.2f}" for wall in walls
        )
        top = " | ".join(
            f"{100 * best(measured[mode]):.1f}" if mode in measured else ""
            for mode in ("study", "scripts", "loop")
        )
        epochs = sum(len(curve) for curve in measured["study"]["curves"].values())
        lines.append(
            f"| {seed} | {study_seconds:.0f} | {ratios} | {top} | {epochs} of {12 * EPOCHS} |"
        )
    error = 100 * math.sqrt(0.25 / (10 * VAL_PER_CLASS))
    return [
        *lines,
        "",
        (
            f"One standard error of an accuracy near 50 % on {10 * VAL_PER_CLASS} images is"
            f" {error:.1f} points."
        ),
        "",
    ]


def best(mode: dict[str, Any]) -> float:
    """Best final validation accuracy of the trials that came to their end."""
    return max(curve[-1] for curve in mode["curves"].values() if len(curve) == EPOCHS)


def _phases(seeds: dict[str, Any]) -> list[str]:
    lines = [
        "## Where the time goes",
        "",
        (
            "Seconds, medians over seeds. A study's trials share the cores; its search is their"
            " wall time."
        ),
        "",
    ]
    for mode in ("study", "scripts", "loop"):
        measured = [each[mode] for each in _with(seeds, mode).values()]
        if measured:
            phases = {
                name: statistics.median(each["phases"][name] for each in measured)
                for name in measured[0]["phases"]
            }
            lines.append(
                f"- {mode}: "
                + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
            )
    studies = [each["study"] for each in _with(seeds, "study").values()]
    if studies:
        enters = statistics.median(each["first trial enters after"] for each in studies)
        busy = statistics.median(each["trial seconds"] for each in studies)
        lines.append(
            f"- within the study's search: the first trial enters after {enters:.1f}; all trials"
            f" together take {busy:.1f}"
        )
    return [*lines, ""]


def _start_ups(seeds: dict[str, Any]) -> list[str]:
    follow_on = [
        start_up
        for measured in _with(seeds, "study").values()
        for start_up in measured["study"]["start-ups"]
    ]
    if not follow_on:
        return []
    lines = [
        "## Start-up of a follow-on trial",
        "",
        f"{len(follow_on)} trials that followed another in their worker.",
        "",
    ]
    lines += ["| | median s | largest s |", "|---|---|---|"]
    for name in ("hand-over", "to first step"):
        values = [each[name] for each in follow_on]
        lines.append(f"| {name} | {statistics.median(values):.3f} | {max(values):.3f} |")
    return [
        *lines,
        "",
        "Hand-over: from the end of one trial to the beginning of the next, which is Ray Tune's.",
        "",
    ]


def _stopping(seeds: dict[str, Any]) -> list[str]:
    full = []
    for measured in _with(seeds, "study", "scripts").values():
        sizes_bytes = measured["study"]["sizes_bytes"]
        full.append(
            (
                [measured["scripts"]["curves"][key] for key in sizes_bytes],
                list(sizes_bytes.values()),
            )
        )
    if not full:
        return []
    lines = [
        "## Early stopping, replayed on the scripts' full curves",
        "",
        (
            "Lost: points of the best accuracy, and the most that the front loses at any size,"
            " means over seeds."
        ),
        "",
        (
            "| no trial ends before | standard errors | epochs run | trials stopped | best lost |"
            " front lost |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for share, name in (
        (1 / 8, "an eighth"),
        (1 / 3, "a third"),
        (1 / 2, "a half"),
        (2 / 3, "two thirds"),
    ):
        for errors in (1, 2, 3):
            replayed = [replay(curves, sizes_bytes, share, errors) for curves, sizes_bytes in full]
            mean = {key: statistics.mean(each[key] for each in replayed) for key in replayed[0]}
            lines.append(
                f"| {name} | {errors} | {100 * mean['epochs']:.0f} % | {mean['stopped']:.1f} of 12 "
                f"| {100 * mean['best lost']:.1f} | {100 * mean['front lost']:.1f} |"
            )
    return [*lines, ""]


def replay(
    curves: list[list[float]], sizes_bytes: list[int], first_share: float, errors: float
) -> dict[str, float]:
    """What early stopping with other settings would have done to full curves: share of epochs run,
    trials stopped, points lost.
    """
    from pipeline.search import stopping
    from pipeline.search.proposer import LAG
    from pipeline.search.trial_record import TrialRecord

    before = stopping.FIRST_SHARE, stopping.MARGIN_ERRORS
    stopping.FIRST_SHARE, stopping.MARGIN_ERRORS = first_share, errors
    records: list[TrialRecord] = []
    for slot, (curve, size_bytes) in enumerate(zip(curves, sizes_bytes, strict=True)):
        rivals = records[: max(0, slot - LAG + 1)]
        binomial = [math.sqrt(value * (1 - value) / (10 * VAL_PER_CLASS)) for value in curve]
        stops = (
            end
            for end in range(1, EPOCHS)
            if stopping.is_dominated(curve[:end], binomial[end - 1], EPOCHS, size_bytes, rivals)
        )
        kept = tuple(curve[: next(stops, EPOCHS)])
        state = "complete" if len(kept) == EPOCHS else "stopped"
        records.append(
            TrialRecord(id=str(slot), point={}, size_bytes=size_bytes, state=state, curve=kept)  # type: ignore[arg-type]
        )
    stopping.FIRST_SHARE, stopping.MARGIN_ERRORS = before
    complete = [record for record in records if record.state == "complete"]
    lost: list[float] = []
    for limit in sorted(set(sizes_bytes)):
        full = max(
            curve[-1]
            for curve, size_bytes in zip(curves, sizes_bytes, strict=True)
            if size_bytes <= limit
        )
        lost.append(
            full
            - max(
                (record.curve[-1] for record in complete if record.size_bytes <= limit), default=0.0
            )
        )
    return {
        "epochs": sum(len(record.curve) for record in records) / (EPOCHS * len(records)),
        "stopped": len(records) - len(complete),
        "best lost": lost[-1],
        "front lost": max(lost),
    }


def _warm(seeds: dict[str, Any]) -> list[str]:
    rows = [row for measured in _with(seeds, "warm").values() for row in measured["warm"]["rows"]]
    if not rows:
        return []
    lines = [
        "## Warm starts",
        "",
        (
            f"{len(rows)} trials with the learning rates {' and '.join(map(str, OTHER_RATES))}:"
            f" from the usual start for {EPOCHS} epochs and for {EPOCHS // 2}, and for"
            f" {EPOCHS // 2} from the values of the finished trial with {FIRST_RATE}."
        ),
        "",
        "| | validation % | against cold, points |",
        "|---|---|---|",
    ]
    for name in ("cold", "cold, half", "warm, half"):
        differences = [100 * (row[name] - row["cold"]) for row in rows]
        lines.append(
            f"| {name} | {100 * statistics.mean(row[name] for row in rows):.1f} |"
            f" {mean_difference(differences)} |"
        )
    return [*lines, ""]
