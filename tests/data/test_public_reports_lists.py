"""List files, JSON and shards as people write them: conditions from public reports, read as meant
or refused by line, key or sample."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers_cases import for_every
from helpers_cli import write_task
from helpers_tables import (
    image_of,
    message_of,
    read_csv,
    samples_of,
    task_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import Images, Reader, prepare, read_index, save_samples, split_samples
from pipeline.data.labels import class_number
from pipeline.data.listed import json_source, lists_source
from pipeline.data.shards import images_in, samples_in
from pipeline.data.sources import Source
from pipeline.data.urls import expand
from pipeline.errors import DataError
from pipeline.specs import CsvData, JsonData, ListsData
from pipeline.specs.task_files import load_task

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


@for_every(
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


@for_every(
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
        lambda: labels_in(members), "s.tar: 0001.aug1.jpg: a second labelled image next to 0001.jpg"
    )
    assert "rename it" in message
    others = {"0001.seg.png": b"y", "0001.seg.txt": b"1", "0001.fine.cls": b"3"}
    assert labels_in({"0001.jpg": b"x", f"0001.{label}": content, **others}) == [("0001", 1)]


@for_every(
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


@for_every(
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


@for_every(
    "label", ["1.0", "-1", "+1", "", "\u0661", "1" * 19, True, 1.0, -1, None, 10**18, float("nan")]
)
def test_what_is_no_class_number_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"^here: the label is "):
        class_number(label, {"cat": 0, "dog": 1}, "here")


@for_every(
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
    images, labels = Reader(tmp_path / "p", split, Images(8)).read(split.samples)
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
