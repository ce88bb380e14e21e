"""EAGLE-2 and EAGLE-3 heads, in their published tensor names, and their unrolled training pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.attention import Keys, attend_unrolled
from lab.llama import Attention, Llama, Mlp, Norm, Seen, Shape


class Head(nn.Module, ABC):
    """A one-layer drafter that reads pairs (token p+1, hidden p) at position p."""

    @abstractmethod
    def features(self, target: Llama, seen: Seen) -> Tensor:
        """What the head reads of the target's pass, [B, n, F]."""

    @abstractmethod
    def enter(self, features: Tensor) -> Tensor:
        """Features as the hidden stream that the head's own output joins later, [B, n, D]."""

    @abstractmethod
    def step(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, earlier: list[Keys]
    ) -> tuple[Tensor, Keys]:
        """Read pairs [B, n, D] at positions [n]; give the next hidden and this step's keys."""

    @abstractmethod
    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """Next-token logits [B, n, draft vocabulary] from the head's output."""


class Eagle2Layer(nn.Module):
    """A Llama layer that has no norm before its attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape, shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.mlp = Mlp(shape)


class Eagle2Head(Head):
    """The head of EAGLE-1 and EAGLE-2: reads the final hidden state, shares the output layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.layers = nn.ModuleList([Eagle2Layer(shape)])

    @torch.no_grad()
    def begin(self, *, embedding: float, hidden: float) -> None:
        """Initialise for inputs of these root mean squares: fc passes the hidden state on.

        Its attention has no norm before it, so large features would saturate it from the start.
        """
        size = self.fc.out_features
        nn.init.normal_(self.fc.weight[:, :size], std=0.5 * hidden / embedding / size**0.5)
        self.fc.weight[:, size:].copy_(torch.eye(size))
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                small = 0.1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                into = parameter.shape[1] ** 0.5 * (hidden if "self_attn" in name else 1.0)
                nn.init.normal_(parameter, std=small / into)

    def features(self, target: Llama, seen: Seen) -> Tensor:
        """The hidden state after the target's last norm."""
        return seen.final

    def enter(self, features: Tensor) -> Tensor:
        """Target features and the head's own outputs are the same kind of thing here."""
        return features

    def step(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, earlier: list[Keys]
    ) -> tuple[Tensor, Keys]:
        """Join embedding and hidden by fc, then one layer."""
        x = self.fc(torch.cat([embedded, hidden], dim=-1))
        layer = self.layers[0]
        return _layer(layer, attended=x, residual=x, positions=positions, earlier=earlier)

    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """The target's own output layer, without a norm."""
        return target.unembed(hidden)


class Eagle3Layer(nn.Module):
    """A Llama layer whose attention reads embedding and hidden side by side."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden_norm = Norm(shape.hidden)
        self.input_layernorm = Norm(shape.hidden)
        self.self_attn = Attention(shape, 2 * shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.mlp = Mlp(shape)


class Eagle3Head(Head):
    """The head of EAGLE-3: reads three layers' inputs, has its own reduced output layer."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, shape: Shape, frequent: Tensor) -> None:
        """frequent: [draft vocabulary] ascending target ids that can be drafted."""
        super().__init__()
        self.fc = nn.Linear(3 * shape.hidden, shape.hidden, bias=False)
        self.midlayer = Eagle3Layer(shape)
        self.norm = Norm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, len(frequent), bias=False)
        kept = torch.zeros(shape.vocab, dtype=torch.bool)
        kept[frequent] = True
        self.register_buffer("d2t", frequent - torch.arange(len(frequent)))
        self.register_buffer("t2d", kept)

    def features(self, target: Llama, seen: Seen) -> Tensor:
        """The inputs of three of the target's layers, side by side."""
        return target.taps(seen)

    def enter(self, features: Tensor) -> Tensor:
        """Fuse the three layers' features by fc."""
        return self.fc(features)  # type: ignore[no-any-return]

    def step(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, earlier: list[Keys]
    ) -> tuple[Tensor, Keys]:
        """Attend with normed embedding and hidden; the hidden stream is the residual."""
        layer = self.midlayer
        attended = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], dim=-1)
        return _layer(
            layer, attended=attended, residual=hidden, positions=positions, earlier=earlier
        )

    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """The head's own norm and output layer."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]


def _layer(
    layer: nn.Module, *, attended: Tensor, residual: Tensor, positions: Tensor, earlier: list[Keys]
) -> tuple[Tensor, Keys]:
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
    assert isinstance(attention, Attention) and isinstance(mlp, Mlp) and isinstance(norm, Norm)
    q, k, v = attention.project(attended, positions)
    own = Keys(k=attention.spread(k), v=attention.spread(v))
    if earlier:
        mixed = attend_unrolled(q, earlier[0], [*earlier[1:], own])
    else:
        mixed = F.scaled_dot_product_attention(q, own.k, own.v, is_causal=True)
    x = residual + attention.merge(mixed)
    return x + mlp(norm(x)), own


def unroll(
    head: Head, target: Llama, tokens: Tensor, features: Tensor, *, steps: int
) -> list[Tensor]:
    """Run a head on every prefix of a text at once, each step fed by the step before.

    tokens: [B, n + 1]; features: [B, n, F], of tokens 0..n-1. Result k is [B, n, D]: its row i is
    the output for position k + i after k drafted steps, and predicts token k + i + 2; the last k
    rows lie beyond the text and mean nothing. A result is exact where the drafts it stands on are
    the text's own tokens.
    """
    count = features.shape[1]
    embedded = F.pad(target.model.embed_tokens(tokens), (0, 0, 0, steps))
    hidden = head.enter(features)
    outputs: list[Tensor] = []
    keys: list[Keys] = []
    for step in range(steps):
        positions = torch.arange(step, step + count, device=tokens.device)
        hidden, own = head.step(embedded[:, step + 1 : step + 1 + count], hidden, positions, keys)
        outputs.append(hidden)
        keys = [*keys, own]
    return outputs


def head_shape(shape: Shape) -> Shape:
    """A head's sizes: one layer of the target's."""
    return replace(shape, layers=1, dropout=0.0)
