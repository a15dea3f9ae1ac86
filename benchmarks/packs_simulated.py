"""Packs of ViT-B and ViT-L with simulated selections and random codes: their bytes by part, and how
long one takes to write, open and apply.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm

from pipeline.packs import (
    LayerShape,
    Pack,
    PackBackbone,
    PackInput,
    PackMetadata,
    Part,
    TensorSpec,
    encode_positions,
    ledger,
    pack_to_bytes,
    read_pack,
)
from pipeline.serving.resident import ResidentBackbone

VTAB_CLASSES = (100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9)
VITS = {"ViT-B/16": (768, 12, 152), "ViT-L/16": (1024, 24, 296)}  # width, depth, tensors
FINGERPRINT = "8f3a" * 16


def bottleneck_rows() -> list[dict[str, Any]]:
    """1-bit AdaptFormer, h = 32, and a 1-bit head without bias on ViT-B: this file against the
    layout that Binary Adapter published.
    """
    rng = np.random.default_rng(0)
    shapes = [
        (f"blocks.{block}.adapter.{kind}", shape)
        for block in range(12)
        for kind, shape in (("down", (32, 768)), ("up", (768, 32)))
    ]
    rows = []
    for classes in VTAB_CLASSES:
        recipe = {"adapter": {"width": 32, "bits": 1}, "head": {"bits": 1, "bias": False}}
        parts = (
            random_part("adapters", 1, shapes, rng),
            random_part("head", 1, [("head.weight", (classes, 768))], rng),
        )
        pack = Pack(
            metadata(classes, recipe, 152), parts, rng.normal(size=(2, classes)).astype(np.float32)
        )
        spent = ledger(pack)
        published = 24 * (768 * 32 // 8 + 8) + 768 * classes // 8 + 8
        rows.append(
            {
                "classes": classes,
                "file_bytes": sum(spent.values()),
                "published_bytes": published,
                "ledger": spent,
            }
        )
    return rows


def simulated_rows() -> list[dict[str, Any]]:
    """Bytes by part."""
    choices = [(top_k, bits, experts) for top_k in (1, 3) for bits in (1, 4) for experts in (0, 4)]
    return [
        {
            "model": model,
            "K": top_k,
            "bits": bits,
            "experts": experts,
            "ledger": ledger(simulated_pack(model, top_k, bits, experts)),
        }
        for model in VITS
        for top_k, bits, experts in choices
    ]


def time_row() -> dict[str, Any]:
    """Encode, open with all checks of the file, apply and undo: connections of ViT-B at K = 1, on
    one core.
    """
    full = simulated_pack("ViT-B/16", 1, 1, 0)
    kept = tuple(part for part in full.parts if part.name in ("connections", "head"))

    def encode() -> bytes:
        return pack_to_bytes(
            Pack(full.metadata, tuple(Part(**vars_of(part)) for part in kept), full.probe_logits)
        )

    data = encode()
    carrier = ResidentBackbone(timm.create_model("vit_base_patch16_224", pretrained=False))
    opened = read_pack(data)

    def open_and_apply() -> None:
        carrier.apply(read_pack(data))

    def apply_and_undo() -> None:
        carrier.apply(opened)
        carrier.undo()

    return {
        "bytes": len(data),
        "encode_s": median_seconds(encode),
        "open_s": median_seconds(lambda: read_pack(data)),
        "open_and_apply_s": median_seconds(open_and_apply),
        "apply_s": median_seconds(functools.partial(carrier.apply, opened)),
        "apply_and_undo_s": median_seconds(apply_and_undo),
    }


def simulated_pack(
    model: str, top_k: int, bits: int, experts: int, classes: int = 100, bias_bits: int = 8
) -> Pack:
    """Connections, biases, an SMoA bank of width 8, and a head at the bits of connections."""
    width, depth, tensors = VITS[model]
    rng = np.random.default_rng(1)
    names, places, layers = simulated_selection(width, depth, top_k)
    shapes = [(name, (len(each),)) for name, each in zip(names, places, strict=True)]
    parts = [
        random_part("connections", bits, shapes, rng, positions=tuple(places), layers=tuple(layers))
    ]
    parts[0].__dict__["encoded_positions"] = coded_selection(
        width, depth, top_k
    )  # the same for all widths of the values
    parts.append(
        random_part(
            "biases",
            bias_bits,
            [(name, (rows,)) for name, (rows, _) in zip(names, layers, strict=True)],
            rng,
        )
    )
    if experts:
        bank = [
            ("down", (experts, 8, width)),
            ("up", (experts, width, 8)),
            ("router", (8, width)),
            ("embeddings", (experts, 8)),
        ]
        parts.append(
            random_part(
                "adapters", bits, [(f"smoa.{width}.{name}", shape) for name, shape in bank], rng
            )
        )
    parts.append(random_part("head", bits, [("head.weight", (classes, width))], rng))
    parts.append(random_part("head", 16, [("head.bias", (classes,))], rng))
    recipe = {
        "connections": {"top_k": top_k, "bits": bits},
        "biases": {"bits": bias_bits},
        "head": {"bits": bits},
    }
    return Pack(
        metadata(classes, recipe, tensors),
        tuple(parts),
        rng.normal(size=(2, classes)).astype(np.float32),
    )


@functools.cache
def coded_selection(width: int, depth: int, top_k: int) -> bytes:
    """Its positions, coded."""
    _, places, layers = simulated_selection(width, depth, top_k)
    return encode_positions(
        places, [LayerShape(*layer, len(each)) for layer, each in zip(layers, places, strict=True)]
    )


@functools.cache
def simulated_selection(
    width: int, depth: int, top_k: int
) -> tuple[list[str], list[np.ndarray], list[tuple[int, int]]]:
    """Connections of a ViT whose columns are as popular as those measured on the embedded one:
    Zipf's law within each head or layer.
    """
    rng = np.random.default_rng(0)
    stream = rng.permutation(width)
    names, places, layers = [], [], []

    def add(
        name: str,
        rows: int,
        columns: int,
        skew: float,
        *,
        head_rows: int = 0,
        favourites: np.ndarray | None = None,
    ) -> None:
        chosen = []
        for start in range(0, rows, head_rows or rows):
            here = min(head_rows or rows, rows - start)
            order = (
                rng.permutation(columns)
                if favourites is None
                else np.concatenate([rng.permutation(favourites[:40]), favourites[40:]])
            )
            noise = rng.gumbel(size=(here, columns)) - skew * np.log1p(np.arange(columns))
            best_RK = order[np.argpartition(-noise, top_k, axis=1)[:, :top_k]]
            chosen.append(((start + np.arange(here))[:, None] * columns + best_RK).ravel())
        names.append(name)
        places.append(np.sort(np.concatenate(chosen)))
        layers.append((rows, columns))

    add("patch_embed.proj", width, 768, 1.0)
    for block in range(depth):
        add(f"blocks.{block}.attn.qkv", 3 * width, width, 2.0, head_rows=64, favourites=stream)
        add(f"blocks.{block}.attn.proj", width, width, 1.7)
        add(f"blocks.{block}.mlp.fc1", 4 * width, width, 1.8, favourites=stream)
        add(f"blocks.{block}.mlp.fc2", width, 4 * width, 1.8)
    return names, places, layers


def metadata(classes: int, recipe: dict[str, Any], tensors: int) -> PackMetadata:
    """As a real pack of such a recipe has it."""
    return PackMetadata(
        task="vtab",
        classes=[str(number) for number in range(classes)],
        metric="accuracy",
        input=PackInput(
            size_px=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic"
        ),
        recipe=recipe,
        backbone=PackBackbone(
            model="vit_base_patch16_224.augreg_in21k",
            arguments={},
            fingerprint=FINGERPRINT,
            trail=np.random.default_rng(0).bytes(tensors).hex(),
        ),
        seed=0,
    )


def random_part(
    name: Any,
    bits: Any,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    rng: np.random.Generator,
    **positions: Any,
) -> Part:
    """A part of random codes."""
    specs = tuple(TensorSpec(*tensor) for tensor in tensors)
    count, groups = (
        sum(spec.count for spec in specs),
        sum(spec.groups(by_row=False) for spec in specs),
    )
    if bits <= 8:
        has_mean = name != "connections" or bits > 1
        scales = np.abs(rng.normal(size=(groups, 2))).astype(np.float16).astype(np.float32) * [
            has_mean,
            True,
        ]
        codes = rng.integers(0, 2**bits, count).astype(np.uint8)
        return Part(
            name, bits, specs, codes, scales.astype(np.float32), has_mean=has_mean, **positions
        )
    return Part(
        name,
        bits,
        specs,
        rng.normal(size=count).astype(np.float16 if bits == 16 else np.float32),
        **positions,
    )


def median_seconds(action: Callable[[], Any], times: int = 7) -> float:
    """Median of some runs, after one that is not counted."""
    action()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def vars_of(part: Part) -> dict[str, Any]:
    """A part's fields without its cached results, so that encoding is timed in full."""
    return {
        name: getattr(part, name)
        for name in (
            "name",
            "bits",
            "tensors",
            "codes",
            "scales",
            "positions",
            "layers",
            "recomputed",
            "has_mean",
        )
    }
