"""A step in several passes: the gradient of the whole batch in less memory, by setting or because
memory ran out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.errors import OutOfMemory
from pipeline.specs import Biases, Connections, Norms, Recipe, Smoa, Training
from pipeline.training import ALONE, Inputs, loop, train_epochs
from pipeline.training.recorded import RecordedStep, Step

BATCH = 16
RECIPE = Recipe(
    connections=Connections(top_k=2),
    biases=Biases(),
    norms=Norms(),
    training=Training(epochs=1, batch_size=BATCH, learning_rate=8e-3, precision="fp32"),
)


@pytest.fixture
def start(
    tiny_inputs: Inputs, random_selection: Callable[..., SelectedIndex]
) -> Callable[[], AdaptedModel]:
    selected = random_selection(tiny_inputs.backbone, 2)
    return lambda: attach(
        tiny_inputs.backbone, RECIPE, len(tiny_inputs.index.classes), selected=selected
    ).train()


def values(model: AdaptedModel) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.values.parameters()]


def trained(start: Callable[[], AdaptedModel], inputs: Inputs, **changes: Any) -> AdaptedModel:
    model, spec = start(), RECIPE.training.model_copy(update=changes)
    data = inputs.reader("train"), inputs.splits["train"]
    list(train_epochs(model, *data, spec, inputs.kind, seed=0, flip=False))
    return model


def test_the_passes_of_a_step_add_up_to_its_gradient(
    tiny_inputs: Inputs, start: Callable[[], AdaptedModel]
) -> None:
    samples = tiny_inputs.splits["train"].samples[:BATCH]
    images, targets = tiny_inputs.reader("train").read(samples)
    found = {}
    for micro_batch in (BATCH, 5, 1):
        model, sizes = start(), []
        optimiser = torch.optim.SGD(model.values.parameters(), lr=0.0)
        model.backbone.register_forward_pre_hook(
            lambda module, given, sizes=sizes: sizes.append(len(given[0]))
        )
        settings = RECIPE.training, tiny_inputs.kind, torch.float32, ALONE, micro_batch
        loss = loop._step(model, optimiser, images, targets, *settings)
        found[micro_batch] = loss, [each.grad for each in model.values.parameters()], sizes
    assert [sizes for _, _, sizes in found.values()] == [[BATCH], [5, 5, 5, 1], [1] * BATCH]
    whole_loss, whole, _ = found[BATCH]
    for loss, gradients, _ in found.values():
        torch.testing.assert_close(loss, whole_loss)
        for gradient, expected in zip(gradients, whole, strict=True):
            assert gradient is not None
            assert expected is not None
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_passes_are_halved_until_they_fit(
    tiny_inputs: Inputs,
    start: Callable[[], AdaptedModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = values(trained(start, tiny_inputs, micro_batch=4))
    plain, tried = loop._step, []

    def small(*given: Any) -> torch.Tensor:
        tried.append(given[-1])
        if given[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(*given)

    monkeypatch.setattr(loop, "_step", small)
    with caplog.at_level(logging.WARNING):
        found = values(trained(start, tiny_inputs))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert tried[:3] == [BATCH, 8, 4]
    assert set(tried[3:]) == {4}, "what was too much once is not tried again"
    assert [record.getMessage() for record in caplog.records] == [
        f"passes of {size} images take too much memory: each is now of {size // 2}"
        for size in (BATCH, 8)
    ]


class Recorded(RecordedStep):
    """A recorded step on a CPU: what a replay computes is what the step does."""

    def __init__(self, step: Step, device: str, generators: object) -> None:
        self._step, self._shape, self._plain_steps = step, None, 0
        self._is_recordable, self._graph = True, None
        made.append(self)

    def _on_own_stream(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    def _watched(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._step(images, targets)

    def _record(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self._images, self._targets, self._loss = images.clone(), targets.clone(), torch.zeros(())
        self.replays = 0

        def replay() -> None:
            self.replays += 1
            self._loss.copy_(self._step(self._images, self._targets))

        self._graph = SimpleNamespace(replay=replay)  # type: ignore[assignment]


made: list[Recorded] = []


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("first_failing", [1, 6])
def test_a_step_that_is_tried_again_is_that_of_smaller_passes(
    is_recorded: bool,
    first_failing: int,
    tiny_inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out behind a forward pass that has drawn numbers, before or after steps were
    recorded: the values are those of passes that are as small from that step on.
    """
    recipe = Recipe(biases=Biases(), smoa=Smoa(experts=2, width=4, dropout=0.3))
    spec = RECIPE.training.model_copy(update={"epochs": 2})
    steps, passes, logits_of = [0], loop._Trainer._step_in_passes, AdaptedModel.logits_of

    def counting(trainer: Any, *given: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        return passes(trainer, *given)

    def shrinking(trainer: Any, *given: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == first_failing:
            trainer._passes.size = 4
        return passes(trainer, *given)

    def failing(model: AdaptedModel, inputs: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, inputs)
        if steps[0] >= first_failing and len(inputs) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return logits

    def run(in_passes: Any, logits: Any) -> list[torch.Tensor]:
        steps[0] = 0
        made.clear()
        with monkeypatch.context() as patched:
            patched.setattr(loop._Trainer, "_step_in_passes", in_passes)
            patched.setattr(AdaptedModel, "logits_of", logits)
            if is_recorded:
                adamw = torch.optim.AdamW
                patched.setattr(loop, "can_record", lambda device: True)
                patched.setattr(loop, "RecordedStep", Recorded)
                patched.setattr(
                    torch.optim, "AdamW", lambda *given, capturable, **named: adamw(*given, **named)
                )
            model = attach(tiny_inputs.backbone, recipe, len(tiny_inputs.index.classes))
            data = tiny_inputs.reader("train"), tiny_inputs.splits["train"]
            list(train_epochs(model, *data, spec, tiny_inputs.kind, seed=0, flip=False))
        return values(model)

    expected = run(shrinking, logits_of)
    assert all(map(torch.equal, run(counting, failing), expected))
    if is_recorded:
        assert made[-1].replays > 0
        assert len(made) == 3, "of 16 images, of 8 and of 4"


def test_one_image_that_is_too_much_is_an_error(
    tiny_inputs: Inputs, start: Callable[[], AdaptedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(loop, "_step", none)
    with pytest.raises(
        OutOfMemory, match=r"out of memory with one image at a time: .* are free on"
    ):
        trained(start, tiny_inputs)
