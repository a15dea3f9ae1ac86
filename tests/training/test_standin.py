"""What only the stand-in for a GPU can show: every copy and every wait between device and host, and
memory to the byte.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import standin_device
import torch

from pipeline.adaptation import attach
from pipeline.data.points import Points
from pipeline.errors import OutOfMemory
from pipeline.inputs.out_of_memory import named_out_of_memory
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally
from pipeline.selection.activation import activation_sums
from pipeline.selection.gradient import gradient_sums
from pipeline.selection.losses import make_loss
from pipeline.specs import Augmentation, Criterion, Recipe, Selection
from pipeline.training import Inputs, evaluate, loop, train_epochs
from pipeline.utils.devices import to_device

RECIPE = {
    "connections": {"top_k": 2},
    "biases": {},
    "norms": {},
    "smoa": {"experts": 2, "width": 4},
    "training": {"epochs": 2, "batch_size": 32, "learning_rate": 0.008, "precision": "bf16"},
}
TRANSFERS = ("copy to device", "copy to host", "synchronisation")


def trained(inputs: Inputs, device: str, epochs: int, **changes: Any) -> Counter[str]:
    """What a training of so many epochs does."""
    recipe = Recipe.model_validate(
        {**RECIPE, "training": {**RECIPE["training"], "epochs": epochs, **changes}}
    )  # type: ignore[dict-item]
    model = attach(
        inputs.backbone, recipe, len(inputs.index.classes), selected=select_locally(inputs, 2)
    ).to(device)
    with standin_device.counted() as counts:
        for _ in train_epochs(
            model,
            inputs.reader("train"),
            inputs.splits["train"],
            recipe.training,
            inputs.kind,
            seed=0,
            flip=False,
            device=device,
        ):
            pass
    return counts


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({}, 2),
        ({"augment": "light"}, 3),
        ({"augment": "crop"}, 3),
        ({"augment": "strong"}, 3),
        ({"mixup": 0.8, "cutmix": 1.0, "ema": 0.99}, 2),
    ],
    ids=["plain", "light", "crop", "strong", "mixed"],
)
def test_steps_copy_images_and_labels_and_are_waited_for_once(
    changes: dict[str, Any], copies: int, standin: str, tiny_inputs: Inputs
) -> None:
    _, short, long = (
        trained(tiny_inputs, standin, epochs, **changes) for epochs in (1, 1, 2)
    )  # the first copies what all share
    steps = -(-len(tiny_inputs.splits["train"]) // 32)
    assert steps <= loop.READ_EVERY
    assert {name: long[name] - short[name] for name in TRANSFERS} == {
        "copy to device": copies * steps,  # images, labels, and all random numbers
        "copy to host": 1,
        "synchronisation": 0,
    }


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_clouds_are_augmented_with_one_copy_that_nothing_waits_for(
    kind: Augmentation, standin: str
) -> None:
    takes = Points(64, 6)
    clouds, targets = torch.from_numpy(takes.probe(4)).to(standin), torch.zeros(4)
    with standin_device.counted() as counts:
        takes.augment(clouds, targets, torch.Generator().manual_seed(0), True, kind)
    assert [counts[name] for name in TRANSFERS] == [1, 0, 0]


@pytest.mark.parametrize(
    ("criterion", "copies"), [("gradient", 3), ("activation", 1)], ids=["gradient", "activation"]
)
def test_a_batch_of_a_selection_is_not_waited_for(
    criterion: Criterion, copies: int, standin: str, tiny_inputs: Inputs
) -> None:
    spec, backbone = Selection(criterion=criterion), tiny_inputs.backbone
    loss = make_loss(spec, tiny_inputs.kind, backbone, 2, seed=0)
    batch = 0, torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])

    def counts_of(batches: int) -> Counter[str]:
        with standin_device.counted() as counts:
            if criterion == "activation":
                activation_sums(backbone, [batch] * batches, spec, device=standin)
            else:
                gradient_sums(
                    backbone, [batch] * batches, spec, loss, seed=0, flip=True, device=standin
                )
        return counts

    counts_of(1)  # copies what is kept
    short, long = counts_of(1), counts_of(2)
    assert [long[name] - short[name] for name in TRANSFERS] == [copies, 0, 0]


def test_what_cuda_waits_for_is_counted(standin: str) -> None:
    x, here = torch.arange(4.0, device=standin), torch.ones(4)
    waiting: list[tuple[Callable[[], Any], int]] = [
        (lambda: here.to(standin), 1),
        (lambda: here.pin_memory().to(standin), 1),
        (lambda: here.pin_memory()[1:].to(standin, non_blocking=True), 0),
        (lambda: to_device(here, standin), 0),
        (lambda: torch.tensor([1.0], device=standin), 1),
        (lambda: torch.full((3,), 2.0, device=standin), 0),
        (lambda: x[x > 1], 1),
        (lambda: x[torch.tensor([1, 2])], 1),
        (lambda: x[(2 * x[:2]).long()], 0),
        (lambda: (x > 1).nonzero(), 1),
        (lambda: float(x[0]), 1),
    ]
    for number, (call, waits) in enumerate(waiting):
        with standin_device.counted() as counts:
            call()
        assert counts["synchronisation"] == waits, number


def test_an_evaluation_copies_each_batch_once_there_and_its_answers_back(
    standin: str, tiny_inputs: Inputs
) -> None:
    recipe = Recipe.model_validate(RECIPE)
    model = attach(
        tiny_inputs.backbone,
        recipe,
        len(tiny_inputs.index.classes),
        selected=select_locally(tiny_inputs, 2),
    ).to(standin)
    with standin_device.counted() as counts:
        evaluate(
            model,
            tiny_inputs.reader("test"),
            tiny_inputs.splits["test"],
            tiny_inputs.kind,
        )
    assert {name: counts[name] for name in TRANSFERS} == {
        "copy to device": 1,
        "copy to host": 1,
        "synchronisation": 0,
    }


def test_a_trial_gives_all_its_memory_back(standin: str, tiny_inputs: Inputs) -> None:
    selected, recipe = select_locally(tiny_inputs, 2), Recipe.model_validate(RECIPE)
    list(run_trial(tiny_inputs, recipe, selected, device=standin))  # tables of levels are kept
    before = standin_device.allocated_bytes()
    for _ in run_trial(tiny_inputs, recipe, selected, device=standin):
        assert standin_device.allocated_bytes() > before
    assert standin_device.allocated_bytes() == before


def test_passes_are_halved_to_the_memory_there_is_and_what_does_not_suffice_is_named(
    standin: str, tiny_inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    selected = select_locally(tiny_inputs, 2)

    def train() -> None:
        with named_out_of_memory(tiny_inputs.task, 32, standin):
            recipe = Recipe.model_validate(RECIPE)
            for _ in run_trial(tiny_inputs, recipe, selected, device=standin):
                pass

    with standin_device.memory_left(1 << 21), caplog.at_level(logging.WARNING):
        train()
    assert "passes of 16 images take too much memory: each is now of 8" in caplog.text
    message = r"out of memory with one image at a time: .* GiB are free on stand-in; lower input"
    with standin_device.memory_left(1 << 20), pytest.raises(OutOfMemory, match=message):
        train()


def test_mixed_devices_are_refused_as_cuda_refuses_them(standin: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(2, device=standin) + torch.ones(2)
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    assert layer.to(standin).weight is weight, (
        "the parameter is the same object, its data is on the device"
    )
    assert weight.device.type == standin
    with torch.autocast(standin, torch.bfloat16):
        x = torch.ones(2, 2, device=standin)
        assert layer(x).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(x.bfloat16(), (2,)).dtype == torch.float32
