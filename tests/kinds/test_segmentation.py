"""Segmentation as a kind: its loss by hand, its counts against scipy, its metrics against
torchmetrics.
"""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_erosion
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.segmentation import dice_score

from pipeline.kinds import IGNORED, Outcomes, kind_named, metric_named, metrics_of, score
from pipeline.kinds.mask_counts import BAND_HITS, BAND_PX, boundary_band

CLASSES, IMAGES, SIDE = 4, 6, 24
KIND = kind_named("segmentation")


def drawn(seed: int = 0, ignored: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs better than chance, and masks of blocks, with pixels that are ignored."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(CLASSES, size=(IMAGES, 3, 3))
    masks = np.kron(blocks, np.ones((8, 8), int))
    logits = np.eye(CLASSES)[masks] + rng.normal(size=(*masks.shape, CLASSES))
    masks[rng.random(masks.shape) < ignored] = IGNORED
    outputs = torch.from_numpy(logits.astype(np.float32)).movedim(-1, 1)
    return outputs, torch.from_numpy(masks.astype(np.uint8))


def outcomes_of(outputs: torch.Tensor, masks: torch.Tensor) -> Outcomes:
    return Outcomes(*(each.numpy() for each in KIND.kept(outputs, masks)))


def value(name: str, outputs: torch.Tensor, masks: torch.Tensor) -> float:
    return metric_named(name, "segmentation").value(outcomes_of(outputs, masks))


def test_the_loss_is_cross_entropy_plus_soft_dice_of_each_image() -> None:
    outputs, masks = drawn()
    losses = []
    for logits_CSS, mask in zip(outputs.double(), masks, strict=True):
        p, counted = logits_CSS.softmax(0), mask != IGNORED
        entropy = -p.gather(0, mask.long().clamp(max=CLASSES - 1)[None])[0][counted].log().mean()
        dice = []
        for number in set(mask[counted].tolist()):
            truth = (mask == number) & counted
            dice.append(2 * p[number][truth].sum() / (p[number][counted].sum() + truth.sum()))
        losses.append(entropy + 1 - sum(dice) / len(dice))
    expected = torch.stack(losses).mean().float()
    torch.testing.assert_close(KIND.loss(outputs, masks), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_of_gps_is_binary_cross_entropy_plus_soft_iou_of_each_image() -> None:
    outputs, masks = drawn()
    losses = []
    for logits_CSS, mask in zip(outputs.double(), masks, strict=True):
        p, counted = logits_CSS.sigmoid(), mask != IGNORED
        truths = [(mask == number) & counted for number in range(CLASSES)]
        right = torch.cat([torch.where(t, p[k], 1 - p[k])[counted] for k, t in enumerate(truths)])
        iou = []
        for number in set(mask[counted].tolist()):
            both, found = p[number][truths[number]].sum(), p[number][counted].sum()
            iou.append(both / (found + truths[number].sum() - both))
        losses.append(-right.log().mean() + 1 - sum(iou) / len(iou))
    expected = torch.stack(losses).mean().float()
    found = KIND.loss(outputs, masks, name="bce_iou")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    changed = outputs.movedim(1, -1).clone()
    changed[masks == IGNORED] += 5
    torch.testing.assert_close(KIND.loss(changed.movedim(-1, 1), masks, name="bce_iou"), found)


def test_ignored_pixels_and_the_rest_of_a_batch_change_no_loss() -> None:
    outputs, masks = drawn()
    changed = outputs.clone().movedim(1, -1)
    changed[masks == IGNORED] = 100 * torch.randn(int((masks == IGNORED).sum()), CLASSES)
    loss = KIND.loss(outputs, masks)
    torch.testing.assert_close(KIND.loss(changed.movedim(-1, 1), masks), loss)
    alone = [KIND.loss(outputs[k : k + 1], masks[k : k + 1]) for k in range(IMAGES)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss)
    assert value("mDice", changed.movedim(-1, 1), masks) == value("mDice", outputs, masks)
    nothing = torch.full_like(masks, IGNORED)
    assert math.isfinite(float(KIND.loss(outputs, nothing)))


def test_mean_iou_is_that_of_one_confusion_matrix() -> None:
    outputs, masks = drawn()
    expected = multiclass_jaccard_index(
        outputs, masks.long(), CLASSES, average="macro", ignore_index=IGNORED
    )
    assert value("mIoU", outputs, masks) == pytest.approx(float(expected), abs=1e-6)


def test_dice_is_a_mean_over_the_foreground_classes_of_each_image() -> None:
    outputs, masks = drawn(ignored=0)
    per_class_BC = dice_score(
        outputs.argmax(1),
        masks.long(),
        CLASSES,
        include_background=False,
        average="none",
        input_format="index",
        aggregation_level="samplewise",
    )
    predicted = outputs.argmax(1)
    expected = []
    for k in range(IMAGES):
        occurs = [
            c for c in range(1, CLASSES) if (masks[k] == c).any() or (predicted[k] == c).any()
        ]
        expected.append(np.mean([float(per_class_BC[k, c - 1]) for c in occurs]))
    found = score(metric_named("mDice", "segmentation"), outcomes_of(outputs, masks))
    assert found.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert found.standard_error == pytest.approx(np.std(expected) / math.sqrt(IMAGES), abs=1e-6)


def test_each_class_has_its_own_value_and_one_in_no_mask_has_none() -> None:
    outputs, masks = drawn()
    names = ["sky", "road", "car", "tree", "boat"]
    outputs = torch.cat([outputs, torch.full_like(outputs[:, :1], -100)], dim=1)
    by_class = {
        name: metric_named(name, "segmentation").values_by_class(outcomes_of(outputs, masks), names)
        for name in metrics_of("segmentation")
    }
    expected = multiclass_jaccard_index(
        outputs, masks.long(), CLASSES + 1, average="none", ignore_index=IGNORED
    )
    assert list(by_class["mIoU"]) == names[:CLASSES]
    assert list(by_class["mIoU"].values()) == pytest.approx(expected[:CLASSES].tolist(), abs=1e-6)
    assert np.mean(list(by_class["mIoU"].values())) == pytest.approx(value("mIoU", outputs, masks))
    assert list(by_class["mDice"]) == names[1:CLASSES]
    predicted, dice = outputs.argmax(1), []
    for truth, found in zip(masks, predicted, strict=True):
        a, b = truth == 1, (found == 1) & (truth != IGNORED)
        if a.any() or b.any():
            dice.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    assert by_class["mDice"]["road"] == pytest.approx(np.mean(dice))
    assert by_class["boundary_IoU"]["sky"] < by_class["mIoU"]["sky"]


def test_an_image_without_foreground_counts_1_where_none_is_found_and_0_where_some_is() -> None:
    empty = torch.zeros(1, 8, 8, dtype=torch.uint8)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 1
    assert value("mDice", logits, empty) == value("mIoU_image", logits, empty) == 1
    logits[0, 1, 0, 0] = 2
    assert value("mDice", logits, empty) == value("mIoU_image", logits, empty) == 0


def test_a_boundary_band_is_what_erosion_takes_away() -> None:
    masks = torch.rand(5, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.9
    side = 2 * BAND_PX + 1
    eroded = [binary_erosion(each.numpy(), np.ones((side, side))) for each in masks]
    expected = masks & ~torch.from_numpy(np.stack(eroded))
    assert torch.equal(boundary_band(masks), expected)
    assert expected.any(dim=(1, 2)).all()
    assert not expected.equal(masks), "a band is not the whole mask"


def test_boundary_iou_falls_with_a_shift_that_miou_hardly_notices() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 16:48, 16:48] = 1
    logits = torch.nn.functional.one_hot(mask.long().roll(2, dims=2), 2).movedim(-1, 1).float()
    assert value("mIoU", logits, mask) > 0.85
    assert 0.3 < value("boundary_IoU", logits, mask) < 0.7
    exact = torch.nn.functional.one_hot(mask.long(), 2).movedim(-1, 1).float()
    assert value("boundary_IoU", exact, mask) == 1
    assert KIND.kept(exact, mask)[0][0, 1, BAND_HITS] == 32**2 - 28**2


def test_what_is_kept_is_small_and_counts_no_ignored_pixel() -> None:
    outputs, masks = drawn()
    kept, targets = KIND.kept(outputs, masks)
    assert kept.shape == (IMAGES, CLASSES, 4)
    assert targets.shape == (IMAGES, CLASSES, 2)
    counted = (masks != IGNORED).sum(dim=(1, 2))
    assert torch.equal(targets[..., 0].sum(1), counted.int())
    assert torch.equal(kept[..., 1].sum(1), counted.int())


def test_a_prediction_is_areas_and_a_png_of_class_numbers() -> None:
    outputs, _ = drawn()
    masks = outputs.argmax(1).to(torch.uint8)
    first = KIND.predictions(masks, ["sky", "road", "car", "tree"])[0]
    mask = np.asarray(Image.open(io.BytesIO(first["mask"])))
    assert np.array_equal(mask, outputs[0].argmax(0).numpy())
    shares = [float((mask == number).mean()) for number in range(CLASSES)]
    assert list(first["areas"].values()) == pytest.approx(shares)


def test_it_has_four_metrics() -> None:
    assert set(metrics_of("segmentation")) == {"mIoU", "mIoU_image", "mDice", "boundary_IoU"}
    with pytest.raises(ValueError, match="given twice"):
        KIND.label([1, 1])
