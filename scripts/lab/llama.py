"""A Llama of a given shape, in Hugging Face's tensor names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

THETA = 10000.0
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    dropout: float  # on what each block adds to the residual stream, in training only

    @property
    def taps(self) -> tuple[int, int, int]:
        """The layers whose inputs an EAGLE-3 head reads: 2, L/2 and L-3, made distinct."""
        middle = self.layers // 2
        return (2, middle, self.layers - 3) if self.layers >= 6 else (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one pass gives.

    logits: [B, n, V]; final: [B, n, D] after the last norm; inputs: L tensors [B, n, D], the
    residual stream as each layer receives it.
    """

    logits: Tensor
    final: Tensor
    inputs: list[Tensor]


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), EPS).to(x.dtype)


class Attention(nn.Module):
    """The projections of grouped-query attention; its inputs are `inputs` wide."""

    def __init__(self, shape: Shape, inputs: int) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(inputs, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, kv, bias=False)
        self.v_proj = nn.Linear(inputs, kv, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn x [B, n, inputs] at positions [n] into rotated q [B, H, n, d] and k, v alike."""
        rows = [
            linear(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return rotate(rows[0], positions), rotate(rows[1], positions), rows[2]

    def spread(self, kv: Tensor) -> Tensor:
        """Repeat [B, kv_heads, n, d] once per query head."""
        return kv.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=1)

    def merge(self, mixed: Tensor) -> Tensor:
        """Turn [B, H, n, d] into [B, n, D]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """The gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to [B, n, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Cache:
    """Keys and values of `length` decided positions, one pair per layer."""

    def __init__(self, shape: Shape, batch: int, room: int, like: Tensor) -> None:
        size = (shape.layers, batch, shape.kv_heads, room, shape.head_dim)
        self.keys, self.values = like.new_zeros(size), like.new_zeros(size)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new rows behind the decided ones and return all of them."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.index, self.dropout = index, shape.dropout
        self.input_layernorm = Norm(shape.hidden)
        self.self_attn = Attention(shape, shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """Read [B, n, D] at positions [n], after what the cache holds."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), positions)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        many = q.shape[2] > 1
        if many:
            k, v = self.self_attn.spread(k), self.self_attn.spread(v)
        # One new token sees everything; several are only ever read into an empty cache.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=many, enable_gqa=not many)
        x = x + F.dropout(self.self_attn.merge(mixed), self.dropout, self.training)
        added = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(added, self.dropout, self.training)


class Body(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, index) for index in range(shape.layers))
        self.norm = Norm(shape.hidden)


class Llama(nn.Module):
    """A Llama whose output layer is its embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Seen:
        """Read tokens [B, n] behind what the cache holds."""
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        inputs = []
        for layer in self.model.layers:
            inputs.append(x)
            # A cache grows at every call: past any compiled layer, which would be compiled anew.
            x = layer(x, positions, None) if cache is None else layer.forward(x, positions, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        final = self.model.norm(x)
        return Seen(logits=self.unembed(final), final=final, inputs=inputs)

    def unembed(self, final: Tensor) -> Tensor:
        """Turn [..., D] into logits [..., V]."""
        return F.linear(final, self.model.embed_tokens.weight)

    def taps(self, seen: Seen) -> Tensor:
        """The layer inputs that an EAGLE-3 head reads, [B, n, 3D]."""
        return torch.cat([seen.inputs[layer] for layer in self.shape.taps], dim=-1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate [B, H, n, d] by positions [n], halves paired as in Llama checkpoints."""
    half = x.shape[-1] // 2
    powers = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.float()[:, None] * THETA**-powers
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


@torch.no_grad()
def continue_greedily(model: Llama, prompts: Tensor, count: int, *, dtype: torch.dtype) -> Tensor:
    """Append each prompt's own most likely next tokens: [B, n] -> [B, n + count]."""
    like = torch.empty(0, device=prompts.device, dtype=dtype)
    cache = Cache(model.shape, len(prompts), prompts.shape[1] + count, like)
    tokens = prompts
    with torch.autocast(prompts.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        seen = model(prompts, cache)
        for _ in range(count - 1):
            newest = seen.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, newest], dim=1)
            seen = model(newest, cache)
    return torch.cat([tokens, seen.logits[:, -1:].argmax(-1)], dim=1)


def config_of(shape: Shape, *, begin: int, end: int) -> dict[str, object]:
    """The shape as Hugging Face's config.json says it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def save_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Save tensors, the floating ones in fp16."""
    stored = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, str(path), metadata={"format": "pt"})


def load_half(module: nn.Module, path: Path) -> None:
    """Fill a module from a file of save_half."""
    module.load_state_dict(load_file(str(path)), strict=True)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")
