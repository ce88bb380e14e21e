"""Targets whose residual stream was rotated before quantisation, and what a stock head needs then.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456): an orthogonal Q is folded into every layer, so that
the residual stream is x Q where it was x, and every RMSNorm's weight is folded into the layer that
reads it. The model's output stays, but a head that was trained on the features of before sees
others (arXiv 2505.22179 gives such heads an extra product, `rms_norm_rotation`). Our quantiser
leaves Q and the final norm's weight in `rotation.safetensors`, so that a stock head can be made to
fit: what reads a rotated stream absorbs Q once, when it is loaded, before it is packed.

Letters: D hidden size, N outputs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from methods.shards import open_shard
from methods.weights import ROTATION, Weights

FINAL_NORM = "model.norm.weight"
PROBES = 8  # random directions that Q must keep
LOOSENESS = 1e-3  # relative to a direction's length: far above float32, far below a wrong matrix
NAMES = frozenset({"rotation", "norm"})


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What was folded into a target.

    matrix: [D, D] orthogonal; a stored stream is the original one times it. norm: [D], the final
    norm's weight, which now is in lm_head.
    """

    matrix: Tensor
    norm: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rotation":
        """Move, and widen to at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return Rotation(matrix=self.matrix.to(device, wide), norm=self.norm.to(device, wide))

    def absorb(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Let a weight read the stored stream in place of the original. weight: [N, D] -> [N, D].

        scale: [D], what the original stream was multiplied by before the weight read it.
        """
        wide = weight.to(self.matrix)
        return (wide if scale is None else wide * scale.to(wide)) @ self.matrix

    def original(self, stored: Tensor) -> Tensor:
        """Turn stored streams back. [n, D] -> [n, D]."""
        return stored.to(self.matrix) @ self.matrix.T

    @property
    def into_feature(self) -> Tensor:
        """[D, D]: an original feature times this is what the target's own lm_head reads."""
        return self.matrix / self.norm[:, None]

    @property
    def out_of_feature(self) -> Tensor:
        """[D, D]: a feature of the target times this is the original one."""
        return self.matrix.T * self.norm


def read_rotation(folder: Path) -> Rotation | None:
    """Read what was folded into a target's folder; None where it was not rotated by us.

    Raises ValueError where the file, or the checkpoint beside it, is not what it must be.
    """
    path = folder / ROTATION
    if not path.is_file():
        return None
    shard = open_shard(path)
    if shard.names != NAMES:
        raise ValueError(
            f"{path} must hold norm and rotation, got {', '.join(sorted(shard.names))}"
        )
    matrix, norm = shard.tensor("rotation"), shard.tensor("norm")
    weights = Weights(folder)
    (size,) = weights.spec(FINAL_NORM).shape
    if matrix.shape != (size, size) or norm.shape != (size,):
        raise ValueError(
            f"{path}: rotation and norm must be [{size}, {size}] and [{size}], "
            f"got {list(matrix.shape)} and {list(norm.shape)}"
        )
    if not _is_orthogonal(matrix):
        raise ValueError(f"{path}: rotation must be orthogonal")
    if not bool((norm.isfinite() & (norm != 0)).all()):
        raise ValueError(f"{path}: norm must be finite and nowhere zero")
    if "lm_head.weight" not in weights and not any(n.startswith("lm_head.") for n in weights):
        raise ValueError(f"{folder} must have an lm_head of its own, since it is rotated")
    if not is_norm_folded(weights):
        raise ValueError(f"{folder}: {FINAL_NORM} must be all ones, since it was folded away")
    return Rotation(matrix=matrix, norm=norm)


def is_norm_folded(weights: Weights) -> bool:
    """Tell whether a target's final norm is all ones, as every rotation leaves it."""
    return bool((weights[FINAL_NORM] == 1).all())


def _is_orthogonal(matrix: Tensor) -> bool:
    """Ask random directions whether Q and then its transpose leave them where they were."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, len(matrix), generator=generator)
    back = probes @ matrix.float() @ matrix.float().T
    return bool(((back - probes).norm(dim=1) <= LOOSENESS * probes.norm(dim=1)).all())
