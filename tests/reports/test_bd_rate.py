"""BD-rate: the published figure, exact cases, and its error from resamples of the same samples."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.reports.bd_rate import Curve, bd_rate, compare_curves

ANCHOR = np.array([9487.76, 4593.60, 2486.44, 1358.24]), np.array([40.037, 38.615, 36.845, 34.851])
TEST = np.array([9787.80, 4469.00, 2451.52, 1356.24]), np.array([40.121, 38.651, 36.970, 34.987])


def test_it_is_that_of_the_reference_implementation() -> None:
    """The data of the `bjontegaard` package's documentation, and what it gives by PCHIP."""
    assert bd_rate(*ANCHOR, *TEST) == pytest.approx(-0.04417485350589, abs=1e-12)


def test_half_the_bytes_at_every_quality_are_half() -> None:
    sizes, metric = np.array([1e3, 2e3, 4e3]), np.array([0.5, 0.6, 0.65])
    assert bd_rate(sizes, metric, sizes / 2, metric) == pytest.approx(-0.5)
    assert bd_rate(sizes, metric, sizes * 3, metric) == pytest.approx(2.0)


def test_only_the_fronts_count_in_any_order() -> None:
    sizes, metric = np.array([1e3, 2e3, 4e3]), np.array([0.5, 0.6, 0.65])
    more = np.array([4e3, 3e3, 1e3, 2e3, 2e3, 5e3]), np.array([0.65, 0.55, 0.5, 0.6, 0.2, 0.65])
    assert bd_rate(sizes, metric, *more) == pytest.approx(0.0)


@pytest.mark.parametrize("other", [[0.7, 0.8], [0.1, 0.2], [0.55, 0.55]])
def test_fronts_without_a_common_range_have_none(other: list[float]) -> None:
    sizes = np.array([1e3, 2e3])
    assert bd_rate(sizes, np.array([0.5, 0.6]), sizes, np.array(other)) is None


def test_the_error_is_that_of_paired_resamples() -> None:
    sizes, metric = np.array([1e3, 2e3, 4e3]), np.array([0.5, 0.6, 0.65])
    shifts = np.random.default_rng(0).normal(0, 0.02, (200, 1))
    reference = Curve(sizes, metric, metric + shifts)
    same_samples = compare_curves(reference, Curve(sizes / 2, metric, metric + shifts))
    assert same_samples is not None
    assert same_samples.value == pytest.approx(-0.5)
    assert same_samples.standard_error == pytest.approx(0, abs=1e-12)
    others = compare_curves(reference, Curve(sizes / 2, metric, metric - shifts))
    assert others is not None
    assert others.standard_error > 0.05


def test_without_an_overlap_in_the_resamples_the_error_is_unknown() -> None:
    sizes, metric = np.array([1e3, 2e3]), np.array([0.5, 0.6])
    compared = compare_curves(
        Curve(sizes, metric, np.array([[0.5, 0.6]])), Curve(sizes, metric, np.array([[0.8, 0.9]]))
    )
    assert compared is not None
    assert np.isnan(compared.standard_error)
