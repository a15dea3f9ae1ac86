"""Ways to pass the samples of many packs through a linear layer with one connection per neuron and
pack: what each takes, against the one product that a single pack takes.

    python benchmarks/mixed_layers.py [--rounds 9]

64 images of 64 packs, every image of another one, pass the four layers of a block. Values and
columns are drawn at random: time does not depend on them. Everything is allocated before. All ways
take turns, and of each the fastest round counts, in the processor's time. Writes
benchmarks/results/mixed_layers.json and .md.

Legend: P packs, R rows of an image, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from pages import table
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "mixed_layers.json"
PACKS = 64
BLOCKS = {"embedded, 64 px": (192, 65), "ViT-S, 98 px": (384, 50)}
"""The width of a block, and the rows of an image."""
Way = Callable[[], torch.Tensor | None]
"""Returns the outputs, if they are those of the packs."""


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    blocks = {
        name: measured(width, rows, arguments.rounds) for name, (width, rows) in BLOCKS.items()
    }
    result = {"machine": describe_machine(), "arguments": vars(arguments), "blocks": blocks}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


@torch.inference_mode()
def measured(width: int, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of the layers of a block, each way."""
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layers = [ways(rows, *shape) for shape in shapes]
    for layer in layers:
        check(layer)
    fastest = {name: [float("inf")] * len(layers) for name in layers[0]}
    for _ in range(rounds):
        for number, layer in enumerate(layers):
            for name, way in layer.items():
                began = time.process_time()
                way()
                taken = time.process_time() - began
                fastest[name][number] = min(fastest[name][number], taken)
    return {name: sum(each) for name, each in fastest.items()}


def ways(rows: int, inputs: int, outputs: int) -> dict[str, Way]:
    """Each way to pass one layer, by its name."""
    x_PRI = torch.randn(PACKS, rows, inputs)
    weight_OI, bias_O = torch.randn(outputs, inputs), torch.randn(outputs)
    columns_PO = torch.randint(0, inputs, (PACKS, outputs))
    values_PO = torch.randn(PACKS, outputs)
    y_PRO = torch.empty(PACKS, rows, outputs)
    x_TI, y_TO = x_PRI.flatten(0, 1), y_PRO.flatten(0, 1)
    index_PRO = columns_PO[:, None].expand(y_PRO.shape)
    entries_PO = columns_PO + torch.arange(outputs) * inputs
    kept_PO = weight_OI.take(entries_PO)
    transposed_IT, transposed_OT = torch.empty(inputs, len(x_TI)), torch.empty(outputs, len(x_TI))
    bags_N1 = (columns_PO.T * PACKS + torch.arange(PACKS)).reshape(-1, 1)
    factors_N1 = values_PO.T.reshape(-1, 1)

    def one_product() -> None:
        torch.addmm(bias_O, x_TI, weight_OI.T, out=y_TO)

    def products() -> None:
        for x_RI, y_RO in zip(x_PRI, y_PRO, strict=True):
            torch.addmm(bias_O, x_RI, weight_OI.T, out=y_RO)

    def written() -> torch.Tensor:
        flat = weight_OI.view(-1)
        changed_PO = kept_PO + values_PO
        for x_RI, y_RO, at, new, old in zip(
            x_PRI, y_PRO, entries_PO, changed_PO, kept_PO, strict=True
        ):
            flat.index_copy_(0, at, new)
            torch.addmm(bias_O, x_RI, weight_OI.T, out=y_RO)
            flat.index_copy_(0, at, old)
        return y_TO

    def gathering() -> None:
        torch.gather(x_PRI, 2, index_PRO, out=y_PRO)

    def gathered() -> torch.Tensor:
        gathering()
        torch.addcmul(bias_O, y_PRO, values_PO[:, None], out=y_PRO)
        return y_TO.addmm_(x_TI, weight_OI.T)

    def selected() -> torch.Tensor:
        for x_RI, columns_O, y_RO in zip(x_PRI, columns_PO, y_PRO, strict=True):
            torch.index_select(x_RI, 1, columns_O, out=y_RO)
        torch.addcmul(bias_O, y_PRO, values_PO[:, None], out=y_PRO)
        return y_TO.addmm_(x_TI, weight_OI.T)

    def transposed() -> torch.Tensor:
        transposed_IT.copy_(x_TI.T)
        table_NR = transposed_IT.view(-1, rows)
        sums_NR = F.embedding_bag(bags_N1, table_NR, mode="sum", per_sample_weights=factors_N1)
        torch.add(sums_NR.view(outputs, -1), bias_O[:, None], out=transposed_OT)
        transposed_OT.addmm_(weight_OI, transposed_IT)
        return y_TO.copy_(transposed_OT.T)

    return {
        "one product, of one pack": one_product,
        "a product per pack, without connections": products,
        "a product per pack, its connections written into the weight": written,
        "gathering the selected inputs alone": gathering,
        "the selected inputs, gathered, times values, and one product": gathered,
        "the selected inputs, by an index per pack, times values, and one product": selected,
        "the same with rows and columns exchanged, and back": transposed,
    }


def check(layer: dict[str, Way]) -> None:
    """Raises AssertionError where ways to the outputs of the packs differ."""
    found = [y_TO.clone() for way in layer.values() if (y_TO := way()) is not None]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-3)


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    machine, blocks = result["machine"], result["blocks"]
    names = list(next(iter(blocks.values())))
    shares = {
        name: [f"{times[name] / times[names[0]]:.2f}" for times in blocks.values()]
        for name in names
    }
    lines = [
        "# The layers of a block in a mixed batch of connections",
        "",
        f"{machine['cpu']}, one thread, torch {machine['torch']}, commit {machine['commit']}."
        f" {PACKS} images of {PACKS} packs, one connection per neuron, float32; the processor's"
        " time for the four linear layers of a block as a multiple of one product's. Written by"
        " `python benchmarks/mixed_layers.py`.",
        "",
        *table(["way", *blocks], ([name, *each] for name, each in shares.items())),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
