"""Calibration: its numbers against slow references, its guarantee by simulation, its packs."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_mixed import moved_pack
from PIL import Image

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import load_backbone
from pipeline.driver.calibrated import with_calibration
from pipeline.errors import PackDamaged, SpecError, StorageError
from pipeline.kinds import Outcomes
from pipeline.packs import Calibration, Pack, ledger, pack_to_bytes, read_pack, write_pack
from pipeline.registry.model_files import _signature
from pipeline.registry.pyfunc import PackModel
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor
from pipeline.specs import Backbone, Task
from pipeline.training.calibrate import calibrate, check_samples, quality_of_sets
from pipeline.training.fit import PACK_FILE, FitResult


def drawn(samples: int, temperature: float, seed: int, classes: int = 5) -> Outcomes:
    """Logits whose classes are drawn with their probabilities at a temperature."""
    rng = np.random.default_rng(seed)
    logits = 6 * rng.standard_normal((samples, classes)).astype(np.float32)
    gumbel = rng.gumbel(size=logits.shape)
    return Outcomes(logits, (logits / temperature + gumbel).argmax(axis=1))


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


def covered(outcomes: Outcomes, found: Calibration) -> np.ndarray:
    shares = probabilities(outcomes.outputs.astype(np.float64), found.temperature)
    held: np.ndarray = shares[range(len(shares)), outcomes.targets] >= found.threshold
    return held


@pytest.fixture
def pack(tiny_backbone: Backbone, tiny_task: Task) -> Pack:
    plain = moved_pack(load_backbone(tiny_backbone, tiny_task.input), tiny_task, {"norms": {}})
    return dataclasses.replace(plain, calibration=Calibration(0.9, 400, 2.5, 0.3))


def test_the_temperature_is_found_and_the_threshold_leaves_out_as_many_as_it_may() -> None:
    for temperature in (0.5, 1.0, 3.0):
        outcomes = drawn(4000, temperature, 0)
        found = calibrate(outcomes, 0.9)
        assert found.temperature == pytest.approx(temperature, rel=0.1)
        assert (found.samples, found.coverage) == (4000, 0.9)
        # Of 4000, the 3601st largest probability is in, and no further one.
        assert covered(outcomes, found).sum() == math.ceil(4001 * 0.9)


def test_sets_hold_the_right_class_as_often_as_stated_and_hardly_more() -> None:
    coverage, samples = 0.8, 39
    shares = [
        covered(drawn(400, 2.0, 1000 + seed), calibrate(drawn(samples, 2.0, seed), coverage)).mean()
        for seed in range(150)
    ]
    error = np.std(shares) / math.sqrt(len(shares))
    assert coverage - 3 * error < np.mean(shares) < coverage + 1 / (samples + 1) + 3 * error


def test_too_few_validation_samples_are_refused() -> None:
    for coverage, needed in ((0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)):
        check_samples(coverage, needed)
        calibrate(drawn(needed, 1.0, 0), coverage)
        with pytest.raises(SpecError, match=f"needs {needed} validation samples or more"):
            check_samples(coverage, needed - 1)


def test_the_quality_of_sets_is_counted() -> None:
    shares_NC = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33], [0.6, 0.4, 0.0]])
    with np.errstate(divide="ignore"):
        logits_NC = 2 * np.log(shares_NC)  # a temperature of 2 gives the shares back
    kept = Outcomes(logits_NC.astype(np.float32), np.array([0, 2, 1, 1]))
    sets = quality_of_sets(kept, Calibration(0.9, 10, temperature=2.0, threshold=0.345))
    # Sets {0}, {0, 1}, {} and {0, 1}; the first and the last hold the right class.
    assert (sets.stated, sets.found, sets.mean_size) == (0.9, 0.5, 1.25)
    assert sets.standard_error == pytest.approx(0.25)


def test_only_classification_can_state_a_coverage(tiny_task: Task) -> None:
    content = tiny_task.model_dump(exclude={"metric", "selection"})
    assert Task.model_validate(content | {"coverage": 0.9}).coverage == 0.9
    for changes, said in (
        ({"coverage": 1.0}, "less than 1"),
        ({"coverage": 0.1}, "greater than or equal to 0.5"),
        ({"coverage": 0.9, "kind": "multilabel"}, "only a task of kind classification has sets"),
    ):
        with pytest.raises(ValueError, match=said):
            Task.model_validate(content | changes)


def test_a_calibrated_pack_is_read_back_and_has_the_planned_size(
    pack: Pack, tiny_backbone: Backbone, tiny_task: Task
) -> None:
    content = pack_to_bytes(pack)
    assert read_pack(content).calibration == pack.calibration
    assert pack_to_bytes(read_pack(content)) == content
    plain = pack_to_bytes(dataclasses.replace(pack, calibration=None))
    assert read_pack(plain).calibration is None
    assert 12 < len(content) - len(plain) < 40
    task = tiny_task.model_copy(update={"coverage": 0.9, "name": pack.metadata.task})
    planner = SizePlanner(task, load_backbone(tiny_backbone, task.input), pack.metadata.classes)
    recipe = task.recipe.model_validate(pack.metadata.recipe)
    assert planner.size_bytes(recipe) == len(content) == sum(ledger(pack).values())
    for numbers in ((0.0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1.0, 1.5), (1.0, math.nan)):
        with pytest.raises(PackDamaged, match="calibration: given temperature"):
            Calibration(0.9, 10, *numbers)


def test_every_way_to_predict_gives_the_set(
    pack: Pack, tiny_backbone: Backbone, tiny_task: Task
) -> None:
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (6, 40, 40, 3), dtype=np.uint8))
    predictor = Predictor(pack, backbone, "cpu")
    shares = probabilities(predictor.logits(images).double().numpy(), 2.5)
    threshold = float(np.median(shares))
    calibration = Calibration(0.9, 400, 2.5, threshold)
    pack = dataclasses.replace(pack, calibration=calibration)
    predictor, names = Predictor(pack, backbone, "cpu"), pack.metadata.classes
    wanted = [
        [names[each] for each in np.argsort(-row) if row[each] >= calibration.threshold]
        for row in shares
    ]
    rows = predictor.predict(images)
    assert [row["set"] for row in rows] == wanted
    assert [row["probability"] for row in rows] == pytest.approx(shares.max(axis=1), rel=1e-4)
    assert len({len(each) for each in wanted}) > 1
    host = PackHost(backbone, lambda name: pack_to_bytes(pack), device="cpu")
    assert [row["set"] for row in host.predict([("a", image) for image in images])] == wanted
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "PNG")
    frame = PackModel(predictor).predict([buffer.getvalue()])
    assert (list(frame.columns), frame["set"][0]) == (["label", "probability", "set"], wanted[0])
    declared: Any = _signature("classification", has_sets=True)
    assert [column.name for column in declared.outputs] == list(frame.columns)


def test_a_fit_gets_the_calibration_of_its_trials_outputs(pack: Pack, tmp_path: Path) -> None:
    plain, outcomes = dataclasses.replace(pack, calibration=None), drawn(99, 2.0, 0)
    write_pack(tmp_path / PACK_FILE, plain)
    numbers = {"trained_values": 1, "test_samples": 1, "test_metric": 0.5, "train_seconds": 1.0}
    fitted = FitResult(
        pack_digest="d", size_bytes=1, ledger={}, metric="accuracy", test_metric_stderr=0.1,
        device="cpu", **numbers,  # type: ignore[arg-type]
    )  # fmt: skip
    path, found = with_calibration(tmp_path, fitted, lambda: outcomes, 0.9)
    assert read_pack(path).calibration == calibrate(outcomes, 0.9)
    assert read_pack(tmp_path / PACK_FILE).calibration is None
    assert found.size_bytes == path.stat().st_size == sum(found.ledger.values())
    assert (found.test_metric, found.pack_digest != "d") == (0.5, True)
    with pytest.raises(StorageError, match="validation outputs of this trial are missing"):
        with_calibration(tmp_path, fitted, lambda: None, 0.9)
