"""A replica that was given a GPU computes on it, or does not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from pipeline.errors import ClusterError
from pipeline.server.settings import Settings

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
from pipeline.server import engine
from pipeline.server.deployment import open_engine


class Opened(Exception):
    """An engine would compute on this device."""


@pytest.fixture
def device_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[dict[str, float], str | None], str]:
    """A function (resources that Ray gave a replica, device that the user asked for) -> the device
    of its engine.
    """

    def opened_engine(settings: Settings) -> None:
        raise Opened(settings.device)

    monkeypatch.setattr(engine, "Engine", opened_engine)

    def device(given: dict[str, float], asked: str | None) -> str:
        context = SimpleNamespace(get_assigned_resources=lambda: given)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        with pytest.raises(Opened) as opened:
            open_engine(Settings(tmp_path, device=asked))
        found: str = opened.value.args[0]
        return found

    return device


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_serve_on_the_cpu(
    device_of: Callable[[dict[str, float], str | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match=r"given a GPU, and torch cannot use it.*num_gpus"):
        device_of({"CPU": 1, "GPU": 1}, None)
    assert device_of({"CPU": 1, "GPU": 1}, "cpu") == "cpu"
    assert device_of({"CPU": 1}, None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of({"GPU": 0.5}, None) == "cuda"
