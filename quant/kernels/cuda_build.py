"""CUDA C++ compiled at its first use by NVRTC, kept on disk, and launched on torch's stream.

NVRTC and the driver are reached through `cuda.bindings`, which PyTorch's CUDA builds bring along;
no compiler need be installed. A binary is found again by the hash of everything it was made from;
one that is torn is compiled anew.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quant.kernels.cache import cache_folder, writable

FOLDER = "cuda"
OPTIONS = ("--std=c++17",)
DIGEST = 32  # bytes of SHA-256, in front of a kept binary


@cache
def missing() -> str:
    """Say without what nothing is compiled here; empty: it is all there."""
    try:
        found = find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return "the package cuda-bindings"
    from cuda.bindings import nvrtc

    try:
        _checked(nvrtc.nvrtcVersion())
    except RuntimeError:  # the bindings look for the library at the first call
        return "NVRTC, of the CUDA toolkit"
    return ""


@dataclass(frozen=True)
class Function:
    """A kernel that is loaded on a device."""

    handle: Any
    device: torch.device

    def launch(
        self,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        *,
        overlapped: bool,
    ) -> None:
        """Launch on torch's current stream of the device.

        arguments: ctypes values, or objects with `getPtr`. overlapped: may start before the kernel
        in front has ended (programmatic dependent launch); the kernel waits by itself.
        """
        driver = _driver()
        pointers = (ctypes.c_void_p * len(arguments))(*(_address(a) for a in arguments))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        if overlapped:
            attribute = driver.CUlaunchAttribute()
            kinds = driver.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        with torch.cuda.device(self.device):
            _checked(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0))


def function(source: str, name: str, *, shared_bytes: int, device: torch.device) -> Function:
    """Compile a source for a device, or find it compiled, and load one kernel of it.

    Raises RuntimeError with the compiler's own words where it refuses.
    """
    major, minor = torch.cuda.get_device_capability(device)
    driver = _driver()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context
        library = _loaded(source, f"sm_{major}{minor}a")
        handle = _checked(driver.cuModuleGetFunction(library, name.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(handle, most, shared_bytes))
    return Function(handle, device)


def at_once(makers: Iterable[Callable[[], Function]]) -> None:
    """Make many functions, by a thread for each processor: NVRTC compiles beside itself."""
    _folder()  # chosen once, or each thread would choose its own
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for made in [pool.submit(make) for make in makers]:
            made.result()


def compiled(source: str, architecture: str) -> bytes:
    """Compile by NVRTC to a binary for one architecture."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in OPTIONS)]
    outcome = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(outcome):
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC refused a kernel: {log.decode(errors='replace').strip()}")
    binary = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return bytes(binary)


def _loaded(source: str, architecture: str) -> Any:  # noqa: ANN401  a module of the driver's
    driver = _driver()
    path = _folder() / f"{_hash(source, architecture)}.cubin"
    kept = _read(path)
    if kept is not None:
        outcome, module = driver.cuModuleLoadData(kept)
        if not int(outcome):
            return module
    binary = compiled(source, architecture)
    module = _checked(driver.cuModuleLoadData(binary))
    _keep(path, binary)
    return module


def _hash(source: str, architecture: str) -> str:
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())
    made_from = "\0".join((source, architecture, *OPTIONS, str(version)))
    return hashlib.sha256(made_from.encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    """Read a kept binary; None where it is absent or torn."""
    try:
        held = path.read_bytes()
    except OSError:
        return None
    digest, binary = held[:DIGEST], held[DIGEST:]
    return binary if hashlib.sha256(binary).digest() == digest else None


def _keep(path: Path, binary: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(hashlib.sha256(binary).digest() + binary)
        scratch.replace(path)
    except OSError:  # a full disk costs the next process a compilation
        scratch.unlink(missing_ok=True)


@cache
def _folder() -> Path:
    return writable(cache_folder() / FOLDER, FOLDER)


def _driver() -> Any:  # noqa: ANN401  a module without types
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...]) -> Any:  # noqa: ANN401  whatever a call gives
    """Give what a call returned besides its status. Raises RuntimeError on any but success."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA failed with {status!r}")
    return values[0] if len(values) == 1 else tuple(values) if values else None


def _address(argument: Any) -> int:  # noqa: ANN401  see Function.launch
    return int(argument.getPtr()) if hasattr(argument, "getPtr") else ctypes.addressof(argument)
