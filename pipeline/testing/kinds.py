"""What every task kind and every metric promises. Each function raises AssertionError where one
does not, and returns nothing."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.kinds import (
    IGNORED,
    Annotations,
    Metric,
    Outcomes,
    TaskKind,
    classes_in,
    metric_named,
    metrics_of,
)

_CLASSES, _SAMPLES = 4, 24
_BLOCKS, _BLOCK_PX = 3, 6
"""Drawn masks have as many blocks a side, each of one class."""


def check_kind(kind: TaskKind) -> None:
    """Check a kind on drawn labels and outputs: labels, targets, losses, what is kept, predictions.

    Its metrics are checked, too.
    """
    annotations, outputs = _drawn(kind)
    _check_labels(kind)
    _check_losses(kind, annotations, outputs)
    _check_kept(kind, annotations, outputs)
    _check_predictions(kind, outputs)
    assert kind.default_metric in metrics_of(kind.name), "the default metric is not registered"
    for name in metrics_of(kind.name):
        check_metric(metric_named(name, kind.name), kind)


def check_metric(metric: Metric, kind: TaskKind) -> None:
    """Check a metric on outcomes of `kind`: its range, its order, weights as counts, its error."""
    finer = metric.finer
    assert finer is None or finer in metrics_of(kind.name), f"finer: {finer!r} is not registered"
    outcomes = _outcomes(kind)
    value, error = metric.value(outcomes), metric.standard_error(outcomes)
    assert 0 <= value <= 1, f"{metric.name} is {value}; expected a number in [0, 1]"
    assert np.isfinite(error), f"{metric.name} has the standard error {error}"
    assert error >= 0, f"{metric.name} has the standard error {error}"
    assert error == metric.standard_error(outcomes), "another standard error for the same outcomes"
    names = [f"class {number}" for number in range(_CLASSES)]
    by_class = metric.values_by_class(outcomes, names)
    assert all(0 <= each <= 1 for each in by_class.values()), f"by class: {by_class}"
    best = _outcomes(kind, noise=0.0)
    assert metric.value(best) > value, f"{metric.name} is not larger for better outputs"
    counts_N = np.random.default_rng(1).integers(0, 3, len(outcomes))
    repeated = Outcomes(
        outcomes.outputs.repeat(counts_N, axis=0), outcomes.targets.repeat(counts_N, axis=0)
    )
    weighted = metric.values(outcomes, counts_N[None].astype(np.float64))
    assert weighted.shape == (1,), f"{metric.name}: expected a value per set of weights"
    np.testing.assert_allclose(weighted[0], metric.value(repeated), rtol=1e-9)
    mirrored = Outcomes(outcomes.outputs[::-1], outcomes.targets[::-1])
    np.testing.assert_allclose(metric.value(mirrored), value, rtol=1e-9)
    single = Outcomes(outcomes.outputs[:1], outcomes.targets[:1])  # most classes do not occur
    assert 0 <= metric.value(single) <= 1, f"{metric.name} of one sample is not in [0, 1]"
    assert np.isfinite(metric.standard_error(single)), f"{metric.name} has no error for one sample"


def _drawn(kind: TaskKind) -> tuple[Annotations, torch.Tensor]:
    """Labels of every class, or masks of them, and outputs without a relation to them."""
    rng = np.random.default_rng(0)
    if kind.is_dense:
        return _drawn_masks(rng)
    outputs = torch.from_numpy(rng.normal(size=(_SAMPLES, _CLASSES)).astype(np.float32))
    return [kind.label(each) for each in _written(kind)], outputs


def _written(kind: TaskKind) -> list[list[int]]:
    """The classes of each sample."""
    written = [[number % _CLASSES] for number in range(_SAMPLES)]
    if not kind.several_labels:
        return written
    rng = np.random.default_rng(0)
    return [[], *(sorted({*each, int(rng.integers(_CLASSES))}) for each in written[1:])]


def _drawn_masks(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of blocks, some of them ignored, and outputs that are blocks too."""
    block = np.ones((_BLOCK_PX, _BLOCK_PX), np.uint8)
    numbers = rng.integers(_CLASSES + 1, size=(_SAMPLES, _BLOCKS, _BLOCKS)).astype(np.uint8)
    masks = np.kron(np.where(numbers == _CLASSES, IGNORED, numbers).astype(np.uint8), block)
    noise = rng.normal(size=(_SAMPLES, _CLASSES, _BLOCKS, _BLOCKS)).astype(np.float32)
    return torch.from_numpy(masks), torch.from_numpy(np.kron(noise, block))


def _outcomes(kind: TaskKind, noise: float = 1.5) -> Outcomes:
    """Outcomes of a model that is right but for `noise`."""
    annotations, drawn = _drawn(kind)
    targets = kind.targets(annotations, _CLASSES)
    right = kind.soft_targets(targets, _CLASSES)
    outputs, targets = kind.kept(2 * right - 1 + noise * drawn, targets)
    return Outcomes(outputs.numpy(), targets.numpy())


def _check_labels(kind: TaskKind) -> None:
    for label in [kind.label(each) for each in _written(kind)]:
        assert kind.label(classes_in(label)) == label, "a label does not keep its classes"
    for wrong in [[0, 0]] if kind.several_labels else [[], [0, 1]]:
        try:
            kind.label(wrong)
        except ValueError:
            continue
        raise AssertionError(f"the label {wrong} is accepted")


def _check_losses(kind: TaskKind, annotations: Annotations, outputs: torch.Tensor) -> None:
    targets = kind.targets(annotations, _CLASSES)
    assert len(targets) == len(annotations), "expected a target per label"
    assert len(kind.targets(annotations[:0], _CLASSES)) == 0, "expected no targets for no labels"
    outputs = outputs.clone().requires_grad_()
    loss = kind.loss(outputs, targets)
    assert loss.ndim == 0, "expected a mean over the batch"
    for name in kind.losses:
        each = kind.loss(outputs, targets, name=name)
        (gradient,) = torch.autograd.grad(each, [outputs])
        fallen = kind.loss(outputs - gradient, targets, name=name)
        assert fallen < each, f"the loss {name} falls along no gradient"
    assert torch.equal(kind.loss(outputs, targets, name=kind.losses[0]), loss), "no default loss"
    soft = kind.soft_targets(targets, _CLASSES)
    torch.testing.assert_close(kind.loss(outputs, soft), loss)
    smoothed, exact = kind.loss(40 * soft, targets, 0.1), kind.loss(40 * soft, targets)
    assert smoothed > exact, "label smoothing changes nothing"
    assert kind.selection_losses, "expected a loss to rank connections by"
    if "contrastive" in kind.selection_losses:
        _check_positives(kind.positives(targets))


def _check_positives(positives: torch.Tensor) -> None:
    assert positives.dtype == torch.bool, "expected bool [B, B]"
    assert torch.equal(positives, positives.T), "a pair is positive one way only"
    assert positives.diagonal().all(), "a sample's other view must be a positive"


def _check_kept(kind: TaskKind, annotations: Annotations, outputs: torch.Tensor) -> None:
    whole = kind.kept(outputs, kind.targets(annotations, _CLASSES))
    halves = [
        kind.kept(outputs[part], kind.targets(annotations[part], _CLASSES))
        for part in (slice(None, 10), slice(10, None))
    ]
    for kept, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert len(kept) == len(annotations), "expected a row per sample"
        assert torch.equal(kept, torch.cat(parts)), "what is kept depends on the batch"


def _check_predictions(kind: TaskKind, outputs: torch.Tensor) -> None:
    classes = [f"class {number}" for number in range(_CLASSES)]
    if kind.is_dense:
        outputs = outputs.argmax(dim=1).to(torch.uint8)
    rows = kind.predictions(outputs, classes)
    assert len(rows) == len(outputs), "expected a prediction per row"
    assert kind.predictions(outputs[:0], classes) == [], "expected no predictions of no images"
    for row in rows:
        assert list(row) == [name for name, _ in kind.columns], "the keys are not the columns"
