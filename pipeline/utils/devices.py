"""The device that a process computes on: its CPU, or an accelerator that torch calls, for example,
`cuda` or `cuda:1`.

All questions about devices are answered here, by torch's module for their kind, so that no other
file depends on device names.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from pipeline.errors import ClusterError, SpecError
from pipeline.utils.precision import Precision

_CPU_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""torch's names of the bfloat16 units of x86 and ARM processors."""
_NVIDIA = Path("/proc/driver/nvidia")


def choose_device(name: str | None = None) -> str:
    """The device that a user names; by default the GPU, if there is one.

    Raises:
        SpecError: this process has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        number, count = device.index or 0, device_module(device).device_count()
    except RuntimeError:  # no kind of device that torch knows
        number, count = 0, 0
    if number >= count:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        reason = (
            ""
            if torch.cuda.is_available() or not name.startswith("cuda")
            else f" ({_cuda_versions()})"
        )
        raise SpecError(
            f"device: given {name!r}; expected one that torch can use here:"
            f" {', '.join(here)}{reason}"
        )
    return name


def reserved_gpu(otherwise: str = "train on CPUs with --gpus-per-trial 0") -> str:
    """The GPU that was assigned to this process. Raises ClusterError if torch cannot use it, rather
    than compute silently on the CPU; `otherwise` is what a user may do without a GPU.
    """
    if not torch.cuda.is_available():
        raise ClusterError(
            f"this process was given a GPU, and torch cannot use it: {_cuda_versions()}; install a"
            " newer driver, or a torch built for this one, on every node with GPUs, or"
            f" {otherwise}"
        )
    return "cuda"


def check_gpus_usable(gpus_per_trial: float | None) -> None:
    """Raise ClusterError if a run would be assigned GPUs of this machine that torch cannot use.
    `None` stands for all its GPUs.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if gpus_per_trial != 0 and not is_hidden and any(_NVIDIA.glob("gpus/*")):
        reserved_gpu()


def _cuda_versions() -> str:
    """The CUDA versions of torch and the driver, for an error message."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module\D*(\d[\d.]*)", (_NVIDIA / "version").read_text())
        driver = (
            f"NVIDIA's driver is {found.group(1)}"
            if found
            else "NVIDIA's driver does not tell its version"
        )
        return f"{driver}, {_torch_version()}"
    return f"no driver of NVIDIA's is loaded, {_torch_version()}"


def _torch_version() -> str:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"torch {torch.__version__} is built {built}"


def is_accelerator(device: str | torch.device) -> bool:
    """Whether a device has its own memory, so that tensors are copied to it."""
    return torch.device(device).type != "cpu"


def can_record(device: str | torch.device) -> bool:
    """Whether kernels can be recorded on a device and replayed, as CUDA graphs are."""
    return torch.device(device).type == "cuda"


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A tensor on a device. An accelerator copies it from the CPU while the host goes on."""
    if is_accelerator(device) and not is_accelerator(tensor.device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(
    tensors: Sequence[torch.Tensor], device: str | torch.device
) -> list[torch.Tensor]:
    """Tensors of the CPU and one type on a device, as `to_device` copies them, in one copy."""
    whole = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def device_name(device: str | torch.device) -> str:
    """A device's model name."""
    if is_accelerator(device):
        return str(device_module(device).get_device_name(torch.device(device)))
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def memory_bytes(device: str | torch.device) -> tuple[int, int]:
    """Free and total bytes of an accelerator's memory."""
    free, total = device_module(device).mem_get_info(torch.device(device))
    return int(free), int(total)


def busy_share(device: str | torch.device) -> float | None:
    """The share of the last moments in which an accelerator computed, for whichever process; None
    where its driver's library (NVML) is missing or does not tell.
    """
    try:
        return float(device_module(device).utilization(torch.device(device))) / 100
    except Exception:  # that of NVML's own errors is Exception, and NVML may not be installed
        return None


def release_memory(device: str | torch.device) -> None:
    """Give memory that torch holds and does not use back to a GPU, in whole blocks."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def limit_memory(device: str | torch.device, share: float) -> None:
    """Let tensors of this process take at most a share of an accelerator's memory, so that its peak
    is not the end of others there.
    """
    device_module(device).set_per_process_memory_fraction(share, torch.device(device).index or 0)


def largest_memory_bytes(device: str | torch.device) -> int | None:
    """The most bytes that tensors of this process took on an accelerator; None on a CPU."""
    if not is_accelerator(device):
        return None
    return int(device_module(device).max_memory_allocated(torch.device(device)))


def forget_peak(device: str | torch.device) -> None:
    """Reset the statistics of an accelerator's peak memory."""
    device_module(device).reset_peak_memory_stats(torch.device(device))


def process_memory_bytes(device: str | torch.device) -> int:
    """The most bytes of an accelerator's memory that this process held: at their peak those for
    tensors, used or not, and those that are taken beside them now, such as by CUDA's context. What
    other processes take there is among the latter.
    """
    module, place = device_module(device), torch.device(device)
    free, total = memory_bytes(place)
    beside = total - free - module.memory_reserved(place)
    return int(module.max_memory_reserved(place) + beside)


def has_bf16_units(device: str | torch.device) -> bool:
    """Whether a device computes bfloat16 in hardware; emulation takes up to ten times as long as
    float32.
    """
    if is_accelerator(device):
        return bool(device_module(device).is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(unit) for unit in _CPU_UNITS)


def computing_dtype(precision: Precision, device: str | torch.device) -> torch.dtype:
    """The type to compute in. bfloat16 is for speed, so float32 replaces it on devices that only
    emulate it: V100, T4 and many CPUs. Raises SpecError if there is no such precision.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise SpecError(f"precision: given {precision!r}; expected one of {known}")
    return torch.bfloat16 if precision == "bf16" and has_bf16_units(device) else torch.float32


def autocast(device: str | torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products are computed in `dtype`, float32 or bfloat16."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """The type in which the pass under way computes products of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 convolutions in full precision and in a fixed order.

    By default, cuDNN rounds their inputs to TF32 (10 bits) and may use atomic additions, so a GPU
    would neither count the same errors as a CPU nor select the same connections. Matrix products
    are in full precision by torch's own default.

    These settings are the whole process's. They hold from the first thread that enters to the last
    that leaves, and are then what they were before.
    """
    with _Float32.used("ieee"):
        yield


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Round the inputs of float32 products and convolutions to TF32 on GPUs that have units for it;
    their sums stay float32. Has no effect while another thread computes exactly.
    """
    with _Float32.used("tf32"):
        yield


class _Float32:
    """How many computations need exact settings now, how many may have fast ones, and the settings
    before the first.
    """

    _lock = threading.Lock()
    _users: ClassVar = {"ieee": 0, "tf32": 0}
    _before: tuple[Any, Any, Any]

    @classmethod
    @contextlib.contextmanager
    def used(cls, precision: Literal["ieee", "tf32"]) -> Iterator[None]:
        """Context manager: one more computation of this precision."""
        cls._count(precision, 1)
        try:
            yield
        finally:
            cls._count(precision, -1)

    @classmethod
    def _count(cls, precision: str, change: int) -> None:
        cudnn: Any = torch.backends.cudnn
        conv, product = cudnn.conv, torch.backends.cuda.matmul
        with cls._lock:
            if not any(cls._users.values()):
                cls._before = conv.fp32_precision, cudnn.deterministic, product.fp32_precision
            cls._users[precision] += change
            of_conv, cudnn.deterministic, of_product = cls._before
            if cls._users["ieee"]:
                of_conv, cudnn.deterministic = "ieee", True
            elif cls._users["tf32"]:
                of_conv = of_product = "tf32"
            conv.fp32_precision, product.fp32_precision = of_conv, of_product


def device_module(device: str | torch.device) -> Any:
    """Torch's module for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(torch.device(device))
