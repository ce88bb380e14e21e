"""GPTQModel as a quantiser: the maintained toolkit behind the GPTQ and the AWQ format.

It works in a process of its own, which changes nothing in ours: this module is also that process.
What it writes is read back like any checkpoint, and every block is held against the dense one. It
does not go on where it was stopped; our own quantisers do (`bench.quantizer.Own`).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.build import ROOT
from bench.quantizer import Job, Quantizer
from bench.record import read_json, write_json
from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.transformer import Transformer
from methods.weights import read_config
from quant.formats import native_config

METHODS = ("gptq", "awq")
BITS = {"W4A16": 4, "W8A16": 8}
# GPTQModel 7.6 asks for two workers where it finds one core, and compiles two helpers at first use.
ENVIRONMENT = {
    "GPTQMODEL_CPU_WORKERS": "2",
    "GPTQMODEL_DISABLE_PACK_EXT": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
SCRATCH = ".toolkit"


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
        check_transformer(job.folder)
        if "quantization_config" in read_config(job.folder):
            raise ValueError(f"{job.folder}: layers must be dense to be quantised")
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
        if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
            raise ValueError(f"out must be a new or empty folder, got {job.out}")

    def needs_text(self, job: Job) -> bool:
        """Always."""
        return True

    def quantize(self, job: Job) -> list[dict[str, Any]]:
        """Let the package write the folder, read it back, and compare every layer."""
        own = native_config(scheme=job.scheme, lm_head=None, rounding=self.method)["scheme"]
        scratch = job.out.with_name(f"{job.out.name}{SCRATCH}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        order = {
            "folder": str(job.folder),
            "out": str(scratch / "out"),
            "texts": [list(text) for text in job.texts],
            # Its AWQ takes no wider one; what stays dense is written in it.
            "dtype": "bfloat16" if job.dtype == torch.bfloat16 else "float16",
            "settings": asdict(self) | {"bits": BITS[own["name"]]} | _shared(own),
        }
        write_json(scratch / "order.json", order)
        line = [sys.executable, "-m", "bench.toolkit", str(scratch / "order.json")]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        with (scratch / "log.txt").open("w", encoding="utf-8") as log:
            ended = subprocess.run(
                line, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            )
        if ended.returncode:
            raise ValueError(f"GPTQModel must end well, its last words are in {log.name}")
        _note(scratch / "out", job.notes)
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if job.out.exists():
            job.out.rmdir()
        (scratch / "out").rename(job.out)
        shutil.rmtree(scratch)
        return _compared(job)


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
