"""The attention kernels against float64, and against themselves bit for bit."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from methods import fused
from methods.rope import Rope
from tests.methods.kernel_parts import (
    DEVICE,
    DTYPES,
    FEW,
    INTERPRETED,
    ON_GPU,
    base_of,
    draw,
    kernel,
    near,
    random_parents,
    run_interpreted,
)

if INTERPRETED or ON_GPU:
    from methods.kernels import attention


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [0, 63, 64, 255, 700][: None if ON_GPU else 3])
def test_a_root_is_bit_equal_in_order_and_by_its_path(base: int, dtype: torch.dtype) -> None:
    queries, cache = draw(1, 8, 64, dtype=dtype), draw(2, 2, base + 4, 64, dtype=dtype)
    path = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    by_path = attention.attend(queries, cache, base_of(base), 0, ancestors=path)
    assert torch.equal(attention.attend(queries, cache, base_of(base), 0, ancestors=None), by_path)


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
    run = run_interpreted(__file__)
    assert run.returncode == 0, run.stdout[-3000:]
