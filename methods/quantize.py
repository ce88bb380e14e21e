"""Round a decoder's layers one block after the other, on what calibration texts bring to them.

Every layer is rounded on inputs that come out of the layers rounded before it, inside a block too
(AutoGPTQ's `true_sequential`). One block is in memory at a time, so a model of any size goes
through a device that holds one block and the texts' hidden states.

Letters: n tokens of a text, D hidden, N x K a layer's weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.architecture import FUSED, GATE_UP, QKV
from methods.kv import KVCache
from methods.norm import RMSNorm
from methods.packer import Packer
from methods.transformer import Block, Shape
from methods.window import window
from quant.gptq import Hessian
from quant.rounding import Inputs, Rounding
from quant.scheme import QuantLinear, Scheme, rows

# The linear layers of a block, in the order in which a token meets them.
LAYERS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
PUBLISHED = {
    "attention.qkv": "self_attn.qkv_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate_up": "mlp.gate_up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One layer, in the scheme. output_error: |x (W - Q)^T|^2 / |x W^T|^2 over the texts.

    weight_error: |W - Q|^2 / |W|^2. output_error is None where no texts were read.
    """

    layer: str
    stored: dict[str, Tensor]
    weight_error: float
    output_error: float | None


class BlockQuantizer:
    """Takes a dense checkpoint's blocks in order. texts: token ids; none where none are needed."""

    def __init__(
        self,
        dense: Packer,
        shape: Shape,
        *,
        scheme: Scheme,
        rounding: Rounding,
        embedding: Tensor,
        texts: Sequence[list[int]],
    ) -> None:
        if (rounding.needs_hessian or scheme.needs_absmax) and not texts:
            raise ValueError(f"{scheme.label} by {rounding.label} needs calibration texts")
        self.dense = dense
        self.shape = shape
        self.scheme = scheme
        self.rounding = rounding
        tokens = (torch.tensor([text], device=dense.device) for text in texts)
        self.hidden = [F.embedding(text, embedding) for text in tokens]

    @torch.inference_mode()
    def block(self, number: int) -> Iterator[Rounded]:
        """Round the layers of the next block, and let the texts go through it."""
        block = self.dense.block(number, self.shape)
        for name in LAYERS:
            layer = _get(block, name)
            inputs = self._inputs(block, layer)
            rounded = self._round(name, layer, self.scheme, inputs)
            _set(block, name, self.scheme.layer(rounded.stored).to(self.dense.device))
            yield rounded
        self._pass(block)

    @torch.inference_mode()
    def output(self, norm: RMSNorm, lm_head: QuantLinear, scheme: Scheme) -> Rounded:
        """Round the output projection, after the last block."""
        seen = _Seen(lm_head.in_features, self.dense.device)
        for text in self.hidden:
            seen.add(norm(text))
        return self._round("lm_head", lm_head, scheme, seen.inputs())

    @torch.inference_mode()
    def skip(self, block: Block) -> None:
        """Let the texts go through a block that was rounded before."""
        self._pass(block)

    def _pass(self, block: Block) -> None:
        self.hidden = [self._run(block, text) for text in self.hidden]

    def _inputs(self, block: Block, layer: QuantLinear) -> Inputs:
        seen = _Seen(layer.in_features, self.dense.device)
        with _watching(layer, seen):
            for text in self.hidden:
                self._run(block, text)
        return seen.inputs()

    def _round(self, name: str, layer: QuantLinear, scheme: Scheme, inputs: Inputs) -> Rounded:
        weight = layer.dequantize()
        stored = self.rounding.round(scheme, weight, inputs)
        error = weight - scheme.layer(stored).dequantize()
        return Rounded(
            layer=name,
            stored=stored,
            weight_error=_share(error.square().sum(), weight.square().sum()),
            output_error=_output_error(error, weight, inputs.hessian),
        )

    def _run(self, block: Block, x: Tensor) -> Tensor:
        """One text through one block. x: [1, n, D] -> the same shape."""
        n = x.shape[1]
        kv = KVCache(
            num_layers=1,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            capacity=n,
            dtype=x.dtype,
            device=x.device,
            angles=self.shape.rope.table(n, self.shape.head_dim, x.dtype, x.device),
        )
        positions = torch.arange(n, device=x.device)
        view = window(kv, positions, None, shared=self.shape.shared, base=None)
        _, stream, delta = block(x, None, view, 0)
        out: Tensor = stream + delta
        return out


class _Seen:
    """Second moments and largest magnitudes of a layer's inputs."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._moments = Hessian(k, dtype=torch.float32, device=device)
        self._absmax: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: [1, n, K]."""
        self._moments.add(x)
        largest = x.flatten(0, -2).abs().amax(dim=0)
        self._absmax = largest if self._absmax is None else torch.maximum(self._absmax, largest)

    def inputs(self) -> Inputs:
        """What a rounding may look at."""
        if self._absmax is None:
            return Inputs(hessian=None, absmax=None)
        return Inputs(hessian=self._moments.mean, absmax=self._absmax)


def published(
    number: int, layer: str, stored: Mapping[str, Tensor], shape: Shape
) -> dict[str, Tensor]:
    """Cut a fused layer into those of the published names: full name -> tensor."""
    place = f"model.layers.{number}.{PUBLISHED[layer]}"
    start, _, name = place.rpartition(".")
    if name not in FUSED:
        return {f"{place}.{key}": tensor for key, tensor in stored.items()}
    heads, groups, inner = shape.num_heads, shape.num_kv_heads, shape.intermediate_size
    sizes = {QKV: [x * shape.head_dim for x in (heads, groups, groups)], GATE_UP: [inner, inner]}
    found = {}
    begin = 0
    for part, size in zip(FUSED[name], sizes[name], strict=True):
        for key, tensor in rows(stored, begin, begin + size).items():
            # A copy: safetensors takes no two tensors of one memory.
            found[f"{start}.{part}.{key}"] = tensor.clone()
        begin += size
    return found


@contextmanager
def _watching(layer: QuantLinear, seen: _Seen) -> Iterator[None]:
    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.add(inputs[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _get(block: Block, name: str) -> QuantLinear:
    layer = block.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer


def _set(block: Block, name: str, layer: QuantLinear) -> None:
    place, _, last = name.rpartition(".")
    setattr(block.get_submodule(place), last, layer)


def _output_error(error: Tensor, weight: Tensor, hessian: Tensor | None) -> float | None:
    """|x E^T|^2 / |x W^T|^2, by the inputs' second moments."""
    if hessian is None:
        return None
    moments = hessian.to(error)
    return _share(((error @ moments) * error).sum(), ((weight @ moments) * weight).sum())


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) else 0.0
