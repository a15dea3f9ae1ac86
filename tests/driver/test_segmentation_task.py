"""A segmentation task through the whole product, without Ray: prepared, selected, trained, packed,
reloaded, tested, predicted, exported.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cli import BACKBONE, taskpack, write_task
from PIL import Image

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones.known import remember
from pipeline.data import evaluation_batches, prepare
from pipeline.data.drawn_shapes import SHAPES, draw_shapes
from pipeline.driver.evaluation import _check_has_masks
from pipeline.errors import ExportError, SpecError
from pipeline.exchange.merged_checkpoint import export_checkpoint
from pipeline.exchange.onnx import export_onnx
from pipeline.kinds import kind_named, metric_named
from pipeline.packs import read_pack
from pipeline.registry.model_files import _signature
from pipeline.registry.pyfunc import PackModel
from pipeline.selection import select_locally
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor, load_backbone_of
from pipeline.specs import Backbone, Recipe, Task
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, evaluate, open_inputs
from pipeline.training.fit import PACK_FILE, FitResult, fit
from pipeline.training.full_size import evaluate_at_full_size
from pipeline.training.rehearsal import rehearse

SIDE = 32


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


FINE = {**BACKBONE, "arguments": {**BACKBONE["arguments"], "patch_size": 4}}
"""A tiny backbone whose maps have 8 x 8 places."""
SHAPES_DATA: dict[str, Any] = {"format": "drawn", "kind": "shapes", "size_px": SIDE}
RECIPE = {
    "connections": {"top_k": 2, "bits": 2},
    "biases": {},
    "smoa": {"experts": 2, "width": 4},
    "norms": {},
    "training": {"epochs": 10, "batch_size": 16, "learning_rate": 0.01, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.model_validate(
        {
            "name": "shapes",
            "kind": "segmentation",
            "data": {**SHAPES_DATA, "train_samples": 120, "test_samples": 40},
            "input": {"size_px": SIDE},
            "backbone": FINE,
            "recipe": RECIPE,
            "selection": {"batch_size": 16},
        }
    )


@pytest.fixture(scope="module")
def inputs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    prepare(task, folder)
    return open_inputs(task, folder)


@pytest.fixture(scope="module")
def fitted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    """A finished fit, and its folder."""
    folder = tmp_path_factory.mktemp("fit")
    selected = select_locally(inputs, 2)
    result = fit(inputs, inputs.task.recipe, selected, folder)
    announced = SizePlanner(inputs.task, inputs.backbone, SHAPES, selected)
    assert announced.size_bytes(inputs.task.recipe) == result.size_bytes
    return folder, result


@pytest.fixture(scope="module")
def predictor(fitted: tuple[Path, FitResult]) -> Predictor:
    pack = read_pack(fitted[0] / PACK_FILE)
    return Predictor(pack, load_backbone_of(pack.metadata, "random"), "cpu")


def test_it_learns_to_find_shapes(inputs: Inputs, fitted: tuple[Path, FitResult]) -> None:
    _, result = fitted
    assert (result.metric, result.test_samples) == ("mIoU", 40)
    drawn = (draw_shapes(SIDE, np.random.default_rng([0, 1, number]))[1] for number in range(40))
    background = np.mean([float((mask == 0).mean()) for mask in drawn])
    assert result.test_metric > background / len(SHAPES) + 0.05, "no better than background alone"
    assert result.size_bytes < 8192


def test_a_reloaded_pack_is_tested_the_same_again(
    inputs: Inputs, fitted: tuple[Path, FitResult], predictor: Predictor
) -> None:
    _, result = fitted
    assert predictor.metadata.kind == "segmentation"
    split = inputs.splits["test"]
    outcomes = evaluate(predictor.model, inputs.reader("test"), split, inputs.kind)
    assert metric_named("mIoU", "segmentation").value(outcomes) == result.test_metric
    assert outcomes.outputs.shape == (40, len(SHAPES), 4)


def test_a_mask_has_the_size_of_its_image(inputs: Inputs, predictor: Predictor) -> None:
    images, _ = inputs.reader("test").read(evaluation_batches(inputs.splits["test"], 8)[0])
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images]
    wide = [picture.resize((3 * SIDE, 2 * SIDE)) for picture in pictures]
    rows, wide_rows = predictor.predict(pictures), predictor.predict(wide)
    logits = predictor.logits(pictures)
    assert logits.shape == (8, len(SHAPES), SIDE, SIDE)
    for row, wide_row, logits_CSS in zip(rows, wide_rows, logits, strict=True):
        mask = pixels(row["mask"])
        assert np.array_equal(mask, logits_CSS.argmax(0).numpy())
        assert pixels(wide_row["mask"]).shape == (2 * SIDE, 3 * SIDE)
        assert sum(row["areas"].values()) == pytest.approx(1)
        assert list(row["areas"]) == list(SHAPES)


def test_in_the_size_of_the_input_both_evaluations_agree(
    inputs: Inputs, predictor: Predictor
) -> None:
    split, reader = inputs.splits["test"], inputs.reader("test")
    expected = evaluate(predictor.model, reader, split, inputs.kind)
    found = evaluate_at_full_size(predictor.model, reader, split, inputs.kind)
    assert np.array_equal(found.outputs, expected.outputs)
    assert np.array_equal(found.targets, expected.targets)


def test_a_fit_is_tested_in_the_sizes_of_the_masks(task: Task, tmp_path: Path) -> None:
    """Against the masks that `predict` writes."""
    images = {}
    for split, count in (("train", 4), ("val", 4), ("test", 3)):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number in range(count):
            drawn = draw_shapes(SIDE, np.random.default_rng([count, number]))
            size = (2 * SIDE + 8 * number, SIDE + 5)
            for kind, pixels_ in zip(("images", "masks"), drawn, strict=True):
                picture = Image.fromarray(pixels_).resize(size, Image.Resampling.NEAREST)
                picture.save(tmp_path / split / kind / f"{split}{number}.png")
                images[split, number, kind] = picture
    data = {split: str(tmp_path / split) for split in ("train", "val", "test")}
    masks = {"format": "masks", "classes": list(SHAPES), **data}
    recipe = {"preset": "linear", "training": {"batch_size": 2, "epochs": 1}}
    rest = task.model_dump(exclude={"data", "search", "recipe", "selection"})
    own = {"data": masks, "recipe": recipe, "selection": {"batch_size": 4}}
    whole = Task.model_validate({**rest, **own})
    prepare(whole, tmp_path / "data")
    inputs = open_inputs(whole, tmp_path / "data")
    result = fit(inputs, inputs.task.recipe, None, tmp_path / "fit")
    pack = read_pack(tmp_path / "fit" / PACK_FILE)
    predictor = Predictor(pack, load_backbone_of(pack.metadata, "random"), "cpu")
    split, reader = inputs.splits["test"], inputs.reader("test")
    found = evaluate_at_full_size(predictor.model, reader, split, inputs.kind)
    assert result.test_metric == inputs.metric.value(found)
    rows = predictor.predict([images["test", number, "images"] for number in range(3)])
    for number, row in enumerate(rows):
        mask, truth = pixels(row["mask"]), np.asarray(images["test", number, "masks"])
        both = [int(((mask == k) & (truth == k)).sum()) for k in range(len(SHAPES))]
        matches = [n for n in range(3) if found.outputs[n, :, 0].tolist() == both]
        assert matches, f"image {number} has no matching outcome"
        assert found.targets[matches[0], :, 0].sum() == truth.size


def test_a_kind_without_masks_has_none_to_draw() -> None:
    with pytest.raises(SpecError, match="--figure: a pack of kind multilabel predicts no masks"):
        _check_has_masks(kind_named("multilabel"))


def test_mlflow_is_told_the_columns_and_given_them(predictor: Predictor) -> None:
    frame = PackModel(predictor).predict(np.zeros((1, 20, 30, 3), np.uint8))
    assert list(frame.columns) == _signature("segmentation").outputs.input_names()
    assert pixels(frame["mask"][0]).shape == (20, 30)
    assert _signature("segmentation").outputs.to_dict()[1]["type"] == "binary"


def test_the_command_writes_masks(fitted: tuple[Path, FitResult], tmp_path: Path) -> None:
    remember(read_pack(fitted[0] / PACK_FILE).metadata.backbone["fingerprint"], "random")
    drawn = draw_shapes(40, np.random.default_rng(0))[0]
    image, grey = tmp_path / "a.png", tmp_path / "grey.png"
    Image.fromarray(drawn).save(image)
    Image.fromarray(drawn[..., 0].astype(np.uint16) * 257).save(grey)
    command, out = ["predict", fitted[0] / PACK_FILE, image, "--device", "cpu"], tmp_path / "out"
    row, other = json.loads(taskpack(*command, grey, "--out", out, "--json").out)
    assert (row["mask"], row["overlay"]) == (f"{out}/a.mask.png", f"{out}/a.overlay.png")
    mask, overlay = (pixels(Path(row[name]).read_bytes()) for name in ("mask", "overlay"))
    assert (mask.shape, overlay.shape) == ((40, 40), (40, 40, 3))
    assert (mask > 0).any()
    assert np.array_equal((overlay != drawn).any(axis=2), mask > 0), "only classes are coloured"
    content = json.loads((out / "areas.json").read_text())
    assert content["images"] == [row, other]
    assert list(content["colours"]) == sorted(SHAPES)
    assert content["colours"]["background"] is None
    k = int(mask.max())
    place = tuple(np.argwhere(mask == k)[0])
    colour = bytes.fromhex(content["colours"][SHAPES[k]][1:])
    assert np.allclose(overlay[place], (drawn[place].astype(float) + list(colour)) / 2, atol=1)
    plain = pixels((out / "grey.overlay.png").read_bytes())
    uncoloured = pixels((out / "grey.mask.png").read_bytes()) == 0
    assert np.array_equal(plain[uncoloured][:, 0], drawn[..., 0][uncoloured]), "16 bits as 8"


def test_the_command_prints_areas_without_a_folder(
    fitted: tuple[Path, FitResult], tmp_path: Path
) -> None:
    remember(read_pack(fitted[0] / PACK_FILE).metadata.backbone["fingerprint"], "random")
    image = tmp_path / "a.png"
    Image.fromarray(draw_shapes(40, np.random.default_rng(0))[0]).save(image)
    command = ["predict", fitted[0] / PACK_FILE, image, "--device", "cpu"]
    (row,) = json.loads(taskpack(*command, "--json").out)
    assert row.keys() == {"image", "areas"}
    assert "background" in taskpack(*command).out
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.png").write_bytes(image.read_bytes())
    twice = taskpack(*command, tmp_path / "b/a.png", "--out", tmp_path / "twice")
    assert (twice.code, "has the same name" in twice.words) == (2, True)
    assert not (tmp_path / "twice").exists()


@pytest.mark.slow
def test_it_is_exported_to_onnx(
    fitted: tuple[Path, FitResult], inputs: Inputs, tmp_path: Path
) -> None:
    pack = read_pack(fitted[0] / PACK_FILE)
    assert export_onnx(pack, inputs.backbone, tmp_path / "shapes.onnx") < 1e-4


def test_a_format_without_masks_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    result = tmp_path / "fit"
    recipe = Recipe.model_validate({"biases": {}, "training": {"epochs": 1}})
    fit(inputs, recipe, None, result)
    with pytest.raises(ExportError, match="not for masks; export to onnx"):
        export_checkpoint(read_pack(result / PACK_FILE), inputs.backbone, tmp_path / "timm")


def test_a_host_of_many_packs_gives_the_same_masks(
    inputs: Inputs, fitted: tuple[Path, FitResult], predictor: Predictor
) -> None:
    host = PackHost(inputs.backbone, lambda name: (fitted[0] / PACK_FILE).read_bytes())
    images = [draw_shapes(side, np.random.default_rng(side))[0] for side in (24, 70)]
    assert host.predict([("shapes", image) for image in images]) == predictor.predict(images)


def test_it_belongs_to_the_backbone_of_other_tasks(inputs: Inputs, task: Task) -> None:
    from pipeline.backbones import load_backbone

    pooled = load_backbone(Backbone.model_validate(FINE), task.input)
    assert pooled.fingerprint == inputs.backbone.fingerprint
    assert (pooled.gives_maps, inputs.backbone.gives_maps) == (False, True)


def test_every_recipe_of_the_default_space_can_train(inputs: Inputs) -> None:
    content = inputs.task.model_dump(exclude={"search"}) | {"recipe": {"preset": "default"}}
    opened = inputs.with_task(Task.model_validate(content))
    points = opened.task.search.configurations
    assert points
    by_parts = {point["parts"]: point for point in points}
    assert len(by_parts) > 5
    for point in by_parts.values():
        rehearse(opened, opened.task.search.recipe(opened.task.recipe, point))


def test_the_same_seed_gives_the_same_pack(inputs: Inputs, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"biases": {}, "training": {"epochs": 1, "batch_size": 60, "augment": "crop", "cutmix": 1}}
    )
    digests = [
        hashlib.sha256((tmp_path / name / PACK_FILE).read_bytes()).hexdigest()
        for name in ("a", "b")
        if fit(inputs, recipe, None, tmp_path / name)
    ]
    assert digests[0] == digests[1]


def test_the_task_of_the_catalogue_is_valid() -> None:
    from helpers_paths import PROJECT_ROOT

    task = load_task(PROJECT_ROOT / "tasks/segmentation/shapes.yaml")
    assert (task.kind, task.metric, task.selection.loss) == (
        "segmentation",
        "mIoU",
        "cross_entropy",
    )


@pytest.mark.slow
def test_a_run_registers_a_pack(tmp_path: Path) -> None:
    data = {**SHAPES_DATA, "train_samples": 80, "test_samples": 40}
    changes = {"name": "shapes", "kind": "segmentation", "data": data, "input": {"size_px": SIDE}}
    path = write_task(tmp_path, **changes, search={"trials": 2, "bits": [2, 4]})
    work = ["--workdir", str(tmp_path / "runs")]
    assert taskpack("run", path, *work).code == 0
    figure = tmp_path / "masks.png"
    content = json.loads(taskpack("evaluate", "shapes", *work, "--json", "--figure", figure).out)
    assert content["test_metric"] == content["registered_test_metric"]
    assert list(content["by_class"]) == list(SHAPES)
    assert np.mean(list(content["by_class"].values())) == pytest.approx(content["test_metric"])
    with Image.open(figure) as drawn:
        assert drawn.size == (1080, 1080)
    shown = json.loads(taskpack("show", "shapes", *work, "--json").out)
    name = f"test_mIoU/{SHAPES[1]}"
    assert shown["metrics"][name] == pytest.approx(content["by_class"][SHAPES[1]])
