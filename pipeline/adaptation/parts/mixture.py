"""The mixture of adapters as one function with its derivative written out (for its meaning, see
smoa.py).

    p = softmax(cos(R x, e) / temperature)      gate_e = p_e for the chosen experts, else 0
    y = residual + sum_e up_e gate_e dropout(relu(down_e x))

Every expert's hidden units are computed, by one product with the router's rows appended, and those
not chosen are set to zero: experts are so narrow (E * H units against the MLP's 4 * D) that this
costs less than sorting tokens, and a step costs nearly the same for any E. Numbers of a token lie
in columns: a softmax over a few experts is then a few passes over long rows, many times faster than
many short rows.

Products run in the type of x; cosine, softmax and gates are float32. Shapes: T tokens, D width, H
width of an expert, R router width, E experts, K experts of a token, X = E * H hidden units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pipeline.adaptation.dropout import SeededDropout

SMALLEST_NORM = 1e-12


class Routes(NamedTuple):
    """Where each token goes, [E, T], and what it was found from: directions of tokens [R, T], norms
    of projected tokens [1, T], directions of experts over the temperature [E, R]."""

    probabilities_ET: torch.Tensor
    gates_ET: torch.Tensor
    directions_RT: torch.Tensor
    norms_1T: torch.Tensor
    scaled_experts_ER: torch.Tensor


def route(
    projected_RT: torch.Tensor, embeddings_ER: torch.Tensor, temperature: float, top_k: int = 1
) -> Routes:
    """Cosine router with softmax (X-MoE, arXiv 2204.09179), and the probabilities of the best
    `top_k` experts as their gates.
    """
    norms_1T = projected_RT.square().sum(dim=0, keepdim=True).sqrt_().clamp_min_(SMALLEST_NORM)
    directions_RT, scaled_experts_ER = (
        projected_RT / norms_1T,
        F.normalize(embeddings_ER, dim=1, eps=SMALLEST_NORM) / temperature,
    )
    probabilities_ET = torch.softmax(scaled_experts_ER @ directions_RT, dim=0)
    gate_KT, choice_KT = (
        probabilities_ET.max(dim=0, keepdim=True)
        if top_k == 1
        else probabilities_ET.topk(top_k, dim=0)
    )
    gates_ET = torch.zeros_like(probabilities_ET).scatter_(0, choice_KT, gate_KT)
    return Routes(probabilities_ET, gates_ET, directions_RT, norms_1T, scaled_experts_ER)


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


def _through_normalisation(
    gradient: torch.Tensor, direction: torch.Tensor, norm: torch.Tensor, dim: int
) -> torch.Tensor:
    """Gradient of a vector from that of its direction."""
    along = (direction * gradient).sum(dim=dim, keepdim=True)
    return torch.addcmul(gradient, direction, along, value=-1).div_(norm)


class Mixture(torch.autograd.Function):
    """Output [T, D] and mean probability [E] of each expert, from tokens, the residual, and the
    bank's tensors; one expert needs no router.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        down_EHD: torch.Tensor,
        up_EDH: torch.Tensor,
        router_RD: torch.Tensor | None,
        embeddings_ER: torch.Tensor | None,
        temperature: float,
        top_k: int,
        dropout: SeededDropout,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        experts, width, _ = down_EHD.shape
        rows = (
            down_EHD.flatten(0, 1)
            if router_RD is None
            else torch.cat([down_EHD.flatten(0, 1), router_RD])
        )
        rows, up_XD = rows.to(x_TD.dtype), up_EDH.transpose(1, 2).flatten(0, 1).to(x_TD.dtype)
        read = rows @ x_TD.T
        hidden_EHT = dropout(read[: experts * width].relu()).view(experts, width, -1)
        ctx.kept_factor = 1 / (1 - dropout.share) if dropout.training else 1.0
        routes, probability_E, count_E = (
            None,
            down_EHD.new_ones(experts),
            down_EHD.new_ones(experts),
        )
        if router_RD is not None and embeddings_ER is not None:
            precise = torch.promote_types(x_TD.dtype, torch.float32)
            routes = route(
                read[experts * width :].to(precise), embeddings_ER.to(precise), temperature, top_k
            )
            hidden_EHT *= routes.gates_ET[:, None].to(x_TD.dtype)
            probability_E, count_E = (
                routes.probabilities_ET.mean(dim=1),
                (routes.gates_ET > 0).sum(dim=1),
            )
        ctx.temperature, ctx.dtypes = (
            temperature,
            [
                None if tensor is None else tensor.dtype
                for tensor in (down_EHD, up_EDH, router_RD, embeddings_ER)
            ],
        )
        ctx.save_for_backward(x_TD, hidden_EHT, rows, up_XD, embeddings_ER, *(routes or ()))
        ctx.mark_non_differentiable(count_E)
        return torch.addmm(residual_TD, hidden_EHT.flatten(0, 1).T, up_XD), probability_E, count_E

    @staticmethod
    def backward(
        ctx: Any, gradient_TD: torch.Tensor, gradient_E: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TD, hidden_EHT, rows, up_XD, embeddings_ER, *saved = ctx.saved_tensors
        up_gradient = (
            (hidden_EHT.flatten(0, 1) @ gradient_TD).view(*hidden_EHT.shape[:2], -1).transpose(1, 2)
        )
        hidden_gradient = (up_XD @ gradient_TD.T).view_as(hidden_EHT)
        read_gradient = torch.empty(len(rows), len(x_TD), dtype=x_TD.dtype, device=x_TD.device)
        into_hidden = read_gradient[: len(up_XD)].view_as(hidden_EHT)
        embeddings_gradient = None
        # Hidden units that dropout left out are zero, and so are their gradients.
        through_relu = torch.ops.aten.threshold_backward(hidden_gradient, hidden_EHT, 0).mul_(
            ctx.kept_factor
        )
        if not saved:
            into_hidden.copy_(through_relu)
        else:
            routes = Routes(*saved)
            torch.mul(
                through_relu, routes.gates_ET[:, None].to(through_relu.dtype), out=into_hidden
            )
            # Each probability times its gradient: hidden_EHT has the gates in it, which are the
            # probabilities of the chosen and zero for the others.
            grads_EHT = hidden_gradient * hidden_EHT
            weighted_grad_ET = grads_EHT.sum(dim=1, dtype=routes.gates_ET.dtype)
            weighted_grad_ET.addcmul_(routes.probabilities_ET, gradient_E[:, None] / len(x_TD))
            read_gradient[len(up_XD) :], embeddings_gradient = _through_router(
                weighted_grad_ET, routes, embeddings_ER, ctx.temperature
            )
        rows_gradient = read_gradient @ x_TD
        down_gradient = rows_gradient[: len(up_XD)].view(*hidden_EHT.shape[:2], -1)
        router_gradient = rows_gradient[len(up_XD) :] if saved else None
        wanted = (down_gradient, up_gradient, router_gradient, embeddings_gradient)
        trained = [
            None if each is None else each.to(dtype)
            for each, dtype in zip(wanted, ctx.dtypes, strict=True)
        ]
        return (
            read_gradient.T @ rows if ctx.needs_input_grad[0] else None,
            gradient_TD,
            *trained,
            None,
            None,
            None,
        )


def _through_router(
    weighted_grad_ET: torch.Tensor, routes: Routes, embeddings_ER: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the projected tokens [R, T] and of the embeddings [E, R], from each probability
    times its gradient.
    """
    total_T = weighted_grad_ET.sum(dim=0, keepdim=True)
    score_ET = torch.addcmul(weighted_grad_ET, routes.probabilities_ET, total_T, value=-1)
    token_gradient = _through_normalisation(
        routes.scaled_experts_ER.T @ score_ET, routes.directions_RT, routes.norms_1T, dim=0
    )
    norms_E1 = embeddings_ER.to(score_ET.dtype).norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    cosine_gradient_ER = score_ET @ routes.directions_RT.T / temperature
    return token_gradient, _through_normalisation(
        cosine_gradient_ER, routes.scaled_experts_ER * temperature, norms_E1, dim=1
    )
