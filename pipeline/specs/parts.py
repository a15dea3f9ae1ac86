"""The parts of a recipe: what each trains, and at how many bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from pipeline.specs.section import Bits, Spec


class Connections(Spec):
    """GPS: train the `top_k` input connections of each neuron that matter most (arXiv
    2312.10136).
    """

    top_k: int = Field(1, ge=1, le=64)
    bits: Bits = 8


class Biases(Spec):
    """Train all biases and LayerScale's gammas, but no norm's (GPS, arXiv 2312.10136)."""

    bits: Bits = 8


class Norms(Spec):
    """Train norms: each block's second one, before the MLP, or all of the backbone's; scale and
    shift, or the shift alone (BitFit).
    """

    which: Literal["mlp", "all"] = "mlp"
    parameters: Literal["all", "bias"] = "all"
    bits: Bits = 8


class Smoa(Spec):
    """One router and one set of bottleneck experts shared by all blocks (Adapter-X, arXiv
    2406.03051).

    parallel: beside the MLP, on its normalised input (AdaptFormer-X). after_mlp: on the MLP's
    output (Adapter-X). A token is split into `heads` sub-tokens, each sent to its own `top_k`
    experts. `prompt_generator` appends one token a block, made of the bank's mean output (ViT).
    """

    experts: int = Field(4, ge=1, le=64)
    width: int = Field(8, ge=1, le=1024)
    bits: Bits = 4
    placement: Literal["parallel", "after_mlp"] = "parallel"
    heads: int = Field(1, ge=1, le=64)
    top_k: int = Field(1, ge=1, le=64)
    router_width: int = Field(8, ge=1, le=256)
    temperature: float = Field(0.1, gt=0)
    balance_weight: float = Field(0.01, ge=0)
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    prompt_generator: bool = False

    @model_validator(mode="after")
    def _has_enough_experts(self) -> Smoa:
        if self.top_k > self.experts:
            raise ValueError(
                f"given {self.top_k} experts a sub-token (top_k) of a bank of {self.experts};"
                " expected at most as many as there are"
            )
        return self


class Adapter(Spec):
    """A bottleneck `scale * up(dropout(relu(down(x))))`, without biases, in every block.

    parallel: beside the MLP, on the un-normalised residual stream (AdaptFormer, arXiv 2205.13535).
    after_mlp, after_attention, after_both: on the output of the sublayer, before it is added to the
    stream (Pfeiffer, arXiv 2005.00247; Houlsby, arXiv 1902.00751).
    """

    width: int = Field(8, ge=1, le=1024)
    placement: Literal["parallel", "after_mlp", "after_attention", "after_both"] = "parallel"
    bits: Bits = 4
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Lora(Spec):
    """A low-rank change `scale * up(dropout(down(x)))` of chosen projections (LoRA, arXiv
    2106.09685).

    A target is the last name of a Linear or 1x1 convolution (qkv, proj, fc1, fc2); q, k and v are
    the thirds of a fused qkv.
    """

    rank: int = Field(8, ge=1, le=1024)
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q", "v")
    bits: Bits = 4
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @field_validator("targets")
    @classmethod
    def _name_rows_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("a target is written twice; each is changed once")
        if "qkv" in targets and {"q", "k", "v"} & set(targets):
            raise ValueError("qkv holds q, k and v; name either the whole or its thirds")
        return targets


class Fact(Spec):
    """The changes of all layers as one tensor train (FacT-TT, arXiv 2212.03145).

    Two factors are shared by all layers of one width, and each layer has a core of `rank` by `rank`
    per piece. A target is the last name of a Linear layer.
    """

    rank: int = Field(8, ge=1, le=1024)
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("qkv", "proj", "fc1", "fc2")
    bits: Bits = 4
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Dtl(Spec):
    """Low-rank maps of what each block reads, summed over the blocks; the sum passes `x *
    sigmoid(beta * x)` and is added to what later blocks return (DTL, arXiv 2312.07856).

    `feed_from` is the first block that it is added to, counted from 0; by default, the second half.
    """

    rank: int = Field(2, ge=1, le=1024)
    bits: Bits = 4
    beta: float = Field(100.0, gt=0)
    feed_from: int | None = Field(None, ge=0)
    scale: float = Field(1.0, gt=0)


class Ssf(Spec):
    """Scale and shift the output of every layer and norm (SSF, arXiv 2210.08823)."""

    bits: Bits = 8


class Prompts(Spec):
    """Extra tokens, appended before the first block or, where `deep`, replaced before every block
    (VPT, arXiv 2203.12119); ViT only.
    """

    count: int = Field(8, ge=1, le=1024)
    deep: bool = False
    bits: Bits = 8


class ClassToken(Spec):
    """Train the class token, as a change (ViT)."""

    bits: Bits = 8


class Full(Spec):
    """Train every parameter of the backbone, as changes: full fine-tuning, for comparison."""

    bits: Bits = 32


class Decoder(Spec):
    """Train every parameter of the backbone's mask decoder, as changes (SAM; GPS's recipe)."""

    bits: Bits = 8


class Quantiser(Spec):
    """How values below 16 bits are rounded (Binary Adapter, arXiv 2307.16867).

    codebook: levels that minimise the L1 error, each the median of its bin, or the squared error
    (lloyd_max). scales: a mean and a standard deviation for each matrix, or for each of its rows.
    """

    codebook: Literal["median", "lloyd_max"] = "median"
    scales: Literal["matrix", "row"] = "matrix"


class Head(Spec):
    """A linear classifier on the pooled feature, or on each place of a map; weights at `bits`,
    bias at 16, or at 32 if weights have 32.

    `bits: 1, bias: false` is Binary Adapter's Bi-Head.
    """

    bits: Bits = 8
    bias: bool = True
    fuse: int | None = Field(
        None,
        ge=1,
        le=1024,
        description=(
            "of segmentation: a small decoder of this width on four maps of different depths;"
            " default: the last map alone"
        ),
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="size of a fixed subspace that the feature is projected to; default: all of it",
    )
