"""The Pareto front against its definition, and the figure: same bytes for the same trials, no
global state, readable at its extremes.
"""

from __future__ import annotations

import itertools
import random

import matplotlib
import numpy as np
import pytest
from helpers_cases import for_every
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.reports.front_figure import draw_front
from pipeline.search.pareto import pareto_front

KIB = 1024
# bits, size in KiB, val_metric, state
STUDY = [
    (1, 5.1, 0.871, "complete"),
    (1, 8.4, 0.884, "complete"),
    (1, 11.2, 0.893, "complete"),
    (1, 14.6, 0.912, "complete"),
    (4, 9.8, 0.881, "stopped"),
    (4, 19.4, 0.901, "complete"),
    (4, 21.0, None, "failed"),
    (4, 31.7, 0.917, "complete"),
    (8, 36.9, 0.899, "stopped"),
    (8, 44.2, 0.9165, "complete"),
    (8, 71.3, None, "rejected"),
    (16, 140.0, None, "rejected"),
]


def row(
    identity: str, size_bytes: int, val_metric: float | None, state: str = "complete", bits: int = 4
) -> dict:
    return {
        "id": identity,
        "point": {"bits": bits},
        "size_bytes": size_bytes,
        "state": state,
        "val_metric": val_metric,
        "epochs": 2,
        "seconds": 1.0,
    }


def study() -> list[dict]:
    return [
        row(f"t{index}", int(size * KIB), metric, state, bits)
        for index, (bits, size, metric, state) in enumerate(STUDY)
    ]


def dominated(one: dict, other: dict) -> bool:
    better_or_equal = (
        other["size_bytes"] <= one["size_bytes"] and other["val_metric"] >= one["val_metric"]
    )
    return better_or_equal and (other["size_bytes"], other["val_metric"]) != (
        one["size_bytes"],
        one["val_metric"],
    )


trials_strategy = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([None, 0.1, 0.2, 0.3, 0.4]),
        st.sampled_from(["complete", "complete", "stopped", "rejected"]),
    ),
    max_size=12,
)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(trials_strategy, st.integers(0, 5))
def test_front_is_what_nothing_dominates_in_any_order(
    trials: list[tuple], shuffle_seed: int
) -> None:
    rows = [
        row(f"t{index:02d}", size, metric, state)
        for index, (size, metric, state) in enumerate(trials)
    ]
    complete = [one for one in rows if one["state"] == "complete" and one["val_metric"] is not None]
    reference = {
        (one["size_bytes"], one["val_metric"])
        for one in complete
        if not any(dominated(one, other) for other in complete)
    }
    front = pareto_front(rows)
    assert [(one["size_bytes"], one["val_metric"]) for one in front] == sorted(reference)
    assert all(
        before["val_metric"] < after["val_metric"] for before, after in itertools.pairwise(front)
    )
    random.Random(shuffle_seed).shuffle(rows)
    assert pareto_front(rows) == front


def test_front_ignores_nan_and_stopped() -> None:
    rows = [row("nan", 1, float("nan")), row("stopped", 2, 0.99, "stopped"), row("good", 3, 0.5)]
    assert [one["id"] for one in pareto_front(rows)] == ["good"]
    assert pareto_front([]) == []


def test_same_trials_same_bytes_and_no_global_state(tmp_path) -> None:
    settings_before, backend_before = (
        dict(matplotlib.rcParams),
        matplotlib.get_backend(auto_select=False),
    )
    for name in ("one.png", "two.png"):
        draw_front(
            study(),
            tmp_path / name,
            metric="accuracy",
            title="digits: 12 trials",
            max_bytes=64 * KIB,
            champion="t3",
        )
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert dict(matplotlib.rcParams) == settings_before
    assert matplotlib.get_backend(auto_select=False) == backend_before
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (1216, 800)
        assert b"Matplotlib" not in (tmp_path / "one.png").read_bytes()


def pixels(path, colour: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == colour).all(axis=-1).sum())


def test_champion_budget_and_rejected_are_drawn(tmp_path) -> None:
    vermilion, grey = (0xD5, 0x5E, 0x00), (0x7F, 0x7F, 0x7F)
    complete = [one for one in study() if one["state"] == "complete"]
    draw_front(
        complete,
        tmp_path / "plain.png",
        metric="accuracy",
        title="t",
        max_bytes=None,
        champion=None,
    )
    draw_front(
        complete,
        tmp_path / "champion.png",
        metric="accuracy",
        title="t",
        max_bytes=None,
        champion="t3",
    )
    rejected = [*complete, *(one for one in study() if one["state"] == "rejected")]
    draw_front(
        rejected,
        tmp_path / "rejected.png",
        metric="accuracy",
        title="t",
        max_bytes=None,
        champion=None,
    )
    assert (
        pixels(tmp_path / "plain.png", vermilion)
        == 0
        < pixels(tmp_path / "champion.png", vermilion)
    )
    assert pixels(tmp_path / "plain.png", grey) < pixels(tmp_path / "rejected.png", grey)


@for_every(
    ("trials", "max_bytes", "champion"),
    [
        ([], None, None),
        ([row("a", 5000, None, "rejected")], 4096, None),
        ([row("a", 5000, 0.5)], None, "a"),
        ([row("a", 5000, 0.5), row("b", 5000, 0.5)], 5000, "b"),
        ([row("a", 300, 1.0), row("b", 50_000_000, 0.0)], 60_000_000, "a"),
        ([row("a", 5000, 0.4, "stopped")], 8192, None),
    ],
)
def test_extremes_are_drawn(tmp_path, trials, max_bytes, champion) -> None:
    draw_front(
        trials,
        tmp_path / "front.png",
        metric="accuracy",
        title="extreme",
        max_bytes=max_bytes,
        champion=champion,
    )
    assert (tmp_path / "front.png").stat().st_size > 5000


@pytest.mark.parametrize("champion", ["t99", "t10"])
def test_a_champion_that_was_not_measured_is_an_error(tmp_path, champion) -> None:
    with pytest.raises(ValueError, match=champion):
        draw_front(
            study(),
            tmp_path / "front.png",
            metric="accuracy",
            title="t",
            max_bytes=None,
            champion=champion,
        )
