"""HDF5 files of point clouds, in the layouts of ModelNet40 and ScanObjectNN."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_points import SOLIDS

from pipeline.data import Reader, prepare, split_samples
from pipeline.data.hdf5 import hdf5_source
from pipeline.data.points import Points
from pipeline.errors import DataError, SpecError
from pipeline.specs import Hdf5Data, Task
from pipeline.specs.faults import validate

h5py = pytest.importorskip("h5py", reason="the extra hdf5 is not installed")

RNG = np.random.default_rng(0)
CLOUDS = RNG.normal(size=(24, 40, 3)).astype(np.float32)
LABELS = np.arange(24) % 3


def write(path: Path, **datasets: Any) -> str:
    with h5py.File(path, "w") as file:
        for name, content in datasets.items():
            file.create_dataset(name, data=content, compression="gzip")
    return str(path)


def modelnet(folder: Path) -> dict[str, Any]:
    """Several files with normals, labels [N, 1] of one byte, names in a text file."""
    labels, normals = LABELS[:, None].astype(np.uint8), -CLOUDS
    for number in range(2):
        rows = slice(12 * number, 12 * number + 12)
        write(
            folder / f"ply_data_train{number}.h5",
            data=CLOUDS[rows],
            normal=normals[rows],
            label=labels[rows],
        )
    test = write(folder / "ply_data_test0.h5", data=CLOUDS + 1, normal=normals, label=labels)
    (folder / "shape_names.txt").write_text("airplane\nbathtub\nbed\n")
    return {
        "format": "hdf5",
        "train": str(folder / "ply_data_train*.h5"),
        "test": test,
        "classes": str(folder / "shape_names.txt"),
    }


def scanobjectnn(folder: Path) -> dict[str, Any]:
    """One file a split, labels [N], a mask of the object's points."""
    mask = np.zeros((24, 40))
    train = write(folder / "training_objectdataset.h5", data=CLOUDS, label=LABELS, mask=mask)
    test = write(folder / "test_objectdataset.h5", data=CLOUDS + 1, label=LABELS, mask=mask)
    return {"format": "hdf5", "train": train, "test": test}


def task_of(data: dict[str, Any], channels: int = 3) -> Task:
    backbone = SOLIDS["backbone"]
    arguments = {**backbone["arguments"], "channels": channels}
    recipe = {**SOLIDS["recipe"], "training": {"batch_size": 8}}
    content = {**SOLIDS, "data": data, "recipe": recipe, "selection": {"batch_size": 8}}
    return validate(
        Task, {**content, "backbone": {**backbone, "arguments": arguments}}, source="t.yaml"
    )


@pytest.mark.parametrize(
    ("layout", "channels", "classes"),
    [(modelnet, 6, ["airplane", "bathtub", "bed"]), (scanobjectnn, 3, ["0", "1", "2"])],
)
def test_both_layouts_are_read(
    tmp_path: Path,
    layout: Callable[[Path], dict[str, Any]],
    channels: int,
    classes: list[str],
) -> None:
    task = task_of(layout(tmp_path), channels)
    index = prepare(task, tmp_path / "prepared")
    assert index.classes == classes
    assert prepare(task, tmp_path / "prepared") == index
    split = split_samples(index, 0.25, 0)["test"]
    takes = Points(32, channels)
    clouds, labels = Reader(tmp_path / "prepared", split, takes).read(split.samples)
    assert clouds.shape == (24, 32, channels)
    together = np.concatenate([CLOUDS + 1, -CLOUDS], axis=-1)[..., :channels]
    for cloud, label in zip(clouds, labels.tolist(), strict=True):
        of_class = [takes.decode(each) for each in together[label == LABELS]]
        assert any(torch.equal(cloud, torch.from_numpy(each)) for each in of_class)


def linked(folder: Path) -> None:
    """Write a file whose clouds are in another one."""
    write(folder / "other.h5", data=CLOUDS)
    with h5py.File(folder / "a.h5", "w") as file:
        file["data"] = h5py.ExternalLink("other.h5", "data")
        file["label"] = LABELS


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no data": (lambda at: write(at / "a.h5", points=CLOUDS, label=LABELS), "holds label, points"),
    "no label": (lambda at: write(at / "a.h5", data=CLOUDS), "holds data; expected `data`"),
    "a link": (linked, "holds data, label; expected"),
    "flat": (
        lambda at: write(at / "a.h5", data=CLOUDS[:, 0], label=LABELS),
        r"data \[24, 3\], label \[24\]; expected",
    ),
    "other labels": (
        lambda at: write(at / "a.h5", data=CLOUDS, label=LABELS[:5]),
        r"label \[5\]; expected",
    ),
    "other normals": (
        lambda at: write(at / "a.h5", data=CLOUDS, normal=CLOUDS[:3], label=LABELS),
        r"normal \[3, 40, 3\]",
    ),
    "shares as labels": (
        lambda at: write(at / "a.h5", data=CLOUDS, label=LABELS / 2),
        "`label` holds float64",
    ),
    "negative labels": (
        lambda at: write(at / "a.h5", data=CLOUDS, label=LABELS - 1),
        "from -1 on; expected whole numbers from 0",
    ),
    "too many classes": (
        lambda at: write(at / "a.h5", data=CLOUDS, label=LABELS + 5),
        "cloud 0: label 5 is outside the 3 classes",
    ),
    "cut short": (
        lambda at: (at / "a.h5").write_bytes(
            Path(write(at / "whole.h5", data=CLOUDS, label=LABELS)).read_bytes()[:-900]
        ),
        "not a whole HDF5 file",
    ),
    "text": (lambda at: (at / "a.h5").write_text("1 2 3\n"), "not a whole HDF5 file"),
    "absent": (lambda at: None, "no such file; expected a HDF5 file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    write(tmp_path / "b.h5", data=CLOUDS, label=LABELS)
    make(tmp_path)
    data = Hdf5Data(
        format="hdf5",
        train=str(tmp_path / "a.h5"),
        test=str(tmp_path / "b.h5"),
        classes=("one", "two", "three"),
    )
    with pytest.raises(DataError, match=message) as error:
        hdf5_source(data)
    assert str(error.value).startswith(str(tmp_path / "a.h5"))


def test_bad_clouds_in_a_file_are_all_named(tmp_path: Path) -> None:
    data = scanobjectnn(tmp_path)
    faulty = CLOUDS.copy()
    faulty[[3, 5], 0] = np.nan
    write(tmp_path / "training_objectdataset.h5", data=faulty, label=LABELS)
    with pytest.raises(DataError, match="2 point clouds cannot be used") as error:
        prepare(task_of(data), tmp_path / "prepared")
    assert "training_objectdataset.h5: cloud 3: 1 of 40 points are not finite" in str(error.value)


def test_a_split_is_no_other_split_and_a_url_is_refused(tmp_path: Path) -> None:
    data = scanobjectnn(tmp_path)
    with pytest.raises(DataError, match="given in two splits"):
        hdf5_source(Hdf5Data(**{**data, "test": data["train"]}))
    with pytest.raises(DataError, match="download it first"):
        hdf5_source(Hdf5Data(**{**data, "test": "https://example.org/a.h5"}))


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scanobjectnn(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install 'taskpack\[hdf5\]'"):
        hdf5_source(Hdf5Data(**data))


def test_images_are_not_read_from_hdf5() -> None:
    data = {"format": "hdf5", "train": "a.h5", "test": "b.h5"}
    with pytest.raises(SpecError, match="hdf5 holds point clouds"):
        validate(Task, {**SOLIDS, "modality": "images", "data": data}, source="t.yaml")
