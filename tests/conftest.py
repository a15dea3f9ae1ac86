"""What every test shares: one thread a process, no telemetry, no network, no real server, and a backbone small enough to train in a second.

All of it is environment, set before torch, ray or mlflow is first imported, so that tests that need none of them stay fast.
"""

import os
import secrets
from pathlib import Path

import pytest

from pipeline.spec import Backbone

PROJECT_ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    {
        # One thread: sums come out the same on every machine, and tests that run beside each other do not fight for cores.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        # Ray reads both when it is imported; without a token it would write one into the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_LOG_UV_FILES": "false",
        "MLFLOW_MODEL_CATALOG_URI": "",
    }
)
# A developer's own server or cluster must never receive what the tests write.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of optional real data beside the project; tests that need it are skipped where it is absent."""
    folder = PROJECT_ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("optional data is absent: no folder ../shared with data/ beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """A random ViT of width 64 and depth 2 for 32 px images (16 patches): every kind of layer that a real one has, in 0.1 M parameters."""
    arguments: dict[str, int | float | str | bool | list[int]] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return Backbone(model="vit_tiny_patch16_224", arguments=arguments, weights="random")
