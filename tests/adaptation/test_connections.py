"""Connections against a plain dense layer with the same effective weight: values, gradients, and
what must not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers_cases import for_every
from torch import nn

from pipeline.adaptation.parts.connections import TunableLayer, TunedLayer, _ConnectedProduct
from pipeline.adaptation.recipe_plan import PlannedTensor
from pipeline.adaptation.sums import Sums
from pipeline.adaptation.values import TrainedValues
from pipeline.specs import Bits

LAYERS: dict[str, tuple[Callable[[], TunableLayer], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "fused qkv": (lambda: nn.Linear(8, 24), (2, 3, 8)),
    "channels last": (lambda: nn.Linear(6, 4), (2, 3, 3, 6)),
    "few columns": (lambda: nn.Linear(40, 6), (2, 3, 40)),
    "1x1, few columns": (lambda: nn.Conv2d(40, 5, 1), (2, 40, 3, 4)),
    "patches that fill the image": (lambda: nn.Conv2d(3, 8, (4, 6), stride=(4, 6)), (2, 3, 8, 6)),
    "1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (2, 3, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "padded, strided": (lambda: nn.Conv2d(3, 4, 5, stride=2, padding=2, bias=False), (2, 3, 7, 6)),
    "grouped, dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 6, 6)),
}
every_layer = for_every("kind", LAYERS)


def build(kind: str, top_k: int = 2) -> tuple[TunableLayer, TunedLayer, torch.Tensor]:
    """A frozen layer, the same layer tuned with random values, and an input."""
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = make().requires_grad_(False)
    rows, columns = base.weight.shape[0], base.weight[0].numel()
    index_OK = torch.rand(rows, columns, generator=generator).argsort(dim=1)[:, :top_k]
    index_N = (torch.arange(rows)[:, None] * columns + index_OK).flatten().sort().values
    tuned = TunedLayer(base, index_N)
    shapes = (
        {"connections": index_N.shape}
        if base.bias is None
        else {"connections": index_N.shape, "bias": base.bias.shape}
    )
    for name, size in shapes.items():
        frozen = tuned.frozen(name)
        assert frozen is not None
        change = torch.empty(size).normal_(0, 0.5, generator=generator)
        tuned.current[name] = (frozen + change).requires_grad_()
    return base, tuned, torch.randn(shape, generator=generator)


def slow_weight(base: TunableLayer, tuned: TunedLayer) -> torch.Tensor:
    """The dense effective weight, entry by entry."""
    assert tuned.index_N is not None
    weight_OI = base.weight.detach().clone().reshape(base.weight.shape[0], -1)
    for place, value in zip(
        tuned.index_N.tolist(), tuned.current["connections"].detach(), strict=True
    ):
        weight_OI[divmod(place, weight_OI.shape[1])] = value
    return weight_OI.reshape(base.weight.shape)


def plain(
    base: TunableLayer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, base.stride, base.padding, base.dilation, base.groups)


def dense_gradients(
    base: TunableLayer, tuned: TunedLayer, x: torch.Tensor, outer: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Output, and gradients of input, connections and bias, by autograd on the whole dense
    layer.
    """
    assert tuned.index_N is not None
    weight, inputs = slow_weight(base, tuned).requires_grad_(), x.clone().requires_grad_()
    bias = None if base.bias is None else tuned.current["bias"].detach().requires_grad_()
    y = plain(base, inputs, weight, bias)
    y.backward(outer)
    assert weight.grad is not None
    assert inputs.grad is not None
    gradients = {
        "y": y.detach(),
        "x": inputs.grad,
        "connections": weight.grad.flatten()[tuned.index_N],
    }
    return gradients if bias is None or bias.grad is None else {**gradients, "bias": bias.grad}


def tuned_gradients(
    tuned: TunedLayer, x: torch.Tensor, outer: torch.Tensor
) -> dict[str, torch.Tensor]:
    inputs = x.clone().requires_grad_()
    y = tuned(inputs)
    y.backward(outer.to(y.dtype))
    found = {
        "y": y.detach(),
        "x": inputs.grad,
        **{name: value.grad for name, value in tuned.current.items()},
    }
    assert not any(gradient is None for gradient in found.values())
    return found  # type: ignore[return-value]


@every_layer
def test_gradients_are_the_dense_layers_at_the_selected_entries(kind: str) -> None:
    base, tuned, x = build(kind)
    outer = torch.randn(
        plain(base, x, base.weight, base.bias).shape, generator=torch.Generator().manual_seed(2)
    )
    expected, found = dense_gradients(base, tuned, x, outer), tuned_gradients(tuned, x, outer)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@every_layer
def test_under_bfloat16_the_same_to_three_digits(kind: str) -> None:
    base, tuned, x = build(kind)
    outer = torch.randn(
        plain(base, x, base.weight, base.bias).shape, generator=torch.Generator().manual_seed(2)
    )
    expected = dense_gradients(base, tuned, x, outer)
    with torch.autocast("cpu", torch.bfloat16):
        found = tuned_gradients(tuned, x, outer)
    assert found["y"].dtype == torch.bfloat16
    assert found["connections"].dtype == torch.float32
    for name, gradient in expected.items():
        assert float((found[name].float() - gradient).abs().max()) < 0.03 * float(
            gradient.abs().max()
        ), name


@every_layer
def test_the_derivative_is_that_of_the_function_in_double_precision(kind: str) -> None:
    base, tuned, x = build(kind)
    base, tuned = base.double(), tuned.double()

    def product(
        inputs: torch.Tensor, values_N: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return _ConnectedProduct.apply(inputs, values_N, bias, tuned.weight_with(values_N), tuned)

    assert torch.autograd.gradcheck(
        product,
        [
            x.double().requires_grad_(),
            *(v.detach().double().requires_grad_() for v in tuned.current.values()),
        ],
    )


@every_layer
@for_every("bits", [1, 32])
def test_training_leaves_every_other_weight_as_it_was_bit_for_bit(kind: str, bits: Bits) -> None:
    base, tuned, x = build(kind)
    assert tuned.index_N is not None
    planned = {
        PlannedTensor(part, name, tuple(value.shape), bits): value.detach() - tuned.frozen(name)
        for part, (name, value) in zip(
            ("connections", "biases"), tuned.current.items(), strict=False
        )
    }
    trained = TrainedValues(planned)
    sums = Sums(trained, {tensor: (tuned, tensor.name) for tensor in planned})

    def hand_over() -> torch.Tensor:
        """As the model does before each forward pass; gives the connections."""
        tuned.current = {tensor.name: value for tensor, value in sums().items()}
        return tuned.current["connections"].detach().clone()

    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    start = hand_over()
    optimiser = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        hand_over()
        optimiser.zero_grad()
        tuned(x).square().sum().backward()
        optimiser.step()
    values = hand_over()
    assert bool((values != start).any())
    assert all(
        torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))
        for name, tensor in base.named_parameters()
    )
    assert all(tensor.grad is None for tensor in base.parameters())
    selected = torch.zeros(base.weight.numel(), dtype=torch.bool).scatter(0, tuned.index_N, True)
    effective, original = (
        weight.flatten().view(torch.int32)
        for weight in (tuned.weight_with(values), before["weight"])
    )
    assert torch.equal(effective[~selected], original[~selected])
    assert int((effective[selected] != original[selected]).sum()) > 0


def test_gradients_that_are_picked_together_are_those_that_each_layer_picks() -> None:
    """Of layers that are called once, twice or not at all, some with few columns, one in a
    convolution.
    """
    kinds = ["few columns", "fused qkv", "few columns", "1x1, few columns", "few columns"]
    built = [build(kind) for kind in kinds]
    planned = {
        PlannedTensor(part, f"{number}.{key}", tuple(tuned.current[key].shape), 32): tuned
        for part, key in (("connections", "connections"), ("biases", "bias"))
        for number, (_, tuned, _) in enumerate(built)
    }
    values = {tensor: torch.zeros(tensor.shape) for tensor in planned}
    receivers = {tensor: (tuned, tensor.name[2:]) for tensor, tuned in planned.items()}
    trained = TrainedValues(values)
    sums = Sums(trained, receivers)

    def gradients(are_picked_together: bool) -> list[torch.Tensor]:
        trained.zero_grad()
        for tensor, value in sums().items():
            planned[tensor].current[tensor.name[2:]] = value
        for _, tuned, _ in built:
            assert (tuned.product is not None) == tuned.always_keeps_columns
            tuned.product = tuned.product if are_picked_together else None
        calls = [built[number][1:] for number in (0, 1, 2, 2, 3)]
        outputs = [tuned(x * count) for count, (tuned, x) in enumerate(calls, start=1)]
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
        return [parameter.grad.clone() for parameter in trained.parameters()]  # type: ignore[union-attr]

    together, apart = gradients(True), gradients(False)
    assert all(map(torch.equal, together, apart))
    unused = sum(len(built[number][1].current["connections"]) for number in range(4))
    assert together[0][:unused].all()
    assert not together[0][unused : unused + len(built[4][1].current["connections"])].any()


def test_a_layer_may_train_its_bias_alone() -> None:
    base = nn.Linear(5, 7).requires_grad_(False)
    tuned = TunedLayer(base, None)
    bias = tuned.current["bias"] = (base.bias + 0.25).requires_grad_()
    assert tuned.weight is base.weight
    x = torch.randn(3, 5)
    torch.testing.assert_close(tuned(x), base(x) + 0.25)
    tuned(x).sum().backward()
    assert torch.equal(bias.grad, torch.full((7,), 3.0))


def test_a_layer_without_bias_gets_none() -> None:
    base = nn.Linear(5, 7, bias=False).requires_grad_(False)
    x = torch.randn(3, 5)
    assert torch.equal(TunedLayer(base, None)(x), base(x))
