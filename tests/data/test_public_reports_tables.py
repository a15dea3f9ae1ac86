"""What people feed in as tables, list files, JSON and shards: conditions from public reports, read
as meant or refused by name.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers_cli import taskpack, write_task
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import Reader, prepare, read_index, read_shard, save_samples, split_samples
from pipeline.data.labels import class_number
from pipeline.data.listed import json_source, lists_source
from pipeline.data.manifests import csv_source
from pipeline.data.names import check_names, class_names
from pipeline.data.shards import images_in, samples_in
from pipeline.data.sources import Source, encode_png
from pipeline.data.urls import expand
from pipeline.errors import DataError
from pipeline.specs import CsvData, JsonData, ListsData, Task
from pipeline.specs.task_files import load_task

MESSAGE_MAX = 300  # besides the path of the file, which is the user's own
TEST_TABLE = "path,label\n6.png,cat\n7.png,dog\n"


def image_of(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8))


def message_of(read: Callable[[], Any], file: object = "") -> str:
    """The one short line that `read` is refused with; it names `file`."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message.replace(str(file), "")) <= MESSAGE_MAX, message
    return message


def samples_of(source: Source, split: Any = "train") -> list[tuple[str, str]]:
    return [
        (Path(sample.name).name, source.classes[sample.label]) for sample in source.splits[split]
    ]


def task_of(data: dict[str, Any]) -> Task:
    small = {
        "recipe": {"preset": "default", "training": {"batch_size": 2}},
        "selection": {"batch_size": 2},
        "val_fraction": 0.5,
    }
    return Task.model_validate(
        {
            "name": "t",
            "data": data,
            "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
            **small,
        }
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with eight images."""
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(image_of(number))
    (tmp_path / "a,b.png").write_bytes(image_of(8))
    return tmp_path


# --- CSV ------------------------------------------------------------------------------------------


def read_csv(folder: Path, train: str | bytes, test: str = TEST_TABLE, **options: Any) -> Source:
    (folder / "train.csv").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "test.csv").write_text(test)
    return csv_source(
        CsvData(
            format="csv", train=str(folder / "train.csv"), test=str(folder / "test.csv"), **options
        )
    )


TWO_ROWS = "path,label\n0.png,cat\n1.png,dog\n"


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(
            "path, label\n 0.png ,cat \n1.png, dog\n",
            id="white space (fastai#937, turicreate#1531)",
        ),
        pytest.param('path, label\n0.png, "cat"\n1.png, "dog "\n', id="white space before quotes"),
        pytest.param("path;label\n0.png;cat\n1.png;dog\n", id="semicolons"),
        pytest.param('"path";"label"\n"0.png";"cat"\n"1.png";"dog"\n', id="semicolons and quotes"),
        pytest.param("path\tlabel\n0.png\tcat\n1.png\tdog\n", id="tabs"),
        pytest.param("path|label\n0.png|cat\n1.png|dog\n", id="bars"),
        pytest.param("\n" + TWO_ROWS.replace("\n", "\n\n"), id="blank lines"),
        pytest.param(
            "path,label,,\n0.png,cat,,\n,,,\n1.png,dog,,\n", id="a spreadsheet's empty cells"
        ),
        pytest.param(",path,label\n0,0.png,cat\n1,1.png,dog\n", id="an index column"),
        pytest.param(
            'path,label,note\n0.png,cat,"two\nlines"\n1.png,dog,\n',
            id="a line end inside another column",
        ),
        pytest.param(TWO_ROWS.replace("\n", "\r"), id="CR alone"),
        pytest.param(TWO_ROWS.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(b"\xef\xbb\xbf" + TWO_ROWS.encode(), id="UTF-8 with a byte order mark"),
        pytest.param(TWO_ROWS.encode("utf-16"), id="UTF-16"),
        pytest.param(
            "\ufeff".encode("utf-16-be") + TWO_ROWS.encode("utf-16-be"), id="UTF-16, big-endian"
        ),
    ],
)
def test_tables_are_read_as_people_write_them(table: str | bytes, images: Path) -> None:
    assert samples_of(read_csv(images, table)) == [("0.png", "cat"), ("1.png", "dog")]


def test_columns_are_named_in_the_task(images: Path) -> None:
    tables = "id;file;class\n1;0.png;cat\n2;1.png;dog\n", "id,file,class\n9,6.png,dog\n"
    source = read_csv(images, *tables, path_column="file", label_column="class")
    assert samples_of(source) == [("0.png", "cat"), ("1.png", "dog")]
    assert samples_of(source, "test") == [("6.png", "dog")]


def test_paths_may_be_absolute_or_lead_up_or_home(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(images))
    rows = (
        f'path,label\n{images}/0.png,cat\n../{images.name}/1.png,dog\n~/2.png,dog\n"a,b.png",cat\n'
    )
    source = read_csv(images, rows)
    assert [sample.load() for sample in source.splits["train"]] == [
        image_of(number) for number in (0, 1, 2, 8)
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("path,label\n0.png,cat\n1\0.png,dog\n", "line 3: holds a NUL character"),
        (
            "path,label\n0.png,cat\n1.png,café\n".encode("latin-1"),
            "line 3: byte 0xe9 is not UTF-8 text",
        ),
        (
            'path,label\n0.png,cat\n1.png,"dog\n' + "2.png,dog\n" * 3000,
            "line 3: a quote is opened and never closed",
        ),
        (
            'path,label,note\n0.png,cat,"x\n1.png,dog,y\n',
            "line 2: a quote is opened and never closed",
        ),
        ('path,label,note\n0.png,cat,"x\n1.png,dog,"y"\n', "line 2: ',' expected after '\"'"),
        (
            'path,label\n0.png,"cat\n1.png,dog"\n',
            "line 2: path '0.png', label 'cat\\n1.png,dog': a field goes on in the next line",
        ),
        ('path,"label\nx"\n0.png,cat\n', "a column's name goes on after the first line"),
        ("path,label\na,b.png,cat\n1.png,dog\n", "line 2: 3 fields, but the first line has 2"),
        ("path,label\n0.png\n", "line 2: path '0.png', label ''; expected both"),
        (
            "path,label,label\n0.png,cat,x\n",
            "a column path or label twice in its first line (path, label, label)",
        ),
        (
            "0.png,cat\n1.png,dog\n",
            (
                "no column path or label in its first line (0.png, cat); name the columns in"
                " `path_column`"
            ),
        ),
        ("Path;Label\n0.png;cat\n", "no column path or label in its first line (Path, Label)"),
        (
            "\ufeff\ufeffpath,label\n0.png,cat\n",
            "no column path in its first line (\\ufeffpath, label)",
        ),
        ("", "the file is empty"),
        (b"\xef\xbb\xbf\r\n", "the file is empty"),
        ("path,label\n", "lists no images"),
        ("x" * 300_000 + ",y\n", "no column path or label"),
        ("path,label\n" + "x" * 200_000 + ",cat\n", "line 2: field larger than field limit"),
        ("path,label\n" + "x" * 24_000 + ".png,cat\n1.png,dog\n", "line 2: "),
        ("path,label\nimages\\0.png,cat\n1.png,dog\n", "write / instead of \\ in paths"),
        (
            "path,label\nscan-12:30.png,cat\n1.png,dog\n",
            "scan-12:30.png: cannot be read (No such file or directory)",
        ),
        ("path,label\npipe://touch x,cat\n1.png,dog\n", "line 2: pipe://touch x: refused"),
        ("path,label\n0.png,cat\n0.png,cat\n1.png,dog\n", "line 3: "),
    ],
)
def test_what_is_wrong_in_a_table_is_named_by_its_line(
    table: str | bytes, words: str, images: Path
) -> None:
    assert words in message_of(lambda: read_csv(images, table), images / "train.csv")


def test_all_missing_images_are_reported_at_once(images: Path) -> None:
    with pytest.raises(
        DataError,
        match=(
            r"^2 images cannot be used; fix or remove them:\n.*line 2: .*no\.png.*\n.*line 4:"
            r" .*none\.png"
        ),
    ):
        read_csv(images, "path,label\nno.png,cat\n1.png,dog\nnone.png,dog\n")


def test_images_and_tables_behind_urls_are_fetched_once(images: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for number in range(8):
        filesystem.pipe_file(f"/tables/images/{number}.png", image_of(number))
    filesystem.pipe_file("/tables/test.csv", b"path,label\nimages/6.png,cat\n./images/7.png,dog\n")
    rows = "".join(
        f"memory://tables/images/{number}.png,{('cat', 'dog')[number % 2]}\n" for number in range(6)
    )
    (images / "train.csv").write_text("path,label\n" + rows)
    task = task_of(
        {"format": "csv", "train": str(images / "train.csv"), "test": "memory://tables/test.csv"}
    )
    index = prepare(task, images / "p")
    test = {
        (image, index.classes[label])
        for _, image, label in read_shard(str(images / "p" / index.splits["test"][0].path))
    }
    assert test == {(image_of(6), "cat"), (image_of(7), "dog")}
    filesystem.rm("/tables/images", recursive=True)
    assert prepare(task, images / "p") == index


def test_a_host_that_does_not_answer_is_not_asked_for_every_image(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(_: object, path: str) -> bytes:
        asked.append(path)
        raise FileNotFoundError(path) if "gone" in path else OSError("no route to host")

    monkeypatch.setattr("pipeline.data.urls.PAUSES_SECONDS", ())
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    rows = "".join(
        f"memory://{place}/{number}.png,cat\n"
        for place in ("host", "other/gone")
        for number in range(3)
    )
    messages = [
        message_of(sample.load)
        for sample in read_csv(images, f"path,label\n{rows}0.png,dog\n").splits["train"][:6]
    ]
    assert asked == ["/host/0.png", *[f"/other/gone/{number}.png" for number in range(3)]]
    assert (
        messages[0]
        == "memory://host/0.png: cannot be read (no route to host); check the path, the permissions"
        " and the connection"
    )
    assert messages[1] == "memory://host/1.png: not asked for, because host did not answer before"


@pytest.mark.parametrize("folder", ["", "images"])
def test_lists_may_lie_behind_a_url(folder: str) -> None:
    filesystem = fsspec.filesystem("memory")
    for number in range(2):
        filesystem.pipe_file(os.path.normpath(f"/lists/{folder}/{number}.png"), image_of(number))
        filesystem.pipe_file(
            f"/lists/{('train', 'test')[number]}.txt", f"./{number}.png {number}\n".encode()
        )
    data = ListsData(
        format="lists",
        root="memory://lists",
        images=folder,
        train="train.txt",
        val=None,
        test="test.txt",
        classes=2,
    )
    assert [
        sample.load() for samples in lists_source(data).splits.values() for sample in samples
    ] == [image_of(0), image_of(1)]


def test_secrets_in_urls_are_not_shown(images: Path) -> None:
    source = read_csv(images, "path,label\nmemory://none/0.png?sig=s3cret,cat\n1.png,dog\n")
    message = message_of(source.splits["train"][0].load, "memory://none/0.png?***")
    assert "s3cret" not in message + source.splits["train"][0].name
    assert read_csv(images, "path,label\nmemory://none/0.png?sig=other,cat\n1.png,dog\n").digest(
        ""
    ) != source.digest("")


# --- names of classes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        ("Cat", "cat"),
        ("big cat", "big  cat"),
        ("big cat", "big\u00a0cat"),
        ("caf\u00e9", "cafe\u0301"),
        ("cat", "cat\u200b"),
        ("1", "1.0"),
        ("7", "07"),
    ],
)
def test_names_that_differ_only_in_writing_are_refused_in_every_format(
    pair: tuple[str, str], images: Path
) -> None:
    message = message_of(
        lambda: read_csv(images, f"path,label\n0.png,{pair[0]}\n1.png,{pair[1]}\n2.png,dog\n")
    )
    assert "are one name written in two ways" in message
    (images / "classes.txt").write_text("\n".join([*pair, "dog"]), encoding="utf-8")
    for classes in (str(images / "classes.txt"), (*pair, "dog")):
        assert (
            message_of(lambda classes=classes: class_names(classes)).split(": ", 1)[1]
            == message.split(": ", 1)[1]
        )  # type: ignore[misc]
    for name in (f"train/{pair[0]}", f"train/{pair[1]}", f"test/{pair[0]}"):
        (images / name).mkdir(parents=True)
        (images / name / "0.png").write_bytes(image_of(0))
    data = {"format": "folder", "train": str(images / "train"), "test": str(images / "test")}
    assert (
        message_of(lambda: prepare(task_of(data), images / "p")).split(": ", 1)[1]
        == message.split(": ", 1)[1]
    )


def test_a_class_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat \n")
    message = message_of(
        lambda: class_names(str(tmp_path / "classes.txt")), tmp_path / "classes.txt"
    )
    assert "the class 'cat' is named 2 times; expected different names" in message


def test_names_that_can_be_told_apart_are_kept() -> None:
    check_names(
        [
            "cat",
            "cats",
            "1",
            "2",
            "1.5",
            "10",
            "m",
            "n",
            "a b",
            "ab",
            "\u0130",
            "I",
            "ss",
            "\u732b",
        ],
        "classes",
    )


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "\ud800", "x" * 201, "a\u2028b"])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    assert "cannot be used" in message_of(lambda: check_names(["cat", name], "classes"))


def test_class_names_may_come_with_any_line_ends_and_in_utf_16(tmp_path: Path) -> None:
    for content in (
        b"cat\rgreat dane\r",
        b"cat\r\ngreat dane",
        "cat \n\n great dane\n".encode("utf-16"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        assert class_names(str(tmp_path / "classes.txt")) == ["cat", "great dane"]


def test_prepare_prints_the_names_of_the_classes(images: Path) -> None:
    for split, numbers in (("train", range(6)), ("test", (6, 7))):
        (images / f"{split}.csv").write_text(
            "path,label\n"
            + "".join(f"{number}.png,{('cat', 'dog')[number % 2]}\n" for number in numbers)
        )
    small = {
        "recipe": {"preset": "default", "training": {"batch_size": 2}},
        "selection": {"batch_size": 2},
        "val_fraction": 0.5,
    }
    task = write_task(
        images, data={"format": "csv", "train": "train.csv", "test": "test.csv"}, **small
    )
    answer = taskpack("prepare", task, "--out", images / "p")
    assert answer.code == 0
    assert "2 classes (cat, dog)" in answer.words


def test_thousands_of_classes_do_not_fill_the_screen(images: Path) -> None:
    test = "path,label\n" + "".join(
        f"{number}.png,{'label ' * 20}{number}\n" for number in range(1000)
    )
    assert "and 995 more; every class needs training samples" in message_of(
        lambda: read_csv(images, TWO_ROWS, test)
    )


# --- list files and JSON --------------------------------------------------------------------------


def read_list(folder: Path, train: str | bytes, **options: Any) -> Source:
    return lists_source(ListsData(format="lists", **listed(folder, train, "6.png 0\n"), **options))


def read_json(
    folder: Path, train: str | bytes, test: str = '{"6.png": 0}', classes: Any = 2
) -> Source:
    return json_source(
        JsonData(format="json", **{**listed(folder, train, test), "classes": classes})
    )


def listed(folder: Path, train: str | bytes, test: str) -> dict[str, Any]:
    (folder / "train").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "test").write_text(test)
    return {"root": str(folder), "train": "train", "val": None, "test": "test", "classes": 2}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("0.png 0\r1.png 1\r", id="CR alone"),
        pytest.param("0.png 0\r\n\r\n1.png\t1\r\n", id="CRLF and tabs"),
        pytest.param("0.png 0\n1.png 1\n".encode("utf-16"), id="UTF-16"),
        pytest.param(
            b"\xef\xbb\xbf0.png 0\n./1.png 01", id="a byte order mark, and no last line end"
        ),
    ],
)
def test_list_files_are_read_as_people_write_them(text: str | bytes, images: Path) -> None:
    assert samples_of(read_list(images, text)) == [("0.png", "0"), ("1.png", "1")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.png 0\n1\xe9.png 1\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8 text"),
        ("0.png 0\r1\0.png 1\r", "line 2: holds a NUL character"),
        ("0.png,0\n", "line 1: '0.png,0' has no label"),
        ("x" * 24_000 + " 0\n", "line 1: "),
        ("0.png " + "x" * 24_000 + "\n", "line 1: the label is 'xxx"),
        ("x" * 24_000 + "\n", "line 1: 'xxx"),
        ("0.png 0.0\n", "line 1: the label is '0.0'"),
        ("images\\0.png 0\n", "write / instead of"),
        ("0\u2028.png 0\n", "line 1: "),
    ],
)
def test_what_is_wrong_in_a_list_is_named_by_its_line(
    text: str | bytes, words: str, images: Path
) -> None:
    assert words in message_of(lambda: read_list(images, text), images / "train")


def test_json_labels_may_be_names_where_they_are_declared(images: Path) -> None:
    source = read_json(
        images, '{"0.png": "dog", "1.png": "cat"}', '{"6.png": "dog"}', ("cat", "dog")
    )
    assert samples_of(source) == [("0.png", "dog"), ("1.png", "cat")]
    assert samples_of(read_json(images, '{"0.png": "0", "1.png": 1}'.encode("utf-16"))) == [
        ("0.png", "0"),
        ("1.png", "1"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"0.png": "catt"}',
            (
                "'0.png': the label is 'catt'; expected a whole number from 0, or one of the names"
                " in `classes`"
            ),
        ),
        ('{"0.png": "cat", "1.png": 1}', "'1.png': the label is 1, but 'cat' at "),
        ('{"0.png": NaN}', "the label is nan"),
        ('{"0.png": -Infinity}', "the label is -inf"),
        ('{"0.png": 1e0}', "the label is 1.0"),
        ('{"0.png": ["cat"]}', "the label is a list or an object"),
        ('{"0.png": "cat", "0.png": "cat"}', "given before"),
        ('{"0.png": "cat"} x', "not valid JSON (Extra data"),
        ('[{"path": "0.png", "label": 0}]', "holds list"),
        ('{"' + "k" * 24_000 + '": "cat"}', "'kkk"),
        ('{"0.png": "' + "k" * 24_000 + '"}', "the label is 'kkk"),
        ('{"0.png": ' + "[" * 900 + "]" * 900 + "}", "the label is a list"),
        ('{"0.png": ' + "9" * 4000 + "}", "the label is 999"),
        ('{"a\\nb.png": "cat"}', "'a\\nb.png'"),
    ],
)
def test_what_is_wrong_in_json_is_named_by_its_key(text: str, words: str, images: Path) -> None:
    test = '{"6.png": "cat"}'
    message = message_of(lambda: read_json(images, text, test, ("cat", "dog")), images / "train")
    assert words in message


def test_a_home_folder_in_a_task_file_is_found(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(images))
    loaded = load_task(
        write_task(
            images / "tasks",
            data={"format": "csv", "train": "~/train.csv", "test": "test.csv", "root": "~"},
        )
    )
    assert isinstance(loaded.data, CsvData)
    assert (loaded.data.train, loaded.data.root) == (str(images / "train.csv"), str(images))
    assert loaded.data.test == str(images / "tasks" / "test.csv")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=80),
        st.text('path,label\n\r\t;|" 01.\0\ufeff{}[]:\u2028', max_size=80).map(str.encode),
    )
)
def test_whatever_a_table_holds_it_is_read_or_refused_in_one_short_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for table in (content, b"path,label\n" + content):
        message_of(lambda table=table: read_csv(folder, table))  # type: ignore[misc]


# --- shards ---------------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def labels_in(
    members: dict[str, bytes], names: list[str] | None = None, field: str | None = None
) -> list[tuple[str, int]]:
    content = tar_of(members)
    labelled = [
        (key, image, label) for key, image, label in samples_in(content, "s.tar", names, field)
    ]
    assert list(images_in(content, "s.tar")) == [(key, image) for key, image, _ in labelled]
    return [(key, label) for key, _, label in labelled]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_a_second_labelled_image_of_a_key_is_refused(label: str) -> None:
    """webdataset#237: a key ends at the first dot, so `0001.aug1.jpg` is a member of the sample
    `0001`.
    """
    content = b'{"label": 1}' if label == "json" else b"1"
    members = {
        "0001.jpg": b"x",
        f"0001.{label}": content,
        "0001.aug1.JPG": b"y",
        f"0001.aug1.{label}": content,
    }
    message = message_of(
        lambda: labels_in(members), "s.tar: 0001.aug1.jpg: a second labelled image beside 0001.jpg"
    )
    assert "rename it" in message
    others = {"0001.seg.png": b"y", "0001.seg.txt": b"1", "0001.fine.cls": b"3"}
    assert labels_in({"0001.jpg": b"x", f"0001.{label}": content, **others}) == [("0001", 1)]


@pytest.mark.parametrize(
    ("members", "names", "field", "label"),
    [
        ({"a.cls": b"dog\n"}, ["cat", "dog"], None, 1),
        ({"a.cls": b" great dane\r\n"}, ["cat", "great dane"], None, 1),
        ({"a.cls": "\ufeffcaf\u00e9".encode()}, ["cat", "caf\u00e9"], None, 1),
        ({"a.cls": b"\xef\xbb\xbf1\r\n"}, None, None, 1),
        ({"a.json": b'{"label": 1, "caption": "x"}'}, None, None, 1),
        ({"a.json": b'{"label": "dog"}'}, ["cat", "dog"], None, 1),
        ({"a.json": b'{"label": "1", "nested": {"label": 3, "label": 4}}'}, None, None, 1),
        ({"a.cls": b"1", "a.json": b'{"label": 0}'}, None, None, 1),
        ({"a.cls": b"0", "a.json": b'{"label": 0, "kind": "dog"}'}, ["cat", "dog"], "kind", 1),
        ({"a.cls": b"1", "a.json": b"not JSON"}, None, None, 1),
    ],
)
def test_labels_of_shards_are_numbers_names_or_a_field_of_json(
    members: dict[str, bytes], names: Any, field: str | None, label: int
) -> None:
    assert labels_in({"a.jpg": b"x", **members}, names, field) == [("a", label)]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            {"a.cls": b"bird"},
            (
                "a.cls: the label is 'bird'; expected a whole number from 0, or one of the names in"
                " `classes`"
            ),
        ),
        ({"a.cls": b"2"}, "a.cls: label 2 is outside the 2 classes"),
        ({"a.cls": b"caf\xe9"}, "a.cls: not UTF-8 text"),
        ({"a.cls": b"x" * 90_000}, "a.cls: the label is 'xxx"),
        ({"a.cls": "\u0661".encode()}, "a.cls: the label is"),
        ({"a.json": b'{"caption": "x"}'}, "a.json: the field 'label' occurs 0 times (caption)"),
        ({"a.json": b'{"label": 1, "label": 0}'}, "a.json: the field 'label' occurs 2 times"),
        ({"a.json": b"[1]"}, "a.json: the field 'label' occurs 0 times (no fields)"),
        ({"a.json": b"{"}, "a.json: not valid JSON"),
        ({"a.json": b"[" * 100_000}, "a.json: not valid JSON"),
        ({"a.json": b'{"label": true}'}, "a.json: the label is True"),
        ({"a.json": b'{"label": NaN}'}, "a.json: the label is nan"),
        ({"a.json": b'{"label": null}'}, "a.json: the label is None"),
        ({"a.json": b'{"label": [1]}'}, "a.json: the label is a list or an object"),
        (
            {"a.json": json.dumps({f"{'k' * 500}{number}": 1 for number in range(500)}).encode()},
            "and 495 more",
        ),
        ({f"a.{'x.' * 60}{number}.png": b"x" for number in range(200)}, "and 195 more"),
        ({"k" * 9000 + ".png": b"x"}, "an image without a label"),
        ({"a.cls": b"1", "a." + "e" * 9000 + ".pkl": b"x"}, "refused"),
        (
            {"a." + "p" * 9000: b"x", "a." + "P" * 9000: b"x"},
            "a duplicate name but for upper and lower case",
        ),
        ({"b\n\x1b[31m.png": b"x"}, "b\\n\\x1b[31m.png: an image without a label"),
        (
            {".a.png": b"x", ".a.cls": b"1", "b.png": b"x", "b.cls": b"1"},
            ".a.png: refused, WebDataset skips names that begin with a dot",
        ),
        (
            {"a.txt": b"x", "b.png": b"x", "c.png": b"x", "b.cls": b"1"},
            "an image without a label; expected a member with the same key",
        ),
    ],
)
def test_what_is_wrong_in_a_shard_is_named_in_one_short_line(
    members: dict[str, bytes], words: str
) -> None:
    image = {} if any(name.endswith("png") for name in members) else {"a.jpg": b"x"}
    assert words in message_of(lambda: labels_in({**image, **members}, ["cat", "dog"]), "s.tar: ")


def test_numbers_beside_names_are_refused() -> None:
    """Numbers that count from 1 would pass for the classes before them."""
    members = {"a.jpg": b"x", "a.cls": b"cat", "b.jpg": b"x", "b.cls": b"1"}
    assert "b.cls: the label is '1', but 'cat' at s.tar: a.cls; expected either" in message_of(
        lambda: labels_in(members, ["cat", "dog"])
    )


def test_a_label_field_needs_its_json() -> None:
    assert "no member .json" in message_of(
        lambda: labels_in({"a.jpg": b"x", "a.cls": b"1"}, field="kind"), "s.tar: a: "
    )


@pytest.mark.parametrize(
    "label", ["1.0", "-1", "+1", "", "\u0661", "1" * 19, True, 1.0, -1, None, 10**18, float("nan")]
)
def test_what_is_no_class_number_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"^here: the label is "):
        class_number(label, {"cat": 0, "dog": 1}, "here")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            bz2.compress(tar_of({"a.png": b"x"})),
            "a compressed file; expected a tar, uncompressed or compressed with gzip",
        ),
        (lzma.compress(tar_of({"a.png": b"x"})), "a compressed file"),
        (gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "a compressed file"),
        (b"<!DOCTYPE html><html><body>404</body></html>" * 30, "an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n",
            "a Git LFS pointer, not the file itself",
        ),
        (b"PK\x03\x04" + bytes(600), "a ZIP archive"),
        (gzip.compress(b"", mtime=0), "the shard is empty"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(content: bytes, words: str) -> None:
    assert words in message_of(lambda: list(samples_in(content, "s.tar")), "s.tar: ")


def test_every_truncation_and_flipped_bit_of_a_compressed_shard_is_noticed() -> None:
    members = {
        f"{number}.{extension}": content
        for number in range(5)
        for extension, content in (("cls", b"1"), ("png", image_of(number)))
    }
    content = gzip.compress(tar_of(members), mtime=0)
    whole = list(samples_in(content, "s.tar.gz"))
    assert len(whole) == 5
    for cut in range(2, len(content), 7):
        with pytest.raises(DataError, match=r"^s\.tar\.gz: "):
            list(samples_in(content[:cut], "s.tar.gz"))
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        with contextlib.suppress(DataError):
            assert list(samples_in(bytes(flipped), "s.tar.gz")) == whole


def test_a_gzip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.unpack.UNPACKED_BYTES_MAX", 1024**2)
    assert "unpacks to more than" in message_of(
        lambda: list(samples_in(gzip.compress(bytes(2 * 1024**2)), "s.tar.gz")), "s.tar.gz: "
    )


def write_compressed(folder: Path) -> dict[str, Any]:
    """Three compressed train shards and a test shard, labelled by name in JSON or in `key.cls`."""
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        labels = {number: ("cat", "a/../dog")[number % 2] for number in numbers}
        members = {f"{number}.png": image_of(number) for number in numbers}
        members |= {
            f"{number}.json": json.dumps({"label": label}).encode()
            for number, label in labels.items()
        }
        (folder / f"train-{shard:03d}.tar.gz").write_bytes(
            gzip.compress(tar_of(dict(sorted(members.items()))))
        )
    (folder / "test.tar").write_bytes(
        tar_of(
            {"a.png": image_of(100), "a.cls": b"a/../dog", "b.png": image_of(101), "b.cls": b"cat"}
        )
    )
    train = str(folder / "train-{000..002}.tar.gz")
    return {
        "format": "shards",
        "train": train,
        "test": str(folder / "test.tar"),
        "classes": ["cat", "a/../dog"],
    }


def test_compressed_shards_in_a_brace_pattern_with_named_labels_are_trained_on(
    tmp_path: Path,
) -> None:
    data = write_compressed(tmp_path)
    index = prepare(task_of(data), tmp_path / "p")
    assert [Path(shard.path).name for shard in index.splits["train"]] == [
        f"train-00{shard}.tar.gz" for shard in range(3)
    ]
    assert [shard.labels for shard in index.splits["train"]] == [[0, 1, 0, 1]] * 3
    split = split_samples(index, 0.5, 0)["trainval"]
    images, labels = Reader(tmp_path / "p", split, 8).read(split.samples)
    assert images.shape == (12, 3, 8, 8)
    assert labels.tolist() == [0, 1] * 6
    saved = save_samples(tmp_path / "p", tmp_path / "out" / "samples", 2)
    assert [path.resolve().parent for path in saved] == [tmp_path / "out" / "samples"] * 2
    assert prepare(task_of(data), tmp_path / "p") == index == read_index(tmp_path / "p")


def test_another_label_field_is_another_dataset(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 2)):
        members: dict[str, bytes] = {}
        for number in range(count):
            image = image_of(number + 100 * (split == "test"))
            members |= {
                f"{number}.png": image,
                f"{number}.json": (
                    json.dumps({"label": number % 2, "other": 1 - number % 2}).encode()
                ),
            }
        (tmp_path / f"{split}.tar").write_bytes(tar_of(members))
    data = {
        "format": "shards",
        "train": str(tmp_path / "train.tar"),
        "test": str(tmp_path / "test.tar"),
    }
    assert prepare(task_of(data), tmp_path / "p").splits["train"][0].labels == [0, 1] * 4
    assert (
        prepare(task_of({**data, "label_field": "other"}), tmp_path / "p").splits["train"][0].labels
        == [1, 0] * 4
    )


def test_brace_patterns_stand_for_their_shards(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        (tmp_path / f"x-{number:03d}.tar").write_bytes(b"")
    assert [os.path.basename(path) for path in expand(str(tmp_path / "x-{008..010}.tar"))] == [
        "x-008.tar",
        "x-009.tar",
        "x-010.tar",
    ]
    assert [os.path.basename(path) for path in expand(str(tmp_path / "{x-008,x-01*}.tar"))] == [
        "x-008.tar",
        "x-010.tar",
    ]
    assert expand("s3://bucket/train-{0..2}.tar") == [
        f"s3://bucket/train-{number}.tar" for number in range(3)
    ]
    expected: list[tuple[str, str]] = [
        ("x-{008..011}.tar", "x-011.tar: no such shard"),
        ("x-{008..010.tar", "a brace without its partner"),
        ("x-{0..99999999999999}.tar", "stands for more than 100,000 shards"),
        ("x-" + "{0..9}" * 9 + ".tar", "stands for more than 100,000 shards"),
        ("x-{008..008}{,}.tar", "given more than once"),
    ]
    for pattern, words in expected:
        assert words in message_of(
            lambda pattern=pattern: expand(str(tmp_path / pattern)), tmp_path
        )  # type: ignore[misc]
