"""Our CUDA W4A16 kernel: its layout everywhere, its products on a Hopper GPU."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quant.block_float import BlockFloat, round_blocks
from quant.kernels import cuda_build, hopper
from quant.kernels import w4a16_hopper as kernel
from quant.pack import pack_nibbles, unpack_nibbles
from tests.quant import oracle

WIDTHS = (1, 2, 7, 8, 9, 16, 17, 24, 25, 31, 33, 48, 60, 64, 65, 90, 100, 128)
# N, K and group: whole tiles, parts of tiles and chunks, and K split between pairs of blocks.
SHAPES = (
    (512, 128, 128),
    (512, 4096, 128),
    (640, 192, 64),
    (264, 72, 72),
    (1024, 512, 256),
    (4096, 1024, 1024),
)
# Of these a pair of blocks has more chunks than are in flight, or chunks of several tiles.
LONG = ((16904, 8192, 128), (33800, 320, 64))
H200 = 132  # multiprocessors
DTYPES = (torch.float16, torch.bfloat16)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def stored(
    n: int, k: int, group: int, *, zeros: bool, scale: torch.dtype = torch.float16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes with no pattern, scales around 0.015, zeros over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, k // group, generator=generator) * 0.01 + 0.01).to(scale)
    offsets = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    return packed, scales, offsets if zeros else None


def most_error(n: int, dtype: torch.dtype, *, exact: bool = False) -> float:
    """Relative norm. An emulation of halves, with one input a hundred times the others: 1.2e-3."""
    if dtype == torch.bfloat16:  # y is rounded to it
        return 5e-3
    return 1.5e-3 if kernel.form_of(n, dtype, exact=exact) == "halves" else 1e-3


def on_gpu(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> kernel.Prepared:
    return kernel.prepare(packed.cuda(), scales.cuda(), None if zeros is None else zeros.cuda())


def inputs(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_prepared_weights_come_back_bit_for_bit(n: int, k: int, group: int, zeros: bool) -> None:
    before = stored(n, k, group, zeros=zeros)
    after = kernel.restore(kernel.prepare(*before))
    for old, new in zip(before, after, strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_weight_put_in_order_in_pieces_is_the_same(
    zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = stored(1800, 192, 64, zeros=zeros)  # three whole pieces, and a part of one
    whole = kernel.prepare(*weight)
    monkeypatch.setattr(kernel, "AT_ONCE", 512)
    pieces = kernel.prepare(*weight)
    assert len(whole.words) == 8
    for name in ("words", "scales", "boosts"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name))


def test_words_hold_the_fragments_of_the_tensor_cores() -> None:
    codes = torch.randint(0, 16, (512, 256), generator=torch.Generator().manual_seed(0))
    weight = kernel.prepare(pack_nibbles(codes.to(torch.int8)), torch.ones(512, 2).half(), None)
    for row, column in ((0, 0), (15, 9), (300, 77), (511, 255), (131, 200)):
        block, r = divmod(row, 256)
        chunk, c = divmod(column, 128)
        # PTX ISA, mma.m16n8k16, fragments of A: rows g and g + 8, inputs 2 c and 2 c + 8.
        lane = r % 8 * 4 + c % 8 // 2
        word = weight.words[block, chunk, r // 64, c // 64, r // 16 % 4 * 32 + lane, c // 16 % 4]
        nibble = r // 8 % 2 + c // 8 % 2 * 2 + c % 2 * 4
        assert (word.item() >> 4 * nibble) & 15 == codes[row, column].item() ^ kernel.MIDDLE


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_may_be_launched_is_compiled_when_a_layer_is_laid_out(
    exact: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = kernel.prepare(*stored(512, 256, 128, zeros=False))
    built, launched = set(), set()
    monkeypatch.setattr(hopper, "function", lambda variant, device: built.add(variant))
    monkeypatch.setattr(cuda_build, "at_once", lambda makers: [make() for make in makers])
    kernel.build(weight, dtype, exact=exact)
    monkeypatch.setattr(kernel, "tensor_map", lambda x, rows: None)
    monkeypatch.setattr(kernel, "digits_map", lambda x, rows: None)
    monkeypatch.setattr(kernel, "_launch", lambda variant, *_: launched.add(variant))
    for n in range(1, 129):
        if kernel.form_of(n, dtype, exact=exact) == "digits":
            kernel.multiply(round_blocks(torch.ones(n, 256)), weight, dtype)
        else:
            kernel.matmul(torch.ones(n, 256, dtype=dtype), weight)
    assert launched == built


def test_digits_that_do_not_fit_are_told() -> None:
    weight = kernel.prepare(*stored(512, 256, 128, zeros=False))
    digits, scales = round_blocks(torch.ones(3, 256))
    for made, told in (
        (BlockFloat(digits.short(), scales), "digits must be int8"),
        (BlockFloat(digits[:, :, :128], scales), "digits must be \\[2, n, 256\\]"),
        (BlockFloat(digits, scales[:, :3].contiguous()), "rows of 8 numbers, got 3"),
        (BlockFloat(digits.transpose(1, 2).contiguous().transpose(1, 2), scales), "as made"),
    ):
        with pytest.raises(ValueError, match=told):
            kernel.multiply(made, weight, torch.float16)


@pytest.mark.parametrize("dtype", kernel.SCALE_TYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_boost_makes_a_rows_largest_living_scale_nearly_float16s(
    dtype: torch.dtype, zeros: bool
) -> None:
    packed, scales, offsets = stored(512, 512, 128, zeros=zeros, scale=dtype)
    scales[1] *= 2.0**-9
    scales[2] *= -300
    scales[3, 1:], scales[4], scales[5, 2] = 1, 0, 1 - 2.0**-12  # to 16 bits this is 1
    codes = unpack_nibbles(packed).view(512, 4, 128)
    codes[3, 1:] = kernel.MIDDLE if offsets is None else offsets[3, 1:, None].to(torch.int8)
    weight = kernel.prepare(pack_nibbles(codes.flatten(1)), scales, offsets)
    # [block, sixteen rows, g, high]
    boosts = weight.boosts.view(2, 16, 8, 2).transpose(2, 3).flatten()
    assert torch.equal(boosts, torch.exp2(boosts.float().log2().round()).half())
    largest = scales.abs().float().amax(1)
    largest[3] = scales[3, 0]  # all other weights of the row are 0
    held = (largest * boosts).half().float()
    living = largest > 0
    assert bool(((held >= 1) & (held < 2) | ~living).all())
    assert int((~living).sum()) == 1


def test_a_row_of_the_smallest_scales_is_boosted_as_far_as_float16_goes() -> None:
    packed, scales, _ = stored(512, 512, 128, zeros=False)
    weight = kernel.prepare(packed, torch.full_like(scales, 2.0**-24), None)
    assert weight.boosts.unique().tolist() == [2.0**15]


def test_what_fills_a_tile_adds_nothing() -> None:
    packed, scales, zeros = stored(264, 72, 72, zeros=True)
    weight = kernel.prepare(packed, scales, zeros)
    assert weight.words.shape[:2] == (2, 1)
    assert weight.scales.shape == (2, 1, 256)
    # Rows g and g + 8 lie side by side: of the last sixteen the first eight are real.
    assert bool((weight.scales[1, 0, 1:16:2] == 0).all() & (weight.scales[1, 0, 16:] == 0).all())
    assert bool((weight.scales[1, 0, :16:2] > 0).all() & (weight.scales[0] > 0).all())
    filled = unpack_nibbles(weight.words.view(torch.uint8)).view(2, 1, 4, 2, 4, 8, 4, 4, 2, 2, 2)
    rows = filled.permute(0, 2, 4, 10, 5, 1, 3, 7, 9, 6, 8).reshape(512, 128)
    assert bool((rows[:264, 72:] == kernel.MIDDLE).all())


def test_reference_is_the_product_in_float64() -> None:
    packed, scales, zeros = stored(64, 512, 128, zeros=True)
    assert zeros is not None
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    weight = (oracle.nibbles(packed) - oracle.spread(zeros, 512)) * oracle.spread(scales, 512)
    found = kernel.reference(x, kernel.prepare(packed, scales, zeros))
    assert oracle.worst(found, x.double().numpy() @ weight.T) < 1e-12


@pytest.mark.parametrize(
    ("n", "k", "group", "told"),
    [
        (12, 128, 128, "N and K in multiples of 8, got N=12, K=128"),
        (64, 128, 32, "group_size 64, a multiple of 128 or -1, got 32"),
    ],
)
def test_a_shape_that_does_not_fit_is_told(n: int, k: int, group: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kernel.prepare(*stored(n, k, group, zeros=False))


def test_there_is_a_counter_for_every_block() -> None:
    most = hopper.MOST_BLOCKS * kernel.ROWS
    assert kernel.unfit(most, 128, 128) == ("", "")
    assert kernel.unfit(most + 8, 128, 128) == (f"N of {most} at most", str(most + 8))


def test_the_shapes_reach_all_that_a_range_of_chunks_can_be() -> None:
    narrow = {"tokens": 8, "scale": 0, "zeros": False, "spans": 1}
    deepest = max(
        kernel.Variant(**narrow, form=form, bf16=form == "floats").stages for form in kernel.FORMS
    )
    found = set()
    for n, k, _ in (*SHAPES, *LONG):
        tiles, chunks = -(-n // kernel.PAIR), -(-k // kernel.CHUNK)
        pairs = hopper.share_out(tiles, chunks, H200)
        starts = [pair * tiles * chunks // pairs for pair in range(pairs + 1)]
        for start, end in pairwise(starts):
            many = end - start
            found.add("one" if many == 1 else "short" if many < deepest else "long")
            found |= {"twice around"} if many > 2 * deepest else set()
            found |= {"two tiles"} if start // chunks < (end - 1) // chunks else set()
            found |= {"a whole tile between"} if start // chunks + 1 < end // chunks else set()
    assert found == {"one", "short", "long", "twice around", "two tiles", "a whole tile between"}


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(1, 128), "x must be float16 or bfloat16"),
        (torch.zeros(1, 64, dtype=torch.float16), "x must be \\[n, 128\\]"),
        (torch.zeros(0, 128, dtype=torch.float16), "n of 1 or more"),
        (torch.zeros(128, 2, dtype=torch.float16).t(), "rows that are contiguous"),
    ],
)
def test_an_input_that_does_not_fit_is_told(x: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kernel.matmul(x, kernel.prepare(*stored(512, 128, 128, zeros=False)))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, *LONG])
def test_products_are_near_float64_and_rows_do_not_depend_on_their_number(
    n: int, k: int, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    packed, scales, offsets = stored(n, k, group, zeros=zeros)
    # Rows of many sizes, so that no tile passes for the next.
    scales *= torch.exp2(-(torch.arange(n) % 7).float()).half()[:, None]
    weight = on_gpu(packed, scales, offsets)
    x = inputs(max(WIDTHS), k, dtype)
    x[:, 3] *= 100  # as some channels of language models
    right = kernel.reference(x, weight)
    most = kernel.DIGITS_MOST[dtype]
    for exact in (False, True):
        # In each form rows are those of the widest read in that form.
        narrow = kernel.matmul(x[:most], weight, exact=exact)
        wide = kernel.matmul(x, weight, exact=exact)
        if exact:
            assert torch.equal(narrow, wide[: len(narrow)])
        for width in WIDTHS:
            torch.empty(width, n, dtype=dtype, device="cuda").fill_(float("nan"))  # where y may lie
            found = kernel.matmul(x[:width], weight, exact=exact)
            error = (found.double() - right[:width]).norm() / right[:width].norm()
            assert float(error) < most_error(width, dtype, exact=exact), (width, float(error))
            whole = narrow if width <= most else wide
            assert torch.equal(found, whole[:width]), width


@pytest.mark.gpu
@needs_hopper
def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    weight = on_gpu(*stored(512, 512, 128, zeros=False))
    for value in (float("nan"), float("inf")):
        x = inputs(40, 512, torch.float16)
        x[1, 200] = value
        for n in (3, 40):
            found = kernel.matmul(x[:n], weight)
            assert not bool(found[1].isfinite().any())
            assert bool(found[0].isfinite().all() & found[2:].isfinite().all())


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_taken_in_the_dtype_that_is_stored(
    scale: torch.dtype, dtype: torch.dtype
) -> None:
    packed, scales, zeros = stored(512, 512, 128, zeros=False, scale=scale)
    scales[::2] *= 2.0**-5  # as in rows that say little
    weight = on_gpu(packed, scales, zeros)
    for n in (9, 40):
        x = inputs(n, 512, dtype)
        right = kernel.reference(x, weight)
        off = kernel.matmul(x, weight).double() - right
        assert float(off.norm() / right.norm()) < most_error(n, dtype)
        assert float((off.norm(dim=0) / right.norm(dim=0)).max()) < 2 * most_error(n, dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("size", [1e-3, 1e-2, 300.0])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_wide_reads_are_near_float64_in_every_row(
    size: float, zeros: bool, scale: torch.dtype
) -> None:
    packed, scales, offsets = stored(512, 4096, 128, zeros=zeros, scale=scale)
    scales[::2] *= 2.0**-6
    scales[1::4] *= -1
    # A group of zeros under a scale of 1, as packers leave it, in every other row and in a whole.
    codes = unpack_nibbles(packed).view(512, -1, 128)
    middle = torch.full_like(scales, kernel.MIDDLE) if offsets is None else offsets
    dead = torch.zeros_like(middle, dtype=torch.bool)
    dead[::2, 3], dead[7] = True, True
    codes = torch.where(dead[..., None], middle[..., None].to(torch.int8), codes)
    scales[dead] = 1
    weight = on_gpu(pack_nibbles(codes.flatten(1)), scales, offsets)
    x = (inputs(48, 4096, torch.float32) * size).half()
    right, found = kernel.reference(x, weight), kernel.matmul(x, weight)
    assert float(found[:, 7].abs().max()) == 0
    off = (found.double() - right).norm(dim=0) / right.norm(dim=0).clamp(min=1e-30)
    assert float(off.max()) < 3e-3
    assert float((found.double() - right).norm() / right.norm()) < 2e-3


@pytest.mark.gpu
@needs_hopper
def test_a_row_does_not_depend_on_its_place() -> None:
    weight = on_gpu(*stored(768, 1024, 128, zeros=True))
    for n in (30, 64):
        x = inputs(n, 1024, torch.float16)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(2)).cuda()
        assert torch.equal(kernel.matmul(x[order], weight), kernel.matmul(x, weight)[order])


@pytest.mark.gpu
@needs_hopper
def test_a_replayed_graph_gives_the_bits_of_a_call() -> None:
    weight = on_gpu(*stored(512, 8192, 128, zeros=False))
    x = inputs(20, 8192, torch.float16)
    expected = kernel.matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = kernel.matmul(x, weight)
        second = kernel.matmul(x, weight)
    for _ in range(3):
        first.fill_(float("nan"))
        graph.replay()
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
