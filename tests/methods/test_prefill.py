"""What drafts reads a prompt filled up, and on a GPU as a graph: nothing comes out otherwise."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from methods.decode import Method, Output, generate
from methods.drafter import State
from methods.fused import attends
from methods.graph import GRAPHS
from methods.grow import TreeDrafter
from methods.hierarchical import HierarchicalDrafter
from methods.kv import KVCache
from methods.prefill import PREFILL_CHUNK, PREFILL_STEP, FirstChunk
from methods.recipe import Family, Parts
from methods.vanilla import Vanilla, VanillaDrafter
from methods.verify import Greedy
from tests.family import VOCAB
from tests.methods.parts import RECIPES, load, make_parts
from tests.methods.test_exact import LAB_FAMILY, SCHEMES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEP = PREFILL_STEP
LENGTHS = [1, 2, 3, STEP - 1, STEP, STEP + 1, STEP + 2, STEP + 3, 1024, 1025, 1026, 1500]
DRAFTING = ["eagle2", "eagle3", "chain", "hierarchical"]


def prompt_of(length: int, vocab: int = VOCAB) -> list[int]:
    return [(5 + 11 * i + i // 7) % vocab for i in range(length)]


def first_chunks(method: Method) -> Iterator[FirstChunk]:
    """Those of what drafts for a method."""
    drafter = method.drafter
    if isinstance(drafter, TreeDrafter):
        yield drafter._first
    if isinstance(drafter, HierarchicalDrafter):
        yield drafter.method._first
        yield from first_chunks(drafter.method)


def filling_up(method: Method, step: int = STEP) -> Method:
    """Let a method fill up as it does on a GPU."""
    for first in first_chunks(method):
        first.step = step
    return method


def decode(method: Method, prompt: list[int], *, limit: int = 12) -> Output:
    return generate(method, prompt, limit=limit, stop=lambda _: None)


def left_behind(method: Method) -> list[Tensor]:
    """Features, and what is decided of a method's caches and its drafter's."""
    drafter, n = method.drafter, method.kv.length
    own = [method.features[:n], method.kv.data[..., :n, :]]
    if isinstance(drafter, TreeDrafter):
        own.append(drafter.kv.data[..., : drafter.kv.length, :])
    if isinstance(drafter, HierarchicalDrafter):
        own += left_behind(drafter.method)
    return own


def cache(capacity: int) -> KVCache:
    return KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        capacity=capacity,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_a_prompts_beginning_is_read_in_whole_steps_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[list[int]] = []
    kv = cache(10)

    def note(tokens: Tensor) -> tuple[Tensor, ...]:
        read.append(tokens.tolist())
        return ()

    first = FirstChunk(note, kv)
    first.step = 4
    decided = []
    for n in (0, 1, 4, 5, 9, 10):
        kv.rewind(0)
        first(range(1, n + 1))
        decided.append(kv.length)
    assert decided == [0, 1, 4, 5, 9, 10]
    assert read == [
        [1, 0, 0, 0],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ]
    read.clear()
    monkeypatch.setattr("methods.prefill.PREFILL_CHUNK", 6)
    kv.rewind(0)
    first(range(1, 10))
    assert read == [[1, 2, 3, 4, 5, 6]]
    assert kv.length == 6


def test_where_there_are_no_graphs_nothing_is_filled_up_nor_captured() -> None:
    read: list[int] = []

    def note(tokens: Tensor) -> tuple[Tensor, ...]:
        read.append(len(tokens))
        return ()

    first = FirstChunk(note, cache(300))
    first.expect([3, 200])
    first(range(130))
    assert read == [130]


def test_a_chunk_is_a_whole_number_of_steps() -> None:
    assert PREFILL_CHUNK % PREFILL_STEP == 0


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_filled_up_leaves_the_same_behind(family: Family, name: str, length: int) -> None:
    target = load(family.target, SCHEMES["dense"], torch.float32)
    parts = make_parts(family, target=target, context=1600)
    plain, filled = RECIPES[name].method(parts), filling_up(RECIPES[name].method(parts))
    filled.prefill(prompt_of(1550))  # what another prompt left is not to be seen
    prompt = prompt_of(length)
    for method in (plain, filled):
        method.prefill(prompt)
    for one, other in zip(left_behind(plain), left_behind(filled), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.kv.data[..., : length - 1, :], filled.kv.data[..., : length - 1, :])
    inner = filled.drafter.method if isinstance(filled.drafter, HierarchicalDrafter) else filled
    assert inner.cached == prompt[:-1]
    assert inner.kv.length == length - 1
    assert inner.kv.scratch == 0


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("length", [2, STEP, STEP + 3, 1026])
def test_what_is_filled_up_drafts_the_same(family: Family, name: str, length: int) -> None:
    parts = make_parts(family, context=1600)  # in float64, where there are no near-ties
    prompt = prompt_of(length)
    filled = filling_up(RECIPES[name].method(parts))
    filled.prefill(prompt_of(1550))
    assert decode(filled, prompt) == decode(RECIPES[name].method(parts), prompt)


@pytest.mark.parametrize("length", [140, 188, 192])
def test_what_is_filled_up_ends_where_a_heads_cache_does(family: Family, length: int) -> None:
    parts = make_parts(family, context=204)
    method = filling_up(RECIPES["eagle2"].method(parts))
    assert isinstance(method.drafter, TreeDrafter)
    assert method.drafter.kv.capacity < 2 * STEP
    expected = decode(RECIPES["eagle2"].method(parts), prompt_of(length))
    assert decode(method, prompt_of(length)) == expected


def test_what_is_filled_up_ends_where_a_smaller_models_cache_does(family: Family) -> None:
    parts = make_parts(family, context=150)
    plain = decode(Vanilla().method(parts), prompt_of(140), limit=8)
    small = make_parts(family, target=parts.load(family.smaller().target)).target
    inner = Method(small, VanillaDrafter(), Greedy(), context=160)
    drafter = HierarchicalDrafter(inner, min_draft=3)
    method = filling_up(Method(parts.target, drafter, Greedy(), context=150))
    assert inner.kv.capacity < 2 * STEP
    assert decode(method, prompt_of(140), limit=8).token_ids == plain.token_ids


@pytest.mark.parametrize("name", ["eagle2", "eagle3"])
def test_a_prompts_pairs_are_read_once(
    family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = RECIPES[name].method(make_parts(family))
    state = method.prefill(prompt_of(60))
    drafter = method.drafter
    assert isinstance(drafter, TreeDrafter)
    read = drafter._draft
    fresh: list[int] = []

    def watched(tokens: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        fresh.append(len(features))
        return read(tokens, features)

    def again(state: State, *, end: int) -> None:
        raise AssertionError(f"pairs up to {end} are read again")

    monkeypatch.setattr(drafter, "_draft", watched)
    monkeypatch.setattr(drafter, "_read_pairs", again)
    method.step(state)
    assert fresh == [1]  # the newest, whose output the tree hangs from


# On a GPU, over the lab family.


@pytest.fixture(scope="module", params=list(SCHEMES))
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    target = load(LAB_FAMILY.target, SCHEMES["dense"], torch.float16, "cuda")
    scheme = SCHEMES[request.param]
    yield make_parts(LAB_FAMILY, target=target, draft_scheme=scheme, context=1600)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", DRAFTING)
def test_a_graph_of_a_prompt_leaves_what_calls_leave_bit_for_bit(parts: Parts, name: str) -> None:
    called, graphed = RECIPES[name].method(parts), RECIPES[name].method(parts)
    assert attends(called.kv.data)
    graphed.expect(LENGTHS)
    vocab = parts.target.shape.vocab_size
    for length in [1500, *LENGTHS, 600]:  # the last has a width of its own
        missed = GRAPHS.missed
        graphed.prefill(prompt_of(length, vocab))
        told = length in LENGTHS
        assert (GRAPHS.missed == missed) == told, length
        called.prefill(prompt_of(length, vocab))
        for one, other in zip(left_behind(called), left_behind(graphed), strict=True):
            assert torch.equal(one, other), length


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", DRAFTING)
def test_whether_lengths_are_told_decides_no_token_and_told_ones_miss_no_graph(
    parts: Parts, name: str
) -> None:
    told, untold = RECIPES[name].method(parts), RECIPES[name].method(parts)
    vocab = parts.target.shape.vocab_size
    told.warm_up()
    told.expect([40, 300])
    told.expect([700])  # as of a later turn, which nobody knew of before
    untold.warm_up()
    for length in (40, 300, 700, 299):
        prompt = prompt_of(length, vocab)
        missed = GRAPHS.missed
        given = decode(told, prompt, limit=60)
        assert GRAPHS.missed == missed, length
        assert decode(untold, prompt, limit=60) == given


@pytest.mark.gpu
@on_gpu
def test_a_length_that_is_known_is_captured_once(parts: Parts) -> None:
    method = RECIPES["hierarchical"].method(parts)
    before = GRAPHS.captured
    method.expect([300, 301, 310, 2])  # 299, 300, 309 and 1 tokens; 298, 299, 308 and no pairs
    assert GRAPHS.captured == before + 2 + 1
    method.expect([305])
    assert GRAPHS.captured == before + 3


@pytest.mark.gpu
@on_gpu
def test_a_prompt_is_read_while_the_device_is_behind(parts: Parts) -> None:
    # The host must wait for nothing: else what drafts is launched only when the target has read.
    method = RECIPES["hierarchical"].method(parts)
    method.warm_up()
    method.expect([1300])
    prompt = prompt_of(1300, parts.target.shape.vocab_size)
    for _ in range(2):  # the first compiles, and makes room for what is on its way
        torch.cuda.synchronize()  # noqa: TID251
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        behind = torch.cuda.Event()  # noqa: TID251
        behind.record()
        method.prefill(prompt)
    assert not behind.query()


@pytest.mark.parametrize("name", DRAFTING)
def test_a_later_turns_length_is_captured_as_of_an_empty_cache(family: Family, name: str) -> None:
    method = filling_up(RECIPES[name].method(make_parts(family, context=400)))
    read: list[tuple[int, int]] = []

    def watched(first: FirstChunk) -> None:
        whole = first._read

        def note(tokens: Tensor) -> tuple[Tensor, ...]:
            read.append((first._kv.length, len(tokens)))
            return whole(tokens)

        first._graphed, first._read = True, note  # type: ignore[assignment]

    chunks = list(first_chunks(method))
    for first in chunks:
        watched(first)
    decode(method, prompt_of(60))
    assert read == [(0, STEP)] * len(chunks)
    read.clear()
    method.expect([60, STEP + 30])
    assert read == [(0, 2 * STEP), (0, STEP)] * len(chunks)
    read.clear()
    method.expect([60, STEP + 30])
    decode(method, prompt_of(STEP + 30))
    assert read == [(0, 2 * STEP)] * len(chunks)
