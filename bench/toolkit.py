"""GPTQModel as a quantiser: the maintained toolkit behind the GPTQ and the AWQ format.

It works in a process of its own, which changes nothing in ours: this module is also that process.
What it writes is read back like any checkpoint, and every block is held against the dense one. It
begins anew where it was stopped; our own quantisers go on (`bench.quantizer.Own`).
A scheme's `range_search` is ours alone: the package chooses ranges in its own way.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.build import ROOT
from bench.quantizer import Job, Quantizer
from bench.record import write_json
from bench.shards import UNFINISHED, plan_of
from methods.checkpoint import load_transformer, require_dense, stored_in
from methods.transformer import Transformer
from methods.values import read_json
from quant.formats import native_config

METHODS = ("gptq", "awq")
BITS = {"W4A16": 4, "W8A16": 8}
# GPTQModel 7.6 asks for two workers where it finds one core, and compiles two helpers at first use.
ENVIRONMENT = {
    "GPTQMODEL_CPU_WORKERS": "2",
    "GPTQMODEL_DISABLE_PACK_EXT": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True, kw_only=True)
class GPTQModel(Quantizer):
    """method: gptq | awq. desc_act, static_groups: of gptq, as `quant.gptq.GPTQ` has them."""

    method: str
    desc_act: bool
    static_groups: bool

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method != "gptq" and (self.desc_act or self.static_groups):
            raise ValueError(f"desc_act and static_groups must be false for {self.method}")

    def check(self, job: Job) -> None:
        """The package must be there, and the scheme one that it writes."""
        require_dense(job.folder)
        if importlib.util.find_spec("gptqmodel") is None:
            raise ValueError(
                "quantizing with GPTQModel needs the extra `quantize` "
                "(pip install 'specquant[quantize]'); quantizer=gptq is our own"
            )
        own = native_config(scheme=job.scheme, lm_head=None, rounding=self.method)["scheme"]
        wanted = (4,) if self.method == "awq" else (4, 8)
        if BITS.get(own["name"]) not in wanted:
            raise ValueError(
                f"GPTQModel's {self.method} must write W4A16{' or W8A16' * (len(wanted) > 1)}, "
                f"got {job.scheme.label}"
            )
        if job.lm_head is not None:
            raise ValueError("quant.lm_head must be checkpoint with a toolkit, got another scheme")
        if not _is_written(job) and not _is_free(job.out):
            raise ValueError(f"out must be a new or empty folder, got {job.out}")

    def needs_text(self, job: Job) -> bool:
        """Always."""
        return True

    def quantize(self, job: Job) -> list[dict[str, Any]]:
        """Let the package write the folder, read it back, and compare every layer."""
        if not _is_written(job):
            with TemporaryDirectory(prefix=f".{job.out.name}.", dir=_parent(job.out)) as scratch:
                self._write(job, Path(scratch))
        return _compared(job)

    def _write(self, job: Job, scratch: Path) -> None:
        """Let the package write below a folder, and move what it wrote into place."""
        own = native_config(scheme=job.scheme, lm_head=None, rounding=self.method)["scheme"]
        order = {
            "folder": str(job.folder),
            "out": str(scratch / "out"),
            "texts": [list(text) for text in job.texts],
            # Its AWQ takes no wider one; what stays dense is written in it.
            "dtype": "bfloat16" if job.dtype == torch.bfloat16 else "float16",
            "settings": asdict(self) | {"bits": BITS[own["name"]]} | _shared(own),
        }
        write_json(scratch / "order.json", order)
        ended = subprocess.run(
            [sys.executable, "-m", "bench.toolkit", str(scratch / "order.json")],
            cwd=scratch,  # it leaves logs where it stands
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ended.returncode:
            last = (ended.stdout.strip() or "nothing").splitlines()[-1]
            raise ValueError(f"GPTQModel must end well, its last words were: {last}")
        _note(scratch / "out", job.notes)
        write_json(scratch / "out" / UNFINISHED, {"identity": job.identity})
        if job.out.exists():
            job.out.rmdir()
        (scratch / "out").rename(job.out)


def _is_written(job: Job) -> bool:
    """Whether the same command has written the folder, whatever came after that."""
    return plan_of(job.out) == {"identity": job.identity}


def _is_free(out: Path) -> bool:
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _shared(scheme: Mapping[str, Any]) -> dict[str, Any]:
    return {"group_size": scheme["group_size"], "sym": scheme["symmetric"]}


def _note(folder: Path, notes: Mapping[str, Any]) -> None:
    """Write what the checkpoint should tell of its making beside the package's own words."""
    config = read_json(folder / "config.json")
    config["specquant"] = dict(notes)
    write_json(folder / "config.json", config)


def _compared(job: Job) -> list[dict[str, Any]]:
    """How far the stream behind every block is from the dense model's, on the calibration texts.

    Weights would not do: AWQ scales them against the norms before.
    """
    stored_in(job.out, job.stored, job.stored)
    new, dense = (
        load_transformer(folder, scheme=scheme, lm_head=scheme, dtype=job.dtype, device=job.device)
        for folder, scheme in ((job.out, job.stored), (job.folder, job.dense))
    )
    blocks = dense.shape.num_layers
    apart, size = (torch.zeros(blocks, dtype=torch.float64) for _ in range(2))
    for text in job.texts:
        before, after = _streams(dense, text), _streams(new, text)
        apart += (after - before).square().sum(dim=(0, 2)).cpu()
        size += before.square().sum(dim=(0, 2)).cpu()
    shares = (apart / size).tolist()
    return [
        {"layer": f"{number}", "weight_error": None, "output_error": share}
        for number, share in enumerate(shares)
    ]


def _streams(model: Transformer, text: list[int]) -> Tensor:
    """Residual streams behind all blocks, the last one's after the norm. [n, blocks, D] float64."""
    n, blocks = len(text), model.shape.num_layers
    tokens = torch.tensor([text], device=model.device)
    positions = torch.arange(n, device=model.device)
    read = model(tokens, positions, model.cache(n), taps=tuple(range(1, blocks + 1)))
    features: Tensor = read.features[0]
    return features.double().view(n, blocks, -1)


def main() -> None:
    """Be the process that drives the package: python -m bench.toolkit <order.json>."""
    import gptqmodel  # optional, and slow to import

    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settings = order["settings"]
    backends = {"gptq": gptqmodel.BACKEND.GPTQ_TORCH, "awq": gptqmodel.BACKEND.AWQ_TORCH}
    backend = backends[settings["method"]]
    if settings["method"] == "awq":
        settings = {k: v for k, v in settings.items() if k not in ("desc_act", "static_groups")}
        settings["format"] = "gemm"
    config = gptqmodel.QuantizeConfig(**settings, offload_to_disk=False)
    dtype = getattr(torch, order["dtype"])
    model = gptqmodel.GPTQModel.load(order["folder"], config, dtype=dtype)
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in order["texts"]]
    model.quantize(texts, batch_size=1, backend=backend)
    model.save(order["out"])


if __name__ == "__main__":
    main()
