"""GPTQ (arXiv 2210.17323): rounding that makes up for its own error, for any scheme's lattice.

Columns of the weight are rounded one by one. What rounding one of them does to the layer's outputs
is taken back, as far as it can be, by changing the columns that are still to come: with
H = 2/n X^T X over calibration inputs, and U the upper Cholesky factor of its inverse,

    e = (w[:, j] - rounded) / U[j, j]        w[:, j+1:] -= e * U[j, j+1:]

A group's grid is fitted when its first column is reached, on the weights as changed by then, or on
those given (`static_groups`). Settings carry the names of AutoGPTQ's `quantize_config.json`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.grid import Fit, pieces
from quant.lattice import Lattice
from quant.rounding import Inputs, Rounding
from quant.scheme import Scheme

HESSIAN_DTYPES = (torch.float32, torch.float64)
DAMPING_GROWTH = 10  # from one try to the next where the Hessian is not positive definite


class Hessian:
    """Running mean of 2 x^T x over input rows, [K, K], from batches of them."""

    def __init__(self, k: int, *, dtype: torch.dtype, device: torch.device) -> None:
        if dtype not in HESSIAN_DTYPES:
            raise ValueError(f"a Hessian must be float32 or float64, got {dtype}")
        self.num_rows = 0
        self._mean = torch.zeros(k, k, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Take a batch in. x: [..., K]."""
        rows = x.reshape(-1, self._mean.shape[0]).to(self._mean)
        if len(rows) == 0:
            return
        self._mean *= self.num_rows / (self.num_rows + len(rows))
        self.num_rows += len(rows)
        rows = math.sqrt(2 / self.num_rows) * rows
        self._mean.addmm_(rows.t(), rows)

    @property
    def mean(self) -> Tensor:
        """The mean so far, [K, K]; a copy."""
        if self.num_rows == 0:
            raise ValueError("a Hessian must have seen inputs, got none")
        return self._mean.clone()


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight in its scheme's format, and what rounding cost."""

    stored: dict[str, Tensor]  # as the scheme's `pack` gives, with `order` where groups need it
    damping: float  # used; more than asked for where the Hessian needed it
    # |x (W - Q)^T|^2 / |x W^T|^2 over the calibration inputs, Q on the lattice: what a scheme
    # rounds once all codes are known (QQQ's groups, to 8 bits) is not in it.
    output_error: float


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """The algorithm's settings; `block_size` changes speed alone."""

    damping: float  # added to the diagonal of H, as a share of its mean
    max_damping: float  # grows tenfold up to here where H stays singular; `damping`: never
    block_size: int  # columns between two updates of all that are to come
    desc_act: bool  # round inputs of large activations first ("act-order")
    static_groups: bool  # fit all grids at the start, to groups of neighbours whatever the order

    def __post_init__(self) -> None:
        if not 0 < self.damping <= self.max_damping:
            raise ValueError(
                "damping must be positive and at most max_damping, "
                f"got {self.damping} and {self.max_damping}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    @property
    def label(self) -> str:
        """Name in labels."""
        if not self.desc_act:
            return "gptq"
        return "gptq-static-order" if self.static_groups else "gptq-order"

    @property
    def needs_hessian(self) -> bool:
        """Looks at the inputs' second moments."""
        return True

    def round(self, scheme: Scheme, weight: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Give the stored tensors alone."""
        assert inputs.hessian is not None
        return self.pack(scheme, weight, inputs.hessian, inputs.absmax).stored

    def pack(
        self, scheme: Scheme, weight: Tensor, hessian: Tensor, absmax: Tensor | None = None
    ) -> Rounded:
        """Round a weight to what `scheme` stores; works in the Hessian's dtype, on its device.

        weight: [N, K] floating point. hessian: [K, K] float32 or float64, of the inputs as they
        come. absmax: [K], as for `Scheme.pack`. Raises ValueError where the scheme cannot store
        the result, the Hessian is unusable, or it stays singular at `max_damping`.
        """
        lattice = scheme.lattice(weight.to(hessian.device), absmax)
        # One grid for a whole row is the same in any order.
        static = self.static_groups or lattice.num_groups == 1
        if self.desc_act and not static and not lattice.takes_order:
            raise ValueError(
                "desc_act without static_groups must have a scheme that stores an order of "
                f"inputs, got {scheme.label}"
            )
        h = _met(hessian, lattice)
        order = torch.arange(len(h), device=h.device)
        if self.desc_act:
            order = h.diagonal().argsort(descending=True, stable=True)
        # Inputs that never fired: nothing is known of them, so they neither give nor take error.
        # AutoGPTQ writes 1 in their place, which counts in the mean that scales the damping; the
        # mean of the others leaves the result free of the Hessian's unit.
        dead = h.diagonal() == 0
        h.diagonal().masked_fill_(dead, float(h.diagonal()[~dead].mean()))
        given = lattice.weight.to(h).masked_fill(dead, 0)
        factor, damping = self._inverse_factor(h[order][:, order])
        walk = _Walk(lattice, given, order, static=static)
        walk.round_columns(factor, self.block_size)
        codes, grids = walk.codes(), walk.grids()
        stored = lattice.stored(codes, grids)
        values = lattice.decode(codes, grids).flatten(1).to(h)
        if self.desc_act and not static:
            stored["order"] = order.int()
            values = values[:, order.argsort()]
        size = _energy(given, h)
        return Rounded(
            stored=stored,
            damping=damping,
            output_error=_energy(given - values, h) / size if size else 0.0,
        )

    def _inverse_factor(self, h: Tensor) -> tuple[Tensor, float]:
        # With rows and columns of H flipped, the inverse of its lower factor is, flipped back, the
        # upper factor of H's inverse: one factorisation and no inverse of H.
        flipped, mean = h.flip(0, 1), h.diagonal().mean()
        damping = self.damping
        while True:
            damped = flipped.clone()
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                one = torch.eye(len(h), dtype=h.dtype, device=h.device)
                return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1), damping
            if damping >= self.max_damping:
                raise ValueError(
                    "hessian must be positive definite once damped, got one that is not at "
                    f"{damping:g} of its mean diagonal; raise max_damping or calibrate on more text"
                )
            damping = min(damping * DAMPING_GROWTH, self.max_damping)


class _Walk:
    """One pass over the columns of a weight, in some order of its inputs."""

    def __init__(self, lattice: Lattice, given: Tensor, order: Tensor, *, static: bool) -> None:
        self.lattice = lattice
        self.order = order if static else None  # to undo at the end; else it is to be stored
        self.width = len(order) // lattice.num_groups
        # [K, N], so that a column lies in one piece. After its turn it stays as it was then.
        self.columns = given[:, order].t().contiguous()
        self.rounded = torch.empty_like(self.columns, dtype=torch.int8)
        self.fits: list[Fit] = []
        self.group_of = [j // self.width for j in range(len(order))]
        if static:
            whole = lattice.fit(pieces(given, lattice.group_size))
            for group in range(lattice.num_groups):
                self.fits.append(Fit(*(part[:, group : group + 1] for part in whole)))
            self.group_of = (order // self.width).tolist()

    def round_columns(self, factor: Tensor, block_size: int) -> None:
        """Round from first to last. factor: [K, K] upper, of the inverse of the damped H."""
        columns = self.columns
        for start, end in _blocks(len(columns), self.width, block_size):
            errors = torch.empty_like(columns[start:end])
            for j in range(start, end):
                error = torch.div(self._round(j), factor[j, j], out=errors[j - start])
                columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)

    def codes(self) -> Tensor:
        """Give the codes, [N, groups, g], in the order of the inputs or in the one to store."""
        rows = self.rounded if self.order is None else self.rounded[self.order.argsort()]
        return pieces(rows.t().contiguous(), self.width)

    def grids(self) -> Fit:
        """Give every group's grid, [N, groups, 1]."""
        scales, zeros = zip(*self.fits, strict=True)
        return Fit(torch.cat(scales, 1), torch.cat(zeros, 1))

    def _round(self, j: int) -> Tensor:
        # Returns what rounding column j takes away, [N].
        if self.group_of[j] == len(self.fits):
            self.fits.append(self.lattice.fit(self.columns[j : j + self.width].t().unsqueeze(1)))
        placed = self.fits[self.group_of[j]]
        codes = self.lattice.encode(self.columns[j].view(-1, 1, 1), placed)
        self.rounded[j] = codes.flatten()
        return self.columns[j] - self.lattice.decode(codes, placed).flatten()


def _met(hessian: Tensor, lattice: Lattice) -> Tensor:
    # The Hessian of the inputs that the lattice's weight meets; a copy.
    k = lattice.weight.shape[1]
    if hessian.shape != (k, k) or hessian.dtype not in HESSIAN_DTYPES:
        raise ValueError(
            f"hessian must be float32 or float64 of shape [{k}, {k}], got {hessian.dtype} of "
            f"shape {list(hessian.shape)}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian must be finite, got infinities or NaNs")
    if not bool(hessian.diagonal().any()):
        raise ValueError("hessian must be of inputs that are not all zero, got zeros alone")
    if lattice.smooth is None:
        return hessian.clone()
    smooth = lattice.smooth.to(hessian)
    return hessian / smooth / smooth.unsqueeze(-1)


def _blocks(k: int, width: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut K columns into blocks that hold whole groups, or that whole groups are cut into.

    So a group's columns are up to date when its first one is reached: updates from earlier blocks
    are in, and there are none pending from its own.
    """
    span = width if width > block_size else block_size - block_size % width
    for first in range(0, k, span):
        last = min(first + span, k)
        for start in range(first, last, block_size):
            yield start, min(start + block_size, last)


def _energy(weight: Tensor, h: Tensor) -> float:
    return float(((weight @ h) * weight).sum())
