"""Masks from files to batches: every condition of a bad mask, pairs of files, shards, and masks
that move with their images.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import for_every
from helpers_datasets import task_of
from PIL import Image

from pipeline.data import Images, Reader, prepare, split_samples
from pipeline.data.masks import decode_mask
from pipeline.errors import DataError, SpecError
from pipeline.kinds import IGNORED
from pipeline.specs import Training
from pipeline.specs.faults import validate
from pipeline.specs.task import Task
from pipeline.training.mixing import mix

SIZE = (12, 10)  # width, height
NAMES = ["ground", "tree", "house"]
DATA: dict[str, Any] = {"format": "masks", "train": "train", "test": "test", "classes": NAMES}


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, form)
    return stream.getvalue()


def photo(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return encoded(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def numbers(highest: int = 2, dtype: Any = np.uint8) -> np.ndarray:
    """A mask in which every number up to `highest` occurs."""
    return (np.arange(SIZE[0] * SIZE[1]) % (highest + 1)).reshape(SIZE[1], SIZE[0]).astype(dtype)


def palette_png() -> bytes:
    image = Image.fromarray(numbers(), mode="P")
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def folder_of(root: Path, mask: bytes, name: str = "0.png", count: int = 12) -> None:
    """A dataset whose first training image has this mask, and the others good ones."""
    for split, first in (("train", 0), ("test", 100)):
        for number in range(first, first + count):
            for kind, content in (("images", photo(number)), ("masks", encoded(numbers()))):
                path = root / split / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    (root / "train/masks/0.png").unlink()
    (root / "train/masks" / name).write_bytes(mask)


def write_others(root: Path, settings: dict[str, Any]) -> None:
    """Masks of the other images that are good under the settings."""
    content = encoded(numbers())
    if "palette" in settings:
        content = encoded(np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    elif "classes" in settings:
        content = encoded(numbers(1) * (255 if "threshold" in settings else 1))
    for path in root.glob("*/masks/*.png"):
        if path.name != "0.png":
            path.write_bytes(content)


def prepared(folder: Path, **settings: Any) -> Any:
    data = {**DATA, "train": str(folder / "train"), "test": str(folder / "test"), **settings}
    return prepare(task_of(data, kind="segmentation"), folder / "prepared")


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint8)


BINARY = {"classes": ["ground", "tree"]}
RGB = np.stack([numbers()] * 3, axis=2)
GOOD: list[tuple[str, bytes, dict[str, Any], np.ndarray]] = [
    ("grey", encoded(numbers()), {}, numbers()),
    ("palette", palette_png(), {}, numbers()),
    ("16 bits", encoded(numbers(2, np.uint16)), {}, numbers()),
    ("one bit", encoded(numbers(1) * 255, mode="1"), BINARY, numbers(1)),
    ("ignored", encoded(np.where(numbers() == 1, 255, numbers()).astype(np.uint8)), {"ignore": 255},
     np.where(numbers() == 1, IGNORED, numbers())),
    ("ignored as 11", encoded(np.where(numbers() == 1, 11, numbers()).astype(np.uint8)),
     {"ignore": 11}, np.where(numbers() == 1, IGNORED, numbers())),
    ("ignored as 999", encoded(np.where(numbers() == 1, 999, numbers(2, int)).astype(np.uint16)),
     {"ignore": 999}, np.where(numbers() == 1, IGNORED, numbers())),
    ("one class", encoded(np.zeros_like(numbers())), {}, np.zeros_like(numbers())),
    ("threshold", encoded(grey_ramp()), {**BINARY, "threshold": 127}, grey_ramp() > 127),
    ("threshold of colours", encoded(np.stack([grey_ramp()] * 3, 2)),
     {**BINARY, "threshold": 127}, grey_ramp() > 127),
]  # fmt: skip
PALETTE = {"#000000": "ground", "#646464": "tree", "#c8c8c8": None}
GOOD += [
    ("colours", encoded(RGB * 100), {"palette": PALETTE},
     np.where(numbers() == 2, IGNORED, numbers())),
    ("several colours of a class", encoded(RGB * 100),
     {"palette": {**PALETTE, "#c8c8c8": "tree"}},
     np.minimum(numbers(), 1)),
]  # fmt: skip
BAD: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("unknown value", encoded(numbers(5)), {}, "values 3, 4, 5 are no classes; expected 0 to 2"),
    ("black and white", encoded(numbers(1) * 255), {}, "255 are no classes.*`threshold: 127`"),
    ("soft", encoded(grey_ramp()), {}, "and .* more are no classes"),
    ("over a byte", encoded(numbers(2, np.uint16) + 254), {}, "254, 255, 256 are no classes"),
    ("jpeg", encoded(numbers(), "JPEG"), {}, "a JPEG, whose values are not exact"),
    ("colours", encoded(RGB * 100), {}, "mode RGB; expected one class number per pixel"),
    ("unknown colours", encoded(RGB * 90), {"palette": PALETTE}, "#5a5a5a, #b4b4b4 are not in"),
    ("a JPEG of colours", encoded(RGB * 100, "JPEG"), {"palette": PALETTE}, "a JPEG, whose"),
    ("transparency", encoded(RGB, mode="RGBA"), {}, "mode RGBA"),
    ("grey with transparency", encoded(numbers(), mode="LA"), {}, "mode LA"),
    ("real numbers", encoded(numbers().astype(np.float32), "TIFF"), {}, "mode F; expected one"),
    ("another size", encoded(numbers().T.copy()), {}, "10 x 12 px, but its image has 12 x 10"),
    ("turned", encoded(numbers()[:, ::2].copy()), {}, "6 x 10 px, but its image has 12 x 10"),
    ("all ignored", encoded(np.full_like(numbers(), 255)), {"ignore": 255}, "every pixel is"),
    ("no image", b"%PDF-1.7 ...", {}, "a PDF document"),
    ("empty", b"", {}, "the file is empty"),
    ("cut short", encoded(numbers())[:50], {}, "cannot be decoded"),
    ("16 bits and a threshold", encoded(numbers(1, np.uint16) * 60000),
     {**BINARY, "threshold": 127}, "more than 8 bits"),
]  # fmt: skip


@for_every(("name", "mask", "settings", "expected"), GOOD)
def test_a_good_mask_has_the_right_value(
    name: str, mask: bytes, settings: dict[str, Any], expected: np.ndarray, tmp_path: Path
) -> None:
    tmp_path = tmp_path / name
    folder_of(tmp_path, mask)
    write_others(tmp_path, settings)
    index = prepared(tmp_path, **settings)
    members = dict(_members(tmp_path / "prepared/train-000000.tar"))
    masks = [content for name, content in members.items() if name.endswith(".mask.png")]
    kept = [decode for decode in map(_pixels, masks) if np.array_equal(decode, expected)]
    assert kept, "no mask was kept as expected"
    assert all(set(label) <= {0, 1, 2} for shard in index.shards for label in shard.labels)


@for_every(("name", "mask", "settings", "said"), BAD)
def test_a_bad_mask_is_named_with_what_is_wrong(
    name: str, mask: bytes, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tmp_path = tmp_path / name
    folder_of(tmp_path, mask)
    write_others(tmp_path, settings)
    with pytest.raises(DataError, match=rf"train/masks/0\.png: .*{said}"):
        prepared(tmp_path, **settings)


def _members(tar: Path) -> list[tuple[str, bytes]]:
    import tarfile

    with tarfile.open(tar) as archive:
        return [(each.name, archive.extractfile(each).read()) for each in archive]  # type: ignore[union-attr]


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_files_without_their_counterpart_are_all_named(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()), name="other.png")
    (tmp_path / "train/masks/1.png").rename(tmp_path / "train/masks/1.tif")
    (tmp_path / "train/masks/1.png").write_bytes(encoded(numbers()))
    (tmp_path / "train/images/2.jpg").write_bytes(photo(7))
    with pytest.raises(DataError) as error:
        prepared(tmp_path)
    text = str(error.value)
    assert "4 images cannot be used" in text
    for said in (
        "images/0.png: no mask; expected",
        "masks/other.png: a mask without an image",
        "images/1.png: two masks",
        "images/2.png: has the mask of",
    ):
        assert said in text


def test_masks_are_found_by_a_template_and_in_subfolders(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    for path in list(tmp_path.glob("*/masks/*.png")):
        (path.parent / "a").mkdir(exist_ok=True)
        path.rename(path.parent / "a" / f"{path.stem}_mask.png")
    for path in list(tmp_path.glob("*/images/*.png")):
        (path.parent / "a").mkdir(exist_ok=True)
        path.rename(path.parent / "a" / path.name)
    index = prepared(tmp_path, mask_name="{stem}_mask.png")
    assert [sum(shard.samples for shard in index.splits[split]) for split in ("train", "test")] == [
        12,
        12,
    ]
    assert index.classes == NAMES
    assert prepared(tmp_path, mask_name="{stem}_mask.png") == index


def test_a_split_may_be_a_table(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    by_folders = prepared(tmp_path)
    for split in ("train", "test"):
        names = sorted(path.name for path in (tmp_path / split / "images").iterdir())
        lines = [f"{split}/images/{name};{split}/masks/{name}" for name in names]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image;mask", *lines]))
    tables = {split: str(tmp_path / f"{split}.csv") for split in ("train", "test")}
    assert prepared(tmp_path, **tables).digest == by_folders.digest
    with pytest.raises(DataError, match="so mask_name would change nothing"):
        prepared(tmp_path, **tables, mask_name="{stem}.png")
    (tmp_path / "train/masks/3.png").unlink()
    (tmp_path / "train/images/4.png").unlink()
    with pytest.raises(DataError, match="2 images cannot be used") as error:
        prepared(tmp_path, **tables)
    assert "train.csv: line 8: " in str(error.value)
    twice = (tmp_path / "test.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([*twice, twice[-1]]))
    with pytest.raises(DataError, match="give each image once"):
        prepared(tmp_path, train=tables["test"])


def test_splits_may_be_lists_of_stems_in_two_folders(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    by_folders = prepared(tmp_path)
    for kind in ("images", "masks"):
        for split in ("train", "test"):
            (tmp_path / "voc" / kind / split).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / kind).rename(tmp_path / "voc" / kind / split)
    lists = {"root": str(tmp_path / "voc")}
    for split in ("train", "test"):
        names = sorted((tmp_path / "voc/images" / split).iterdir())
        lists[split] = str(tmp_path / f"{split}.txt")
        Path(lists[split]).write_text("\r\n".join(f"{split}/{name.stem}" for name in names) + "\n")
    assert prepared(tmp_path, **lists).digest == by_folders.digest

    with pytest.raises(DataError, match=r"train\.txt: a list of stems; expected `root`"):
        prepared(tmp_path, **{**lists, "root": None})
    with pytest.raises(DataError, match=r"a folder with `root`, whose splits are lists"):
        prepared(tmp_path, **{**lists, "test": str(tmp_path / "voc")})
    stems = Path(lists["train"]).read_text().split()
    Path(lists["train"]).write_text("\n".join([*stems, "train/none", "", stems[0]]))
    (tmp_path / "voc/masks" / f"{stems[1]}.png").unlink()
    with pytest.raises(DataError, match="3 images cannot be used") as error:
        prepared(tmp_path, **lists)
    for said in (
        f"train.txt: line {len(stems) + 3}: {stems[0]} is in line 1 as well",
        f"train.txt: line {len(stems) + 1}: train/none: no such image in",
        f"{stems[1]}.png: no mask; expected",
    ):
        assert said in str(error.value)


def test_a_changed_mask_is_prepared_again(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    first = prepared(tmp_path)
    (tmp_path / "train/masks/3.png").write_bytes(encoded(np.zeros_like(numbers())))
    assert prepared(tmp_path).digest != first.digest


def test_a_test_set_can_be_held_out(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    index = prepared(tmp_path, test=None, test_fraction=0.25)
    assert sum(shard.samples for shard in index.splits["test"]) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_name": "mask.png"}, "expected a file name with one {stem}"),
        ({"threshold": 127, "ignore": 255}, "ignore would change nothing"),
        ({"palette": {"#000000": "ground"}, "ignore": 255}, "ignore would change nothing"),
        ({"palette": {"black": "ground"}}, "palette"),
        ({"threshold": 300}, "threshold"),
        ({"classes": ["one"]}, "classes"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((SpecError, ValueError), match=said):
        task_of({**DATA, **settings}, kind="segmentation")


def test_a_palette_of_unknown_classes_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    with pytest.raises(DataError, match="palette: car not among the classes"):
        prepared(tmp_path, palette={"#000000": "car"})


def test_three_classes_and_a_threshold_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(numbers()))
    with pytest.raises(DataError, match="3 with a `threshold`"):
        prepared(tmp_path, threshold=127)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("classification", DATA, "write `kind: segmentation`"),
        ("segmentation", {"format": "digits"}, "needs masks"),
        ("segmentation", {"format": "drawn", "kind": "counting"}, "needs masks"),
        ("multilabel", {"format": "drawn", "kind": "shapes"}, "write `kind: segmentation`"),
    ],
)
def test_a_kind_and_its_data_must_agree(kind: str, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task_of(data, kind=kind)


def test_connections_are_ranked_by_the_loss_of_pixels() -> None:
    data = {"format": "drawn", "kind": "shapes"}
    assert task_of(data, kind="segmentation").selection.loss == "cross_entropy"
    assert task_of(data, kind="segmentation", selection={}).selection.loss == "cross_entropy"
    with pytest.raises(ValueError, match="loss contrastive is none of kind segmentation"):
        task_of(data, kind="segmentation", selection={"loss": "contrastive"})
    task = task_of(data, kind="segmentation", selection={"criterion": "magnitude"})
    assert Task.model_validate_json(task.model_dump_json()) == task
    classified = task_of({"format": "digits"})
    assert classified.selection.loss == "contrastive"
    assert isinstance(validate(Task, json.loads(classified.model_dump_json()), source="t"), Task)


def test_shards_with_masks_are_used_where_they_lie(tmp_path: Path) -> None:
    folder_of(tmp_path, encoded(np.where(numbers() == 1, 255, numbers()).astype(np.uint8)))
    written = prepared(tmp_path, ignore=255)
    shards = {split: str(tmp_path / f"prepared/{split}-000000.tar") for split in ("train", "test")}
    for classes in (NAMES, None):
        task = task_of({**shards, "classes": classes}, kind="segmentation")
        index = prepare(task, tmp_path / f"in-place-{classes is None}")
        assert [shard.labels for shard in index.shards] == [
            shard.labels for shard in written.shards
        ]
        assert len(index.classes) == 3
    with pytest.raises(DataError, match=r"mask\.png: the values 2 are no classes"):
        prepare(task_of({**shards, "classes": NAMES[:2]}, kind="segmentation"), tmp_path / "two")


def test_shards_without_masks_are_refused(tmp_path: Path) -> None:
    data = {"format": "digits", "train_samples": 40, "test_samples": 40}
    prepare(task_of(data), tmp_path / "digits")
    shards = {split: str(tmp_path / f"digits/{split}-*.tar") for split in ("train", "test")}
    with pytest.raises(DataError, match="no mask; expected a member with the same key"):
        prepare(task_of(shards, kind="segmentation"), tmp_path / "p")


# --- masks and images together --------------------------------------------------------------------


def checks(count: int = 8, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose brightness says the class of each pixel, and their masks."""
    rng = np.random.default_rng(1)
    masks = np.kron(rng.integers(0, 3, (count, 4, 4)), np.ones((side // 4, side // 4), int))
    images = np.repeat(masks[:, None] * 100, 3, axis=1)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(masks.astype(np.uint8))


def agreement(images: torch.Tensor, masks: torch.Tensor) -> float:
    shown = (images.mean(dim=1) * 255 / 100).round()
    return float((shown == masks).float().mean())


def test_masks_are_cropped_and_flipped_with_their_images() -> None:
    images, masks = checks()
    moved, targets = Images(8).augment(
        images, masks, torch.Generator().manual_seed(0), True, "crop"
    )
    assert targets.dtype == torch.uint8
    assert not torch.equal(targets, masks)
    assert agreement(moved, targets) > 0.9  # the rest are edges, which images blend
    assert agreement(moved, targets.flip(2)) < 0.7
    views, both = Images(8).two_views(images, masks, torch.Generator().manual_seed(0), True, "crop")
    assert agreement(views, both) > 0.9
    masks[:] = IGNORED
    assert (Images(8).augment(images, masks, torch.Generator(), True, "crop")[1] == IGNORED).all()


def test_labels_are_not_cropped() -> None:
    images, _ = checks(count=32)
    labels = torch.arange(32)
    many = torch.eye(32)
    for targets in (labels, many):
        found = Images(8).augment(images, targets, torch.Generator().manual_seed(0), True, "crop")[
            1
        ]
        assert found is targets


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_masks_are_mixed_as_their_images_are(way: str) -> None:
    from pipeline.kinds import kind_named

    images, masks = checks(side=16)
    soft = kind_named("segmentation").soft_targets(masks, 3)
    spec = Training.model_validate({way: 1.0})
    mixed, targets = mix(images, soft, spec, torch.Generator().manual_seed(3))
    expected = (targets * torch.tensor([0, 100, 200]).view(1, 3, 1, 1)).sum(1) / 255
    torch.testing.assert_close(mixed[:, 0], expected, atol=1e-5, rtol=0)
    assert not torch.equal(targets, soft)


def test_a_mask_is_resized_by_nearest_neighbour() -> None:
    found = decode_mask(encoded(numbers()), 7, "m")
    assert found.shape == (7, 7)
    assert set(np.unique(found)) <= {0, 1, 2}


def test_a_reader_gives_each_image_its_own_mask(tmp_path: Path) -> None:
    data = {"format": "drawn", "kind": "shapes", "train_samples": 24, "test_samples": 20}
    index = prepare(task_of({**data, "size_px": 32}, kind="segmentation"), tmp_path / "p")
    from pipeline.data.drawn_shapes import draw_shapes

    drawn = [draw_shapes(32, np.random.default_rng([0, 0, number])) for number in range(24)]
    split = split_samples(index, 0.25, 0)["trainval"]
    reader = Reader(tmp_path / "p", split, Images(32), targets=lambda masks: masks, has_masks=True)
    images, masks = reader.read(split.samples)
    found = {
        image.numpy().tobytes(): mask.numpy() for image, mask in zip(images, masks, strict=True)
    }
    assert len(found) == 24
    for image, mask in drawn:
        assert np.array_equal(found[image.transpose(2, 0, 1).tobytes()], mask)
    assert {number for _, mask in drawn for number in np.unique(mask)} == {0, 1, 2, 3}
