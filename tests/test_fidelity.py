"""What the papers' released code does, held as values: our catalogue and our formulas against theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

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
