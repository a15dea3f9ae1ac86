"""Trained tokens: visual prompts, the class token, and prompts made by Adapter-X's generator. For
timm's VisionTransformer and for point transformers.

    VPT, shallow (arXiv 2203.12119)     P tokens are appended to the first block's input
    VPT, deep                           every block gets its own P tokens, which replace those of
                                        the block before
    class token                         its change is added to the token, before the norm that
                                        some networks have there (CLIP)
    generator (arXiv 2406.03051)        scale * mean_tokens(bank's output) + shift: one token per
                                        block, appended for the next; they accumulate

Blocks see a set of tokens (appended ones have no position), so where they are appended does not
matter. Appended tokens are removed after the last block, so pooling covers the
backbone's own tokens only. Shapes: B images, T tokens, P prompts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.adaptation.part import (
    PARTS,
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    register,
)
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones.point_transformer import PointTransformer
from pipeline.errors import BackboneError
from pipeline.specs import ClassToken, Prompts, Recipe, Smoa

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


TokenNetwork = VisionTransformer | PointTransformer
"""Networks whose blocks pass tokens [B, T, D] on, the class token first."""


def token_blocks(model: nn.Module, part: str) -> list[nn.Module]:
    """The blocks that pass tokens [B, T, D] on. Raises BackboneError for a network that is no
    TokenNetwork.
    """
    if not isinstance(model, TokenNetwork):
        raise BackboneError(
            f"recipe.{part}: given {type(model).__name__}; expected a VisionTransformer, whose"
            " blocks take a set of tokens; leave this part out"
        )
    return list(model.blocks)


def _append(x_BTD: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([x_BTD, tokens.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)], dim=1)


class AppendedPrompts(nn.Module):
    """VPT's tokens. `current` holds, by the block's number, the tokens [P, D] of this forward
    pass.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.current: dict[str, torch.Tensor] = {}

    def enter(self, number: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of block `number`."""
        kept_BTD = inputs[0] if number == 0 else inputs[0][:, : -self.count]
        return (_append(kept_BTD, self.current[str(number)]), *inputs[1:])

    def leave(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of the last block."""
        return output[:, : -self.count]


class ChangedClassToken(nn.Module):
    """`current` holds the `change` [1, D] of the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of what reads the tokens."""
        x_BTD: torch.Tensor = inputs[0]
        change_1D = self.current["change"].to(x_BTD.dtype)
        return (torch.cat([x_BTD[:, :1] + change_1D, x_BTD[:, 1:]], dim=1), *inputs[1:])


class GeneratedPrompt(nn.Module):
    """Adapter-X's generator behind one block. `current` holds the changes `scale` [D] (of a scale
    of 1) and `shift` [D] of this forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}
        self._mean_BD: torch.Tensor | None = None

    def note(self, bank_output_BTD: torch.Tensor) -> None:
        """Take what the bank gave in this block."""
        self._mean_BD = bank_output_BTD.float().mean(dim=1)

    def leave(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of the block."""
        mean_BD, self._mean_BD = self._mean_BD, None
        assert mean_BD is not None, "the block ran without its bank"
        return _append(
            output,
            torch.addcmul(self.current["shift"], mean_BD, 1 + self.current["scale"])[:, None],
        )


@register
class PromptsPart(Part):
    """VPT's prompts."""

    name, pack_order, stage = "prompts", 9, Stage.TOKENS
    no_weight = "its tokens belong to no layer"

    def plan(self, spec: Prompts, site: Site) -> list[PlannedTensor]:
        """The tokens of the first block, or of all. Raises BackboneError as `token_blocks`."""
        blocks = token_blocks(site.model, self.name)
        shape = (spec.count, _width(site.model))
        return [
            PlannedTensor("prompts", f"prompts.{number}", shape, spec.bits, start="fan_in")
            for number in range(len(blocks) if spec.deep else 1)
        ]

    def attach(self, spec: Prompts, assembly: Assembly) -> None:
        """Hook the prompts into the blocks."""
        blocks = token_blocks(assembly.model, self.name)
        prompts = assembly.modules["prompts"] = AppendedPrompts(spec.count)
        for number, block in enumerate(blocks if spec.deep else blocks[:1]):
            block.register_forward_pre_hook(partial(prompts.enter, number))
        blocks[-1].register_forward_hook(prompts.leave)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Hook into all blocks of a VisionTransformer: packs with as many tokens pass together."""
        if not isinstance(network.model, TokenNetwork):
            return Mixing.APART
        for number, block in enumerate(network.model.blocks):
            block.register_forward_pre_hook(partial(_enter_mixed, network, number))
        network.model.blocks[-1].register_forward_hook(partial(_leave_mixed, network))
        return Mixing.ALIKE


def _enter_mixed(
    network: SharedNetwork, number: int, module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Pre-hook of block `number`: append each sample's tokens."""
    x_BTD = inputs[0]
    for lane in network.lanes(PARTS[PromptsPart.name]):
        if lane.has(f"prompts.{number}"):
            kept_BTD = x_BTD if number == 0 else x_BTD[:, : -lane.spec.count]
            x_BTD = torch.cat([kept_BTD, lane.values(f"prompts.{number}").to(x_BTD.dtype)], dim=1)
    return (x_BTD, *inputs[1:])


def _leave_mixed(
    network: SharedNetwork, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    """Hook of the last block."""
    for lane in network.lanes(PARTS[PromptsPart.name]):
        output = output[:, : -lane.spec.count]
    return output


@register
class ClassTokenPart(Part):
    """The class token, as a change."""

    name, pack_order, stage = "class_token", 10, Stage.TOKENS

    def plan(self, spec: ClassToken, site: Site) -> list[PlannedTensor]:
        """One token. Raises BackboneError as `token_blocks`, and where there is no class token."""
        token_blocks(site.model, self.name)
        if site.model.cls_token is None:
            raise BackboneError(
                f"recipe.class_token: this {type(site.model).__name__} has no class token; leave"
                " this part out"
            )
        return [PlannedTensor("prompts", "class_token.change", (1, _width(site.model)), spec.bits)]

    def attach(self, spec: ClassToken, assembly: Assembly) -> None:
        """Hook the change in where the class token has its position."""
        token = assembly.modules["class_token"] = ChangedClassToken()
        assert isinstance(assembly.model, TokenNetwork), "planned first"
        assembly.model.norm_pre.register_forward_pre_hook(token.enter)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Hook into what reads a VisionTransformer's tokens."""
        if not isinstance(network.model, TokenNetwork):
            return Mixing.APART
        network.model.norm_pre.register_forward_pre_hook(partial(self._enter_mixed, network))
        return Mixing.FREELY

    def _enter_mixed(
        self, network: SharedNetwork, module: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        x_BTD = inputs[0]
        for lane in network.lanes(self):
            change_S1D = lane.values("class_token.change")
            x_BTD = lane.change(
                x_BTD, lambda x, change=change_S1D: torch.cat([x[:, :1] + change, x[:, 1:]], dim=1)
            )
        return (x_BTD, *inputs[1:])

    def write(self, state: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """Add the change to the token."""
        if "class_token.change" in values:
            state["cls_token"] = state["cls_token"] + values["class_token.change"]


@register
class GeneratorPart(Part):
    """Adapter-X's prompt generator: a scale and a shift behind every block but the last."""

    name, pack_order, stage = "smoa.prompt_generator", 11, Stage.TOKENS
    needs = "it needs two blocks or more"

    def spec(self, recipe: Recipe) -> Smoa | None:
        """The bank's section, where it asks for a generator."""
        return recipe.smoa if recipe.smoa is not None and recipe.smoa.prompt_generator else None

    def plan(self, spec: Smoa, site: Site) -> list[PlannedTensor]:
        """Two vectors per block. Raises BackboneError as `token_blocks`."""
        return [
            PlannedTensor("prompts", f"generator.{block}.{key}", (_width(site.model),), spec.bits)
            for block in _generating(site.model)
            for key in ("scale", "shift")
        ]

    def attach(self, spec: Smoa, assembly: Assembly) -> None:
        """Hook in the generators, each of which receives the bank's output in its block."""
        names = _generating(assembly.model)
        for name in names:
            generator = assembly.modules[f"generator.{name}"] = GeneratedPrompt()
            assembly.model.get_submodule(name).register_forward_hook(generator.leave)
        last = token_blocks(assembly.model, self.name)[-1]
        last.register_forward_hook(
            lambda module, inputs, output: output[:, : output.shape[1] - len(names)]
        )

    def mix(self, network: SharedNetwork) -> Mixing:
        """Hook into the blocks of a VisionTransformer; its packs have the same tokens."""
        if not isinstance(network.model, TokenNetwork):
            return Mixing.APART
        for name in _generating(network.model):
            append = partial(self._append_mixed, network, name)
            network.after(
                self, f"generator.{name}.scale", network.model.get_submodule(name), append
            )
        network.model.blocks[-1].register_forward_hook(partial(self._leave_mixed, network))
        return Mixing.ALIKE

    def _append_mixed(
        self, network: SharedNetwork, name: str, lane: Lane, y: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        scale_SD, shift_SD = (lane.values(f"generator.{name}.{key}") for key in ("scale", "shift"))
        token_SD = torch.addcmul(shift_SD, network.noted.pop(name), 1 + scale_SD)
        return torch.cat([y, token_SD[:, None].to(y.dtype)], dim=1)

    def _leave_mixed(
        self,
        network: SharedNetwork,
        module: nn.Module,
        inputs: tuple[Any, ...],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Hook of the last block."""
        if not network.lanes(self):
            return output
        return output[:, : output.shape[1] - len(_generating(network.model))]


def _generating(model: nn.Module) -> list[str]:
    """The blocks whose prompt another block reads."""
    blocks = token_blocks(model, GeneratorPart.name)
    return [f"blocks.{number}" for number in range(len(blocks) - 1)]


def _width(model: nn.Module) -> int:
    return int(model.embed_dim)  # type: ignore[arg-type]
