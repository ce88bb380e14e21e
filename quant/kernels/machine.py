"""What a measured choice of kernels holds for: the GPU and the versions that compute on it."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

HUMMING, TRITON = "humming-kernels", "triton"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU's name and versions; None where a package is not installed."""

    gpu: str
    torch: str
    triton: str | None
    humming: str | None


def machine_of(device: torch.device) -> Machine:
    """Describe what computes on a CUDA device."""
    return Machine(
        gpu=torch.cuda.get_device_name(device),
        torch=torch.__version__,
        triton=installed(TRITON),
        humming=installed(HUMMING),
    )


@cache
def installed(package: str) -> str | None:
    """Give the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
