"""A checkpoint folder's files: its tensors by name, and its config.json.

Everything is checked before anything is allocated. Pickles are never opened here.
"""

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.formats import Spec

INDEX = "model.safetensors.index.json"
# AutoGPTQ wrote its settings here before config.json had a place for them.
QUANTIZE_CONFIG = "quantize_config.json"
# Written beside the weights by our own quantiser, and read by itself.
ROTATION = "rotation.safetensors"
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


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        indexed = _read_index(folder)
        for path in _weight_files(folder, indexed):
            try:
                with safe_open(path, framework="pt") as file:
                    names = set(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} must be a whole safetensors file: {error}") from error
            if twice := names & self._file_of.keys():
                raise ValueError(f"{folder} must hold a tensor once, got {_some(twice)} twice")
            self._file_of.update(dict.fromkeys(names, path))
        found = {name: path.name for name, path in self._file_of.items()}
        if indexed is not None and (wrong := indexed.items() ^ found.items()):
            shown = _some({name for name, _ in wrong})
            raise ValueError(
                f"{folder / INDEX} must name every tensor's file, got {shown} elsewhere or nowhere"
            )

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def spec(self, name: str) -> Spec:
        """Dtype and shape of a tensor, without reading it."""
        with safe_open(self._file_of[name], framework="pt") as file:
            found = file.get_slice(name)
            if found.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{self.folder}: dtypes must be among {', '.join(DTYPES)}, "
                    f"got {found.get_dtype()} for {name}"
                )
            return Spec(dtypes=(DTYPES[found.get_dtype()],), shape=tuple(found.get_shape()))

    def require(
        self,
        expected: Mapping[str, tuple[int, ...] | Spec],
        *,
        optional: Mapping[str, tuple[int, ...] | Spec] | None = None,
        ignored: Set[str] = frozenset(),
    ) -> None:
        """Check that the folder holds exactly these tensors, or raise ValueError.

        A shape alone admits every dtype. optional: tensors that may stand there besides, in this
        form. ignored: names that may, in any.
        """
        optional = optional or {}
        missing = expected.keys() - self.keys()
        extra = self.keys() - expected.keys() - optional.keys() - ignored
        if missing or extra:
            raise ValueError(
                f"{self.folder} must hold the tensors of its config.json: "
                f"missing {_some(missing)}, superfluous {_some(extra)}"
            )
        for name, wanted in {**optional, **expected}.items():
            if name in self:
                self._require_spec(name, wanted)

    def _require_spec(self, name: str, wanted: tuple[int, ...] | Spec) -> None:
        found = self.spec(name)
        shape = wanted.shape if isinstance(wanted, Spec) else wanted
        if found.shape != shape:
            raise ValueError(
                f"{self.folder}: {name} must be {list(shape)}, got {list(found.shape)}"
            )
        if isinstance(wanted, Spec) and found.dtypes[0] not in wanted.dtypes:
            dtypes = " or ".join(str(dtype) for dtype in wanted.dtypes)
            raise ValueError(f"{self.folder}: {name} must be {dtypes}, got {found.dtypes[0]}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, or raise ValueError naming the folder.

    Where it says nothing of quantisation, an older folder's own file for that is read besides.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} must be a checkpoint folder with a config.json, found none")
    config = _read_object(path)
    older = folder / QUANTIZE_CONFIG
    if "quantization_config" not in config and older.is_file():
        config["quantization_config"] = {"quant_method": "gptq"} | _read_object(older)
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def _read_index(folder: Path) -> dict[str, str] | None:
    """Which file holds which tensor; None where there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be JSON with a weight_map: {error!r}") from error


def _weight_files(folder: Path, indexed: Mapping[str, str] | None) -> list[Path]:
    if indexed is None:
        return [_only_file(folder)]
    paths = [folder / name for name in sorted(set(indexed.values()))]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{folder} must hold {path.name}, found none")
    return paths


def _only_file(folder: Path) -> Path:
    """The one file of weights, whatever its name; several without an index may lack a shard."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name != ROTATION]
    whole = folder / "model.safetensors"
    if whole in found:
        return whole
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} must hold {INDEX} for its {len(found)} files, found none")
    raise ValueError(f"{folder} must hold {whole.name}, found none")


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
