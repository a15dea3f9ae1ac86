"""SMoA against a loop over tokens; routing is per token, the load-balance term is Switch's, and
everything used learns.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_cases import for_every
from pydantic import ValidationError
from torch import nn

from pipeline.adaptation import plan
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.parts.mixture import Mixture, Routes, bank_matrices, route
from pipeline.adaptation.parts.smoa import ParallelToMlp, SmoaBank, bank_shapes
from pipeline.backbones import load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input, Recipe, SearchSpace, Smoa

WIDTH = 6


def make_bank(experts: int = 3, **options: float) -> SmoaBank:
    """A bank that holds tensors whose numbers are all large enough to matter."""
    spec = Smoa(experts=experts, width=4, router_width=5, bits=32, **options)  # type: ignore[arg-type]
    dropout = SeededDropout(spec.dropout, 0).eval()
    bank, generator = SmoaBank(spec, dropout), torch.Generator().manual_seed(1)
    for name, shape in bank_shapes(WIDTH // spec.heads, spec).items():
        bank.current[name] = torch.empty(shape).normal_(0, 1, generator=generator).requires_grad_()
    return bank


def draw(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(bank: SmoaBank, x: torch.Tensor) -> torch.Tensor:
    """The bank's output alone."""
    return bank(x, torch.zeros_like(x))


def routes(bank: SmoaBank, x_TD: torch.Tensor) -> Routes:
    """Where the bank sends tokens."""
    with torch.no_grad():
        matrices = bank_matrices(bank.current, bank.spec.temperature, 1.0, x_TD.dtype)
        assert matrices.scaled_experts_ER is not None
        projected_RT = bank.current["router"] @ x_TD.T
        ones_1T = matrices.ones_1T(len(x_TD))
        return route(projected_RT, matrices.scaled_experts_ER, ones_1T, bank.spec.top_k)


def values(bank: SmoaBank, name: str) -> list:
    return bank.current[name].detach().double().tolist()


def matvec(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def slow_route(bank: SmoaBank, token: list[float]) -> list[float]:
    """Softmax, over the experts, of one token's cosine similarities over the temperature."""
    projected = matvec(values(bank, "router"), token)
    scores = [
        math.exp(cosine(projected, embedding) / bank.spec.temperature)
        for embedding in values(bank, "embeddings")
    ]
    return [score / sum(scores) for score in scores]


def slow_token(bank: SmoaBank, token: list[float]) -> list[float]:
    """One token through its best experts, each times its probability."""
    probabilities = slow_route(bank, token) if bank.spec.experts > 1 else [1.0]
    output = [0.0] * len(token)
    for expert in sorted(range(len(probabilities)), key=probabilities.__getitem__)[
        -bank.spec.top_k :
    ]:
        hidden = [max(0.0, number) for number in matvec(values(bank, "down")[expert], token)]
        up = matvec(values(bank, "up")[expert], hidden)
        output = [
            total + bank.spec.scale * probabilities[expert] * number
            for total, number in zip(output, up, strict=True)
        ]
    return output


@for_every("experts", [1, 2, 3, 7])
def test_each_token_goes_through_its_one_expert(experts: int) -> None:
    bank, x = make_bank(experts, scale=0.7, temperature=0.3), draw(2, 5, WIDTH)
    expected = torch.tensor(
        [slow_token(bank, token) for token in x.reshape(-1, WIDTH).double().tolist()]
    ).reshape(x.shape)
    torch.testing.assert_close(through(bank, x), expected.float(), rtol=1e-4, atol=1e-5)


@for_every(("heads", "top_k"), [(1, 2), (2, 1), (3, 1), (2, 3), (6, 2)])
def test_each_sub_token_goes_through_its_best_experts(heads: int, top_k: int) -> None:
    bank, x = make_bank(4, heads=heads, top_k=top_k, temperature=0.3), draw(2, 5, WIDTH)
    parts = x.reshape(-1, WIDTH // heads).double().tolist()
    expected = torch.tensor([slow_token(bank, part) for part in parts]).reshape(x.shape)
    torch.testing.assert_close(through(bank.train(), x), expected.float(), rtol=1e-4, atol=1e-5)
    bank.loss()
    assert int(bank.expert_load.sum()) == 10 * heads * top_k


def test_heads_that_do_not_divide_the_width_are_refused(tiny_backbone: Backbone) -> None:
    backbone = load_backbone(tiny_backbone, Input(size_px=32))
    with pytest.raises(
        BackboneError,
        match=(
            r"recipe\.smoa\.heads: given 5, which does not divide .* width of 64; choose one of 1,"
            r" 2, 4, 8"
        ),
    ):
        plan(backbone, Recipe(smoa=Smoa(heads=5)), 3)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected at most as many as there are"):
        Smoa(experts=2, top_k=3)
    recipe = Recipe(smoa=Smoa(experts=4, top_k=3))
    assert SearchSpace(experts=(0, 3, 4)).fault(recipe) is None
    assert (
        SearchSpace(experts=(0, 2)).fault(recipe)
        == "at experts 2: given 3 experts a sub-token (top_k) of a bank of 2; expected at most as"
        " many as there are"
    )


@pytest.mark.parametrize("experts", [1, 3])
def test_the_output_is_added_to_what_is_beside(experts: int) -> None:
    bank, x, beside = (
        make_bank(experts),
        draw(2, 5, WIDTH),
        draw(2, 5, WIDTH, seed=5).requires_grad_(),
    )
    y = bank(x, beside)
    torch.testing.assert_close(y, beside + through(bank, x), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert torch.equal(beside.grad, torch.ones_like(beside))  # type: ignore[arg-type]


def test_probabilities_are_over_a_tokens_experts() -> None:
    bank, x_TD = make_bank(), draw(9, WIDTH)
    expected = torch.tensor([slow_route(bank, token) for token in x_TD.double().tolist()])
    torch.testing.assert_close(
        routes(bank, x_TD).probabilities_ET.T, expected.float(), rtol=1e-4, atol=1e-6
    )


def test_a_token_does_not_depend_on_the_others() -> None:
    bank, x_TD = make_bank(temperature=1.0), draw(12, WIDTH)
    together = through(bank, x_TD)
    for number, token in enumerate(x_TD):
        torch.testing.assert_close(
            through(bank, token[None])[0], together[number], rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(through(bank, x_TD.flip(0)).flip(0), together, rtol=1e-5, atol=1e-6)


def test_a_single_expert_has_no_router() -> None:
    bank = make_bank(1).train()
    through(bank, draw(4, WIDTH))
    assert set(bank.current) == {"down", "up"}
    assert float(bank.loss()) == 0


# --- load -----------------------------------------------------------------------------------------


def slow_balance(bank: SmoaBank, x_TD: torch.Tensor) -> float:
    """E * sum_e f_e P_e, weighted."""
    routes = [slow_route(bank, token) for token in x_TD.double().tolist()]
    experts = range(bank.spec.experts)
    chosen = [max(experts, key=route.__getitem__) for route in routes]
    return (
        bank.spec.balance_weight
        * len(experts)
        * sum(
            chosen.count(e) / len(routes) * sum(route[e] for route in routes) / len(routes)
            for e in experts
        )
    )


def test_the_balance_term_is_switchs_averaged_over_blocks() -> None:
    bank, blocks = make_bank().train(), [draw(11, WIDTH, seed=3), draw(7, WIDTH, seed=4)]
    for x_TD in blocks:
        through(bank, x_TD)
    expected = sum(slow_balance(bank, x_TD) for x_TD in blocks) / 2
    assert float(bank.loss().detach()) == pytest.approx(expected, rel=1e-4)
    bank.begin_pass()
    assert float(bank.loss()) == 0, "terms of the last step are forgotten"


def pointed_bank(*directions: int) -> tuple[SmoaBank, torch.Tensor]:
    """Two experts that lie along axes 0 and 1, and tokens along the given axes."""
    bank = make_bank(2)
    with torch.no_grad():
        bank.current["router"].copy_(torch.eye(5, WIDTH))
        bank.current["embeddings"].copy_(torch.eye(2, 5))
    return bank.train(), torch.eye(WIDTH)[list(directions)]


def test_the_balance_term_is_one_at_an_even_load_and_the_number_of_experts_at_the_worst() -> None:
    bank, tokens_TD = pointed_bank(0, 1, 0, 1)
    through(bank, tokens_TD)
    weight = bank.spec.balance_weight
    assert float(bank.loss().detach()) == pytest.approx(weight, rel=1e-5)
    bank.begin_pass()
    through(bank, tokens_TD[[0, 0]])
    assert float(bank.loss().detach()) == pytest.approx(2 * weight, rel=1e-3)


def test_load_is_counted_in_training_only() -> None:
    bank, tokens_TD = pointed_bank(0, 1, 0, 0)
    through(bank, tokens_TD)
    through(bank, tokens_TD[:2])
    bank.eval()
    through(bank, tokens_TD)
    bank.loss()
    assert bank.expert_load.tolist() == [4, 2]
    assert len(bank.routed) == 2


# --- learning -------------------------------------------------------------------------------------


def test_router_embeddings_and_every_used_expert_get_a_gradient() -> None:
    bank, x_TD = make_bank().train(), draw(40, WIDTH)
    used = set(routes(bank, x_TD).probabilities_ET.argmax(dim=0).tolist())
    assert used == {0, 1, 2}
    through(bank, x_TD).square().sum().backward()
    for name in ("router", "embeddings", "down", "up"):
        gradient = bank.current[name].grad
        assert gradient is not None
        rows = gradient.flatten(1).abs().sum(dim=1)
        assert bool((rows > 0).all()), name


def test_tokens_and_experts_without_a_direction_have_finite_gradients() -> None:
    bank, x_TD = make_bank().train(), draw(5, WIDTH)
    with torch.no_grad():
        bank.current["embeddings"][1] = 0
        x_TD[2] = 0
    x_TD.requires_grad_()
    y_TD = through(bank, x_TD)
    assert torch.equal(y_TD[2], torch.zeros(WIDTH))
    (y_TD.square().sum() + bank.loss()).backward()
    for tensor in (x_TD, *bank.current.values()):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())


def test_an_idle_expert_gets_no_gradient() -> None:
    bank, tokens_TD = pointed_bank(0, 0)
    through(bank, tokens_TD).square().sum().backward()
    gradient = bank.current["up"].grad
    assert gradient is not None
    assert float(gradient[1].abs().max()) == 0 < float(gradient[0].abs().max())


def test_the_balance_term_alone_teaches_the_router() -> None:
    bank = make_bank().train()
    through(bank, draw(20, WIDTH))
    bank.loss().backward()
    assert float(bank.current["router"].grad.abs().max()) > 0


@for_every("share", [0.0, 0.4])
@for_every(("experts", "top_k"), [(1, 1), (4, 1), (4, 3)])
def test_the_derivative_is_that_of_the_function_in_double_precision(
    experts: int, top_k: int, share: float
) -> None:
    bank = make_bank(experts)
    names = list(bank.current)
    tensors = [each.detach().double().requires_grad_() for each in bank.current.values()]
    x_TD, residual_TD = (
        draw(6, WIDTH).double().requires_grad_(),
        draw(6, WIDTH, seed=3).double().requires_grad_(),
    )
    # a tiny temperature makes one gate all: kept mild, so that every path has a gradient
    dropout = SeededDropout(share, 0).train()

    def mixture(*inputs: torch.Tensor) -> Any:
        dropout.reseed(5)
        x_TD, residual_TD, *given = inputs
        current = dict(zip(names, given, strict=True))
        bank = bank_matrices(current, 0.7, dropout.factor, x_TD.dtype)
        y_TD, probabilities_ET, _ = Mixture.apply(
            x_TD, residual_TD, bank.anchor, bank, experts, top_k, dropout
        )
        return y_TD if probabilities_ET is None else (y_TD, probabilities_ET)

    assert torch.autograd.gradcheck(mixture, [x_TD, residual_TD, *tensors])


def test_experts_drop_hidden_units_in_training_as_adaptformer_does() -> None:
    """y = beside + up dropout(relu(down x)), with a tenth left out and the others scaled up."""
    bank, x_TD = make_bank(1), draw(50, WIDTH)
    drawn: list[torch.Tensor] = []

    class Recording(SeededDropout):
        def mask(self, x: torch.Tensor) -> torch.Tensor:
            drawn.append(super().mask(torch.ones_like(x)))
            return x * drawn[-1]

    bank.dropout = [Recording(0.1, 0).train()]
    output = through(bank, x_TD)
    (kept_HT,) = drawn
    hidden_TH = torch.relu(x_TD @ bank.current["down"][0].T) * kept_HT.T / 0.9
    torch.testing.assert_close(output, hidden_TH @ bank.current["up"][0].T, rtol=1e-4, atol=1e-5)
    assert kept_HT.unique().tolist() == [0, 1]


def test_under_autocast_the_output_is_low_and_the_gates_are_not() -> None:
    bank, x_TD = make_bank(), draw(6, WIDTH)
    plain = through(bank, x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        low = through(bank, x_TD.bfloat16())
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    assert all(
        value.grad is not None and value.grad.dtype == torch.float32
        for value in bank.current.values()
    )
    found = route(draw(5, 6).bfloat16(), bank.current["embeddings"].detach(), torch.ones(1, 6))
    assert (found.probabilities_ET.dtype, found.gates_ET.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.1)


# --- in a block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3])
def test_channels_may_come_first_or_last(experts: int) -> None:
    bank, x = make_bank(experts), draw(2, 4, 3, WIDTH)
    last = ParallelToMlp(nn.Identity(), bank, channels_first=False)(x)
    first = ParallelToMlp(nn.Identity(), bank, channels_first=True)(x.movedim(-1, 1))
    torch.testing.assert_close(first.movedim(1, -1), last, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, x + through(bank, x))


def test_a_bank_after_the_mlp_reads_its_output() -> None:
    bank, x = make_bank(3, placement="after_mlp"), draw(2, 5, WIDTH)  # type: ignore[arg-type]
    mlp = nn.Linear(WIDTH, WIDTH)
    torch.testing.assert_close(
        ParallelToMlp(mlp, bank, channels_first=False)(x),
        mlp(x) + through(bank, mlp(x)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_shared_bank_is_registered_by_no_block() -> None:
    assert not list(ParallelToMlp(nn.Identity(), make_bank(), channels_first=False).parameters())
