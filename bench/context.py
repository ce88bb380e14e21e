"""Where records come from: machine, versions, commit and the state of the checkout."""

import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.build import ROOT
from bench.record import CONTEXT, RECORDS, SCHEMA, write_json
from methods.values import read_json

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "numpy",
    "triton",
    "humming-kernels",
    "cuda-bindings",
)
NVIDIA = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def context(
    device: torch.device,
    argv: Sequence[str],
    kernels: Mapping[str, str],
    *,
    exact: bool,
    draft_vocab: Mapping[str, Any] | None = None,
    copy_tb_per_s: float | None = None,
) -> dict[str, Any]:
    """Describe this process and its machine.

    argv: of the command that asked for the work. kernels: of the target's layers, by shape; exact:
    whether they had to be. draft_vocab: which tokens a draft head may propose, where not all.
    copy_tb_per_s: what the device's own copy reads and writes, measured in this process.
    """
    return {
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "device": _device(device),
        "cpu": _cpu(),
        "num_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": dict(kernels),
        "exact": exact,
        "copy_tb_per_s": copy_tb_per_s,
        **({} if draft_vocab is None else {"draft_vocab": dict(draft_vocab)}),
        **checkout(ROOT),
        "argv": [Path(argv[0]).name, *argv[1:]] if argv else [],
    }


def run_name() -> str:
    """Name this process: two processes of one machine never share it."""
    return f"{datetime.now(UTC).isoformat(timespec='seconds')}/{os.getpid()}"


def write_context(folder: Path, now: dict[str, Any]) -> None:
    """Write a cell's `context`, and note there that its records are gone on with.

    Records of another machine, or of other kernels, are no part of the cell: they are dropped.
    """
    path, records = folder / CONTEXT, folder / RECORDS
    if path.exists() and records.exists():
        before = read_json(path)
        if same_machine(before, now):
            now = before | {"resumed": [*before.get("resumed", []), now["started"]]}
        else:
            records.unlink()
    write_json(path, now)


def note_graphs(folder: Path, captured: int, reserved_bytes: int) -> None:
    """Note in a cell's context.json how many CUDA graphs its process has, and their memory."""
    _note(folder, graphs={"captured": captured, "reserved_bytes": reserved_bytes})


def note_start(folder: Path, stage_s: Mapping[str, float]) -> None:
    """Note in a cell's context.json where the time to the first timed token went, by stage.

    In order: command (until it starts a child), imports, tokenizer, device, then of every layer
    weights (read or drawn), rounding, and kernels or layout (`methods.packer.Packer`); building,
    captures (of graphs), warm_up, first_token. The cost door ends with captures.
    """
    _note(folder, start_s={stage: round(s, 4) for stage, s in stage_s.items()})


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether timings of two contexts may stand in one cell."""
    keys = ("device", "cpu", "threads", "python", "packages", "kernels")
    stable = [{key: c.get(key) for key in keys} for c in (one, other)]
    for values in stable:
        values["device"] = (values["device"] or {}).get("name")
    return stable[0] == stable[1]


def checkout(root: Path) -> dict[str, Any]:
    """Commit and state of a checkout; nulls where there is no git or no commit."""
    top, commit = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top.strip()) != root.resolve():
        return {"commit": None, "dirty": None, "diff_sha256": None}  # or of another checkout
    status, diff = _git(root, "status", "--porcelain"), _git(root, "diff", "HEAD")
    return {
        "commit": commit.strip(),
        "dirty": None if status is None else bool(status.strip()),
        "diff_sha256": None if diff is None else hashlib.sha256(diff.encode()).hexdigest(),
    }


def _note(folder: Path, **facts: object) -> None:
    write_json(folder / CONTEXT, read_json(folder / CONTEXT) | facts)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return {"type": device.type, "name": _cpu() if device.type == "cpu" else None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **_nvidia(str(properties.uuid)),
    }


def _nvidia(uuid: str) -> dict[str, str]:
    """What the driver says; nothing where nvidia-smi is absent."""
    queried = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(NVIDIA)}"]
    said = _output([*queried, "--format=csv,noheader"])
    if said is None:
        return {}
    return dict(zip(NVIDIA, (value.strip() for value in said.split(",")), strict=False))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    return _output(["git", "-C", str(root), *arguments])


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=30, text=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
