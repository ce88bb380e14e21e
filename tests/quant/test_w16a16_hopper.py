"""Our CUDA kernel for dense 16-bit weights: what it cuts and refuses, its products on a Hopper."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quant.dense import DenseLinear
from quant.kernels import cuda_build, hopper
from quant.kernels import w16a16_hopper as kernel
from quant.kernels.cuda_kernel import CudaDense, CudaKernel

WIDTHS = (1, 2, 7, 8, 9, 16, 17, 24, 31, 33, 40, 48, 56, 60, 64, 65, 100, 128, 130)
# N and K: whole tiles, parts of tiles and chunks, K split between many pairs, more tiles than
# pairs, twice as many chunks of a pair as are in flight.
SHAPES = (
    (512, 128),
    (512, 8192),
    (264, 72),
    (8, 8),
    (1032, 1000),
    (4096, 4096),
    (33800, 320),
    (8192, 4096),
)
H200 = 132  # multiprocessors
MOST_ERROR = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def drawn(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator).to(dtype)


@pytest.mark.parametrize("tokens", range(hopper.NARROWEST, hopper.WIDEST + 1, hopper.NARROWEST))
def test_a_ring_of_stages_is_deep_and_leaves_room_for_neighbours(tokens: int) -> None:
    variant = kernel.Variant(tokens=tokens, bf16=False)
    # Swizzled boxes must start at multiples of 1024 bytes.
    assert variant.stage_bytes % 1024 == 0
    assert kernel.ROWS * 128 % 1024 == 0
    assert variant.shared_bytes <= 200 * 1024
    assert variant.stages * kernel.ROWS * 128 >= 128 * 1024  # of weights


@pytest.mark.parametrize(
    ("n", "k", "cut"),
    [
        (6144, 4096, kernel.Plan(tiles=24, chunks=64, pairs=66)),
        (4096, 4096, kernel.Plan(tiles=16, chunks=64, pairs=64)),
        (128256, 4096, kernel.Plan(tiles=501, chunks=64, pairs=66)),
        (8192, 28672, kernel.Plan(tiles=32, chunks=448, pairs=64)),
        # Fewer chunks than pairs; what fills no tile and no chunk.
        (8, 8, kernel.Plan(tiles=1, chunks=1, pairs=1)),
        (264, 72, kernel.Plan(tiles=2, chunks=2, pairs=4)),
    ],
)
def test_a_shape_is_cut_by_itself_and_the_device_alone(n: int, k: int, cut: kernel.Plan) -> None:
    assert kernel.plan(n, k, H200) == cut


def test_tiles_are_cut_alike_where_that_leaves_few_blocks_idle() -> None:
    # 64 or 60 of 66 pairs; where 56 would be left, or none, all work.
    assert hopper.share_out(16, 64, H200) == 64
    assert hopper.share_out(12, 32, H200) == 60
    assert hopper.share_out(56, 32, H200) == 66
    assert hopper.share_out(112, 64, H200) == 66
    assert hopper.share_out(1, 3, H200) == 3


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (128256, 8192), (57344, 8192), (8192, 28672)])
def test_all_chunks_of_all_tiles_are_taken_once_and_evenly(n: int, k: int) -> None:
    cut = kernel.plan(n, k, H200)
    units = cut.tiles * cut.chunks
    assert cut.pairs * units < 2**32  # counted in 32 bits by stream_k.cuh
    starts = [pair * units // cut.pairs for pair in range(cut.pairs + 1)]
    sizes = {end - start for start, end in pairwise(starts)}
    assert (starts[0], starts[-1]) == (0, units)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    # Of the tile that its range ends in, a pair's part has a place of its own: two are enough.
    assert 2 * cut.tiles <= hopper.MOST_BLOCKS
    assert kernel.ROWS * hopper.WIDEST <= hopper.MOST_SUMS


def test_some_pair_goes_through_its_ring_more_than_twice() -> None:
    cuts = [kernel.plan(n, k, H200) for n, k in SHAPES]
    longest = max(cut.tiles * cut.chunks // cut.pairs for cut in cuts)
    assert longest > 2 * kernel.Variant(tokens=hopper.NARROWEST, bf16=False).stages


def test_the_text_names_the_instruction_of_its_width_and_dtype() -> None:
    text = kernel.Variant(tokens=16, bf16=True).source
    assert "m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, adds" in text
    assert text.index("#define ROWS 128") < text.index("struct alignas(64) TensorMap")
    assert text.index("bool add_parts") < text.index("product(const __grid_constant__")


@pytest.mark.parametrize("bf16", [False, True])
def test_the_widest_variant_compiles(bf16: bool) -> None:
    if reason := cuda_build.missing():
        pytest.skip(reason)
    text = kernel.Variant(tokens=hopper.WIDEST, bf16=bf16).source
    assert cuda_build.compiled(text, "sm_90a")


def test_the_limits_are_told_before_a_launch() -> None:
    most = hopper.MOST_BLOCKS * 128
    assert kernel.unfit(most, 64) == ("", "")
    assert kernel.unfit(most + 8, 64) == (f"N of {most} at most", str(most + 8))
    assert kernel.unfit(12, 64) == ("N and K in multiples of 8", "N=12, K=64")
    assert kernel.unfit(8, 68) == ("N and K in multiples of 8", "N=8, K=68")
    numbers = hopper.MOST_UNITS * 256 * 64
    told = (f"a weight of {numbers} numbers at most", f"N={most}, K=16448")
    assert kernel.unfit(most, 16448) == told


@pytest.mark.parametrize(
    ("x", "weight", "told"),
    [
        (drawn(1, 64, torch.float32), drawn(8, 64, torch.float16), "x must be float16 or bfloat16"),
        (drawn(1, 72, torch.float16), drawn(8, 64, torch.float16), r"x must be \[n, 64\]"),
        (drawn(0, 64, torch.float16), drawn(8, 64, torch.float16), "n of 1 or more"),
        (drawn(64, 2, torch.float16).t(), drawn(8, 64, torch.float16), "rows that are contiguous"),
        (
            drawn(1, 64, torch.float16),
            drawn(8, 64, torch.bfloat16),
            "weight must be of x's dtype torch.float16 on cpu, got torch.bfloat16 on cpu",
        ),
        (drawn(1, 8, torch.float16), drawn(8, 64, torch.float16).t(), "contiguous and aligned"),
        (
            drawn(1, 64, torch.float16),
            drawn(9, 64, torch.float16).view(-1)[4:516].view(8, 64),
            "aligned to 16 bytes, .* at offset 4",
        ),
        (drawn(1, 64, torch.float16), drawn(12, 64, torch.float16), "multiples of 8, got N=12"),
    ],
)
def test_operands_that_do_not_fit_are_told(x: Tensor, weight: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kernel.matmul(x, weight)


@pytest.fixture
def _multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layer without a GPU: how many rows its kernel was given, call by call."""
    rows: list[int] = []

    def matmul(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(x))
        return kernel.reference(x, weight).to(x.dtype)

    monkeypatch.setattr(kernel, "build", lambda weight: None)
    monkeypatch.setattr(kernel, "matmul", matmul)
    return rows


@pytest.mark.parametrize("exact", [False, True])
def test_narrow_reads_are_the_kernels_and_wide_ones_only_where_exact(
    exact: bool, _multiplied_by_torch: list[int]
) -> None:
    own = DenseLinear(drawn(24, 64, torch.float16))
    layer = CudaKernel().fit(own, torch.float16, exact=exact)
    for n in (1, 64, 66):
        x = drawn(n, 64, torch.float16, seed=n)
        expected = own(x.double())
        assert float((layer(x).double() - expected).norm() / expected.norm()) < 1e-3
    assert _multiplied_by_torch == ([1, 64, 64, 2] if exact else [1, 64])
    assert layer.kernel == "cuda"


@pytest.mark.usefixtures("_multiplied_by_torch")
def test_a_weight_of_xs_dtype_is_held_as_it_is_and_another_comes_back() -> None:
    own = DenseLinear(drawn(24, 64, torch.float16))
    held = CudaDense(own, torch.float16)
    assert held.weight.data_ptr() == own.weight.data_ptr()
    assert held.weight_bytes == own.weight_bytes
    wide = DenseLinear(drawn(24, 64, torch.float32))
    narrowed = CudaDense(wide, torch.bfloat16)
    assert narrowed.weight.dtype == torch.bfloat16
    assert torch.equal(narrowed.dequantize(), wide.dequantize())


def test_the_kernel_says_which_dense_layers_it_takes() -> None:
    own = CudaKernel()
    assert own.unfit(DenseLinear(drawn(24, 72, torch.float32)), torch.float16) == ""
    assert own.inexact(DenseLinear(drawn(24, 72, torch.float32)), torch.bfloat16) == ""
    told = own.unfit(DenseLinear(drawn(24, 64, torch.float32)), torch.float32)
    assert "needs dtype=float16 or bfloat16, got torch.float32; kernel=reference works" in told
    told = own.unfit(DenseLinear(drawn(20, 64, torch.float32)), torch.float16)
    assert "needs N and K in multiples of 8, got N=20, K=64" in told


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", MOST_ERROR)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_near_float64_and_rows_do_not_depend_on_their_number(
    n: int, k: int, dtype: torch.dtype
) -> None:
    weight = drawn(n, k, dtype).cuda()
    x = drawn(max(WIDTHS), k, dtype, seed=1).cuda()
    exact = kernel.reference(x, weight)
    whole = kernel.matmul(x, weight)
    for width in WIDTHS:
        torch.empty(width, n, dtype=dtype, device="cuda").fill_(float("nan"))  # where y may lie
        found = kernel.matmul(x[:width], weight)
        error = (found.double() - exact[:width]).norm() / exact[:width].norm()
        assert float(error) < MOST_ERROR[dtype], (width, float(error))
        assert torch.equal(found, whole[:width]), width
        assert torch.equal(kernel.matmul(x[-width:], weight), whole[-width:]), width


@pytest.mark.gpu
@needs_hopper
def test_a_replayed_graph_gives_the_bits_of_a_call_between_other_kernels() -> None:
    # Overlapped launches of two layouts share one room for parts, and small kernels run between.
    weights = [drawn(n, 4096, torch.float16, seed=n).cuda() for n in (4096, 33800, 512)]
    x = drawn(20, 4096, torch.float16, seed=1).cuda()
    expected = [kernel.matmul(x + 1, weight) for weight in weights]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [kernel.matmul(x + 1, weight) for weight in weights for _ in range(3)]
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        for i, y in enumerate(found):
            assert torch.equal(y, expected[i // 3])


@pytest.mark.gpu
@needs_hopper
def test_nothing_is_written_beside_the_product() -> None:
    # y's rows lie in the middle of a pool that holds a pattern.
    weight = drawn(264, 200, torch.float16).cuda()
    x = drawn(9, 200, torch.float16, seed=1).cuda()
    pool = torch.full((64, 264), 7.0, dtype=torch.float16, device="cuda")
    kernel._launch(x, weight, pool[16:25])
    assert torch.equal(pool[16:25], kernel.matmul(x, weight))
    assert bool((pool[:16] == 7).all())
    assert bool((pool[25:] == 7).all())
