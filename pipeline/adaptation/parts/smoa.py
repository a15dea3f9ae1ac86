"""SMoA, the sharing mixture of adapters: one router and one set of experts serve every block
(Adapter-X, arXiv 2406.03051).

    p = softmax(cos(R x, e) / temperature)        R: projection to a few dimensions, e: expert
                                                  embeddings (X-MoE, arXiv 2204.09179)
    y = scale * p[c] * up_c(dropout(relu(down_c(x))))    c = argmax p, chosen per token; if
                                                         top_k > 1, the sum over the best

A token of width D is split into `heads` sub-tokens of D / heads, each routed by itself, and their
outputs are joined again.

The load-balance term is Switch's (arXiv 2101.03961): E * sum_e f_e P_e, f the fraction of tokens
routed to e, P the mean probability of e; it is 1 when the load is even. How it is computed is in
mixture.py. Shapes: T sub-tokens, D their width, R router width, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.adaptation.blocks import MlpSlot
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.part import (
    MLP_BLOCKS,
    Assembly,
    AuxiliaryTerm,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    register,
)
from pipeline.adaptation.parts.mixture import (
    BankMatrices,
    MixedBanks,
    Mixture,
    bank_matrices,
    mixed_banks,
    mixed_hidden,
)
from pipeline.adaptation.parts.prompts import GeneratedPrompt
from pipeline.adaptation.recompute import is_recomputing, outside_blocks
from pipeline.adaptation.tensors import PlannedTensor, Start
from pipeline.adaptation.wrapper import Wrapper
from pipeline.errors import BackboneError
from pipeline.specs import Recipe, Smoa
from pipeline.utils.devices import dtype_of_products

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


def bank_shapes(width: int, spec: Smoa) -> dict[str, tuple[int, ...]]:
    """Shapes of a bank's tensors for sub-tokens of `width`; a single expert needs no router."""
    shapes: dict[str, tuple[int, ...]] = {
        "down": (spec.experts, spec.width, width),
        "up": (spec.experts, width, spec.width),
    }
    if spec.experts > 1:
        shapes |= {
            "router": (spec.router_width, width),
            "embeddings": (spec.experts, spec.router_width),
        }
    return shapes


BANK_STARTS: dict[str, Start] = {
    "down": "linear",
    "up": "near_zero",
    "router": "fan_in",
    "embeddings": "unit",
}


class SmoaBank(AuxiliaryTerm):
    """The experts and the router for blocks of one width. `current` holds the tensors of this
    forward pass, shared by all blocks, `routed` the probabilities and the gates [E, T] of those
    passed in training.

    `expert_load` counts the tokens each expert was given in training, up to the last pass whose
    loss was computed.
    """

    expert_load: torch.Tensor

    def __init__(self, spec: Smoa, dropout: SeededDropout) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = [dropout]  # in a list: its mode is set in one place, for all banks
        self.current: dict[str, torch.Tensor] = {}
        self.routed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._matrices: BankMatrices | None = None
        self.register_buffer(
            "expert_load", torch.zeros(spec.experts, dtype=torch.long), persistent=False
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The bank's output for tokens [..., heads * D], added to `residual` of the same shape."""
        width = self.current["down"].shape[-1]
        with torch.autocast(x.device.type, enabled=False):  # the function chooses its own types
            if self._matrices is None or self._matrices.rows.dtype != x.dtype:
                up_factor = self.spec.scale * self.dropout[0].factor
                with outside_blocks():
                    self._matrices = bank_matrices(
                        self.current, self.spec.temperature, up_factor, x.dtype
                    )
            y_TD, probabilities_ET, gates_ET = Mixture.apply(
                x.reshape(-1, width),
                residual.reshape(-1, width),
                self._matrices.anchor,
                self._matrices,
                self.spec.experts,
                self.spec.top_k,
                self.dropout[0],
            )
        if self.training and probabilities_ET is not None and not is_recomputing():
            self.routed.append((probabilities_ET, gates_ET))
        return y_TD.view(x.shape)

    def begin_pass(self) -> None:
        """Forget the last forward pass."""
        self.routed.clear()
        self._matrices = None

    def loss(self) -> torch.Tensor:
        """The weighted load-balance term of the last forward pass, whose tokens are counted."""
        if not self.routed:
            return torch.zeros(())
        sums = []
        for blocks in _of_one_length(self.routed):
            probabilities_BET = torch.stack([probabilities_ET for probabilities_ET, _ in blocks])
            count_BE = (torch.stack([gates_ET for _, gates_ET in blocks]) > 0).sum(dim=2)
            tokens = probabilities_BET.shape[2]
            # Of a token, top_k are counted: f_e is count_e / (top_k * tokens).
            weight_BE = count_BE * (self._balance_factor / (self.spec.top_k * tokens**2))
            sums.append((weight_BE * probabilities_BET.sum(dim=2)).sum())
            self.expert_load += count_BE.sum(dim=0)
        return functools.reduce(torch.add, sums)

    @property
    def _balance_factor(self) -> float:
        """Of the sum over blocks of sum_e f_e P_e."""
        return self.spec.balance_weight * self.spec.experts / len(self.routed)

    def remark(self, total: Callable[[int], int]) -> str:
        """Message about experts that received no token during training."""
        load = [total(tokens) for tokens in self.expert_load.tolist()]
        if not sum(load) or 0 not in load:
            return ""
        return (
            f"{load.count(0)} of {len(load)} experts were never used "
            f"(tokens: {', '.join(map(str, load))}); "
            "try fewer experts, or a larger smoa.balance_weight"
        )


def _of_one_length(
    routed: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Blocks with equally many tokens, together."""
    groups: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for block in routed:
        groups.setdefault(block[0].shape[1], []).append(block)
    return list(groups.values())


class ParallelToMlp(Wrapper):
    """A block's MLP with the shared bank: both read the second norm's output, or the bank reads the
    MLP's; their outputs are summed.

    Where a backbone scales its MLP branch (LayerScale, ConvNeXt's gamma), the bank's output is
    scaled with it.

    Args:
        generator: receives the bank's output in every pass.
    """

    def __init__(
        self,
        mlp: nn.Module,
        bank: SmoaBank,
        channels_first: bool,
        generator: GeneratedPrompt | None = None,
    ) -> None:
        super().__init__(mlp)
        self.bank = [bank]  # in a list: the bank is registered once, not once per block
        self.channels_first = channels_first
        self.generator = [generator]

    def forward(self, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        x = x.to(dtype_of_products(x))  # once for both, which would each do it
        y = self.base(x, *arguments, **named)
        if self.bank[0].spec.placement == "after_mlp":
            x = y
        if self.channels_first:
            return self._add_bank(x.movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1)
        return self._add_bank(x, y)

    def _add_bank(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.generator[0] is None:
            return self.bank[0](x, residual)
        output = self.bank[0](x, torch.zeros_like(residual))
        self.generator[0].note(output)
        return residual + output


@register
class SmoaPart(Part):
    """One bank per width, shared by all blocks of that width."""

    name, pack_order, stage = "smoa", 4, Stage.MLPS
    needs, no_weight = MLP_BLOCKS, "each token chooses its experts"

    def plan(self, spec: Smoa, site: Site) -> list[PlannedTensor]:
        """The tensors of each bank. Raises BackboneError where `heads` does not divide a width."""
        planned = []
        for width in _widths(site):
            if width % spec.heads:
                divisors = ", ".join(str(heads) for heads in range(1, 65) if width % heads == 0)
                raise BackboneError(
                    f"recipe.smoa.heads: given {spec.heads}, which does not divide a block's width"
                    f" of {width}; choose one of {divisors}"
                )
            planned += [
                PlannedTensor(
                    "adapters", f"smoa.{width}.{name}", shape, spec.bits, start=BANK_STARTS[name]
                )
                for name, shape in bank_shapes(width // spec.heads, spec).items()
            ]
        return planned

    def attach(self, spec: Smoa, assembly: Assembly) -> None:
        """Attach the bank of its width to every MLP."""
        dropout = assembly.dropout("smoa", spec.dropout)
        banks = {width: SmoaBank(spec, dropout) for width in _widths(assembly.site)}
        for slot in assembly.site.slots:
            name, generator = f"{slot.block}.mlp", assembly.modules.get(f"generator.{slot.block}")
            assert generator is None or isinstance(generator, GeneratedPrompt)
            mlp = assembly.model.get_submodule(name)
            parallel = ParallelToMlp(mlp, banks[slot.width], slot.channels_first, generator)
            assembly.model.set_submodule(name, parallel)
        assembly.modules |= {f"smoa.{width}": bank for width, bank in banks.items()}

    def mix(self, network: SharedNetwork) -> Mixing:
        """Add the banks' outputs to those of the MLPs; a generator is told its block's."""

        @functools.cache
        def blocks(from_block: int) -> set[str]:
            site = Site(network.site.backbone, Recipe(from_block=from_block))
            return {slot.block for slot in site.slots}

        for slot in network.site.slots:
            mlp = network.model.get_submodule(f"{slot.block}.mlp")
            add = partial(_add, network, slot, blocks)
            network.after(self, f"smoa.{slot.width}.down", mlp, add)
        return Mixing.FREELY


def _add(
    network: SharedNetwork,
    slot: MlpSlot,
    blocks: Callable[[int], set[str]],
    lane: Lane,
    y: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    """An MLP's output with the bank's, unless the pack leaves its block as it is. `blocks` says
    which blocks change from a first one on.
    """
    if lane.from_block and slot.block not in blocks(lane.from_block):
        return y
    spec, dtype = lane.spec, dtype_of_products(x)
    x = y if spec.placement == "after_mlp" else x
    tokens = (x.movedim(1, -1) if slot.channels_first else x).to(dtype)
    with torch.autocast(x.device.type, enabled=False):  # which experts are chosen is float32
        banks = lane.once(slot.width, partial(_banks, lane, slot.width, dtype))
        x_STD = tokens.reshape(len(banks.up_SXD), -1, banks.up_SXD.shape[-1])
        hidden_STX = mixed_hidden(x_STD.mT, banks, spec.top_k).mT
        if not slot.channels_first and not spec.prompt_generator:
            into = y.to(dtype).reshape(x_STD.shape)
            return into.baddbmm_(hidden_STX, banks.up_SXD).view(y.shape)
        output = (hidden_STX @ banks.up_SXD).view(tokens.shape)
    if spec.prompt_generator:
        network.noted[slot.block] = output.float().mean(dim=1)
    return y + (output.movedim(-1, 1) if slot.channels_first else output)


def _banks(lane: Lane, width: int, dtype: torch.dtype) -> MixedBanks:
    names = {key: f"smoa.{width}.{key}" for key in BANK_STARTS}
    current = {key: lane.values(name) for key, name in names.items() if lane.has(name)}
    return mixed_banks(current, lane.spec.temperature, lane.spec.scale, dtype)


def _widths(site: Site) -> list[int]:
    """The widths of the blocks, ascending."""
    return sorted({slot.width for slot in site.slots})
