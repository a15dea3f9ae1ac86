"""Conditions of image folders and splits that people reported for other tools; each is accepted, or
refused by name.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_cli import taskpack
from helpers_images import FORMATS, as_format, pixels_of, shards_of, task_of, write_folders
from pydantic import ValidationError
from rich.console import Console

from pipeline.cli.progress import BatchProgress
from pipeline.data import prepare, read_shard, split_samples, urls
from pipeline.data.sources import encode_png
from pipeline.errors import DataError

# --- folders --------------------------------------------------------------------------------------


def train_count(data: dict[str, Any], folder: Path) -> int:
    return sum(shard.samples for shard in prepare(task_of(data), folder).splits["train"])


def refused(data: dict[str, Any], folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(task_of(data), folder)
    assert not folder.exists()
    return str(caught.value)


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deeper").mkdir()
    (tmp_path / "elsewhere" / "0.png").rename(tmp_path / "elsewhere" / "deeper" / "0.png")
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere")  # the class itself
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "99.png").write_bytes(encode_png(pixels_of(99)))
    (tmp_path / "elsewhere" / "linked").symlink_to(tmp_path / "more")  # a folder inside it
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "more")
    (tmp_path / "elsewhere" / "deeper" / "loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "dog" / "up").symlink_to(tmp_path)  # leads to every class
    index = prepare(task_of(data), tmp_path / "p")
    assert (
        sorted(label for shard in index.splits["train"] for label in shard.labels)
        == [0] * 9 + [1] * 8
    )


@for_every("place", ["train/cat/lost.png", "train/cat/lost", "train/lost", "test/lost.jpg"])
def test_broken_links_are_refused(place: str, tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / place).symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / place}: a broken link to {tmp_path / 'nowhere'}" in refused(
        data, tmp_path / "p"
    )


def test_a_link_to_itself_is_a_broken_one(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "x.png").symlink_to("x.png")
    assert "x.png: a broken link to x.png" in refused(data, tmp_path / "p")


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "private").mkdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cat/private: cannot be read (Permission denied); check the permissions" in refused(
        data, tmp_path / "p"
    )


def test_images_beside_the_class_folders_are_not_left_out(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "labels.csv").write_text("notes may lie there")
    assert train_count(data, tmp_path / "p") == 16
    (tmp_path / "train" / "stray.jpg").write_bytes(b"x")
    assert "stray.jpg: a file next to the class folders" in refused(data, tmp_path / "q")


def test_what_desktops_and_storage_boxes_leave_is_no_image(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    for litter in (
        ".DS_Store",
        "._0.png",
        "Thumbs.db",
        "Icon\r",
        "@eaDir/0.png/SYNOFILE_THUMB_M.jpg",
        "__MACOSX/._0.png",
        ".ipynb_checkpoints/0.png",
    ):
        (tmp_path / "train" / "cat" / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "cat" / litter).write_bytes(b"litter")
    (tmp_path / "train" / "__MACOSX").mkdir()
    assert train_count(data, tmp_path / "p") == 16


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe"])
def test_a_class_folder_whose_name_is_not_utf8_is_refused(name: bytes, tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    os.rename(tmp_path / "train" / "cat", os.path.join(os.fsencode(tmp_path / "train"), name))
    message = refused(data, tmp_path / "p")
    assert "the name of this class is not UTF-8 text; rename the folder" in message
    message.encode()


def test_a_file_name_that_is_not_utf8_can_be_read_and_reported(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    path = os.path.join(os.fsencode(tmp_path / "train" / "cat"), b"caf\xe9.png")
    Path(os.fsdecode(path)).write_bytes(encode_png(pixels_of(16)))  # the first test image
    index = prepare(task_of(data), tmp_path / "p")
    assert r"\udce9.png" in index.remarks[0]
    Path(os.fsdecode(path)).write_bytes(b"")
    refused(data, tmp_path / "q").encode()


@pytest.mark.parametrize("kind", ["file", "missing", "empty"])
def test_a_split_that_is_no_folder_is_named(kind: str, tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    path = tmp_path / "else.zip"
    {"file": path.touch, "missing": lambda: None, "empty": path.mkdir}[kind]()
    words = {
        "file": "is a file; expected a folder",
        "missing": "no such folder",
        "empty": "holds no folders",
    }[kind]
    assert f"else.zip: {words}" in refused({**data, "train": str(path)}, tmp_path / "p")


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_what_is_not_an_ordinary_file_is_refused_rather_than_waited_for(
    kind: str, tmp_path: Path
) -> None:
    data = write_folders(tmp_path)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    assert "pipe.png: not an ordinary file" in refused(
        as_format(kind, data, tmp_path), tmp_path / "p"
    )


def test_a_folder_in_a_list_of_images_is_named(tmp_path: Path) -> None:
    data = as_format("csv", write_folders(tmp_path), tmp_path)
    with (tmp_path / "train.csv").open("a") as stream:
        stream.write(f"{tmp_path / 'train' / 'cat'},cat\n")
    assert "line 18: " in (message := refused(data, tmp_path / "p"))
    assert "train/cat: not an ordinary file; expected an image" in message


# --- all bad images in one report -----------------------------------------------------------------


@for_every("kind", FORMATS)
def test_all_bad_images_are_in_one_report(kind: str, tmp_path: Path) -> None:
    folders = write_folders(tmp_path, train=20)
    bad = (
        sorted((tmp_path / "train").rglob("*.png"))[::3]
        + sorted((tmp_path / "test").rglob("*.png"))[:1]
    )
    for path in bad:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    message = refused(as_format(kind, folders, tmp_path), tmp_path / "p")
    lines = message.splitlines()
    assert lines[0] == f"{len(bad)} images cannot be used; fix or remove them:"
    assert lines[-1] == f"  and {len(bad) - 10} more"
    assert len(lines) == 12
    assert all("cannot be decoded: a damaged PNG image" in line for line in lines[1:-1])
    if kind != "shards":
        assert lines[1].startswith(f"  {min(bad)}: ")


def test_one_bad_image_is_one_line(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")
    assert (
        refused(data, tmp_path / "p")
        == f"{tmp_path}/train/cat/0.png: cannot be decoded: the file is empty, 0 bytes; copy it"
        " again"
    )


def test_all_files_that_are_no_images_are_in_one_report(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "dog" / "x.xcf").touch()
    (tmp_path / "test" / "dog" / "lost.png").symlink_to("nowhere")
    assert (
        refused(data, tmp_path / "p").splitlines()[0]
        == "3 images cannot be used; fix or remove them:"
    )


# --- images that occur twice ----------------------------------------------------------------------


@for_every("kind", FORMATS)
def test_images_in_two_splits_or_with_two_labels_are_told(kind: str, tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    train, test = tmp_path / "train", tmp_path / "test"
    for name in ("0.png", "1.png"):
        (test / "cat" / name).write_bytes((train / "cat" / name).read_bytes())
    (train / "dog" / "a.png").write_bytes((train / "cat" / "2.png").read_bytes())
    (train / "cat" / "again.png").write_bytes(
        (train / "cat" / "3.png").read_bytes()
    )  # twice under one label: no fault
    task = task_of(as_format(kind, folders, tmp_path))
    index = prepare(task, tmp_path / "p")
    assert len(index.remarks) == 2
    assert index.remarks[0].startswith("2 images are in both train and test; the first is ")
    assert index.remarks[1].startswith("1 image of train has two labels; the first: ")
    assert prepare(task, tmp_path / "p").remarks == index.remarks  # from the index
    if kind == "folder":
        assert (
            f"{train}/cat/0.png, the same as {test}/cat/0.png" in index.remarks[0]
            or "1.png" in index.remarks[0]
        )
        assert f"{train}/cat/2.png is 'cat'" in index.remarks[1]
        assert f"{train}/dog/a.png is 'dog'" in index.remarks[1]


def test_each_pair_of_splits_is_told(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    for split, classes in {"val": ["cat", "dog"], "test": ["cat"]}.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name / "x.png").write_bytes(
                (tmp_path / "train" / name / ("0.png" if name == "cat" else "8.png")).read_bytes()
            )
    remarks = prepare(task_of({**data, "val": str(tmp_path / "val")}), tmp_path / "p").remarks
    assert [remark.split(";")[0] for remark in remarks] == [
        "2 images are in both train and val",
        "1 image is in both train and test",
        "1 image is in both val and test",
    ]


# --- shards in the order of their classes ---------------------------------------------------------


def test_shards_sorted_by_class_are_told(tmp_path: Path) -> None:
    write_folders(tmp_path)
    assert prepare(task_of(shards_of(tmp_path)), tmp_path / "p").remarks == ()
    (remark,) = prepare(task_of(shards_of(tmp_path, shuffled=False)), tmp_path / "p").remarks
    assert remark.startswith(
        "the training samples are sorted by class: a shard holds 1.0 classes on average, 1.9 if"
        " they were mixed"
    )


# --- files that changed ---------------------------------------------------------------------------


@for_every("kind", ["folder", "csv", "lists", "json"])
@for_every("how", ["written over", "renamed over"])
def test_a_file_replaced_at_the_same_size_and_time_is_noticed(
    kind: str, how: str, tmp_path: Path
) -> None:
    data = as_format(kind, write_folders(tmp_path), tmp_path)
    first = prepare(task_of(data), tmp_path / "p")
    path = tmp_path / "train" / "cat" / "0.png"
    status = path.stat()
    other = encode_png(np.random.default_rng(77).integers(0, 256, (6, 5, 3), np.uint8))
    assert len(other) == status.st_size
    target = path if how == "written over" else tmp_path / "new"
    target.write_bytes(other)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    target.replace(path)
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert prepare(task_of(data), tmp_path / "p").digest != first.digest


def test_prepare_prints_what_there_is_to_say(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "test" / "cat" / "x.png").write_bytes(
        (tmp_path / "train" / "cat" / "0.png").read_bytes()
    )
    task = task_of(data).model_dump_json()
    (tmp_path / "t.yaml").write_text(task)
    answer = taskpack("prepare", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "p"))
    assert answer.code == 0
    assert "note: 1 image is in both train and test" in answer.words
    assert "2 classes (cat, dog)" in answer.words


def test_a_run_on_a_terminal_keeps_the_remarks_on_the_screen() -> None:
    screen = io.StringIO()
    remark = "7 images are in both train and test; the first is " + "x" * 100
    with BatchProgress(Console(file=screen, force_terminal=True, width=80), ["t"]) as progress:
        progress.update("t", "prepare", 1.0, remark)
        progress.update("t", "search", 0.5, "trial 1")
    assert remark in screen.getvalue()


# --- a test set held out of train -----------------------------------------------------------------


def test_data_without_a_test_split_have_one_held_out(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, train=20)
    contents = {}
    for kind in ("folder", "csv", "lists", "json"):
        data = as_format(kind, folders, tmp_path)
        data = {key: value for key, value in data.items() if key != "test"} | {"test_fraction": 0.2}
        for seed in (0, 1):
            index = prepare(task_of(data, seed=seed), tmp_path / kind)
            contents[kind, seed] = {
                split: images_of(index, split, tmp_path / kind) for split in ("train", "test")
            }
        assert (
            sorted(label for shard in index.splits["test"] for label in shard.labels)
            == [0] * 4 + [1] * 4
        )
        assert sum(shard.samples for shard in index.splits["train"]) == 32
        assert not index.remarks
        assert (
            sorted(split_samples(index, 0.25, 0)["val"].labels) == [0] * 4 + [1] * 4
        )  # out of what is left
    assert all(found == contents["folder", 0] for found in contents.values()), (
        "the format and the seed change nothing"
    )


def images_of(index: Any, split: Any, folder: Path) -> set[bytes]:
    return {
        image
        for shard in index.splits[split]
        for _, image, _ in read_shard(str(folder / shard.path))
    }


def test_a_held_out_test_set_stays_when_images_are_added_or_moved(tmp_path: Path) -> None:
    root = tmp_path / "a"
    data = {
        "format": "folder",
        "train": write_folders(root, train=50)["train"],
        "test_fraction": 0.2,
    }
    before = prepare(task_of(data), tmp_path / "p")
    root = root.rename(tmp_path / "b")
    for number in range(1000, 1010):
        (root / "train" / "cat" / f"{number}.png").write_bytes(encode_png(pixels_of(number)))
    after = prepare(task_of({**data, "train": str(root / "train")}), tmp_path / "q")
    kept = images_of(before, "test", tmp_path / "p") & images_of(after, "test", tmp_path / "q")
    assert len(kept) >= 17
    assert len(images_of(after, "test", tmp_path / "q")) == 22


def test_a_held_out_test_set_and_a_given_validation_set(tmp_path: Path) -> None:
    data = write_folders(tmp_path, train=10)
    index = prepare(
        task_of(
            {"format": "folder", "train": data["train"], "val": data["test"], "test_fraction": 0.1}
        ),
        tmp_path / "p",
    )
    assert {
        split: sum(shard.samples for shard in shards) for split, shards in index.splits.items()
    } == {"train": 18, "val": 6, "test": 2}


def test_a_class_of_one_image_cannot_be_held_out(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "ant").mkdir()
    (tmp_path / "train" / "ant" / "x.png").write_bytes(encode_png(pixels_of(99)))
    message = refused(
        {"format": "folder", "train": data["train"], "test_fraction": 0.2}, tmp_path / "p"
    )
    assert (
        message
        == "only one training sample of ant: a test set cannot be held out; add samples, or give a"
        " test split"
    )


@pytest.mark.parametrize("tests", [{}, {"test": "test", "test_fraction": 0.2}])
def test_a_test_set_is_given_or_held_out(tests: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"expected either `test`, or `test_fraction: 0\.2`"):
        task_of({"format": "folder", "train": "train", **tests})


def test_a_task_file_without_a_test_set_is_told_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "{name: t, data: {format: folder, train: train}, backbone: {model: vit_tiny_patch16_224}}"
    )
    answer = taskpack("prepare", tmp_path / "t.yaml")
    assert answer.code == 2
    assert "t.yaml: data: given" in answer.words
    assert (
        "expected either `test`, or `test_fraction: 0.2` to hold a fifth of train out as the"
        " test set" in answer.words
    )


def test_a_server_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PAUSES_SECONDS", ())
    asked = []

    def call(url: str, method: str) -> bytes:
        asked.append(url)
        raise (
            ConnectionRefusedError(111, "Connection refused")
            if "dead" in url
            else FileNotFoundError(url)
        )

    monkeypatch.setattr(urls, "_call", call)
    for name, times in (("dead", 1), ("gone", 4)):
        asked.clear()
        rows = "".join(
            f"http://{name}.test/{number}.png,{'ab'[number % 2]}\n" for number in range(2)
        )
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text(
                "path,label\n" + rows.replace(".test/", f".test/{split}")
            )
        message = refused(
            {
                "format": "csv",
                "train": str(tmp_path / "train.csv"),
                "test": str(tmp_path / "test.csv"),
            },
            tmp_path / "p",
        )
        assert len(asked) == times
    assert message.startswith("4 images cannot be used")
