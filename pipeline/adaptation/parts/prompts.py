"""Tokens that train: visual prompts, the class token, and prompts made by Adapter-X's generator. For timm's VisionTransformer.

    VPT, shallow (arXiv 2203.12119)     P tokens are appended to the first block's input
    VPT, deep                           every block gets P tokens of its own in place of the last block's
    class token                         its change is added to the token, before the norm that some networks have there (CLIP)
    generator (arXiv 2406.03051)        scale * mean_tokens(bank's output) + shift: one token a block, appended for the next; they accumulate

Blocks see a set of tokens (positions are added before the first one), so where they are appended does not matter. What was appended is cut off behind
the last block: a pooled feature is over the tokens that the backbone pools. Shapes: B images, T tokens, P prompts, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.adaptation.tensors import PlannedTensor
from pipeline.errors import BackboneError
from pipeline.specs import Bits, ClassToken, Prompts


def token_blocks(model: nn.Module, part: str) -> list[nn.Module]:
    """The blocks that pass tokens [B, T, D] on. Raises BackboneError for a network that is no VisionTransformer."""
    if not isinstance(model, VisionTransformer):
        raise BackboneError(
            f"recipe.{part}: given {type(model).__name__}; expected a VisionTransformer, whose blocks take a set of tokens; leave this part out"
        )
    return list(model.blocks)


def _append(x_BTD: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([x_BTD, tokens.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)], dim=1)


class AppendedPrompts(nn.Module):
    """VPT's tokens. `current` holds, by the block's number, the tokens [P, D] of this forward pass."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.current: dict[str, torch.Tensor] = {}

    def enter(self, number: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of block `number`."""
        kept_BTD = inputs[0] if number == 0 else inputs[0][:, : -self.count]
        return (_append(kept_BTD, self.current[str(number)]), *inputs[1:])

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
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
    """Adapter-X's generator behind one block. `current` holds the changes `scale` [D] (of a scale of 1) and `shift` [D] of this forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}
        self._mean_BD: torch.Tensor | None = None

    def note(self, bank_output_BTD: torch.Tensor) -> None:
        """Take what the bank gave in this block."""
        self._mean_BD = bank_output_BTD.float().mean(dim=1)

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook of the block."""
        mean_BD, self._mean_BD = self._mean_BD, None
        assert mean_BD is not None, "the block ran without its bank"
        return _append(output, torch.addcmul(self.current["shift"], mean_BD, 1 + self.current["scale"])[:, None])


def plan_prompts(model: nn.Module, spec: Prompts) -> list[PlannedTensor]:
    """The tokens of the first block, or of all. Raises BackboneError as `token_blocks`."""
    blocks = token_blocks(model, "prompts")
    shape = (spec.count, int(model.embed_dim))  # type: ignore[arg-type]
    return [PlannedTensor("prompts", f"prompts.{number}", shape, spec.bits, start="fan_in") for number in range(len(blocks) if spec.deep else 1)]


def attach_prompts(model: nn.Module, spec: Prompts) -> dict[str, AppendedPrompts]:
    """Hook the prompts into the blocks."""
    blocks, prompts = token_blocks(model, "prompts"), AppendedPrompts(spec.count)
    for number, block in enumerate(blocks if spec.deep else blocks[:1]):
        block.register_forward_pre_hook(partial(prompts.enter, number))
    blocks[-1].register_forward_hook(prompts.leave)
    return {"prompts": prompts}


def plan_class_token(model: nn.Module, spec: ClassToken) -> list[PlannedTensor]:
    """One token's change. Raises BackboneError as `token_blocks`, and where there is no class token."""
    token_blocks(model, "class_token")
    if model.cls_token is None:
        raise BackboneError(f"recipe.class_token: this {type(model).__name__} has no class token; leave this part out")
    return [PlannedTensor("prompts", "class_token.change", (1, int(model.embed_dim)), spec.bits)]  # type: ignore[arg-type]


def attach_class_token(model: nn.Module) -> dict[str, ChangedClassToken]:
    """Hook the change in where the class token has its position."""
    token = ChangedClassToken()
    assert isinstance(model, VisionTransformer), "planned first"
    model.norm_pre.register_forward_pre_hook(token.enter)
    return {"class_token": token}


def _generating(model: nn.Module) -> list[str]:
    """The blocks whose prompt another block reads."""
    return [f"blocks.{number}" for number in range(len(token_blocks(model, "smoa.prompt_generator")) - 1)]


def plan_generator(model: nn.Module, bits: Bits) -> list[PlannedTensor]:
    """A scale and a shift for every block but the last. Raises BackboneError as `token_blocks`."""
    width = int(model.embed_dim) if _generating(model) else 0  # type: ignore[arg-type]
    return [PlannedTensor("prompts", f"generator.{block}.{key}", (width,), bits) for block in _generating(model) for key in ("scale", "shift")]


def attach_generator(model: nn.Module) -> dict[str, GeneratedPrompt]:
    """Hook a generator behind every block but the last, by block; the caller tells each what its block's bank gave."""
    names = _generating(model)
    generators = {f"generator.{name}": GeneratedPrompt() for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(generators[f"generator.{name}"].leave)
    token_blocks(model, "smoa.prompt_generator")[-1].register_forward_hook(lambda module, inputs, output: output[:, : output.shape[1] - len(names)])
    return generators
