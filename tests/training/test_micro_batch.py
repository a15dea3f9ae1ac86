"""A step in several passes: the gradient of the whole batch in less memory, by setting or because
memory ran out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.errors import OutOfMemory
from pipeline.specs import Biases, Connections, Norms, Recipe, Training
from pipeline.training import ALONE, Inputs, loop, train_epochs

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
