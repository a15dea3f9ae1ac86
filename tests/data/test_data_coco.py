"""COCO's layout as a source of masks: regions against slow references, overlaps and crowds by hand,
and every condition of a bad file.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_datasets import task_of
from PIL import Image

from pipeline.data import DataIndex, prepare, split_samples
from pipeline.data.regions import polygons_mask, runs_mask
from pipeline.data.stored import stored_samples
from pipeline.errors import DataError
from pipeline.kinds import IGNORED

WIDTH, HEIGHT = 12, 10


def compressed(runs: list[int]) -> str:
    """Run lengths in COCO's compressed form, number by number."""
    text = ""
    for number, run in enumerate(runs):
        rest = run - runs[number - 2] if number > 2 else run
        while True:
            digit, rest = rest & 31, rest >> 5
            is_last = rest == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if is_last else 32))
            if is_last:
                break
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    """The run lengths of a mask, pixel by pixel."""
    runs, current = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != current:
            runs.append(0)
            current = pixel
        runs[-1] += 1
    return runs


def test_run_lengths_give_the_mask_in_both_forms() -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        mask = np.kron(rng.random((8, 8)) < 0.5, np.ones((9, 9), bool))[:height, :width]
        mask = mask if number % 2 else rng.random((height, width)) < rng.random()
        runs = runs_of(mask)
        for counts in (runs, compressed(runs)):
            content = {"size": [height, width], "counts": counts}
            assert np.array_equal(runs_mask(content, height, width), mask)


def test_a_text_that_pycocotools_wrote_is_read() -> None:
    expected = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]], bool)
    assert compressed(runs_of(expected)) == "32110O2"
    assert np.array_equal(runs_mask({"size": [3, 5], "counts": "32110O2"}, 3, 5), expected)


def test_a_pixel_is_in_a_polygon_if_its_centre_is() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygon = (rng.random((int(rng.integers(3, 8)), 2)) * 30 - 5).round(2)
        expected = np.zeros((20, 24), bool)
        for row, column in np.ndindex(expected.shape):
            x, y = column + 0.5, row + 0.5
            for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                if (y1 <= y) != (y2 <= y) and x1 + (y - y1) / (y2 - y1) * (x2 - x1) <= x:
                    expected[row, column] ^= True
        assert np.array_equal(polygons_mask([polygon.ravel().tolist()], 20, 24), expected)
    square = polygons_mask([[2, 3, 6, 3, 6, 8, 2, 8]], HEIGHT, WIDTH)
    assert square[3:8, 2:6].all()
    assert square.sum() == 20


# --- files ----------------------------------------------------------------------------------------


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(image: int, category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    key = more.pop("id", 10 * image + category)
    own = {"id": key, "image_id": image, "category_id": category, "segmentation": segmentation}
    return {**own, **more}


def content_of(split: str) -> dict[str, Any]:
    """A file of twelve images: trees at the left and, on those with an even number, a house."""
    images = [
        {"id": number, "file_name": f"{split}{number}.png", "width": WIDTH, "height": HEIGHT}
        for number in range(1, 13)
    ]
    trees = [annotation(number, 7, [box(0, 0, 6, 10)]) for number in range(1, 13)]
    houses = [annotation(number, 3, [box(4, 2, 8, 4)]) for number in range(2, 13, 2)]
    categories = [{"id": 7, "name": "tree"}, {"id": 3, "name": "house"}]
    return {"images": images, "annotations": [*houses, *trees], "categories": categories}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(1, 13):
        for split in ("train", "test"):
            rng = np.random.default_rng([number, len(split)])
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
    return folder


def prepared(
    folder: Path, photos: Path, train: dict[str, Any] | None = None, **settings: Any
) -> DataIndex:
    """The dataset of two files, the first of which may be another."""
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"format": "coco", "images": str(photos)}
    for split, content in (("train", train or content_of("train")), ("test", content_of("test"))):
        data[split] = str(folder / f"{split}.json")
        Path(data[split]).write_text(json.dumps(content))
    return prepare(task_of({**data, **settings}, kind="segmentation"), folder / "prepared")


def mask_of(number: int, index: DataIndex, folder: Path, photos: Path) -> np.ndarray:
    """The mask of a training image, as it was prepared."""
    wanted = np.asarray(Image.open(photos / f"train{number}.png"))
    stored = stored_samples(folder / "prepared", split_samples(index, 0.2, 0)["trainval"])
    (mask,) = (
        mask
        for image, mask in stored
        if np.array_equal(np.asarray(Image.open(io.BytesIO(image))), wanted)
    )
    return mask


def test_annotations_become_masks_of_the_categories(tmp_path: Path, photos: Path) -> None:
    index = prepared(tmp_path, photos)
    assert index.classes == ["background", "house", "tree"], "categories by their ids"
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, :6] = 2
    assert np.array_equal(mask_of(1, index, tmp_path, photos), expected)
    expected[2:4, 4:8] = 1
    assert np.array_equal(mask_of(2, index, tmp_path, photos), expected), "the smaller lies on top"
    assert prepared(tmp_path, photos) == index
    changed = content_of("train")
    changed["annotations"].pop()
    assert prepared(tmp_path, photos, changed).digest != index.digest


def test_polygons_and_run_lengths_of_a_region_are_the_same(tmp_path: Path, photos: Path) -> None:
    index = prepared(tmp_path, photos)
    for as_text in (True, False):
        content = content_of("train")
        for each in content["annotations"]:
            runs = runs_of(polygons_mask(each["segmentation"], HEIGHT, WIDTH))
            counts = compressed(runs) if as_text else runs
            each["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
        folder = tmp_path / str(as_text)
        same = prepared(folder, photos, content)
        assert [shard.sha256 for shard in same.shards] == [shard.sha256 for shard in index.shards]


def test_crowds_are_not_counted_and_regions_lie_on_them(tmp_path: Path, photos: Path) -> None:
    content = content_of("train")
    everything = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    content["annotations"].append(annotation(1, 3, everything, iscrowd=1, id=999))
    content["annotations"].append(annotation(1, 3, [box(8, 0, 10, 1), box(9, 0, 12, 1)], id=1000))
    index = prepared(tmp_path, photos, content)
    expected = np.full((HEIGHT, WIDTH), IGNORED, np.uint8)
    expected[:, :6] = 2
    expected[0, 8:] = 1
    assert np.array_equal(mask_of(1, index, tmp_path, photos), expected)
    content["annotations"] = [each for each in content["annotations"] if each["id"] != 17]
    content["annotations"].pop()
    with pytest.raises(DataError, match=r"train1\.png: every pixel is of a crowd"):
        prepared(tmp_path / "all", photos, content)


def test_named_classes_are_the_masks_numbers(tmp_path: Path, photos: Path) -> None:
    index = prepared(tmp_path / "a", photos, classes=["ground", "tree", "house"])
    assert index.classes == ["ground", "tree", "house"]
    mask = mask_of(2, index, tmp_path / "a", photos)
    assert (mask[0, 0], mask[3, 5], mask[9, 11]) == (1, 2, 0)
    index = prepared(tmp_path / "b", photos, classes=["other", "house"])
    mask = mask_of(2, index, tmp_path / "b", photos)
    assert (mask[0, 0], mask[3, 5], mask[9, 11]) == (0, 1, 0)


def test_a_category_may_be_the_background(tmp_path: Path, photos: Path) -> None:
    content = content_of("train")
    content["categories"].append({"id": 9, "name": "background"})
    content["annotations"].append(annotation(1, 9, [box(0, 0, 2, 2)]))
    index = prepared(tmp_path, photos, content)
    assert index.classes == ["background", "house", "tree"]
    mask = mask_of(1, index, tmp_path, photos)
    assert (mask[1, 1], mask[2, 2]) == (0, 2)


def test_images_lie_beside_the_file_or_in_a_folder_for_each_split(
    tmp_path: Path, photos: Path
) -> None:
    index = prepared(tmp_path, photos)
    folders = dict.fromkeys(("train", "test"), str(photos))
    assert prepared(tmp_path / "a", photos, images=folders).splits == index.splits
    with pytest.raises(DataError, match="images: no folder for test"):
        prepared(tmp_path / "b", photos, images={"train": str(photos)})
    content = content_of("test")
    for number in range(1, 13):
        for split in ("train", "test"):
            (tmp_path / "c" / f"{split}{number}.png").parent.mkdir(exist_ok=True)
            own = (photos / f"{split}{number}.png").read_bytes()
            (tmp_path / "c" / f"{split}{number}.png").write_bytes(own)
    assert prepared(tmp_path / "c", photos, images=None).splits == index.splits
    assert content["images"]


RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
BAD: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("no annotations", ("annotations",), None, "has no list 'annotations' of objects"),
    ("no categories", ("categories",), {}, "has no list 'categories' of objects"),
    ("no images", ("images",), [], "lists no images"),
    ("a category without a name", ("categories", 0, "name"), 5, "category 1: expected a whole"),
    ("two categories of one id", ("categories", 1, "id"), 7, "category 2: id 7 or name 'house'"),
    ("an image without a file", ("images", 0, "file_name"), None, "image 1: expected an `id`"),
    ("two images of one id", ("images", 1, "id"), 1, "image 2: the id 1 is given before"),
    ("a missing file", ("images", 1, "file_name"), "no.png", "image 2: .*no.png: cannot be read"),
    ("a file of two images", ("images", 1, "file_name"), "train1.png", "give each image once"),
    ("another size", ("images", 0, "width"), 99, r"train1\.png: 12 x 10 px, but 99 x 10 in"),
    ("an unknown image", ("annotations", 0, "image_id"), 77, "annotation 23: image_id 77 is that"),
    ("no image", ("annotations", 0, "image_id"), None, "annotation 23: image_id None"),
    ("an unknown category", ("annotations", 0, "category_id"), 4, "23: category_id 4 is that of"),
    ("a doubtful crowd", ("annotations", 0, "iscrowd"), 2, "annotation 23: iscrowd is 2"),
    ("a box alone", ("annotations", 0, "segmentation"), None, "23: no segmentation; a box alone"),
    ("no polygon", ("annotations", 0, "segmentation"), [], "23: no segmentation"),
    ("a flat polygon", ("annotations", 0, "segmentation"), box(0, 0, 2, 2), "polygon 1 is no list"),
    ("two points", ("annotations", 0, "segmentation"), [[0, 0, 1, 1]], "23: polygon 1 is no list"),
    ("an odd number", ("annotations", 0, "segmentation"), [[0] * 7], "23: polygon 1 is no list"),
    ("text", ("annotations", 0, "segmentation"), [["0"] * 6], "23: polygon 1 is no list"),
    ("infinite", ("annotations", 0, "segmentation"), [[1e999] * 6], "that is not finite"),
    ("runs of another size", ("annotations", 0, "segmentation"), {**RUNS, "size": [12, 10]},
     r"23: its size is \[12, 10\]; the image has \[10, 12\]"),
    ("too few pixels", ("annotations", 0, "segmentation"), {**RUNS, "counts": [3, 4]},
     "23: its runs cover 7 pixels"),
    ("a negative run", ("annotations", 0, "segmentation"), {**RUNS, "counts": [-1, 121]},
     "23: its counts are neither"),
    ("a fraction", ("annotations", 0, "segmentation"), {**RUNS, "counts": [0.5, 119.5]},
     "23: its counts are neither"),
    ("strange characters", ("annotations", 0, "segmentation"), {**RUNS, "counts": "a ~"},
     "23: its counts hold characters"),
    ("a number cut short", ("annotations", 0, "segmentation"), {**RUNS, "counts": "0P"},
     "23: its counts end within"),
    ("a negative run as text", ("annotations", 0, "segmentation"),
     {**RUNS, "counts": compressed([-1, 121])}, "23: its runs cover"),
    ("a huge number", ("annotations", 0, "segmentation"), {**RUNS, "counts": "o" * 20 + "1"},
     "23: its counts hold a number that is too large"),
]  # fmt: skip


@for_every(("name", "place", "value", "said"), BAD)
def test_a_bad_file_is_named_with_what_is_wrong(
    name: str, place: tuple[Any, ...], value: Any, said: str, tmp_path: Path, photos: Path
) -> None:
    content: Any = content_of("train")
    spot = content
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    with pytest.raises(DataError, match=said) as error:
        prepared(tmp_path / name, photos, content)
    assert "train.json" in str(error.value) or "train1.png" in str(error.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path, photos: Path) -> None:
    prepared(tmp_path, photos)
    data = {split: str(tmp_path / f"{split}.json") for split in ("train", "test")}
    task = task_of({"format": "coco", "images": str(photos), **data}, kind="segmentation")
    for text, said in (("{", "not valid JSON"), ("[]", "has no list 'images'")):
        Path(data["test"]).write_text(text)
        with pytest.raises(DataError, match=rf"test\.json: {said}"):
            prepare(task, tmp_path / "other")
    Path(data["test"]).unlink()
    with pytest.raises(DataError, match=r"test\.json"):
        prepare(task, tmp_path / "other")


def test_classes_and_categories_must_agree(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match=r"classes: car no categories of .*train\.json"):
        prepared(tmp_path / "a", photos, classes=["ground", "car"])
    fewer = content_of("train")
    fewer["categories"] = [each for each in fewer["categories"] if each["name"] == "tree"]
    fewer["annotations"] = [each for each in fewer["annotations"] if each["category_id"] == 7]
    with pytest.raises(DataError, match=r"test\.json: the categories house are not in train"):
        prepared(tmp_path / "b", photos, fewer)
    with pytest.raises(ValueError, match="write `kind: segmentation`"):
        task_of({"format": "coco", "train": "a.json", "test": "b.json"})
    many = content_of("train")
    many["categories"] += [{"id": 100 + n, "name": f"class {n}"} for n in range(254)]
    with pytest.raises(DataError, match="classes: 257 of them"):
        prepared(tmp_path / "c", photos, many)
