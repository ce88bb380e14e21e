"""Tensors of any published shape, made up where they are asked for: costs are real, tokens are not.

A folder of such a model has the published config.json and, in place of weights, a
`random_weights.json`:

    {"seed": 0, "holds": "transformer"}        holds: transformer | eagle2 | eagle3

A tensor depends on the seed and its name, and on the kind of device that it is drawn on. It is
drawn in the dtype of config.json, so that no wider copy of it ever exists. Scales keep a stream
of order 1 through every layer: matrices are N(0, 1 / K), norms are 1, biases N(0, 0.02^2). The
output projection is N(0, 8^2 / K): logits of such a spread give choices as sharp as a language
model's (at 128k tokens, above about 5 a few tokens hold most of the probability), without which
draft trees would be wide and not deep.

Letters: K in-features.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from methods.architecture import EMBEDDING, read_shape, transformer_shapes
from methods.head_shapes import FC_BIAS, LM_HEAD, OFFSETS, eagle2_shapes, eagle3_shapes
from methods.shards import Shard
from methods.transformer import Shape
from quant.formats import Spec

RANDOM = "random_weights.json"
TRANSFORMER, EAGLE2, EAGLE3 = KINDS = ("transformer", "eagle2", "eagle3")
EAGLE3_TAPS = 3  # streams of the target that an EAGLE-3 head reads

EMBEDDING_SCALE, BIAS_SCALE, OUTPUT_GAIN = 0.02, 0.02, 8.0
# The largest of some 10^4 draws from N(0, 1): what stands for calibration, where a scheme asks.
TYPICAL_ABSMAX = 4.0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A folder's `random_weights.json`."""

    seed: int
    holds: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it, or raise ValueError naming the file."""
        path = folder / RANDOM
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} must be JSON with seed and holds: {error}") from error
        if found.holds not in KINDS or type(found.seed) is not int:
            raise ValueError(
                f"{path}: seed must be an integer and holds one of {', '.join(KINDS)}, got "
                f"{found.seed!r} and {found.holds!r}"
            )
        return found


class RandomShard(Shard):
    """Draws each tensor when it is asked for."""

    def __init__(self, folder: Path, config: Mapping[str, Any], device: torch.device) -> None:
        """config: of the folder. Raises ValueError where it does not say what to draw."""
        draw = Draw.read(folder)
        try:
            shape = read_shape(config)
            self._specs = _specs(draw.holds, config, shape)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._seed = draw.seed
        self._shape = shape
        self._device = device

    @property
    def names(self) -> Set[str]:
        """Of every tensor."""
        return self._specs.keys()

    def spec(self, name: str) -> Spec:
        """Dtype and shape of one, without drawing it."""
        return self._specs[name]

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor."""
        spec = self._specs[name]
        (dtype,) = spec.dtypes
        if name == OFFSETS:
            (count,) = spec.shape
            return even_ids(count, self._shape.vocab_size) - torch.arange(count)
        made = torch.empty(spec.shape, dtype=dtype, device=self._device)
        if made.ndim == 1 and not name.endswith(".bias"):
            return made.fill_(1)
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(device=self._device)
        generator.manual_seed(int.from_bytes(key[:7], "big"))
        return made.normal_(0, self._scale(name, spec.shape), generator=generator)

    def _scale(self, name: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return BIAS_SCALE
        if name == EMBEDDING and not self._shape.tied:
            return EMBEDDING_SCALE
        gain = OUTPUT_GAIN if name in (EMBEDDING, LM_HEAD) else 1.0
        return gain / math.sqrt(shape[-1])


def even_ids(count: int, vocab: int) -> Tensor:
    """Choose a draft vocabulary where no token means anything: at even distances. [count] int64."""
    return torch.arange(count) * vocab // count


def is_random(folder: Path) -> bool:
    """Tell whether a folder's weights are made up."""
    return (folder / RANDOM).is_file()


def typical_absmax(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Stand in for what calibration finds: the same for every input of every layer, name -> [K]."""
    inputs = {
        "attention.qkv": shape.hidden_size,
        "attention.out": shape.num_heads * shape.head_dim,
        "mlp.gate_up": shape.hidden_size,
        "mlp.down": shape.intermediate_size,
    }
    sizes = {"lm_head": shape.hidden_size} | {
        f"blocks.{layer}.{name}": k
        for layer in range(shape.num_layers)
        for name, k in inputs.items()
    }
    return {name: torch.full((k,), TYPICAL_ABSMAX, device=device) for name, k in sizes.items()}


def _specs(holds: str, config: Mapping[str, Any], shape: Shape) -> dict[str, Spec]:
    dtype = getattr(torch, str(config.get("torch_dtype", "bfloat16")))
    shapes = _shapes(holds, config, shape)
    specs = {name: Spec(dtypes=(dtype,), shape=size) for name, size in shapes.items()}
    if holds == EAGLE3:
        specs[OFFSETS] = Spec(dtypes=(torch.int64,), shape=(config["draft_vocab_size"],))
    return specs


def _shapes(holds: str, config: Mapping[str, Any], shape: Shape) -> dict[str, tuple[int, ...]]:
    if holds == TRANSFORMER:
        return transformer_shapes(shape)
    if holds == EAGLE2:
        bias = {FC_BIAS: (shape.hidden_size,)} if config.get("bias", True) else {}
        return eagle2_shapes(shape) | bias
    draft_vocab = config.get("draft_vocab_size")
    if not isinstance(draft_vocab, int):
        raise ValueError(f"config.json must have draft_vocab_size, got {draft_vocab!r}")
    return eagle3_shapes(shape, draft_vocab, taps=EAGLE3_TAPS, width=shape.hidden_size)
