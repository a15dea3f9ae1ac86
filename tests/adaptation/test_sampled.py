"""The sampled product against sums written out, on the CPU and, for the Triton kernel, in Triton's
interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_cases import for_every
from helpers_paths import PROJECT_ROOT, TESTS

from pipeline.adaptation.kernels.sampled import sampled_product

SHAPES = [
    (1, 1, 1, 1),
    (33, 5, 7, 9),
    (70, 40, 200, 300),
    (257, 3, 130, 129),
]  # tokens, columns, outputs, entries


def draw(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, columns, outputs, entries = shape
    generator = torch.Generator().manual_seed(sum(shape))
    place_N = torch.randint(0, columns * outputs, (entries,), generator=generator).sort().values
    return (
        torch.randn(tokens, columns, generator=generator).to(dtype),
        torch.randn(tokens, outputs, generator=generator).to(dtype),
        place_N,
    )


def slow(x_TC: torch.Tensor, gradient_TO: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
    """Entry by entry, token by token, in double precision."""
    x, gradient, outputs = (
        x_TC.double().tolist(),
        gradient_TO.double().tolist(),
        gradient_TO.shape[1],
    )
    entries = [divmod(place, outputs) for place in place_N.tolist()]
    return torch.tensor(
        [sum(x[t][c] * gradient[t][o] for t in range(len(x))) for c, o in entries],
        dtype=torch.float64,
    )


@for_every("shape", SHAPES)
@for_every("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    expected, found = slow(*inputs), sampled_product(*inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert float((found.double() - expected).abs().max()) <= tolerance * max(
        1.0, float(expected.abs().max())
    )


IN_INTERPRETER = """
import json, torch
from pipeline.adaptation.kernels import triton_sampled
from test_sampled import SHAPES, draw, slow
triton_sampled.PROGRAMS = 8  # several shares of tokens, also where there are few
errors = []
for shape in SHAPES:
    for dtype in (torch.float32, torch.bfloat16):
        x_TC, gradient_TO, place_N = draw(shape, dtype)
        for gradient in (gradient_TO, gradient_TO.T.contiguous().T):
            expected = slow(x_TC, gradient, place_N)
            found = triton_sampled.fused_sampled_product(x_TC, gradient, place_N)
            assert found.dtype == torch.float32 and found.shape == place_N.shape
            largest = max(1.0, float(expected.abs().max()))
            errors.append(float((found.double() - expected).abs().max()) / largest)
print(json.dumps(errors))
"""


def test_the_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the fused kernel needs Triton")
    run = subprocess.run(
        [sys.executable, "-c", IN_INTERPRETER],
        **{
            "env": {
                **os.environ,
                "TRITON_INTERPRET": "1",
                "PYTHONPATH": f"{PROJECT_ROOT}:{TESTS}:{Path(__file__).parent}",
            },
            "capture_output": True,
            "text": True,
        },
        check=False,
        timeout=200,
        cwd=PROJECT_ROOT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout)
    assert len(errors) == 4 * len(SHAPES)
    assert max(errors) < 1e-5, "bfloat16 too: sums are float32"
