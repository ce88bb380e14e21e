"""What humming compiles: where it is kept, and what happens when a kept file is broken.

A kept binary that was cut short ends the process in humming's loader, so such ones are deleted
before anything is loaded. Should the kept ones fail all the same, everything is compiled once more,
into a folder of this process.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quant.kernels.cache import cache_folder, is_whole_elf, temporary_folder, writable
from quant.kernels.humming_layout import Config

FOLDER = "humming"
KEPT, LOCKS = "HUMMING_CACHE_DIR", "HUMMING_TMP_DIR"
MOST_TRIED = 1024  # tokens: kernels for more are compiled, and first run when they are needed
STRIDE = 4  # numbers that humming describes a kernel by: fewest tokens, most, its id, its blocks
FAILURES = (RuntimeError, OSError, AssertionError)  # of humming, its compilers and its loader

T = TypeVar("T")

# What this process has compiled and tried, by layer, exactness and device.
_PREPARED: dict[tuple[str, bool, torch.device], Tensor] = {}


class Trial(Protocol):
    """A layer that multiplies by what is being prepared."""

    in_features: int
    dtype: torch.dtype

    def launch(self, x: Tensor, configs: Tensor) -> Tensor:
        """Multiply. x: [n, K]."""


@cache
def compiler_problem() -> str:
    """Say in one line why nothing can be compiled; empty: it can."""
    _choose_folders()
    try:
        from humming.jit.runtime import KernelRuntime

        KernelRuntime._get_compiler().signature()
    except (ImportError, OSError, RuntimeError, AssertionError, LookupError, TypeError) as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:200]
    return ""


def retried(make: Callable[[], T], *, n: int, k: int) -> T:
    """Lay a layer out, from an empty folder of kept binaries where the one in use fails.

    n, k: the layer's, for the message. Raises ValueError where that fails as well.
    """
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except FAILURES:  # a kept file is torn or cannot be written, or nothing works
        _afresh()
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"kernel=humming must compile N={n}, K={k}, got {reason}; "
            "kernel=torch or kernel=reference works"
        ) from error


def prepared(config: Config, *, exact: bool, device: torch.device, trial: Trial) -> Tensor:
    """Compile a layer's kernels for every number of tokens; run each once, for its first layer."""
    from humming.kernel.humming import HummingKernel

    described = (config.to_str(), exact, device)
    if described in _PREPARED:
        return _PREPARED[described]
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
    _PREPARED[described] = found
    return found


def drop_torn(folder: Path) -> None:
    """Delete the binaries below a folder that end before their last section does."""
    for path in folder.glob("*/kernel.cubin"):
        with suppress(OSError):  # of another user: should it be torn, all is compiled elsewhere
            if not is_whole_elf(path.read_bytes()):
                path.unlink()


def _choose_folders() -> None:
    """Tell humming where to keep its files: where a user says or in our cache, if it can be."""
    # It asks the environment and nothing else.
    own = cache_folder() / FOLDER
    for variable, place in ((KEPT, "cache"), (LOCKS, "tmp")):
        chosen = Path(os.environ.get(variable) or own / place)
        os.environ[variable] = str(writable(chosen, FOLDER))
    drop_torn(Path(os.environ[KEPT]))


def _afresh() -> None:
    """Compile into empty folders from now on."""
    os.environ[KEPT] = str(temporary_folder(FOLDER))
    os.environ[LOCKS] = str(temporary_folder(FOLDER))
    _forget()


def _forget() -> None:
    """Make humming look at its folders again."""
    import humming.utils.jit as places
    from humming.jit.runtime import KernelRuntime
    from humming.kernel.humming import HummingKernel

    for found in (
        places.get_humming_cache_dir,
        places.get_humming_tmp_dir,
        places.get_humming_module_dir,
        places.get_humming_lock_dir,
        places.get_humming_lock_filename,
    ):
        found.cache_clear()
    KernelRuntime._instances.clear()
    HummingKernel._str2kernel_cache.clear()
    _PREPARED.clear()
