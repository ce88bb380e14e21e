"""Where to compute and in what floating-point format: the keys that say it, checked."""

import os
import shutil
from importlib.util import find_spec

import torch

from bench import gpu

DTYPES = ("float32", "float64", "bfloat16", "float16")
CAPABILITY = (8, 0)  # the oldest GPU that Triton compiles for, which every step needs
COMPILERS = ("gcc", "clang")  # that Triton looks for, where CC names none


def check_machine(*, device: str, dtype: str, threads: int | None) -> None:
    """Check the keys that say where and in what floating-point format to compute."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise ValueError(
            f"threads must be 1 to {cores}, the machine's cores, or null, got {threads}"
        )
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {device!r}")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        built = "" if torch.version.cuda else f", since torch {torch.__version__} has no CUDA"
        instead = "cuda" if count else "cpu"
        raise ValueError(
            f"device must exist, got {device!r} of {count} GPUs{built}; device={instead} works"
        )


def check_gpu(device: str) -> None:
    """Check that the kernels of a step, which Triton compiles, can be had on a GPU.

    Raises ValueError in one line that says what is missing and what works.
    """
    if torch.device(device).type != "cuda":
        return
    found = gpu.ask(index_of(device))
    if found is not None and found.capability < CAPABILITY:
        needed, has = (".".join(map(str, pair)) for pair in (CAPABILITY, found.capability))
        raise ValueError(
            f"device must have compute capability {needed} or above, got {found.name} with {has}; "
            "device=cpu works"
        )
    if find_spec("triton") is None:
        raise ValueError(f"device={device} needs the package triton, got none; device=cpu works")
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        raise ValueError(
            f"device={device} needs a C compiler, which Triton calls: {' or '.join(COMPILERS)}, or "
            f"CC naming one, got {f'CC={named}' if named else 'none'}; device=cpu works"
        )


def index_of(device: str) -> int:
    """Number of a CUDA device; `cuda` is the first."""
    return torch.device(device).index or 0
