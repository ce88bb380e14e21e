"""EAGLE-3: a head over three streams of the target, with a vocabulary of its own.

Li et al. 2025 (arXiv 2503.01840). The residual inputs of a low, a middle and a high layer are
fused once into the head's hidden stream; inside a tree the head's own output is fed back. Its
layer reads [norm(embedding); norm(hidden)] and adds to the hidden stream; its own norm and lm_head
score a reduced vocabulary, whose id i is the target's id i + d2t[i].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.architecture import block_shapes, read_shape
from methods.checkpoint import Packer
from methods.grow import Head, TreeRecipe, head_shape
from methods.kv import KVCache
from methods.recipe import Family, Parts
from methods.transformer import MLP, Attention, RMSNorm, Shape, Transformer
from methods.weights import Weights, read_config
from quant.scheme import QuantLinear

NAME = "eagle3"
PREFIX = "midlayer."
IGNORED = {"t2d", "embed_tokens.weight"}  # used in training only; a copy of the target's


class Eagle3Head(Head):
    """The head over one target."""

    offsets: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        taps: tuple[int, ...],
        target: Transformer,
        fc: QuantLinear,
        embedding_norm: RMSNorm,
        hidden_norm: RMSNorm,
        attention: Attention,
        mlp_norm: RMSNorm,
        mlp: MLP,
        norm: RMSNorm,
        lm_head: QuantLinear,
        offsets: Tensor,
    ) -> None:
        super().__init__(shape, taps=taps, target=target)
        self.fc = fc
        self.embedding_norm = embedding_norm
        self.hidden_norm = hidden_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.norm = norm
        self.lm_head = lm_head
        self.register_buffer("offsets", offsets)

    def enter(self, features: Tensor) -> Tensor:
        """Fuse the target's three streams."""
        out: Tensor = self.fc(features)
        return out

    def layer(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        kv: KVCache,
        seen: Tensor | None,
    ) -> Tensor:
        """Attend over embedding and hidden side by side; add to the hidden stream."""
        both = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        x = hidden + self.attention(both, rotation, kv, 0, seen)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the draft vocabulary."""
        out: Tensor = self.lm_head(self.norm(hidden))
        return out

    def to_target(self, ids: Tensor) -> Tensor:
        """Add each id's offset."""
        return ids + self.offsets[ids]


@dataclass(frozen=True, kw_only=True)
class Eagle3(TreeRecipe):
    """Draft with an EAGLE-3 head in EAGLE-2's dynamic trees."""

    def folders(self, family: Family) -> list[Path]:
        """The head."""
        return [family.head(NAME)]

    def head_vocab(self, family: Family, target: Shape) -> int:
        """The target's width and vocabulary must be what the head was trained on."""
        folder = family.head(NAME)
        shape, config = head_shape(folder, target), read_config(folder)
        draft_vocab = _draft_vocab(config, folder)
        Weights(folder).require(head_shapes(shape, draft_vocab), ignored=IGNORED)
        _taps(config, folder, target)
        return draft_vocab

    def head(self, parts: Parts) -> Head:
        """Read the head; its layer and fc go into the drafter's scheme."""
        folder = parts.family.head(NAME)
        config = read_config(folder)
        shape = read_shape(config)
        weights = Weights(folder)
        target = parts.target
        packer = Packer(weights, parts.scheme, dtype=target.dtype, device=target.device)
        eps = shape.norm_eps
        return Eagle3Head(
            shape,
            taps=_taps(config, folder, target.shape),
            target=target,
            fc=packer.linear("fc", "fc"),
            embedding_norm=packer.norm(f"{PREFIX}input_layernorm.weight", eps),
            hidden_norm=packer.norm(f"{PREFIX}hidden_norm.weight", eps),
            attention=packer.attention("attention", PREFIX, shape),
            mlp_norm=packer.norm(f"{PREFIX}post_attention_layernorm.weight", eps),
            mlp=packer.mlp("mlp", PREFIX),
            norm=packer.norm("norm.weight", eps),
            lm_head=packer.of(parts.lm_head or parts.dense).linear("lm_head", "lm_head"),
            offsets=weights["d2t"].to(target.device),
        ).eval()


def head_shapes(shape: Shape, draft_vocab: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head, by its published name."""
    hidden = shape.hidden_size
    return {
        "fc.weight": (hidden, 3 * hidden),
        f"{PREFIX}input_layernorm.weight": (hidden,),
        f"{PREFIX}hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
        "d2t": (draft_vocab,),
    } | block_shapes(PREFIX, shape, attention_in=2 * hidden)


def _draft_vocab(config: dict[str, Any], folder: Path) -> int:
    size = config.get("draft_vocab_size")
    if not isinstance(size, int):
        raise ValueError(f"{folder}: config.json must have draft_vocab_size, got {size!r}")
    return size


def _taps(config: dict[str, Any], folder: Path, target: Shape) -> tuple[int, ...]:
    """Layers whose residual inputs the head reads; 2, L / 2 and L - 3 where config is silent."""
    layers = target.num_layers
    named = config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    taps = (2, layers // 2, layers - 3) if named is None else tuple(named)
    if len(taps) != 3 or not all(isinstance(t, int) and 0 <= t < layers for t in taps):
        raise ValueError(
            f"{folder}: the head must read 3 of the target's layers 0 to {layers - 1}, got {taps}"
        )
    return taps
