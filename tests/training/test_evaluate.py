"""Validation may be rounded to TF32 on a GPU; the final test is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.kinds import score
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally
from pipeline.training import Inputs, evaluate, train_epochs
from pipeline.training.fit import fit

PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul}


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Float32 numbers with the 10 bits of TF32, rounded to nearest."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounded(TorchFunctionMode):
    """The inputs of products are rounded as a GPU's TF32 units round them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in PRODUCTS:
            args = [
                tf32(each) if isinstance(each, torch.Tensor) and each.ndim > 1 else each
                for each in args
            ]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def trained(tiny_inputs: Inputs, random_selection: Callable[..., SelectedIndex]) -> AdaptedModel:
    recipe, selected = tiny_inputs.task.recipe, random_selection(tiny_inputs.backbone, 2)
    model = attach(tiny_inputs.backbone, recipe, len(tiny_inputs.index.classes), selected=selected)
    data = tiny_inputs.reader("train"), tiny_inputs.splits["train"]
    spec = recipe.training.model_copy(update={"epochs": 4})
    list(train_epochs(model, *data, spec, tiny_inputs.kind, seed=0, flip=False))
    return model


def test_rounding_to_tf32_leaves_the_count_of_correct_answers(
    tiny_inputs: Inputs, trained: AdaptedModel
) -> None:
    data = tiny_inputs.reader("test"), tiny_inputs.splits["test"], tiny_inputs.kind
    exact = evaluate(trained, *data)
    with Rounded():
        rounded = evaluate(trained, *data, is_exact=False)
    difference = abs(rounded.outputs - exact.outputs).max()
    assert 0 < difference < 0.01 * abs(exact.outputs).max()
    values = [score(tiny_inputs.metric, each) for each in (exact, rounded)]
    assert abs(values[0].value - values[1].value) <= 1 / values[0].samples


def test_validation_may_be_rounded_and_the_final_test_may_not(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    logits_of = AdaptedModel.logits_of

    def noting(model: AdaptedModel, inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            used.append(torch.backends.cudnn.conv.fp32_precision)
        return logits_of(model, inputs)

    monkeypatch.setattr(AdaptedModel, "logits_of", noting)
    recipe, selected = tiny_inputs.task.recipe, select_locally(tiny_inputs, 2)
    next(run_trial(tiny_inputs, recipe, selected))
    assert set(used) == {"tf32"}
    used.clear()
    fit(tiny_inputs, recipe, selected, tmp_path)
    assert set(used) == {"ieee"}
