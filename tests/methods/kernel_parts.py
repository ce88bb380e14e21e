"""What the tests of kernels share: where they run, how near is near, and what they draw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter's matrix product knows no bfloat16.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * ON_GPU
# The interpreter takes seconds for what a GPU does at once.
FEW = slice(None if ON_GPU else 2)
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}
kernel = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="needs a CUDA device or Triton's interpreter"
)


def base_of(length: int) -> Tensor:
    return torch.tensor([length], device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_parents(n: int) -> Tensor:
    """Mostly bushy, now and then a longer path."""
    parents = [-1] + [int(torch.randint(max(0, i - 4), i, ())) for i in range(1, n)]
    return torch.tensor(parents, device=DEVICE)


def near(out: Tensor, expected: Tensor) -> bool:
    """Whether the error is that of a few roundings to the dtype of `out`."""
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    return bool(error < EPSILON[out.dtype])


def run_interpreted(file: str) -> "subprocess.CompletedProcess[str]":
    """Run a file of tests in a process of its own: Triton decides at its import if it compiles."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
