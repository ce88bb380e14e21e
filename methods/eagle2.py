"""EAGLE-1/2: a head that extrapolates the feature under lm_head, sharing embedding and lm_head.

Li et al. 2024 (arXiv 2401.15077; trees arXiv 2406.16858). One Llama layer without its input norm
reads fc([embedding(t_{p+1}); h_p]), where h_p is the target's hidden state after the final norm;
its output is the next h, and lm_head scores it as it stands.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.architecture import block_shapes, read_shape
from methods.checkpoint import Packer, load_lm_head
from methods.grow import Head, TreeRecipe, head_shape
from methods.kv import KVCache
from methods.recipe import Family, Parts
from methods.transformer import Block, Shape, Transformer
from methods.weights import Weights, read_config
from quant.scheme import QuantLinear

NAME = "eagle2"
PREFIX = "layers.0."
IGNORED = {"embed_tokens.weight"}  # a copy of the target's, in published heads


class Eagle2Head(Head):
    """The head over one target, whose final norm it taps."""

    fc_bias: Tensor | None

    def __init__(
        self,
        shape: Shape,
        *,
        target: Transformer,
        fc: QuantLinear,
        fc_bias: Tensor | None,
        block: Block,
        lm_head: QuantLinear,
    ) -> None:
        super().__init__(shape, taps=(target.shape.num_layers,), target=target)
        self.fc = fc
        self.register_buffer("fc_bias", fc_bias)
        self.block = block
        self.lm_head = lm_head

    def enter(self, features: Tensor) -> Tensor:
        """The feature is the hidden stream."""
        return features

    def layer(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        kv: KVCache,
        seen: Tensor | None,
    ) -> Tensor:
        """Fuse embedding and hidden stream, then one decoder layer."""
        x = self.fc(torch.cat([embedded, hidden], dim=-1))
        if self.fc_bias is not None:
            x = x + self.fc_bias
        out: Tensor = self.block(x, rotation, kv, 0, seen)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """By the target's lm_head, or a copy in the drafter's own scheme."""
        out: Tensor = self.lm_head(hidden)
        return out

    def to_target(self, ids: Tensor) -> Tensor:
        """The vocabulary is the target's."""
        return ids


@dataclass(frozen=True, kw_only=True)
class Eagle2(TreeRecipe):
    """Draft with an EAGLE-1/2 head in EAGLE-2's dynamic trees."""

    def folders(self, family: Family) -> list[Path]:
        """The head."""
        return [family.head(NAME)]

    def head_vocab(self, family: Family, target: Shape) -> int:
        """Sizes and vocabulary must be the target's."""
        folder = family.head(NAME)
        shape = head_shape(folder, target)
        expected = head_shapes(shape)
        if read_config(folder).get("bias", True):
            expected["fc.bias"] = (shape.hidden_size,)
        Weights(folder).require(expected, ignored=IGNORED)
        return shape.vocab_size

    def head(self, parts: Parts) -> Head:
        """Read the head; its layer and fc go into the drafter's scheme."""
        folder = parts.family.head(NAME)
        shape = read_shape(read_config(folder))
        packer = Packer(
            Weights(folder), parts.scheme, dtype=parts.target.dtype, device=parts.target.device
        )
        lm_head = parts.target.lm_head
        if parts.lm_head is not None:
            lm_head = load_lm_head(
                parts.family.target, parts.lm_head, dtype=packer.dtype, device=packer.device
            )
        return Eagle2Head(
            shape,
            target=parts.target,
            fc=packer.linear("fc", "fc"),
            fc_bias=packer.tensor("fc.bias") if "fc.bias" in packer.weights else None,
            block=Block(
                input_norm=nn.Identity(),
                attention=packer.attention("attention", PREFIX, shape),
                mlp_norm=packer.norm(f"{PREFIX}post_attention_layernorm.weight", shape.norm_eps),
                mlp=packer.mlp("mlp", PREFIX),
            ),
            lm_head=lm_head,
        ).eval()


def head_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head, by its published name."""
    hidden = shape.hidden_size
    return {"fc.weight": (hidden, 2 * hidden)} | block_shapes(PREFIX, shape, attention_in=hidden)
