"""Quantisers: what a yaml of conf/quantizer names. Ours works block by block and can be resumed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.shards import Shards, write_tensors
from methods.architecture import EMBEDDING, OUTPUT, stored_tensors
from methods.checkpoint import check_transformer, require_dense
from methods.packer import Packer
from methods.quantize import BlockQuantizer, Rounded, published
from methods.rotated import FINAL_NORM, Rotated
from methods.transformer import Shape
from methods.weights import ROTATION, Weights, read_config
from quant.formats import Quantization, native_config, read_quantization
from quant.rotate import random_rotation
from quant.rounding import Rounding
from quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be quantised, how, and into which folder.

    lm_head: None leaves the output projection dense. texts: token ids. identity: of everything
    that the result depends on. notes: what the checkpoint should tell of its making.
    """

    folder: Path
    out: Path
    scheme: Scheme
    lm_head: Scheme | None
    dense: Scheme
    stored: Scheme
    texts: Sequence[list[int]]
    dtype: torch.dtype
    device: torch.device
    seed: int
    identity: str
    notes: Mapping[str, Any]
    progress: bool


class Quantizer(ABC):
    """Concrete quantisers are frozen, keyword-only dataclasses of plain values."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Raise ValueError where the job cannot be done, before anything is read."""

    @abstractmethod
    def needs_text(self, job: Job) -> bool:
        """Whether it looks at activations."""

    @abstractmethod
    def quantize(self, job: Job) -> list[dict[str, Any]]:
        """Write the folder; give what is known of every layer, a row each."""


@dataclass(frozen=True, kw_only=True)
class Own(Quantizer):
    """Our own: any scheme, any rounding, block by block, into our own format."""

    rounding: Rounding
    rotate: bool

    @property
    def label(self) -> str:
        """How codes come about, for labels."""
        return ("rotated+" if self.rotate else "") + self.rounding.label

    def check(self, job: Job) -> None:
        """The scheme must be one that is stored, and fit every layer."""
        shape = require_dense(job.folder)
        stored_tensors(shape, self._quantization(job))

    def needs_text(self, job: Job) -> bool:
        """As rounding and schemes do."""
        schemes = [job.scheme, *filter(None, [job.lm_head])]
        return self.rounding.needs_hessian or any(scheme.needs_absmax for scheme in schemes)

    def quantize(self, job: Job) -> list[dict[str, Any]]:
        """Round block after block; each is a shard, and what is written is not done again."""
        shape = check_transformer(job.folder)
        plain = Weights(job.folder)
        weights = _rotated(plain, shape, job.seed) if self.rotate else plain
        shape = weights.shape if isinstance(weights, Rotated) else shape
        shards = Shards(job.out, plan={"identity": job.identity}, count=shape.num_layers + 1)
        dense = Packer(weights, job.dense, dtype=job.dtype, device=job.device)
        work = BlockQuantizer(
            dense,
            shape,
            scheme=job.scheme,
            rounding=self.rounding,
            embedding=dense.tensor(EMBEDDING),
            texts=job.texts,
        )
        layers = range(shape.num_layers)
        for number in tqdm(layers, desc="blocks", disable=not job.progress):
            if shards.has(number):
                own = self._packer(shards.read(number), job)
                work.skip(own.block(number, shape))
            else:
                shards.write(number, *_gathered(work.block(number), number, weights, shape))
        if not shards.has(shape.num_layers):
            shards.write(shape.num_layers, *self._ends(job, work, dense, shape))
        if isinstance(weights, Rotated):
            adapter = {"rotation": weights.stream.matrix.float(), "norm": weights.norm().float()}
            write_tensors(job.out / ROTATION, adapter, {"format": "pt"})
        shards.finish(config=self._config(job, shape), source=job.folder)
        return shards.notes()

    def _ends(
        self, job: Job, work: BlockQuantizer, dense: Packer, shape: Shape
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Embedding, final norm and output projection."""
        weights = dense.weights
        tensors = {EMBEDDING: weights[EMBEDDING], FINAL_NORM: weights[FINAL_NORM]}
        source = EMBEDDING if shape.tied else OUTPUT
        if job.lm_head is None:
            if not shape.tied:
                tensors[OUTPUT] = weights[OUTPUT]
            return tensors, []
        norm = dense.norm(FINAL_NORM, shape.norm_eps)
        layer = dense.linear("lm_head", source.removesuffix(".weight"))
        rounded = work.output(norm, layer, job.lm_head)
        tensors |= {f"lm_head.{key}": tensor for key, tensor in rounded.stored.items()}
        return tensors, [_row(rounded, "lm_head")]

    def _packer(self, tensors: Mapping[str, Tensor], job: Job) -> Packer:
        return Packer(
            tensors,
            job.stored,
            dtype=job.dtype,
            device=job.device,
            quantization=self._quantization(job),
        )

    def _config(self, job: Job, shape: Shape) -> dict[str, Any]:
        """The config.json of the folder that is written."""
        own = native_config(scheme=job.scheme, lm_head=job.lm_head, rounding=self.label)
        tied = shape.tied and job.lm_head is None
        return {
            **read_config(job.folder),
            "tie_word_embeddings": tied,
            "quantization_config": own | {"quantizer": asdict(self), **job.notes},
        }

    def _quantization(self, job: Job) -> Quantization | None:
        own = native_config(scheme=job.scheme, lm_head=job.lm_head, rounding=self.label)
        return read_quantization({"quantization_config": own}, set())


def _rotated(weights: Weights, shape: Shape, seed: int) -> Rotated:
    return Rotated(
        weights,
        shape,
        stream=random_rotation(shape.hidden_size, seed),
        heads=random_rotation(shape.head_dim, seed + 1),
    )


def _gathered(
    block: Iterator[Rounded], number: int, weights: Mapping[str, Tensor], shape: Shape
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Everything of one block: rounded layers, and what stays as it is."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for rounded in block:
        tensors |= published(number, rounded.layer, rounded.stored, shape)
        notes.append(_row(rounded, f"{number}.{rounded.layer}"))
    modules = {name.rpartition(".")[0] for name in tensors}
    for name in weights:
        module, _, kind = name.rpartition(".")
        if name.startswith(f"model.layers.{number}.") and (kind, module in modules) != (
            "weight",
            True,
        ):
            tensors[name] = weights[name]
    return tensors, notes


def _row(rounded: Rounded, layer: str) -> dict[str, Any]:
    return {
        "layer": layer,
        "weight_error": rounded.weight_error,
        "output_error": rounded.output_error,
    }
