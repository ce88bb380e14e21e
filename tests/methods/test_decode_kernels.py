"""The kernels of a decode step against plain torch: on a GPU, or interpreted on the CPU."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import fused
from methods.rope import Rope, rotate
from quant.grid import round_tokens
from tests.methods.kernel_parts import (
    DEVICE,
    DTYPES,
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
    from methods.kernels import commit, gate, join, norm, rope_write
    from quant.kernels import w8a8_triton
    from quant.kernels.tokens_triton import round_rows as round_in_one_pass


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run here as they are")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_pass_interpreted() -> None:
    run = run_interpreted(__file__)
    assert run.returncode == 0, run.stdout[-3000:]
