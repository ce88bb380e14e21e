"""One file of weights, its tensors by name: safetensors, or a pickle of plain tensors."""

import pickle
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.formats import Spec

# The names that safetensors gives dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# What reading a pickle that is cut or made up can raise.
BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
)

POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a file


class Shard(ABC):
    """A file that was found whole when it was opened."""

    @property
    @abstractmethod
    def names(self) -> Set[str]:
        """Of every tensor."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Dtype and shape of one, without reading it; ValueError where the dtype is unknown."""


def open_shard(path: Path) -> Shard:
    """Open a file by its suffix, or raise ValueError where it is broken."""
    try:
        return PickledShard(path) if path.suffix == ".bin" else SafetensorsShard(path)
    except ValueError as error:
        if _is_pointer(path):
            told = "got a Git LFS pointer to them: `git lfs pull` fetches them"
            raise ValueError(f"{path} must hold weights, {told}") from error
        raise


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False  # what could not be read is told already


class SafetensorsShard(Shard):
    """Opened anew for each tensor, so that no mapping outlives its use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._names = frozenset(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a whole safetensors file: {error}") from error

    @property
    def names(self) -> Set[str]:
        """Of every tensor."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def spec(self, name: str) -> Spec:
        """Dtype and shape of one, without reading it."""
        with safe_open(self._path, framework="pt") as file:
            found = file.get_slice(name)
            if found.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{self._path.parent}: dtypes must be among {', '.join(DTYPES)}, "
                    f"got {found.get_dtype()} for {name}"
                )
            return Spec(dtypes=(DTYPES[found.get_dtype()],), shape=tuple(found.get_shape()))


class PickledShard(Shard):
    """What torch.save wrote. Nothing but tensors is unpickled, so no code in it can run."""

    def __init__(self, path: Path) -> None:
        try:
            # Files from before torch 1.6 are no archives, and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except BROKEN as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(
                f"{path} must be a whole pickle of nothing but tensors: {reason}"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold tensors by name, got {type(found).__name__}")
        for name, value in found.items():
            if not isinstance(name, str) or not _is_plain(value):
                raise ValueError(
                    f"{path} must hold tensors by name, got {type(value).__name__} for {name!r}"
                )
        self._tensors: dict[str, Tensor] = found

    @property
    def names(self) -> Set[str]:
        """Of every tensor."""
        return self._tensors.keys()

    def tensor(self, name: str) -> Tensor:
        """Give one tensor, which the file's pages back until it is written to."""
        return self._tensors[name].detach()

    def spec(self, name: str) -> Spec:
        """Dtype and shape of one."""
        tensor = self._tensors[name]
        return Spec(dtypes=(tensor.dtype,), shape=tuple(tensor.shape))


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with all its bytes, in rows."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
        and value.untyped_storage().nbytes() >= value.nbytes
    )
