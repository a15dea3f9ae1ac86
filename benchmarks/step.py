"""Time and memory of one training step: connections and SMoA against full fine-tuning, LoRA, SHiRA
and the dense masks of GPS's own code.

    python benchmarks/step.py [--model embedded --size 64 --batch 64] [--precision bf16] [--repeats
    9]

Variants run in turn, round by round, in one process, so that all meet the same machine; each time
is the median of `repeats`. Memory is counted three times: what lives beside the one copy of the
weights that a variant multiplies with (trained values, gradients and optimiser states; by itself,
the positions or masks that say which entries train); what is kept for the backward pass, tensor by
tensor; and the peak of a process, or of the GPU, above the loaded backbone. Needs `pip install
peft`. Writes benchmarks/results/step-<model>-<precision>-<hardware>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from variants import FULL, Setting, Variant, backbone_of, builders, make_setting

RESULTS = Path(__file__).parent / "results"
PEAK_STEPS = 3


def main() -> None:
    """Measure every variant and write the results."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = make_setting(
        backbone_of(arguments.model, arguments.size), arguments.batch, arguments.precision, device
    )
    if arguments.peak_of:
        print(_peak_bytes(setting, arguments.peak_of))
        return
    rows = _measure(setting, arguments.repeats)
    for row in rows:
        row["peak_bytes"] = _peak_in_process_of_its_own(row["variant"])
    command = "python benchmarks/step.py " + shlex.join(sys.argv[1:])
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "command": command,
        "arguments": vars(arguments),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name().split()[-1].lower()}-batch{arguments.batch}"
    else:
        hardware = next(
            (name for name in ("epyc", "xeon") if name in result["machine"]["cpu"].lower()), "cpu"
        )
    kind = f"{arguments.precision}-{hardware}"
    path = RESULTS / f"step-{arguments.model}-{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(result))
    print(path.with_suffix(".md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="embedded", help="`embedded`, or any timm model with random weights"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    built = [build() for build in builders(setting).values()]
    for variant in built:
        variant.step()
    times: dict[str, list[float]] = {variant.name: [] for variant in built}
    for _ in range(repeats):
        for variant in built:
            times[variant.name].append(_seconds(variant, setting.device))
    full = statistics.median(times[FULL])
    return [
        {
            "variant": variant.name,
            "median_ms": 1000 * statistics.median(times[variant.name]),
            "ratio_to_full": statistics.median(times[variant.name]) / full,
            "persistent_bytes": variant.persistent(),
            "places_bytes": variant.places,
            "activation_bytes": _activation_bytes(variant),
        }
        for variant in built
    ]


def _seconds(variant: Variant, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    variant.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _activation_bytes(variant: Variant) -> int:
    """Bytes of distinct storages kept for the backward pass of one step, parameters' own storages
    included once.
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_sparse:
            kept[id(tensor)] = tensor._values().nbytes + tensor._indices().nbytes
        else:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        variant.step()
    return sum(kept.values())


def _peak_in_process_of_its_own(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    # What is freed goes back to the system at once, so that what making the setting took is not
    # taken for free.
    returning = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=returning
        ).stdout.split()[-1]
    )


def _peak_bytes(setting: Setting, name: str) -> int:
    """The most memory in use while a variant is built and takes its first steps, above what was in
    use before.
    """
    build = builders(setting)[name]
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak counter starts anew
        before = _status_bytes("VmRSS")
    variant = build()
    for _ in range(PEAK_STEPS):
        variant.step()
    return (
        torch.cuda.max_memory_allocated() if setting.device == "cuda" else _status_bytes("VmHWM")
    ) - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _markdown(result: dict[str, Any]) -> str:
    machine, arguments = result["machine"], result["arguments"]
    device = (
        machine["gpu"] or f"{machine['cpu']}, {arguments['threads']} of {machine['cores']} cores"
    )
    what = (
        "the embedded ViT"
        if arguments["model"] == "embedded"
        else f"{arguments['model']}, random weights"
    )
    base = next(row for row in result["rows"] if row["variant"] == FULL)
    lines = [
        (
            f"# One training step: {what} at {arguments['size']} px, batch {arguments['batch']},"
            f" {arguments['precision']}"
        ),
        "",
        (
            f"`{result['command']}` on {device}, torch {machine['torch']}, commit"
            f" {machine['commit']}; medians of {arguments['repeats']}, one run."
        ),
        "Peak: of a process of its own, above the loaded backbone.",
        "",
        (
            "| variant | step ms | ratio to full | beside the weights MiB | of full's % | positions"
            " or masks MiB | kept for backward MiB | peak MiB |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            row["variant"],
            f"{row['median_ms']:.1f}",
            f"{row['ratio_to_full']:.3f}",
            f"{row['persistent_bytes'] / 2**20:.2f}",
            f"{100 * row['persistent_bytes'] / base['persistent_bytes']:.2f}",
            f"{row['places_bytes'] / 2**20:.2f}",
            f"{row['activation_bytes'] / 2**20:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
