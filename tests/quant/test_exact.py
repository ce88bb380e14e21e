"""Layers whose rows do not depend on how many are read: how they are made, and who makes them."""

from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from quant.dense import Dense
from quant.fp8 import FP8
from quant.kernels.choice import AVAILABLE, choose, fit, named
from quant.kernels.exact import ROWS, Tiles, fixed
from quant.kernels.kernel import Kernel
from quant.kernels.machine import Machine
from quant.kernels.table import Table
from quant.kernels.torch_kernels import TorchInt8
from quant.scheme import QuantLinear, Scheme
from quant.w4a8_qoq import W4A8QoQ
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16

CPU = torch.device("cpu")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
MACHINE = Machine(gpu="none", torch="1", triton=None, humming=None)
EMPTY = Table(machine=MACHINE, best={})


def w4a16(group_size: int = 128, *, symmetric: bool = True, kernel: str = "auto") -> W4A16:
    return W4A16(group_size=group_size, symmetric=symmetric, range_search=False, kernel=kernel)


SCHEMES: dict[str, Scheme] = {
    "dense": Dense(),
    "w4a16-g128": w4a16(),
    "w4a16-g128-asym": w4a16(symmetric=False),
    "w4a16-g32": w4a16(32),
    "w4a16-channel": w4a16(-1),
    "w8a16": W8A16(group_size=128, symmetric=True, range_search=False),
    "w8a8": W8A8(smooth_alpha=None),
    "fp8": FP8(),
    "qqq": W4A8QQQ(group_size=-1, range_search=False),
    "qqq-g128": W4A8QQQ(group_size=128, range_search=False),
    "qoq": W4A8QoQ(group_size=-1, range_search=False),
    "qoq-g128": W4A8QoQ(group_size=128, range_search=False),
}


def layer(scheme: Scheme, n: int = 64, k: int = 256) -> QuantLinear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return scheme.layer(scheme.pack(weight))


def inputs(n: int, k: int = 256) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n))


class Made(QuantLinear):
    """Gives its input back, and `by` for each row that is read with a row or stands before it."""

    def __init__(
        self, *, by_count: float = 0.0, by_place: float = 0.0, by_call: float = 0.0
    ) -> None:
        super().__init__(in_features=8, out_features=8)
        self.register_buffer("weight", torch.eye(8))
        self.by_count, self.by_place, self.by_call = by_count, by_place, by_call
        self.read: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.read.append(len(x))
        place = torch.arange(len(x))[:, None]
        added = self.by_count * len(x) + self.by_place * place + self.by_call * len(self.read)
        return x + added

    def dequantize(self) -> Tensor:
        return torch.eye(8)


def test_a_product_that_depends_on_how_many_are_read_is_always_given_as_many() -> None:
    made = Made(by_count=1.0)
    tiles = fixed(made, FLOAT)
    made.read.clear()
    x = inputs(150, 8)
    for n in (1, 2, ROWS - 1, ROWS, ROWS + 1, 150):
        assert torch.equal(tiles(x[:n]), x[:n] + ROWS), n
    assert set(made.read) == {ROWS}
    assert len(made.read) == 4 + 2 + 3


def test_what_pads_a_tile_is_dropped_and_shapes_stay() -> None:
    tiles = fixed(Made(), FLOAT)
    x = inputs(6, 8)
    assert torch.equal(tiles(x.view(2, 3, 8)), x.view(2, 3, 8))
    assert tiles(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("fault", [{"by_place": 1.0}, {"by_call": 1.0}])
def test_what_treats_places_or_calls_differently_is_refused(fault: dict[str, float]) -> None:
    told = "exact=true needs a product that treats all rows alike, got another by kernel=reference "
    with pytest.raises(ValueError, match=f"{told}for K=8, N=8 in torch.float32"):
        fixed(Made(**fault), FLOAT)


def test_what_is_exact_up_to_a_width_is_cut_and_never_padded() -> None:
    made = Made()
    tiles = Tiles(made, FLOAT, rows=128, padded=False)
    x = inputs(300, 8)
    assert torch.equal(tiles(x), x)
    assert torch.equal(tiles(x[:5]), x[:5])
    assert made.read == [128, 128, 44, 5]


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("label", SCHEMES)
def test_the_reference_becomes_exact_at_every_width(label: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[label]
    own = layer(scheme)
    exact = scheme.linear(scheme.pack(own.dequantize()), dtype=dtype, device=CPU, exact=True)
    assert isinstance(exact, Tiles)
    x = inputs(130).to(dtype)
    whole = exact(x)
    for n in (1, 2, 7, 60, 64, 65, 128):
        assert torch.equal(exact(x[:n]), whole[:n]), n
        assert torch.equal(exact(x[-n:]), whole[-n:]), n


@pytest.mark.parametrize("label", SCHEMES)
def test_exactness_changes_neither_weight_nor_bytes_nor_kernel(label: str) -> None:
    scheme = SCHEMES[label]
    stored = scheme.pack(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    plain = scheme.linear(stored, dtype=FLOAT, device=CPU)
    exact = scheme.linear(stored, dtype=FLOAT, device=CPU, exact=True)
    assert torch.equal(exact.dequantize(), plain.dequantize())
    assert exact.weight_bytes == plain.weight_bytes
    assert exact.kernel == plain.kernel == "reference"


class Taking(Kernel):
    """A kernel that takes every layer, and is exact or says why not."""

    name: ClassVar[str] = "none"

    def __init__(self, name: str, *, why: str = "") -> None:
        self.name = name  # type: ignore[misc]
        self.why = why

    def missing(self, device: torch.device) -> str:
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return self.why

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        assert not (exact and self.why)
        return Tiles(layer, dtype, rows=1, padded=False)


def test_what_is_not_exact_is_passed_over_where_layers_must_be() -> None:
    one, other = Taking("triton", why="sums race"), Taking("torch")
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, EMPTY, [one, other]) is one
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, EMPTY, [one, other], exact=True) is other
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, EMPTY, [one], exact=True) is None


def test_exact_layers_have_an_order_of_their_own() -> None:
    humming, triton = Taking("humming"), Taking("triton")
    kernels = [humming, triton]
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, EMPTY, kernels) is humming
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, EMPTY, kernels, exact=True) is triton


def test_what_was_measured_of_exact_layers_goes_first_among_them_alone() -> None:
    kernels = [Taking("humming"), Taking("triton"), Taking("torch")]
    best = {"w4a16-g128, exact": {"256x64": {"float16": "torch"}}}
    table = Table(machine=MACHINE, best=best)
    asked = (layer(w4a16()), "w4a16-g128", HALF, CPU, table, kernels)
    assert choose(*asked, exact=True) is kernels[2]
    assert choose(*asked) is kernels[0]


def test_a_named_kernel_that_is_not_exact_refuses_with_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quant.kernels.choice.AVAILABLE", (Taking("torch", why="its sums race"),))
    scheme = w4a16(kernel="torch")
    assert isinstance(fit(layer(scheme), scheme, FLOAT), Tiles)
    with pytest.raises(ValueError, match="its sums race"):
        fit(layer(scheme), scheme, FLOAT, exact=True)


def test_every_kernel_has_a_place_in_the_order() -> None:
    chosen = choose(layer(Dense()), "dense", HALF, CPU, EMPTY, exact=True)
    assert chosen is None  # there is no GPU here, and all have been asked
    assert named("marlin").inexact(layer(w4a16()), HALF).startswith("kernel=marlin")


def test_tinygemm_is_not_asked_for_sixty_four_rows_instead_of_one() -> None:
    told = named("torch").inexact(layer(w4a16()), BFLOAT)
    assert told.startswith("kernel=torch needs 8-bit or dense weights for exact=true, as 64 rows")
    assert told.endswith("kernel=triton works")
    for scheme in (Dense(), W8A8(smooth_alpha=None), FP8()):
        assert named("torch").inexact(layer(scheme), BFLOAT) == ""


# On a GPU.

WIDTHS = (1, 2, 3, 8, 16, 17, 31, 33, 48, 60, 64, 65, 100, 128, 129, 200)
N, K = 384, 1024


def gpu_inputs(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, K, generator=torch.Generator().manual_seed(n))
    return (x * torch.linspace(0.1, 8, K)).to("cuda", dtype)


def gpu_layer(label: str) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    scheme = SCHEMES[label]
    return scheme.layer(scheme.pack(weight)).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize("kernel", ["triton", "cuda", "torch", "humming", "reference"])
def test_on_a_gpu_rows_depend_neither_on_how_many_are_read_nor_on_their_place(
    kernel: str, label: str, dtype: torch.dtype
) -> None:
    if kernel == "humming" and find_spec("humming") is None:
        pytest.skip("needs humming-kernels")
    own = gpu_layer(label)
    if kernel == "reference":
        exact: QuantLinear = fixed(own, dtype)
    elif reason := named(kernel).refuses(own, dtype, torch.device("cuda"), exact=True):
        pytest.skip(reason)
    else:
        exact = named(kernel).fit(own, dtype, exact=True)
    x = gpu_inputs(max(WIDTHS), dtype)
    whole = exact(x)
    for n in WIDTHS:
        assert torch.equal(exact(x[:n]), whole[:n]), n
        assert torch.equal(exact(x[-n:]), whole[-n:]), n
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).to("cuda")
    assert torch.equal(exact(x[:60][order].contiguous()), whole[:60][order])


@pytest.mark.gpu
def test_integer_sums_are_exact_as_they_are() -> None:
    own = gpu_layer("w8a8")
    assert isinstance(named("torch").fit(own, HALF, exact=True), TorchInt8)


@pytest.mark.gpu
def test_on_a_gpu_every_scheme_has_an_exact_kernel() -> None:
    device = torch.device("cuda")
    for label, scheme in SCHEMES.items():
        chosen = choose(
            gpu_layer(label), scheme.label, BFLOAT, device, EMPTY, AVAILABLE, exact=True
        )
        if label in ("qqq-g128", "qoq", "w8a16"):  # humming takes w8a16 in float16 alone
            assert chosen is None, label  # the reference, in tiles
        else:
            assert chosen is not None, label
