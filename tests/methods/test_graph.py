"""Graphs give what calls give: the same bits, in every method, and nothing escapes them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from methods.decode import Method, Output, generate
from methods.graph import GRAPHS, Captured
from methods.recipe import Family, Parts, Recipe
from methods.vanilla import Vanilla
from quant.dense import Dense
from tests.methods.parts import RECIPES, load, make_parts

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = [0, 5, 17, 23, 42, 8, 61]


def test_elsewhere_than_on_a_gpu_a_function_simply_runs() -> None:
    calls = []

    def double(x: Tensor) -> tuple[Tensor]:
        calls.append(x.shape)
        return (2 * x,)

    captured = Captured(double, device=torch.device("cpu"))
    with GRAPHS.warm_up():
        captured(torch.ones(3))
    assert captured(torch.ones(4))[0].tolist() == [2, 2, 2, 2]
    assert calls == [(3,), (4,)]


def test_elsewhere_what_is_fetched_is_the_newest_calls_output() -> None:
    captured = Captured(lambda x: (x, 2 * x), device=torch.device("cpu"), fetched=1)
    captured(torch.tensor([1]))
    _, out = captured(torch.tensor([3, 4]))
    assert captured.fetch().tolist() == [6, 8]
    assert torch.equal(captured.fetch(), out)


def parts_of(family: Family, dtype: torch.dtype, *, draft_ids: Tensor | None = None) -> Parts:
    target = load(family.target, Dense(), dtype, "cuda")
    return make_parts(family, target=target, draft_ids=draft_ids)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def parts(request: pytest.FixtureRequest, family: Family) -> Iterator[Parts]:
    yield parts_of(family, request.param)


def decode(method: Method) -> Output:
    return generate(method, PROMPT, limit=100, stop=lambda _: None)


def called_and_captured(recipe: Recipe, parts: Parts) -> tuple[Output, Method]:
    """What calls give, once graphs have given the same and missed no step; and the method."""
    called, method = decode(recipe.method(parts)), recipe.method(parts)
    method.warm_up()
    method.expect([len(PROMPT)])
    missed = GRAPHS.missed
    assert decode(method) == called
    assert GRAPHS.missed == missed
    return called, method


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", RECIPES)
def test_graphs_give_what_calls_give_and_miss_no_step(parts: Parts, name: str) -> None:
    called, method = called_and_captured(RECIPES[name], parts)
    assert decode(method) == called


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["eagle2", "eagle3", "hierarchical"])
def test_graphs_of_a_cut_vocabulary_give_what_calls_give(family: Family, name: str) -> None:
    listed = torch.arange(0, 90, 2)
    parts = parts_of(family, torch.float32, draft_ids=listed)
    called, _ = called_and_captured(RECIPES[name], parts)
    assert called.token_ids == decode(Vanilla().method(parts)).token_ids


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", list(RECIPES)[1:])
def test_in_float32_every_method_gives_plain_decodings_tokens(family: Family, name: str) -> None:
    parts = parts_of(family, torch.float32)
    expected = decode(Vanilla().method(parts)).token_ids
    assert decode(RECIPES[name].method(parts)).token_ids == expected
