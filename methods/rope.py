"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the halves layout of Llama."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles of a position: theta ** (-2i / d), with Llama 3.1's rescaling where `factor` is set.

    Llama 3.1 divides frequencies whose wavelength exceeds original / low_freq by `factor`, keeps
    those below original / high_freq, and blends between (`rope_type: llama3`).
    """

    theta: float
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """[d / 2] float32."""
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        plain = 1.0 / self.theta**steps
        if self.factor is None:
            return plain
        turns = self.original_max_positions * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        blend = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return blend * plain + (1 - blend) * plain / self.factor

    def angles(self, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines. positions: [n] -> two [n, d]."""
        half = positions.float()[:, None] * self.frequencies(head_dim, positions.device)
        both = torch.cat([half, half], dim=-1)
        return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + d / 2) by its angle. x: [B, H, n, d] -> the same shape."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
