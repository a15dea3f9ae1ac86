"""Point clouds: read from every format, stored in farthest-point order, refused by name."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_points import SOLIDS

from pipeline.data import Reader, prepare, split_samples
from pipeline.data.clouds import MAX_POINTS, read_cloud
from pipeline.data.drawn_solids import SOLIDS as NAMES
from pipeline.data.drawn_solids import draw_solid
from pipeline.data.points import Points, farthest_order
from pipeline.errors import DataError, SpecError
from pipeline.specs import Task
from pipeline.specs.faults import validate

RNG = np.random.default_rng(0)
CLOUD = RNG.normal(size=(20, 3))
NORMALS = RNG.normal(size=(20, 6))


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def ply(points: np.ndarray, form: str = "ascii", count: int | None = None) -> bytes:
    """A PLY file with a colour before and a face after the vertices."""
    names = ["x", "y", "z", "nx", "ny", "nz"][: points.shape[1]]
    properties = "\n".join(f"property double {name}" for name in names)
    head = (
        f"ply\nformat {form} 1.0\ncomment made here\nelement vertex {count or len(points)}\n"
        f"property uchar red\n{properties}\nelement face 1\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    if form == "ascii":
        lines = [" ".join(["7", *map(repr, row)]) for row in points.tolist()]
        return (head + "\n".join([*lines, "3 0 1 2", ""])).encode()
    order = "<" if form == "binary_little_endian" else ">"
    rows = b"".join(struct.pack(f"{order}B{len(names)}d", 7, *row) for row in points.tolist())
    return head.encode() + rows + struct.pack(f"{order}B3i", 3, 0, 1, 2)


def text(points: np.ndarray, separator: str, head: str = "") -> bytes:
    lines = [separator.join(map(repr, row)) for row in points.tolist()]
    return (head + "\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("points", [CLOUD, NORMALS])
def test_every_format_gives_the_points(points: np.ndarray) -> None:
    files = {
        "npy": npy(points),
        "npz": npz(points=points, label=np.array(3)),
        "ascii ply": ply(points),
        "little ply": ply(points, "binary_little_endian"),
        "big ply": ply(points, "binary_big_endian"),
        "xyz": text(points, " "),
        "csv": text(points, ", "),
        "csv with a header": text(
            points, ";", "x;y;z;nx;ny;nz\n" if len(points.T) > 3 else "x;y;z\n"
        ),
        "modelnet": text(points, ",").replace(b"\n", b"\r\n"),
    }
    for name, content in files.items():
        np.testing.assert_array_equal(read_cloud(content, name), points, name)


def test_a_mesh_is_sampled_by_area() -> None:
    square = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
    small = "5 0 0\n5.5 0 0\n5.5 0.5 0\n"
    for head in ("OFF\n7 2 0\n", "OFF7 2 0\n"):  # ModelNet40 has both
        points = read_cloud((head + square + small + "4 0 1 2 3\n3 4 5 6\n").encode(), "m.off")
        in_square = points[:, 0] < 2
        assert in_square.mean() == pytest.approx(1 / 1.125, abs=0.02)
        np.testing.assert_allclose(points[in_square].mean(axis=0), [0.5, 0.5, 0], atol=0.02)


def test_any_number_of_points_is_a_prefix_that_covers_the_cloud() -> None:
    cloud = RNG.normal(size=(500, 3)) * [3, 1, 1] + [100, 0, 0]
    decode = [Points(count).decode(cloud).astype(np.float64) for count in (16, 64, 700)]
    np.testing.assert_array_equal(decode[1][:16], decode[0])
    np.testing.assert_array_equal(decode[2][500:], decode[2][:200])  # begins again
    lengths = np.linalg.norm(decode[2], axis=1)
    assert lengths[0] == pytest.approx(1, abs=1e-3)
    assert lengths.max() < 1.001
    centred = cloud - cloud.mean(axis=0)
    first = int(np.linalg.norm(centred, axis=1).argmax())
    order = farthest_order(centred, first, 64)
    np.testing.assert_allclose(
        decode[1], centred[order] / np.linalg.norm(centred[first]), atol=1e-3
    )
    for number in range(1, 64):
        gaps = np.linalg.norm(centred[:, None] - centred[order[:number]], axis=2).min(axis=1)
        assert gaps[order[number]] == pytest.approx(gaps.max(), rel=1e-4)
    metric = Points(16, scale="metric").decode(cloud)
    np.testing.assert_allclose(metric, centred[order[:16]], rtol=2e-3, atol=2e-3)


BAD = {
    "empty": (b"", "0 bytes"),
    "a pickle": (pickle.dumps(CLOUD), "pickle, which may run code.*np.save"),
    "a pickled npy": (npy(np.array([{}], dtype=object), allow_pickle=True), "cannot be read"),
    "one point": (npy(CLOUD[:1]), "1 points; expected 8"),
    "NaN": (npy(np.where(CLOUD > 1, np.nan, CLOUD)), "of 20 points are not finite"),
    "infinite": (text(np.where(CLOUD > 1, np.inf, CLOUD), " "), "are not finite"),
    "NaN in the first line": (b"NaN 1 2\n" + text(CLOUD, " "), "1 of 21 points are not finite"),
    "four columns": (npy(np.ones((20, 4))), r"\[20, 4\]; expected numbers \[N, 3\]"),
    "a cube of numbers": (npy(np.ones((20, 3, 1))), r"\[20, 3, 1\]"),
    "words": (npy(np.full((20, 3), "x")), "expected numbers"),
    "mixed columns": (b"1 2 3\n4 5 6 7\n", "point 2 has 4 numbers, the first 3"),
    "prose": (b"this is no cloud\nnor is this\n", "cannot be read"),
    "binary litter": (b"\x00\xff\xfe" * 50, "cannot be read"),
    "a cut npy": (npy(CLOUD)[:-9], "cannot be read"),
    "a cut ply": (ply(CLOUD, count=50), "21 of 50 vertices|cannot be read"),
    "a cut binary ply": (ply(CLOUD, "binary_little_endian", 50), "of 50 vertices"),
    "a ply without z": (ply(CLOUD).replace(b"double z", b"double w"), "expected x, y, z"),
    "a ply header cut": (ply(CLOUD)[:60], "header is damaged"),
    "two clouds": (npz(one=CLOUD, two=CLOUD), "2 arrays"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "an image"),
    "gzip": (b"\x1f\x8b\x08\x00", "unpack it"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a flat mesh": (b"OFF\n3 1 0\n0 0 0\n0 0 0\n1 1 1\n3 0 1 1\n", "without area"),
    "enormous": (ply(CLOUD, count=MAX_POINTS + 1), f"at most {MAX_POINTS:,}"),
    "all the same": (npy(np.ones((20, 3))), "all points are the same"),
    "in nanometres": (npy(CLOUD * 1e9), "in other units"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clouds_are_named(name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(DataError, match=message) as error:
        Points.stored(content, "a.ply")
    assert str(error.value).startswith("a.ply: ")
    assert "\n" not in str(error.value)


def task_of(data: dict[str, Any], **changes: Any) -> Task:
    return validate(Task, {**SOLIDS, "data": data, **changes}, source="t.yaml")


def write_folders(folder: Path, count: int = 12) -> dict[str, str]:
    for split in ("train", "test"):
        for label in ("box", "sphere"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([number, split == "test", label == "box"])
                cloud = draw_solid(label, rng)
                content = npy(cloud) if number % 2 else ply(cloud, "binary_little_endian")
                extension = "npy" if number % 2 else "ply"
                (folder / split / label / f"{number}.{extension}").write_bytes(content)
    return {"format": "folder", "train": str(folder / "train"), "test": str(folder / "test")}


def test_folders_and_tables_are_prepared_alike(tmp_path: Path) -> None:
    data = write_folders(tmp_path / "clouds")
    small = {**SOLIDS["recipe"], "training": {"batch_size": 8}}
    task = task_of(data, recipe=small, selection={"batch_size": 8})
    index = prepare(task, tmp_path / "folder")
    assert prepare(task, tmp_path / "folder") == index
    for split in ("train", "test"):
        files = sorted((tmp_path / "clouds" / split).rglob("*.*"))
        lines = [f"{path},{path.parent.name}" for path in files]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]))
    table = {"format": "csv", "train": str(tmp_path / "train.csv")}
    table["test"] = str(tmp_path / "test.csv")
    csv = prepare(task_of(table, recipe=small, selection={"batch_size": 8}), tmp_path / "csv")
    assert csv.digest == index.digest
    split = split_samples(index, 0.25, 0)["train"]
    clouds, labels = Reader(tmp_path / "folder", split, Points(128)).read(split.samples)
    assert (clouds.shape, clouds.dtype) == ((18, 128, 3), torch.float16)
    assert labels.bincount().tolist() == [9, 9]


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def test_shards_of_clouds_are_written_again(tmp_path: Path) -> None:
    """Of users, in any format, and those of a prepared dataset."""
    data = write_folders(tmp_path / "clouds")
    small = {"recipe": {**SOLIDS["recipe"], "training": {"batch_size": 8}}}
    small["selection"] = {"batch_size": 8}
    wanted = prepare(task_of(data, **small), tmp_path / "folder")
    tars = {}
    for split in ("train", "test"):
        members: dict[str, bytes] = {"README.md": b"clouds"}
        for number, path in enumerate(sorted((tmp_path / "clouds" / split).rglob("*.*"))):
            members[f"{number}{path.suffix}"] = path.read_bytes()
            label = path.parent.name == "sphere"
            members |= (
                {f"{number}.json": b'{"label": %d}' % label}
                if number % 3
                else {f"{number}.cls": b"%d" % label}
            )
        tars[split] = write_tar(tmp_path / f"{split}.tar", members)
    shards = {"format": "shards", **tars, "classes": ["box", "sphere"]}
    index = prepare(task_of(shards, **small), tmp_path / "shards")
    assert index.digest == wanted.digest
    own = {split: str(tmp_path / "folder" / f"{split}-000000.tar") for split in tars}
    again = prepare(task_of({**shards, **own}, **small), tmp_path / "again")
    assert (again.classes, len(again.splits["train"][0].labels)) == (wanted.classes, 24)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.npy": b"1", "a.ply": b"2", "a.cls": b"0"}, "a: more than one point cloud"),
        ({"a.ply": b"1"}, "a.ply: a point cloud without a label"),
        ({"a.cls": b"1"}, "a: no point cloud, only cls; expected an extension such as npy"),
        ({"a.pkl": b"1", "a.cls": b"0"}, "a.pkl: refused, .*; expected point clouds and .cls"),
        ({"a.jpg": b"1", "a.cls": b"0"}, "a: no point cloud, only jpg, cls"),
        ({"a.npy": pickle.dumps(1), "a.cls": b"0"}, "a: is a Python pickle"),
        ({"a.npy": npy(CLOUD), "a.cls": b"-1"}, "a.cls: the label is '-1'"),
        ({"a.npy": npy(CLOUD), "a.cls": b"70000"}, "label 70000 is too large to count classes"),
    ],
)
def test_bad_shards_of_clouds_are_named(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    good = {"a.npy": npy(CLOUD), "a.cls": b"0"}
    tars = {
        split: write_tar(tmp_path / f"{split}.tar", each)
        for split, each in (("train", members), ("test", good))
    }
    with pytest.raises(DataError, match=message):
        prepare(task_of({"format": "shards", **tars}), tmp_path / "prepared")


def test_bad_files_are_all_named_at_once(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train/box/1.npy").write_bytes(npy(CLOUD[:2]))
    (tmp_path / "test/box/0.ply").write_bytes(pickle.dumps(1))
    with pytest.raises(DataError, match="2 point clouds cannot be used") as error:
        prepare(task_of(data), tmp_path / "p")
    assert "1.npy: 2 points" in str(error.value)
    (tmp_path / "train/box/photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"photo\.jpg: not a point cloud by its name"):
        prepare(task_of(data), tmp_path / "p")


@pytest.mark.parametrize(
    ("data", "content", "message"),
    [
        ({"format": "csv"}, "path,label\n", "lists no point clouds; expected lines"),
        ({"format": "csv"}, "path,label\nno.ply,a\na.ply,b", "no.ply: .*; add the point cloud, or"),
        ({"format": "csv"}, "path,label\n.,a\na.ply,b", "ordinary file; expected a point cloud"),
        ({"format": "csv"}, "path,label\na.ply,x\na.ply,x\n", "give each point cloud once"),
        ({"format": "lists", "classes": 2}, "\n", "lists no point clouds"),
        ({"format": "json", "classes": 2}, "{}", 'an object of point cloud paths.*"path.npy": 0'),
    ],
)
def test_lists_speak_of_clouds(
    tmp_path: Path, data: dict[str, Any], content: str, message: str
) -> None:
    (tmp_path / "a.ply").write_bytes(ply(CLOUD))
    (tmp_path / "list").write_text(content)
    files = {"train": str(tmp_path / "list"), "test_fraction": 0.5, "root": str(tmp_path)}
    others = {} if data["format"] == "csv" else {"val": None}
    with pytest.raises(DataError, match=message):
        prepare(task_of({**files, **others, **data}), tmp_path / "prepared")


def test_repeated_clouds_are_remarked(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "test/box/0.ply").write_bytes((tmp_path / "train/sphere/0.ply").read_bytes())
    small = {**SOLIDS["recipe"], "training": {"batch_size": 8}}
    task = task_of(data, recipe=small, selection={"batch_size": 8})
    index = prepare(task, tmp_path / "prepared")
    assert any("1 point cloud is in both train and test" in each for each in index.remarks)


def test_clouds_of_other_channels_than_the_backbone_are_named(tmp_path: Path) -> None:
    stored = Points.stored(npy(NORMALS), "a")
    assert Points(16, 6).decode_stored(stored, "a").shape == (16, 6)
    assert Points(16, 3).decode_stored(stored, "a").shape == (16, 3)
    with pytest.raises(DataError, match="a: a point has 3 numbers, the backbone takes 6"):
        Points(16, 6).decode_stored(Points.stored(npy(CLOUD), "a"), "a")
    with pytest.raises(DataError, match="no such point cloud"):
        Points(16).decode(tmp_path / "none.ply")


def test_augmentation_moves_clouds_as_it_says() -> None:
    clouds = torch.from_numpy(Points(256, 6).probe(40))
    takes = Points(256, 6, up="y", turn=True)
    targets = torch.arange(40)

    def varied(kind: Any, flip: bool = True, seed: int = 0, of: Points = takes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        moved, same = of.augment(clouds, targets, generator, flip, kind)
        assert same is targets
        return moved

    assert torch.equal(varied("none"), clouds.float())
    assert torch.equal(varied("strong"), varied("strong"))
    assert not torch.equal(varied("light"), varied("light", seed=1))
    for moved in (varied("light"), varied("strong")):
        assert (moved.shape, moved.dtype) == (clouds.shape, torch.float32)
        torch.testing.assert_close(moved[..., 3:].norm(dim=-1), torch.ones(40, 256))
    still = varied("light", flip=False, of=Points(256, 6, up="y", turn=False))
    before, after = clouds.float()[..., :3], still[..., :3]
    scale = (after - after.mean(1, keepdim=True)).std(1) / before.std(1)
    assert float(scale.min()) > 2 / 3 - 1e-3
    assert float(scale.max()) < 3 / 2 + 1e-3
    height = torch.corrcoef(torch.stack([varied("light")[0, :, 1], before[0, :, 1]]))[0, 1]
    assert float(height) > 0.999  # turned about the vertical axis


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": {"size_px": 32}}, "size_px would change nothing for modality points"),
        ({"modality": "images"}, "drawn solids are point clouds"),
        ({"modality": "clouds"}, "modality"),
        ({"data": {"format": "digits"}}, "format digits holds images"),
        ({"data": {"format": "drawn", "kind": "counting"}}, "drawn counting are images"),
        ({"recipe": {"lora": {}, "training": {"mixup": 0.2}}}, "mixup and cutmix mix images"),
        ({"recipe": {"lora": {}, "training": {"augment": "crop"}}}, "`crop` is of images"),
        ({"selection": {"views": "crop"}}, "`crop` is of images"),
        ({"input": {"points": 5000}}, "points"),
    ],
)
def test_what_is_not_of_points_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        validate(Task, {**SOLIDS, **changes}, source="t.yaml")


def test_a_task_of_points_survives_its_json() -> None:
    task = task_of(SOLIDS["data"], input={"points": 48, "up": "y"})
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_solids_are_drawn_by_their_seed() -> None:
    first = draw_solid("torus", np.random.default_rng(3))
    np.testing.assert_array_equal(first, draw_solid("torus", np.random.default_rng(3)))
    for name in NAMES:
        points = draw_solid(name, np.random.default_rng(1))
        assert points.shape[1] == 3
        assert np.isfinite(points).all()
