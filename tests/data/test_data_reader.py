"""The reader against decoding sample by sample; the cache; augmentation against its own bounds."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import (
    DataIndex,
    Images,
    Reader,
    augment,
    decode_image,
    read_shard,
    split_samples,
    two_views,
    write_shards,
)
from pipeline.data import reader as reader_module
from pipeline.data.reader import CACHE
from pipeline.data.sources import encode_png
from pipeline.errors import DataError
from pipeline.specs import Augmentation

SIZE_PX = 8
SHARD_BYTES = 10 * (3 * SIZE_PX * SIZE_PX + 1)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    torch.set_num_threads(1)
    CACHE.clear()
    yield
    CACHE.clear()


def dataset(folder: Path, shards: int = 3, seed: int = 0) -> DataIndex:
    rng = np.random.default_rng(seed)
    samples = [
        (f"{number:06d}", encode_png(rng.integers(0, 256, (9, 7, 3), np.uint8)), number % 2)
        for number in range(10 * shards)
    ]
    folder.mkdir(exist_ok=True)
    return DataIndex(
        classes=["a", "b"],
        splits={
            "train": write_shards(folder, "train", samples, 10),
            "test": write_shards(folder, "test", samples[:2]),
        },
    )


def test_batches_are_the_decoded_samples(tmp_path: Path) -> None:
    split = split_samples(dataset(tmp_path), 0.3, 0)["train"]
    chosen = np.random.default_rng(1).permutation(split.samples)[:13]
    images, labels = Reader(tmp_path, split, Images(SIZE_PX)).read(chosen)
    assert (images.dtype, images.shape, labels.dtype) == (
        torch.uint8,
        (13, 3, SIZE_PX, SIZE_PX),
        torch.int64,
    )
    stored = [list(read_shard(str(tmp_path / shard.path))) for shard in split.shards]
    for row, (number, position) in enumerate(chosen):
        _, content, label = stored[number][position]
        assert np.array_equal(images[row].numpy(), decode_image(content, SIZE_PX))
        assert labels[row] == label


def test_the_cache_is_bounded_and_drops_the_least_recently_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = dataset(tmp_path)
    opened: list[str] = []
    reader = Reader(tmp_path, index.splits["train"], Images(SIZE_PX), cache_bytes=2 * SHARD_BYTES)
    find = reader_module.open_shard
    monkeypatch.setattr(
        reader_module,
        "open_shard",
        lambda folder, entry, *rest: (opened.append(entry.path[-5]), find(folder, entry, *rest))[1],
    )
    for number in (0, 1, 0, 2, 0, 1):
        reader.read(np.array([[number, 0]]))
        assert CACHE.size_bytes() <= 2 * SHARD_BYTES
    assert opened == ["0", "1", "2", "1"]


def test_a_shard_larger_than_the_bound_is_still_read(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    reader = Reader(tmp_path, index.splits["train"], Images(SIZE_PX), cache_bytes=1)
    assert len(reader.read(np.array([[0, 0], [1, 0], [2, 9]]))[0]) == 3
    assert CACHE.size_bytes() == SHARD_BYTES


def test_same_names_in_two_folders_are_not_confused_and_same_content_is_shared(
    tmp_path: Path,
) -> None:
    chosen = np.array([[0, 0]])
    first, second, copy = (
        dataset(tmp_path / "a"),
        dataset(tmp_path / "b", seed=1),
        dataset(tmp_path / "c"),
    )
    images = [
        Reader(tmp_path / name, index.splits["train"], Images(SIZE_PX)).read(chosen)[0]
        for name, index in zip("abc", (first, second, copy), strict=True)
    ]
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert CACHE.size_bytes() == 2 * SHARD_BYTES
    reader = Reader(tmp_path / "a", first.splits["train"], Images(4))
    assert reader.read(chosen)[0].shape == (1, 3, 4, 4)


def test_what_a_batch_holds_is_its_own(tmp_path: Path) -> None:
    reader = Reader(tmp_path, dataset(tmp_path).splits["train"], Images(SIZE_PX))
    chosen = np.array([[0, 0], [0, 1]])
    before = reader.read(chosen)[0].clone()
    reader.read(chosen)[0].zero_()
    assert torch.equal(reader.read(chosen)[0], before)


def test_changed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    reader = Reader(tmp_path, index.splits["train"], Images(SIZE_PX))
    path = tmp_path / index.splits["train"][0].path
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000000\.tar: damaged.*prepare the dataset again"):
        reader.read(np.array([[0, 0]]))
    path.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: no such file"):
        reader.read(np.array([[0, 0]]))


def test_a_shard_that_cannot_be_read_is_read_again_when_it_can(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    reader = Reader(tmp_path, index.splits["train"], Images(SIZE_PX))
    path = tmp_path / index.splits["train"][0].path
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no such file"):
        reader.read(np.array([[0, 0]]))
    (tmp_path / "elsewhere").rename(path)
    assert len(reader.read(np.array([[0, 0]]))[0]) == 1


def test_the_same_content_is_read_from_where_this_reader_has_it(tmp_path: Path) -> None:
    chosen = np.array([[0, 0]])
    index = dataset(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    takes = Images(SIZE_PX)
    Reader(tmp_path / "first", index.splits["train"], takes).read(chosen)
    shutil.rmtree(tmp_path / "first")
    second = Reader(tmp_path / "second", index.splits["train"], takes)
    assert len(second.read(np.array([[0, 1], [0, 0]]))[0]) == 2


def test_a_shard_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    index = dataset(tmp_path)
    reader = Reader(tmp_path, index.splits["train"], Images(SIZE_PX))
    first = reader.read(np.array([[0, 0]]))[0]
    path = tmp_path / index.splits["train"][0].path
    path.write_bytes(bytes(reversed(path.read_bytes())))
    assert torch.equal(reader.read(np.array([[0, 0]]))[0], first)
    with pytest.raises(DataError, match="has changed while it was in use; prepare the dataset"):
        reader.read(np.array([[0, 1]]))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        reader.read(np.array([[0, 1]]))


# --- augmentation ---------------------------------------------------------------------------------


def batch(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_augmentation_repeats_with_the_generator() -> None:
    first, again, other = (
        augment(batch(), torch.Generator().manual_seed(seed), True) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.dtype, first.shape) == (torch.float32, (6, 3, 16, 16))
    assert first.min() >= 0
    assert first.max() <= 1


def test_bytes_and_floats_agree_and_the_input_stays() -> None:
    images = batch()
    before = images.clone()
    floats = augment(images.float() / 255, torch.Generator().manual_seed(0), True)
    assert torch.equal(augment(images, torch.Generator().manual_seed(0), True), floats)
    assert torch.equal(images, before)


def test_two_views_of_each_image() -> None:
    images = batch()
    views = two_views(images, torch.Generator().manual_seed(0), False)
    assert views.shape == (12, 3, 16, 16)
    first, second = views.chunk(2)
    assert not torch.equal(first, second)
    # Smooth images survive crop and jitter: view i of both halves is closest to image i.
    levels = torch.linspace(40, 200, 6).view(6, 1, 1, 1).expand(6, 3, 16, 16) * torch.tensor(
        [1.0, 0.5, 0.2]
    ).view(1, 3, 1, 1)
    plain = two_views(
        levels.to(torch.uint8), torch.Generator().manual_seed(0), False
    )  # the default: every kind of change
    assert torch.allclose(plain.std(dim=(2, 3)), torch.zeros(12, 3), atol=1e-4)


def horizontal_slopes(flip: bool) -> torch.Tensor:
    ramp = torch.linspace(0.2, 0.6, 16).expand(200, 3, 16, 16)
    views = augment(ramp, torch.Generator().manual_seed(0), flip)
    return views[:, 0, :, -1].mean(1) - views[:, 0, :, 0].mean(1)


def test_mirrors_only_where_allowed() -> None:
    assert (horizontal_slopes(flip=False) > 0).all()
    mirrored = (horizontal_slopes(flip=True) < 0).float().mean()
    assert 0.35 < mirrored < 0.65


def relative_crops(kind: Augmentation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widths, heights and centres of 300 crops, as fractions of the image, read from its
    coordinates.
    """
    columns = torch.linspace(0, 1, 64).expand(64, 64)
    coordinates = torch.stack([columns, columns.T, columns]).expand(300, 3, 64, 64)
    views = augment(coordinates, torch.Generator().manual_seed(0), True, kind)
    widths = (views[:, 0, 0, -1] - views[:, 0, 0, 0]).abs() * 64 / 63
    return widths, (views[:, 1, -1, 0] - views[:, 1, 0, 0]) * 64 / 63, views[:, :2].mean(dim=(2, 3))


@pytest.mark.parametrize(("kind", "smallest"), [("light", 0.5), ("crop", 0.08)])
def test_crops_cover_the_stated_share_of_the_image(
    kind: Augmentation, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("pipeline.data.augment"), "JITTER", 0.0)
    widths, heights, centres = relative_crops(kind)
    area = widths * heights
    assert smallest * 0.9 < area.min() < smallest + 0.1
    assert area.max() > 0.85
    assert (widths / heights).min() > 0.7
    assert (widths / heights).max() < 1.4
    assert centres.std() > 0.03


def test_an_unaugmented_batch_is_the_images_themselves() -> None:
    images = batch()
    assert torch.equal(
        augment(images, torch.Generator().manual_seed(0), True, "none"), images.float() / 255
    )
