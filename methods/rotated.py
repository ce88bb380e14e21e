"""A decoder whose residual stream is rotated: the same function, other weights (QuaRot's R1, R2).

With an orthogonal Q the stream h becomes h Q. What writes to it is multiplied by Q on its outputs,
what reads it by Q on its inputs, with the norm's weight folded in first, since a norm without
weight commutes with Q. Outliers of single channels are spread over all, so that both sides of a
product round better. Between values and the attention's output, each head has a rotation of its
own, which attention passes through. Nothing is left to do at run time (arXiv 2404.00456).

Letters: D hidden, N x K a weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from methods.architecture import EMBEDDING, OUTPUT
from methods.transformer import Shape
from quant.rotate import Rotation, fold_norm, rotate_inputs, rotate_outputs

FINAL_NORM = "model.norm.weight"
# What reads the stream, by the norm before it.
READERS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
WRITERS = ("o_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class Rotated(Mapping[str, Tensor]):
    """The tensors of a dense checkpoint, rotated when they are asked for.

    stream: of the residual stream, size D. heads: of every head's values, size d.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shape: Shape, *, stream: Rotation, heads: Rotation
    ) -> None:
        self.weights = weights
        self.tied = shape.tied
        self.shape = replace(shape, tied=False)  # the two ends are no longer alike
        self.stream = stream
        self.heads = heads

    def __getitem__(self, name: str) -> Tensor:
        original = self.weights[EMBEDDING if name == OUTPUT and self.tied else name]
        # What is rounded next keeps more digits than the file's dtype has.
        dtype = torch.float32 if name.endswith("_proj.weight") else original.dtype
        return self._rotated(name, original.double()).to(dtype)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.weights if name != OUTPUT)
        yield OUTPUT

    def __len__(self) -> int:
        return len(self.weights) + (OUTPUT not in self.weights)

    def norm(self) -> Tensor:
        """The final norm's weight, which lm_head has taken in. [D]."""
        return self.weights[FINAL_NORM]

    def _rotated(self, name: str, tensor: Tensor) -> Tensor:
        place, _, kind = name.rpartition(".")
        layer, _, module = place.rpartition(".")
        if module in NORMS:
            return torch.ones_like(tensor)
        if name == EMBEDDING:
            return rotate_inputs(tensor, self.stream)
        if name == OUTPUT:
            return self._read(tensor, FINAL_NORM)
        if kind == "bias":  # of a projection whose outputs are rotated, or of none
            return self._written(module, tensor[:, None])[:, 0]
        if module in READERS:
            tensor = self._read(tensor, f"{layer.rpartition('.')[0]}.{READERS[module]}.weight")
        if module == "o_proj":
            tensor = rotate_inputs(tensor, self.heads, heads=self.shape.num_heads)
        return self._written(module, tensor)

    def _read(self, weight: Tensor, norm: str) -> Tensor:
        return rotate_inputs(fold_norm(weight, self.weights[norm]), self.stream)

    def _written(self, module: str, weight: Tensor) -> Tensor:
        if module == "v_proj":
            return rotate_outputs(weight, self.heads, heads=self.shape.num_kv_heads)
        if module in WRITERS:
            return rotate_outputs(weight, self.stream)
        return weight
