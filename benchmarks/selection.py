"""Time and memory of the selection stage, against the plain passes it is made of and against the
top-K of GPS's released code.

    python benchmarks/selection.py [--images 96] [--repeats 7]

1. Selection over N images (reading, augmenting, gradient sums, ranking) against the plain forward
and backward pass over the same views, which are
   made beforehand; embedded ViT at 64 px, cifar10. Variants run in turn, round by round; each time
   is the median of `repeats`.
2. Bytes beyond the weights, and whether float64 sums are worth theirs: the gradients of all batches
are added as 1 to 12 workers would add them, in
   either precision, and the neurons counted whose connections then differ.
3. Top-K over all weight matrices of ViT-B/16. GPS's code (arXiv 2312.10136) sorts each whole row
with numpy and marks the K-th best through rows of
   an identity matrix as wide as the larger side, once for each k. A kinder form takes torch.topk
   and marks through a boolean identity matrix.

Needs the data folder that benchmarks/tasks/cifar10.yaml names. Writes
benchmarks/results/selection.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from pages import table

from pipeline.adaptation.selected.topk import top_connections
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.working import fuse_attention, slow_fused_attention
from pipeline.data import numbered_generator, prepare, shard_batches, two_views
from pipeline.selection import supervised_contrastive_loss
from pipeline.selection.gradient import gradient_sums
from pipeline.selection.losses import make_loss
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "selection.json"
VIT_BASE_SHAPES = [(768, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]
WORKERS = tuple(range(1, 13))
Views = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(HERE / "tasks" / "cifar10.yaml")
        prepare(task, Path(folder))
        inputs = open_inputs(task, Path(folder))
        result = {
            "machine": describe_machine(),
            "arguments": vars(arguments),
            "stage": measure_stage(inputs, arguments.images, arguments.repeats),
            "sums": compare_sums(inputs),
            "top_k": measure_top_k(arguments.repeats),
        }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def median_seconds(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each variant, run in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


# --- the stage ------------------------------------------------------------------------------------


def measure_stage(inputs: Inputs, images: int, repeats: int) -> dict[str, float]:
    """Seconds of the plain passes, and of the whole selection, in both precisions."""
    task = inputs.task
    batches = list(
        enumerate(shard_batches(inputs.splits["train"], task.selection.batch_size, seed=task.seed))
    )[: images // task.selection.batch_size]
    reader = inputs.reader("train")
    views: Views = []
    for number, samples in batches:
        pixels, labels = reader.read(samples)
        views.append(
            (
                two_views(pixels, numbered_generator(task.seed, number), flip=task.input.flip),
                labels.repeat(2),
            )
        )

    def selection(precision: str) -> dict[str, torch.Tensor]:
        spec = task.selection.model_copy(update={"precision": precision})
        loss = make_loss(spec, inputs.kind, inputs.backbone, len(inputs.index.classes), task.seed)
        read = ((number, *reader.read(samples)) for number, samples in batches)
        sums = gradient_sums(
            inputs.backbone, read, spec, loss, seed=task.seed, flip=task.input.flip
        )
        return {name: top_connections(sum_OI, 3) for name, sum_OI in sums.items()}

    seconds = median_seconds(
        {
            "plain fp32": lambda: plain_passes(inputs, views, "fp32"),
            "selection fp32": lambda: selection("fp32"),
            "plain bf16": lambda: plain_passes(inputs, views, "bf16"),
            "selection bf16": lambda: selection("bf16"),
        },
        repeats,
    )
    full, half = selection("fp32"), selection("bf16")
    same = {top_k: share_of_rows_alike(full, half, top_k) for top_k in (1, 3)}
    return {**seconds, "rows alike in bf16, K=1": same[1], "rows alike in bf16, K=3": same[3]}


def trained_copy(inputs: Inputs) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """The network with a gradient for every Linear and Conv2d weight, as torch does it."""
    model = inputs.backbone.fresh_model()
    weights = {}
    for name, layer in tunable_layers(model).items():
        layer.weight = weights[name] = torch.nn.Parameter(layer.weight.detach())
    return model, weights


def plain_passes(inputs: Inputs, views: Views, precision: str) -> None:
    """Forward and backward over views that are there, gradients thrown away."""
    model, weights = trained_copy(inputs)
    fuse_attention(
        slow_fused_attention(model, torch.bfloat16 if precision == "bf16" else torch.float32), False
    )
    for pixels, labels in views:
        loss_of(inputs, model, pixels, labels, precision).backward()
        for weight in weights.values():
            weight.grad = None


def loss_of(
    inputs: Inputs,
    model: torch.nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
) -> torch.Tensor:
    """The contrastive loss of one batch of views."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (inputs.backbone.images.mean, inputs.backbone.images.std)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        features = model((pixels - mean) / std)
    return supervised_contrastive_loss(features.float(), labels, inputs.task.selection.temperature)


def share_of_rows_alike(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], top_k: int
) -> float:
    """Share of neurons with the same K connections in the same order."""
    alike = [(first[name][:, :top_k] == second[name][:, :top_k]).all(dim=1) for name in first]
    return float(torch.cat(alike).double().mean())


# --- the sums -------------------------------------------------------------------------------------


def compare_sums(inputs: Inputs) -> dict[str, Any]:
    """Bytes of each way to sum, and how many neurons' connections change with the number of
    workers.
    """
    task, (model, weights) = inputs.task, trained_copy(inputs)
    gradients: list[dict[str, torch.Tensor]] = []
    for number, samples in enumerate(
        shard_batches(inputs.splits["train"], task.selection.batch_size, seed=task.seed)
    ):
        pixels, labels = inputs.reader("train").read(samples)
        views = two_views(pixels, numbered_generator(task.seed, number), flip=task.input.flip)
        loss_of(inputs, model, views, labels.repeat(2), "fp32").backward()
        gradients.append(
            {
                name: weight.grad.reshape(len(weight), -1)
                for name, weight in weights.items()
                if weight.grad is not None
            }
        )
        for weight in weights.values():
            weight.grad = None
    sizes_bytes = [weight.nbytes for weight in weights.values()]
    entries = sum(weight.numel() for weight in weights.values())
    return {
        "weights_bytes": sum(sizes_bytes),
        "images": len(inputs.splits["train"]),
        "neurons": sum(len(weight) for weight in weights.values()),
        "rows": [
            {
                "sums": str(dtype).removeprefix("torch."),
                "bytes": entries * dtype.itemsize + max(sizes_bytes),
                "bytes_without_folding": entries * dtype.itemsize + sum(sizes_bytes),
                "changed": changed_by_workers(gradients, dtype),
            }
            for dtype in (torch.float32, torch.float64)
        ],
    }


def changed_by_workers(
    gradients: list[dict[str, torch.Tensor]], dtype: torch.dtype
) -> dict[str, int]:
    """For K = 1 and 3, the neurons whose connections are not the same for every number of
    workers.
    """
    found = [ranked_sums(gradients, workers, dtype) for workers in WORKERS]
    changed = {}
    for top_k in (1, 3):
        differ = [
            torch.cat(
                [(each[name][:, :top_k] != found[0][name][:, :top_k]).any(dim=1) for name in each]
            )
            for each in found
        ]
        changed[f"K={top_k}"] = int(torch.stack(differ).any(dim=0).sum())
    return changed


def ranked_sums(
    gradients: list[dict[str, torch.Tensor]], workers: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Each worker adds its batches in order, then the workers' sums are added."""
    ranked = {}
    for name in gradients[0]:
        shares = []
        for rank in range(workers):
            share = torch.zeros(gradients[0][name].shape, dtype=dtype)
            for gradient in gradients[rank::workers]:
                share += gradient[name]
            shares.append(share)
        ranked[name] = top_connections(torch.stack(shares).sum(dim=0), 3)
    return ranked


# --- top-K ----------------------------------------------------------------------------------------


def identity_marks(gradient: np.ndarray, top_k: int) -> np.ndarray:
    """The released code's way: 0 at the K strongest of each row, 1 elsewhere, float32."""
    frozen = np.ones_like(gradient)
    for place in range(1, top_k + 1):
        column_of_row = np.abs(gradient).argsort(axis=1)[:, -place]
        others = ~np.eye(max(gradient.shape))[column_of_row][:, : gradient.shape[1]].astype(bool)
        frozen = (frozen.astype(int) & others.astype(np.float32).astype(int)).astype(np.float32)
    return frozen


def kinder_identity_marks(gradient_OI: torch.Tensor, top_k: int) -> torch.Tensor:
    """The same idea at its best: a partial sort in torch, a boolean identity matrix of the row's
    width.
    """
    columns_OK = gradient_OI.abs().topk(top_k, dim=1).indices
    return torch.eye(gradient_OI.shape[1], dtype=torch.bool)[columns_OK].any(dim=1)


def measure_top_k(repeats: int) -> list[dict[str, float]]:
    """One row for each K: seconds for all matrices of ViT-B/16."""
    generator = torch.Generator().manual_seed(0)
    singles = [torch.randn(shape, generator=generator) for shape in VIT_BASE_SHAPES]
    sums, arrays = [single.double() for single in singles], [single.numpy() for single in singles]
    rows = []
    for top_k in (1, 3):
        for sum_OI, array in zip(sums[:5], arrays[:5], strict=True):
            _check_marks(sum_OI, array, top_k)
        seconds = median_seconds(
            {
                "ours": lambda k=top_k: [top_connections(sum_OI, k) for sum_OI in sums],  # type: ignore[misc]
                "identity": lambda k=top_k: [identity_marks(array, k) for array in arrays],  # type: ignore[misc]
                "kinder": lambda k=top_k: [kinder_identity_marks(single, k) for single in singles],  # type: ignore[misc]
            },
            repeats,
        )
        rows.append({"top_k": top_k, **seconds})
    return rows


def _check_marks(sum_OI: torch.Tensor, array: np.ndarray, top_k: int) -> None:
    marked = np.zeros_like(array, dtype=bool)
    np.put_along_axis(marked, top_connections(sum_OI, top_k).numpy().astype(np.int64), True, axis=1)
    assert (marked == (identity_marks(array, top_k) == 0)).all(), "all three mark the same entries"
    assert (marked == kinder_identity_marks(torch.from_numpy(array), top_k).numpy()).all()


# --- the page -------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine, arguments = result["machine"], result["arguments"]
    lines = [
        "# The selection stage",
        "",
        (
            f"`python benchmarks/selection.py --images {arguments['images']} --repeats"
            f" {arguments['repeats']}` on {machine['cpu']}, 1 of {machine['cores']} cores, torch"
            f" {machine['torch']}, commit {machine['commit']}. Medians of {arguments['repeats']},"
            " one run."
        ),
        "",
        *_stage_section(result["stage"], arguments["images"]),
        *_sums_section(result["sums"]),
        *_top_k_section(result["top_k"]),
    ]
    return "\n".join(lines) + "\n"


def _stage_section(stage: dict[str, float], images: int) -> list[str]:
    seconds = {
        precision: (stage[f"plain {precision}"], stage[f"selection {precision}"])
        for precision in ("fp32", "bf16")
    }
    cells = (
        (precision, f"{plain:.2f}", f"{selection:.2f}", f"{selection / plain:.2f}")
        for precision, (plain, selection) in seconds.items()
    )
    return [
        f"## {images} images of cifar10, embedded ViT at 64 px",
        "",
        (
            "Plain: forward and backward over two views of each image, made beforehand. Selection:"
            " reading, augmenting, sums and ranking (K=3) included."
        ),
        "",
        *table(("precision", "plain s", "selection s", "ratio"), cells),
        "",
        (
            "Neurons with the same connections in bf16 as in fp32:"
            f" {100 * stage['rows alike in bf16, K=1']:.1f} % at K=1,"
            f" {100 * stage['rows alike in bf16, K=3']:.1f} % at K=3 (all three, in order)."
        ),
        "",
    ]


def _sums_section(sums: dict[str, Any]) -> list[str]:
    columns = (
        "sums",
        "gradients folded in one by one",
        "all gradients first",
        "changed at K=1",
        "at K=3",
    )
    cells = (
        (
            row["sums"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bytes_without_folding'] / 2**20:.1f}",
            row["changed"]["K=1"],
            row["changed"]["K=3"],
        )
        for row in sums["rows"]
    )
    return [
        "## What float64 sums cost and buy",
        "",
        (
            f"MiB beyond the weights, which take {sums['weights_bytes'] / 2**20:.1f} MiB. Changed:"
            f" neurons, of {sums['neurons']}, whose connections over {sums['images']} images are"
            f" not the same for every number of workers from {WORKERS[0]} to {WORKERS[-1]}."
        ),
        "",
        *table(columns, cells),
        "",
    ]


def _top_k_section(rows: list[dict[str, float]]) -> list[str]:
    columns = (
        "K",
        "ours s",
        "identity matrix, as released s",
        "ratio",
        "identity matrix, kinder s",
        "ratio",
    )
    cells = (
        (
            row["top_k"],
            f"{row['ours']:.3f}",
            f"{row['identity']:.2f}",
            f"{row['identity'] / row['ours']:.0f}x",
            f"{row['kinder']:.2f}",
            f"{row['kinder'] / row['ours']:.1f}x",
        )
        for row in rows
    )
    return [
        "## Top-K of all weight matrices of ViT-B/16",
        "",
        (
            "Ours reads float64 sums and gives columns; the others read float32 gradients and give"
            " masks."
        ),
        "",
        *table(columns, cells),
    ]


if __name__ == "__main__":
    main()
