"""A recipe: which parts train and how, and which parts go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pipeline.specs.parts import (
    Adapter,
    Biases,
    ClassToken,
    Connections,
    Decoder,
    Dtl,
    Fact,
    Full,
    Head,
    Lora,
    Norms,
    Prompts,
    Quantiser,
    Smoa,
    Ssf,
)
from pipeline.specs.section import Spec
from pipeline.specs.training import Training


class Recipe(Spec):
    """How a task is adapted and trained. A part left out is off; the head is always there.

    `preset: default` starts from the default recipe's parts, which the other keys replace or, with
    null, switch off; `preset: linear` trains the head alone.
    """

    preset: tuple[str, ...] | None = Field(
        None,
        description=(
            "`default` or `linear`. Stored as the parts that it added or that the default search"
            " space tries; these are dropped on a backbone that cannot take them"
        ),
    )
    connections: Connections | None = None
    biases: Biases | None = None
    smoa: Smoa | None = None
    norms: Norms | None = None
    adapter: Adapter | None = None
    lora: Lora | None = None
    fact: Fact | None = None
    dtl: Dtl | None = None
    ssf: Ssf | None = None
    prompts: Prompts | None = None
    class_token: ClassToken | None = None
    decoder: Decoder | None = None
    full: Full | None = None
    from_block: int | None = Field(
        None,
        ge=0,
        description=(
            "the first block to change, counted from 0; the blocks before it stay as they are, and"
            " their outputs are computed once per image"
        ),
    )
    quantiser: Quantiser | None = Field(
        None, description="default: that of the paper, `median` and `matrix`"
    )
    head: Head = Head()
    training: Training = Training()

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, content: Any) -> Any:
        """Add the parts of the named preset, except those that are given."""
        if not isinstance(content, Mapping) or not isinstance(content.get("preset"), str):
            return content
        named = [part for part in PARTS if content.get(part) is not None]
        if content["preset"] == "default":
            brought = {part: spec for part, spec in DEFAULT_PARTS.items() if part not in content}
            offered = [part for part in (*DEFAULT_PARTS, *OFFERED_PARTS) if part not in content]
            return {"head": DEFAULT_HEAD, **content, **brought, "preset": tuple(offered)}
        if content["preset"] != "linear":
            raise ValueError(f"preset: given {content['preset']!r}; expected default or linear")
        if named:
            raise ValueError(
                f"preset: linear trains the head alone, given {' and '.join(named)} too; leave out"
                " one or the other"
            )
        return {**content, "preset": None}

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        conflict = slot_conflict(self)
        if conflict is not None:
            raise ValueError(conflict)
        trained = [getattr(self, name) for name in (*PARTS, "head")]
        if self.quantiser is not None and all(
            part.bits >= 16 for part in trained if part is not None
        ):
            raise ValueError(
                "quantiser would change nothing: no part has fewer than 16 bits; leave it out, or"
                " lower some bits"
            )
        return self


def slot_conflict(recipe: Recipe) -> str | None:
    """Return a message if two parts conflict, else None."""
    smoa, adapter = recipe.smoa, recipe.adapter
    others = [name for name in PARTS if name != "full" and getattr(recipe, name) is not None]
    if recipe.full is not None and others:
        return (
            f"full trains everything that {' and '.join(others)} would change; leave out one or the"
            " other"
        )
    if recipe.full is not None and recipe.training.recompute:
        return (
            "full trains the blocks that training.recompute computes again; leave out one or the"
            " other"
        )
    if smoa is not None and adapter is not None and smoa.placement in _PLACES[adapter.placement]:
        where = "in parallel to the MLP" if smoa.placement == "parallel" else "after the MLP"
        return f"smoa and adapter are both {where}; leave one out, or place one elsewhere"
    if recipe.ssf is not None and (recipe.biases is not None or recipe.norms is not None):
        return (
            "ssf scales and shifts what biases and norms would change; leave out one or the other"
        )
    if recipe.lora is not None and recipe.fact is not None:
        return "lora and fact both change the weights of whole layers; leave out one or the other"
    if recipe.prompts is not None and smoa is not None and smoa.prompt_generator:
        return "prompts and smoa.prompt_generator both append tokens; leave out one or the other"
    if recipe.dtl is not None and smoa is not None and smoa.prompt_generator:
        return (
            "dtl sums over blocks of equally many tokens, and smoa.prompt_generator appends one a"
            " block; leave out one or the other"
        )
    if recipe.from_block and recipe.head.fuse is not None:
        return "head.fuse reads maps of blocks before from_block; leave out one or the other"
    before = [name for name in ("prompts", "class_token") if getattr(recipe, name) is not None]
    before += ["smoa.prompt_generator"] if smoa is not None and smoa.prompt_generator else []
    if recipe.from_block and before:
        return f"{before[0]} changes what the first block reads; leave out that or from_block"
    return None


_PLACES = {
    "parallel": ("parallel",),
    "after_mlp": ("after_mlp",),
    "after_attention": (),
    "after_both": ("after_mlp",),
}
PARTS = tuple(
    name
    for name in Recipe.model_fields
    if name not in ("preset", "head", "training", "quantiser", "from_block")
)
"""The optional parts of a recipe."""
ADAPTERS = ("smoa", "adapter", "lora", "fact", "dtl")
"""The parts that the axes adapter_bits, width and scale apply to."""


def part_of_one_bit(name: str) -> Spec:
    """A part of a recipe at 1 bit, its other settings by default."""
    kinds = get_args(Recipe.model_fields[name].annotation)
    (spec,) = (each for each in kinds if issubclass(each, Spec))
    return spec(bits=1)  # type: ignore[no-any-return]


DEFAULT_PARTS: dict[str, Spec] = {
    "connections": Connections(bits=1),
    "biases": Biases(bits=1),
    "smoa": Smoa(bits=1),
    "norms": Norms(which="all", bits=1),
}
DEFAULT_HEAD = Head(bits=2)
OFFERED_PARTS = ("adapter", "lora")
"""Parts that the default search space tries beside or instead of those of the default recipe."""
DEFAULT_RECIPE = Recipe.model_validate({"preset": "default"})


def _names_what_trains(recipe: Any) -> Any:
    """Check that a recipe says what trains, so that nothing is trained or left out by accident."""
    if isinstance(recipe, Mapping) and not recipe.keys() & {"preset", *PARTS}:
        raise ValueError(
            "no part to train is named; add `preset: default` for the default parts or `preset:"
            " linear` for the head alone, or name parts"
        )
    return recipe


WrittenRecipe = Annotated[Recipe, BeforeValidator(_names_what_trains)]


def cools_down(recipe: Recipe) -> Recipe:
    """Check that the warm-up ends before training does. Checked in tasks only, so that packs with
    other recipes can be read.
    """
    training = recipe.training
    if training.warmup_epochs >= training.epochs:
        raise ValueError(
            f"training.warmup_epochs is {training.warmup_epochs:g} and training.epochs is"
            f" {training.epochs}; the learning rate would only rise: expected fewer epochs of"
            " warm-up than epochs"
        )
    return recipe
