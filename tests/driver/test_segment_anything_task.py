"""A task on SAM through the whole product, with GPS's recipe: connections of the encoder and its
neck, and the whole decoder.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import evaluation_batches, prepare
from pipeline.data.drawn_shapes import SHAPES
from pipeline.errors import SpecError
from pipeline.exchange.onnx import export_onnx
from pipeline.packs import read_pack
from pipeline.selection import select_locally
from pipeline.serving.predictor import Predictor, load_backbone_of
from pipeline.specs import Recipe, Task
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, evaluate, open_inputs
from pipeline.training.fit import PACK_FILE, FitResult, fit

SIDE = 32
BACKBONE = {
    "model": "sam_base_patch16",
    "weights": "random",
    "arguments": {
        **{"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        **{"window_size": 4, "global_attn_indexes": [1], "neck_chans": 32},
    },
}
RECIPE = {
    "connections": {"top_k": 1, "bits": 4},
    "biases": {"bits": 4},
    "decoder": {"bits": 4},
    "head": {"bits": 4},
    "training": {
        **{"loss": "bce_iou", "epochs": 2, "batch_size": 8, "learning_rate": 0.003},
        **{"precision": "fp32"},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return _opened(80, tmp_path_factory.mktemp("sam") / "data")


def _opened(train_samples: int, folder: Path) -> Inputs:
    drawn = {"format": "drawn", "kind": "shapes", "size_px": SIDE}
    task = Task.model_validate(
        {
            **{"name": "shapes", "kind": "segmentation", "input": {"size_px": SIDE}},
            "data": {**drawn, "train_samples": train_samples, "test_samples": 20},
            **{"backbone": BACKBONE, "recipe": RECIPE, "selection": {"batch_size": 16}},
        }
    )
    prepare(task, folder)
    return open_inputs(task, folder)


@pytest.fixture(scope="module")
def fitted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    folder = tmp_path_factory.mktemp("fit")
    return folder, fit(inputs, inputs.task.recipe, select_locally(inputs, 1), folder)


def test_it_trains_encoder_neck_and_decoder(fitted: tuple[Path, FitResult]) -> None:
    folder, _ = fitted
    pack = read_pack(folder / PACK_FILE)
    names: dict[str, set[str]] = defaultdict(set)
    for part in pack.parts:
        names[part.name] |= {spec.name for spec in part.tensors}
    connected = names["connections"]
    assert {"neck.0", "neck.2", "blocks.0.attn.qkv", "patch_embed.proj"} <= connected
    assert not any(name.startswith("decoder") for name in connected | names["biases"])
    assert "decoder.mask_tokens.weight" in names["full"]
    assert "decoder.transformer.layers.1.cross_attn_image_to_token.v_proj.weight" in names["full"]
    assert names["head"] == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    inputs = _opened(400, tmp_path / "data")
    training = {**RECIPE["training"], "epochs": 15}
    recipe = Recipe.model_validate({**RECIPE, "decoder": {"bits": 16}, "training": training})
    result = fit(inputs, recipe, select_locally(inputs, 1), tmp_path)
    batches = evaluation_batches(inputs.splits["test"], 8)
    truth = torch.cat([inputs.reader("test").read(batch)[1] for batch in batches])
    background_alone = float((truth == 0).float().mean()) / len(SHAPES)
    assert result.test_metric > background_alone + 0.02


def test_a_reloaded_pack_gives_the_same_again(
    inputs: Inputs, fitted: tuple[Path, FitResult]
) -> None:
    folder, result = fitted
    pack = read_pack(folder / PACK_FILE)
    predictor = Predictor(pack, load_backbone_of(pack.metadata, "random"), "cpu")
    outcomes = evaluate(predictor.model, inputs.reader("test"), inputs.splits["test"], inputs.kind)
    from pipeline.kinds import metric_named

    assert metric_named("mIoU", "segmentation").value(outcomes) == result.test_metric
    (row,) = predictor.predict([np.zeros((20, 30, 3), np.uint8)])
    assert list(row["areas"]) == list(SHAPES)


def test_a_selection_looks_at_the_decoder_through_class_tokens(inputs: Inputs) -> None:
    """Gradients reach every layer, also those that only class tokens pass."""
    selected = select_locally(inputs, 1)
    assert {"decoder.hypernetwork.layers.2", "decoder.transformer.layers.0.mlp.lin1"} <= set(
        selected
    )
    places = selected["decoder.hypernetwork.layers.0"].index_M
    assert len(torch.unique(places % inputs.backbone.width)) > 1, "not all gradients are equal"


def test_a_loss_of_another_kind_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: a\ndata: {format: digits}\nbackbone: {model: resnet10t}\n"
        "recipe: {biases: {}, training: {loss: bce_iou}}\n"
    )
    with pytest.raises(SpecError, match=r"given 'bce_iou', which is none of kind classification"):
        load_task(path)


@pytest.mark.slow
def test_it_is_exported_to_onnx(
    inputs: Inputs, fitted: tuple[Path, FitResult], tmp_path: Path
) -> None:
    pack = read_pack(fitted[0] / PACK_FILE)
    assert export_onnx(pack, inputs.backbone, tmp_path / "sam.onnx") < 1e-4
