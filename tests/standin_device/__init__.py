"""A stand-in for a GPU: a device of torch, named `mtia`, whose tensors lie in CPU memory and whose
operators are the CPU's.

It shows on any machine what otherwise shows only on a GPU: a tensor that stayed behind (operators
refuse mixed devices, as CUDA's do), a cast list that differs (CUDA's autocast lists apply),
parameters whose data is swapped by `Module.to`, and every copy and synchronisation between device
and host, which are counted. It proves nothing about speed or CUDA's kernels.

`standin.cpp` is compiled once per version of it and of torch, in half a minute of one core.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

DEVICE = "mtia"
SOURCE = Path(__file__).parent / "standin.cpp"


def find_compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next(
        (
            path
            for name in (os.environ.get("CXX"), "c++", "g++", "clang++")
            if name and (path := shutil.which(name))
        ),
        None,
    )


def compiled(folder: Path) -> Path:
    """The library, compiled in `folder` unless it is there. Raises RuntimeError with the compiler's
    own words where that fails.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"standin-{key}.so"
    if library.exists():
        return library
    compiler, scratch = find_compiler(), library.with_suffix(f".{os.getpid()}")
    assert compiler is not None, "callers look for a compiler first"
    from torch.utils import cpp_extension

    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = [
        "-std=c++20",
        "-O0",
        "-shared",
        "-fPIC",
        abi,
        *includes,
        str(SOURCE),
        "-o",
        str(scratch),
        *libraries,
        "-lc10",
        "-ltorch_cpu",
    ]
    run = subprocess.run([compiler, *options], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {run.stderr[-3000:]}")
    os.replace(scratch, library)
    return library


def register(library: Path) -> str:
    """Make the device known to torch in this process, which must not have had a backward pass yet;
    its name.
    """
    if not hasattr(torch.mtia, "_is_standin"):
        torch.ops.load_library(library)
        torch.ops.standin.become_accelerator()
        vars(torch.mtia).update(
            _is_standin=True,
            _lazy_init=lambda: None,
            is_available=lambda: True,
            is_initialized=lambda: True,
            current_device=lambda: 0,
            device_count=lambda: 1,
            synchronize=lambda device=None: None,
            manual_seed_all=lambda seed: None,
            get_device_name=lambda device=None: "stand-in",
            is_bf16_supported=lambda including_emulation=True: True,
            memory_reserved=lambda device=None: allocated_bytes(),
            max_memory_reserved=lambda device=None: int(torch.ops.standin.peak_bytes()),
            reset_peak_memory_stats=lambda device=None: torch.ops.standin.forget_peak(),
            Stream=_Stream,
            current_stream=lambda device=None: _Stream(device),
            stream=contextlib.nullcontext,
            mem_get_info=lambda device=None: (limit_bytes() - allocated_bytes(), limit_bytes()),
        )
    return DEVICE


class _Stream:
    """The device has one stream, in which nothing waits."""

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: None) -> None: ...

    def record_event(self) -> None: ...


def allocated_bytes() -> int:
    """Bytes of all tensors on the device."""
    return int(torch.ops.standin.allocated_bytes())


def limit_bytes() -> int:
    """Bytes that the device has."""
    return int(torch.ops.standin.limit_bytes())


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each operator, `copy to device`, `copy to host`, `copy on device` and
    `synchronisation` happens in the context; filled when it ends. Copies to the device from memory
    that is not pinned are also synchronisations. Views and allocations are not counted.
    """
    counts: Counter[str] = Counter()
    torch.ops.standin.start_counting()
    try:
        yield counts
    finally:
        torch.ops.standin.stop_counting()
        counts.update(
            {
                name: int(number)
                for name, number in (line.split("\t") for line in torch.ops.standin.counts())
            }
        )


@contextlib.contextmanager
def memory_left(free_bytes: int) -> Iterator[None]:
    """A device that has only so much more to give."""
    before = limit_bytes()
    torch.ops.standin.set_limit_bytes(allocated_bytes() + free_bytes)
    try:
        yield
    finally:
        torch.ops.standin.set_limit_bytes(before)
