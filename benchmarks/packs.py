"""What packs cost: positions against their entropy, files against other formats, ViT-B and ViT-L
byte by byte, time, and what sharing would save.

    python benchmarks/packs.py [--workdir runs/benchmarks/packs]

Needs the data folder that benchmarks/tasks/*.yaml name, and the extra `bench`. Writes
benchmarks/results/packs.json, packs.md and packs.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import zstandard
from machine import describe_machine
from packs_figure import draw

from pipeline.adaptation import RankedPlaces, SelectedIndex
from pipeline.adaptation.packing import SizePlanner, describe
from pipeline.adaptation.selected.ranking import kept_places
from pipeline.adaptation.sites import weight_shapes
from pipeline.data import prepare
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
    thresholds,
)
from pipeline.packs.coder import Encoder
from pipeline.packs.columns import Rows, code_columns
from pipeline.packs.description import Description
from pipeline.selection import read_selection, select_here, write_selection
from pipeline.serving.resident import ResidentBackbone
from pipeline.specs import Recipe
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "packs.json"
REAL = [HERE / "tasks" / f"{name}.yaml" for name in ("cifar10", "mnist", "elpv")]
DEMO = [
    HERE.parent / "tasks" / "demo" / f"{name}.yaml"
    for name in ("digits", "counting", "orientation")
]
VTAB_CLASSES = (100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9)
VITS = {"ViT-B/16": (768, 12, 152), "ViT-L/16": (1024, 24, 296)}  # width, depth, tensors
FINGERPRINT = "8f3a" * 16


@dataclass(frozen=True)
class Selected:
    """A task's places, layer by layer, for one K."""

    names: list[str]
    places: list[np.ndarray]
    shapes: list[LayerShape]

    @property
    def count(self) -> int:
        """Number of connections."""
        return sum(shape.count for shape in self.shapes)

    @property
    def fixed_bytes(self) -> float:
        """Columns at a fixed width."""
        return sum(shape.count * (shape.columns - 1).bit_length() for shape in self.shapes) / 8

    @property
    def entropy_bytes(self) -> float:
        """Empirical entropy of each layer's columns, the columns' distribution for free."""
        bits = 0.0
        for places_N, shape in zip(self.places, self.shapes, strict=True):
            counts = np.bincount(places_N % shape.columns)
            share = counts[counts > 0] / shape.count
            bits -= shape.count * float((share * np.log2(share)).sum())
        return bits / 8


def selected_of(ranked: SelectedIndex, inputs: Inputs, top_k: int) -> Selected:
    """The places that `top_k` keeps."""
    kept, shapes = kept_places(ranked, top_k), weight_shapes(inputs.backbone.model)
    places = {name: place_N.numpy() for name, place_N in kept.items()}
    return Selected(
        list(places),
        list(places.values()),
        [LayerShape(*shapes[name], len(each)) for name, each in places.items()],
    )


def open_task(path: Path, workdir: Path) -> tuple[Inputs, dict[str, RankedPlaces]]:
    """A task's inputs and its ranked selection of 3 connections a neuron, computed once."""
    task = load_task(path)
    folder = workdir / "data" / task.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare(task, folder)
    inputs = open_inputs(task, folder)
    selection = workdir / f"{task.name}.safetensors"
    if not selection.exists():
        write_selection(select_here(inputs, 3), selection)
    return inputs, read_selection(selection)


# --- positions and files on real selections -------------------------------------------------------


def position_rows(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedPlaces]]],
) -> list[dict[str, Any]]:
    """Coded positions against entropy and fixed width."""
    rows = []
    for name, (inputs, ranked) in tasks.items():
        for top_k in (1, 3):
            selected = selected_of(ranked, inputs, top_k)
            coded = len(encode_positions(selected.places, selected.shapes))
            rows.append(
                {
                    "task": name,
                    "K": top_k,
                    "positions": selected.count,
                    "coded_bytes": coded,
                    "bits_a_position": 8 * coded / selected.count,
                    "entropy_bytes": selected.entropy_bytes,
                    "to_entropy": coded / selected.entropy_bytes,
                    "fixed_bytes": selected.fixed_bytes,
                    "to_fixed": coded / selected.fixed_bytes,
                }
            )
    return rows


def file_rows(tasks: Mapping[str, tuple[Inputs, dict[str, RankedPlaces]]]) -> list[dict[str, Any]]:
    """GPS at K = 1 and 1 bit, head at 1 bit: the whole file against the bound of positions and
    codes.
    """
    recipe = Recipe.model_validate({"connections": {"top_k": 1, "bits": 1}, "head": {"bits": 1}})
    rows = []
    for name, (inputs, ranked) in tasks.items():
        classes = inputs.index.classes
        selected = selected_of(ranked, inputs, 1)
        spent = SizePlanner(inputs.task, inputs.backbone, classes, ranked).ledger(recipe)
        head_codes = len(classes) * inputs.backbone.width / 8 + 2 * len(classes)
        bound = selected.entropy_bytes + selected.count / 8 + head_codes
        rows.append(
            {
                "task": name,
                "ledger": spent,
                "file_bytes": sum(spent.values()),
                "bound_bytes": bound,
                "limit_bytes": 1.03 * bound + 1024,
            }
        )
    return rows


def format_rows(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedPlaces]]],
) -> list[dict[str, Any]]:
    """K = 1 of one task in other sparse layouts, plain and under zstd; values are normal."""
    name, (inputs, ranked) = next(iter(tasks.items()))
    selected = selected_of(ranked, inputs, 1)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape.count).astype(np.float32) for shape in selected.shapes]
    pairs = list(zip(selected.places, selected.shapes, strict=True))
    index32 = [
        np.stack([places // shape.columns, places % shape.columns]).astype(np.int32).tobytes()
        for places, shape in pairs
    ]
    flat32 = [places.astype(np.int32).tobytes() for places in selected.places]
    layouts = {
        "SHiRA in PEFT: float32 value, int32 row and column": [
            part + value.tobytes() for part, value in zip(index32, values, strict=True)
        ],
        "Super-Tuning: float32 value, int32 place": [
            part + value.tobytes() for part, value in zip(flat32, values, strict=True)
        ],
        "float16 COO: float16 value, int32 place": [
            part + value.astype(np.float16).tobytes()
            for part, value in zip(flat32, values, strict=True)
        ],
    }
    rows: list[dict[str, Any]] = []
    for layout, parts in layouts.items():
        content = b"".join(parts)
        packed = zstandard.ZstdCompressor(level=19).compress(content)
        rows += [
            {"format": layout, "bytes": len(content)},
            {"format": f"{layout}; zstd -19", "bytes": len(packed)},
        ]
    for bits in (16, 8, 4, 1):
        recipe = Recipe.model_validate({"connections": {"top_k": 1, "bits": bits}})
        spent = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, ranked).ledger(
            recipe
        )
        rows.append(
            {
                "format": f"pack at {bits} bit{'s' if bits > 1 else ''}: positions and values",
                "bytes": spent["positions"] + spent["values"],
            }
        )
    return [{**row, "task": name, "bytes_a_value": row["bytes"] / selected.count} for row in rows]


# --- synthetic packs of ViT-B and ViT-L -----------------------------------------------------------


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


@functools.cache
def coded_selection(width: int, depth: int, top_k: int) -> bytes:
    """Its positions, coded."""
    _, places, layers = simulated_selection(width, depth, top_k)
    return encode_positions(
        places, [LayerShape(*layer, len(each)) for layer, each in zip(layers, places, strict=True)]
    )


def simulated_pack(model: str, top_k: int, bits: int, experts: int, classes: int = 100) -> Pack:
    """Connections, biases at 8 bits, an SMoA bank of width 8, and a head at the same bits."""
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
            8,
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
        "biases": {"bits": 8},
        "head": {"bits": bits},
    }
    return Pack(
        metadata(classes, recipe, tensors),
        tuple(parts),
        rng.normal(size=(2, classes)).astype(np.float32),
    )


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


# --- time -----------------------------------------------------------------------------------------


def median_seconds(action: Callable[[], Any], times: int = 7) -> float:
    """Median of some runs, after one that is not counted."""
    action()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


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


def vars_of(part: Part) -> dict[str, Any]:
    """A part's fields without what it keeps for later calls, so that encoding is timed anew."""
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


# --- one store for many tasks ---------------------------------------------------------------------


def sharing_row(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedPlaces]]], top_k: int
) -> dict[str, Any]:
    """Bytes of the tasks' packs alone, and what a common base could save: column models, identical
    positions, descriptions.

    Models: the tasks' rows of a layer (of a head, in qkv) in one track, one segment a task, so that
    what one task taught serves the next. Identical positions: the entropy of "as in the first task"
    for each neuron, and the others at their own cost. Descriptions: deflated with the first task's
    as dictionary.
    """
    recipe = Recipe.model_validate(
        {"connections": {"top_k": top_k, "bits": 1}, "head": {"bits": 1}}
    )
    selected = [selected_of(ranked, inputs, top_k) for inputs, ranked in tasks.values()]
    files = [
        sum(
            SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, ranked)
            .ledger(recipe)
            .values()
        )
        for inputs, ranked in tasks.values()
    ]
    alone = [len(encode_positions(each.places, each.shapes)) for each in selected]
    first = selected[0]
    as_first = alone[0] + sum(
        _cost_beside(first, each, size) for each, size in zip(selected[1:], alone[1:], strict=True)
    )
    saved = {
        "column models": sum(alone) - len(_coded_together(selected)),
        "identical positions": sum(alone) - as_first,
        "descriptions": _saved_in_descriptions(tasks),
    }
    total = sum(files)
    best = max(saved["column models"], saved["identical positions"]) + saved["descriptions"]
    return {
        "K": top_k,
        "tasks": list(tasks),
        "files_bytes": total,
        "positions_bytes": sum(alone),
        "saved_bytes": saved,
        "best_share": best / total,
    }


def _coded_together(tasks: Sequence[Selected]) -> bytes:
    """All tasks' columns under column models in common."""
    track_G, within_G, counts_G, columns_N = [], [], [], []
    rows_T: list[int] = []
    widths_T: list[int] = []
    for layer, (name, shape) in enumerate(zip(tasks[0].names, tasks[0].shapes, strict=True)):
        run_rows = 64 if name.endswith("qkv") else shape.rows
        row_O = np.arange(shape.rows)
        for task in tasks:
            track_G.append(len(rows_T) + row_O // run_rows)
            within_G.append(row_O % run_rows)
            counts_G.append(np.full(shape.rows, shape.count // shape.rows))
            columns_N.append(task.places[layer] % shape.columns)
        tracks = -(-shape.rows // run_rows)
        rows_T += [run_rows] * tracks
        widths_T += [shape.columns] * tracks
    shares_T = np.zeros(len(rows_T), np.int64)
    track, within, counts = map(np.concatenate, (track_G, within_G, counts_G))
    rows = Rows(track, within, counts, np.array(rows_T), np.array(widths_T), shares_T)
    encoder = Encoder()
    code_columns(encoder, rows, np.concatenate(columns_N))
    return encoder.to_bytes()


def _cost_beside(first: Selected, other: Selected, size_bytes: int) -> float:
    """Positions of `other` where each is flagged as one of the first task's or coded as before."""
    same = sum(len(np.intersect1d(*pair)) for pair in zip(first.places, other.places, strict=True))
    share = same / first.count
    flag_bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * first.count
    return float(flag_bits / 8 + (1 - share) * size_bytes)


def _saved_in_descriptions(tasks: Mapping[str, tuple[Inputs, dict[str, RankedPlaces]]]) -> int:
    recipe = Recipe.model_validate({"connections": {"top_k": 1, "bits": 1}, "head": {"bits": 1}})
    descriptions = [
        Description(
            metadata=describe(inputs.task, recipe, inputs.backbone, inputs.index.classes),
            parts=[],
            probe=2,
        )
        for inputs, _ in tasks.values()
    ]
    base, *others = (
        json.dumps(each.model_dump(mode="json"), sort_keys=True).encode() for each in descriptions
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    shared = sum(
        len(zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(other))
        for other in others
    )
    return sum(len(each.to_bytes()) for each in descriptions[1:]) - shared


def code_rows() -> list[dict[str, Any]]:
    """What an entropy coder could save on the codes of normal values: 1 - entropy / bits."""
    rows = []
    for bits in range(1, 9):
        below = np.array(
            [0.0, *(statistics.NormalDist().cdf(float(border)) for border in thresholds(bits)), 1.0]
        )
        share = np.diff(below)
        rows.append({"bits": bits, "saved_share": 1 + float((share * np.log2(share)).sum()) / bits})
    return rows


# --- report ---------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine, clock = result["machine"], result["time"]
    published = statistics.mean(row["published_bytes"] for row in result["bottleneck"])
    ours = statistics.mean(row["file_bytes"] for row in result["bottleneck"])
    parts = [
        key
        for key in result["simulated"][0]["ledger"]
        if any(row["ledger"][key] for row in result["simulated"])
    ]
    return "\n".join(
        [
            "# Packs",
            "",
            (
                f"`python benchmarks/packs.py` on {machine['cpu']}, {machine['cores']} cores,"
                f" commit {machine['commit']}."
            ),
            "",
            "## Positions of real selections",
            "",
            (
                "Embedded ViT (width 192, depth 6). *Entropy*: empirical, of each layer's columns,"
                " their distribution for free. *Fixed*: columns at"
            ),
            "a fixed width. *Coded*: everything that a reader needs.",
            "",
            (
                "| task | K | positions | coded bytes | bits a position | entropy bytes | coded /"
                " entropy | fixed bytes | coded / fixed |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['task']} | {row['K']} | {row['positions']} | {row['coded_bytes']} |"
                f" {row['bits_a_position']:.2f} | {row['entropy_bytes']:.0f} |"
                f" {row['to_entropy']:.3f} | {row['fixed_bytes']:.0f} | {row['to_fixed']:.3f} |"
                for row in result["positions"]
            ),
            "",
            "## Whole files: K = 1, connections and head at 1 bit",
            "",
            (
                "Bound: the positions' entropy, and the codes at their bits. Limit: 1.03 times the"
                " bound, and 1 KiB."
            ),
            "",
            "| task | positions | values | head | probe | metadata | file | bound | limit |",
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['task']} |"
                f" {' | '.join(str(row['ledger'][key]) for key in ('positions', 'values', 'head', 'probe', 'metadata'))}"  # noqa: E501
                f" | {row['file_bytes']} | {row['bound_bytes']:.0f} | {row['limit_bytes']:.0f} |"
                for row in result["files"]
            ),
            "",
            (
                f"## Other layouts of the same connections ({result['formats'][0]['task']}, K = 1,"
                " positions and values)"
            ),
            "",
            "| layout | bytes | bytes a value |",
            "|---|---|---|",
            *(
                f"| {row['format']} | {row['bytes']} | {row['bytes_a_value']:.2f} |"
                for row in result["formats"]
            ),
            "",
            (
                "## 1-bit bottlenecks of width 32 and a 1-bit head without bias, ViT-B, the 19"
                " tasks of VTAB-1k"
            ),
            "",
            (
                f"Mean of the published layout: {published / 1024:.1f} KiB (task mean; no metadata,"
                f" no check). Mean of packs: {ours / 1024:.1f} KiB, {ours - published:.0f} bytes"
                " more; at most"
                f" {max(row['file_bytes'] - row['published_bytes'] for row in result['bottleneck'])}"  # noqa: E501
                " more, metadata, probe and digest included."
            ),
            "",
            "## Time: connections of ViT-B/16 at K = 1 and 1 bit, one core, medians",
            "",
            (
                "| bytes | encode ms | open and check ms | open, check and apply ms | apply alone"
                " ms | apply and undo ms |"
            ),
            "|---|---|---|---|---|---|",
            f"| {clock['bytes']} | "
            + " | ".join(
                f"{1000 * clock[key]:.1f}"
                for key in ("encode_s", "open_s", "open_and_apply_s", "apply_s", "apply_and_undo_s")
            )
            + " |",
            "",
            "## ViT-B/16 and ViT-L/16, simulated, 100 classes, biases at 8 bits",
            "",
            (
                "Columns drawn by Zipf's law, as unequal as those measured. `bits` are those of"
                " connections, adapters and head."
            ),
            "",
            "| model | K | bits | experts | " + " | ".join(parts) + " | file |",
            "|---" * (5 + len(parts)) + "|",
            *(
                f"| {row['model']} | {row['K']} | {row['bits']} | {row['experts']} |"
                f" {' | '.join(str(row['ledger'][key]) for key in parts)} |"
                f" {sum(row['ledger'].values())} |"
                for row in result["simulated"]
            ),
            "",
            "![Bytes by part](packs.png)",
            "",
            "## What an entropy coder would save on codes of normal values",
            "",
            "| bits | " + " | ".join(str(row["bits"]) for row in result["codes"]) + " |",
            "|---" * (1 + len(result["codes"])) + "|",
            "| saved | "
            + " | ".join(f"{row['saved_share']:.1%}" for row in result["codes"])
            + " |",
            "",
            "## One store for many tasks: what a common base would save",
            "",
            (
                "Six tasks on one backbone, connections and head at 1 bit. Column models and"
                " identical positions exclude each other."
            ),
            "",
            (
                "| K | files bytes | positions bytes | column models | identical positions |"
                " descriptions | best, of the total |"
            ),
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row['K']} | {row['files_bytes']} | {row['positions_bytes']} |"
                f" {' | '.join(f'{value:.0f}' for value in row['saved_bytes'].values())} |"
                f" {row['best_share']:.1%} |"
                for row in result["sharing"]
            ),
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/packs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time_row()
    tasks = {path.stem: open_task(path, arguments.workdir) for path in (*REAL, *DEMO)}
    real = {path.stem: tasks[path.stem] for path in REAL}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "positions": position_rows(real),
        "files": file_rows(real),
        "formats": format_rows(real),
        "bottleneck": bottleneck_rows(),
        "time": clock,
        "simulated": simulated_rows(),
        "codes": code_rows(),
        "sharing": [sharing_row(tasks, top_k) for top_k in (1, 3)],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    draw(result["simulated"], RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
