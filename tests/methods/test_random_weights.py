"""Weights that are drawn: right shapes and scales, the same every time, and lossless decoding."""

import math
from pathlib import Path

import pytest
import torch

from bench.build import ROOT, build
from methods.checkpoint import check_transformer
from methods.packer import ROWS
from methods.random_weights import RandomShard
from methods.recipe import Family, Recipe
from methods.vanilla import Vanilla
from methods.weights import Weights
from quant.dense import Dense
from quant.scheme import Scheme, stack
from tests.family import FAMILIES, family_config, llama_config
from tests.made_up import write_random, write_random_family
from tests.methods.parts import decode, load, make_parts
from tests.methods.test_lossless import METHODS, PROMPTS, SCHEMES, read

SHAPES = sorted(p for p in (ROOT / "models" / "random").iterdir() if p.is_dir())
# Parameters as published, in units of 10^9.
PUBLISHED = {"llama3_8b": 8.03, "llama3_70b": 70.55, "qwen25_7b": 7.62, "qwen3_8b": 8.19}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_random_family(tmp_path_factory.mktemp("made_up"))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    folder = ROOT / "models" / "random" / name
    check_transformer(folder)
    weights = Weights(folder)
    count = sum(math.prod(weights.spec(tensor).shape) for tensor in weights)
    assert round(count / 1e9, 2) == PUBLISHED[name]


@pytest.mark.parametrize("folder", SHAPES, ids=lambda folder: folder.name)
def test_a_shape_is_named_by_a_config_and_a_draw_alone(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "random_weights.json"]
    assert len(Weights(folder)) > 8


def test_a_tensor_is_the_same_every_time_and_another_by_name_and_seed(tmp_path: Path) -> None:
    config = llama_config()
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    first, second = (
        Weights(write_random(tmp_path / str(seed), config, "transformer", seed=seed))
        for seed in (1, 2)
    )
    assert torch.equal(first[name], Weights(tmp_path / "1")[name])
    assert not torch.equal(first[name], first[other])
    assert not torch.equal(first[name], second[name])


def test_scales_keep_a_stream_of_order_one(tmp_path: Path) -> None:
    config = llama_config(torch_dtype="float32", hidden_size=512, num_hidden_layers=12)
    folder = write_random(tmp_path / "deep", config, "transformer")
    model = load(folder, Dense(), torch.float32)
    text = torch.arange(64)[None] % 96
    read = model(text, torch.arange(64), model.cache(64), taps=(1, 11))
    early, late = (part.square().mean().sqrt().item() for part in read.features.chunk(2, dim=-1))
    assert 0.1 < early < late < 10
    assert 4 < model.logits(read.hidden).std().item() < 16


def test_tensors_are_drawn_in_the_dtype_of_the_config(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "m", llama_config(), "transformer")
    weights = Weights(folder)
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}
    assert torch.equal(weights["model.norm.weight"], torch.ones(128, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_drawn(tmp_path: Path, family: str) -> None:
    folder = write_random(tmp_path / "m", family_config(family, sliding_window=None), "transformer")
    model = load(folder, Dense(), torch.float32)
    assert model.shape == check_transformer(folder)


def test_nothing_is_drawn_to_look_at_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RandomShard, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was drawn")

    monkeypatch.setattr(RandomShard, "tensor", refuse)
    check_transformer(write_random(tmp_path / "m", llama_config(), "transformer"))


@pytest.mark.parametrize(
    "draw", ["{}", '{"seed": "x", "holds": "transformer"}', '{"seed": 0, "holds": "x"}']
)
def test_a_broken_draw_is_refused_by_its_name(tmp_path: Path, draw: str) -> None:
    folder = write_random(tmp_path / "m", llama_config(), "transformer")
    (folder / "random_weights.json").write_text(draw, encoding="utf-8")
    with pytest.raises(ValueError, match=r"random_weights\.json.* seed"):
        check_transformer(folder)


def test_weights_beside_a_draw_are_refused(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "m", llama_config(), "transformer")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="or weights, got both"):
        check_transformer(folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_packing_in_pieces_is_packing_whole(name: str) -> None:
    scheme = build(read("quant", name), Scheme, key="quant")  # type: ignore[type-abstract]
    if not scheme.by_row:
        pytest.skip("packed whole")
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    pieces = stack([scheme.pack(rows) for rows in weight.split(7)])
    whole = scheme.pack(weight)
    assert pieces is not None
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[key], whole[key]) for key in whole)
    assert ROWS > 24


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_builds_in_every_scheme_and_speculation_is_lossless(
    made_up: Family, scheme: str
) -> None:
    built = build(read("quant", scheme), Scheme, key="quant").unsearched  # type: ignore[type-abstract]
    parts = make_parts(made_up, scheme=built, draft_scheme=None if built.needs_absmax else built)
    expected = decode(Vanilla(), parts, PROMPTS[0])
    # Every method over dense weights; test_lossless has all pairs, over weights from files.
    for name in METHODS if scheme == "dense" else ["eagle2"]:
        recipe = build(read("method", name), Recipe, key="method")  # type: ignore[type-abstract]
        recipe.check(made_up)
        assert decode(recipe, parts, PROMPTS[0]) == expected, name
