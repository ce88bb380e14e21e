"""GPTQ as a textbook has it, in numpy and float64, sharing nothing with `quant`.

One column at a time, the error spread over all later ones at once, and the inverse Hessian of those
brought up to date explicitly after each (the Optimal Brain Surgeon step). Each format's grid once
more, from its definition; what a code stands for is a float32, as a layer opens it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tests.quant.oracle import Array

Grid = Any  # what a format's `fit` gives its own `round`


class Format(Protocol):
    def fit(self, values: Array) -> Grid: ...
    def round(self, column: Array, grid: Grid) -> tuple[Array, Array]: ...


@dataclass
class Even:
    """Evenly spaced codes low ... high; zero None: each group has its own."""

    low: int
    high: int
    zero: int | None
    scale: type[np.floating[Any]]

    def fit(self, values: Array) -> Grid:
        top, bottom = np.maximum(values.max(1), 0), np.minimum(values.min(1), 0)
        if self.zero is not None:
            top = np.maximum(top, -bottom)
            bottom = -top
        scale = ((top - bottom) / (self.high - self.low)).astype(self.scale).astype(np.float64)
        scale[scale == 0] = 1
        if self.zero is not None:
            return scale, np.full(len(scale), self.zero)
        return scale, np.clip(np.rint(-bottom / scale) + self.low, self.low, self.high)

    def round(self, column: Array, grid: Grid) -> tuple[Array, Array]:
        scale, zero = grid
        codes = np.clip(np.rint(column / scale) + zero, self.low, self.high)
        return codes, ((codes - zero) * scale).astype(np.float32)


@dataclass
class Progressive:
    """QoQ's two levels: 8 bits on a row's scale, then 4 bits on a group's."""

    weight: Array

    def __post_init__(self) -> None:
        self.s1 = (np.abs(self.weight).max(1) / 119).astype(np.float16).astype(np.float64)

    def fit(self, values: Array) -> Grid:
        q = np.clip(np.rint(values / self.s1[:, None]), -119, 119)
        top, bottom = np.maximum(q.max(1), 0), np.minimum(q.min(1), 0)
        s2 = np.maximum(np.rint((top - bottom) / 15), 1)
        return s2, np.clip(np.rint(-bottom / s2), 0, 15)

    def round(self, column: Array, grid: Grid) -> tuple[Array, Array]:
        s2, zero = grid
        q = np.clip(np.rint(column / self.s1), -119, 119)
        codes = np.clip(np.rint(q / s2) + zero, 0, 15)
        return codes, (codes - zero) * s2 * self.s1


class Floats:
    """e4m3; its codes are its values."""

    def __init__(self) -> None:
        small = [m * 2.0**-9 for m in range(8)]
        large = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
        self.values = np.array(sorted({s * v for v in small + large for s in (1, -1)}))

    def fit(self, values: Array) -> Grid:
        return (np.abs(values).max(1) / 448).astype(np.float32).astype(np.float64)

    def round(self, column: Array, grid: Grid) -> tuple[Array, Array]:
        steps = np.abs(column[:, None] / grid[:, None] - self.values)
        codes = self.values[steps.argmin(1)]
        return codes, (codes * grid).astype(np.float32)


@dataclass
class Result:
    codes: Array  # in the order in which columns were rounded
    values: Array  # in the order of the inputs
    order: NDArray[np.int64]


def gptq(
    form: Format,
    weight: Array,
    hessian: Array,
    *,
    group: int,
    damping: float,
    desc_act: bool,
    static_groups: bool,
) -> Result:
    k = weight.shape[1]
    h, weight = hessian.copy(), weight.copy()
    order = np.argsort(-np.diag(h), kind="stable") if desc_act else np.arange(k)
    live = np.mean([d for d in np.diag(h) if d != 0])
    for j in range(k):
        if h[j, j] == 0:
            h[j, j], weight[:, j] = live, 0
    static = [form.fit(weight[:, g : g + group]) for g in range(0, k, group)]
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(k))[np.ix_(order, order)]
    columns = weight[:, order]
    codes, values = np.zeros_like(weight), np.zeros_like(weight)
    grid: Grid = None
    for j in range(k):
        if static_groups:
            grid = static[order[j] // group]
        elif j % group == 0:
            grid = form.fit(columns[:, j : j + group])
        codes[:, j], values[:, order[j]] = form.round(columns[:, j], grid)
        error = (columns[:, j] - values[:, order[j]]) / inverse[0, 0]
        columns[:, j:] -= np.outer(error, inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return Result(codes, values, order)
