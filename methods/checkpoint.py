"""A checkpoint folder -> our modules, in any scheme."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.architecture import (
    EMBEDDING,
    OUTPUT,
    read_shape,
    require_layers,
    stored_tensors,
)
from methods.drafter import Mark, unmarked
from methods.head_shapes import head_method
from methods.packer import Packer
from methods.transformer import Shape, Transformer
from methods.values import naming, read_flag
from methods.weights import Weights, read_config
from quant.formats import Quantization, read_quantization
from quant.scheme import QuantLinear, Scheme


def check_transformer(folder: Path) -> Shape:
    """Check a model's folder without reading its weights; give its sizes."""
    config = read_config(folder)
    weights = Weights(folder)
    if (method := head_method(config, weights.keys())) is not None:
        raise ValueError(
            f"{folder} must be a whole model, got a draft head, which model.heads.{method} takes"
        )
    quantization = _quantization(config, weights)
    with naming(folder):
        shape = read_shape(config)
        require_layers(shape, weights)
        expected, optional = stored_tensors(shape, quantization)
    weights.require(expected, optional=optional)
    return shape


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a folder's layers will be in. label, lm_head: for tables."""

    scheme: Scheme
    label: str
    lm_head: str


def stored_in(folder: Path, scheme: Scheme, lm_head: Scheme) -> Stored:
    """Tell what a folder's layers will be in when these schemes are asked for.

    Raises ValueError where layers are quantised already and another scheme is asked for.
    """
    config = read_config(folder)
    quantization = _quantization(config, Weights(folder))
    if quantization is None:
        return Stored(scheme=scheme, label=scheme.label, lm_head=lm_head.label)
    # Where it is tied, the output is the embedding, always dense.
    with naming(folder / "config.json"):
        tied = read_flag(config, "tie_word_embeddings")
    output = None if tied else quantization.layout("lm_head")
    for asked, is_stored in ((scheme, True), (lm_head, output is not None)):
        if is_stored and not asked.as_stored:
            raise ValueError(
                f"{folder}: layers are stored in {quantization.label}, so their scheme must be "
                f"`checkpoint`, got {asked.label}"
            )
    return Stored(
        scheme=quantization.scheme,
        label=quantization.label,
        lm_head=lm_head.label if output is None else output.scheme.label,
    )


def require_dense(folder: Path) -> Shape:
    """Check a folder whose layers are not quantised, by any sign; give its sizes."""
    shape = check_transformer(folder)
    if (found := quantization_of(folder)) is not None:
        raise ValueError(f"{folder}: layers must be dense to be quantised, got {found.label}")
    if shape.tied:
        with naming(folder):
            _require_one_end(Weights(folder))
    return shape


def quantization_of(folder: Path) -> Quantization | None:
    """Tell how a folder's layers are stored, by any sign; None where they are dense."""
    return _quantization(read_config(folder), Weights(folder))


def build_transformer(shape: Shape, packer: Packer, lm_head: Scheme) -> Transformer:
    """Make the model from a packer's weights. lm_head: the scheme of the output projection."""
    if shape.tied:
        _require_one_end(packer.weights)
    head = packer.of(lm_head)
    return Transformer(
        shape,
        embedding=packer.tensor(EMBEDDING),
        blocks=[packer.block(layer, shape) for layer in range(shape.num_layers)],
        norm=packer.norm("model.norm.weight", shape.norm_eps),
        lm_head=head.linear("lm_head", _output_module(shape)),
    ).eval()


def load_transformer(
    folder: Path,
    *,
    scheme: Scheme,
    lm_head: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    absmax: Mapping[str, Tensor] | None = None,
    mark: Mark = unmarked,
    exact: bool = False,
) -> Transformer:
    """Read a Llama folder into a model whose linear layers are in `scheme`.

    mark, exact: a `Packer`'s.
    """
    shape = check_transformer(folder)
    packer = open_packer(
        folder, scheme, dtype=dtype, device=device, absmax=absmax, mark=mark, exact=exact
    )
    with naming(folder):
        return build_transformer(shape, packer, lm_head)


def load_lm_head(
    folder: Path,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows: Tensor | None = None,
) -> QuantLinear:
    """Read a folder's output projection alone, in a scheme of its own. rows: None = all.

    Raises ValueError where it is stored quantised and another scheme is asked for.
    """
    packer = open_packer(folder, scheme, dtype=dtype, device=device)
    module = _output_module(read_shape(read_config(folder)))
    stored = None if packer.quantization is None else packer.quantization.layout(module)
    if stored is not None and not scheme.as_stored:
        raise ValueError(
            f"{folder}: lm_head is stored in {stored.scheme.label}, so a copy's scheme must be "
            f"`checkpoint`, got {scheme.label}"
        )
    return packer.linear("lm_head", module, rows=rows)


def open_packer(
    folder: Path,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    absmax: Mapping[str, Tensor] | None = None,
    mark: Mark = unmarked,
    exact: bool = False,
) -> Packer:
    """Make a packer of a folder's weights, however they are stored."""
    weights = Weights(folder, device=device)
    quantization = _quantization(read_config(folder), weights)
    return Packer(
        weights,
        scheme,
        dtype=dtype,
        device=device,
        quantization=quantization,
        absmax=absmax,
        mark=mark,
        exact=exact,
    )


def _quantization(config: Mapping[str, Any], weights: Weights) -> Quantization | None:
    with naming(weights.folder):
        return read_quantization(config, weights.keys())


def _output_module(shape: Shape) -> str:
    return (EMBEDDING if shape.tied else OUTPUT).removesuffix(".weight")


def _require_one_end(weights: Mapping[str, Tensor]) -> None:
    """Check that a tied model's file has no output projection but a copy of its embedding.

    Some versions of transformers would take such a projection, others the embedding.
    """
    if OUTPUT in weights and not bool((weights[OUTPUT] == weights[EMBEDDING]).all()):
        raise ValueError(
            f"{OUTPUT} must be absent or equal {EMBEDDING} where tie_word_embeddings is true, got "
            "other values"
        )
