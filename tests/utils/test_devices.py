"""What a process may compute on, and what is said where it may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster.rank_group import TrialResources
from pipeline.errors import ClusterError, SpecError
from pipeline.utils import devices
from pipeline.utils.devices import (
    check_gpus_usable,
    choose_device,
    computing_dtype,
    exact_float32,
    fast_float32,
    has_bf16_units,
    is_accelerator,
    reserved_gpu,
)

DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
)


@pytest.fixture
def cuda_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function (count): torch can use so many GPUs, the second of which has no units for
    bfloat16.
    """

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
        )
        monkeypatch.setattr(torch.version, "cuda", "13.2")

    return pretend


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one GPU whose driver is old."""
    (tmp_path / "gpus" / "0000:3b:00.0").mkdir(parents=True)
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(devices, "_NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_the_gpu_is_taken_where_there_is_one(cuda_with: Callable[[int], None]) -> None:
    cuda_with(0)
    assert choose_device() == "cpu"
    cuda_with(2)
    assert choose_device() == "cuda"
    assert [choose_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cuda:x", "mps:7", ""])
def test_a_device_that_is_not_here_is_refused(name: str, cuda_with: Callable[[int], None]) -> None:
    cuda_with(2)
    with pytest.raises(
        SpecError,
        match=f"given '{name}'; expected one that torch can use here: cpu, cuda:0, cuda:1$",
    ):
        choose_device(name)


def test_why_there_is_no_cuda_is_said(cuda_with: Callable[[int], None], driver: Path) -> None:
    cuda_with(0)
    with pytest.raises(
        SpecError,
        match=r"use here: cpu \(NVIDIA's driver is 535.104.05, torch .* is built for CUDA 13.2\)$",
    ):
        choose_device("cuda")


def test_an_accelerator_is_one_whatever_its_number(cuda_with: Callable[[int], None]) -> None:
    cuda_with(2)
    assert [is_accelerator(name) for name in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    assert not has_bf16_units("cuda:1")
    assert computing_dtype("bf16", "cuda:1") == torch.float32


def test_a_gpu_that_torch_cannot_use_never_means_the_cpu(
    cuda_with: Callable[[int], None], driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_with(0)
    unusable = (
        r"torch cannot use it: NVIDIA's driver is 535.104.05, torch .* is built for CUDA 13.2;"
        r" .*--gpus-per-trial 0"
    )
    for refused in (
        lambda: TrialResources(gpus=0.5).device(),
        lambda: check_gpus_usable(None),
        lambda: check_gpus_usable(1),
    ):
        with pytest.raises(ClusterError, match=unusable):
            refused()
    assert TrialResources(gpus=0).device() == "cpu"
    check_gpus_usable(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus_usable(None)
    cuda_with(1)
    assert TrialResources(gpus=0.5).device() == reserved_gpu() == "cuda"
    check_gpus_usable(1)


def test_a_torch_without_cuda_and_a_machine_without_a_driver_are_named(
    cuda_with: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_with(0)
    monkeypatch.setattr(devices, "_NVIDIA", tmp_path / "absent")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ClusterError, match=r"no driver of NVIDIA's is loaded, torch .* is built without CUDA"
    ):
        reserved_gpu()
    check_gpus_usable(None)


def test_float32_is_exact_where_it_is_asked_for_and_as_before_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flags() -> tuple[Any, ...]:
        cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.conv.fp32_precision, cudnn.deterministic, product.fp32_precision

    before = flags()
    assert before == ("tf32", False, "none"), "torch's own defaults"
    with exact_float32():
        assert flags() == ("ieee", True, "none")
    with fast_float32():
        assert flags() == ("tf32", False, "tf32")
        with exact_float32():
            assert flags() == ("ieee", True, "none")
        assert flags() == ("tf32", False, "tf32")
    assert flags() == before


def test_exact_settings_hold_until_the_last_thread_leaves() -> None:
    """A server loads a pack in one thread while another predicts."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert conv.fp32_precision == "ieee", "the second still computes"
    second.__exit__(None, None, None)
    assert conv.fp32_precision == before


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(SpecError, match="precision: given 'fp16'; expected one of fp32, bf16"):
        computing_dtype("fp16", "cpu")  # type: ignore[arg-type]
