"""What the papers' released code does, held as values: our catalogue and our formulas against theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms import functional as torchvision_functional

from pipeline.data import augment
from pipeline.data.augment import _colour_jitter, _Numbers, turn_hue
from pipeline.spec import Selection
from pipeline.task_files import DATA_ROOT, load_task

CATALOGUE = Path(__file__).resolve().parents[1] / "tasks"

# Learning rate, batch size and K of the training scripts that GPS's authors released on 2024-10-17
# (FightingFighting/GPS, train_scripts/vit).
GPS_VTAB = {
    "caltech101": (0.002, 16, 1),
    "cifar100": (0.01, 32, 1),
    "clevr_count": (0.0003, 16, 1),
    "clevr_dist": (0.002, 16, 1),
    "diabetic_retinopathy": (0.002, 32, 1),
    "dmlab": (0.0015, 16, 1),
    "dsprites_loc": (0.007, 32, 1),
    "dsprites_ori": (0.0005, 16, 1),
    "dtd": (0.002, 16, 1),
    "eurosat": (0.002, 16, 1),
    "kitti": (0.001, 16, 1),
    "oxford_flowers102": (0.002, 16, 1),
    "oxford_iiit_pet": (0.003, 32, 1),
    "patch_camelyon": (0.004, 32, 2),
    "resisc45": (0.0015, 16, 1),
    "smallnorb_azi": (0.003, 32, 1),
    "smallnorb_ele": (0.0003, 32, 1),
    "sun397": (0.0025, 16, 1),
    "svhn": (0.005, 32, 1),
}
GPS_FGVC = {
    "cub": (0.003, 32, 2),
    "nabirds": (0.0001, 32, 20),
    "flowers": (0.001, 32, 1),
    "cars": (0.0005, 32, 15),
    "dogs": (0.0001, 64, 1),
}


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "datasets"))


@pytest.mark.parametrize(("suite", "table"), [("vtab1k", GPS_VTAB), ("fgvc", GPS_FGVC)], ids=["vtab1k", "fgvc"])
def test_the_catalogue_trains_as_the_released_scripts_of_gps(suite: str, table: dict[str, tuple[float, int, int]]) -> None:
    tasks = {name: load_task(CATALOGUE / suite / f"{name}.yaml") for name in table}
    ours = {
        name: (task.recipe.training.learning_rate, task.recipe.training.batch_size, task.recipe.connections.top_k)
        for name, task in tasks.items()
        if task.recipe.connections is not None
    }
    assert ours == table
    assert {(task.recipe.training.epochs, task.recipe.training.warmup_epochs, task.recipe.training.weight_decay) for task in tasks.values()} == {
        (100, 10, 0)
    }


# --- the two views of GPS ---------------------------------------------------------------------------------------------------------------------


def photographs(count: int = 8, size: int = 24) -> torch.Tensor:
    """Smooth coloured images [B, 3, S, S] in [0, 1], some of them grey, black or saturated."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)
    images[0] = images[0, :1]
    images[1] = 0
    images[2, 0] = 1
    return images


def test_hues_turn_as_in_torchvision() -> None:
    images, turns = photographs(), torch.tensor([0.1, -0.1, 0.07, 0.5, -0.5, 0.0, 0.03, -0.02])
    expected = torch.stack([torchvision_functional.adjust_hue(image, float(turn)) for image, turn in zip(images, turns, strict=True)])
    torch.testing.assert_close(turn_hue(images, turns), expected, atol=1e-5, rtol=0)


def test_the_selection_draws_the_views_of_gps_by_default() -> None:
    """Crops of 8 to 100 %, colour jitter of 80 % and grey of 20 % of all views; colours come out as torchvision's operators make them."""
    assert Selection().views == "strong"
    grey = torch.full((4000, 3, 2, 2), 0.5)
    colour = grey * torch.tensor([1.0, 0.6, 0.2]).view(1, 3, 1, 1)
    views = augment(colour, torch.Generator().manual_seed(0), True, "strong")[:, :, 0, 0]
    is_grey = (views - views.mean(dim=1, keepdim=True)).abs().amax(dim=1) < 1e-5
    is_unchanged = (views - colour[:, :, 0, 0]).abs().amax(dim=1) < 1e-5
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float(is_unchanged.float().mean()) == pytest.approx(0.2 * 0.8, abs=0.02)
    brightness_alone = augment(grey, torch.Generator().manual_seed(0), True, "strong")[:, 0, 0, 0] / 0.5
    assert 0.5999 <= float(brightness_alone.min()) < 0.65
    assert 1.35 < float(brightness_alone.max()) <= 1.4001


def test_one_image_through_the_colour_operators_is_what_torchvision_makes_of_it() -> None:
    """With the operators' order and factors read from the seed, view by view."""
    images = photographs()
    drawn: list[torch.Tensor] = []

    class Recording(_Numbers):
        def __call__(self, *shape: int) -> torch.Tensor:
            drawn.append(super().__call__(*shape))
            return drawn[-1]

    ours = _colour_jitter(images, Recording(torch.Generator().manual_seed(3), len(images), images.device))
    order, factors, hue, jittered, grey = drawn
    operators = [
        torchvision_functional.adjust_brightness,
        torchvision_functional.adjust_contrast,
        torchvision_functional.adjust_saturation,
        torchvision_functional.adjust_hue,
    ]
    for number, image in enumerate(images):
        amounts = [*(1 + 0.4 * (2 * factors[:, number] - 1)).tolist(), float(0.1 * (2 * hue[number] - 1))]
        for operator in order[:, number].argsort().tolist() if jittered[number] < 0.8 else []:
            image = operators[operator](image, amounts[operator])
        expected = torchvision_functional.rgb_to_grayscale(image, 3) if grey[number] < 0.2 else image
        torch.testing.assert_close(ours[number], expected, atol=2e-5, rtol=0)
