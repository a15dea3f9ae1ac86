"""A registered pack as MLflow's users load it, and what its `predict` takes."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.errors import DataError, PackForeign
from pipeline.kinds import kind_named
from pipeline.registry.connection import import_mlflow, import_pyfunc
from pipeline.registry.pack_record import Champion
from pipeline.registry.pyfunc import PackModel, _load_pyfunc
from pipeline.registry.store import open_registry


class RecordingPredictor:
    """Answers with the type of what it was given, so that a test sees how an input was
    understood.
    """

    kind = kind_named("classification")
    columns = kind.columns
    metadata = SimpleNamespace(modality="images")

    def predict(self, images: list[Any]) -> list[dict[str, Any]]:
        return [
            {"label": type(image).__name__, "probability": 1 / (1 + index)}
            for index, image in enumerate(images)
        ]


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[Path, str | None]]:
    """Stands in for the predictor's module; the list holds what it was asked to load."""
    calls: list[tuple[Path, str | None]] = []
    module = ModuleType("pipeline.serving.predictor")

    def load_predictor(
        pack_path: Path, weights: str | None, device: str | None
    ) -> RecordingPredictor:
        calls.append((pack_path, weights))
        return RecordingPredictor()

    module.load_predictor = load_predictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.serving.predictor", module)
    monkeypatch.delenv("TASKPACK_BACKBONE", raising=False)
    return calls


@pytest.fixture
def png(tmp_path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_mlflow_loads_a_registered_pack_without_stored_code(
    loaded, template, tmp_path, png, monkeypatch
) -> None:
    monkeypatch.setenv("TASKPACK_BACKBONE", "/weights/vit.safetensors")
    shutil.copyfile(template, tmp_path / "mlflow.db")
    registry = open_registry(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    pack = tmp_path / "anything.bin"
    pack.write_bytes(b"p" * 50)
    registry.register(
        Champion(
            task="digits",
            pack_path=pack,
            pack_digest="d",
            size_bytes=50,
            ledger={"head": 50},
            metrics={"test_metric": 0.9},
        )
    )
    mlflow = import_pyfunc() and import_mlflow()
    mlflow.set_tracking_uri(registry.store.tracking_uri)
    try:
        model = mlflow.pyfunc.load_model("models:/digits@champion")
    finally:
        mlflow.set_tracking_uri(None)
    ((pack_path, weights),) = loaded
    assert pack_path.read_bytes() == b"p" * 50
    assert weights == "/weights/vit.safetensors"
    flavor = model.metadata.flavors["python_function"]
    assert flavor["loader_module"] == "pipeline.registry.pyfunc"
    assert "python_model" not in flavor
    assert flavor["code"] is None
    answer = model.predict(pd.DataFrame({"image": [str(png), png.read_bytes()]}))
    assert answer.to_dict("list") == {"label": ["PosixPath", "bytes"], "probability": [1.0, 0.5]}
    text = base64.b64encode(png.read_bytes()).decode()
    assert model.predict({"image": [str(png), text]}).label.tolist() == ["PosixPath", "bytes"]
    assert model.predict(model.input_example).label.tolist() == ["bytes"]
    assert model.metadata.get_input_schema().input_names() == ["image"]
    assert model.metadata.get_output_schema().input_names() == ["label", "probability"]


def test_the_pack_is_found_in_a_file_or_a_folder(loaded, tmp_path) -> None:
    with pytest.raises(PackForeign, match="found 0"):
        _load_pyfunc(str(tmp_path))
    (tmp_path / "data").mkdir()
    pack = tmp_path / "data" / "pack.safetensors"
    pack.touch()
    _load_pyfunc(str(pack))
    _load_pyfunc(str(tmp_path))
    assert loaded == [(pack, None), (pack, None)]
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(PackForeign, match="found 2"):
        _load_pyfunc(str(tmp_path))


class EchoPredictor:
    kind = kind_named("classification")
    columns = kind.columns
    metadata = SimpleNamespace(modality="images")

    def __init__(self) -> None:
        self.images: list[Any] = []

    def predict(self, images: list[Any]) -> list[dict[str, Any]]:
        self.images = images
        return [{"label": "x", "probability": 0.5} for _ in images]


def understood(model_input: Any) -> list[Any]:
    predictor = EchoPredictor()
    answer = PackModel(predictor).predict(model_input)
    assert len(answer) == len(predictor.images)
    return predictor.images


def test_every_input_form_means_the_same_image(png) -> None:
    content = png.read_bytes()
    text = base64.b64encode(content).decode()
    assert understood([str(png)]) == understood([png]) == [png]
    assert (
        understood([content]) == understood([bytearray(content)]) == understood([text]) == [content]
    )
    frame = pd.DataFrame({"id": [7, 8, 9], "image": [str(png), content, text]}, index=[5, 5, 5])
    assert understood(frame) == [png, content, content]
    assert understood(np.array([text, text])) == [content, content]
    assert understood(np.array([content, text], dtype=object)) == [content, content]
    with Image.open(io.BytesIO(content)) as image:
        pixels_NHWC = np.asarray(image.convert("RGB"))[None]
    assert np.array_equal(understood(pixels_NHWC)[0], pixels_NHWC[0])
    assert understood([]) == []


@pytest.mark.parametrize(
    ("model_input", "message"),
    [
        (pd.DataFrame({"picture": ["x"]}), "no column 'image', given columns: picture"),
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[2, 3, 8, 8\]"),
        ("image.png", "given str"),
        ({"image": ["x"]}, "given dict"),
        ([b"fine", None], "image 1: given NoneType"),
        ([float("nan")], "image 0: given float"),
        (["no-such-file.png"], "neither a file here nor base64"),
        (["a\0b"], "neither a file here nor base64"),
        (["é" * 5000], "neither a file here nor base64"),
    ],
)
def test_what_is_no_image_is_refused_by_place_and_kind(model_input, message) -> None:
    with pytest.raises(DataError, match=message):
        PackModel(EchoPredictor()).predict(model_input)


def test_parameters_are_refused_rather_than_ignored(png) -> None:
    with pytest.raises(DataError, match="top_k"):
        PackModel(EchoPredictor()).predict([png], params={"top_k": 5})
