"""EAGLE-1/2: a head that extrapolates the feature under lm_head, sharing embedding and lm_head.

Li et al. 2024 (arXiv 2401.15077; trees arXiv 2406.16858). One Llama layer without its input norm
reads fc([embedding(t_{p+1}); h_p]), where h_p is the target's hidden state after the final norm;
its output is the next h, and lm_head scores it as it stands.

Over a rotated target (`methods.rotation`) features come rotated and without the final norm's
weight. A head made for one (arXiv 2505.22179) has `rms_norm_rotation`, which turns a feature back
before it enters, and an embedding and an lm_head of its own. A stock head absorbs the rotation in
fc, and its output is turned once, into what the target's lm_head reads.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from methods.checkpoint import load_lm_head
from methods.fused import add, join
from methods.grow import Head
from methods.head import EAGLE, FLOATS, HeadFiles, kept_rows, open_head
from methods.head_shapes import EAGLE2_PREFIX as PREFIX
from methods.head_shapes import EMBEDDING, FC_BIAS, LM_HEAD, eagle2_shapes
from methods.packer import Packer
from methods.recipe import Family, Parts
from methods.rotation import Rotation, is_norm_folded, read_rotation
from methods.transformer import Block, Shape
from methods.tree_recipe import TreeRecipe
from methods.weights import Weights
from methods.window import Window
from quant.formats import Spec
from quant.scheme import QuantLinear

NAME = "eagle2"
ROTATED = "rms_norm_rotation.weight"  # [D, D], by which a head knows a rotated target
AGREEMENT = 2.0**-6  # relative error of a published `rms_norm_rotation` in half precision


class Eagle2Head(Head):
    """The head over one target, whose final norm it taps."""

    fc_bias: Tensor | None
    entering: Tensor | None
    leaving: Tensor | None

    def __init__(
        self,
        shape: Shape,
        *,
        taps: tuple[int, ...],
        embedding: Tensor,
        fc: QuantLinear,
        fc_bias: Tensor | None,
        block: Block,
        lm_head: QuantLinear,
        kept: Tensor | None,
        entering: Tensor | None,
        leaving: Tensor | None,
    ) -> None:
        """entering, leaving: [D, D] that features, and the head's outputs, are multiplied by."""
        super().__init__(shape, taps=taps, embedding=embedding, kept=kept)
        self.fc = fc
        self.register_buffer("fc_bias", fc_bias)
        self.block = block
        self.lm_head = lm_head
        self.register_buffer("entering", entering)
        self.register_buffer("leaving", leaving)

    def enter(self, features: Tensor) -> Tensor:
        """The feature is the hidden stream."""
        return features if self.entering is None else features @ self.entering

    def layer(
        self,
        tokens: Tensor,
        hidden: Tensor,
        view: Window,
    ) -> Tensor:
        """Fuse embedding and hidden stream, then one decoder layer."""
        x = self.fc(join(self.embedding, tokens, hidden))
        if self.fc_bias is not None:
            x = add(x, self.fc_bias)
        _, stream, delta = self.block(x[None], None, view, 0)
        out = add(stream[0], delta[0])
        return out if self.leaving is None else out @ self.leaving

    def logits(self, hidden: Tensor) -> Tensor:
        """By the target's lm_head, or a copy of it, or of some rows, in the drafter's scheme."""
        out: Tensor = self.lm_head(hidden)
        return out


@dataclass(frozen=True, kw_only=True)
class Eagle2(TreeRecipe):
    """Draft with an EAGLE-1/2 head in EAGLE-2's dynamic trees."""

    def folders(self, family: Family) -> list[Path]:
        """The head."""
        return [family.head(NAME)]

    def head_ids(self, family: Family, target: Shape) -> Tensor:
        """Sizes, vocabulary and rotation must be the target's."""
        files = open_head(family.head(NAME), EAGLE, target)
        shape = files.shape
        if shape.hidden_size != target.hidden_size:
            raise ValueError(
                f"{files.folder}: hidden_size must be the target's {target.hidden_size}, "
                f"got {shape.hidden_size}"
            )
        own = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
        own[LM_HEAD] = own[EMBEDDING]
        expected = eagle2_shapes(shape)
        if files.flag("bias", default=True):  # as the published code has it
            expected[FC_BIAS] = (shape.hidden_size,)
        rotation = read_rotation(family.target)
        if ROTATED in files.weights:
            expected |= own | {ROTATED: (shape.hidden_size, shape.hidden_size)}
        files.require(expected, optional={k: Spec(dtypes=FLOATS, shape=v) for k, v in own.items()})
        if ROTATED in files.weights:
            _require_rotated(files, family.target, rotation)
        return torch.arange(shape.vocab_size)

    def head(self, parts: Parts) -> Head:
        """Read the head; its layer and fc go into the drafter's scheme."""
        target = parts.target
        files = open_head(parts.family.head(NAME), EAGLE, target.shape, device=target.device)
        shape = files.shape
        own = ROTATED in files.weights
        rotation = read_rotation(parts.family.target)
        if rotation is not None:
            rotation = rotation.to(target.device, target.dtype)
        folded = None if own else rotation
        # The published code never reads a stock head's lm_head; its embedding it does.
        tensors = files.tensors(besides=set() if own else {EMBEDDING, LM_HEAD})
        embedding = None if own else files.own_embedding(target, folded)
        if folded is not None:
            tensors["fc.weight"] = _absorbed(tensors["fc.weight"], folded, shared=embedding is None)
        packer = Packer(tensors, parts.scheme, dtype=target.dtype, device=target.device)
        embedding = packer.tensor(EMBEDDING) if own else embedding
        rows = kept_rows(torch.arange(shape.vocab_size), parts.draft_ids)
        return Eagle2Head(
            shape,
            taps=(target.shape.num_layers,),
            embedding=target.embedding if embedding is None else embedding,
            fc=packer.linear("fc", "fc"),
            fc_bias=packer.tensor(FC_BIAS) if FC_BIAS in tensors else None,
            block=Block(
                input_norm=None,
                attention=packer.attention("attention", PREFIX, shape),
                mlp_norm=packer.norm(f"{PREFIX}post_attention_layernorm.weight", shape.norm_eps),
                mlp=packer.mlp("mlp", PREFIX),
            ),
            lm_head=_lm_head(parts, packer, own=own, rows=rows),
            kept=None if rows is None else rows.to(target.device),
            entering=packer.tensor(ROTATED).T.contiguous() if own else None,
            leaving=None if folded is None else folded.into_feature.to(target.dtype),
        ).eval()


def _absorbed(fc: Tensor, rotation: Rotation, *, shared: bool) -> Tensor:
    """Let fc read the target's rotated features, and its embedding where that is shared."""
    embedded, hidden = fc.to(rotation.matrix).chunk(2, dim=1)
    if shared:
        embedded = rotation.absorb(embedded)
    return torch.cat([embedded, rotation.absorb(hidden, rotation.norm)], dim=1)


def _lm_head(parts: Parts, packer: Packer, *, own: bool, rows: Tensor | None) -> QuantLinear:
    """The target's output projection, a copy of it in the drafter's scheme, or the head's own.

    rows: those that are wanted; None = all. Without a scheme of the drafter's they stay in the
    target's.
    """
    if own:
        return packer.of(parts.lm_head or parts.dense).linear("lm_head", "lm_head", rows=rows)
    if parts.lm_head is None and rows is None:
        return parts.target.lm_head
    return load_lm_head(
        parts.family.target,
        parts.lm_head or parts.target_lm_head,
        dtype=packer.dtype,
        device=packer.device,
        rows=rows,
    )


def _require_rotated(files: HeadFiles, target: Path, rotation: Rotation | None) -> None:
    """Check that a head that was made for a rotated target is over that target."""
    if rotation is None:
        if not is_norm_folded(Weights(target)):
            raise ValueError(
                f"{files.folder}: a head with {ROTATED} must be over a rotated target, but the "
                f"final norm of {target} is not folded away"
            )
        return
    expected = rotation.out_of_feature
    apart = (files.weights[ROTATED].float().T - expected.float()).norm()
    if not bool(apart <= AGREEMENT * expected.norm()):
        raise ValueError(f"{files.folder}: {ROTATED} must be the rotation of {target}")
