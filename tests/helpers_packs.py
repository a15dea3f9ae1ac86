"""Small packs with every kind of part, and when two packs are the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.packs import Pack, PackInput, PackMetadata, Part, TensorSpec, zero_part

LAYERS = (
    (TensorSpec("blocks.0.attn.qkv", (18,)), (9, 16)),
    (TensorSpec("blocks.0.mlp.fc1", (21,)), (7, 20)),
)
SHAPES: dict[str, tuple[TensorSpec, ...]] = {
    "connections": tuple(tensor for tensor, _ in LAYERS),
    "biases": (TensorSpec("blocks.0.attn.qkv", (9,)), TensorSpec("blocks.0.mlp.fc1", (7,))),
    "norms": (TensorSpec("blocks.0.norm2.weight", (16,)),),
    "adapters": (TensorSpec("smoa.down", (2, 3, 16)), TensorSpec("smoa.up", (2, 16, 3))),
    "head": (TensorSpec("head.weight", (5, 16)),),
}


def example_metadata(**changes: Any) -> PackMetadata:
    arguments: dict[str, Any] = {
        "task": "birds",
        "classes": ['"Vögel"', *"bcde"],
        "metric": "accuracy",
        "seed": 3,
    }
    arguments["input"] = PackInput(
        size_px=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic"
    )
    arguments["recipe"] = {
        "connections": {"top_k": 2, "bits": 4},
        "training": {"learning_rate": 3e-3, "augment": False},
        "smoa": None,
    }
    arguments["backbone"] = {
        "model": "vit_tiny",
        "arguments": {"depth": 1, "window": [4, 4]},
        "fingerprint": "0f" * 32,
        "trail": "a0b1",
    }
    return PackMetadata(**{**arguments, **changes})


def zero_example(name: str, bits: Any) -> Part:
    layers = tuple(layer for _, layer in LAYERS) if name == "connections" else ()
    return zero_part(
        name, bits, SHAPES[name], random_places(np.random.default_rng(0)) if layers else (), layers
    )  # type: ignore[arg-type]


def random_places(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Equally many places in every row of the first layer, anywhere in the second."""
    (_, (rows, columns)), (tensor, (more_rows, more_columns)) = LAYERS
    equal = [row * columns + rng.permutation(columns)[:2] for row in range(rows)]
    anywhere = rng.permutation(more_rows * more_columns)[: tensor.count]
    return np.sort(np.concatenate(equal)).astype(np.int64), np.sort(anywhere).astype(np.int64)


def random_part(name: str, bits: Any, rng: np.random.Generator) -> Part:
    empty = zero_example(name, bits)
    codes = (
        rng.integers(0, 2**bits, empty.count).astype(np.uint8)
        if bits <= 8
        else rng.normal(size=empty.count).astype(empty.codes.dtype)
    )
    scales = (
        None
        if empty.scales is None
        else np.abs(rng.normal(size=empty.scales.shape)).astype(np.float16).astype(np.float32)
    )
    positions = random_places(rng) if empty.layers else ()
    return Part(empty.name, bits, empty.tensors, codes, scales, positions, empty.layers)


def example_pack(bits: dict[str, Any] | None = None, seed: int = 0) -> Pack:
    """A small pack with every kind of part, and two that share a name."""
    rng = np.random.default_rng(seed)
    bits = bits or {"connections": 4, "biases": 8, "norms": 32, "adapters": 1, "head": 2}
    parts = [random_part(name, width, rng) for name, width in bits.items()]
    parts.append(
        Part("head", 16, (TensorSpec("head.bias", (5,)),), rng.normal(size=5).astype(np.float16))
    )
    return Pack(example_metadata(), tuple(parts), rng.normal(size=(3, 5)).astype(np.float32))


def assert_same(left: Pack, right: Pack) -> None:
    assert left.metadata == right.metadata
    np.testing.assert_array_equal(left.probe_logits, right.probe_logits)
    assert len(left.parts) == len(right.parts)
    for one, other in zip(left.parts, right.parts, strict=True):
        for name in (
            "name",
            "bits",
            "tensors",
            "layers",
            "recomputed",
            "codebook",
            "by_row",
            "scale_bits",
            "has_mean",
        ):
            assert getattr(one, name) == getattr(other, name)
        for name in ("codes", "scales"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
        for places, others in zip(one.positions, other.positions, strict=True):
            np.testing.assert_array_equal(places, others, strict=True)
