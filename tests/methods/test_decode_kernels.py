"""The kernels of a decode step against plain torch: on a GPU, or interpreted on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import fused
from methods.expansion import Expansion, Level
from methods.kernels import reference
from methods.rope import Rope, rotate
from quant.grid import round_tokens

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter's matrix product knows no bfloat16.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * ON_GPU
# The interpreter takes seconds for what a GPU does at once.
FEW = slice(None if ON_GPU else 2)
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}

if INTERPRETED or ON_GPU:
    from methods.kernels import (
        attention,
        best,
        commit,
        expansion,
        gate,
        join,
        norm,
        rope_write,
        tree,
    )
    from quant.kernels import w8a8_triton
    from quant.kernels.tokens_triton import round_rows as round_in_one_pass

kernel = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="needs a CUDA device or Triton's interpreter"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def base_of(length: int) -> Tensor:
    return torch.tensor([length], device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_parents(n: int) -> Tensor:
    """Mostly bushy, now and then a longer path."""
    parents = [-1] + [int(torch.randint(max(0, i - 4), i, ())) for i in range(1, n)]
    return torch.tensor(parents, device=DEVICE)


def near(out: Tensor, expected: Tensor) -> bool:
    """Whether the error is that of a few roundings to the dtype of `out`."""
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    return bool(error < EPSILON[out.dtype])


def exact_attention(
    queries: Tensor, cache: Tensor, base: int, scratch: int, ancestors: Tensor | None
) -> Tensor:
    n = len(queries)
    mask = torch.ones(n, scratch + n, dtype=torch.bool).tril(scratch)
    if ancestors is not None:
        mask = torch.zeros(n, scratch + n, dtype=torch.bool)
        for node, path in enumerate(ancestors.tolist()):
            mask[node, [slot for slot in path if slot >= 0]] = True
    seen = torch.cat([torch.ones(n, base, dtype=torch.bool), mask], dim=1).to(queries.device)
    shared = queries.shape[1] // cache.shape[1]
    used = cache[:, :, : base + scratch + n].double().repeat_interleave(shared, dim=1)
    scores = queries.double().transpose(0, 1) @ used[0].mT / queries.shape[2] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ used[1]).transpose(0, 1).flatten(1)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "heads", "groups", "dim", "base", "scratch"),
    [
        (7, 8, 1, 32, 250, 3),
        (1, 4, 4, 64, 0, 0),
        (1, 4, 1, 128, 256, 0),
        (13, 4, 1, 64, 0, 0),
        (1, 8, 1, 32, 255, 0),
        (70, 2, 2, 32, 300, 0),
        (5, 8, 2, 64, 511, 9),
    ][FEW],
)
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_attention_is_that_of_float64(
    n: int,
    heads: int,
    groups: int,
    dim: int,
    base: int,
    scratch: int,
    dtype: torch.dtype,
    shape: str,
) -> None:
    queries = draw(n, heads, dim, dtype=dtype)
    cache = draw(2, groups, base + scratch + n + 5, dim, dtype=dtype)
    cache[:, :, base + scratch + n :] = torch.nan  # slots that nobody wrote may hold anything
    ancestors = None
    if shape == "tree":
        parents = random_parents(scratch + n)
        ancestors = fused.ancestry(parents, scratch + n)[2][scratch:].contiguous()
    out = attention.attend(queries, cache, base_of(base), scratch, ancestors=ancestors)
    assert near(out, exact_attention(queries, cache, base, scratch, ancestors))


@kernel
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 1, 64), (2, 2, 32), (8, 2, 128)][FEW])
@pytest.mark.parametrize("length", [250, 60, 520, 1][FEW])
def test_a_node_is_bit_equal_alone_in_a_chain_and_in_a_tree(
    heads: int, groups: int, dim: int, dtype: torch.dtype, length: int
) -> None:
    n = 23 if ON_GPU else 9
    parents = random_parents(n)
    bases = {0, length // 2} if ON_GPU else {length - 3}
    paths = fused.ancestry(parents, n)[2]
    queries = draw(n, heads, dim, dtype=dtype)
    cache = draw(2, groups, length + n, dim, dtype=dtype)
    whole = attention.attend(queries, cache, base_of(length), 0, ancestors=paths)
    for node in [0, n // 2, n - 1] if ON_GPU else [n - 1]:
        path = paths[node][paths[node] >= 0].long()
        line = torch.cat([torch.arange(length, device=DEVICE), length + path])
        decided = cache[:, :, line].contiguous()
        for base in bases | {length, len(line) - 1}:
            rest = len(line) - base  # read in order: all in one pass, and the last one alone
            chain = torch.cat([draw(rest - 1, heads, dim, dtype=dtype), queries[node, None]])
            one = attention.attend(chain, decided, base_of(base), 0, ancestors=None)[-1]
            own = queries[node, None]
            alone = attention.attend(own, decided, base_of(base), rest - 1, ancestors=None)[0]
            assert torch.equal(one, whole[node])
            assert torch.equal(alone, whole[node])


def attend_by(
    few: int,
    queries: Tensor,
    cache: Tensor,
    base: int,
    scratch: int = 0,
    *,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Attend with launches that are fine up to `few` programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "FEW", few)
        return attention.attend(queries, cache, base_of(base), scratch, ancestors=ancestors)


COARSE, FINE = 0, 10**9
CONTEXTS = [1, 63, 64, 65, 255, 256, 257, 300, 1000]
# 2,100 keys are more than are added at once.
DEEP = [(1, 1), (3, 64), (70, 255), (70, 1000), (130, 40), (300, 257), (20, 2100)]


@kernel
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_fine_and_coarse_launches_give_the_same_bits(
    context: int, shape: str, dtype: torch.dtype
) -> None:
    n, heads, groups, dim = 9, 4, 2, 32
    queries, cache = (
        draw(n, heads, dim, dtype=dtype),
        draw(2, groups, context + n, dim, dtype=dtype),
    )
    ancestors = None if shape == "chain" else fused.ancestry(random_parents(n), n)[2]
    fine = attend_by(FINE, queries, cache, context, ancestors=ancestors)
    coarse = attend_by(COARSE, queries, cache, context, ancestors=ancestors)
    assert torch.equal(fine, coarse)
    assert near(fine, exact_attention(queries, cache, context, 0, ancestors))


@kernel
@pytest.mark.parametrize("few", [COARSE, FINE])
@pytest.mark.parametrize(("n", "context"), DEEP)
def test_the_last_of_a_path_is_bit_equal_however_much_of_it_is_decided(
    n: int, context: int, few: int
) -> None:
    heads, groups, dim, dtype = 2, 1, 32, torch.float16
    queries, cache = (
        draw(n, heads, dim, dtype=dtype),
        draw(2, groups, context + n, dim, dtype=dtype),
    )
    last, other = queries[-1:], FINE - few
    alone = attend_by(other, last, cache, context + n - 1)
    assert torch.equal(attend_by(few, last, cache, context, n - 1), alone)
    path = torch.arange(n, dtype=torch.int32, device=DEVICE)[None]
    assert torch.equal(attend_by(few, last, cache, context, n - 1, ancestors=path), alone)
    few_rows = queries[-3:]
    begin = n - len(few_rows)
    assert torch.equal(attend_by(few, few_rows, cache, context, begin)[-1:], alone)
    expected = exact_attention(last, cache, context, n - 1, None)
    assert near(alone, expected)


@kernel
def test_a_launch_turns_coarse_without_a_change_of_bits() -> None:
    heads, groups, dim, dtype = 16, 1, 32, torch.float16
    queries, cache = draw(9, heads, dim, dtype=dtype), draw(2, groups, 140, dim, dtype=dtype)
    whole = attend_by(COARSE, queries, cache, 120)
    for n in (1, 4, 5, 8, 9):  # a tile holds four nodes, and 2 programs are fine
        assert torch.equal(attend_by(2, queries[:n], cache, 120), whole[:n])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("context", [*CONTEXTS, 512, 2048, 8192])
def test_a_node_of_a_large_tree_is_bit_equal_by_fine_and_coarse_launches(
    context: int, heads: int, dtype: torch.dtype
) -> None:
    n, groups, dim = 60, 8, 128
    queries, cache = (
        draw(n, heads, dim, dtype=dtype),
        draw(2, groups, context + n, dim, dtype=dtype),
    )
    paths = fused.ancestry(random_parents(n), n)[2]
    whole = attend_by(COARSE, queries, cache, context, ancestors=paths)
    assert torch.equal(attend_by(FINE, queries, cache, context, ancestors=paths), whole)
    assert near(whole, exact_attention(queries, cache, context, 0, paths))
    for node in (0, 7, n - 1):
        path = paths[node][paths[node] >= 0].long()
        line = torch.cat([torch.arange(context, device=DEVICE), context + path])
        decided = cache[:, :, line].contiguous()
        chain = queries[path].contiguous()
        for few in (FINE, COARSE):
            alone = attend_by(few, queries[node, None], decided, len(line) - 1)
            assert torch.equal(alone[0], whole[node])
            assert torch.equal(attend_by(few, chain, decided, context)[-1], whole[node])
        for some in (2, 8, 16, 32):
            rows = torch.arange(node, node + some, device=DEVICE) % n
            read = attend_by(FINE, queries[rows], cache, context, ancestors=paths[rows])
            assert torch.equal(read[0], whole[node])


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 32), (8, 2, 64), (7, 1, 128)])
def test_rope_write_rounds_as_torch_does(
    heads: int, groups: int, dim: int, dtype: torch.dtype, normed: bool, biased: bool
) -> None:
    n, base, scratch = 5, 3, 2
    qkv = draw(n, (heads + 2 * groups) * dim, dtype=dtype)
    bias = draw(qkv.shape[1], dtype=dtype) if biased else None
    weight = draw(heads + groups, 1, dim, dtype=dtype) if normed else None
    positions = torch.tensor([9, 4, 7, 4, 11], device=DEVICE)
    table = Rope(theta=10000.0).angles(torch.arange(20, device=DEVICE), dim, dtype)
    cache = draw(2, groups, 15, dim, dtype=dtype)
    before = cache.clone()
    queries = rope_write.rope_write(
        qkv, *table, positions, cache, base_of(base), scratch, norm=weight, eps=1e-6, bias=bias
    )

    fused_heads = (qkv if bias is None else qkv + bias).view(1, n, -1, dim).transpose(1, 2)
    turning = fused_heads[:, : heads + groups]
    if weight is not None:
        turning = F.rms_norm(turning, (dim,), None, 1e-6) * weight
    turned = rotate(turning, Rope(theta=10000.0).angles(positions, dim, dtype))[0]
    first, end = base + scratch, base + scratch + n
    # A norm's own sum may be off by its last bit; without it all is equal but a fused product.
    same = near if normed or dtype == torch.float32 else torch.equal
    assert same(queries, turned[:heads].transpose(0, 1).contiguous())
    assert same(cache[0, :, first:end].contiguous(), turned[heads:].contiguous())
    assert torch.equal(cache[1, :, first:end], fused_heads[0, heads + groups :])
    for part in (slice(0, first), slice(end, None)):
        assert torch.equal(cache[:, :, part], before[:, :, part])


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("n", "width"), [(1, 96), (5, 512), (3, 5120)])
def test_add_norm_is_a_sum_then_a_norm(n: int, width: int, added: bool, dtype: torch.dtype) -> None:
    x, weight = draw(n, width, dtype=dtype), draw(width, dtype=dtype)
    residual = draw(n, width, dtype=dtype) if added else None
    normed, summed = norm.add_norm(x, residual, weight, 1e-5)
    total = x if residual is None else x + residual
    assert torch.equal(summed, total)
    assert near(normed, F.rms_norm(total.double(), (width,), weight.double(), 1e-5))


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_after_the_norm_is_that_of_the_grid(dtype: torch.dtype) -> None:
    x, residual, weight = (draw(4, 640, dtype=dtype) for _ in range(3))
    x[2] = residual[2] = 0  # a row without a scale
    tokens, summed = norm.add_norm_round(x, residual, weight[0], 1e-5)
    expected = round_tokens(norm.add_norm(x, residual, weight[0], 1e-5)[0])
    assert torch.equal(tokens.codes, expected.codes)
    assert torch.equal(tokens.scale, expected.scale)
    assert torch.equal(summed, x + residual)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 96), (3, 5000)])
def test_a_heads_rows_are_joined_and_added_as_torch_does(
    n: int, width: int, dtype: torch.dtype
) -> None:
    table, hidden, bias = (
        draw(*shape, dtype=dtype) for shape in [(9, width), (n, width), (width,)]
    )
    tokens = torch.tensor([8, 0, 5], device=DEVICE)[:n]
    joined = torch.cat([table[tokens], hidden], dim=1)
    assert torch.equal(join.join(table, tokens, hidden), joined)
    assert torch.equal(join.add(hidden, table[:n]), hidden + table[:n])
    assert torch.equal(join.add(hidden, bias), hidden + bias)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "inner"), [(1, 64), (3, 1500)])
def test_silu_mul_gates(n: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = draw(n, 2 * inner, dtype=dtype) * 4
    first, second = gate_up.double().chunk(2, dim=-1)
    assert near(gate.silu_mul(gate_up), F.silu(first) * second)


def with_many_equals(m: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Logits of few values, both zeros among them, a row's first half impossible."""
    logits = (draw(m, vocabulary) * 4).round().to(dtype) / 2
    logits[0, : vocabulary // 2] = -torch.inf
    return logits


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "vocabulary", "k"),
    [
        (1, 40, 1),
        (3, 5000, 10),
        (2, 4097, 32),
        (1, 16, 16),
        (2, 6151, 13),
        (1, 2304, 300),  # more than a block has chunks, and than the last block has tokens
        *[(10, 128256, 10), (64, 32003, 1), (1, 128256, 16)] * ON_GPU,
    ],
)
def test_the_best_are_those_of_a_stable_sort(
    m: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    equals = with_many_equals(m, vocabulary, dtype)
    for logits in (equals, draw(m, vocabulary, dtype=dtype)):
        logprobs, ids = best.best(logits, k)
        expected = logits.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :k])
        scores = logits.double().log_softmax(dim=-1).gather(-1, ids)
        torch.testing.assert_close(logprobs.double(), scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(best.argmax(logits), expected.indices[:, 0])


@kernel
@pytest.mark.parametrize("k", range(1, 17))
def test_the_best_of_tokens_that_are_all_equal_are_the_first(k: int) -> None:
    logits = torch.zeros(1, 2100, dtype=torch.float16, device=DEVICE)
    logits[0, ::2] = -0.0
    assert best.best(logits, k)[1].tolist() == [list(range(k))]


@kernel
def test_wide_keys_order_half_precision_as_narrow_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = with_many_equals(2, 5000, torch.float16)
    narrow = best.best(logits, 10)
    monkeypatch.setattr(best, "NARROW", 0)
    for got, expected in zip(best.best(logits, 10), narrow, strict=True):
        assert torch.equal(got, expected)


@kernel
def test_a_certain_token_has_no_probability_above_one() -> None:
    logits = torch.zeros(1, 3000, device=DEVICE)
    logits[0, 2999] = 90
    logprobs, ids = best.best(logits, 2)
    assert ids.tolist() == [[2999, 0]]
    assert logprobs[0, 0] == 0


def expanded(
    expand: Callable[..., Level],
    scores: Tensor,
    logprobs: Tensor,
    *,
    kept: Tensor | None,
    deep: int,
    column: int,
) -> list[Tensor]:
    """Everything that `expand` gives for a level behind 3 other nodes."""
    n, k = logprobs.shape
    integers, first, width = torch.arange(2 * n, device=DEVICE).view(2, n), 3, 1100
    level = Level(
        tokens=integers[0],
        positions=20 + integers[0],
        places=integers[1] if n > 1 else torch.full((1,), -1, device=DEVICE),
        scores=scores,
        hidden=torch.empty(n, width, device=DEVICE),
        ancestors=torch.arange(n * deep, dtype=torch.int32, device=DEVICE).view(n, deep),
    )
    found = Expansion.empty(first + n * k + 2, DEVICE)
    for values in (found.tokens, found.parents, found.scores):
        values.fill_(-7)
    torch.manual_seed(1)
    ids, output = torch.randint(0, 90, (n, k), device=DEVICE), draw(n, width, dtype=torch.float16)
    out = expand(level, found, output, logprobs, ids, kept, first=first, column=column, slot=11 + n)
    return [*vars(out).values(), *vars(found).values()]


@kernel
@pytest.mark.parametrize("k", range(1, 17))
@pytest.mark.parametrize("below_root", [False, True])
@pytest.mark.parametrize(("mapped", "tied"), [(False, True), (True, False)])
def test_a_level_expands_as_by_a_stable_sort(
    k: int, below_root: bool, mapped: bool, tied: bool
) -> None:
    n = 1 if below_root else k
    scores = torch.zeros(1, device=DEVICE) if below_root else -draw(k).abs()
    logprobs = -draw(n, k).abs()
    if tied:
        scores, logprobs = scores.round(), logprobs.round()
        logprobs[-1, k // 2 :] = -torch.inf
    logprobs = logprobs.sort(dim=-1, descending=True).values
    kept = torch.randint(0, 1000, (90,), device=DEVICE) if mapped else None
    for deep, column in ((5, 3), (4, 4)):  # within a path, and behind the longest
        settings = {"kept": kept, "deep": deep, "column": column}
        got = expanded(expansion.expand, scores, logprobs, **settings)
        expected = expanded(reference.expand, scores, logprobs, **settings)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@kernel
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10, 16])
def test_pruning_keeps_what_a_stable_sort_keeps(k: int, tied: bool) -> None:
    parents, scores = [torch.full((k,), -1, device=DEVICE)], [-draw(k).abs()]
    for _ in range(2):
        earlier = torch.cat(scores)
        newest = torch.arange(len(earlier), device=DEVICE)[-k:]
        parents.append(newest.repeat_interleave(k))
        scores.append(earlier[parents[-1]] - draw(k * k).abs())
    made = Expansion(
        tokens=torch.randint(0, 1000, (k + 2 * k * k,), device=DEVICE),
        parents=torch.cat(parents),
        scores=(torch.cat(scores) * 2).round() if tied else torch.cat(scores),
    )
    root = torch.tensor([1234], device=DEVICE)
    for keep in {1, k, 2 * k, k + k * k, k + 2 * k * k}:
        got = expansion.prune(root, made, keep=keep)
        expected = reference.prune(root, made, keep=keep)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


@kernel
@pytest.mark.parametrize("n", [1, 2, 17, 60])
def test_ancestry_is_that_of_the_tree(n: int) -> None:
    parents = random_parents(n)
    for got, expected in zip(
        tree.ancestry(parents, n), reference.ancestry(parents.cpu(), n), strict=True
    ):
        assert torch.equal(got.cpu(), expected)


@kernel
@pytest.mark.parametrize("n", [1, 2, 17, 60])
def test_the_walk_steps_down_as_the_plain_one_does(n: int) -> None:
    parents = random_parents(n)
    # Siblings' tokens differ; a small vocabulary of picks makes every length of path occur.
    tokens = torch.tensor([int((parents[:i] == parents[i]).sum()) for i in range(n)], device=DEVICE)
    for _ in range(5):
        picked = torch.randint(0, 2, (n,), device=DEVICE)
        expected = reference.walk(tokens.cpu(), parents.cpu(), picked.cpu())
        assert torch.equal(tree.walk(tokens, parents, picked).cpu(), expected)


@kernel
@pytest.mark.parametrize("dim", [32, 96])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_commit_moves_the_path_and_nothing_else(count: int, dim: int) -> None:
    caches = draw(3, 2, 2, 80, dim, dtype=torch.float16)
    nodes = torch.randperm(60)[:50].sort().values.to(DEVICE)
    expected = caches.clone()
    expected[:, :, :, 7 : 7 + count] = caches[:, :, :, 7 + nodes[:count]]
    commit.commit(caches, base_of(7), nodes, base_of(count))
    assert torch.equal(caches, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_captured_step_follows_the_length_on_the_device() -> None:
    n, heads, groups, dim, vocabulary = 6, 8, 2, 64, 5000
    dtype = torch.bfloat16
    qkv, hidden = draw(n, (heads + 2 * groups) * dim, dtype=dtype), draw(n, 512, dtype=dtype)
    logits, tokens = draw(n, vocabulary, dtype=dtype), torch.arange(n, device=DEVICE)
    parents, start = random_parents(n), draw(1, 2, groups, 600, dim, dtype=dtype)
    table = Rope(theta=10000.0).angles(torch.arange(600, device=DEVICE), dim, dtype)

    def step(caches: Tensor, base: Tensor) -> list[Tensor]:
        _, depths, paths = fused.ancestry(parents, n)
        queries = fused.rope_write(qkv, *table, base + depths, caches[0], base, 0)
        read = fused.attend(queries, caches[0], base, 0, ancestors=paths)
        normed, _ = fused.add_norm(read, hidden, hidden[0], 1e-5)
        rounded, _ = fused.add_norm_round(read, hidden, hidden[0], 1e-5)
        path = fused.walk(tokens, parents, fused.argmax(logits) % n)
        fused.commit(caches, base, path[1 : 1 + n], path[:1])
        return [normed, *rounded, fused.silu_mul(read), *fused.best(logits, 7), path]

    caches, base = start.clone(), base_of(9)
    step(caches, base)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(caches, base)
    for length in (255, 1, 500):
        for out in captured:
            out.fill_(77)
        caches.copy_(start)
        base.fill_(length)
        graph.replay()
        expected_caches = start.clone()
        expected = step(expected_caches, base_of(length))
        for out, wanted in zip(captured, expected, strict=True):
            assert torch.equal(out, wanted)
        assert torch.equal(caches, expected_caches)


def read_layers(
    weights: list[Tensor],
    table: tuple[Tensor, Tensor],
    x: Tensor,
    caches: Tensor,
    parents: Tensor,
    *,
    wait: Callable[[], None],
) -> list[Tensor]:
    """Run layers whose every kernel reads what the one ahead writes.

    weights: of qkv, out, gate_up and down, 8 bits wide. Half of the slots are decided.
    """
    base = torch.full((1,), caches.shape[3] // 2, device=DEVICE)
    counted = [w8a8_triton.counters(len(weight), DEVICE) for weight in weights]
    scales = [torch.full((len(w),), w.shape[1] ** -0.5 / 73, device=DEVICE) for w in weights]
    factor = torch.ones_like(x[0])

    def product(i: int, read: Tensor) -> Tensor:
        codes, scale = round_in_one_pass(read, codes=torch.int8)
        wait()
        y = w8a8_triton.matmul(codes, scale, weights[i], scales[i], counted[i], x.dtype)
        wait()
        return y

    _, depths, paths = fused.ancestry(parents, len(x))
    wait()
    positions, delta, outs = base + depths, None, [x]
    for cache in caches:
        normed, x = fused.add_norm(x, delta, factor, 1e-5)
        wait()
        queries = fused.rope_write(product(0, normed), *table, positions, cache, base, 0)
        wait()
        mixed = fused.attend(queries, cache, base, 0, ancestors=paths)
        wait()
        normed, x = fused.add_norm(x, product(1, mixed), factor, 1e-5)
        wait()
        gated = fused.silu_mul(product(2, normed))
        wait()
        delta = product(3, gated)
        outs += [mixed, x, delta]
    return outs


@pytest.mark.gpu
@pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("n", [1, 16, 60])
def test_kernels_that_overlap_in_a_graph_give_the_bits_of_one_at_a_time(n: int) -> None:
    width, groups, dim = 1024, 2, 64
    shapes = [(width + 2 * groups * dim, width), (width, width)]
    shapes += [(4 * width, width), (width, 2 * width)]
    weights = [torch.randint(-127, 128, shape, device=DEVICE).to(torch.int8) for shape in shapes]
    table = Rope(theta=10000.0).angles(torch.arange(800, device=DEVICE), dim, torch.float16)
    x, parents = draw(n, width, dtype=torch.float16), random_parents(n)
    start = draw(12, 2, groups, 800, dim, dtype=torch.float16)
    caches, expected_caches = start.clone(), start.clone()
    stream = torch.cuda.current_stream()
    expected = read_layers(weights, table, x, expected_caches, parents, wait=stream.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = read_layers(weights, table, x, caches, parents, wait=lambda: None)
    for _ in range(20):
        for out in outs[1:]:
            out.fill_(77)
        caches.copy_(start)
        graph.replay()
        for out, wanted in zip(outs, expected, strict=True):
            assert torch.equal(out, wanted)
        assert torch.equal(caches, expected_caches)


def test_the_cpu_takes_plain_torch() -> None:
    base, dim = torch.tensor([4]), 32
    cache = torch.randn(2, 2, 12, dim)
    qkv = torch.randn(3, 8 * dim)
    table = Rope(theta=10000.0).angles(torch.arange(9), dim, torch.float32)
    queries = fused.rope_write(qkv, *table, torch.tensor([4, 5, 6]), cache, base, 0)
    out = fused.attend(queries, cache, base, 0, ancestors=None)
    assert near(out, exact_attention(queries, cache, 4, 0, None))


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run here as they are")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_pass_interpreted() -> None:
    # In a process of its own: Triton decides at its import whether it compiles.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
