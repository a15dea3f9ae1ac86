"""Images a second: taskpack's reader with one and with two decoding threads against plain
WebDataset on the same shards, and torchvision's ImageFolder on the same images.

    python benchmarks/throughput.py [--repeats 7] [--batch 64]

An epoch is every image once, shuffled, as uint8 batches [B, 3, S, S] with labels. All three decode
by Pillow and resize bicubically to a square, in this process alone, with one thread but where two
are named. taskpack: the first epoch reads, checks (SHA-256, tar) and decodes; later ones come from
memory. WebDataset has a shuffle buffer of 1000, ImageFolder a DataLoader without workers. Over
HTTP, a server of this machine gives the shards; WebDataset reads it through curl, and nothing is
kept from one round to the next.
Variants run in turn, round by round; a figure is the median of `repeats`, a ratio the median of the
rounds'.

cifar10: 1000 JPEGs of 32 px, to 64 px. camvid: 701 JPEGs of 240 x 180 px, to 224 px. Needs both in
the folder ../shared/data. Writes benchmarks/results/throughput.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset
from machine import describe_machine, free_port
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, Resize

from pipeline.data import (
    DataIndex,
    Images,
    Reader,
    ShardEntry,
    Split,
    decode_image,
    read_shard,
    split_samples,
    training_batches,
    write_shards,
)
from pipeline.data.node_memory import LIMIT_VARIABLE
from pipeline.data.reader import CACHE
from pipeline.data.remote import FOLDER_VARIABLE
from pipeline.kinds import Label, classes_in

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"
RESULTS = HERE / "results" / "throughput.json"
SHARD_SAMPLES = 250
SHUFFLE_BUFFER = 1000
PLAIN = "WebDataset"
ONE_THREAD = "taskpack, first epoch"
TWO_THREADS = "taskpack, first epoch, 2 threads"
Sample = tuple[str, bytes, Label]


@dataclass(frozen=True)
class Dataset:
    """The same images as shards and as files, by class."""

    name: str
    size_px: int
    images: int
    folder: Path
    index: DataIndex


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[LIMIT_VARIABLE] = "0"  # an epoch called the first decodes
    rows = []
    for name, size_px, samples in (("cifar10", 64, cifar10()), ("camvid", 224, camvid())):
        with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as address:
            os.environ[FOLDER_VARIABLE] = f"{folder}/kept"
            rows += measure(
                make_dataset(name, size_px, samples, Path(folder)),
                address,
                arguments.batch,
                arguments.repeats,
            )
    result = {"machine": describe_machine(), "arguments": vars(arguments), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


# --- data -----------------------------------------------------------------------------------------


def cifar10() -> list[Sample]:
    """The training images."""
    return list(read_shard(str(DATA / "cifar10" / "train.tar")))


def camvid() -> list[Sample]:
    """All photographs; which split an image is from stands for its class."""
    paths = [
        (path, label)
        for label, split in enumerate(("train", "val", "test"))
        for path in sorted((DATA / "camvid" / split / "images").iterdir())
    ]
    return [(f"{label}-{path.stem}", path.read_bytes(), label) for path, label in paths]


def make_dataset(name: str, size_px: int, samples: list[Sample], folder: Path) -> Dataset:
    """Write the samples as shards, and as files in a folder a class."""
    shards = write_shards(folder, "train", samples, SHARD_SAMPLES)
    classes = [
        f"class{label}"
        for label in range(
            1 + max(number for _, _, label in samples for number in classes_in(label))
        )
    ]
    for key, image, label in samples:
        path = folder / "files" / classes[classes_in(label)[0]] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    splits: dict[Any, list[ShardEntry]] = {"train": shards, "val": shards[:1], "test": shards[:1]}
    return Dataset(name, size_px, len(samples), folder, DataIndex(classes=classes, splits=splits))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server, a process of its own, that gives the folder's files."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
        "--protocol",
        "HTTP/1.1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


# --- variants -------------------------------------------------------------------------------------


def variants(dataset: Dataset, address: str, batch: int) -> dict[str, Callable[[], int]]:
    """An epoch of each kind; gives the images that it read."""
    paths = [str(dataset.folder / shard.path) for shard in dataset.index.splits["train"]]
    remote = [
        shard.model_copy(update={"path": f"{address}/{shard.path}"})
        for shard in dataset.index.splits["train"]
    ]
    here, there = (
        split_of(dataset.index, shards) for shards in (dataset.index.splits["train"], remote)
    )
    return {
        PLAIN: lambda: count(plain(dataset, paths, batch)),
        "ImageFolder and DataLoader": lambda: count(files(dataset, batch)),
        ONE_THREAD: lambda: count(ours(dataset, here, batch, is_first=True)),
        TWO_THREADS: lambda: count(ours(dataset, here, batch, is_first=True, threads=2)),
        "taskpack, later epochs": lambda: count(ours(dataset, here, batch, is_first=False)),
        f"{PLAIN} over HTTP": lambda: count(
            plain(dataset, [shard.path for shard in remote], batch)
        ),
        "taskpack over HTTP, first epoch": lambda: count(
            ours(dataset, there, batch, is_first=True)
        ),
    }


def split_of(index: DataIndex, shards: list[ShardEntry]) -> Split:
    """The training split with its shards where these say."""
    return split_samples(
        index.model_copy(update={"splits": {**index.splits, "train": shards}}), 0.2, 0
    )["train"]


def ours(
    dataset: Dataset, split: Split, batch: int, *, is_first: bool, threads: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch of the training loop's; the first finds nothing in memory or on disk."""
    if is_first:
        CACHE.clear()
        for path in (dataset.folder / "kept").glob("*"):
            path.unlink()
    torch.set_num_threads(threads)
    reader = Reader(dataset.folder, split, Images(dataset.size_px))
    torch.set_num_threads(1)
    return reader.batches(training_batches(split, batch, seed=0, epoch=0, window=reader.window()))


def plain(
    dataset: Dataset, urls: list[str], batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """WebDataset as its documentation has it, with this project's decoding."""
    shards = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    decoded = shards.shuffle(SHUFFLE_BUFFER).map(
        lambda sample: (
            torch.from_numpy(decode_image(sample["jpg"], dataset.size_px)),
            int(sample["cls"]),
        )
    )
    return iter(decoded.batched(batch, collation_fn=torch.utils.data.default_collate))


def files(dataset: Dataset, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Image files by torchvision."""
    transform = Compose(
        [Resize((dataset.size_px, dataset.size_px), InterpolationMode.BICUBIC), PILToTensor()]
    )
    return iter(
        torch.utils.data.DataLoader(
            ImageFolder(str(dataset.folder / "files"), transform), batch, shuffle=True
        )
    )


def count(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """How many images the batches have, which must be of one kind."""
    images = 0
    for pixels, labels in batches:
        assert pixels.dtype == torch.uint8
        assert len(pixels) == len(labels)
        images += len(pixels)
    return images


# --- measuring ------------------------------------------------------------------------------------


def measure(dataset: Dataset, address: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    epochs = variants(dataset, address, batch)
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(1 + repeats):  # the first warms up
        for name, epoch in epochs.items():
            started = time.perf_counter()
            assert epoch() == dataset.images, name
            rates[name].append(dataset.images / (time.perf_counter() - started))
    base = {name: f"{PLAIN} over HTTP" if "HTTP" in name else PLAIN for name in rates}
    base[TWO_THREADS] = ONE_THREAD
    return [
        {
            "data": dataset.name,
            "size_px": dataset.size_px,
            "variant": name,
            "images_per_second": statistics.median(rates[name][1:]),
            "ratio_to": base[name],
            "ratio": statistics.median(
                own / plain
                for own, plain in zip(rates[name][1:], rates[base[name]][1:], strict=True)
            ),
        }
        for name in rates
    ]


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    machine, repeats, batch = (
        result["machine"],
        result["arguments"]["repeats"],
        result["arguments"]["batch"],
    )
    lines = [
        "# Reading images",
        "",
        (
            f"`python benchmarks/throughput.py --repeats {repeats} --batch {batch}` on"
            f" {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']},"
            f" webdataset {webdataset.__version__}, commit {machine['commit']}. Medians of"
            f" {repeats}, one run."
        ),
        "",
        (
            "Images a second, decoded, resized and batched, by one thread unless it says two."
            " Ratio: to plain WebDataset, over HTTP to the same over HTTP; of two threads, to one."
        ),
        "",
        "| data | to px | reader | images/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['data']} | {row['size_px']} | {row['variant']} |"
            f" {row['images_per_second']:,.0f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
