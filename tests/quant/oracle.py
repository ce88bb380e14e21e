"""The formats' arithmetic once more, in numpy and integers, sharing nothing with `quant`."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


def tokens(x: Tensor) -> tuple[Integers, Array]:
    """Round rows to int8. x: [n, K] -> codes [n, K], scale [n, 1], in float32 or x's float64."""
    values = x.double().numpy() if x.element_size() == 8 else x.float().numpy()
    scale = np.abs(values).max(1, keepdims=True) / values.dtype.type(127)
    scale[scale == 0] = 1
    return np.rint(values / scale).astype(np.int64), scale.astype(np.float64)


def nibbles(packed: Tensor) -> Integers:
    """Open bytes, low half first. [N, K / 2] -> [N, K], 0 ... 15."""
    codes = [[c for byte in row for c in (byte & 15, byte >> 4)] for row in packed.tolist()]
    return np.array(codes, dtype=np.int64)


def spread(per_group: Tensor, k: int) -> Array:
    """Repeat a value per group over the group's inputs. [N, groups] -> [N, K]."""
    return np.repeat(per_group.double().numpy(), k // per_group.shape[1], axis=1)


def column(values: Tensor) -> Array:
    """Give [N] as float64."""
    return np.asarray(values.double().numpy())


def worst(actual: Tensor, expected: Array) -> float:
    """Give the largest difference, relative to the largest value."""
    return float(np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max())
