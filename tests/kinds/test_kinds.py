"""Task kinds and metrics: the conformance suites, torchmetrics as reference, and their own
corners.
"""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_cases import for_every
from torchmetrics.functional import classification as reference

from pipeline.kinds import (
    Label,
    Metric,
    Outcomes,
    TaskKind,
    kind_named,
    kind_names,
    metric_named,
    metrics_of,
    register_kind,
    score,
)
from pipeline.kinds.metrics import metric
from pipeline.kinds.metrics.ranking import softmax
from pipeline.testing import check_kind, check_metric

SAMPLES, CLASSES = 60, 5


@pytest.mark.parametrize("name", kind_names())
def test_every_kind_and_its_metrics_keep_their_promises(name: str) -> None:
    check_kind(kind_named(name))


def drawn(kind: str, *, absent: bool = False, ties: bool = False) -> Outcomes:
    """Outcomes somewhat better than chance, without samples of the last class where one is to be
    absent.
    """
    rng = np.random.default_rng(3)
    occurring = CLASSES - absent
    targets = rng.integers(occurring, size=SAMPLES)
    is_label = np.eye(CLASSES, dtype=bool)[targets]
    if kind == "multilabel":
        is_label |= (rng.random((SAMPLES, CLASSES)) < 0.2) & (np.arange(CLASSES) < occurring)
        is_label[:7] = False
    outputs = (is_label + rng.normal(size=(SAMPLES, CLASSES)) - 0.3).astype(np.float32)
    outputs = np.round(outputs) if ties else outputs
    return Outcomes(outputs, is_label.astype(np.uint8) if kind == "multilabel" else targets)


def by_torch(name: str, kind: str, outcomes: Outcomes) -> float:
    """The mean over the classes that occur, of torchmetrics' values for each; the likelihood from
    torch's cross-entropy.
    """
    outputs, targets = torch.from_numpy(outcomes.outputs), torch.from_numpy(outcomes.targets).long()
    if name == "likelihood":
        return float((-F.cross_entropy(outputs, targets)).exp())
    prefix = "multiclass" if kind == "classification" else "multilabel"
    form = {
        "accuracy": "accuracy",
        "balanced_accuracy": "recall",
        "f1": "f1_score",
        "auroc": "auroc",
        "mAP": "average_precision",
    }[name]
    function = getattr(reference, f"{prefix}_{form}")
    if name == "accuracy":
        return float(function(outputs, targets, CLASSES, average="micro"))
    # of the same softmax: equal logits give equal probabilities only to within rounding
    scores = (
        torch.from_numpy(softmax(outcomes.outputs))
        if kind == "classification"
        else outputs.sigmoid()
    )
    with warnings.catch_warnings(action="ignore"):  # of classes that do not occur
        values = function(scores, targets, CLASSES, average=None)
    occurs = F.one_hot(targets, CLASSES).sum(0) if kind == "classification" else targets.sum(0)
    return float(values[occurs > 0].mean())


@for_every("absent", [False, True])
@for_every("ties", [False, True])
@for_every(
    ("kind", "name"),
    [
        (kind, name)
        for kind in kind_names()
        if not kind_named(kind).is_dense
        for name in metrics_of(kind)
    ],
)
def test_metrics_are_those_of_torch(kind: str, name: str, absent: bool, ties: bool) -> None:
    outcomes = drawn(kind, absent=absent, ties=ties)
    value = metric_named(name, kind).value(outcomes)
    assert value == pytest.approx(by_torch(name, kind, outcomes), abs=1e-6)
    assert 0 < value < 1


def test_accuracy_has_the_binomial_standard_error() -> None:
    outcomes = Outcomes(np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]], np.array([0, 1, 2, 0, 0]))
    found = score(metric_named("accuracy", "classification"), outcomes)
    assert (found.value, found.samples) == (0.8, 5)
    assert found.standard_error == pytest.approx(np.sqrt(0.8 * 0.2 / 5))


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy"])
def test_formulas_of_standard_errors_agree_with_the_bootstrap(name: str) -> None:
    outcomes = drawn("classification")
    exact = metric_named(name, "classification")
    drawn_anew = Metric(name, "classification", exact.values)
    error = exact.standard_error(outcomes)
    assert drawn_anew.standard_error(outcomes) == pytest.approx(error, rel=0.2)


def test_a_bootstrap_is_that_of_resampled_rows() -> None:
    outcomes, chosen = drawn("multilabel"), metric_named("mAP", "multilabel")
    rng, values = np.random.default_rng(5), []
    for _ in range(200):
        rows = rng.integers(SAMPLES, size=SAMPLES)
        values.append(chosen.value(Outcomes(outcomes.outputs[rows], outcomes.targets[rows])))
    error = chosen.standard_error(outcomes)
    assert error == pytest.approx(float(np.std(values, ddof=1)), rel=0.2)


def test_balanced_accuracy_does_not_reward_the_largest_class() -> None:
    outputs = np.tile(np.array([1, 0], np.float32), (10, 1))
    outcomes = Outcomes(outputs, np.array([0] * 9 + [1]))
    assert metric_named("accuracy", "classification").value(outcomes) == 0.9
    assert metric_named("balanced_accuracy", "classification").value(outcomes) == 0.5


def test_a_metric_that_is_defined_for_no_class_is_0() -> None:
    outcomes = Outcomes(np.ones((3, 2), np.float32), np.zeros((3, 2), np.uint8))
    for name in metrics_of("multilabel"):
        assert metric_named(name, "multilabel").value(outcomes) == 0.0


def test_a_multi_label_loss_is_binary_cross_entropy_of_each_class() -> None:
    kind, outputs = kind_named("multilabel"), torch.tensor([[2.0, -1.0, 0.5]])
    targets = kind.targets([(0, 2)], 3)
    assert targets.tolist() == [[1, 0, 1]]
    p = outputs.sigmoid()
    for smoothing in (0.0, 0.2):
        t = targets * (1 - smoothing) + smoothing / 2
        expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        torch.testing.assert_close(kind.loss(outputs, targets, smoothing), expected)


def test_contrastive_positives_share_a_label_or_have_none() -> None:
    kind = kind_named("multilabel")
    labels: list[Label] = [(0, 1), (1, 2), (2,), (), ()]
    found = kind.positives(kind.targets(labels, 3))
    expected = [[bool(set(a) & set(b)) or a == b for b in labels] for a in labels]  # type: ignore[arg-type]
    assert found.tolist() == expected


def test_predictions_are_what_people_are_told() -> None:
    outputs = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0]])
    first, second = kind_named("multilabel").predictions(outputs, ["car", "dog", "tree"])
    assert (first["labels"], second["labels"]) == (["car", "tree"], [])
    assert first["probabilities"] == pytest.approx(
        dict(zip(["car", "dog", "tree"], outputs[0].sigmoid().tolist(), strict=True))
    )
    single = kind_named("classification").predictions(outputs, ["car", "dog", "tree"])[0]
    assert single == {"label": "car", "probability": pytest.approx(float(outputs[0].softmax(0)[0]))}


@pytest.mark.parametrize(
    ("kind", "classes", "said"),
    [
        ("classification", [1, 2], "2 labels; expected one, or `kind: multilabel`"),
        ("classification", [], "0 labels"),
        ("multilabel", [1, 2, 1], "given twice"),
    ],
)
def test_labels_that_a_kind_does_not_have_are_refused(
    kind: str, classes: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        kind_named(kind).label(classes)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of: classification, multilabel"):
        kind_named("regression")
    with pytest.raises(ValueError, match=r"expected a metric of kind multilabel: .*mAP"):
        metric_named("accuracy", "multilabel")


def test_a_name_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register_kind(type(kind_named("classification")))
    metrics_of("classification")
    with pytest.raises(ValueError, match="registered twice"):
        metric("accuracy", "classification")(lambda outcomes, weights: weights[:, 0])


def test_the_conformance_suites_notice_what_is_broken() -> None:
    class Forgetful(type(kind_named("classification"))):  # type: ignore[misc]
        def soft_targets(self, targets: torch.Tensor, class_count: int) -> torch.Tensor:
            return F.one_hot(targets, class_count).float().flip(0)

    kind: TaskKind = Forgetful()
    with pytest.raises(AssertionError):
        check_kind(kind)
    for values in (
        lambda outcomes, weights: np.full(len(weights), 1.5),
        lambda outcomes, weights: np.full(len(weights), 0.5),
        lambda outcomes, weights: np.full(
            len(weights), (outcomes.outputs.argmax(1) == outcomes.targets).mean()
        ),
    ):
        with pytest.raises(AssertionError):
            check_metric(Metric("broken", "classification", values), kind_named("classification"))
