"""The mixture of adapters as one function with its derivative written out (for its meaning, see
smoa.py).

    p = softmax(cos(R x, e) / temperature)      gate_e = p_e for the chosen experts, else 0
    y = residual + sum_e up_e gate_e dropout(relu(down_e x))

Every expert's hidden units are computed, by one product with the router's rows appended, and those
not chosen are set to zero: experts are so narrow (E * H units against the MLP's 4 * D) that this
costs less than sorting tokens, and a step costs nearly the same for any E. Numbers of a token lie
in columns: a softmax over a few experts is then a few passes over long rows, many times faster than
many short rows.

Products run in the type of x; cosine and softmax are float32. Shapes: T tokens, D width, H
width of an expert, R router width, E experts, K experts of a token, X = E * H hidden units.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pipeline.adaptation.dropout import SeededDropout

TINY = 1e-12
"""Added to the numbers of a vector, so that one of zeros has a direction, too."""


@dataclass(eq=False)
class BankMatrices:
    """The matrices of a bank as all blocks of a pass use them, made once, and what each block
    leaves in the backward pass for their gradients, which are then summed once, in float32.

    rows: down [X, D], and below it the router [R, D] of several experts. up_XD: times the
    `up_factor`. Both are in the type of the products. scaled_experts_ER: directions of experts over
    the temperature. anchor: a scalar that connects the blocks to the bank's tensors. left: of each
    block, the gradients of `rows` and `up_XD` and, of several experts, `_ScoreGradient`.
    """

    anchor: torch.Tensor
    rows: torch.Tensor
    up_XD: torch.Tensor
    scaled_experts_ER: torch.Tensor | None
    left: list[tuple[torch.Tensor, ...]]
    _ones_1T: torch.Tensor | None = None

    def ones_1T(self, tokens: int) -> torch.Tensor:
        """A row of ones, which blocks of as many tokens share."""
        assert self.scaled_experts_ER is not None
        if self._ones_1T is None or self._ones_1T.shape[1] != tokens:
            self._ones_1T = self.scaled_experts_ER.new_ones(1, tokens)
        return self._ones_1T


class _ScoreGradient(NamedTuple):
    """The gradient of a block's scores, and the projected tokens with their norms."""

    score_ET: torch.Tensor
    projected_RT: torch.Tensor
    norms_1T: torch.Tensor


def _directions(
    vectors: torch.Tensor, lengths: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors that are numbered by `dim`, 0 or 1, scaled to `lengths`; the vectors in the type of
    `lengths`; and their norms.
    """
    precise = torch.add(vectors, TINY, out=torch.empty_like(vectors, dtype=lengths.dtype))
    scaled, norms = torch._weight_norm_interface(precise, lengths, dim)
    return scaled, precise, norms


_through_directions = torch.ops.aten._weight_norm_interface_backward
"""From the gradient of the scaled vectors, and vectors, `lengths`, norms and `dim` of
`_directions`: the gradients of the vectors and of `lengths`.
"""


class _Bank(torch.autograd.Function):
    """An anchor, whose backward pass comes after that of all blocks that take it, and the matrices
    of a bank.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        left: list[tuple[torch.Tensor, ...]],
        temperature: float,
        up_factor: float,
        dtype: torch.dtype,
        down_EHD: torch.Tensor,
        up_EDH: torch.Tensor,
        router_RD: torch.Tensor | None,
        embeddings_ER: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.left, ctx.up_factor, ctx.hidden_shape = left, up_factor, down_EHD.shape
        ctx.dtypes = [each.dtype for each in (down_EHD, up_EDH)]
        down_XD = down_EHD.flatten(0, 1)
        up_XD = torch.empty_like(down_XD, dtype=dtype)
        up_XD.view(down_EHD.shape).copy_((up_factor * up_EDH).transpose(1, 2))
        rows, scaled_ER = down_XD.to(dtype), None
        if router_RD is not None and embeddings_ER is not None:
            rows = down_XD.new_empty(len(down_XD) + len(router_RD), down_XD.shape[1], dtype=dtype)
            rows[: len(down_XD)].copy_(down_XD)
            rows[len(down_XD) :].copy_(router_RD)
            precise = torch.promote_types(dtype, torch.float32)
            lengths_E1 = embeddings_ER.new_full(
                (len(embeddings_ER), 1), 1 / temperature, dtype=precise
            )
            scaled_ER, vectors_ER, norms_E1 = _directions(embeddings_ER, lengths_E1, 0)
            ctx.save_for_backward(vectors_ER, lengths_E1, norms_E1)
        matrices = rows, up_XD, scaled_ER
        ctx.mark_non_differentiable(*(each for each in matrices if each is not None))
        return down_EHD.new_empty(()), *matrices

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if not ctx.left:
            return (None,) * 8
        rows, ups, *scores = zip(*ctx.left, strict=True)
        ctx.left.clear()
        down_dtype, up_dtype = ctx.dtypes
        rows_gradient = torch.stack(rows).sum(dim=0, dtype=down_dtype)
        up_gradient = torch.stack(ups).sum(dim=0, dtype=up_dtype) * ctx.up_factor
        hidden_units = up_gradient.shape[0]
        embeddings_gradient = None
        if scores:
            scores_EN, projected_RN, norms_1N = (torch.cat(each, dim=1) for each in scores)
            scaled_gradient_ER = (scores_EN / norms_1N) @ projected_RN.T
            embeddings_gradient, _ = _through_directions(scaled_gradient_ER, *ctx.saved_tensors, 0)
        return (
            *[None] * 4,
            rows_gradient[:hidden_units].view(ctx.hidden_shape),
            up_gradient.view(ctx.hidden_shape).transpose(1, 2),
            rows_gradient[hidden_units:] if scores else None,
            embeddings_gradient,
        )


def bank_matrices(
    current: Mapping[str, torch.Tensor],
    temperature: float,
    up_factor: float,
    dtype: torch.dtype,
) -> BankMatrices:
    """The matrices of a bank's tensors `down` [E, H, D], `up` [E, D, H] and, of several experts,
    `router` [R, D] and `embeddings` [E, R], for products in `dtype`.
    """
    left: list[tuple[torch.Tensor, ...]] = []
    tensors = (current.get(name) for name in ("down", "up", "router", "embeddings"))
    anchor, rows, up_XD, scaled_ER = _Bank.apply(left, temperature, up_factor, dtype, *tensors)
    return BankMatrices(anchor, rows, up_XD, scaled_ER, left)


class Routes(NamedTuple):
    """Where each token goes, [E, T], and what it was found from: projected tokens [R, T] and their
    norms [1, T]."""

    probabilities_ET: torch.Tensor
    gates_ET: torch.Tensor
    projected_RT: torch.Tensor
    norms_1T: torch.Tensor


@functools.lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


def route(
    read_RT: torch.Tensor,
    scaled_experts_ER: torch.Tensor,
    ones_1T: torch.Tensor,
    top_k: int = 1,
) -> Routes:
    """Cosine router with softmax (X-MoE, arXiv 2204.09179), and the probabilities of the best
    `top_k` experts as their gates, in the type of the projected tokens `read_RT`; the rest is in
    the type of `scaled_experts_ER`, the directions of the experts over the temperature.
    """
    directions_RT, projected_RT, norms_1T = _directions(read_RT, ones_1T, 1)
    probabilities_ET = torch.softmax(scaled_experts_ER @ directions_RT, dim=0)
    experts, tokens = probabilities_ET.shape
    gates_ET = read_RT.new_empty(experts, tokens)
    if top_k == 1:
        is_best_ET = probabilities_ET.argmax(dim=0) == _numbers(experts, read_RT.device)[:, None]
        torch.mul(probabilities_ET, is_best_ET, out=gates_ET)
    else:
        gate_KT, choice_KT = probabilities_ET.topk(top_k, dim=0)
        gates_ET.zero_().scatter_(0, choice_KT, gate_KT.to(gates_ET.dtype))
    return Routes(probabilities_ET, gates_ET, projected_RT, norms_1T)


class MixedBanks(NamedTuple):
    """The banks of the samples of a batch, as all blocks of a pass use them.

    rows_SND: down [X, D] and below it, of several experts, the router [R, D]. up_SXD: times the
    scale of the output. scaled_experts_SER: directions of experts over the temperature.
    """

    rows_SND: torch.Tensor
    up_SXD: torch.Tensor
    scaled_experts_SER: torch.Tensor | None


def mixed_banks(
    current: Mapping[str, torch.Tensor], temperature: float, scale: float, dtype: torch.dtype
) -> MixedBanks:
    """The banks of each sample's tensors `down` [S, E, H, D], `up` [S, E, D, H] and, of several
    experts, `router` [S, R, D] and `embeddings` [S, E, R], for products in `dtype`.
    """
    rows_SND = current["down"].flatten(1, 2)
    up_SXD = (scale * current["up"].transpose(2, 3).flatten(1, 2)).to(dtype)
    if "router" not in current:
        return MixedBanks(rows_SND.to(dtype), up_SXD, None)
    directions_SER = F.normalize(current["embeddings"], dim=2, eps=TINY)
    rows_SND = torch.cat([rows_SND, current["router"]], dim=1).to(dtype)
    return MixedBanks(rows_SND, up_SXD, directions_SER / temperature)


def mixed_hidden(x_SDT: torch.Tensor, banks: MixedBanks, top_k: int) -> torch.Tensor:
    """The hidden units of `Mixture` times their gates, [S, X, T], where each sample has a bank of
    its own: their products with `up_SXD` are what it adds to the residual. Experts are chosen in
    float32, as by `route`.
    """
    read_SNT, hidden_units = banks.rows_SND @ x_SDT, banks.up_SXD.shape[1]
    hidden_SXT = read_SNT[:, :hidden_units].relu_()
    if banks.scaled_experts_SER is None:
        return hidden_SXT
    projected_SRT = read_SNT[:, hidden_units:].to(banks.scaled_experts_SER.dtype)
    norms_S1T = torch.linalg.vector_norm(projected_SRT, dim=1, keepdim=True).clamp_(min=TINY)
    scores_SET = (banks.scaled_experts_SER @ projected_SRT).div_(norms_S1T)
    probabilities_SET = torch.softmax(scores_SET, dim=1)
    gate_SKT, choice_SKT = _best(probabilities_SET, top_k)
    gates_SET = torch.zeros_like(probabilities_SET).scatter_(1, choice_SKT, gate_SKT)
    by_expert_SEHT = hidden_SXT.unflatten(1, (gates_SET.shape[1], -1))
    return by_expert_SEHT.mul_(gates_SET[:, :, None]).flatten(1, 2)


def _best(probabilities_SET: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities and their experts, [S, K, T]."""
    if top_k == 1:
        return torch.max(probabilities_SET, dim=1, keepdim=True)
    return torch.topk(probabilities_SET, top_k, dim=1)


class Mixture(torch.autograd.Function):
    """Output [T, D], and of several experts the probability and the gate of each [E, T], from
    tokens, the residual, and the bank with its anchor.

    Dropout's scaling of what it keeps is in the bank's `up_XD`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        anchor: torch.Tensor,
        bank: BankMatrices,
        experts: int,
        top_k: int,
        dropout: SeededDropout,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        read, hidden_units = bank.rows @ x_TD.T, len(bank.up_XD)
        # Not len(x_TD), which would fix the batch size of an exported model.
        hidden_EHT = dropout.mask(read[:hidden_units].relu()).view(experts, -1, x_TD.shape[0])
        routes: Routes | tuple[()] = ()
        if bank.scaled_experts_ER is not None:
            ctx.ones_1T = bank.ones_1T(x_TD.shape[0])
            routes = route(read[hidden_units:], bank.scaled_experts_ER, ctx.ones_1T, top_k)
            hidden_EHT *= routes.gates_ET[:, None]
            ctx.mark_non_differentiable(routes.gates_ET)
        ctx.set_materialize_grads(False)
        ctx.bank = bank
        ctx.save_for_backward(x_TD, hidden_EHT, *routes)
        y_TD = torch.addmm(residual_TD, hidden_EHT.flatten(0, 1).T, bank.up_XD)
        return y_TD, *(routes[:2] or (None, None))

    @staticmethod
    def backward(
        ctx: Any, gradient_TD: torch.Tensor | None, gradient_ET: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TD, hidden_EHT, *saved = ctx.saved_tensors
        bank, hidden_units = ctx.bank, len(ctx.bank.up_XD)
        if gradient_TD is None:  # the balance term alone
            gradient_TD = torch.zeros_like(x_TD)
        up_gradient_XD = hidden_EHT.flatten(0, 1) @ gradient_TD
        hidden_gradient = (bank.up_XD @ gradient_TD.T).view_as(hidden_EHT)
        read_gradient = x_TD.new_empty(len(bank.rows), len(x_TD))
        into_hidden = read_gradient[:hidden_units].view_as(hidden_EHT)
        # Hidden units that dropout left out are zero, and so are their gradients.
        through_relu = torch.ops.aten.threshold_backward(hidden_gradient, hidden_EHT, 0)
        left: tuple[torch.Tensor, ...] = ()
        if not saved:
            into_hidden.copy_(through_relu)
        else:
            probabilities_ET, gates_ET, projected_RT, norms_1T = saved
            torch.mul(through_relu, gates_ET[:, None], out=into_hidden)
            # Each probability times its gradient: hidden_EHT has the gates in it, which are the
            # probabilities of the chosen and zero for the others.
            weighted_grad_ET = (hidden_gradient * hidden_EHT).sum(
                dim=1, dtype=probabilities_ET.dtype
            )
            if gradient_ET is not None:
                weighted_grad_ET.addcmul_(probabilities_ET, gradient_ET)
            score_ET = torch.addcmul(
                weighted_grad_ET,
                probabilities_ET,
                weighted_grad_ET.sum(dim=0, keepdim=True),
                value=-1,
            )
            direction_gradient_RT = bank.scaled_experts_ER.T @ score_ET
            projected_gradient_RT, _ = _through_directions(
                direction_gradient_RT, projected_RT, ctx.ones_1T, norms_1T, 1
            )
            read_gradient[hidden_units:].copy_(projected_gradient_RT)
            left = _ScoreGradient(score_ET, projected_RT, norms_1T)
        bank.left.append((read_gradient @ x_TD, up_gradient_XD, *left))
        x_gradient = read_gradient.T @ bank.rows if ctx.needs_input_grad[0] else None
        return x_gradient, gradient_TD, *[None] * 5
