"""Three hashes that decide whether a cell's records are still what its configuration would give.

Configuration: the resolved node. Code: every source file that the work imports, followed through
its import statements, so that an edit to a plot or to another method leaves a cell finished.
Weights: the content of every file that is read.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.build import PACKAGES, ROOT
from bench.record import write_json
from methods.values import read_json

# Where results lie, what is drawn, what a report makes of a gap and when a head is called broken
# do not change a record.
IRRELEVANT = ("campaign", "results_dir", "baseline", "tie_threshold_nats", "acceptance_floor")
# Where things lie: what lies there is hashed by its content, in so far as a cell reads it.
PLACES = {
    "model": ("target", "heads", "small", "calibration"),
    "method": ("draft_vocab",),
    "task": ("path", "data_dir", "hub", "hub_config", "hub_split"),
    "quality": ("reference",),
}
# Sources beside Python's that a kernel may be compiled from.
KERNEL_SOURCES = (".cu", ".cuh", ".cpp", ".h")
# What a checkpoint folder is read for: weights, sizes, tokenizer, chat template.
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",  # read where there is nothing else
    "*.bin.index.json",
    "config.json",
    "random_weights.json",  # in place of weights
    "quantize_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)


def config_hash(config: Mapping[str, Any], data: str) -> str:
    """Hash a resolved configuration and the digest of the prompts or the text it leads to."""
    relevant = {key: value for key, value in config.items() if key not in IRRELEVANT}
    for node, places in PLACES.items():
        if isinstance(own := relevant.get(node), Mapping):
            relevant[node] = {key: value for key, value in own.items() if key not in places}
    return digest({"config": relevant, "data": data})


def digest(value: object) -> str:
    """Hash anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_hash(modules: Iterable[str], *, root: Path = ROOT) -> str:
    """Hash the sources of some modules and of all that they import from this checkout."""
    total = hashlib.sha256()
    for path in sorted(_sources(modules, root)):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


class WeightHashes:
    """Hashes files by content; remembers them by path, size, inode and times of change."""

    def __init__(self, memory: Path | None) -> None:
        """memory: a JSON file that is read now and written by `save`; None remembers nothing."""
        self._memory = memory
        self._known: dict[str, Any] = {}
        if memory is not None and memory.is_file():
            self._known = read_json(memory)
        self._changed = False

    def of(self, folders: Iterable[Path], files: Iterable[Path] = ()) -> dict[str, str]:
        """Hash checkpoint folders and single files: short name -> hash."""
        found = [p for folder in folders for p in _checkpoint_files(folder)] + list(files)
        hashes: dict[str, str] = {}
        for path in dict.fromkeys(p.resolve() for p in found):
            name = "/".join(path.parts[-3:])
            while name in hashes:  # the same three last parts on two disks
                name += "'"
            hashes[name] = self._hash(path)
        return hashes

    def one(self, folder: Path) -> str:
        """Hash a checkpoint folder as a whole; a copy elsewhere has the same hash."""
        named = ((name.rpartition("/")[2], file) for name, file in self.of([folder]).items())
        return digest(sorted(named))

    def save(self) -> None:
        """Write what was learnt."""
        if self._changed and self._memory is not None:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memory, self._known)

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if not known or known[:-1] != state:
            with path.open("rb") as file:
                known = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[str(path)] = known
            self._changed = True
        found: str = known[-1]
        return found


def _checkpoint_files(folder: Path) -> list[Path]:
    found = {path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())  # no folder, no broken link


def _sources(modules: Iterable[str], root: Path) -> set[Path]:
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        for path in _files(waiting.pop(), root):
            if path in found:
                continue
            found.add(path)
            found.update(p for p in path.parent.iterdir() if p.suffix in KERNEL_SOURCES)
            waiting += _imported(path)
    return found


def _files(module: str, root: Path) -> Iterator[Path]:
    """Source of a module and of the packages around it; nothing for a module from elsewhere."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return
    for i in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:i])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
