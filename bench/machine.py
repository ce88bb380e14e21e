"""Where to compute and in what floating-point format: the keys that say it, checked."""

import os

import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")


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
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must exist, got {device!r} of {torch.cuda.device_count()} GPUs")
