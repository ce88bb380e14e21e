"""Rotations folded into weights (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406, its R1 and R2).

An orthogonal Q spreads outliers over all channels and cancels between a layer that writes rotated
values, x Q, and one that reads them. Between the two may stand nothing but RMSNorms without weights
of their own, which is why those are folded into the layers that read them first.

R1 turns what all blocks write to and read from: embedding rows and the inputs of readers by
`rotate_inputs`, the outputs of writers by `rotate_outputs`. R2 turns values and the attention's
output projection head by head with a Q of the head's size. All heads share it, so how many query
heads read one value head does not matter. All arithmetic is float64; weights come back in their own
dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (S x core), with S Sylvester's Hadamard matrix.

    Kept in factors: multiplying by S takes additions alone, and Q of 28,672 channels as a matrix
    would take 6.6 GB.
    """

    signs: Tensor  # [size] float64, 1.0 or -1.0
    doublings: int  # S is [2^doublings, 2^doublings]
    core: Tensor  # [size / 2^doublings, the same] float64, orthogonal

    @property
    def size(self) -> int:
        """Number of channels that Q mixes."""
        return len(self.signs)

    @property
    def matrix(self) -> Tensor:
        """Q itself, [size, size] float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def apply(self, rows: Tensor) -> Tensor:
        """Give rows @ Q on the rows' device. rows: [..., size] -> float64."""
        signed = rows.double() * self.signs.to(rows.device)
        mixed = signed.reshape(-1, 2**self.doublings, len(self.core))
        mixed = _sylvester(mixed) @ self.core.to(rows.device)
        return mixed.reshape(rows.shape)


def random_rotation(size: int, seed: int) -> Rotation:
    """Draw a rotation: a Hadamard matrix with random signs, or a random orthogonal one.

    Hadamard matrices are known here for a power of two times 1 or an order of Paley's: 4096, 8192,
    3072 = 12 * 256, 5120 = 20 * 256, 14336 = 28 * 512, 18944 = 148 * 128 and so on. Where there is
    none, Q is a random orthogonal matrix, equal for equal seeds up to the rounding of LAPACK.
    """
    if size < 1:
        raise ValueError(f"size of a rotation must be positive, got {size}")
    generator = torch.Generator().manual_seed(seed)
    doublings = _doublings(size)
    if doublings is None:
        normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
        return Rotation(signs=torch.ones(size).double(), doublings=0, core=_orthogonal(normal))
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs=signs, doublings=doublings, core=_paley(size >> doublings))


def fold_norm(weight: Tensor, norm: Tensor) -> Tensor:
    """Take an RMSNorm's weight into the layer that reads it. weight: [N, K], norm: [K]."""
    if norm.shape != weight.shape[1:]:
        raise ValueError(
            f"a norm's weight must be of shape [{weight.shape[1]}], got {list(norm.shape)}"
        )
    return (weight.double() * norm.double()).to(weight.dtype)


def rotate_inputs(weight: Tensor, rotation: Rotation, *, heads: int = 1) -> Tensor:
    """Make a layer read x Q where it read x; or an embedding give rows of x Q. weight: [N, K].

    heads: pieces of the input, of the rotation's size, that are each rotated.
    """
    _require_fit("in", weight.shape[1], rotation, heads)
    cut = weight.reshape(len(weight), heads, rotation.size)
    return rotation.apply(cut).reshape(weight.shape).to(weight.dtype)


def rotate_outputs(weight: Tensor, rotation: Rotation, *, heads: int = 1) -> Tensor:
    """Make a layer give y Q where it gave y. weight: [N, K]; heads: pieces of the output."""
    _require_fit("out", weight.shape[0], rotation, heads)
    return rotate_inputs(weight.t(), rotation, heads=heads).t().contiguous()


def _require_fit(side: str, channels: int, rotation: Rotation, heads: int) -> None:
    if channels != heads * rotation.size:
        raise ValueError(
            f"{side}-channels must be heads * size of the rotation = {heads} * {rotation.size}, "
            f"got {channels}"
        )


def _sylvester(rows: Tensor) -> Tensor:
    # Multiplies dimension 1, of 2^m, by Sylvester's matrix over the square root of its size.
    n, size, width = rows.shape
    half = 1
    while half < size:
        pairs = rows.view(n, -1, 2, half, width)
        first, second = pairs.unbind(2)
        rows = torch.stack((first + second, first - second), 2)
        half *= 2
    return rows.reshape(n, size, width) / math.sqrt(size)


def _doublings(size: int) -> int | None:
    # The most doublings that leave a core of Paley's; None where no number of them does.
    found = [m for m in range(size.bit_length()) if size % 2**m == 0 and _has_paley(size >> m)]
    return max(found, default=None)


def _has_paley(order: int) -> bool:
    return order == 1 or (
        order % 4 == 0 and (_is_prime(order - 1) or _is_prime_of_second_kind(order))
    )


def _is_prime_of_second_kind(order: int) -> bool:
    q = order // 2 - 1
    return q % 4 == 1 and _is_prime(q)


def _paley(order: int) -> Tensor:
    """Give a Hadamard matrix by Paley's constructions, over the square root of its order.

    With q = order - 1 (then q = 3 mod 4) the first: I + C, where C is skew, bordered by ones, and
    holds the quadratic characters of i - j. With q = order / 2 - 1 = 1 mod 4 the second: C is
    symmetric, and its entries become two-by-two blocks.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    first = _is_prime(order - 1)
    q = order - 1 if first else order // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)])
    index = torch.arange(q)
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index[:, None] - index) % q].double()
    one = torch.eye(q + 1, dtype=torch.float64)
    if first:
        conference[1:, 0] = -1
        return (one + conference) / math.sqrt(order)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (torch.kron(conference, block) + torch.kron(one, turned)) / math.sqrt(order)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _orthogonal(normal: Tensor) -> Tensor:
    # QR leaves the signs of R's diagonal open; fixing them makes Q uniform among rotations.
    q, r = torch.linalg.qr(normal)
    uniform: Tensor = q * r.diagonal().sign()
    return uniform
