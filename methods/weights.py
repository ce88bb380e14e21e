"""A checkpoint folder's files: its tensors by name, and its config.json.

Everything is checked before anything is allocated. Pickles are never opened here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} must be a whole safetensors file: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def require(self, expected: Mapping[str, tuple[int, ...]], *, ignored: set[str]) -> None:
        """Check that the folder holds exactly these tensors, or raise ValueError.

        ignored: names that may stand there besides.
        """
        missing = expected.keys() - self.keys()
        extra = self.keys() - expected.keys() - ignored
        if missing or extra:
            raise ValueError(
                f"{self.folder} must hold the tensors of its config.json: "
                f"missing {_some(missing)}, superfluous {_some(extra)}"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self.folder}: {name} must be {list(shape)}, got {list(self.shape(name))}"
                )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, or raise ValueError naming the folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} must be a checkpoint folder with a config.json, found none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        paths = [folder / "model.safetensors"]
    else:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / name for name in sorted(set(named))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{folder} must hold {path.name}, found none")
    return paths


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
