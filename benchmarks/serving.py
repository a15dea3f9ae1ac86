"""Many packs on one backbone: the time of a mixed batch against the number of its tasks, and the
memory, loading and switching of packs.

    python benchmarks/serving.py [--backbones embedded vit_small] [--rounds 5]
                                 [--resident 1000] [--device cpu] [--shared FOLDER]

Values and connections are drawn at random: time and memory do not depend on them. Every round
passes the same 64 images as a batch of one task on its own merged model, then as mixed batches of
1 to 64 tasks, then task by task: on models that are all kept in memory, merged, and with each pack
loaded first. Times are those of the processor, so that other programs count little: the fastest of
the rounds for batches, the median for loads. Ratios are of times of one run. Memory is the growth
of the process while many packs are loaded, each decoded on its own.

The ViT-S is by default in the folder `shared` beside the project. Writes
benchmarks/results/serving.json and .md; rows of backbones that are not measured are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from pages import table
from runs import SHARED

from pipeline.adaptation import AdaptedModel, RankedIndices, attach, rank_indices
from pipeline.adaptation.packing import describe, from_pack, to_pack
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.packs import content_digest, ledger, pack_to_bytes, read_pack
from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry, open_registry
from pipeline.serving.host import PackHost
from pipeline.specs import Backbone, DrawnData, Input, Recipe, Task
from pipeline.specs.yaml_files import load_spec
from pipeline.utils.devices import exact_float32

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serving.json"
IMAGES, LOADS = 64, 20
TASKS = (1, 2, 4, 8, 16, 32, 64)
RECIPES: dict[str, dict[str, Any]] = {
    "bottleneck, 1 bit": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 2}},
    "connections K = 1, 1 bit": {"connections": {"top_k": 1, "bits": 1}, "head": {"bits": 2}},
    "connections K = 1, biases, bank, norms": {
        "connections": {"top_k": 1, "bits": 1},
        "biases": {"bits": 1},
        "smoa": {"bits": 1},
        "norms": {"bits": 4},
        "head": {"bits": 2},
    },
}
CLASSES = tuple(f"class {number}" for number in range(10))


def backbones(shared: Path) -> dict[str, tuple[Backbone, Input]]:
    """The backbones by name, each at the size of its images."""
    demo = HERE.parent / "tasks" / "demo" / "backbone.yaml"
    embedded = load_spec(Backbone, demo)
    weights = shared / "backbones" / "vit_small_patch14_dinov2.saliency.safetensors"
    return {
        "embedded": (
            embedded.changed(weights=str(demo.parent / embedded.weights)),
            Input(size_px=64),
        ),
        "vit_small": (
            Backbone(model="vit_small_patch14_dinov2", weights=str(weights)),
            Input(size_px=224),
        ),
    }


def draw_pack(backbone: LoadedBackbone, sections: dict[str, Any], seed: int) -> bytes:
    """The file of a pack with random values and connections."""
    recipe = Recipe.model_validate(sections)
    task = Task(
        name=f"task{seed}",
        data=DrawnData(format="drawn", kind="orientation"),
        backbone=backbone.spec,
        recipe=recipe,
    )
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, recipe, len(CLASSES), selected=draw_selection(backbone, generator))
    for parameter in model.values.parameters():
        parameter.data += torch.empty_like(parameter).normal_(0, 0.01, generator=generator)
    return pack_to_bytes(to_pack(model, describe(task, recipe, backbone, CLASSES)))


def draw_selection(
    backbone: LoadedBackbone, generator: torch.Generator
) -> dict[str, RankedIndices]:
    """One random connection per neuron."""
    shapes = weight_shapes(backbone.model)
    importance = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return rank_indices(importance, "neuron", 1)


def seconds(function: Callable[[], object], device: str) -> float:
    """The time of one call: that of the processor, which other programs do not lengthen, or on a
    GPU that of the clock.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def measure_batches(
    backbone: LoadedBackbone, contents: list[bytes], rounds: int, device: str
) -> dict[str, Any]:
    """Seconds for the 64 images in each way."""

    def read(name: str) -> bytes:
        return contents[int(name)]

    host = PackHost(backbone, read, device=device)
    short = PackHost(backbone, read, device=device, precision="bf16")
    shape = (IMAGES, 3, backbone.size_px, backbone.size_px)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    on_device = torch.from_numpy(images).to(device)
    merged = [merged_model(content, backbone, device) for content in contents]
    packs = [host.packs.get(str(number)) for number in range(len(contents))]
    sixteen = [packs[number % 16] for number in range(IMAGES)]

    @exact_float32()
    @torch.inference_mode()
    def one_by_one(tasks: int, is_loaded: bool) -> None:
        for number in range(tasks):
            model = merged[number]
            if not is_loaded:
                model = merged_model(contents[number], backbone, device)
            model(on_device[number::tasks]).cpu()

    ways: dict[str, Callable[[], object]] = {"one task": partial(one_by_one, 1, True)}
    for tasks in TASKS:
        mixed = [packs[number % tasks] for number in range(IMAGES)]
        ways[f"mixed {tasks}"] = partial(host.logits, mixed, list(images))
    ways["mixed 16, bf16"] = partial(short.logits, sixteen, list(images))
    for tasks in (16, 64):
        ways[f"in turn {tasks}"] = partial(one_by_one, tasks, True)
    ways["loaded in turn 16"] = partial(one_by_one, 16, False)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            taken = seconds(way, device)
            if number:  # the first round warms up
                times[name].append(taken)
    return {name: min(taken) for name, taken in times.items()}


def merged_model(content: bytes, backbone: LoadedBackbone, device: str) -> AdaptedModel:
    """A pack as a model of its own, as a predictor holds it."""
    model = from_pack(read_pack(content), backbone).to(device)
    model.merge()
    return model


def measure_residency(
    backbone: LoadedBackbone, contents: list[bytes], resident: int
) -> dict[str, Any]:
    """Memory of many packs, and what loading one and changing from one to the next take."""
    host = PackHost(
        backbone, lambda name: contents[int(name) % len(contents)], capacity_bytes=1 << 40
    )
    host.packs.get("0")
    give_memory_back()
    before = resident_bytes()
    loads = [
        seconds(partial(host.packs.get, str(number)), "cpu") for number in range(1, resident + 1)
    ]
    give_memory_back()
    grown = resident_bytes() - before
    image = np.zeros((3, backbone.size_px, backbone.size_px), np.uint8)
    packs = [host.packs.get(str(number)) for number in range(LOADS)]
    same = [seconds(partial(host.logits, packs[:1], [image]), "cpu") for _ in packs]
    other = [seconds(partial(host.logits, [pack], [image]), "cpu") for pack in packs]
    return {
        "packs": resident,
        "resident_bytes": grown,
        "counted_bytes": host.packs.size_bytes,
        "load_seconds": statistics.median(loads[: len(contents) - 1]),  # each file's first load
        "image_seconds": statistics.median(same),
        "other_pack_seconds": statistics.median(other),
        "registry_seconds": measure_registry(backbone, contents),
    }


def measure_registry(backbone: LoadedBackbone, contents: list[bytes]) -> float:
    """The time from a name in a local registry to the pack in memory, loaded for the first time."""
    host = PackHost(backbone, lambda name: contents[int(name)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = open_registry(f"sqlite:///{name}/mlflow.db", folder)
        for number in range(LOADS):
            register(registry, folder, f"task{number}", contents[number % len(contents)])

        def load(task: str) -> None:
            path = registry.download(registry.get(task), folder / "downloads")
            host.check(path.read_bytes())

        load("task0")
        times = [seconds(partial(load, f"task{number}"), "cpu") for number in range(1, LOADS)]
    return statistics.median(times)


def register(
    registry: Registry, folder: Path, task: str, content: bytes, *, promote: bool = False
) -> None:
    """Register a pack with the few numbers that a look-up needs."""
    path = folder / f"{task}.safetensors"
    path.write_bytes(content)
    pack = read_pack(content)
    champion = Champion(
        task=task,
        pack_path=path,
        pack_digest=content_digest(content),
        size_bytes=len(content),
        ledger=ledger(pack),
        metrics={"test_metric": 0.5, "val_metric": 0.5, "trained_values": 1},
        tags={
            "backbone": pack.metadata.backbone["model"],
            "backbone_fingerprint": pack.metadata.backbone["fingerprint"],
        },
        promote=promote,
    )
    registry.register(champion, with_trials=False)


def give_memory_back() -> None:
    """Free what is unused, so that the process grows with what is used alone."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Many packs on one backbone",
        "",
        f"One thread, device {result['device']}. Random values, {IMAGES} images, 10 classes. Times"
        " are CPU times on a CPU.",
        "Written by `python benchmarks/serving.py`.",
        "",
        "## Images per second, as a share of those of one task on its own merged model",
        "",
        "*In turn*: task by task, every merged model kept in memory, a copy of each changed weight"
        " per task. *Loaded in turn*: the pack is loaded first, as where one task fits in memory."
        " *Gain*: the speed of 16 mixed tasks over loading in turn. *At most*: that of one task"
        " over it, which is what mixing would gain if it cost nothing.",
        "",
    ]
    lines += _speeds(result["rows"])
    lines += ["", "## Packs in memory, and how long one takes to load", ""]
    lines += _loads(result["rows"])
    lines += ["", "A load decodes the file, checks it, and passes a probe image."]
    return "\n".join(lines) + "\n"


def _speeds(rows: list[dict[str, Any]]) -> list[str]:
    columns = ["backbone", "recipe", "one task, images/s", *(f"{tasks} tasks" for tasks in TASKS)]
    columns += [
        "16 tasks, bf16",
        "16 in turn",
        "64 in turn",
        "16 loaded in turn",
        "gain",
        "at most",
        "machine",
    ]
    return table(
        columns,
        [
            [
                row["backbone"],
                row["recipe"],
                f"{IMAGES / row['batches']['one task']:.1f}",
                *(
                    _share(row["batches"], way)
                    for way in (
                        *(f"mixed {tasks}" for tasks in TASKS),
                        *("mixed 16, bf16", "in turn 16", "in turn 64", "loaded in turn 16"),
                    )
                ),
                *(
                    f"{row['batches']['loaded in turn 16'] / row['batches'][way]:.1f}"
                    for way in ("mixed 16", "one task")
                ),
                _machine(row),
            ]
            for row in rows
        ],
    )


def _share(batches: dict[str, float], way: str) -> str:
    """The speed of a way to that of one task; nothing where it was not measured."""
    return f"{batches['one task'] / batches[way]:.2f}" if way in batches else ""


def _machine(row: dict[str, Any]) -> str:
    return f"{row['machine']['cpu']}, {row['machine']['commit']}"


def _loads(rows: list[dict[str, Any]]) -> list[str]:
    return table(
        [
            "backbone",
            "recipe",
            "pack, bytes",
            "packs loaded",
            "memory of all, MB",
            "load, ms",
            "load from a local registry, ms",
            "one image, ms",
            "one image of another pack than before, ms",
            "machine",
        ],
        [
            [
                row["backbone"],
                row["recipe"],
                f"{row['pack_bytes']:,}",
                f"{row['residency']['packs']:,}",
                f"{row['residency']['resident_bytes'] / 1e6:.0f}",
                *(
                    f"{1000 * row['residency'][key]:.1f}"
                    for key in (
                        "load_seconds",
                        "registry_seconds",
                        "image_seconds",
                        "other_pack_seconds",
                    )
                ),
                _machine(row),
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=["embedded", "vit_small"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", type=int, default=1_000, help="packs to load")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=SHARED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in kept if row["backbone"] not in arguments.backbones]
    for name in arguments.backbones:
        backbone = load_backbone(*backbones(arguments.shared)[name])
        for recipe, sections in RECIPES.items():
            contents = [draw_pack(backbone, sections, seed) for seed in range(max(TASKS))]
            row: dict[str, Any] = {"backbone": name, "recipe": recipe}
            row["machine"] = describe_machine()
            row["pack_bytes"] = len(contents[0])
            row["residency"] = measure_residency(backbone, contents, arguments.resident)
            row["batches"] = measure_batches(backbone, contents, arguments.rounds, arguments.device)
            rows.append(row)
            result = {"device": arguments.device, "rows": rows}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
