"""A checkpoint folder's files: its tensors by name, and its config.json.

Everything is checked before anything is allocated. Pickles are read where a folder has nothing
else, as published draft heads do, and only where they hold nothing but tensors.
"""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.random_weights import RANDOM, RandomShard, is_random
from methods.shards import Shard, open_shard
from methods.values import read_json, shown
from quant.formats import Spec

INDEX = "model.safetensors.index.json"
# AutoGPTQ wrote its settings here before config.json had a place for them.
QUANTIZE_CONFIG = "quantize_config.json"
WHOLE = "model.safetensors"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Written beside the weights by our own quantiser, and read by itself.
ROTATION = "rotation.safetensors"


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(
        self,
        folder: Path,
        *,
        renamed: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """renamed: how names begin in the file -> how they shall begin here.

        device: where tensors are drawn that are in no file; None = on the CPU.
        """
        self.folder = folder
        self._place_of: dict[str, tuple[Shard, str]] = {}
        index = _index_file(folder)
        indexed = None if index is None else _read_index(index)
        found: dict[str, str] = {}
        for path in _weight_files(folder, indexed):
            shard = _open(path, device or torch.device("cpu"))
            if twice := shard.names & found.keys():
                raise ValueError(f"{folder} must hold a tensor once, got {_some(twice)} twice")
            found |= dict.fromkeys(shard.names, path.name)
            self._place_of |= {_renamed(n, renamed or {}): (shard, n) for n in shard.names}
        if indexed is not None and (wrong := indexed.items() ^ found.items()):
            raise ValueError(
                f"{index} must name every tensor's file, got {_some({name for name, _ in wrong})} "
                "elsewhere or nowhere"
            )
        if len(self._place_of) < len(found):
            raise ValueError(f"{folder} must hold a tensor once, got two that are renamed to one")

    def __getitem__(self, name: str) -> Tensor:
        shard, stored = self._place_of[name]
        return shard.tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._place_of  # a mapping's own way would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._place_of)

    def __len__(self) -> int:
        return len(self._place_of)

    def spec(self, name: str) -> Spec:
        """Dtype and shape of a tensor, without reading it."""
        shard, stored = self._place_of[name]
        return shard.spec(stored)

    def require(
        self,
        expected: Mapping[str, tuple[int, ...] | Spec],
        *,
        optional: Mapping[str, tuple[int, ...] | Spec] | None = None,
    ) -> None:
        """Check that the folder holds exactly these tensors, or raise ValueError.

        A shape alone admits every dtype. optional: tensors that may stand there besides, in this
        form.
        """
        optional = optional or {}
        missing = expected.keys() - self.keys()
        extra = self.keys() - expected.keys() - optional.keys()
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
    config = read_json(path)
    older = folder / QUANTIZE_CONFIG
    if config.get("quantization_config") is None and older.is_file():
        config["quantization_config"] = {"quant_method": "gptq"} | read_json(older)
    return config


def _open(path: Path, device: torch.device) -> Shard:
    if path.name == RANDOM:
        return RandomShard(path.parent, read_config(path.parent), device)
    return open_shard(path)


def _index_file(folder: Path) -> Path | None:
    """The index of a folder's shards; None where there is none. Safetensors go first."""
    if (folder / INDEX).is_file():
        return folder / INDEX
    path = folder / PICKLED_INDEX
    return path if path.is_file() and not _safetensors(folder) else None


def _read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{path} must have a weight_map from tensors to files, got {shown(named)}")
    # By the listing, and not by asking for the name: it may be too long, absolute or above.
    there = {file.name for file in path.parent.iterdir() if file.is_file()}
    for file in named.values():
        if not isinstance(file, str) or file not in there:
            raise ValueError(f"{path} must name files beside it, got {shown(file)}")
    return named


def _weight_files(folder: Path, indexed: Mapping[str, str] | None) -> list[Path]:
    if is_random(folder):
        if indexed is not None or _safetensors(folder) or (folder / PICKLED).is_file():
            raise ValueError(f"{folder} must hold {RANDOM} or weights, got both")
        return [folder / RANDOM]
    if indexed is None:
        return [_only_file(folder)]
    return [folder / name for name in sorted(set(indexed.values()))]


def _only_file(folder: Path) -> Path:
    """The one file of weights, whatever its name; several without an index may lack a shard."""
    found = _safetensors(folder)
    whole = folder / WHOLE
    if whole in found:
        return whole
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} must hold {INDEX} for its {len(found)} files, found none")
    if (folder / PICKLED).is_file():
        return folder / PICKLED
    raise ValueError(f"{folder} must hold {whole.name}, found none")


def _safetensors(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    return [path for path in found if path.name != ROTATION]


def _renamed(name: str, starts: Mapping[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _some(names: Set[str]) -> str:
    first = ", ".join(shown(name)[1:-1] for name in sorted(names)[:3]) or "none"
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
