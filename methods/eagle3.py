"""EAGLE-3: a head over three streams of the target, with a vocabulary of its own.

Li et al. 2025 (arXiv 2503.01840). The residual inputs of a low, a middle and a high layer are
fused once into the head's hidden stream; inside a tree the head's own output is fed back. Its
layer reads [norm(embedding); norm(hidden)] and adds to the hidden stream; its own norm and lm_head
score a reduced vocabulary, whose id i is the target's id i + d2t[i]; a list of tokens cuts it more.

Its width may differ from the target's; then it has an embedding of its own. Over a rotated target
(`methods.rotation`) fc absorbs the rotation for each stream, and the attention's embedding half
for the embedding that is shared: a norm without its weight commutes with a rotation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.architecture import FUSED, QKV
from methods.fused import add
from methods.grow import Head
from methods.head import EAGLE3, FLOATS, HeadFiles, kept_rows, open_head
from methods.head_shapes import EAGLE3_EMBEDDING_NORM as EMBEDDING_NORM
from methods.head_shapes import EAGLE3_PREFIX as PREFIX
from methods.head_shapes import EMBEDDING, KEPT, OFFSETS, eagle3_shapes
from methods.norm import RMSNorm
from methods.packer import Packer
from methods.recipe import Family, Parts
from methods.rotation import Rotation, read_rotation
from methods.transformer import MLP, Attention, Shape
from methods.tree_recipe import TreeRecipe
from methods.values import shown
from methods.window import Window
from quant.block_float import BlockFloat
from quant.formats import Spec
from quant.scheme import QuantLinear

NAME = "eagle3"
TAPS = "eagle_aux_hidden_state_layer_ids"
INTEGERS = (torch.int64, torch.int32)


class Eagle3Head(Head):
    """The head over one target."""

    def __init__(
        self,
        shape: Shape,
        *,
        taps: tuple[int, ...],
        embedding: Tensor,
        fc: QuantLinear,
        embedding_norm: RMSNorm,
        hidden_norm: RMSNorm,
        attention: Attention,
        mlp_norm: RMSNorm,
        mlp: MLP,
        norm: RMSNorm,
        lm_head: QuantLinear,
        kept: Tensor,
        norm_before_residual: bool,
        norm_output: bool,
    ) -> None:
        """norm_before_residual, norm_output: variants of speculators, by its names."""
        super().__init__(shape, taps=taps, embedding=embedding, kept=kept)
        self.fc = fc
        self.embedding_norm = embedding_norm
        self.hidden_norm = hidden_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.norm = norm
        self.lm_head = lm_head
        self.norm_before_residual = norm_before_residual
        self.norm_output = norm_output

    def enter(self, features: Tensor) -> Tensor:
        """Fuse the target's streams."""
        out: Tensor = self.fc(features)
        return out

    def layer(
        self,
        tokens: Tensor,
        hidden: Tensor,
        view: Window,
    ) -> Tensor:
        """Attend over embedding and hidden side by side; add to the hidden stream."""
        normed = self.hidden_norm(hidden)
        embedded = self.embedding_norm(F.embedding(tokens, self.embedding))
        residual = normed if self.norm_before_residual else hidden
        attended = self.attention(torch.cat([embedded, normed], dim=1)[None], view, 0)[0]
        read, x = self.mlp_norm.add(residual, attended, reader=self.mlp.gate_up)
        out = add(x, self.mlp(read))
        return self.norm(out) if self.norm_output else out

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the draft vocabulary."""
        normed: Tensor | BlockFloat = hidden
        if not self.norm_output:
            normed, _ = self.norm.add(hidden, None, reader=self.lm_head)
        out: Tensor = self.lm_head(normed)
        return out


@dataclass(frozen=True, kw_only=True)
class Eagle3(TreeRecipe):
    """Draft with an EAGLE-3 head in EAGLE-2's dynamic trees."""

    def folders(self, family: Family) -> list[Path]:
        """The head."""
        return [family.head(NAME)]

    def head_ids(self, family: Family, target: Shape) -> Tensor:
        """The target's width and vocabulary must be what the head was trained on."""
        files = open_head(family.head(NAME), EAGLE3, target)
        shape, draft_vocab = files.shape, files.size("draft_vocab_size")
        width = files.size("target_hidden_size", default=shape.hidden_size)
        if width != target.hidden_size:
            raise ValueError(
                f"{files.folder}: the width of the target that it reads must be "
                f"{target.hidden_size}, got {width}"
            )
        taps = _taps(files, target)
        expected = eagle3_shapes(shape, draft_vocab, taps=len(taps), width=width)
        embedding = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
        if shape.hidden_size != width:
            expected |= embedding
        optional = {name: Spec(dtypes=FLOATS, shape=size) for name, size in embedding.items()}
        optional[OFFSETS] = Spec(dtypes=INTEGERS, shape=(draft_vocab,))
        optional[KEPT] = Spec(dtypes=(torch.bool,), shape=(shape.vocab_size,))
        files.require(expected, optional=optional)
        read_rotation(family.target)
        return _target_ids(files, draft_vocab)

    def head(self, parts: Parts) -> Head:
        """Read the head; its layer and fc go into the drafter's scheme."""
        target = parts.target
        files = open_head(parts.family.head(NAME), EAGLE3, target.shape, device=target.device)
        shape, draft_vocab = files.shape, files.size("draft_vocab_size")
        rotation = read_rotation(parts.family.target)
        tensors = files.tensors(besides={EMBEDDING})
        if rotation is not None:
            rotation = rotation.to(target.device, target.dtype)
        embedding = files.own_embedding(target, rotation)
        if rotation is not None:
            tensors |= _absorbed(tensors, rotation, shared=embedding is None)
        packer = Packer(tensors, parts.scheme, dtype=target.dtype, device=target.device)
        ids = _target_ids(files, draft_vocab)
        rows = kept_rows(ids, parts.draft_ids)
        return Eagle3Head(
            shape,
            taps=_taps(files, target.shape),
            embedding=target.embedding if embedding is None else embedding,
            fc=packer.linear("fc", "fc"),
            embedding_norm=packer.norm(EMBEDDING_NORM, shape.norm_eps),
            hidden_norm=packer.norm(f"{PREFIX}hidden_norm.weight", shape.norm_eps),
            attention=packer.attention("attention", PREFIX, shape),
            mlp_norm=packer.norm(f"{PREFIX}post_attention_layernorm.weight", shape.norm_eps),
            mlp=packer.mlp("mlp", PREFIX),
            norm=packer.norm("norm.weight", shape.norm_eps),
            lm_head=packer.of(parts.lm_head or parts.dense).linear("lm_head", "lm_head", rows=rows),
            kept=(ids if rows is None else ids[rows]).to(target.device),
            norm_before_residual=files.flag("norm_before_residual"),
            norm_output=files.flag("norm_output"),
        ).eval()


def _absorbed(
    tensors: Mapping[str, Tensor], rotation: Rotation, *, shared: bool
) -> dict[str, Tensor]:
    """Let fc read rotated streams, and the attention the target's embedding where it is shared."""
    fc = tensors["fc.weight"].to(rotation.matrix)
    streams = fc.chunk(fc.shape[1] // len(rotation.norm), dim=1)
    absorbed = {"fc.weight": torch.cat([rotation.absorb(part) for part in streams], dim=1)}
    if not shared:
        return absorbed
    scale = tensors[EMBEDDING_NORM]
    for part in FUSED[QKV]:
        name = f"{PREFIX}self_attn.{part}.weight"
        embedded, hidden = tensors[name].to(rotation.matrix).chunk(2, dim=1)
        absorbed[name] = torch.cat([rotation.absorb(embedded, scale), hidden], dim=1)
    return absorbed | {EMBEDDING_NORM: torch.ones_like(scale)}


def _target_ids(files: HeadFiles, draft_vocab: int) -> Tensor:
    """The target's id of each draft id, [draft_vocab]; ValueError where it is none, or unclear."""
    weights, vocab = files.weights, files.shape.vocab_size
    if OFFSETS not in weights:
        if draft_vocab != vocab:
            raise ValueError(
                f"{files.folder} must hold {OFFSETS}, since draft_vocab_size is {draft_vocab} of "
                f"{vocab}"
            )
        return torch.arange(vocab)
    offsets = weights[OFFSETS].to(torch.int64)
    # Bounds first: an offset near the ends of int64 would wrap around when it is added.
    if bool(((offsets < -vocab) | (offsets > vocab)).any()):
        raise ValueError(f"{files.folder}: {OFFSETS} must stay within the vocabulary of {vocab}")
    ids = offsets + torch.arange(draft_vocab)
    if bool(((ids < 0) | (ids >= vocab)).any()):
        raise ValueError(f"{files.folder}: {OFFSETS} must stay within the vocabulary of {vocab}")
    if len(set(ids.tolist())) < draft_vocab:
        raise ValueError(f"{files.folder}: {OFFSETS} must lead to {draft_vocab} different tokens")
    if KEPT in weights and not torch.equal(weights[KEPT].nonzero().flatten(), ids.sort().values):
        raise ValueError(f"{files.folder}: {KEPT} must name the tokens that {OFFSETS} leads to")
    return ids


def _taps(files: HeadFiles, target: Shape) -> tuple[int, ...]:
    """Layers whose residual inputs the head reads; 2, L / 2 and L - 3 where config is silent.

    At the top of a config, as vLLM and speculators read it, an id is the layer whose input is
    read; in `eagle_config`, as SGLang and SpecForge read it, the layer whose output is.
    """
    layers, config = target.num_layers, files.config
    nested = files.section("eagle_config").get(TAPS)
    for listed in (config.get(TAPS), nested):
        if listed is not None and not isinstance(listed, list):
            raise ValueError(f"{files.folder}: {TAPS} must be a list, got {shown(listed)}")
    if (named := config.get(TAPS)) is not None:
        taps = tuple(named)
    elif nested is not None:
        taps = tuple(i + 1 if type(i) is int else i for i in nested)
    else:
        taps = (2, layers // 2, layers - 3)
    known = all(type(t) is int and 0 <= t < layers for t in taps)
    if not taps or not known or len(set(taps)) < len(taps):
        raise ValueError(
            f"{files.folder}: the head must read inputs of the target's layers 0 to {layers - 1}, "
            f"got {shown(list(taps))}"
        )
    return taps
