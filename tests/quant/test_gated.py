"""Gates in our CUDA kernels' epilogue: the order of rows, and who asks for them."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from methods.fused import silu_mul
from quant.dense import DenseLinear
from quant.kernels import hopper, w4a16_hopper, w16a16_hopper
from quant.kernels.cuda_kernel import MOST_TOKENS, CudaKernel
from quant.kernels.gated import GatedLinear
from quant.scheme import QuantLinear
from quant.weight_only import WeightOnlyLinear

# I, K and group. One slab; parts of a tile; whole tiles; K in many parts; more tiles than pairs.
SHAPES = (
    (8, 128, 128),
    (264, 192, 64),
    (136, 72, 72),
    (512, 512, 256),
    (1000, 4096, 128),
    (2048, 1024, 1024),
    (20000, 256, 64),
)
H200 = 132  # multiprocessors


def drawn(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(
    inner: int, k: int, group: int, *, zeros: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (2 * inner, k // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(2 * inner, k // group, generator=generator) * 0.02 + 0.01).half()
    offsets = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    return packed.to(device), scales.to(device), offsets.to(device) if zeros else None


def turns(inner: int) -> list[int]:
    """Rows of gates over ups as a slab of 16 needs them: g has a gate, g + 8 what that gates."""
    return [
        half * inner + 8 * slab + r
        for slab in range(inner // 8)
        for half in (0, 1)
        for r in range(8)
    ]


# The order of rows.


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("inner", "k", "group"), SHAPES[:-1])
def test_words_are_those_of_rows_in_turn_and_come_back_bit_for_bit(
    inner: int, k: int, group: int, zeros: bool
) -> None:
    before = stored(inner, k, group, zeros=zeros)
    order = turns(inner)
    made = w4a16_hopper.prepare(*before, gated=True)
    by_hand = w4a16_hopper.prepare(*(None if t is None else t[order] for t in before))
    assert torch.equal(made.words, by_hand.words)
    assert torch.equal(made.scales, by_hand.scales)
    assert (made.zeros is None) == (not zeros)
    assert made.zeros is None or torch.equal(made.zeros, by_hand.zeros)
    for old, new in zip(before, w4a16_hopper.restore(made), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


def test_rows_in_turn_go_apart_again() -> None:
    rows = torch.arange(48)[:, None] * torch.ones(1, 3, dtype=torch.int64)
    assert hopper.alternated(rows)[:, 0].tolist() == turns(24)
    assert torch.equal(hopper.halved(hopper.alternated(rows)), rows)


def described(
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[Tensor, int], object],
    matrix: Tensor,
    rows: int,
) -> SimpleNamespace:
    """What the driver is told of a matrix. size, step, box: by dimension, the innermost first."""
    told = SimpleNamespace()

    class Driver(ModuleType):
        cuuint32_t = cuuint64_t = int

        def __getattr__(self, name: str) -> Self:
            return self

        def cuTensorMapEncodeTiled(self, *given: Any) -> tuple[int, None]:  # noqa: ANN401, N802
            told.start, told.size, told.step, told.box = given[2], given[3], given[4], given[5]
            assert given[1] == len(told.size) == len(told.step) + 1 == len(told.box)
            return 0, None

    bindings = ModuleType("cuda.bindings")
    driver = bindings.driver = Driver("driver")
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    made(matrix, rows)
    assert told.start == matrix.data_ptr()
    return told


def copied(told: SimpleNamespace, memory: Tensor, at: list[int]) -> Tensor:
    """Read a box as TMA does: the first dimension fastest, zeros outside. -> [rows, 64]."""
    indices = torch.meshgrid(
        *(torch.arange(b) + a for b, a in zip(told.box, at, strict=True)), indexing="ij"
    )
    size = memory.element_size()
    steps = [1, *(step // size for step in told.step)]
    real = torch.stack([i < s for i, s in zip(indices, told.size, strict=True)]).all(dim=0)
    offsets = sum(i * step for i, step in zip(indices, steps, strict=True))
    values = torch.where(real, memory.flatten()[(offsets * real)], 0)
    return values.permute(*reversed(range(values.dim()))).reshape(-1, told.box[0])


@pytest.mark.parametrize(("inner", "k"), [(8, 8), (264, 72), (136, 200), (512, 128)])
def test_a_box_of_a_dense_weight_has_its_rows_in_turn(
    inner: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = w16a16_hopper.ROWS
    weight = drawn(2 * inner, k, torch.float16)
    told = described(monkeypatch, hopper.slab_map, weight, rows)
    assert told.box == [64, 8, 2, rows // 16]
    assert all(step % 16 == 0 for step in told.step)
    cut = w16a16_hopper.plan(2 * inner, k, H200)
    whole = torch.zeros(2 * cut.tiles * rows, cut.chunks * 64, dtype=torch.float16)
    whole[: 2 * inner, :k] = weight[turns(inner)]
    for block in range(2 * cut.tiles):
        for chunk in range(cut.chunks):
            box = copied(told, weight, [chunk * 64, 0, 0, block * rows // 16])
            assert torch.equal(box, whole[block * rows :, chunk * 64 :][:rows, :64]), (block, chunk)


def test_a_box_of_a_matrix_has_its_rows_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(20, 72, torch.float16)
    told = described(monkeypatch, hopper.tensor_map, matrix, 16)
    assert (told.size, told.step, told.box) == ([72, 20], [144], [64, 16])


@pytest.mark.parametrize("inner", [4, 12])
def test_gates_that_fill_no_slab_are_told(inner: int) -> None:
    told = f"gates over ups must have N in multiples of 16, got N={2 * inner}"
    with pytest.raises(ValueError, match=told):
        w4a16_hopper.prepare(*stored(inner, 128, 128, zeros=False), gated=True)
    with pytest.raises(ValueError, match=told):
        w16a16_hopper.gated(torch.zeros(1, 64).half(), torch.zeros(2 * inner, 64).half())


def test_words_in_another_order_are_not_gated() -> None:
    weight = w4a16_hopper.prepare(*stored(8, 128, 128, zeros=False))
    with pytest.raises(ValueError, match="weight must be prepared with gated=True"):
        w4a16_hopper.gated(torch.zeros(1, 128).half(), weight)


# The layer, with its products in torch.


def layer(kind: str, inner: int = 264, k: int = 128, *, device: str = "cpu") -> QuantLinear:
    """Stored inputs of the 4-bit one are in an order of their own."""
    if kind == "dense":
        return DenseLinear(drawn(2 * inner, k, torch.float16).to(device))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)).int().to(device)
    return WeightOnlyLinear(*stored(inner, k, 64, zeros=True, device=device), order, bits=4)


@pytest.fixture
def _gated_by_torch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernels were asked for, and with how many rows."""
    asked: list[tuple[str, int]] = []

    def stand_in(module: Any) -> None:  # noqa: ANN401
        def matmul(x: Tensor, weight: Any) -> Tensor:  # noqa: ANN401
            asked.append(("matmul", len(x)))
            product: Tensor = module.reference(x, weight)
            return product.to(x.dtype)

        def gated(x: Tensor, weight: Any) -> Tensor:  # noqa: ANN401
            asked.append(("gated", len(x)))
            return silu_mul(module.reference(x, weight).to(x.dtype))

        monkeypatch.setattr(module, "build", lambda *_, **__: None)
        monkeypatch.setattr(module, "matmul", matmul)
        monkeypatch.setattr(module, "gated", gated)

    stand_in(w4a16_hopper)
    stand_in(w16a16_hopper)
    return asked


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("kind", "most"), [("dense", 64), ("w4a16", MOST_TOKENS)])
def test_a_layer_gates_what_its_kernel_takes_and_everything_where_exact(
    kind: str, most: int, exact: bool, _gated_by_torch: list[tuple[str, int]]
) -> None:
    own = layer(kind)
    fitted = CudaKernel().fit_gated(own, torch.float16, exact=exact)
    assert isinstance(fitted, GatedLinear)
    assert fitted.kernel == "cuda"
    assert torch.equal(fitted.dequantize(), own.dequantize())
    for n in (1, most, most + 2):
        x = drawn(n, 128, torch.float16, seed=n).view(1, n, 128)
        both = own(x.double())
        assert fitted.gates(x) == (exact or n <= most)
        assert near(fitted(x), both)
        if fitted.gates(x):
            found = fitted(x, gated=True)
            assert found.shape == (1, n, 264)
            assert near(found, silu_mul(both.flatten(0, 1)).view(1, n, 264))
    rows = [n for name, n in _gated_by_torch if name == "gated"]
    assert rows == ([1, most, most + 2] if exact else [1, most])
    rows = [n for name, n in _gated_by_torch if name == "matmul"]
    assert rows == ([1, most, most, 2] if exact else [1, most])


@pytest.mark.usefixtures("_gated_by_torch")
@pytest.mark.parametrize("kind", ["dense", "w4a16"])
def test_a_layer_that_gates_holds_no_more_and_is_seen_once(kind: str) -> None:
    own = layer(kind, inner=256)
    fitted = CudaKernel().fit_gated(own, torch.float16, exact=True)
    assert fitted.weight_bytes == own.weight_bytes
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module).__name__)
    )
    try:
        fitted(drawn(2, 128, torch.float16), gated=True)
        fitted(drawn(2, 128, torch.float16))
    finally:
        handle.remove()
    assert seen == ["GatedLinear", "GatedLinear"]


@pytest.mark.usefixtures("_gated_by_torch")
def test_what_fills_no_slab_is_laid_out_as_any_layer() -> None:
    own = layer("dense", inner=12)
    assert not isinstance(CudaKernel().fit_gated(own, torch.float16), GatedLinear)


@pytest.mark.usefixtures("_gated_by_torch")
def test_an_input_that_does_not_fit_is_told() -> None:
    fitted = CudaKernel().fit_gated(layer("dense"), torch.float16)
    with pytest.raises(ValueError, match=r"x must be torch.float16 of shape \[..., 128\]"):
        fitted(torch.zeros(1, 64).half(), gated=True)
