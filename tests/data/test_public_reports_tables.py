"""Tables as people write them, and names of classes: conditions from public reports, read as
meant or refused by line."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from helpers_cases import for_every
from helpers_cli import taskpack, write_task
from helpers_tables import (
    image_of,
    message_of,
    read_csv,
    samples_of,
    task_of,
)

from pipeline.data import prepare, read_shard
from pipeline.data.listed import lists_source
from pipeline.data.names import check_names, class_names
from pipeline.errors import DataError
from pipeline.specs import ListsData

# --- CSV ------------------------------------------------------------------------------------------

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


@for_every(
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
            "line 2: path '0.png', label 'cat\\n1.png,dog': a field continues in the next line",
        ),
        ('path,"label\nx"\n0.png,cat\n', "a column name continues after the first line"),
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


@for_every("name", ["two\nlines", "\x1b[31mred", "\ud800", "x" * 201, "a\u2028b"])
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
