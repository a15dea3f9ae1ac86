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

SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class BankMatrices:
    """The matrices of a bank as all blocks of a pass use them, made once, and the gradients that
    each block leaves in the backward pass; these are summed once, in float32.

    rows: down [X, D], and below it the router [R, D] of several experts. up_XD: times the
    `up_factor`. Both are in the type of the products. scaled_experts_ER: directions of experts over
    the temperature. anchor: a scalar that connects the blocks to the bank's tensors.
    """

    anchor: torch.Tensor
    rows: torch.Tensor
    up_XD: torch.Tensor
    scaled_experts_ER: torch.Tensor | None
    gradients: list[tuple[torch.Tensor | None, ...]]


class _Anchor(torch.autograd.Function):
    """A scalar whose backward pass, which comes after that of all blocks that take it, gives the
    sums of what they left in `gradients`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gradients: list[tuple[torch.Tensor | None, ...]], *matrices: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.dtypes = gradients, [each.dtype for each in matrices]
        return matrices[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        left = list(zip(*ctx.gradients, strict=True)) or [()] * len(ctx.dtypes)
        ctx.gradients.clear()
        sums = [
            torch.stack(each).sum(dim=0, dtype=dtype) if each else None
            for each, dtype in zip(left, ctx.dtypes, strict=False)
        ]
        return None, *sums


def bank_matrices(
    current: Mapping[str, torch.Tensor],
    temperature: float,
    up_factor: float,
    dtype: torch.dtype,
) -> BankMatrices:
    """The matrices of a bank's tensors `down` [E, H, D], `up` [E, D, H] and, of several experts,
    `router` [R, D] and `embeddings` [E, R], for products in `dtype`.
    """
    rows = current["down"].flatten(0, 1)
    up_XD = (up_factor * current["up"]).transpose(1, 2).flatten(0, 1)
    matrices = [rows, up_XD]
    if "router" in current:
        precise = current["embeddings"].to(torch.promote_types(dtype, torch.float32))
        scaled_ER = F.normalize(precise, dim=1, eps=SMALLEST_NORM) / temperature
        matrices = [torch.cat([rows, current["router"]]), up_XD, scaled_ER]
    gradients: list[tuple[torch.Tensor | None, ...]] = []
    plain = [each.detach() for each in matrices]
    return BankMatrices(
        _Anchor.apply(gradients, *matrices),
        plain[0].to(dtype),
        plain[1].to(dtype),
        plain[2] if len(plain) > 2 else None,
        gradients,
    )


class Routes(NamedTuple):
    """Where each token goes, [E, T], and what it was found from: directions of tokens [R, T], norms
    of projected tokens [1, T]."""

    probabilities_ET: torch.Tensor
    gates_ET: torch.Tensor
    directions_RT: torch.Tensor
    norms_1T: torch.Tensor


@functools.lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


def route(read_RT: torch.Tensor, scaled_experts_ER: torch.Tensor, top_k: int = 1) -> Routes:
    """Cosine router with softmax (X-MoE, arXiv 2204.09179), and the probabilities of the best
    `top_k` experts as their gates, in the type of the projected tokens `read_RT`; the rest is in
    the type of `scaled_experts_ER`, the directions of the experts over the temperature.
    """
    norms_1T = torch.linalg.vector_norm(
        read_RT, dim=0, keepdim=True, dtype=scaled_experts_ER.dtype
    ).clamp_min_(SMALLEST_NORM)
    directions_RT = read_RT / norms_1T
    probabilities_ET = torch.softmax(scaled_experts_ER @ directions_RT, dim=0)
    experts, tokens = probabilities_ET.shape
    gates_ET = read_RT.new_empty(experts, tokens)
    if top_k == 1:
        is_best_ET = probabilities_ET.argmax(dim=0) == _numbers(experts, read_RT.device)[:, None]
        torch.mul(probabilities_ET, is_best_ET, out=gates_ET)
    else:
        gate_KT, choice_KT = probabilities_ET.topk(top_k, dim=0)
        gates_ET.zero_().scatter_(0, choice_KT, gate_KT.to(gates_ET.dtype))
    return Routes(probabilities_ET, gates_ET, directions_RT, norms_1T)


def mixed_output(
    x_STD: torch.Tensor,
    down_SEHD: torch.Tensor,
    up_SEDH: torch.Tensor,
    router_SRD: torch.Tensor | None,
    embeddings_SER: torch.Tensor | None,
    temperature: float,
    top_k: int,
) -> torch.Tensor:
    """What `Mixture` adds to the residual, [S, T, D], where each sample has a bank of its own."""
    hidden_SXT = (down_SEHD.flatten(1, 2) @ x_STD.mT).relu_()
    if router_SRD is not None and embeddings_SER is not None:
        directions_SRT = F.normalize(router_SRD @ x_STD.mT, dim=1, eps=SMALLEST_NORM)
        scaled_SER = F.normalize(embeddings_SER, dim=2, eps=SMALLEST_NORM) / temperature
        probabilities_SET = torch.softmax(scaled_SER @ directions_SRT, dim=1)
        gate_SKT, choice_SKT = probabilities_SET.topk(top_k, dim=1)
        gates_SET = torch.zeros_like(probabilities_SET).scatter_(1, choice_SKT, gate_SKT)
        hidden_SXT *= gates_SET.repeat_interleave(down_SEHD.shape[2], dim=1)
    return hidden_SXT.mT @ up_SEDH.transpose(2, 3).flatten(1, 2)


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
            routes = route(read[hidden_units:], bank.scaled_experts_ER, top_k)
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
        scaled_gradient_ER = None
        if not saved:
            into_hidden.copy_(through_relu)
        else:
            probabilities_ET, gates_ET, directions_RT, norms_1T = saved
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
            scaled_gradient_ER = _through_router(
                score_ET,
                directions_RT,
                norms_1T,
                bank.scaled_experts_ER,
                read_gradient[hidden_units:],
            )
        bank.gradients.append((read_gradient @ x_TD, up_gradient_XD, scaled_gradient_ER))
        x_gradient = read_gradient.T @ bank.rows if ctx.needs_input_grad[0] else None
        return x_gradient, gradient_TD, *[None] * 5


def _through_router(
    score_ET: torch.Tensor,
    directions_RT: torch.Tensor,
    norms_1T: torch.Tensor,
    scaled_experts_ER: torch.Tensor,
    into_RT: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the scaled experts [E, R] from that of the scores; that of the projected tokens
    is written into `into_RT`.
    """
    gradient_RT = scaled_experts_ER.T @ score_ET
    along_1T = (directions_RT * gradient_RT).sum(dim=0, keepdim=True)
    across_RT = torch.addcmul(gradient_RT, directions_RT, along_1T, value=-1)
    torch.div(across_RT, norms_1T, out=into_RT)
    return score_ET @ directions_RT.T
