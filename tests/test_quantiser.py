"""The quantiser against a scalar implementation, its gradient against the derivative by hand, its codes against the pack's reader."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from pipeline.adaptation.quantiser import EPSILON, Quantised, encode, quantise, small_change
from pipeline.packs import dequantise, levels
from pipeline.spec import Bits

LOW_BITS: tuple[Bits, ...] = (1, 2, 4, 8)
SHAPES = [(7,), (3, 5), (1, 2), (4, 3, 6), (2, 1, 9)]
# Positive levels as the paper's code gives them (Binary Adapter, arXiv 2307.16867).
PUBLISHED = {1: [0.6745], 2: [0.3778, 1.2657], 4: [0.1056, 0.319, 0.5401, 0.7752, 1.034, 1.3331, 1.7077, 2.2655]}


def draw(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.3 + 0.1


def codebook(bits: int) -> list[float]:
    if bits == 8:
        return [float(level) for level in levels(8)]
    return [-level for level in reversed(PUBLISHED[bits])] + PUBLISHED[bits]


def groups(tensor: torch.Tensor) -> list[list[float]]:
    """The values that share a mean and a standard deviation: one list for each matrix of a 3-D tensor, otherwise all of them."""
    return [matrix.reshape(-1).tolist() for matrix in tensor] if tensor.ndim == 3 else [tensor.reshape(-1).tolist()]


def slow_quantise(tensor: torch.Tensor, bits: int) -> tuple[list[int], list[float]]:
    """Codes and stored values, number by number in double precision."""
    codes, values = [], []
    for group in groups(tensor):
        mean, deviation = statistics.fmean(group), statistics.stdev(group)
        for value in group:
            z = (value - mean) / (deviation + 1e-5)
            code = min(range(2**bits), key=lambda code: abs(codebook(bits)[code] - z))
            codes.append(code)
            values.append(codebook(bits)[code] * deviation + mean)
    return codes, values


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_becomes_the_nearest_level(shape: tuple[int, ...], bits: Bits) -> None:
    latent = draw(shape)
    codes, values = slow_quantise(latent, bits)
    stored_codes, scales = encode(latent, bits)
    assert stored_codes.tolist() == codes
    torch.testing.assert_close(quantise(latent, bits).reshape(-1), torch.tensor(values), rtol=0, atol=3e-5)
    assert scales is not None
    expected = [[statistics.fmean(group), statistics.stdev(group)] for group in groups(latent)]
    np.testing.assert_allclose(scales, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("shape", [*SHAPES, (1,), (3, 1, 1)])
def test_the_pack_reads_what_training_used(shape: tuple[int, ...], bits: Bits) -> None:
    latent = draw(shape, seed=bits)
    codes, scales = encode(latent, bits)
    assert scales is not None
    np.testing.assert_allclose(dequantise(codes, scales, bits), quantise(latent, bits).reshape(-1).numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "kind"), [(16, np.float16), (32, np.float32)])
def test_sixteen_and_thirty_two_bits_are_floats(bits: Bits, kind: type[np.generic]) -> None:
    latent = draw((3, 5)) * 1.0001
    codes, scales = encode(latent, bits)
    assert scales is None
    assert codes.dtype == kind
    assert quantise(latent, bits).reshape(-1).tolist() == latent.reshape(-1).numpy().astype(kind).tolist() == codes.tolist()


# --- gradient -------------------------------------------------------------------------------------------------------------------------------


def slow_gradient(latent: torch.Tensor, bits: int, gradient: torch.Tensor) -> list[float]:
    """d sum_i g_i w_hat_i / d w_j, with w_hat_i = L_i s + m, dL_i := dz_i (straight through), by the chain rule in loops."""
    result = []
    for group, outer in zip(groups(latent), groups(gradient), strict=True):
        count, mean, deviation = len(group), statistics.fmean(group), statistics.stdev(group)
        z = [(value - mean) / (deviation + EPSILON) for value in group]
        level = [min(codebook(bits), key=lambda level, z=z_i: abs(level - z)) for z_i in z]
        for j in range(count):
            d_mean = 1 / count
            d_deviation = (group[j] - mean) / ((count - 1) * deviation)
            total = 0.0
            for i in range(count):
                d_z = ((i == j) - d_mean) / (deviation + EPSILON) - (group[i] - mean) * d_deviation / (deviation + EPSILON) ** 2
                total += outer[i] * (d_z * deviation + level[i] * d_deviation + d_mean)
            result.append(total)
    return result


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_straight_through_and_flows_through_mean_and_deviation(shape: tuple[int, ...], bits: Bits) -> None:
    latent, gradient = draw(shape).requires_grad_(), draw(shape, seed=9)
    quantise(latent, bits).backward(gradient)
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad.reshape(-1), torch.tensor(slow_gradient(latent.detach(), bits, gradient)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 32])
def test_the_gradient_of_floats_is_the_identity(bits: Bits) -> None:
    latent, gradient = draw((3, 5)).requires_grad_(), draw((3, 5), seed=9)
    quantise(latent, bits).backward(gradient)
    assert latent.grad is not None
    assert torch.equal(latent.grad, gradient)


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("shape", [(1,), (4,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("value", [0.0, 0.7, -1e6])
def test_equal_values_stay_what_they_are_with_a_finite_gradient(shape: tuple[int, ...], value: float, bits: Bits) -> None:
    latent = torch.full(shape, value, requires_grad=True)
    stored = quantise(latent, bits)
    stored.square().sum().backward()
    torch.testing.assert_close(stored, latent, rtol=1e-6, atol=1e-9)
    assert latent.grad is not None
    assert bool(latent.grad.isfinite().all())


# --- the module -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [*LOW_BITS, 16, 32])
def test_stored_values_are_used_as_they_are(bits: Bits) -> None:
    trained = Quantised(draw((4, 6)), bits)
    stored = trained().detach()
    reloaded = Quantised(torch.zeros(4, 6), bits)
    reloaded.load_stored(stored)
    assert torch.equal(reloaded(), stored)


@pytest.mark.parametrize("bits", [*LOW_BITS, 16, 32])
def test_a_change_starts_at_nothing_or_next_to_it(bits: Bits) -> None:
    first, again = (small_change((50, 3), bits, torch.Generator().manual_seed(3))() for _ in range(2))
    assert torch.equal(first, again)
    assert float(first.detach().abs().max()) < 1e-3
    assert bool((first == 0).all()) == (bits >= 16), "below 16 bits a zero tensor would have no sign to learn"


def test_a_learned_matrix_moves_through_its_codes() -> None:
    """One bit: gradient descent on the latent values finds the signs of a target."""
    target = draw((6, 6)).sign()
    weight = Quantised(draw((6, 6), seed=5) * 0.1, 1)
    optimiser = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (weight() - target).square().sum().backward()
        optimiser.step()
    assert math.isclose(float((weight().detach().sign() == target).float().mean()), 1.0)
