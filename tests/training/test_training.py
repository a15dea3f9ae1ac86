"""Training: the schedule, what it learns, what it repeats, what it refuses; exact evaluation; and a
fit that can be interrupted anywhere.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import for_every

from pipeline.adaptation import AdaptedModel, RankedIndices, attach
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, to_pack
from pipeline.backbones import fingerprint
from pipeline.errors import TrainingError
from pipeline.kinds import Outcomes, Score, metric_named, score
from pipeline.packs import pack_to_bytes, read_pack
from pipeline.selection import select_locally
from pipeline.specs import Connections, Recipe, Training
from pipeline.training import Inputs, evaluate, train_epochs
from pipeline.training import fit as fit_module
from pipeline.training.fit import PACK_FILE, RESULT_FILE, FitResult, fit, read_fit
from pipeline.training.loop import learning_rate_factor

Selected = dict[str, RankedIndices]


@pytest.fixture(scope="module")
def selected(tiny_inputs: Inputs) -> Selected:
    return select_locally(tiny_inputs, 2)


def attached(
    inputs: Inputs, selected: Selected, recipe: Recipe | None = None, seed: int = 0
) -> AdaptedModel:
    return attach(
        inputs.backbone,
        recipe or inputs.task.recipe,
        len(inputs.index.classes),
        selected=selected,
        seed=seed,
    )


def scored(model: AdaptedModel, inputs: Inputs, split: str) -> Score:
    return score(
        inputs.metric, evaluate(model, inputs.reader(split), inputs.splits[split], inputs.kind)
    )


def run(
    model: AdaptedModel, inputs: Inputs, split: str = "train", seed: int = 0, **changes: Any
) -> list[float]:
    """Train to the end with the tiny task's settings but for `changes`; each epoch's loss."""
    spec = inputs.task.recipe.training.model_copy(update=changes)
    return list(
        train_epochs(
            model,
            inputs.reader(split),
            inputs.splits[split],
            spec,
            inputs.kind,
            seed=seed,
            flip=False,
        )
    )


def packed(model: AdaptedModel, inputs: Inputs) -> bytes:
    return pack_to_bytes(
        to_pack(
            model, describe(inputs.task, inputs.task.recipe, inputs.backbone, inputs.index.classes)
        )
    )


# --- the loop -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_one_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 12, 4) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert all(earlier > later for earlier, later in itertools.pairwise(factors[4:]))
    assert learning_rate_factor(12, 12, 4) == pytest.approx(0)


def test_a_schedule_may_have_no_warm_up_or_nothing_else() -> None:
    assert learning_rate_factor(0, 10, 0) == 1
    assert [learning_rate_factor(step, 4, 8) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
    assert learning_rate_factor(4, 4, 4) == 1


def test_the_optimiser_follows_the_schedule(
    tiny_inputs: Inputs, selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    run(
        attached(tiny_inputs, selected),
        tiny_inputs,
        epochs=2,
        learning_rate=0.01,
        warmup_epochs=0.5,
    )
    per_epoch = math.ceil(len(tiny_inputs.splits["train"]) / 16)
    expected = [
        0.01 * learning_rate_factor(step, 2 * per_epoch, round(0.5 * per_epoch))
        for step in range(2 * per_epoch)
    ]
    assert used == pytest.approx(expected)


def test_the_optimiser_holds_one_parameter_a_width(
    tiny_inputs: Inputs, selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any) -> Any:
        held.append([id(parameter) for group in self.param_groups for parameter in group["params"]])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    model = attached(tiny_inputs, selected)
    run(model, tiny_inputs, epochs=1)
    assert {tuple(ids) for ids in held} == {
        tuple(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    }
    assert len(held[0]) == len({tensor.bits for tensor in model.values.tensors}) > 1


def test_it_learns_and_leaves_the_backbone_alone(tiny_inputs: Inputs, selected: Selected) -> None:
    state = tiny_inputs.backbone.model.state_dict()
    before = fingerprint(state)
    random_state = torch.get_rng_state()
    model = attached(tiny_inputs, selected)
    losses = run(model, tiny_inputs, epochs=25, learning_rate=0.02)
    assert len(losses) == 25
    assert losses[-1] < 0.75 * losses[0]
    assert scored(model, tiny_inputs, "train").value > 0.35, "chance is 1/8"
    assert fingerprint(state) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_first_loss_is_the_cross_entropy_of_the_first_batches(
    tiny_inputs: Inputs, selected: Selected
) -> None:
    """With a learning rate of next to nothing and no dropout, an epoch's loss is that of the
    untrained model, label smoothing included."""
    model = attached(tiny_inputs, selected)
    model.dropouts[0].share = 0.0  # type: ignore[assignment]
    (loss,) = run(
        model,
        tiny_inputs,
        epochs=1,
        learning_rate=1e-30,
        label_smoothing=0.1,
        batch_size=len(tiny_inputs.splits["train"]),
    )
    images, labels = tiny_inputs.reader("train").read(tiny_inputs.splits["train"].samples)
    with torch.inference_mode():
        log_p = model.eval()(images).double().log_softmax(dim=1)
    per_sample = [
        -(0.9 * log_p[row, label] + 0.1 * log_p[row].mean())
        for row, label in enumerate(labels.tolist())
    ]
    assert loss == pytest.approx(float(sum(per_sample)) / len(per_sample), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"augment": "light", "cutmix": 1.0}],
    ids=["fp32", "bf16", "augmented"],
)
def test_a_seed_gives_the_same_values_and_the_same_pack(
    changes: dict[str, Any], tiny_inputs: Inputs, selected: Selected
) -> None:
    models = [attached(tiny_inputs, selected) for _ in range(3)]
    losses = [
        run(model, tiny_inputs, seed=seed, epochs=1, **changes)
        for model, seed in zip(models, (1, 1, 2), strict=True)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].values.parameters(), models[1].values.parameters(), strict=True)
    )
    contents = [packed(model, tiny_inputs) for model in models]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("has_units", [True, False])
def test_float32_stands_in_for_bfloat16_where_that_is_emulated(
    has_units: bool, tiny_inputs: Inputs, selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_units}
    )
    losses = {
        precision: run(attached(tiny_inputs, selected), tiny_inputs, epochs=1, precision=precision)
        for precision in ("fp32", "bf16")
    }
    assert (losses["bf16"] == losses["fp32"]) != has_units


def test_bfloat16_comes_close_to_float32(
    tiny_inputs: Inputs, selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.devices.has_bf16_units", lambda device: True)
    losses = {
        precision: run(attached(tiny_inputs, selected), tiny_inputs, epochs=2, precision=precision)
        for precision in ("fp32", "bf16")
    }
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_caller_may_stop_after_any_epoch(tiny_inputs: Inputs, selected: Selected) -> None:
    whole = run(attached(tiny_inputs, selected), tiny_inputs, epochs=3)
    spec = tiny_inputs.task.recipe.training.model_copy(update={"epochs": 3})
    epochs = train_epochs(
        attached(tiny_inputs, selected),
        tiny_inputs.reader("train"),
        tiny_inputs.splits["train"],
        spec,
        tiny_inputs.kind,
        seed=0,
        flip=False,
    )
    assert [next(epochs), next(epochs)] == whole[:2]
    epochs.close()  # type: ignore[attr-defined]


def test_a_loss_that_is_not_finite_is_an_error_that_names_step_and_learning_rate(
    tiny_inputs: Inputs, selected: Selected
) -> None:
    with pytest.raises(
        TrainingError,
        match=(
            r"the loss became (nan|inf) at step \d+ of \d+ with learning rate 1e\+30; lower"
            r" training\.learning_rate"
        ),
    ):
        run(attached(tiny_inputs, selected), tiny_inputs, epochs=3, learning_rate=1e30)


# --- evaluation -----------------------------------------------------------------------------------


def test_every_sample_counts_once(
    tiny_inputs: Inputs, selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(tiny_inputs, selected)
    run(model, tiny_inputs, epochs=3, learning_rate=0.01)
    for split in ("train", "val", "trainval", "test"):
        reader, correct = tiny_inputs.reader(split), 0
        samples = tiny_inputs.splits[split].samples
        for row in range(len(samples)):
            image, label = reader.read(samples[row : row + 1])
            with torch.inference_mode():
                correct += int(int(model.eval()(image)[0].argmax()) == int(label[0]))
        assert 0 < correct < len(samples) or split == "val"
        for batch in (1, 7, 128):
            monkeypatch.setattr(
                importlib.import_module("pipeline.training.evaluate"), "EVALUATION_BATCH", batch
            )
            outcomes = evaluate(model.train(), reader, tiny_inputs.splits[split], tiny_inputs.kind)
            assert (outcomes.targets == tiny_inputs.splits[split].labels).all()
            found = score(tiny_inputs.metric, outcomes)
            assert (found.value, found.samples) == (correct / len(samples), len(samples))


@for_every(("correct", "samples"), [(0, 5), (5, 5), (30, 40), (1, 3)])
def test_the_standard_error_is_binomial(correct: int, samples: int) -> None:
    hits = [1.0] * correct + [0.0] * (samples - correct)
    mean = sum(hits) / samples
    variance = sum((hit - mean) ** 2 for hit in hits) / samples
    outputs = np.eye(2, dtype=np.float32)[[int(hit) for hit in hits]]
    found = score(
        metric_named("accuracy", "classification"), Outcomes(outputs, np.ones(samples, np.int64))
    )
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(variance / samples))


# --- the final fit --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(
    tiny_inputs: Inputs, selected: Selected, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FitResult]:
    """A finished fit and its folder; tests work on copies."""
    folder = tmp_path_factory.mktemp("fit") / "champion"
    return folder, fit(tiny_inputs, tiny_inputs.task.recipe, selected, folder)


@pytest.fixture
def copied(fitted: tuple[Path, FitResult], tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted[0], tmp_path / "copy"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fit_module, "train_epochs", lambda *args, **options: pytest.fail("trained again")
    )


def test_a_fit_measures_the_pack_it_wrote(
    fitted: tuple[Path, FitResult], tiny_inputs: Inputs, selected: Selected
) -> None:
    folder, result = fitted
    content = (folder / PACK_FILE).read_bytes()
    model = from_pack(read_pack(content), tiny_inputs.backbone)
    found = scored(model, tiny_inputs, "test")
    assert (result.metric, result.test_samples) == ("accuracy", 40)
    assert (result.test_metric, result.test_metric_stderr) == (found.value, found.standard_error)
    assert result.size_bytes == len(content) == sum(result.ledger.values())
    assert result.size_bytes == SizePlanner(
        tiny_inputs.task, tiny_inputs.backbone, tiny_inputs.index.classes, selected
    ).size_bytes(tiny_inputs.task.recipe)
    assert result.trained_values == sum(
        parameter.numel() for parameter in model.values.parameters()
    )
    by_hand = attached(tiny_inputs, selected)
    run(by_hand, tiny_inputs, "trainval")
    assert packed(by_hand, tiny_inputs) == content, "it was trained on train and validation"


@pytest.mark.usefixtures("no_training")
def test_a_finished_fit_is_not_done_again(
    copied: Path,
    fitted: tuple[Path, FitResult],
    tiny_inputs: Inputs,
    selected: Selected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        fit_module, "final_outcomes", lambda *args, **options: pytest.fail("tested again")
    )
    assert read_fit(copied) == fitted[1]
    assert fit(tiny_inputs, tiny_inputs.task.recipe, selected, copied) == fitted[1]


@pytest.mark.usefixtures("no_training")
def test_a_fit_interrupted_before_its_result_is_only_tested(
    copied: Path, fitted: tuple[Path, FitResult], tiny_inputs: Inputs, selected: Selected
) -> None:
    (copied / RESULT_FILE).unlink()
    assert read_fit(copied) is None
    assert fit(tiny_inputs, tiny_inputs.task.recipe, selected, copied) == fitted[1]
    assert json.loads((copied / RESULT_FILE).read_text()) == json.loads(
        (fitted[0] / RESULT_FILE).read_text()
    )


def test_a_fit_interrupted_before_its_pack_starts_over(
    copied: Path,
    fitted: tuple[Path, FitResult],
    tiny_inputs: Inputs,
    selected: Selected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (copied / PACK_FILE).unlink()
    (copied / RESULT_FILE).unlink()

    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "write_pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_inputs, tiny_inputs.task.recipe, selected, copied)
    assert not (copied / RESULT_FILE).exists()
    again = fit(tiny_inputs, tiny_inputs.task.recipe, selected, copied)
    assert again.pack_digest == fitted[1].pack_digest


def test_a_diverging_fit_leaves_no_pack(
    tiny_inputs: Inputs, selected: Selected, tmp_path: Path
) -> None:
    recipe = tiny_inputs.task.recipe
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"learning_rate": 1e30})}
    )
    with pytest.raises(TrainingError, match="learning rate 1e"):
        fit(tiny_inputs, recipe, selected, tmp_path / "champion")
    assert read_fit(tmp_path / "champion") is None
    assert not (tmp_path / "champion" / PACK_FILE).exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Recipe(training=Training(epochs=1, batch_size=16)),
        lambda: Recipe(connections=Connections(top_k=1, bits=1)),
    ],
)
def test_a_fit_takes_any_recipe(
    make: Callable[[], Recipe], tiny_inputs: Inputs, selected: Selected, tmp_path: Path
) -> None:
    recipe = make().model_copy(
        update={"training": Training(epochs=1, batch_size=16, learning_rate=8e-3)}
    )
    result = fit(tiny_inputs, recipe, selected, tmp_path / "champion")
    assert result.size_bytes == SizePlanner(
        tiny_inputs.task, tiny_inputs.backbone, tiny_inputs.index.classes, selected
    ).size_bytes(recipe)
