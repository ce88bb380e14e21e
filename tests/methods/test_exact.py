"""Greedy speculation that gives plain decoding's tokens bit for bit, and what that rests on."""

from collections.abc import Iterator

import pytest
import torch

from bench.build import ROOT
from bench.measure import random_tree
from bench.nodes import in_a_tree, in_chains, one_by_one, unequal
from methods.decode import generate
from methods.kv import KVCache
from methods.recipe import Family
from methods.transformer import Transformer
from methods.tree import Tree
from quant.dense import Dense
from quant.kernels.exact import Tiles
from quant.scheme import Scheme
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.methods.parts import RECIPES, load, make_parts

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = [0, 5, 17, 23, 42, 8, 61, 3, 3, 9, 14]
SCHEMES: dict[str, Scheme] = {
    "dense": Dense(),
    "w4a16": W4A16(group_size=128, symmetric=True, range_search=False),
    "w8a8": W8A8(smooth_alpha=None),
}
LAB = ROOT / "models" / "lab"
LAB_FAMILY = Family(
    target=LAB / "target",
    heads={"eagle2": LAB / "target-eagle2", "eagle3": LAB / "target-eagle3"},
    small=Family(target=LAB / "small", heads={"eagle2": LAB / "small-eagle2"}),
)


def test_every_layer_of_an_exact_target_is_and_its_output_projection(family: Family) -> None:
    exact = load(family.target, Dense(), exact=True)
    plain = load(family.target, Dense())
    assert exact.linears.keys() == plain.linears.keys()
    assert "lm_head" in exact.linears
    assert all(isinstance(layer, Tiles) for layer in exact.linears.values())
    assert not any(isinstance(layer, Tiles) for layer in plain.linears.values())
    assert exact.weight_bytes == plain.weight_bytes


@pytest.mark.parametrize("name", list(RECIPES)[1:])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_a_prompt_is_read_alike_whatever_drafts(
    family: Family, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first thing that bit-equal tokens rest on: the same cache, bit for bit, behind the prompt.
    monkeypatch.setattr("methods.prefill.PREFILL_CHUNK", chunk)
    parts = make_parts(family)
    plain, other = RECIPES["vanilla"].method(parts), RECIPES[name].method(parts)
    plain.prefill(PROMPT)
    other.prefill(PROMPT)
    read = len(PROMPT) - 1
    assert plain.kv.length == other.kv.length == read
    assert torch.equal(plain.kv.data[..., :read, :], other.kv.data[..., :read, :])


def filled(target: Transformer, tokens: list[int], room: int) -> KVCache:
    kv = target.cache(len(tokens) + room)
    positions = torch.arange(len(tokens), device=target.device)
    target(torch.tensor([tokens], device=target.device), positions, kv)
    kv.advance(len(tokens))
    return kv


def test_nodes_are_the_same_however_they_are_read(family: Family) -> None:
    target = load(family.target, Dense(), exact=True)
    kv = filled(target, PROMPT, 20)
    tree = random_tree(20, target.shape.vocab_size, seed=1, device=target.device)
    whole = in_a_tree(target, kv, tree)
    assert kv.length == len(PROMPT)
    for other in (in_chains(target, kv, tree), one_by_one(target, kv, tree)):
        assert torch.allclose(whole, other, rtol=1e-9, atol=1e-9)
        assert not bool(other.isnan().any())
    assert kv.length == len(PROMPT)


def test_one_bit_is_a_difference_and_so_is_the_sign_of_zero() -> None:
    one = torch.zeros(3, 5)
    other = one.clone()
    assert unequal(one, other) == 0
    other[1, 2] = -0.0
    other[2, 4] = torch.finfo(torch.float32).smallest_normal
    assert unequal(one, other) == 2


# On a GPU, over the lab family.


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param


@pytest.fixture(scope="module", params=list(SCHEMES))
def target(request: pytest.FixtureRequest, dtype: torch.dtype) -> Iterator[Transformer]:
    yield load(LAB_FAMILY.target, SCHEMES[request.param], dtype, "cuda", exact=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("context", [1, 255, 300])
def test_a_nodes_bits_do_not_depend_on_what_is_read_with_it(
    target: Transformer, context: int
) -> None:
    tokens = [(7 * i) % target.shape.vocab_size for i in range(context)]
    kv = filled(target, tokens, 60)
    tree = random_tree(60, target.shape.vocab_size, seed=context, device=target.device)
    chain = Tree(tokens=tree.tokens, parents=torch.arange(-1, 59, device=target.device))
    for nodes in (tree, chain):
        whole = in_a_tree(target, kv, nodes)
        assert bool(whole.isfinite().all())
        assert unequal(whole, in_chains(target, kv, nodes)) == 0
        assert unequal(whole, one_by_one(target, kv, nodes)) == 0


@pytest.mark.gpu
@on_gpu
def test_without_it_some_nodes_bits_do_depend() -> None:
    # What the tests above are worth: the same reads of the same model as it comes.
    target = load(LAB_FAMILY.target, Dense(), torch.float32, "cuda")
    kv = filled(target, PROMPT, 60)
    tree = random_tree(60, target.shape.vocab_size, seed=0, device=target.device)
    assert unequal(in_a_tree(target, kv, tree), one_by_one(target, kv, tree)) > 0


@pytest.mark.gpu
@on_gpu
def test_every_method_gives_plain_decodings_tokens_bit_for_bit(target: Transformer) -> None:
    parts = make_parts(LAB_FAMILY, target=target, context=400)
    methods = {name: recipe.method(parts) for name, recipe in RECIPES.items()}
    for method in methods.values():
        method.warm_up()
    for seed in range(4):
        prompt = [(seed + 11 * i) % target.shape.vocab_size for i in range(40 + seed)]
        given = {
            name: generate(method, prompt, limit=200, stop=lambda _: None).token_ids
            for name, method in methods.items()
        }
        assert all(tokens == given["vanilla"] for tokens in given.values()), seed
