"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the halves layout of Llama.

A checkpoint may rescale its frequencies to reach positions beyond those it was first trained on.
Every scaling here gives the frequencies that `transformers` gives for the same config.json.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.values import naming, read_flag, read_number, read_section, read_size, shown

DEFAULT_THETA = 10000.0
POSITIONS, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


class Scaling(ABC):
    """What stretches frequencies over more positions. Concrete ones are frozen dataclasses."""

    @abstractmethod
    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Rescale the frequencies. plain: [d / 2], frequency i being theta ** (-2i / d)."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    @property
    def reach(self) -> int:
        """Positions that it was made to reach; 0 where it does not say."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Linear(Scaling):
    """Positions pressed together by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Slow all of them alike."""
        return plain / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3(Scaling):
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones kept, between them a blend.

    Slow are those that turn less than `low_freq_factor` times within the original positions, fast
    those that turn more than `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Blend by how often each turns."""
        turns = self.original_positions * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclass(frozen=True, kw_only=True)
class Yarn(Scaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): as `Llama3`, blended along the index instead.

    Frequencies that turn more than `beta_fast` times within the original positions are kept, those
    that turn less than `beta_slow` times divided by `factor`. truncate: whether the ends of the
    blend are rounded outwards to whole indices. attention: the attention factor.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention: float

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Blend by index."""
        half = len(plain)
        low = self._index(self.beta_fast, half, theta)
        high = self._index(self.beta_slow, half, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The last index is half - 1; that the ramp may end behind it is the published behaviour.
        # As floats, since an index of absurd settings is beyond the integers that a tensor takes.
        low, high = float(max(low, 0)), float(min(high, 2 * half - 1))
        if low == high:
            high += 0.001  # as published: a step, not a division by zero
        index = torch.arange(half, dtype=plain.dtype, device=plain.device)
        slowed = ((index - low) / (high - low)).clamp(0, 1)
        return slowed * plain / self.factor + (1 - slowed) * plain

    @property
    def attention_factor(self) -> float:
        """Makes up for the entropy that longer contexts add."""
        return self.attention

    @property
    def reach(self) -> int:
        """Published configs often leave max_position_embeddings at the original positions."""
        return int(self.factor * self.original_positions)

    def _index(self, turns: float, half: int, theta: float) -> float:
        """The index, not whole, of the frequency that turns so often in the original positions."""
        return half * math.log(self.original_positions / (turns * 2 * math.pi)) / math.log(theta)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles of a position: theta ** (-2i / d) a step, perhaps stretched."""

    theta: float
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """[d / 2] float32."""
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        plain = 1.0 / self.theta**steps
        return plain if self.scaling is None else self.scaling.stretch(plain, self.theta)

    def table(
        self, positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Give `angles` of the first `positions`, as a cache wants them."""
        return self.angles(torch.arange(positions, device=device), head_dim, dtype)

    def angles(self, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, times the attention factor. positions: [n] -> two [n, d]."""
        half = positions.float()[:, None] * self.frequencies(head_dim, positions.device)
        both = torch.cat([half, half], dim=-1)
        cos, sin = both.cos(), both.sin()
        if self.scaling is not None and self.scaling.attention_factor != 1:
            cos, sin = cos * self.scaling.attention_factor, sin * self.scaling.attention_factor
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + d / 2) by its angle. x: [B, H, n, d] -> the same shape."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read config.json's rotary embedding, in either spelling, or raise ValueError.

    Older files hold `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with all of it.
    `dynamic` equals `default` up to max_position_embeddings, where a context ends here: only
    beyond would frequencies depend on the length, and cached keys no longer fit.
    """
    with naming("config.json: rotary embedding"):
        values = _values(config)
        # At 1 all frequencies would be 1, and YaRN's would divide by its logarithm.
        theta = read_number(values, "rope_theta", above=1)
        return Rope(theta=theta, scaling=_scaling(values, config))


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring both spellings into the newer one; where both stand, transformers takes the older."""
    given = read_section(config, "rope_scaling") or read_section(config, "rope_parameters")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"the values must be the same for all layers, got {shown(given)}")
    values = dict(given)
    for key, default in (("rope_theta", DEFAULT_THETA), ("partial_rotary_factor", 1.0)):
        if values.get(key) is None:
            values[key] = read_number(config, key, default=default)
    if (part := read_number(values, "partial_rotary_factor")) != 1:
        raise ValueError(f"partial_rotary_factor must be 1, got {part:g}")
    values.setdefault(ORIGINAL, config.get(POSITIONS))
    if ORIGINAL in config:  # before the scaling's own, as in transformers
        values[ORIGINAL] = config[ORIGINAL]
    return values


def _scaling(values: Mapping[str, Any], config: Mapping[str, Any]) -> Scaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return Linear(factor=read_number(values, "factor"))
    if kind == "llama3":
        return Llama3(
            factor=read_number(values, "factor"),
            low_freq_factor=read_number(values, "low_freq_factor"),
            high_freq_factor=read_number(values, "high_freq_factor"),
            original_positions=read_size(values, ORIGINAL),
        )
    if kind == "yarn":
        return _yarn(values, read_size(config, POSITIONS))
    raise ValueError(f"the rope type must be one of {', '.join(KINDS)}, got {shown(kind)}")


def _yarn(values: Mapping[str, Any], max_positions: int) -> Yarn:
    """Read YaRN's keys; most of them may be absent or null."""
    original = read_size(values, ORIGINAL)
    factor = read_number(values, "factor", default=max_positions / original)
    attention = _mscale(factor, 1.0)
    if values.get("mscale") and values.get("mscale_all_dim"):
        attention = _mscale(factor, read_number(values, "mscale"))
        attention /= _mscale(factor, read_number(values, "mscale_all_dim"))
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=read_number(values, "beta_fast", default=32),
        beta_slow=read_number(values, "beta_slow", default=1),
        truncate=read_flag(values, "truncate", default=True),
        attention=read_number(values, "attention_factor", default=attention),
    )


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature, eq. 22, for a stretch by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
