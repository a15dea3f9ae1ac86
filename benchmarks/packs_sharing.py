"""What one store for many tasks would save: column models in common, identical positions, shared
descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zstandard
from packs_selected import Selected, selected_of

from pipeline.adaptation import RankedIndices
from pipeline.adaptation.packing import SizePlanner, describe
from pipeline.packs import encode_positions
from pipeline.packs.coder import Encoder
from pipeline.packs.columns import Rows, code_columns
from pipeline.packs.description import Description
from pipeline.specs import Recipe
from pipeline.training import Inputs


def sharing_row(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedIndices]]], top_k: int
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


def _saved_in_descriptions(tasks: Mapping[str, tuple[Inputs, dict[str, RankedIndices]]]) -> int:
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
