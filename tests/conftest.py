"""What every test shares: one thread a process, no telemetry, no network, no real server, and a
backbone small enough to train in a second.

All of it is environment, set before torch, ray or mlflow is first imported, so that tests that need
none of them stay fast.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.specs import (
    Backbone,
    Biases,
    Connections,
    DrawnData,
    Input,
    Norms,
    Recipe,
    Selection,
    Smoa,
    Task,
    Training,
)

if TYPE_CHECKING:
    from pipeline.adaptation import RankedIndices
    from pipeline.backbones import LoadedBackbone
    from pipeline.specs import Level
    from pipeline.training import Inputs

from helpers_paths import PROJECT_ROOT

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
CACHE = os.environ["XDG_CACHE_HOME"] if IS_WORKER else tempfile.mkdtemp(prefix="taskpack-tests-")
os.environ.update(
    {
        # One thread: sums come out the same on every machine, and tests that run beside each other
        # do not fight for cores.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        # Where a run notes which backbone is where; not in a developer's own cache, and one for all
        # processes of these tests, because they share a finished run.
        "XDG_CACHE_HOME": CACHE,
        "TASKPACK_DECODED_GB": "0",  # tests count what a process decodes
        # Ray's workers are nicer than what starts them, and would hardly run beside other tests.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        # Ray reads both when it is imported; without a token it would write one into the home
        # folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # read on import, which may not be the package's own
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_LOG_UV_FILES": "false",
        "MLFLOW_MODEL_CATALOG_URI": "",
    }
)
if not IS_WORKER:
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

# Shells start background jobs, and some CI runners everything, with SIGINT ignored; programs that
# tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A developer's own server or cluster must never receive what the tests write.
SERVERS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
)
for name in SERVERS:
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_server_left_behind() -> Iterator[None]:
    """A test that leaves a server in the environment would send it what later tests write."""
    yield
    left = [name for name in SERVERS if os.environ.pop(name, None) is not None]
    assert not left, f"left in the environment: {left}"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of optional real data beside the project; tests that need it are skipped where it
    is absent.
    """
    folder = PROJECT_ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("optional data is absent: no folder ../shared with data/ beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """A random ViT of width 64 and depth 2 for 32 px images (16 patches): every kind of layer that
    a real one has, in 0.1 M parameters.
    """
    arguments: dict[str, int | float | str | bool | list[int]] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
    }
    return Backbone(model="vit_tiny_patch16_224", arguments=arguments, weights="random")


@pytest.fixture(scope="session")
def families(tiny_backbone: Backbone) -> dict[str, Backbone]:
    """One tiny random backbone a family: tokens, windows of channels-last tokens, and ConvNeXt with
    its MLP as convolutions and as Linear layers.
    """
    stages: dict[str, int | float | str | bool | list[int]] = {
        "depths": [1, 1, 1, 1],
        "dims": [8, 16, 24, 32],
    }
    swin: dict[str, int | float | str | bool | list[int]] = {
        **{"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16},
        **{"depths": [1, 1], "num_heads": [1, 2]},
    }
    return {
        "vit": tiny_backbone,
        "swin": Backbone(model="swin_tiny_patch4_window7_224", arguments=swin, weights="random"),
        "convnext": Backbone(model="convnext_atto", arguments=stages, weights="random"),
        "convnext_linear": Backbone(model="convnext_tiny", arguments=stages, weights="random"),
    }


@pytest.fixture(scope="session")
def random_selection() -> Callable[..., dict[str, RankedIndices]]:
    """A function (backbone, top_k, seed, level) -> a selection of random connections."""
    import torch

    from pipeline.adaptation import rank_indices
    from pipeline.adaptation.sites import weight_shapes

    def draw(
        backbone: LoadedBackbone, top_k: int, seed: int = 0, level: Level = "neuron"
    ) -> dict[str, RankedIndices]:
        generator = torch.Generator().manual_seed(seed)
        shapes = weight_shapes(backbone.model)
        return rank_indices(
            {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()},
            level,
            top_k,
        )

    return draw


@pytest.fixture(scope="session")
def tiny_task(tiny_backbone: Backbone) -> Task:
    """Which of 8 ways a bar lies, 96 drawn samples to learn from: the tiny backbone beats chance at
    it within seconds.
    """
    return Task(
        name="tiny",
        data=DrawnData(format="drawn", kind="orientation", train_samples=96, test_samples=40),
        input=Input(size_px=32, flip=False),
        backbone=tiny_backbone,
        recipe=Recipe(
            connections=Connections(top_k=2),
            biases=Biases(),
            smoa=Smoa(experts=2, width=4),
            norms=Norms(),
            training=Training(epochs=2, batch_size=16, learning_rate=8e-3, precision="fp32"),
        ),
        selection=Selection(batch_size=16),
    )


@pytest.fixture(scope="session")
def tiny_data(tiny_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared dataset of `tiny_task`, in several shards."""
    from pipeline.data import prepare, shards

    folder = tmp_path_factory.mktemp("tiny") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE_BYTES", 60_000)
        prepare(tiny_task, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_inputs(tiny_task: Task, tiny_data: Path) -> Inputs:
    """`tiny_task`, opened."""
    from pipeline.training import open_inputs

    return open_inputs(tiny_task, tiny_data)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the stand-in for a GPU where a test wants it: torch takes note of its devices at the
    first backward pass.
    """
    wanting = [
        item for item in session.items if isinstance(item, pytest.Function) and _wants_standin(item)
    ]
    if not wanting or session.config.option.collectonly:
        return
    import standin_device

    if standin_device.find_compiler() is not None:
        with contextlib.suppress(
            RuntimeError
        ):  # what does not compile fails the tests that want it, and no others
            standin_device.register(_compiled_standin(session.config))


def _wants_standin(item: pytest.Function) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "standin" in item.fixturenames or any(
        isinstance(value, str) and value == "stand-in" for value in parameters
    )


def _compiled_standin(config: pytest.Config) -> Path:
    """The library, compiled once and kept in pytest's cache."""
    import standin_device

    assert config.cache is not None
    return standin_device.compiled(config.cache.mkdir("standin-device"))


@pytest.fixture(scope="session")
def standin_library(pytestconfig: pytest.Config) -> Path:
    """The compiled stand-in for a GPU; see `standin_device`."""
    import standin_device

    if standin_device.find_compiler() is None:
        pytest.skip(
            "the stand-in for a GPU needs a C++ compiler; none of c++, g++ and clang++ is here"
        )
    return _compiled_standin(pytestconfig)


@pytest.fixture(scope="session")
def standin(standin_library: Path) -> str:
    """The name of the stand-in for a GPU."""
    import standin_device

    return standin_device.register(standin_library)


@pytest.fixture(scope="session")
def gpu() -> str:
    """The name of this machine's GPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    return "cuda"


@pytest.fixture(scope="module")
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A private Ray with room for three workers, or for the RAY_CPUS of a test file, whatever this
    machine has, and with its RAY_GPUS. Every worker spends seconds on imports.
    """
    import ray

    from pipeline.cluster.session import ray_session

    temporary = os.path.join(tempfile.gettempdir(), "ray")
    ray.init(
        address="local",
        num_cpus=getattr(request.module, "RAY_CPUS", 3),
        num_gpus=getattr(request.module, "RAY_GPUS", None),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=temporary,
    )
    try:
        with ray_session():
            yield
    finally:
        ray.shutdown()
