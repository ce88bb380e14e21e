"""What humming compiles: where it is kept, and what happens when a kept file is broken.

A kept binary that was cut short ends the process in humming's loader, so such ones are deleted
before anything is loaded. Should the kept ones fail all the same, everything is compiled once more,
into a folder of this process.
"""

import json
import os
import struct
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quant.kernels.cache import temporary_folder, writable_folder
from quant.kernels.humming_layout import Config

FOLDER = "humming"
ELF, ELF_HEADER, ELF_SECTION, NO_BITS = b"\x7fELF\x02\x01", 64, 64, 8  # 64 bits, little-endian
MOST_TRIED = 1024  # tokens: kernels for more are compiled, and first run when they are needed
STRIDE = 4  # numbers that humming describes a kernel by: fewest tokens, most, its id, its blocks


class Trial(Protocol):
    """A layer that multiplies by what is being prepared."""

    in_features: int
    dtype: torch.dtype

    def launch(self, x: Tensor, configs: Tensor) -> Tensor:
        """Multiply. x: [n, K]."""


@cache
def compiler_problem() -> str:
    """Say in one line why nothing can be compiled; empty: it can."""
    _keep_in(writable_folder(FOLDER))
    try:
        drop_torn(Path(os.environ["HUMMING_CACHE_DIR"]))
    except OSError:
        os.environ["HUMMING_CACHE_DIR"] = str(temporary_folder(FOLDER) / "cache")
    try:
        from humming.jit.runtime import KernelRuntime

        KernelRuntime._get_compiler().signature()
    except (ImportError, OSError, RuntimeError, AssertionError, LookupError, TypeError) as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:200]
    return ""


def prepared(config: Config, *, exact: bool, device: torch.device, trial: Trial) -> Tensor:
    """Compile a layer's kernels for every number of tokens, and run each once.

    Raises ValueError where that fails twice.
    """
    try:
        return _tried(config, exact, device, trial)
    except (RuntimeError, OSError, AssertionError):  # a kept file is torn, or nothing works
        _afresh()
    try:
        return _tried(config, exact, device, trial)
    except (RuntimeError, OSError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"kernel=humming must compile N={config.shape_n}, K={config.shape_k}, got {reason}; "
            "kernel=torch or kernel=reference works"
        ) from error


def _tried(config: Config, exact: bool, device: torch.device, trial: Trial) -> Tensor:
    from humming.kernel.humming import HummingKernel

    compute = json.dumps({"use_batch_invariant": exact})
    with torch.cuda.device(device):
        found = HummingKernel.prepare_kernels(config.to_str(), compute, None, device)
        assert isinstance(found, Tensor)
        for fewest, *_ in found.view(-1, STRIDE).tolist():
            if fewest < MOST_TRIED:
                x = torch.ones(fewest + 1, trial.in_features, dtype=trial.dtype, device=device)
                trial.launch(x, found)
        # An unusable binary shows when it is run, so here is waited once.
        torch.cuda.current_stream(device).synchronize()
    return found


def drop_torn(folder: Path) -> None:
    """Delete the binaries below a folder that end before their last section does."""
    for path in folder.glob("*/kernel.cubin"):
        if not _is_whole(path.read_bytes()):
            path.unlink()


def _is_whole(binary: bytes) -> bool:
    """Tell whether an ELF file holds its section table and all that it lists."""
    if len(binary) < ELF_HEADER or not binary.startswith(ELF):
        return False
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count = struct.unpack_from("<HH", binary, 0x3A)
    if count == 0 or size < ELF_SECTION or table + size * count > len(binary):
        return False
    for at in range(table, table + size * count, size):
        (kind,) = struct.unpack_from("<I", binary, at + 4)
        start, length = struct.unpack_from("<QQ", binary, at + 24)
        if kind != NO_BITS and start + length > len(binary):
            return False
    return True


def _keep_in(folder: Path) -> None:
    # humming asks the environment and nothing else; what a user set there stays.
    os.environ.setdefault("HUMMING_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("HUMMING_TMP_DIR", str(folder / "tmp"))


def _afresh() -> None:
    """Compile into an empty folder from now on."""
    os.environ["HUMMING_CACHE_DIR"] = str(temporary_folder(FOLDER) / "cache")
    _forget()


def _forget() -> None:
    """Make humming look at its folder again."""
    import humming.utils.jit as places
    from humming.jit.runtime import KernelRuntime
    from humming.kernel.humming import HummingKernel

    places.get_humming_cache_dir.cache_clear()
    KernelRuntime._instances.clear()
    HummingKernel._str2kernel_cache.clear()
