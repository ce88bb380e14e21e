"""EAGLE heads written a second time: plain attention over whole sequences, no cache, no tree mask.

A draft tree is grown by walking every path by itself. Slow, and independent of `methods`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Oracle:
    """One head over a target; `eagle3` says which of the two.

    config, tensors: in EAGLE's own keys and names, however the head was published.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    embedding: Tensor
    lm_head: Tensor
    eagle3: bool

    def __post_init__(self) -> None:
        self.w = {k: v.double() if v.is_floating_point() else v for k, v in self.tensors.items()}
        self.prefix = "midlayer." if self.eagle3 else "layers.0."

    def tree(
        self, features: Tensor, tokens: list[int], *, depth: int, top_k: int, nodes: int
    ) -> dict[tuple[int, ...], float]:
        """The kept paths below the root, with their cumulative log-probabilities."""
        pairs = self.pairs(features, tokens)
        pool: dict[tuple[int, ...], float] = {}
        frontier: dict[tuple[int, ...], float] = {(): 0.0}
        for _ in range(depth):
            grown: dict[tuple[int, ...], float] = {}
            for path, score in frontier.items():
                logprobs = self.walk(pairs, path)
                best = logprobs.topk(top_k)
                for logprob, token in zip(best.values, best.indices, strict=True):
                    grown[(*path, self.target_id(int(token)))] = score + float(logprob)
            pool |= grown
            frontier = dict(sorted(grown.items(), key=lambda x: -x[1])[:top_k])
        return dict(sorted(pool.items(), key=lambda x: -x[1])[: nodes - 1])

    def pairs(self, features: Tensor, tokens: list[int]) -> list[tuple[Tensor, int]]:
        """What the head reads of a text: a hidden vector, and the token after it."""
        hidden = features
        if self.eagle3:
            hidden = features @ self.w["fc.weight"].T
        elif "rms_norm_rotation.weight" in self.w:
            hidden = features @ self.w["rms_norm_rotation.weight"].T
        return list(zip(hidden, tokens[1:], strict=True))

    def walk(self, pairs: list[tuple[Tensor, int]], path: tuple[int, ...]) -> Tensor:
        """Log-probabilities after a drafted path, feeding the head its own outputs."""
        sequence = list(pairs)
        for token in path:
            sequence.append((self.layer(sequence)[-1], token))
        out = self.layer(sequence)[-1]
        if self.eagle3:
            if not self.config.get("norm_output"):
                out = self.norm(out, "norm.weight")
            return (self.w["lm_head.weight"] @ out).log_softmax(-1)
        return (self.lm_head @ out).log_softmax(-1)

    def target_id(self, token: int) -> int:
        return token + int(self.w["d2t"][token]) if "d2t" in self.w else token

    def layer(self, pairs: list[tuple[Tensor, int]]) -> Tensor:
        hidden = torch.stack([h for h, _ in pairs])
        embedded = self.embedding[torch.tensor([t for _, t in pairs])]
        if self.eagle3:
            x = hidden
            if self.config.get("norm_before_residual"):
                x = self.norm(hidden, "midlayer.hidden_norm.weight")
            read = torch.cat(
                [
                    self.norm(embedded, "midlayer.input_layernorm.weight"),
                    self.norm(hidden, "midlayer.hidden_norm.weight"),
                ],
                dim=-1,
            )
        else:
            x = read = torch.cat([embedded, hidden], dim=-1) @ self.w["fc.weight"].T
            if "fc.bias" in self.w:
                x = read = x + self.w["fc.bias"]
        x = x + self.attention(read)
        y = self.norm(x, f"{self.prefix}post_attention_layernorm.weight")
        gate = y @ self.w[f"{self.prefix}mlp.gate_proj.weight"].T
        up = y @ self.w[f"{self.prefix}mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ self.w[f"{self.prefix}mlp.down_proj.weight"].T
        return self.norm(x, "norm.weight") if self.config.get("norm_output") else x

    def attention(self, x: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        dim = self.config["head_dim"]
        n = len(x)

        def project(name: str, count: int) -> Tensor:
            weight = self.w[f"{self.prefix}self_attn.{name}_proj.weight"]
            return (x @ weight.T).view(n, count, dim).transpose(0, 1)

        queries, keys = self.turn(project("q", heads)), self.turn(project("k", groups))
        values = project("v", groups)
        out = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = queries[head] @ keys[group].T / math.sqrt(dim)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ values[group])
        return torch.cat(out, dim=-1) @ self.w[f"{self.prefix}self_attn.o_proj.weight"].T

    def turn(self, x: Tensor) -> Tensor:
        n, dim = x.shape[1:]
        # float32 angles, as every Llama implementation has them.
        steps = torch.arange(0, dim, 2).float() / dim
        angles = torch.arange(n).float()[:, None] * (1 / self.config["rope_theta"] ** steps)
        cos, sin = angles.cos().double(), angles.sin().double()
        low, high = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.w[name]
