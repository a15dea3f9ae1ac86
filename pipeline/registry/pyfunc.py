"""A registered pack as an MLflow pyfunc model.

The MLmodel file of a registered pack names this module as its loader and the pack as its data, so
`mlflow.pyfunc.load_model("models:/NAME@champion")`, `mlflow models serve` and batch scoring run the
installed taskpack: loading a model executes nothing that was stored with it. The backbone, far
larger than any pack, is not stored with it either: TASKPACK_BACKBONE names its checkpoint where the
weights that the pack records cannot be found. TASKPACK_DEVICE names where to compute, such as `cpu`
or `cuda:1`; without it, that is the GPU, where there is one.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data import MODALITIES, Modality
from pipeline.errors import DataError, PackForeign


def _load_pyfunc(path: str) -> PackModel:
    """MLflow's entry point: `path` is the pack, or the folder that holds it."""
    from pipeline.serving.predictor import load_predictor

    return PackModel(
        load_predictor(
            _find_pack(Path(path)),
            os.environ.get("TASKPACK_BACKBONE"),
            os.environ.get("TASKPACK_DEVICE"),
        )
    )


def _find_pack(path: Path) -> Path:
    if path.is_file():
        return path
    packs = sorted(path.rglob("*.safetensors"))
    if len(packs) != 1:
        raise PackForeign(
            f"{path}: expected one pack (.safetensors) in this folder, found {len(packs)}; register"
            " the task again"
        )
    return packs[0]


class PackModel:
    """What `load_model` wraps: images in, predictions of the pack's kind out."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per image. Raises DataError for what is not an image input.

        The columns are the keys of `Predictor.predict`: `label` and `probability` (0 to 1) for
        classification, with `set` if the pack has a coverage; `labels` and `probabilities` for
        multi-label; `areas` and `mask` (a PNG's bytes) for segmentation.

        A text is a path where such a file exists, otherwise base64.
        """
        if params:
            raise DataError(
                f"params: given {', '.join(sorted(params))}; a pack takes none, leave them out"
            )
        modality = MODALITIES[self._predictor.metadata.modality]
        rows = self._predictor.predict(_samples(model_input, modality))
        return pd.DataFrame(
            {name: [row[name] for row in rows] for name, _ in self._predictor.columns}
        )


def _samples(model_input: Any, modality: type[Modality]) -> list[Any]:
    column, expected = modality.column, _expected(modality)
    if isinstance(model_input, pd.DataFrame):
        if column not in model_input.columns:
            raise DataError(
                f"no column {column!r}, given columns: {', '.join(map(str, model_input.columns))};"
                f" {expected}"
            )
        model_input = [
            each
            for cell in model_input[column]
            for each in (cell if isinstance(cell, list) else [cell])
        ]
    if isinstance(model_input, np.ndarray):
        if modality.is_batch(model_input):
            return list(model_input)
        if model_input.ndim != 1:
            raise DataError(
                f"given an array of {model_input.dtype} {list(model_input.shape)}; {expected}"
            )
        model_input = model_input.tolist()
    if not isinstance(model_input, list):
        raise DataError(f"given {type(model_input).__name__}; {expected}")
    return [_sample(value, index, modality) for index, value in enumerate(model_input)]


def _expected(modality: type[Modality]) -> str:
    return (
        f"expected paths, bytes or base64 text of {modality.noun} files as a list or a DataFrame's"
        f" column {modality.column!r}, or {modality.arrays}"
    )


def _sample(value: Any, index: int, modality: type[Modality]) -> Any:
    where = f"{modality.column} {index}"
    if isinstance(value, (bytes, bytearray, Path)):
        return bytes(value) if isinstance(value, bytearray) else value
    if not isinstance(value, str):
        raise DataError(f"{where}: given {type(value).__name__}; {_expected(modality)}")
    if os.path.isfile(value):
        return Path(value)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        text = value if len(value) <= 80 else value[:77] + "..."
        raise DataError(
            f"{where}: {text!r} is neither a file here nor base64; {_expected(modality)}"
        ) from None
