"""A task of point clouds through the whole product, without Ray: prepared, selected, trained,
packed, reloaded, tested, predicted, written as a registered model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers_points import POINT_BACKBONE, SOLIDS

import pipeline
from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.unpacking import decode
from pipeline.backbones import load_backbone
from pipeline.data import prepare
from pipeline.data.drawn_solids import SOLIDS as NAMES
from pipeline.data.drawn_solids import draw_solid
from pipeline.errors import BackboneError, DataError, ExportError, PackBackboneMismatch
from pipeline.packs import read_pack
from pipeline.registry.pyfunc import PackModel
from pipeline.selection import select_locally
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor, load_backbone_of
from pipeline.specs import Input, Task
from pipeline.training import Inputs, evaluate, open_inputs
from pipeline.training.fit import PACK_FILE, FitResult, fit
from pipeline.training.rehearsal import rehearse


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    task, folder = Task.model_validate(SOLIDS), tmp_path_factory.mktemp("solids") / "data"
    prepare(task, folder)
    return open_inputs(task, folder)


@pytest.fixture(scope="module")
def fitted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    """A finished fit, and its folder."""
    folder, recipe = tmp_path_factory.mktemp("fit"), inputs.task.recipe
    rehearse(inputs, recipe)
    selected = select_locally(inputs, 2)
    result = fit(inputs, recipe, selected, folder)
    planner = SizePlanner(inputs.task, inputs.backbone, NAMES, selected)
    assert planner.size_bytes(recipe) == result.size_bytes
    return folder, result


@pytest.fixture(scope="module")
def predictor(fitted: tuple[Path, FitResult]) -> Predictor:
    pack = read_pack(fitted[0] / PACK_FILE)
    return Predictor(pack, load_backbone_of(pack.metadata, "random"), "cpu")


def test_it_learns_and_a_reloaded_pack_is_tested_the_same(
    inputs: Inputs, fitted: tuple[Path, FitResult], predictor: Predictor
) -> None:
    _, result = fitted
    assert result.test_metric > 2 / len(NAMES), "no better than chance"
    assert result.size_bytes < 8192
    metadata = predictor.metadata
    assert metadata.modality == "points"
    assert metadata.input.model_dump() == {"points": 64, "channels": 3, "scale": "unit"}
    outcomes = evaluate(predictor.model, inputs.reader("test"), inputs.splits["test"], inputs.kind)
    assert inputs.metric.value(outcomes) == result.test_metric


def test_files_and_arrays_of_a_cloud_get_one_prediction(
    predictor: Predictor, tmp_path: Path
) -> None:
    cloud = draw_solid("sphere", np.random.default_rng(5)).astype(np.float32)
    np.save(tmp_path / "a.npy", cloud)
    np.savetxt(tmp_path / "a.xyz", cloud, fmt="%.9g")
    rows = predictor.predict([tmp_path / "a.npy", cloud, (tmp_path / "a.xyz").read_bytes()])
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["label"] in NAMES
    with pytest.raises(DataError, match="point cloud 1: is a Python pickle"):
        predictor.predict([cloud, b"\x80\x04\x95"])
    frame = PackModel(predictor).predict(pd.DataFrame({"cloud": [str(tmp_path / "a.npy")]}))
    assert frame["label"].tolist() == [rows[0]["label"]]
    with pytest.raises(DataError, match="no column 'cloud'"):
        PackModel(predictor).predict(pd.DataFrame({"image": ["a.npy"]}))


def test_packs_of_clouds_share_a_pass(fitted: tuple[Path, FitResult], predictor: Predictor) -> None:
    content = (fitted[0] / PACK_FILE).read_bytes()
    host = PackHost(predictor.backbone, lambda name: content, device="cpu")
    clouds = [draw_solid(name, np.random.default_rng(7)) for name in NAMES]
    together = host.predict([("solids", cloud) for cloud in clouds])
    assert [row["label"] for row in together] == [row["label"] for row in predictor.predict(clouds)]


@pytest.mark.parametrize("to", ["onnx", "timm", "peft", "binary-adapter"])
def test_a_pack_of_clouds_is_not_exported(
    fitted: tuple[Path, FitResult], tmp_path: Path, to: Any
) -> None:
    with pytest.raises(ExportError, match="takes points; only packs of images can be exported"):
        pipeline.export(fitted[0] / PACK_FILE, to=to, path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backbone_of_something_else_is_refused(
    inputs: Inputs, fitted: tuple[Path, FitResult], tiny_task: Task
) -> None:
    pack = read_pack(fitted[0] / PACK_FILE)
    task = inputs.task.model_copy(update={"backbone": tiny_task.backbone})
    with pytest.raises(BackboneError, match="takes images, the task's samples are points"):
        open_inputs(task, inputs.data_folder)
    other = load_backbone(POINT_BACKBONE, Input(points=32))
    with pytest.raises(PackBackboneMismatch, match=r"'points': 64.*'points': 32"):
        decode(pack, other)
