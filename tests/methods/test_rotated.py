"""A rotated decoder is the same function: every family, tied and not, in float64."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.checkpoint import build_transformer, check_transformer
from methods.packer import Packer
from methods.rotated import Rotated
from methods.transformer import Shape, Transformer
from methods.weights import Weights
from quant.dense import Dense
from quant.rotate import random_rotation
from tests.family import FAMILIES, family_config, write_llama

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35]])


class Doubled(Mapping[str, Tensor]):
    """Weights in float64, so that no rounding to a file's dtype stands between."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].double()

    def __iter__(self):  # noqa: ANN204
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def model(weights: Mapping[str, Tensor], shape: Shape) -> Transformer:
    packer = Packer(weights, Dense(), dtype=torch.float64, device=torch.device("cpu"))
    return build_transformer(shape, packer, Dense())


def logits(model: Transformer) -> Tensor:
    n = TOKENS.shape[1]
    return model.logits(model(TOKENS, torch.arange(n), model.cache(n)).hidden)


@pytest.fixture(scope="module", params=[(f, t) for f in sorted(FAMILIES) for t in (False, True)])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Rotated]:
    family, tied = request.param
    config = family_config(family, tie_word_embeddings=tied)
    folder = write_llama(tmp_path_factory.mktemp("plain") / "model", config, seed=1)
    shape = check_transformer(folder)
    rotated = Rotated(
        Doubled(Weights(folder)),
        shape,
        stream=random_rotation(shape.hidden_size, 0),
        heads=random_rotation(shape.head_dim, 1),
    )
    return folder, rotated


def test_logits_are_those_of_the_decoder_before(pair: tuple[Path, Rotated]) -> None:
    folder, rotated = pair
    plain = logits(model(Weights(folder), check_transformer(folder)))
    turned = logits(model(rotated, rotated.shape))
    # What is rounded next is kept in float32, so that is what may be lost.
    torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-5)


def test_the_stream_is_turned_by_the_matrix_that_is_told(pair: tuple[Path, Rotated]) -> None:
    _, rotated = pair
    name = "model.embed_tokens.weight"
    expected = rotated.weights[name] @ rotated.stream.matrix
    torch.testing.assert_close(rotated[name], expected)


def test_norms_of_the_stream_weigh_nothing_and_those_of_heads_stay(
    pair: tuple[Path, Rotated],
) -> None:
    _, rotated = pair
    for name in rotated:
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert bool((rotated[name] == 1).all()), name
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(rotated[name], rotated.weights[name]), name


def test_every_projection_is_changed_by_it(pair: tuple[Path, Rotated]) -> None:
    _, rotated = pair
    for name in rotated.weights:
        if name.endswith("_proj.weight"):
            assert not torch.allclose(rotated[name].double(), rotated.weights[name]), name
