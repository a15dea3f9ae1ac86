"""Shards and their index: round trips, the same bytes every time, and attacks."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers_cases import for_every
from PIL import Image

from pipeline.data import DataIndex, ShardEntry, read_index, read_shard, write_index, write_shards
from pipeline.data.shards import samples_in
from pipeline.data.urls import expand, is_url, stamp
from pipeline.errors import DataError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def encoded(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)).save(
        stream, format=kind
    )
    return stream.getvalue()


def some_samples(count: int) -> list[tuple[str, bytes, int]]:
    return [
        (f"{number:06d}", encoded(number, _FORMATS[number % 4]), number % 3)
        for number in range(count)
    ]


def tar_of(
    members: dict[str, bytes] | list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_written_shards_read_back(tmp_path: Path) -> None:
    samples = some_samples(11)
    entries = write_shards(tmp_path, "train", samples, samples_per_shard=4)
    assert [entry.path for entry in entries] == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]
    assert [entry.samples for entry in entries] == [4, 4, 3]
    assert [
        sample for entry in entries for sample in read_shard(str(tmp_path / entry.path))
    ] == samples
    assert [label for entry in entries for label in entry.labels] == [
        label for _, _, label in samples
    ]
    assert entries[0].size_bytes == (tmp_path / entries[0].path).stat().st_size


def test_large_samples_start_a_new_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.SHARD_SIZE_BYTES", 300)
    entries = write_shards(tmp_path, "train", some_samples(8))
    assert len(entries) > 2
    assert sum(entry.samples for entry in entries) == 8


def test_shards_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first = write_shards(tmp_path, "train", some_samples(5))
    again = write_shards(tmp_path / "again", "train", some_samples(5))
    assert first == again
    with tarfile.open(tmp_path / first[0].path) as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {
            (0, 0, "", 0o444)
        }


def test_what_is_no_image_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="000007"):
        write_shards(tmp_path, "train", [("000007", b"%PDF-1.7", 0)])


def test_every_truncation_is_noticed() -> None:
    content = tar_of(
        [
            (name, data)
            for number in range(4)
            for name, data in ((f"{number}.cls", b"1"), (f"{number}.png", encoded(number)))
        ]
    )
    end_of_members = len(content.rstrip(b"\0"))
    cuts = sorted(
        {
            *range(0, len(content), 512),
            *range(511, len(content), 512),
            *range(0, len(content), 97),
            end_of_members,
        }
    )
    whole = list(samples_in(content, "whole.tar"))
    for cut in cuts:
        with contextlib.suppress(DataError):
            assert list(samples_in(content[:cut], "cut.tar")) == whole, cut
    # Cuts between two members leave a tar that Python's own reader takes for whole.
    for cut in range(0, end_of_members, 512):
        with pytest.raises(DataError, match=r"cut\.tar"):
            list(samples_in(content[:cut], "cut.tar"))


@pytest.mark.parametrize("offset", [512 * 4, 512 * 4 + 150, 512 * 8 + 10])
def test_a_damaged_header_is_noticed(offset: int) -> None:
    content = bytearray(
        tar_of(
            [
                (name, data)
                for number in range(4)
                for name, data in ((f"{number}.cls", b"1"), (f"{number}.png", encoded(number)))
            ]
        )
    )
    content[offset] ^= 0x41
    with pytest.raises(DataError, match=r"bad\.tar"):
        list(samples_in(bytes(content), "bad.tar"))


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
)
def test_flipped_bits_lose_no_sample_silently(tar_format: int) -> None:
    members = {
        name: data
        for number in range(3)
        for name, data in (
            (f"{'deep/' * 30}{number}.cls", b"1"),
            (f"{'deep/' * 30}{number}.png", b"x"),
        )
    }
    content = tar_of(members, tar_format)
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(DataError):
            assert len(list(samples_in(bytes(damaged), "s.tar"))) == 3


def test_two_tars_in_one_file_are_refused() -> None:
    both = tar_of({"0.png": encoded(0), "0.cls": b"0"}) + tar_of(
        {"1.png": encoded(1), "1.cls": b"0"}
    )
    with pytest.raises(DataError, match="second tar"):
        list(samples_in(both, "both.tar"))


@for_every(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("README", b"hello")], "holds no samples"),
        ([("a.png", b"x")], r"a\.png: an image without a label"),
        ([("a.cls", b"1")], "a: no image"),
        ([("a.v2.png", b"x"), ("a.v2.cls", b"1")], "no image.*no dot"),
        ([("a.psd", b"x"), ("a.cls", b"1")], "a: no image, only psd, cls"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "more than one image"),
        ([("a.png", b"x"), ("a.png", b"y"), ("a.cls", b"1")], "occurs twice"),
        (
            [
                ("a.png", b"x"),
                ("a.cls", b"1"),
                ("b.png", b"x"),
                ("b.cls", b"1"),
                ("a.jpg", b"x"),
                ("a.txt", b"1"),
            ],
            "a.jpg: an image without",
        ),
        ([("a.png", b"x"), ("a.PNG", b"y"), ("a.cls", b"1")], "duplicate"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.__bad__", b"1")], "a.__bad__: refused"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.__key__", b"1")], "a.__key__: refused"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"a\.cls: the label is 'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"a\.cls: the label"),
        ([("a.png", b"x"), ("a.cls", b"1.5")], r"a\.cls: the label"),
        ([("a.png", b"x"), ("a.cls", b"")], r"a\.cls: the label"),
        ([("a.png", b"x"), ("a.cls", b"9" * 5000)], r"a\.cls: the label"),
    ],
)
def test_faults_are_named(members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(samples_in(tar_of(members), "s.tar"))
    assert str(caught.value).startswith("s.tar")


def test_a_key_that_comes_back_is_refused() -> None:
    members = [
        ("a.png", b"x"),
        ("a.cls", b"1"),
        ("b.png", b"x"),
        ("b.cls", b"1"),
        ("a.jpg", b"x"),
        ("a.CLS", b"1"),
    ]
    with pytest.raises(DataError, match="a: this key occurs twice"):
        list(samples_in(tar_of(members), "s.tar"))


def test_extra_members_and_upper_case_are_fine() -> None:
    members = [
        ("README", b"hi"),
        ("d/a.PNG", b"x"),
        ("d/a.CLS", b" 12\n"),
        ("d/a.json", b"{}"),
        ("d/a.seg.png", b"y"),
        ("._b.png", b"junk"),
    ]
    assert list(samples_in(tar_of(members), "s.tar")) == [("d/a", b"x", 12)]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


@for_every("extension", ["pkl", "pickle", "pyd", "npy", "PKL", "mask.pyd", "pth"])
def test_members_that_could_run_code_are_refused(extension: str) -> None:
    content = tar_of({"a.png": encoded(0), "a.cls": b"0", f"a.{extension}": pickle.dumps(Bomb())})
    with pytest.raises(DataError, match=f"a.{extension}: refused"):
        list(samples_in(content, "s.tar"))


def test_links_are_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"a\.png: not an ordinary file"):
        list(samples_in(stream.getvalue(), "s.tar"))


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch ran",
        "pipe://touch ran",
        "PIPE:touch ran",
        "file:x.tar",
        "simplecache::http://h/x.tar",
        "zip://a.tar::http://h/x.zip",
        "reference://x",
        "git://x",
    ],
)
def test_commands_and_chains_are_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="refused"):
        list(read_shard(url))
    with pytest.raises(DataError, match="refused"):
        expand(url)
    assert not list(tmp_path.iterdir())


def test_shards_behind_a_url_and_with_odd_names(tmp_path: Path) -> None:
    content = tar_of({"a.png": b"x", "a.cls": b"3"})
    with fsspec.open("memory://data-shards/one.tar", "wb") as stream:
        stream.write(content)
    assert list(read_shard("memory://data-shards/one.tar")) == [("a", b"x", 3)]
    (found,) = expand("memory://data-shards/*.tar")
    assert is_url(found)
    assert list(read_shard(found)) == [("a", b"x", 3)]
    odd = tmp_path / "a::b ${HOME} {0..3}?#[1].tar"
    odd.write_bytes(content)
    assert expand(str(odd)) == [str(odd)]
    assert list(read_shard(str(odd))) == [("a", b"x", 3)]


@pytest.mark.parametrize("tag", [{}, {"ETag": None}])
def test_a_store_without_tags_is_read_to_tell_a_change(
    tag: dict[str, None], monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fsspec.filesystem("memory")
    monkeypatch.setattr(type(filesystem), "info", lambda *_: {"size": 3, **tag})
    filesystem.pipe_file("/data-stamp/a.tar", b"one")
    first = stamp("memory://data-stamp/a.tar")
    assert first == stamp("memory://data-stamp/a.tar")
    filesystem.pipe_file("/data-stamp/a.tar", b"two")
    assert stamp("memory://data-stamp/a.tar") != first


def test_globs_are_sorted_and_must_match(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert expand(str(tmp_path / "*.tar")) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    with pytest.raises(DataError, match="no such shard"):
        expand(str(tmp_path / "*.zip"))
    with pytest.raises(DataError, match="no such shard"):
        expand("memory://data-shards/none-*.tar")
    with pytest.raises(DataError, match="more than once"):
        expand((str(tmp_path / "*.tar"), str(tmp_path / "a.tar")))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for url in (str(tmp_path / "none.tar"), "memory://data-shards/none.tar"):
        with pytest.raises(DataError, match=r"none\.tar: no such file"):
            list(read_shard(url))


def entry(path: str, labels: list[int], digit: str = "0") -> ShardEntry:
    return ShardEntry(
        path=path, samples=len(labels), size_bytes=1, sha256=digit * 64, labels=labels
    )


def test_index_round_trip_and_digest(tmp_path: Path) -> None:
    index = DataIndex(
        classes=["a", "b"],
        splits={"train": [entry("t.tar", [0, 1])], "test": [entry("e.tar", [1], "1")]},
    )
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    moved = DataIndex(
        classes=["a", "b"],
        splits={"test": [entry("/x/e.tar", [1], "1")], "train": [entry("/y/t.tar", [0, 1])]},
        source_digest="x",
    )
    assert moved.digest == index.digest
    swapped = DataIndex(
        classes=["a", "b"],
        splits={"train": [entry("t.tar", [0, 1], "1")], "test": [entry("e.tar", [1], "0")]},
    )
    renamed = DataIndex(classes=["a", "c"], splits=index.splits)
    assert len({index.digest, swapped.digest, renamed.digest}) == 3


@for_every(
    ("old", "new", "message"),
    [
        ('"format_version":1', '"format_version":2', "format_version"),
        ('"samples":2', '"samples":3', "3 samples but 2 labels"),
        ("[0,1]", "[0,7]", "label 7"),
        ("[0,1]", "[0,-1]", "labels"),
        ("00000000", "../../..", "sha256"),
        ("}", "", "content"),
    ],
)
def test_a_damaged_index_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    write_index(tmp_path, DataIndex(classes=["a", "b"], splits={"train": [entry("t.tar", [0, 1])]}))
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_index(tmp_path)


def test_a_missing_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare the dataset first"):
        read_index(tmp_path)


def test_a_sparse_member_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    """A GNU sparse member of one block may claim a size of terabytes."""
    member = tarfile.TarInfo("000000.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "sparse.tar"
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"  # the real size, octal
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="sparse"):
        list(read_shard(str(path)))


def test_names_that_webdataset_would_skip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "skipped.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("__train__/000.jpg", b"x"), ("__train__/000.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="without a word"):
        list(read_shard(str(path)))
