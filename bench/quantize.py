"""Door: quantise a model's layers on calibration text, and write a checkpoint folder of them.

    specquant quantize model=lab quant=w4a16 quantizer=gptq out=checkpoints/lab-gptq

`python -m bench.quantize` does the same. `quant=checkpoint` reads what was written.
"""

import hashlib
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bench import check, hub
from bench.build import build, named_node, target_modules, typed, without
from bench.config import parse_model, plain_tree
from bench.door import OK, collect, sweeping_elsewhere
from bench.identity import WeightHashes, code_hash, digest
from bench.likelihood import Reader, score
from bench.load import load_tokenizer
from bench.machine import check_machine
from bench.quantizer import Job, Quantizer
from bench.record import write_json
from bench.run_line import STORED, run_line
from bench.schemes import LM_HEAD, parse_schemes
from bench.shards import close, is_finished
from bench.source import read_file
from bench.terminal import quality_report
from bench.text import Evaluation, Text, encode, windows
from methods.checkpoint import check_transformer, load_transformer
from methods.values import read_json
from quant.scheme import Scheme

REPORT = "quality.json"
PARTS = ("target", "small")
GROUPS = ("model", "quant", "quantizer", "task", "calibration", "quality")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/quantize.yaml that are not groups; their meaning is written there."""

    out: str
    part: str
    device: str
    dtype: str
    threads: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")
        check_machine(device=self.device, dtype=self.dtype, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much of model.calibration is read: texts, and tokens of each, at most."""

    samples: int
    length: int

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A checked job. evaluation: of what was written, on a text; None = none.

    run: the command that decodes with what was written.
    """

    job: Job
    run: str
    quantizer: Quantizer
    threads: int | None
    evaluation: Evaluation | None
    text: Text


class Jobs:
    """Collects the jobs of one command, checked before the first computes."""

    def __init__(self) -> None:
        self.planned: dict[Path, Planned] = {}

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Check one; ValueError where something is wrong with it."""
        tree = plain_tree(config)
        tree["quant"][LM_HEAD] = named_node("quant", tree["quant"][LM_HEAD], key=f"quant.{LM_HEAD}")
        settings = typed(without(tree, *GROUPS), Settings, key="")
        quality = tree["quality"]
        quantizer = build(tree["quantizer"], Quantizer, key="quantizer")  # type: ignore[type-abstract]
        job = _job(tree, settings, quantizer)
        planned = Planned(
            job=job,
            run=run_line(
                tree["model"],
                names["model"],
                job.out,
                overrides,
                small=settings.part != "target",
                machine={"device": settings.device, "dtype": settings.dtype},
            ),
            quantizer=quantizer,
            threads=settings.threads,
            evaluation=None if quality is None else typed(quality, Evaluation, key="quality"),
            text=build(tree["task"], Text, key="task"),
        )
        quantizer.check(planned.job)
        _check_evaluation(planned)
        if planned.job.out in self.planned:
            raise ValueError(f"every job must have an out of its own, got {planned.job.out} twice")
        self.planned[planned.job.out] = planned


def main() -> int:
    """Quantise as the command line asks; give the exit code."""
    with sweeping_elsewhere():
        return collect("quantize", Jobs, finish=_work)


def _work(jobs: Jobs) -> int:
    for planned in jobs.planned.values():
        if planned.threads is not None:
            torch.set_num_threads(planned.threads)
        known = _known(planned.job)
        report = _completed(planned, known)
        write_json(planned.job.out / REPORT, report)
        close(planned.job.out)
        state = "finished, nothing was left to do" if report == known else "done"
        sys.stdout.write(f"{quality_report(report)}\n{planned.job.out}: {state}\n{planned.run}\n")
    return OK


def _known(job: Job) -> dict[str, Any]:
    """What the same command has reported of a folder that it finished; empty where nothing."""
    path = job.out / REPORT
    finished = is_finished(job.out, {"identity": job.identity})
    return read_json(path) if finished and path.is_file() else {}


def _completed(planned: Planned, known: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is not known yet."""
    report = dict(known) or {"layers": planned.quantizer.quantize(planned.job)}
    if planned.evaluation is not None:
        wanted = asdict(planned.evaluation) | {"text": planned.text.name}
        if report.get("evaluation") != wanted:
            report |= beside_dense(planned.job, planned.evaluation, planned.text)
            report["evaluation"] = wanted
    return report


def _job(tree: Mapping[str, Any], settings: Settings, quantizer: Quantizer) -> Job:
    """Check what is asked for, and read the texts where they are needed."""
    model = parse_model(_fetched(tree["model"], settings.part))
    schemes = parse_schemes(tree["quant"], {})
    family = model.family if settings.part == "target" else model.family.smaller()
    shape = check_transformer(family.target)
    hashes = WeightHashes(None)
    job = Job(
        folder=family.target,
        out=Path(settings.out).expanduser().resolve(),
        scheme=schemes.target,
        lm_head=None if schemes.lm_head.as_stored else schemes.lm_head,
        dense=schemes.dense,
        stored=build(named_node("quant", STORED, key="quant"), Scheme, key="quant"),  # type: ignore[type-abstract]
        texts=[],
        dtype=getattr(torch, settings.dtype),
        device=torch.device(settings.device),
        seed=settings.seed,
        identity="",
        notes={"source": hashes.one(family.target), "calibration": None},
        progress=sys.stderr.isatty(),
    )
    files = []
    if quantizer.needs_text(job):
        file = model.calibration
        if file is None or not file.is_file():
            raise ValueError(f"model.calibration must be a file for {job.scheme.label}, got {file}")
        files = [file]
        wanted = typed(tree["calibration"], Calibration, key="calibration")
        texts = _texts(file, family.target, wanted, settings.seed, most=shape.max_positions)
        job = replace(job, texts=texts, notes={**job.notes, **_notes(file, texts, settings.seed)})
    identity = {
        "settings": without(tree, "out", "task", "quality", "threads"),
        "files": hashes.of([family.target], files),
        "code": code_hash(["bench.quantize", *sorted(target_modules(tree))]),
    }
    return replace(job, identity=digest(identity))


def _check_evaluation(planned: Planned) -> None:
    """Check what is measured at the end, which may be hours away."""
    evaluation, folder = planned.evaluation, planned.job.folder
    if evaluation is None:
        return
    check.check_window(evaluation.window, check_transformer(folder).max_positions)
    if evaluation.reference is not None:
        raise ValueError(
            "quality.reference must be null, since the dense model is the one that is quantised, "
            f"got {evaluation.reference}"
        )
    check.check_ids(folder, encode(load_tokenizer(folder), planned.text)[: evaluation.limit])


def _fetched(model: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Fetch what is quantised, where it is named by a hub id."""
    if part == "target" or model.get("small") is None:
        return {**model, "target": hub.fetch(model["target"], key="model.target")}
    small = {
        **model["small"],
        "target": hub.fetch(model["small"]["target"], key="model.small.target"),
    }
    return {**model, "small": small}


def _texts(
    file: Path, folder: Path, wanted: Calibration, seed: int, *, most: int
) -> list[list[int]]:
    """Draw texts and give their tokens; a text of one token shows nothing."""
    texts = [str(row.get("text")) for row in read_file(file)]
    random.Random(seed).shuffle(texts)
    tokenizer = load_tokenizer(folder)
    length = min(wanted.length, most)
    drawn = [tokenizer(text)["input_ids"][:length] for text in texts[: wanted.samples]]
    check.check_ids(folder, chain.from_iterable(drawn))
    return [tokens for tokens in drawn if len(tokens) > 1]


def _notes(file: Path, texts: list[list[int]], seed: int) -> dict[str, Any]:
    """What the checkpoint tells of its calibration."""
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "calibration": {
            "file": file.name,
            "sha256": content,
            "samples": len(texts),
            "tokens": sum(map(len, texts)),
            "seed": seed,
        }
    }


def beside_dense(job: Job, evaluation: Evaluation, text: Text) -> dict[str, Any]:
    """Perplexity of the dense and of the new model on a text, and how far apart they are."""
    tokens = encode(load_tokenizer(job.folder), text)[: evaluation.limit]
    dense, new = (
        Reader(
            load_transformer(
                folder, scheme=scheme, lm_head=scheme, dtype=job.dtype, device=job.device
            ),
            window=evaluation.window,
        )
        for folder, scheme in ((job.folder, job.dense), (job.out, job.stored))
    )
    own = dense if evaluation.kl else None
    found = [
        (score(w, tokens, dense, None), score(w, tokens, new, own))
        for w in windows(len(tokens), evaluation)
    ]
    count = sum(record.tokens for record, _ in found)
    kl = [record.kl_nats for _, record in found if record.kl_nats is not None]
    return {
        "text": text.name,
        "tokens": count,
        "dense_perplexity": math.exp(sum(record.nll_nats for record, _ in found) / count),
        "perplexity": math.exp(sum(record.nll_nats for _, record in found) / count),
        "kl_nats_per_token": sum(kl) / count if kl else None,
    }


if __name__ == "__main__":
    sys.exit(main())
