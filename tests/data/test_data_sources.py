"""Every source becomes the same kind of dataset, checked: shards, folders, tables and
drawn tasks."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers_cases import for_every
from helpers_datasets import DIGITS, contents, labels_of, task_of
from PIL import Image

from pipeline.data import (
    Images,
    Reader,
    decode_image,
    prepare,
    read_index,
    read_shard,
    split_samples,
    write_shards,
)
from pipeline.data.drawn import drawn_source
from pipeline.data.sources import encode_png
from pipeline.errors import DataError, StorageError
from pipeline.specs import DrawnData


def image_of(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8))


def samples_of(labels: list[int], first: int = 0) -> list[tuple[str, bytes, int]]:
    return [
        (f"{number:06d}", image_of(first + number), label) for number, label in enumerate(labels)
    ]


# --- shards ---------------------------------------------------------------------------------------


def write_originals(folder: Path, train: list[int], test: list[int]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, "train", samples_of(train), 8)
    write_shards(folder, "test", samples_of(test, 1000), 8)
    return {
        "format": "shards",
        "train": str(folder / "train-*.tar"),
        "test": [str(folder / "test-000000.tar")],
    }


def test_shards_are_indexed_where_they_lie(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1, 2] * 7, [2, 1, 0])
    before = contents(tmp_path / "o")
    index = prepare(task_of(data), tmp_path / "p")
    assert contents(tmp_path / "o") == before
    assert list(contents(tmp_path / "p")) == ["index.json"]
    assert index.classes == ["0", "1", "2"]
    assert [shard.path for shard in index.splits["train"]] == [
        str(tmp_path / "o" / f"train-00000{number}.tar") for number in range(3)
    ]
    assert labels_of(index, "train") == [0, 1, 2] * 7
    assert read_index(tmp_path / "p") == index


def test_preparing_beside_the_originals_keeps_them(tmp_path: Path) -> None:
    data = write_originals(tmp_path, [0, 1] * 8, [0, 1])
    before = contents(tmp_path)
    prepare(task_of(data), tmp_path)
    with pytest.raises(StorageError, match=r"test-000000\.tar"):
        prepare(task_of(DIGITS), tmp_path)
    after = contents(tmp_path)
    assert after.pop("index.json")
    assert after == before


def test_class_names_from_a_list_or_a_file(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert prepare(task_of({**data, "classes": ["x", "y"]}), tmp_path / "p").classes == ["x", "y"]
    assert prepare(
        task_of({**data, "classes": str(tmp_path / "classes.txt")}), tmp_path / "p"
    ).classes == ["cat", "dog"]


def test_changed_originals_are_indexed_again(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    first = prepare(task_of(data), tmp_path / "p")
    write_originals(tmp_path / "o", [1, 0] * 8, [0, 1])
    second = prepare(task_of(data), tmp_path / "p")
    assert second.digest != first.digest
    # The same size and time of modification, but another content: the hash tells.
    path = tmp_path / "o" / "test-000000.tar"
    status = path.stat()
    path.write_bytes(
        path.read_bytes().replace(b"000000.cls", b"000000.cls"[:10]).replace(b"\n1", b"\n0")
    )
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(task_of(data), tmp_path / "p").digest == second.digest


def test_shards_in_an_object_store(tmp_path: Path) -> None:
    write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    for name, content in contents(tmp_path / "o").items():
        with fsspec.open(f"memory://data-prepare/{name}", "wb") as stream:
            stream.write(content)
    data = {
        "format": "shards",
        "train": "memory://data-prepare/train-*.tar",
        "test": "memory://data-prepare/test-000000.tar",
    }
    index = prepare(task_of(data), tmp_path / "p")
    local = prepare(task_of(write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])), tmp_path / "q")
    assert index.digest == local.digest
    assert prepare(task_of(data), tmp_path / "p") == index
    split = split_samples(index, 0.25, 0)["train"]
    assert Reader(tmp_path / "p", split, Images(8)).read(split.samples)[0].shape == (12, 3, 8, 8)


@for_every(
    ("train", "test", "classes", "message"),
    [
        (
            [0, 1, 5] * 6,
            [0],
            ["a", "b"],
            r"train-000000\.tar: 000002\.cls: label 5 is outside the 2 classes",
        ),
        ([0] * 16, [0], None, "at least two"),
        ([1] * 16, [1], None, "one class"),
        ([0, 1] * 8, [0, 2, 3], None, "test has classes without a training sample: 2, 3"),
        ([0, 1] * 2, [0], None, "fewer than recipe.training.batch_size = 4"),
        ([0] * 15 + [1], [0], None, "only one training sample of 1"),
        ([0, 1] * 8, [0], ["same", "same"], "different names"),
        ([0, 70000] * 8, [0], None, "too large"),
    ],
)
def test_unfit_data_is_refused(
    train: list[int], test: list[int], classes: list[str] | None, message: str, tmp_path: Path
) -> None:
    data = write_originals(tmp_path / "o", train, test)
    with pytest.raises(DataError, match=message):
        prepare(task_of({**data, "classes": classes}), tmp_path / "p")


def test_the_selection_batch_must_fit_too(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    with pytest.raises(DataError, match=r"selection\.batch_size = 16"):
        prepare(task_of(data, selection={"batch_size": 16}), tmp_path / "p")


def test_splits_must_not_share_shards(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    shutil.copy(tmp_path / "o" / "test-000000.tar", tmp_path / "copy.tar")
    with pytest.raises(DataError, match="same content"):
        prepare(task_of({**data, "val": str(tmp_path / "copy.tar")}), tmp_path / "p")


def test_an_undecodable_image_is_found_and_named(tmp_path: Path) -> None:
    data = write_originals(tmp_path / "o", [0, 1] * 8, [0, 1])
    write_shards(tmp_path / "o", "test", [("good", image_of(1), 0), ("bad", image_of(2)[:60], 1)])
    with pytest.raises(DataError, match=r"test-000000\.tar: bad: cannot be decoded"):
        prepare(task_of(data), tmp_path / "p")
    assert not (tmp_path / "p").exists()


# --- folders and manifests ------------------------------------------------------------------------


def write_folders(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    for name, count in classes.items():
        (root / name / "deeper").mkdir(parents=True)
        for number in range(count):
            stem = root / name / ("deeper" if number % 2 else "") / f"{number}"
            stem.with_suffix(".png").write_bytes(image_of(first + hash_of(name) + number))
    (root / "cat" / ".DS_Store").write_bytes(b"litter")
    return root


def hash_of(name: str) -> int:
    return sum(name.encode()) * 100


def folder_data(tmp_path: Path) -> dict[str, Any]:
    train = write_folders(tmp_path / "train", {"dog": 6, "cat": 9, "ant": 4})
    return {
        "format": "folder",
        "train": str(train),
        "test": str(write_folders(tmp_path / "test", {"cat": 3, "dog": 2}, 10**6)),
    }


def test_folders_become_shards(tmp_path: Path) -> None:
    data = folder_data(tmp_path)
    index = prepare(task_of(data), tmp_path / "p")
    assert index.classes == ["ant", "cat", "dog"]
    assert Counter(labels_of(index, "train")) == {0: 4, 1: 9, 2: 6}
    assert Counter(labels_of(index, "test")) == {1: 3, 2: 2}
    assert labels_of(index, "train") != sorted(labels_of(index, "train"))
    written = {
        (image, index.classes[label])
        for shard in index.splits["train"]
        for _, image, label in read_shard(str(tmp_path / "p" / shard.path))
    }
    assert written == {
        (path.read_bytes(), path.relative_to(tmp_path / "train").parts[0])
        for path in (tmp_path / "train").rglob("*.png")
    }


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    data = folder_data(tmp_path)
    prepare(task_of(data), tmp_path / "p")
    prepare(task_of(data), tmp_path / "q")
    assert contents(tmp_path / "p") == contents(tmp_path / "q")


@for_every(
    ("make", "message"),
    [
        (
            lambda root: (root / "train" / "cat" / "x.psd").write_bytes(b"8BPS"),
            r"x\.psd: not an image",
        ),
        (
            lambda root: (root / "train" / "cat" / "x.png").write_bytes(image_of(1)[:50]),
            r"x\.png: cannot be decoded",
        ),
        (lambda root: (root / "train" / "empty").mkdir(), "empty: this class has no images"),
        (
            lambda root: shutil.copytree(root / "test" / "cat", root / "test" / "cow"),
            "test has class folders that train lacks: cow",
        ),
        (lambda root: shutil.rmtree(root / "test"), "test: no such folder"),
        (
            lambda root: [shutil.rmtree(root / "test" / name) for name in ("cat", "dog")],
            "test: holds no folders",
        ),
    ],
)
def test_unfit_folders_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    data = folder_data(tmp_path)
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(task_of(data), tmp_path / "p")
    assert (
        sorted(path.name for path in tmp_path.iterdir() if path.name not in ("train", "test")) == []
    )


def test_one_folder_for_train_and_test_is_refused(tmp_path: Path) -> None:
    data = folder_data(tmp_path)
    with pytest.raises(DataError, match="given in test, and before that in train"):
        prepare(task_of({**data, "test": data["train"]}), tmp_path / "p")


def csv_data(
    tmp_path: Path, train: str | None = None, header: str = "path,label"
) -> dict[str, Any]:
    (tmp_path / "images").mkdir(exist_ok=True)
    for number in range(24):
        (tmp_path / "images" / f"{number}.png").write_bytes(image_of(number))
    lines = {"train": range(16), "test": range(16, 24)}
    for split, numbers in lines.items():
        rows = "".join(
            f'images/{number}.png,"{"red, deep" if number % 3 else "blue"}"\n' for number in numbers
        )
        (tmp_path / f"{split}.csv").write_text(
            header + "\n" + (train if train is not None and split == "train" else rows),
            encoding="utf-8-sig",
        )
    return {
        "format": "csv",
        "train": str(tmp_path / "train.csv"),
        "test": str(tmp_path / "test.csv"),
    }


def test_manifests_become_shards(tmp_path: Path) -> None:
    index = prepare(task_of(csv_data(tmp_path)), tmp_path / "p")
    assert index.classes == ["blue", "red, deep"]
    assert Counter(labels_of(index, "train")) == {0: 6, 1: 10}
    image_label = {
        image: label for _, image, label in read_shard(str(tmp_path / "p" / "test-000000.tar"))
    }
    assert image_label == {image_of(number): int(number % 3 > 0) for number in range(16, 24)}


def test_a_root_moves_the_images(tmp_path: Path) -> None:
    data = csv_data(tmp_path)
    shutil.move(tmp_path / "images", tmp_path / "else" / "images")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(task_of(data), tmp_path / "p")
    assert prepare(task_of({**data, "root": str(tmp_path / "else")}), tmp_path / "p").classes == [
        "blue",
        "red, deep",
    ]


@for_every(
    ("train", "header", "message"),
    [
        (None, "file,label", "no column path"),
        ("", "path,label", "lists no images"),
        ("images/0.png,\n", "path,label", "line 2.*expected both"),
        ("images/0.png\n", "path,label", "line 2.*expected both"),
        (
            'images/0.png,blue\nimages/./0.png,"red, deep"\n',
            "path,label",
            r"train\.csv: line 3: .*0\.png: given before, at .*train\.csv: line 2",
        ),
        (
            'images/16.png,blue\nimages/0.png,"red, deep"\n',
            "path,label",
            r"test\.csv: line 2: .*16\.png: given before, at .*train\.csv: line 2",
        ),
        ("images/none.png,blue\n", "path,label", r"test has labels that train lacks: red, deep"),
        (
            'images/none.png,blue\nimages/0.png,"red, deep"\n',
            "path,label",
            r"none\.png: cannot be read",
        ),
    ],
)
def test_unfit_manifests_are_refused(
    train: str | None, header: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(task_of(csv_data(tmp_path, train, header)), tmp_path / "p")


# --- digits and drawn tasks -----------------------------------------------------------------------


def test_digits_are_stratified_and_disjoint(tmp_path: Path) -> None:
    index = prepare(task_of(DIGITS), tmp_path / "p")
    assert index.classes == list("0123456789")
    assert set(Counter(labels_of(index, "train")).values()) <= {5, 6, 7}
    assert len(labels_of(index, "train")) == 60
    assert len(labels_of(index, "test")) == 40
    images = [
        image
        for split in ("train", "test")
        for _, image, _ in read_shard(str(tmp_path / "p" / f"{split}-000000.tar"))
    ]
    assert len(set(images)) == 100
    pixels = np.asarray(Image.open(io.BytesIO(images[0])))
    assert (pixels.shape, pixels.dtype) == ((8, 8), np.uint8)
    assert prepare(task_of({**DIGITS, "seed": 1}), tmp_path / "q").digest != index.digest


def test_too_many_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 1797"):
        prepare(
            task_of({"format": "digits", "train_samples": 1000, "test_samples": 1000}),
            tmp_path / "p",
        )


@pytest.mark.parametrize(("kind", "classes"), [("counting", 6), ("orientation", 8)])
def test_drawn_tasks_are_balanced_and_repeat(kind: str, classes: int, tmp_path: Path) -> None:
    data = {"format": "drawn", "kind": kind, "train_samples": 50, "test_samples": 50, "size_px": 16}
    index = prepare(task_of(data), tmp_path / "p")
    assert len(index.classes) == classes
    assert np.ptp(np.bincount(labels_of(index, "train"))) <= 1
    assert prepare(task_of(data), tmp_path / "q").digest == index.digest
    images = [
        image
        for split in ("train", "test")
        for _, image, _ in read_shard(str(tmp_path / "p" / f"{split}-000000.tar"))
    ]
    assert len(set(images)) == 100


def count_blobs(image: np.ndarray) -> int:
    """Connected regions that stand out from the median colour, by flood fill."""
    distance = np.abs(image.astype(int) - np.median(image, axis=(1, 2), keepdims=True)).sum(axis=0)
    outside, found = distance > 125, 0
    for start in zip(*np.nonzero(outside), strict=True):
        stack, size = [start], 0
        while stack:
            row, column = stack.pop()
            if (
                0 <= row < outside.shape[0]
                and 0 <= column < outside.shape[1]
                and outside[row, column]
            ):
                outside[row, column] = False
                size += 1
                stack += [
                    (row + 1, column),
                    (row - 1, column),
                    (row, column + 1),
                    (row, column - 1),
                ]
        found += size >= 12
    return found


def test_the_label_of_counting_is_the_number_of_blobs() -> None:
    samples = drawn_source(DrawnData(format="drawn", kind="counting", size_px=64)).splits["train"][
        :60
    ]
    right = [count_blobs(decode_image(sample.load(), 64)) == sample.label + 1 for sample in samples]
    assert np.mean(right) > 0.9


def angle_of(image: np.ndarray) -> float:
    """Direction along which brightness changes least, in degrees from the horizontal, by the
    structure tensor.
    """
    grey = image.astype(float).mean(axis=0)
    dy, dx = np.gradient(grey)
    across = 0.5 * np.arctan2(2 * (dx * dy).sum(), (dx**2 - dy**2).sum())
    return float(-np.degrees(across) + 90) % 180


def test_the_label_of_orientation_is_the_angle() -> None:
    samples = drawn_source(DrawnData(format="drawn", kind="orientation", size_px=64)).splits[
        "train"
    ][:64]
    errors = [
        (angle_of(decode_image(sample.load(), 64)) - 22.5 * sample.label + 90) % 180 - 90
        for sample in samples
    ]
    assert np.median(np.abs(errors)) < 6
