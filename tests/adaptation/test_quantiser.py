"""The quantiser against a scalar implementation, its gradient against the derivative by hand, its
codes against the pack's reader; and the flat vectors in which a model's trained values are kept."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_cases import for_every

from pipeline.adaptation.quantiser import EPSILON, encode, quantise
from pipeline.adaptation.recipe_plan import PlannedTensor
from pipeline.adaptation.tensors import initial_values
from pipeline.adaptation.values import TrainedValues
from pipeline.packs import dequantise, levels
from pipeline.specs import Bits

LOW_BITS: tuple[Bits, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
SHAPES = [(7,), (3, 5), (1, 2), (4, 3, 6), (2, 1, 9)]
# Positive levels as the paper's code gives them (Binary Adapter, arXiv 2307.16867).
PUBLISHED = {
    1: [0.6745],
    2: [0.3778, 1.2657],
    4: [0.1056, 0.319, 0.5401, 0.7752, 1.034, 1.3331, 1.7077, 2.2655],
}


def draw(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.3 + 0.1


def codebook(bits: int) -> list[float]:
    if bits not in PUBLISHED:
        return [float(level) for level in levels(bits)]
    return [-level for level in reversed(PUBLISHED[bits])] + PUBLISHED[bits]


def groups(tensor: torch.Tensor) -> list[list[float]]:
    """The values that share a mean and a standard deviation: one list for each matrix of a 3-D
    tensor, otherwise all of them.
    """
    return (
        [matrix.reshape(-1).tolist() for matrix in tensor]
        if tensor.ndim == 3
        else [tensor.reshape(-1).tolist()]
    )


def lengths(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([len(group) for tensor in tensors for group in groups(tensor)])


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def half(number: float) -> float:
    return float(np.float16(number))


def slow_scales(group: list[float], has_mean: bool) -> tuple[float, float]:
    """Mean and standard deviation, or 0 and the root of the mean square."""
    if has_mean:
        return statistics.fmean(group), statistics.stdev(group)
    return 0.0, statistics.fmean([value * value for value in group]) ** 0.5


def slow_quantise(tensor: torch.Tensor, bits: int, has_mean: bool) -> tuple[list[int], list[float]]:
    """Codes and stored values, number by number in double precision."""
    codes, values = [], []
    for group in groups(tensor):
        mean, deviation = slow_scales(group, has_mean)
        for value in group:
            z = (value - mean) / (deviation + 1e-5)
            code = min(range(2**bits), key=lambda code: abs(codebook(bits)[code] - z))
            codes.append(code)
            values.append(codebook(bits)[code] * half(deviation) + half(mean))
    return codes, values


@for_every("shape", SHAPES)
@for_every("bits", LOW_BITS)
@for_every("has_mean", [True, False])
def test_every_value_becomes_the_nearest_level(
    shape: tuple[int, ...], bits: Bits, has_mean: bool
) -> None:
    latent = draw(shape)
    codes, values = slow_quantise(latent, bits, has_mean)
    stored_codes, scales = encode(latent.reshape(-1), lengths(latent), bits, has_mean=has_mean)
    assert stored_codes.tolist() == codes
    used = quantise(latent.reshape(-1), lengths(latent), bits, has_mean=has_mean)
    torch.testing.assert_close(used, torch.tensor(values), rtol=0, atol=3e-5)
    assert scales is not None
    expected = [slow_scales(group, has_mean) for group in groups(latent)]
    np.testing.assert_allclose(scales, expected, rtol=2**-11, atol=1e-7)
    assert scales.tolist() == scales.astype(np.float16).tolist()


@for_every("shape", [*SHAPES, (1,), (3, 1, 1)])
@for_every("bits", LOW_BITS)
def test_the_pack_reads_what_training_used(shape: tuple[int, ...], bits: Bits) -> None:
    latent = draw(shape, seed=bits)
    codes, scales = encode(latent.reshape(-1), lengths(latent), bits)
    assert scales is not None
    used = quantise(latent.reshape(-1), lengths(latent), bits).numpy()
    np.testing.assert_allclose(dequantise(codes, scales, bits), used, rtol=1e-6, atol=1e-7)


@for_every("bits", LOW_BITS)
def test_runs_of_one_vector_do_not_know_of_each_other(bits: Bits) -> None:
    latents = [
        draw(shape, seed) * 10.0 ** (seed - 4)
        for seed, shape in enumerate([*SHAPES, (1,), (3, 1, 1), (200,)])
    ]
    together, (codes, scales) = (
        quantise(joined(latents), lengths(*latents), bits),
        encode(joined(latents), lengths(*latents), bits),
    )
    alone = [quantise(latent.reshape(-1), lengths(latent), bits) for latent in latents]
    encoded = [encode(latent.reshape(-1), lengths(latent), bits) for latent in latents]
    assert torch.equal(together, joined(alone))
    assert codes.tolist() == [code for each, _ in encoded for code in each.tolist()]
    assert scales is not None
    assert scales.tolist() == [
        pair for _, each in encoded if each is not None for pair in each.tolist()
    ]


@pytest.mark.parametrize(("bits", "kind"), [(16, np.float16), (32, np.float32)])
def test_sixteen_and_thirty_two_bits_are_floats(bits: Bits, kind: type[np.generic]) -> None:
    latent = draw((3, 5)) * 1.0001
    codes, scales = encode(latent.reshape(-1), lengths(latent), bits)
    assert scales is None
    assert codes.dtype == kind
    assert (
        quantise(latent.reshape(-1), lengths(latent), bits).tolist()
        == latent.reshape(-1).numpy().astype(kind).tolist()
        == codes.tolist()
    )


# --- gradient -------------------------------------------------------------------------------------


def slow_gradient(
    latent: torch.Tensor, bits: int, gradient: torch.Tensor, has_mean: bool = True
) -> list[float]:
    """d sum_i g_i w_hat_i / d w_j, with w_hat_i = L_i s + m, dL_i := dz_i (straight through), by
    the chain rule in loops.
    """
    result = []
    for group, outer in zip(groups(latent), groups(gradient), strict=True):
        count, (mean, deviation) = len(group), slow_scales(group, has_mean)
        z = [(value - mean) / (deviation + EPSILON) for value in group]
        level = [min(codebook(bits), key=lambda level, z=z_i: abs(level - z)) for z_i in z]
        for j in range(count):
            d_mean = 1 / count if has_mean else 0.0
            d_deviation = (group[j] - mean) / ((count - 1 if has_mean else count) * deviation)
            total = 0.0
            for i in range(count):
                d_z = ((i == j) - d_mean) / (deviation + EPSILON) - (
                    group[i] - mean
                ) * d_deviation / (deviation + EPSILON) ** 2
                total += outer[i] * (d_z * deviation + level[i] * d_deviation + d_mean)
            result.append(total)
    return result


@for_every("shape", SHAPES)
@for_every("bits", LOW_BITS)
@for_every("has_mean", [True, False])
def test_the_gradient_is_straight_through_and_flows_through_mean_and_deviation(
    shape: tuple[int, ...], bits: Bits, has_mean: bool
) -> None:
    latent, gradient = draw(shape).requires_grad_(), draw(shape, seed=9)
    quantise(latent.reshape(-1), lengths(latent), bits, has_mean=has_mean).backward(
        gradient.reshape(-1)
    )
    assert latent.grad is not None
    expected = torch.tensor(slow_gradient(latent.detach(), bits, gradient, has_mean))
    torch.testing.assert_close(latent.grad.reshape(-1), expected, rtol=1e-3, atol=1e-4)


@for_every("bits", LOW_BITS)
@for_every("has_mean", [True, False])
def test_the_gradient_is_right_where_values_are_as_small_as_epsilon(
    bits: Bits, has_mean: bool
) -> None:
    """Changes start this small: there d w_hat / d mean is not next to nothing."""
    latents, gradients = (
        [draw(shape, seed + number) for number, shape in enumerate(SHAPES)] for seed in (0, 9)
    )
    small = [latent * 1e-4 for latent in latents]
    vector = joined(small).requires_grad_()
    quantise(vector, lengths(*small), bits, has_mean=has_mean).backward(joined(gradients))
    assert vector.grad is not None
    expected = [
        number
        for latent, gradient in zip(small, gradients, strict=True)
        for number in slow_gradient(latent, bits, gradient, has_mean)
    ]
    torch.testing.assert_close(vector.grad, torch.tensor(expected), rtol=1e-3, atol=1e-4)


@for_every("bits", [16, 32])
def test_the_gradient_of_floats_is_the_identity(bits: Bits) -> None:
    latent, gradient = draw((3, 5)).requires_grad_(), draw((3, 5), seed=9)
    quantise(latent.reshape(-1), lengths(latent), bits).backward(gradient.reshape(-1))
    assert latent.grad is not None
    assert torch.equal(latent.grad, gradient)


@for_every("value", [0.0, 0.7, -1e4])
@for_every("shape", [(1,), (4,), (3, 5), (2, 3, 4)])
@for_every("bits", LOW_BITS)
def test_equal_values_stay_what_they_are_with_a_finite_gradient(
    shape: tuple[int, ...], value: float, bits: Bits
) -> None:
    latent = torch.full(shape, value, requires_grad=True)
    stored = quantise(latent.reshape(-1), lengths(latent), bits).view(shape)
    stored.square().sum().backward()
    torch.testing.assert_close(stored, latent.half().float(), rtol=1e-6, atol=1e-9)
    assert latent.grad is not None
    assert bool(latent.grad.isfinite().all())


# --- all trained values of a model ----------------------------------------------------------------

# Widths are mixed and not in order; two tensors have one name in different parts, as a layer's
# connections and bias do.
MIXED = (
    PlannedTensor("adapters", "bank.down", (2, 3, 4), 4),
    PlannedTensor("connections", "first", (15,), 4, (3, 9)),
    PlannedTensor("biases", "first", (7,), 16),
    PlannedTensor("norms", "norm.weight", (6,), 1),
    PlannedTensor("connections", "second", (8,), 1, (4, 9), has_mean=False),
    PlannedTensor("adapters", "bank.up", (3, 2, 4), 1),
    PlannedTensor("norms", "norm.bias", (6,), 1),
    PlannedTensor("head", "head.weight", (2, 4), 32),
    PlannedTensor("head", "head.bias", (2,), 16),
)
KINDS = ((1, False), (1, True), (4, True), (16, True), (32, True))  # bits, has_mean


def draw_mixed(seed: int = 0) -> dict[PlannedTensor, torch.Tensor]:
    return {tensor: draw(tensor.shape, seed + number) for number, tensor in enumerate(MIXED)}


def only(shape: tuple[int, ...], bits: Bits) -> PlannedTensor:
    return PlannedTensor("head", "only", shape, bits)


def test_an_optimiser_sees_one_parameter_a_way_of_rounding_in_the_plans_order() -> None:
    initial = draw_mixed()
    values = TrainedValues(initial)
    assert values.tensors == MIXED
    latents = [parameter for parameter in values.parameters() if parameter.requires_grad]
    assert len(latents) == len(list(values.parameters())) == len(KINDS)
    for kind, latent in zip(KINDS, latents, strict=True):
        assert torch.equal(
            latent.detach(),
            joined([initial[tensor] for tensor in MIXED if (tensor.bits, tensor.has_mean) == kind]),
        )


def test_every_tensor_is_quantised_at_its_own_width_and_each_of_its_matrices_alone() -> None:
    initial = draw_mixed()
    used = TrainedValues(initial)()
    assert used.keys() == initial.keys()
    for tensor, values in used.items():
        assert values.shape == tensor.shape
        latent = initial[tensor]
        if tensor.bits >= 16:
            assert torch.equal(values, latent.half().float() if tensor.bits == 16 else latent), (
                tensor
            )
        else:
            torch.testing.assert_close(
                values.reshape(-1),
                torch.tensor(slow_quantise(latent, tensor.bits, tensor.has_mean)[1]),
                rtol=0,
                atol=3e-5,
            )


@for_every("tensor", MIXED)
def test_a_matrix_that_moves_leaves_all_others_bit_for_bit(tensor: PlannedTensor) -> None:
    initial = draw_mixed()
    before = TrainedValues(initial)()
    moved = {**initial, tensor: initial[tensor].clone()}
    matrices = moved[tensor] if len(tensor.shape) == 3 else moved[tensor][None]
    matrices[0] = matrices[0] * 3 + 5
    after = TrainedValues(moved)()
    for other in MIXED:
        if other is not tensor:
            assert torch.equal(after[other], before[other])
    new, old = (
        each if len(tensor.shape) == 3 else each[None] for each in (after[tensor], before[tensor])
    )
    assert torch.equal(new[1:], old[1:])
    assert bool((new[0] != old[0]).all())


def test_gradients_reach_the_latent_values_of_their_own_tensor() -> None:
    initial, outer = draw_mixed(), draw_mixed(seed=50)
    values = TrainedValues(initial)
    used = values()
    torch.autograd.backward([used[tensor] for tensor in MIXED], [outer[tensor] for tensor in MIXED])
    expected = {
        tensor: torch.tensor(
            slow_gradient(initial[tensor], tensor.bits, outer[tensor], tensor.has_mean)
        )
        if tensor.bits < 16
        else outer[tensor]
        for tensor in MIXED
    }
    for kind, latent in zip(KINDS, values.parameters(), strict=True):
        assert latent.grad is not None
        torch.testing.assert_close(
            latent.grad,
            joined(
                [expected[tensor] for tensor in MIXED if (tensor.bits, tensor.has_mean) == kind]
            ),
            rtol=1e-3,
            atol=1e-4,
        )


def test_what_is_encoded_is_what_training_used() -> None:
    initial = draw_mixed()
    values = TrainedValues(initial)
    encoded, used = (
        values.encode(),
        {tensor: value.detach().reshape(-1) for tensor, value in values().items()},
    )
    assert encoded.keys() == initial.keys()
    for tensor, (codes, scales) in encoded.items():
        if tensor.bits >= 16:
            assert scales is None
            assert codes.dtype == (np.float16 if tensor.bits == 16 else np.float32)
            assert codes.tolist() == used[tensor].tolist()
        else:
            assert scales is not None
            assert codes.tolist() == slow_quantise(initial[tensor], tensor.bits, tensor.has_mean)[0]
            assert scales.shape == (tensor.shape[0] if len(tensor.shape) == 3 else 1, 2)
            np.testing.assert_allclose(
                dequantise(codes, scales, tensor.bits), used[tensor].numpy(), rtol=1e-6, atol=1e-7
            )


def test_values_are_float32_under_autocast() -> None:
    values = TrainedValues(draw_mixed())
    with torch.autocast("cpu", torch.bfloat16):
        low = values()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, low[tensor])
        for tensor, value in values().items()
    )


def test_stored_values_are_found_by_name_and_used_as_they_are() -> None:
    stored = {tensor: value.detach() for tensor, value in TrainedValues(draw_mixed())().items()}
    reloaded = TrainedValues(draw_mixed(seed=50))
    reloaded.load_stored(dict(reversed(stored.items())))
    assert all(torch.equal(value, stored[tensor]) for tensor, value in reloaded().items())
    arbitrary = draw_mixed(seed=90)
    reloaded.load_stored(arbitrary)
    assert all(torch.equal(value, arbitrary[tensor]) for tensor, value in reloaded().items()), (
        "not quantised a second time"
    )


@for_every("shape", [(4, 6), (2, 3, 5), (7,)])
def test_by_row_every_row_is_quantised_by_itself(shape: tuple[int, ...]) -> None:
    latent, tensor = (
        draw(shape) * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)),
        only(shape, 2),
    )
    by_row = replace(tensor, by_row=len(shape) > 1)
    rows = latent.reshape(-1, shape[-1])
    expected = torch.cat(
        [TrainedValues({only((shape[-1],), 2): row})()[only((shape[-1],), 2)] for row in rows]
    ).view(shape)
    values = TrainedValues({by_row: latent})
    assert torch.equal(values()[by_row], expected)
    assert values.encode()[by_row][1].shape == (len(rows), 2)  # type: ignore[union-attr]


def test_codebooks_do_not_mix() -> None:
    paper, other = (
        only((4, 6), 2),
        replace(PlannedTensor("adapters", "other", (4, 6), 2), codebook="lloyd_max"),
    )
    values = TrainedValues({paper: draw((4, 6)), other: draw((4, 6))})
    used, latent = values(), draw((4, 6)).reshape(-1)
    assert torch.equal(used[paper].reshape(-1), quantise(latent, torch.tensor([24]), 2))
    assert torch.equal(
        used[other].reshape(-1), quantise(latent, torch.tensor([24]), 2, "lloyd_max")
    )
    assert not torch.equal(used[paper], used[other])


@for_every("bits", [*LOW_BITS, 16, 32])
def test_stored_values_are_used_as_they_are(bits: Bits) -> None:
    tensor = only((4, 6), bits)
    stored = TrainedValues({tensor: draw((4, 6))})()[tensor].detach()
    reloaded = TrainedValues({tensor: torch.zeros(4, 6)})
    reloaded.load_stored({tensor: stored})
    assert torch.equal(reloaded()[tensor], stored)


@for_every("bits", [*LOW_BITS, 16, 32])
def test_a_change_starts_at_nothing_or_next_to_it(bits: Bits) -> None:
    tensor = only((50, 3), bits)
    first, again = (
        TrainedValues({tensor: initial_values(tensor, torch.Generator().manual_seed(3))})()[tensor]
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert float(first.detach().abs().max()) < 1e-3
    assert bool((first == 0).all()) == (bits >= 16), (
        "below 16 bits a zero tensor would have no sign to learn"
    )


def test_a_learned_matrix_moves_through_its_codes() -> None:
    """One bit: gradient descent on the latent values finds the signs of a target."""
    target, tensor = draw((6, 6)).sign(), only((6, 6), 1)
    values = TrainedValues({tensor: draw((6, 6), seed=5) * 0.1})
    optimiser = torch.optim.Adam(values.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (values()[tensor] - target).square().sum().backward()
        optimiser.step()
    assert math.isclose(float((values()[tensor].detach().sign() == target).float().mean()), 1.0)
