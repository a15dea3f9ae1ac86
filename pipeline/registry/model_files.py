"""The files of a registered pack: an MLflow model folder around the pack, and the study's front."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.kinds import kind_named
from pipeline.registry.connection import import_pyfunc, without_warnings
from pipeline.registry.pack_record import COVERAGE_TAG, KIND_TAG, Champion

PACK_FILE = "pack.safetensors"
OUTCOMES_FILE = "outcomes.safetensors"
_MAX_OUTCOMES_BYTES = 1024 * 1024
"""Validation outputs that take more (thousands of samples of hundreds of classes) are not stored
beside a pack of a few kilobytes.
"""


def write_model(champion: Champion, folder: Path, model_id: str) -> Path:
    """A pyfunc model folder whose data is the pack and whose code is this package, installed."""
    import pandas as pd
    from mlflow.models import Model

    pack, target = folder / PACK_FILE, folder / "model"
    modality = champion.modality
    shutil.copyfile(champion.pack_path, pack)
    pyfunc = import_pyfunc()
    with without_warnings():  # pandas warns about how MLflow writes the example
        pyfunc.save_model(
            str(target),
            loader_module="pipeline.registry.pyfunc",
            data_path=str(pack),
            mlflow_model=Model(model_id=model_id),
            signature=_signature(
                champion.tags.get(KIND_TAG, "classification"),
                modality.column,
                COVERAGE_TAG in champion.tags,
            ),
            input_example=pd.DataFrame(
                {modality.column: [base64.b64encode(modality.example()).decode()]}
            ),
            # Given, because MLflow otherwise imports the model in a subprocess to find out what it
            # needs.
            pip_requirements=["taskpack"],
        )
    return target


def write_front(champion: Champion, folder: Path) -> Path:
    """A folder with the study's trials as JSON and, where there are, the figure of its front and
    the champion's validation outputs.
    """
    target = folder / "front"
    target.mkdir()
    (target / "front.json").write_text(
        json.dumps(champion.front, sort_keys=True, allow_nan=False, indent=1) + "\n",
        encoding="utf-8",
    )
    if champion.front_figure is not None:
        shutil.copyfile(champion.front_figure, target / f"front{champion.front_figure.suffix}")
    outcomes = champion.outcomes
    is_there = outcomes is not None and outcomes.exists()
    if outcomes is not None and is_there and outcomes.stat().st_size <= _MAX_OUTCOMES_BYTES:
        shutil.copyfile(outcomes, target / OUTCOMES_FILE)
    return target


def _signature(kind: str, column: str = "image", has_sets: bool = False) -> Any:
    """A column of samples in, the columns of a kind out. A sample is a path, the bytes of a file,
    or those bytes as base64.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Map

    types: dict[Any, Any] = {
        str: DataType.string,
        float: DataType.double,
        bytes: DataType.binary,
        list[str]: Array(DataType.string),
        dict[str, float]: Map(DataType.double),
    }
    columns: list[Any] = [
        ColSpec(types[type_of], name) for name, type_of in kind_named(kind).columns
    ]
    columns += [ColSpec(Array(DataType.string), "set")] if has_sets else []
    return ModelSignature(inputs=Schema([ColSpec(AnyType(), column)]), outputs=Schema(columns))
