"""List files and JSON splits: the benchmarks' own layouts are read as they are published, and what
is wrong in them is named by line or key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_cli import taskpack, write_task
from helpers_datasets import task_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pipeline.cli.progress import BatchProgress
from pipeline.data import DataIndex, prepare, read_shard, split_samples, untrained_classes
from pipeline.data.listed import json_source, lists_source
from pipeline.errors import DataError
from pipeline.specs import JsonData, ListsData

Labelled = list[tuple[str, int]]

TRAIN, VAL, TEST = (
    [0, 1, 3, 3, 0, 1, 1, 3],
    [0, 1, 2],
    [2, 3, 1, 0, 0],
)  # class 2 of 4 is not in train


def write_jpeg(path: Path) -> None:
    """A JPEG that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(path).encode())).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def write_vtab(root: Path) -> dict[str, Any]:
    """A task of VTAB-1k with fewer images, in the layout that NOAH's script writes."""
    for split, labels in {
        "train800": TRAIN,
        "val200": VAL,
        "train800val200": TRAIN + VAL,
        "test": TEST,
    }.items():
        paths = [f"images/{split}/{number:06d}.jpg" for number in range(len(labels))]
        for path in paths:
            write_jpeg(root / path)
        (root / f"{split}.txt").write_text(
            "".join(f"{path} {label}\n" for path, label in zip(paths, labels, strict=True))
        )
    return {"format": "lists", "root": str(root), "classes": 4}


def write_fgvc(
    root: Path, ids: tuple[int, ...] = (0, 1, 2, 3), images: str = "images"
) -> dict[str, Any]:
    """A task with VPT's splits: images in a folder a class, JSON files beside them; `ids` are the
    labels that stand for the classes.
    """
    for split, labels in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        paths = {
            f"{label:03d}.kind/{split}_{number}.jpg": ids[label]
            for number, label in enumerate(labels)
        }
        for path in paths:
            write_jpeg(root / images / path)
        (root / f"{split}.json").write_text(json.dumps(paths))
    return {"format": "json", "root": str(root), "classes": 4, "images": images}


def images_of(index: DataIndex, folder: Path, split: Any) -> set[tuple[bytes, int]]:
    return {
        (image, label)
        for shard in index.splits[split]
        for _, image, label in read_shard(str(folder / shard.path))
    }


def refusal(source: Callable[[Any], Any], data: Any) -> str:
    with pytest.raises(DataError) as caught:
        source(data)
    return str(caught.value)


# --- list files -----------------------------------------------------------------------------------


def test_a_task_of_vtab_is_read_as_its_lists_say(tmp_path: Path) -> None:
    index = prepare(task_of(write_vtab(tmp_path / "dtd")), tmp_path / "p")
    assert index.classes == ["0", "1", "2", "3"]
    for split, folder, labels in (
        ("train", "train800", TRAIN),
        ("val", "val200", VAL),
        ("test", "test", TEST),
    ):
        expected = {
            ((tmp_path / f"dtd/images/{folder}/{row:06d}.jpg").read_bytes(), label)
            for row, label in enumerate(labels)
        }
        assert images_of(index, tmp_path / "p", split) == expected
    assert len(split_samples(index, 0.2, 0)["trainval"]) == len(TRAIN + VAL)


def test_a_class_that_train_lacks_stays_a_class_and_is_named(tmp_path: Path) -> None:
    index = prepare(task_of(write_vtab(tmp_path / "dtd")), tmp_path / "p")
    assert untrained_classes(index) == ["2"]
    assert 2 in {label for shard in index.splits["test"] for label in shard.labels}


def test_a_train_list_of_one_class_is_still_refused(tmp_path: Path) -> None:
    data = write_vtab(tmp_path / "dtd")
    lines = (tmp_path / "dtd/train800.txt").read_text().splitlines()
    (tmp_path / "dtd/train800.txt").write_text("\n".join(line[:-1] + "1" for line in lines))
    with pytest.raises(DataError, match="all training samples are of one class"):
        prepare(task_of(data), tmp_path / "p")


def test_without_a_validation_list_some_of_train_is_held_out(tmp_path: Path) -> None:
    data = write_vtab(tmp_path / "dtd")
    index = prepare(task_of({**data, "val": None}, val_fraction=0.4), tmp_path / "p")
    splits = split_samples(index, 0.4, 0)
    assert (len(splits["train"]), len(splits["val"])) == (5, 3)
    assert set(splits["val"].labels) == {0, 1, 3}


def test_class_names_instead_of_their_number(tmp_path: Path) -> None:
    data = write_vtab(tmp_path / "dtd")
    (tmp_path / "names.txt").write_text("banded\nblotchy\nbraided\nbubbly\n")
    assert prepare(task_of({**data, "classes": ["a", "b", "c", "d"]}), tmp_path / "p").classes == [
        "a",
        "b",
        "c",
        "d",
    ]
    index = prepare(task_of({**data, "classes": str(tmp_path / "names.txt")}), tmp_path / "p")
    assert untrained_classes(index) == ["braided"]


def test_few_shot_lists_lie_apart_from_their_images(tmp_path: Path) -> None:
    """NOAH's layout: lists in `annotations`, paths from `images`, with spaces, carriage returns and
    no last line end as they come.
    """
    for name in ("a cat.jpg", "dog.jpg", "v/cat.jpg", "t/dog.jpg"):
        write_jpeg(tmp_path / "images" / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.num_shot_1.seed_0").write_bytes(b"a cat.jpg 0\r\ndog.jpg 1")
    (tmp_path / "annotations/val_meta.list").write_text("v/cat.jpg 0\n\n")
    (tmp_path / "annotations/test_meta.list").write_text("t/dog.jpg\t1\n")
    names = {
        "train": "annotations/train.num_shot_1.seed_0",
        "val": "annotations/val_meta.list",
        "test": "annotations/test_meta.list",
    }
    source = lists_source(
        ListsData(format="lists", root=str(tmp_path), images="images", classes=2, **names)
    )
    read = {
        split: [
            (Path(sample.name).relative_to(tmp_path / "images").as_posix(), sample.label)
            for sample in samples
        ]
        for split, samples in source.splits.items()
    }
    assert read == {
        "train": [("a cat.jpg", 0), ("dog.jpg", 1)],
        "val": [("v/cat.jpg", 0)],
        "test": [("t/dog.jpg", 1)],
    }


def test_an_image_listed_twice_is_refused_unless_repeats_are_allowed(tmp_path: Path) -> None:
    data = write_vtab(tmp_path)
    train = tmp_path / "train800.txt"
    train.write_text(train.read_text() * 2)
    message = refusal(lists_source, ListsData(**data))
    assert message.startswith(
        f"{train}: line 9: {tmp_path}/images/train800/000000.jpg: given before, at {train}:"
        " line 1; "
    )
    assert [
        sample.label for sample in lists_source(ListsData(**data, repeats=True)).splits["train"]
    ] == TRAIN


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("train800.txt", "images/train800/000000.jpg 3"),
        ("test.txt", "./images/val200/000000.jpg 0"),
    ],
)
def test_repeats_never_excuse_two_labels_or_two_splits(
    file: str, line: str, tmp_path: Path
) -> None:
    data = write_vtab(tmp_path)
    with (tmp_path / file).open("a") as stream:
        stream.write(line + "\n")
    message = refusal(lists_source, ListsData(**data, repeats=True))
    assert message.startswith(f"{tmp_path / file}: line ")
    assert "given before" in message


@for_every(
    ("line", "words"),
    [
        (
            "images/test/000000.jpg",
            "line 3: 'images/test/000000.jpg' has no label; expected `path label`",
        ),
        ("7", "line 3: '7' has no label"),
        (
            "images/test/000000.jpg cat",
            "line 3: the label is 'cat'; expected a whole number from 0",
        ),
        ("images/test/000000.jpg -1", "line 3: the label is '-1'"),
        ("images/test/000000.jpg 1.0", "line 3: the label is '1.0'"),
        ("images/test/000000.jpg ²", "line 3: the label is '²'"),
        ("images/test/000000.jpg 1" + "0" * 5000, "line 3: the label is '1000"),
        ("images/test/000000.jpg 4", "line 3: label 4 is outside the 4 classes; expected 0 to 3"),
        ("images/te\0st.jpg 0", "line 3: holds a NUL character"),
        (
            "images/test/000009.jpg 0",
            (
                "images/test/000009.jpg: cannot be read (No such file or directory); add the image,"
                " or remove it"
            ),
        ),
    ],
)
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    data = write_vtab(tmp_path)
    (tmp_path / "test.txt").write_text(f"images/test/000001.jpg 3\n\n{line}\n", encoding="utf-8")
    message = refusal(lists_source, ListsData(**data))
    assert message.startswith(f"{tmp_path / 'test.txt'}: line 3: ")
    assert words in message


def test_bad_list_files_are_named(tmp_path: Path) -> None:
    data = ListsData(**write_vtab(tmp_path))
    file = tmp_path / "val200.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert (
        refusal(lists_source, data)
        == f"{file}: line 1: byte 0x00 is not UTF-8 text; expected the names of a split's images"
        " with their labels; save it as UTF-8"
    )
    file.write_text("\n  \n")
    assert refusal(lists_source, data) == f"{file}: lists no images; expected lines of `path label`"
    file.unlink()
    assert refusal(lists_source, data).startswith(f"{file}: no such file; ")
    file.mkdir()
    assert refusal(lists_source, data).startswith(f"{file}: cannot be read (Is a directory); ")


def test_a_dataset_that_is_not_there_says_where_it_comes_from(tmp_path: Path) -> None:
    data = {"format": "lists", "root": str(tmp_path / "dtd"), "classes": 47}
    with pytest.raises(
        DataError,
        match=(
            "no such folder; expected the dataset of t, with its list of images for each split; it"
            " comes from https://x"
        ),
    ):
        prepare(task_of(data, about={"source": "https://x"}), tmp_path / "p")
    with pytest.raises(DataError, match=r"for each split$"):
        prepare(task_of({**data, "format": "json"}), tmp_path / "p")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    data = write_vtab(tmp_path / "dtd")
    (tmp_path / "dtd/images/test/000002.jpg").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"images/test/000002\.jpg: cannot be decoded"):
        prepare(task_of(data), tmp_path / "p")


def test_a_changed_list_or_image_is_prepared_again(tmp_path: Path) -> None:
    data = write_vtab(tmp_path / "dtd")
    first = prepare(task_of(data), tmp_path / "p")
    assert prepare(task_of(data), tmp_path / "p") == first
    file = tmp_path / "dtd/test.txt"
    file.write_text(file.read_text().replace("000000.jpg 2", "000000.jpg 1"))
    second = prepare(task_of(data), tmp_path / "p")
    assert second.digest != first.digest
    write_jpeg(tmp_path / "other.jpg")
    (tmp_path / "other.jpg").rename(tmp_path / "dtd/images/test/000000.jpg")
    assert prepare(task_of(data), tmp_path / "p").digest != second.digest


# --- JSON splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["images", ""])
def test_a_task_of_fgvc_is_read_as_its_splits_say(images: str, tmp_path: Path) -> None:
    index = prepare(task_of(write_fgvc(tmp_path / "cub", images=images)), tmp_path / "p")
    for split in ("train", "val", "test"):
        listed = json.loads((tmp_path / f"cub/{split}.json").read_text())
        expected = {
            ((tmp_path / "cub" / images / path).read_bytes(), label)
            for path, label in listed.items()
        }
        assert images_of(index, tmp_path / "p", split) == expected
    assert index.classes == ["0", "1", "2", "3"]
    assert untrained_classes(index) == ["2"]


def test_labels_with_gaps_are_numbered_in_order_over_all_splits(tmp_path: Path) -> None:
    source = json_source(JsonData(**write_fgvc(tmp_path, ids=(1, 7, 500, 1010))))
    assert source.classes == ["1", "7", "500", "1010"]
    assert {
        split: [sample.label for sample in samples] for split, samples in source.splits.items()
    } == {"train": TRAIN, "val": VAL, "test": TEST}
    assert json_source(
        JsonData(**{**write_fgvc(tmp_path, ids=(1, 2, 3, 4)), "classes": list("abcd")})
    ).classes == list("abcd")


def test_labels_below_the_number_of_classes_are_not_renumbered(tmp_path: Path) -> None:
    data = write_fgvc(tmp_path, ids=(0, 2, 4, 5)) | {"classes": 6}
    assert [sample.label for sample in json_source(JsonData(**data)).splits["val"]] == [0, 2, 4]


def test_labels_that_are_too_many_or_too_few_are_refused(tmp_path: Path) -> None:
    data = write_fgvc(tmp_path, ids=(1, 2, 3, 4))
    message = refusal(json_source, JsonData(**data | {"classes": 3}))
    assert (
        message
        == f"{tmp_path / 'train.json'}: '003.kind/train_2.jpg': label 4 is outside the 3 classes; "
        "expected 0 to 2, or 3 different labels in all splits together (there are 4)"
    )
    (tmp_path / "train.json").write_text('{"003.kind/train_2.jpg": 9, "000.kind/train_0.jpg": 1}')
    (tmp_path / "val.json").write_text('{"000.kind/val_0.jpg": 1}')
    (tmp_path / "test.json").write_text('{"002.kind/test_0.jpg": 2}')
    assert "label 9 is outside the 4 classes" in refusal(json_source, JsonData(**data))


@for_every(
    ("text", "words"),
    [
        ("[1, 2]", "holds list; expected an object of image paths and labels"),
        ("3", "holds int; expected an object"),
        ("{}", "holds an empty object"),
        ("{", "not valid JSON ("),
        ("", "not valid JSON ("),
        ("[" * 100_000, "not valid JSON ("),
        ('{"a.jpg": ' + "1" * 5000 + "}", "not valid JSON ("),
        (
            '{"000.kind/test_3.jpg": "cat"}',
            "'000.kind/test_3.jpg': the label is 'cat'; expected a whole number from 0",
        ),
        ('{"000.kind/test_3.jpg": true}', "the label is True; expected a whole number"),
        ('{"000.kind/test_3.jpg": 1.0}', "the label is 1.0; expected a whole number"),
        ('{"000.kind/test_3.jpg": -1}', "the label is -1; expected a whole number"),
        ('{"000.kind/test_3.jpg": null}', "the label is None; expected a whole number"),
        (
            '{"000.kind/test_3.jpg": {"label": 0}}',
            "the label is a list or an object; expected a whole number",
        ),
        (r'{"\ud800": 0}', "holds what no path can"),
        ('{"a.jpg": 0}', "a.jpg: cannot be read (No such file or directory)"),
        (
            '{"000.kind/test_3.jpg": 0, "000.kind/test_3.jpg": 0}',
            "given before, at {file}: '000.kind/test_3.jpg'; give each image once",
        ),
        (
            '{"000.kind/train_0.jpg": 0}',
            "given before, at {folder}/train.json: '000.kind/train_0.jpg'",
        ),
    ],
)
def test_a_bad_json_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    data = write_fgvc(tmp_path)
    file = tmp_path / "test.json"
    file.write_text(text)
    message = refusal(json_source, JsonData(**data))
    assert message.startswith(f"{file}: ")
    assert words.replace("{file}", str(file)).replace("{folder}", str(tmp_path)) in message


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    data = write_fgvc(tmp_path)
    (tmp_path / "val.json").unlink()
    assert refusal(json_source, JsonData(**data)).startswith(
        f"{tmp_path / 'val.json'}: no such file; "
    )


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text('{}[]":,ab01.\\ \nenu-', max_size=60).map(str.encode)
    )
)
def test_whatever_a_file_holds_it_is_read_or_refused_by_name(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("train", "test"):
        (folder / name).write_bytes(content)
    splits = {"root": str(folder), "train": "train", "val": None, "test": "test", "classes": 2}
    for source, data in (
        (lists_source, ListsData(format="lists", **splits)),
        (json_source, JsonData(format="json", **splits)),
    ):  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"train|test"):
            source(data)  # type: ignore[operator]


# --- what the commands say ------------------------------------------------------------------------


def test_prepare_names_the_classes_that_train_lacks(tmp_path: Path) -> None:
    task = write_task(
        tmp_path,
        data=write_vtab(tmp_path / "dtd"),
        recipe={"preset": "default", "training": {"batch_size": 4}},
        selection={"batch_size": 4},
        search={},
    )
    answer = taskpack("prepare", task, "--out", tmp_path / "p")
    assert answer.code == 0
    assert "4 classes" in answer.words
    assert answer.words.endswith("no training sample of 1 of the classes: 2")


def test_a_run_remarks_it_once() -> None:
    out = io.StringIO()
    with BatchProgress(Console(file=out), ["t"]) as progress:
        progress.update("t", "prepare", 0.0, "")
        progress.update("t", "prepare", 1.0, "no training sample of 1 of the classes: 2")
        progress.update("t", "search", 0.0, "")
        progress.update("t", "search", 0.5, "a remark that changes all the time")
    assert [line.split("] ")[1] for line in out.getvalue().splitlines()] == [
        "t: prepare",
        "t: prepare - no training sample of 1 of the classes: 2",
        "t: search",
    ]


def test_plan_says_where_the_data_come_from_before_it_needs_them(tmp_path: Path) -> None:
    about = {
        "source": "https://example.org/dtd",
        "licence": "CC0",
        "published_percent": {"GPS (arXiv 2312.10136)": 75.8},
    }
    task = write_task(
        tmp_path,
        about=about,
        data={"format": "lists", "root": str(tmp_path / "none"), "classes": 4},
    )
    answer = taskpack("plan", task, "--workdir", tmp_path / "runs")
    assert answer.code == 3
    assert (
        "source https://example.org/dtd licence CC0 published % 75.8 GPS (arXiv 2312.10136)"
        in answer.words
    )
    assert "it comes from https://example.org/dtd" in answer.words
