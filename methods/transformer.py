"""A Llama-like decoder over a scratch cache: target, small draft model, blocks of EAGLE heads.

Letters: B batch, n tokens read at once, D hidden, H query heads, G key-value heads, d head
dimension, V vocabulary, F features kept for a drafter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.fused import ancestry, silu_mul
from methods.kv import KVCache
from methods.norm import HeadNorm, RMSNorm
from methods.rope import Rope
from methods.window import Window, window
from quant.block_float import BlockFloat
from quant.scheme import QuantLinear


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder, in the words of its checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    tied: bool = False  # lm_head is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False  # queries and keys are normed before they are turned

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads="
                f"{self.num_kv_heads}, got {self.num_heads}"
            )

    @property
    def shared(self) -> int:
        """Query heads of a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Read:
    """What one forward leaves. hidden: [B, n, D], input of lm_head. features: [B, n, F].

    Both may lie in the same memory: nobody writes to them.
    """

    hidden: Tensor
    features: Tensor


class Attention(nn.Module):
    """Self-attention with fused query, key and value projections."""

    qkv_bias: Tensor | None
    out_bias: Tensor | None

    def __init__(
        self,
        *,
        qkv: QuantLinear,
        out: QuantLinear,
        qkv_bias: Tensor | None = None,
        out_bias: Tensor | None = None,
        norm: HeadNorm | None = None,
    ) -> None:
        """qkv_bias: [(H + 2G) * d]. out_bias: [D]. norm: of queries and keys."""
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.register_buffer("qkv_bias", qkv_bias)
        self.register_buffer("out_bias", out_bias)
        self.norm = norm

    def forward(self, x: Tensor | BlockFloat, view: Window, layer: int) -> Tensor:
        """x: [B, n, K], or n rows of one -> [B, n, D]; writes this layer's scratch."""
        qkv: Tensor = self.qkv(x)
        projected = qkv[None] if isinstance(x, BlockFloat) else qkv
        shape = projected.shape[:-1]
        digits = self.out.reads_digits(shape.numel())
        mixed = view.attend(layer, projected, bias=self.qkv_bias, norm=self.norm, digits=digits)
        out: Tensor = self.out(mixed)
        out = out.view(*shape, -1)
        return out if self.out_bias is None else out + self.out_bias


class MLP(nn.Module):
    """SiLU-gated feed-forward layer with fused gate and up projections."""

    def __init__(self, *, gate_up: QuantLinear, down: QuantLinear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor | BlockFloat) -> Tensor:
        """x: [..., D] -> [..., D]; or n rows -> [n, D]."""
        gate_up: Tensor = self.gate_up(x)
        rows, shape = gate_up.flatten(0, -2), gate_up.shape[:-1]
        gated = silu_mul(rows, digits=self.down.reads_digits(len(rows)))
        out: Tensor = self.down(gated)
        return out.view(*shape, -1)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(
        self, *, input_norm: RMSNorm | None, attention: Attention, mlp_norm: RMSNorm, mlp: MLP
    ) -> None:
        """input_norm: None where what enters is read as it comes."""
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self, x: Tensor, delta: Tensor | None, view: Window, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give what enters, and what leaves as a stream and what is still to be added to it.

        All [B, n, D]. A sum waits for the norm that reads it, so that both are one kernel.
        """
        normed: Tensor | BlockFloat
        if self.input_norm is None:
            normed = entered = x if delta is None else x + delta
        else:
            normed, entered = self.input_norm.add(x, delta, reader=self.attention.qkv)
        attended = self.attention(normed, view, layer)
        normed, x = self.mlp_norm.add(entered, attended, reader=self.mlp.gate_up)
        return entered, x, self.mlp(normed).view(x.shape)


class Transformer(nn.Module):
    """A decoder that reads tokens into a cache's scratch and never advances by itself."""

    embedding: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        embedding: Tensor,
        blocks: Sequence[Block],
        norm: RMSNorm,
        lm_head: QuantLinear,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding", embedding)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.lm_head = lm_head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.embedding.dtype

    def cache(self, capacity: int, *, batch: int = 1) -> KVCache:
        """Make an empty cache of `capacity` slots for this model."""
        return KVCache(
            num_layers=self.shape.num_layers,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            batch=batch,
            angles=self.shape.rope.table(capacity, self.shape.head_dim, self.dtype, self.device),
        )

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: KVCache,
        ancestors: Tensor | None = None,
        *,
        taps: tuple[int, ...] = (),
        base: Tensor | None = None,
    ) -> Read:
        """Read tokens into scratch.

        tokens: [B, n] int64. positions: [n] int64, the same for every row. ancestors, base: as in
        `methods.window`. taps: which streams to keep as features, side by side: i is the residual
        input of layer i, num_layers the output of the final norm; F = len(taps) * D.
        """
        n = tokens.shape[1]
        view = window(kv, positions, ancestors, shared=self.shape.shared, base=base)
        streams: dict[int, Tensor] = {}
        x, delta = F.embedding(tokens, self.embedding), None
        for layer, block in enumerate(self.blocks):
            entered, x, delta = block(x, delta, view, layer)
            if layer in taps:
                streams[layer] = entered
        kv.extend(n)
        hidden, _ = self.norm.add(x, delta)
        streams[len(self.blocks)] = hidden
        kept = [streams[tap] for tap in taps]
        if len(kept) == 1:
            return Read(hidden, kept[0])
        return Read(hidden, torch.cat(kept, dim=-1) if kept else hidden[..., :0])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] -> [..., V]."""
        out: Tensor = self.lm_head(hidden)
        return out

    @property
    def linears(self) -> dict[str, QuantLinear]:
        """Every quantisable layer by its name; the parts of a stacked one are not told apart."""
        found: dict[str, QuantLinear] = {}
        for name, module in self.named_modules():  # a module comes before what it holds
            if isinstance(module, QuantLinear) and not any(name.startswith(f"{f}.") for f in found):
                found[name] = module
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes read by one forward: layers, biases, norms, lm_head; of the embedding, nothing."""
        own = (m for m in self.modules() if isinstance(m, RMSNorm | HeadNorm | Attention))
        besides = sum(tensor.nbytes for m in own for tensor in m.buffers(recurse=False))
        return besides + sum(m.weight_bytes for m in self.linears.values())

    def flops(self, n: int, context: int) -> int:
        """Multiplications and additions of reading n tokens after `context`, lm_head included.

        Of matrix products alone: biases, norms and activations are left out.
        """
        linear = sum(m.in_features * m.out_features for m in self.linears.values())
        heads = self.shape.num_layers * self.shape.num_heads * self.shape.head_dim
        return 2 * n * linear + 4 * n * heads * (context + n)


def read_tree(
    target: Transformer,
    kv: KVCache,
    base: Tensor,
    tokens: Tensor,
    parents: Tensor,
    *,
    taps: tuple[int, ...] = (),
) -> tuple[Read, Tensor]:
    """Read a tree behind what is decided, and leave the scratch as if nothing had been read.

    base: [1] int64, the decided length. tokens: [B, n]; parents: [n], as of a `Tree`. Gives what
    was read, and the positions of the nodes, [n].
    """
    positions, ancestors = base, None
    if len(parents) > 1:  # a root alone is read in order, and its path is known
        _, depths, ancestors = ancestry(parents, len(parents))
        positions = base + depths
    read = target(tokens, positions, kv, ancestors, taps=taps, base=base)
    kv.scratch = 0
    return read, positions
