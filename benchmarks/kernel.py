"""The fused kernel of connections' gradient on a GPU, alone, against the product it replaces and
against its memory bound.

    python benchmarks/kernel.py [--batch 64] [--top-k 1] [--repeats 30]

Layers of ViT-B/16 at 224 px, bfloat16. The bound is the bytes that must move (the kept columns, the
output's gradient, places, sums) over the bandwidth of a large copy, measured beside it. Times are
medians of `repeats`, each of a run with a cold L2 cache. Needs a GPU. Writes
benchmarks/results/kernel-<gpu>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

RESULTS = Path(__file__).parent / "results"
TOKENS_PER_IMAGE = 197
LAYERS = {
    "qkv": (2304, 768, 96),
    "proj": (768, 768, 48),
    "fc1": (3072, 768, 64),
    "fc2": (768, 3072, 64),
}
"""Outputs, inputs, and columns that any neuron chose."""


def main() -> None:
    """Measure every layer and write the results."""
    arguments = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark measures a GPU kernel; no GPU is here. The kernel's test runs in"
            " Triton's interpreter: pytest tests/adaptation/test_sampled.py"
        )
    bandwidth = copy_bandwidth(arguments.repeats)
    rows = [measured_layer(name, arguments, bandwidth) for name in LAYERS]
    result = {
        "machine": describe_machine(),
        "command": "python benchmarks/kernel.py " + shlex.join(sys.argv[1:]),
        "bandwidth": bandwidth,
        "rows": rows,
    }
    path = RESULTS / f"kernel-{torch.cuda.get_device_name().split()[-1].lower()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(result))
    print(path.with_suffix(".md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    run()
    found = []
    for _ in range(repeats):
        flush.zero_()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        found.append(started.elapsed_time(ended) / 1000)
    return statistics.median(found)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), repeats)


def measured_layer(name: str, arguments: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Seconds of each way to compute the gradient of one layer's connections, and the fused
    kernel's share of its bound.
    """
    from pipeline.adaptation.kernels.triton_sampled import fused_sampled_product

    outputs, inputs, columns = LAYERS[name]
    tokens = arguments.batch * TOKENS_PER_IMAGE
    generator = torch.Generator("cuda").manual_seed(0)
    x_TI, gradient_TO = (
        torch.randn(tokens, size, generator=generator, device="cuda").bfloat16()
        for size in (inputs, outputs)
    )
    kept_TU = x_TI[:, :columns].contiguous()
    column_N = torch.randint(
        columns, (outputs * arguments.top_k,), generator=generator, device="cuda"
    )
    row_N = torch.arange(outputs, device="cuda").repeat_interleave(arguments.top_k)
    place_N = column_N * outputs + row_N
    expected = (kept_TU.float().T @ gradient_TO.float()).take(place_N)
    torch.testing.assert_close(
        fused_sampled_product(kept_TU, gradient_TO, place_N), expected, rtol=1e-3, atol=1e-2
    )
    moved = kept_TU.nbytes + gradient_TO.nbytes + place_N.nbytes + 4 * len(place_N)
    seconds = {
        "fused": _seconds(
            lambda: fused_sampled_product(kept_TU, gradient_TO, place_N), arguments.repeats
        ),
        "product of columns": _seconds(
            lambda: (kept_TU.T @ gradient_TO).take(place_N), arguments.repeats
        ),
        "dense product": _seconds(
            lambda: (x_TI.T @ gradient_TO).take(column_N * outputs + row_N), arguments.repeats
        ),
    }
    return {
        "layer": name,
        "bytes": moved,
        "seconds": seconds,
        "share_of_bound": moved / bandwidth / seconds["fused"],
    }


def _markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# The fused kernel alone",
        "",
        (
            f"`{result['command']}` on {machine['gpu']}, torch {machine['torch']}, commit"
            f" {machine['commit']};"
        ),
        f"copy bandwidth {result['bandwidth'] / 1e12:.2f} TB/s.",
        "",
        *table_lines(result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the layers."""
    lines = [
        (
            "| layer | fused µs | product of columns µs | dense product µs | fused, % of the memory"
            " bound |"
        ),
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{1e6 * seconds:.0f}" for seconds in row["seconds"].values())
        lines.append(f"| {row['layer']} | {times} | {100 * row['share_of_bound']:.0f} |")
    return lines


if __name__ == "__main__":
    main()
