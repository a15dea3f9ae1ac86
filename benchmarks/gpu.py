"""What a GPU makes of taskpack, in one script: time and memory of a step, the selection, a study
from start to end, the tests.

    python benchmarks/gpu.py                          on a machine with a GPU
    python benchmarks/gpu.py --parts study            or a part of it
    python benchmarks/gpu.py --device cpu --smoke     tiny sizes, to see that the script works

1. Steps of ViT-B/16 at 224 px in bfloat16, batches of 32, 64 and 256, with the variants of
   step.py, each launched kernel by kernel and recorded as a CUDA graph. Each is built, warmed up
   and timed alone, so that its peak memory is its own.
2. Selection (three connections per neuron) over 1,000 random images in float32 and bfloat16; the
   share of connections that are the same in both, and when the selection is repeated.
3. A study of 12 trials on dtd10, and how busy it keeps the GPU; see gpu_study.py. It ends within
   --study-seconds, with fewer trials if need be, and needs all of taskpack's dependencies, Ray and
   MLflow among them, and the images at --data.
4. The tests: `pytest -m gpu`, of the files in `GPU_TESTS`.

CONTRIBUTING.md names the packages that the others need, besides peft for LoRA. Weights are random,
from a seed, unless --weights names a checkpoint. What cannot be measured says why. Writes
benchmarks/results/gpu-<card>.json and .md; with --parts, gpu-<card>-<parts>.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_study import StudySetting, measure_study, study_lines
from machine import describe_machine
from variants import FULL, Setting, Variant, builders, select_connections

from pipeline.adaptation import SelectedIndex, rank_indices
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.kinds import kind_named
from pipeline.selection.gradient import NumberedBatch, gradient_sums
from pipeline.selection.losses import make_loss
from pipeline.specs import Backbone, Input, Selection
from pipeline.utils.devices import can_record, device_name, has_bf16_units, is_accelerator

HERE = Path(__file__).parent
DTD10 = HERE.parent.parent / "shared" / "data" / "dtd10"
VARIANTS = (
    FULL,
    "LoRA r=8 (peft)",
    "connections K=1",
    "connections K=3",
    "SMoA E=8",
    "default recipe",
)
GPU_TESTS = (
    "tests/training/test_accelerator.py",
    "tests/training/test_dry_run.py",
    "tests/training/test_usage.py",
    "tests/utils/test_sending.py",
)
"""By name: other files of tests import what a bare machine has not."""
TOP_K = 3
CLASSES = 10
PARTS = ("steps", "selection", "study", "tests")
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "peft",
    "ray",
    "mlflow",
    "constriction",
    "numpy",
    "safetensors",
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `epochs` are those of a trial."""

    model: str
    arguments: dict[str, int]
    size_px: int
    batches: tuple[int, ...]
    images: int
    warm_up: int
    repeats: int
    epochs: int


WHOLE = Sizes("vit_base_patch16_224", {}, 224, (32, 64, 256), 1000, 5, 20, 100)
SMOKE = Sizes(
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    32,
    (4, 8),
    64,
    1,
    2,
    1,
)


def main() -> None:
    """Measure everything and write the results."""
    arguments = _arguments()
    sizes = SMOKE if arguments.smoke else WHOLE
    if (
        is_accelerator(arguments.device)
        and not torch.get_device_module(arguments.device).is_available()
    ):
        raise SystemExit(
            f"--device: given {arguments.device}, which torch cannot use here; try --device cpu"
            " --smoke"
        )
    started = time.monotonic()
    backbone = load_backbone(
        Backbone(model=sizes.model, arguments=dict(sizes.arguments), weights=arguments.weights),
        Input(size_px=sizes.size_px),
    )
    study = StudySetting(
        backbone.spec,
        sizes.size_px,
        None if arguments.smoke else arguments.data,
        sizes.epochs,
        arguments.device,
        arguments.study_seconds,
    )
    measure: dict[str, Callable[[], Any]] = {
        "steps": lambda: measure_steps(backbone, sizes, arguments.device),
        "selection": lambda: measure_selection(backbone, sizes, arguments.device),
        "study": lambda: measure_study(study),
        "tests": run_tests,
    }
    result: dict[str, Any] = {
        "machine": {
            **describe_machine(),
            "device": device_name(arguments.device),
            "versions": versions(),
        },
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "weights": arguments.weights,
        "sizes": vars(sizes),
    }
    for part in arguments.parts:
        empty_memory(arguments.device)
        result[part] = measure[part]()
    result["seconds"] = round(time.monotonic() - started, 1)
    path = results_path(arguments)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(path.with_suffix(".md").read_text())


def results_path(arguments: argparse.Namespace) -> Path:
    """Where the results go: a part does not replace the whole."""
    name = re.sub(r"[^a-z0-9]+", "-", card(arguments.device)).strip("-")
    parts = "" if set(arguments.parts) == set(PARTS) else f"-{'-'.join(arguments.parts)}"
    return Path(arguments.out, f"gpu-{name}{parts}{'-smoke' if arguments.smoke else ''}.json")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--weights", default="random", help="a checkpoint of the ViT-B/16")
    parser.add_argument("--data", type=Path, default=DTD10, help="folder of dtd10")
    parser.add_argument("--study-seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    return parser.parse_args()


def card(device: str) -> str:
    """The device's name in a file name: the last word of `NVIDIA H200`."""
    return device_name(device).split()[-1].lower() if is_accelerator(device) else "cpu"


def versions() -> dict[str, str | None]:
    """Of the packages that matter; None for one that is absent."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def wait_for(device: str) -> None:
    """Return when the device has done what it was given."""
    if is_accelerator(device):
        torch.get_device_module(device).synchronize()


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """What `run` takes until the device has done all of it."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


# --- steps ----------------------------------------------------------------------------------------


def measure_steps(backbone: LoadedBackbone, sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """One row for each batch and variant."""
    _, images, labels = random_batch(backbone, max(16, min(sizes.batches)), 0)
    selected = select_connections(backbone, images.to(device), labels.to(device), device, TOP_K)
    rows = []
    for batch, is_recorded in itertools.product(sizes.batches, recordings(device)):
        _, images, labels = random_batch(backbone, batch, 1)
        setting = Setting(
            backbone,
            images.to(device),
            labels.to(device),
            "bf16" if has_bf16_units(device) else "fp32",
            device,
            selected,
            is_recorded,
        )
        build = builders(setting)
        for name in VARIANTS:
            row = {
                "batch": batch,
                "variant": name,
                "is_recorded": is_recorded,
                "precision": setting.precision,
                **measured_step(build[name], sizes, device),
            }
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return rows


def recordings(device: str) -> tuple[bool, ...]:
    """Whether steps are recorded: both ways, where they can be."""
    return (False, True) if can_record(device) else (False,)


def random_batch(backbone: LoadedBackbone, images: int, number: int) -> NumberedBatch:
    """A batch of noise."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(
        0,
        256,
        (images, 3, backbone.size_px, backbone.size_px),
        dtype=torch.uint8,
        generator=generator,
    )
    return number, pixels, torch.arange(images) % CLASSES


def measured_step(build: Callable[[], Variant], sizes: Sizes, device: str) -> dict[str, Any]:
    """Median time of a step, and the most memory that is in use, or why there is none."""
    try:
        empty_memory(device)
        variant = build()
        for _ in range(sizes.warm_up):
            variant.step()
        times = [seconds_of(variant.step, device) for _ in range(sizes.repeats)]
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    return {
        "median_ms": 1000 * statistics.median(times),
        "fastest_ms": 1000 * min(times),
        "peak_bytes": peak_bytes(device),
    }


def empty_memory(device: str) -> None:
    """Give back what the variant before left, and count anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int | None:
    """The most memory of a GPU in use since `empty_memory`, weights included."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


# --- selection ------------------------------------------------------------------------------------


def measure_selection(backbone: LoadedBackbone, sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds in each precision, and the shares of neurons with the same connections."""
    found: dict[str, SelectedIndex] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name in ("fp32", "fp32 again", "bf16"):
        found[name], seconds[name] = timed_selection(
            backbone, sizes, device, Selection(precision="bf16" if name == "bf16" else "fp32")
        )
    return {
        "images": sizes.images,
        "seconds": seconds,
        "alike_again": share_alike(found["fp32"], found["fp32 again"]),
        "alike_in_bf16": share_alike(found["fp32"], found["bf16"]),
    }


def timed_selection(
    backbone: LoadedBackbone, sizes: Sizes, device: str, spec: Selection
) -> tuple[SelectedIndex, dict[str, float]]:
    """The selection, and the seconds of its two halves."""

    def batches() -> Iterator[NumberedBatch]:
        for number in range(-(-sizes.images // spec.batch_size)):
            yield random_batch(
                backbone, min(spec.batch_size, sizes.images - number * spec.batch_size), number
            )

    loss = make_loss(spec, kind_named("classification"), backbone, CLASSES, 0)
    sums: dict[str, torch.Tensor] = {}
    selected: dict[str, Any] = {}
    gradients = seconds_of(
        lambda: sums.update(
            gradient_sums(backbone, batches(), spec, loss, seed=0, flip=True, device=device)
        ),
        device,
    )
    ranking = seconds_of(lambda: selected.update(rank_indices(sums, "neuron", TOP_K)), device)
    return selected, {"gradients": gradients, "ranking": ranking}


def share_alike(one: SelectedIndex, other: SelectedIndex) -> float:
    """Share of places that both select."""
    same = sum(int(torch.isin(one[name].index_M, other[name].index_M).sum()) for name in one)
    return same / sum(len(ranked.index_M) for ranked in one.values())


# --- the tests ------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """The tests on the GPU, in a process of its own. Where pytest's plug-in for time limits is
    absent, it warns of the setting.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-rfEs",
        *GPU_TESTS,
        "-W",
        "ignore::pytest.PytestConfigWarning",
    ]
    started = time.monotonic()
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=HERE.parent, timeout=300
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "the tests took longer than 300 seconds"}
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return {
        "exit_code": run.returncode,
        "summary": lines[-1],
        "lines": failed[:40],
        "seconds": round(time.monotonic() - started, 1),
    }


# --- the page -------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine, sizes = result["machine"], result["sizes"]
    found = ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items() if version
    )
    lines: dict[str, Callable[[], list[str]]] = {
        "steps": lambda: _step_lines(result["steps"], sizes),
        "selection": lambda: _selection_lines(result["selection"]),
        "study": lambda: study_lines(result["study"]),
        "tests": lambda: _test_lines(result["tests"]),
    }
    return "\n".join(
        [
            f"# {machine['device']}: {sizes['model']} at {sizes['size_px']} px",
            "",
            (
                f"`{result['command']}`, {result['seconds']:.0f} s, commit"
                f" {machine['commit'] or 'unknown'}, {found}. Weights: {result['weights']}."
            ),
            "",
            *(line for part in PARTS if part in result for line in lines[part]()),
        ]
    )


def _step_lines(rows: list[dict[str, Any]], sizes: dict[str, Any]) -> list[str]:
    lines = [
        "## Steps",
        "",
        (
            f"Medians of {sizes['repeats']} after {sizes['warm_up']}; peak memory with the weights."
            " Recorded: as a CUDA graph. Ratios are to full fine-tuning that is launched alike."
        ),
        "",
        "| batch | variant | recorded | precision | step ms | ratio | images/s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    full = {
        (row["batch"], row["is_recorded"]): row["median_ms"]
        for row in rows
        if row["variant"] == FULL and "median_ms" in row
    }
    for row in rows:
        setting = (
            f"| {row['batch']} | {row['variant']} | {'yes' if row['is_recorded'] else 'no'} |"
            f" {row['precision']} |"
        )
        if "skipped" in row:
            lines.append(f"{setting} {row['skipped']} | | | |")
            continue
        reference = full.get((row["batch"], row["is_recorded"]))
        ratio = f"{row['median_ms'] / reference:.2f}" if reference else ""
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] is not None else ""
        speed = f"{1000 * row['batch'] / row['median_ms']:.0f}"
        lines.append(f"{setting} {row['median_ms']:.1f} | {ratio} | {speed} | {peak} |")
    return [*lines, ""]


def _selection_lines(selection: dict[str, Any]) -> list[str]:
    lines = ["## Selection", "", f"{selection['images']} images, two views each; K={TOP_K}.", ""]
    lines += ["| precision | gradients s | ranking s | images/s |", "|---|---|---|---|"]
    for name, seconds in selection["seconds"].items():
        speed = selection["images"] / sum(seconds.values())
        lines.append(
            f"| {name} | {seconds['gradients']:.2f} | {seconds['ranking']:.2f} | {speed:.0f} |"
        )
    alike = (
        f"The same connections when repeated: {selection['alike_again']:.4%}; in bf16 as in fp32:"
        f" {selection['alike_in_bf16']:.2%}."
    )
    return [*lines, "", alike, ""]


def _test_lines(tests: dict[str, Any]) -> list[str]:
    if "skipped" in tests:
        return ["## Tests", "", f"Not run: {tests['skipped']}.", ""]
    return [
        "## Tests",
        "",
        f"`pytest -m gpu`: {tests['summary']}",
        "",
        *(f"- {line}" for line in tests["lines"]),
        "",
    ]


if __name__ == "__main__":
    main()
