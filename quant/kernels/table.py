"""Which kernel was the fastest for a layer on this machine: measured by `specquant kernels`.

    {"schema": 4, "machine": {"gpu": ..., "torch": ..., "triton": ..., "humming": ...},
     "best": {"w4a16-g128": {"8192x57344": {"float16": "humming"}},
              "w4a16-g128, exact": {"8192x57344": {"float16": "triton"}}}}

One file a machine. One that is torn, of another schema or of other versions counts as none: it
only says what is faster, so that a missing one costs time and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from quant.kernels.cache import cache_folder
from quant.kernels.machine import Machine
from quant.scheme import QuantLinear

# 1: before our CUDA kernels took dense layers, and led in w4a16; 2: before digits; 3: before halves
SCHEMA = 4
Best: TypeAlias = Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The fastest kernel by scheme (`entry`), shape and dtype of activations."""

    machine: Machine
    best: Best

    def kernel(self, scheme: str, layer: QuantLinear, dtype: torch.dtype) -> str | None:
        """Give the fastest kernel of a layer; None where nobody measured."""
        return self.best.get(scheme, {}).get(shape_name(layer), {}).get(dtype_name(dtype))


def entry(label: str, *, exact: bool) -> str:
    """Name a scheme's layers in a table. exact: as of `quant.kernels.kernel.Kernel.inexact`."""
    return f"{label}, exact" if exact else label


def shape_name(layer: QuantLinear) -> str:
    """Name a layer's shape, KxN."""
    return f"{layer.in_features}x{layer.out_features}"


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as configs do."""
    return str(dtype).removeprefix("torch.")


def table_path(machine: Machine) -> Path:
    """Where a machine's table lies."""
    named = json.dumps(asdict(machine), sort_keys=True)
    return cache_folder() / f"kernels-{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"


def read_table(machine: Machine) -> Table:
    """Read a machine's table; an empty one where there is none to trust."""
    empty = Table(machine=machine, best={})
    try:
        found = json.loads(table_path(machine).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or found["machine"] != asdict(machine):
            return empty
        best = {
            str(label): {
                str(shape): {str(dtype): str(name) for dtype, name in dtypes.items()}
                for shape, dtypes in shapes.items()
            }
            for label, shapes in found["best"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return empty
    return Table(machine=machine, best=best)


def write_table(table: Table) -> Path:
    """Write a machine's table whole, beside what it says of other layers; give its path."""
    path = table_path(table.machine)
    merged: dict[str, dict[str, dict[str, str]]] = {}
    for best in (read_table(table.machine).best, table.best):
        for label, shapes in best.items():
            for shape, dtypes in shapes.items():
                merged.setdefault(label, {}).setdefault(shape, {}).update(dtypes)
    values = {"schema": SCHEMA, "machine": asdict(table.machine), "best": merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    scratch.replace(path)
    return path
