"""Gates in our CUDA kernels' epilogue have the bits of a product and a gate after it."""

import pytest
import torch
from torch import Tensor

from methods.fused import silu_mul
from quant.kernels import w4a16_hopper, w16a16_hopper
from quant.kernels.cuda_kernel import CudaKernel
from tests.quant.test_gated import SHAPES, drawn, layer, stored

WIDTHS = (1, 2, 7, 8, 9, 16, 17, 24, 31, 33, 40, 48, 60, 64, 65, 100, 128, 130)
DTYPES = (torch.float16, torch.bfloat16)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, zeros' signs and NaNs included."""
    return torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("inner", "k", "group"), SHAPES)
def test_4_bit_gates_have_the_bits_of_two_steps_however_many_are_read(
    inner: int, k: int, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    weight = stored(inner, k, group, zeros=zeros, device="cuda")
    plain = w4a16_hopper.prepare(*weight)
    in_turn = w4a16_hopper.prepare(*weight, gated=True)
    x = drawn(max(WIDTHS), k, dtype, seed=1).cuda()
    both = w4a16_hopper.matmul(x, plain)
    assert same(w4a16_hopper.matmul(x, in_turn), both)
    expected = silu_mul(both)
    for width in WIDTHS:
        torch.empty(width, inner, dtype=dtype, device="cuda").fill_(float("nan"))  # where y may lie
        assert same(w4a16_hopper.gated(x[:width], in_turn), expected[:width]), width


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "k", "group"), SHAPES)
def test_dense_gates_have_the_bits_of_two_steps_however_many_are_read(
    inner: int, k: int, group: int, dtype: torch.dtype
) -> None:
    weight = (drawn(2 * inner, k, dtype) * 4 / k**0.5).cuda()
    x = drawn(max(WIDTHS), k, dtype, seed=1).cuda()
    expected = silu_mul(w16a16_hopper.matmul(x, weight))
    for width in WIDTHS:
        torch.empty(width, inner, dtype=dtype, device="cuda").fill_(float("nan"))  # where y may lie
        assert same(w16a16_hopper.gated(x[:width], weight), expected[:width]), width


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_gate_has_the_bits_of_two_steps(dtype: torch.dtype) -> None:
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = torch.zeros(2 * len(gates), 8, dtype=dtype)
    weight[: len(gates), 0] = torch.where(gates.isfinite(), gates, 0)
    weight[len(gates) :, 1] = drawn(len(gates), 1, dtype)[:, 0]
    weight = weight.cuda()
    x = torch.zeros(3, 8, dtype=dtype)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0])  # twice the largest is infinite
    x[:, 1] = 1
    both = w16a16_hopper.matmul(x.cuda(), weight)
    assert bool(both.isinf().any())
    assert same(w16a16_hopper.gated(x.cuda(), weight), silu_mul(both))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["dense", "w4a16"])
def test_a_replayed_layer_gives_the_bits_of_two_steps(kind: str, exact: bool) -> None:
    own = layer(kind, 1000, 512, device="cuda")
    fitted = CudaKernel().fit_gated(own, torch.float16, exact=exact)
    x = drawn(300 if exact else 60, 512, torch.float16, seed=1).cuda()
    expected = silu_mul(fitted(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [fitted(x, gated=True), fitted(x[:9].contiguous(), gated=True)]
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        assert same(found[0], expected)
        assert same(found[1], expected[:9])


@pytest.mark.gpu
@needs_hopper
def test_nothing_is_written_beside_what_is_gated() -> None:
    # y's rows lie in the middle of a pool that holds a pattern.
    weight = drawn(528, 200, torch.float16).cuda()
    x = drawn(9, 200, torch.float16, seed=1).cuda()
    pool = torch.full((64, 264), 7.0, dtype=torch.float16, device="cuda")
    w16a16_hopper._launch(x, weight, pool[16:25], gated=True)
    assert same(pool[16:25], w16a16_hopper.gated(x, weight))
    assert bool((pool[:16] == 7).all())
    assert bool((pool[25:] == 7).all())
