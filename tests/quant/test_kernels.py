"""What kernels say without a GPU: refusals, the choice between them, layouts learnt and undone."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from quant.dense import Dense
from quant.formats.native import native_config, read_native
from quant.fp8 import FP8
from quant.kernels.choice import AVAILABLE, choose, named
from quant.kernels.kernel import Kernel, Rounded
from quant.kernels.layout import Layout
from quant.kernels.machine import Machine
from quant.kernels.table import Table, read_table, table_path, write_table
from quant.kernels.triton_kernel import TritonKernel
from quant.pack import unpack_nibbles
from quant.scheme import KERNELS, QuantLinear, Scheme
from quant.stacked import StackedLinear
from quant.w4a8_qoq import W4A8QoQ
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16

CPU = torch.device("cpu")
HALF, BFLOAT = torch.float16, torch.bfloat16
MACHINE = Machine(gpu="NVIDIA H200", torch="2.11.0", triton="3.6.0", humming="0.1.19")


def w4a16(group_size: int = 128, *, symmetric: bool = True, kernel: str = "auto") -> W4A16:
    return W4A16(group_size=group_size, symmetric=symmetric, range_search=False, kernel=kernel)


def layer(scheme: Scheme, n: int = 64, k: int = 256) -> QuantLinear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return scheme.layer(scheme.pack(weight))


class Taking(Kernel):
    """A kernel that takes what it is told to, and gives the layer itself."""

    name: ClassVar[str] = "none"

    def __init__(self, name: str, *, takes: bool = True) -> None:
        self.name = name  # type: ignore[misc]
        self.takes = takes

    def missing(self, device: torch.device) -> str:
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return "" if self.takes else "not this one"

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        return layer


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_on_a_cpu_the_reference_computes(kernel: str) -> None:
    scheme = w4a16(kernel=kernel)
    stored = scheme.pack(torch.randn(8, 256))
    assert scheme.linear(stored, dtype=torch.float32, device=CPU).kernel == "reference"


@pytest.mark.parametrize("kernel", ["humming", "torch"])
def test_a_kernel_of_gpus_refuses_a_cpu(kernel: str) -> None:
    scheme = w4a16(kernel=kernel)
    told = f"kernel={kernel} needs a CUDA device, got cpu; kernel=reference works"
    with pytest.raises(ValueError, match=told):
        scheme.linear(scheme.pack(torch.randn(64, 256)), dtype=HALF, device=CPU)


def test_marlin_is_refused_with_its_reason() -> None:
    scheme = w4a16(kernel="marlin")
    with pytest.raises(ValueError, match=r"kernel=marlin: .* faults on Hopper.*kernel=humming"):
        scheme.linear(scheme.pack(torch.randn(64, 256)), dtype=HALF, device=CPU)


def test_an_unknown_kernel_is_refused_by_every_scheme() -> None:
    for make in (Dense, FP8, lambda **key: W8A8(smooth_alpha=None, **key), w4a16):
        with pytest.raises(ValueError, match=r"kernel must be one of auto, .* got 'fast'"):
            make(kernel="fast")


def test_a_kernel_changes_neither_label_nor_what_a_file_says() -> None:
    auto, torchs = w4a16(), w4a16(kernel="torch")
    assert auto.label == torchs.label
    assert auto != torchs
    configs = [native_config(scheme=s, lm_head=None, rounding="nearest") for s in (auto, torchs)]
    assert configs[0] == configs[1]
    assert read_native(configs[1], frozenset()).scheme == auto


def test_a_file_cannot_name_a_kernel() -> None:
    config = native_config(scheme=w4a16(), lm_head=None, rounding="nearest")
    config["scheme"]["kernel"] = "torch"
    with pytest.raises(ValueError, match="no key kernel in a file"):
        read_native(config, frozenset())


@pytest.mark.parametrize("name", sorted({*KERNELS} - {"auto", "reference"}))
def test_every_name_is_a_kernel(name: str) -> None:
    assert named(name).name == name


@pytest.mark.parametrize(
    ("scheme", "dtype", "n", "k", "told"),
    [
        (w4a16(), torch.float32, 64, 256, "needs dtype=float16 or bfloat16, got torch.float32"),
        (w4a16(32), HALF, 100, 256, "N in multiples of 64 and K of 128, got N=100, K=256"),
        (w4a16(32), HALF, 64, 192, "N in multiples of 64 and K of 128, got N=64, K=192"),
        (w4a16(16), HALF, 64, 256, "group_size -1 or in multiples of 32, got 16"),
        (
            W8A16(group_size=128, symmetric=True, range_search=False),
            BFLOAT,
            64,
            256,
            "dtype=float16 for 8-bit weights, got torch.bfloat16",
        ),
        (W4A8QQQ(group_size=128, range_search=False), HALF, 64, 256, "rounds to 8 bits again"),
        (W4A8QoQ(group_size=-1, range_search=False), HALF, 64, 256, "whose is rounded"),
        (Dense(), HALF, 64, 256, "a quantised format, got DenseLinear; kernel=torch works"),
    ],
)
def test_humming_names_the_limit_and_what_works(
    scheme: Scheme, dtype: torch.dtype, n: int, k: int, told: str
) -> None:
    reason = named("humming").unfit(layer(scheme, n, k), dtype)
    assert told in reason
    assert "\n" not in reason
    assert reason.endswith(" works")


@pytest.mark.parametrize(
    ("scheme", "dtype", "k", "told"),
    [
        (w4a16(), HALF, 256, "needs dtype=bfloat16 for 4-bit weights, got torch.float16"),
        (w4a16(symmetric=False), BFLOAT, 256, "needs symmetric weights, got stored zeros"),
        (w4a16(-1), BFLOAT, 384, "needs group_size 32, 64, 128, 256, got 384"),
        (w4a16(32), BFLOAT, 96, "needs K in multiples of 128 and N of 8, got K=96, N=64"),
        (W8A8(smooth_alpha=None), HALF, 100, "K and N in multiples of 8, got K=100, N=64"),
        (FP8(), HALF, 256, "needs dtype=bfloat16 for fp8, got torch.float16"),
        (W4A8QQQ(group_size=-1, range_search=False), HALF, 256, "a format that torch multiplies"),
    ],
)
def test_torch_names_the_limit_and_what_works(
    scheme: Scheme, dtype: torch.dtype, k: int, told: str
) -> None:
    reason = named("torch").unfit(layer(scheme, 64, k), dtype)
    assert told in reason
    assert reason.endswith("kernel=reference works")


def test_what_nobody_measured_goes_to_the_first_that_takes_it() -> None:
    one, other = Taking("humming", takes=False), Taking("torch")
    empty = Table(machine=MACHINE, best={})
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, empty, [one, other]) is other
    assert choose(layer(w4a16()), "w4a16-g128", HALF, CPU, empty, [one]) is None


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("scheme", "absent", "chosen"),
    [
        (w4a16(), (), "cuda"),
        (w4a16(symmetric=False), (), "cuda"),
        (Dense(), (), "cuda"),
        (w4a16(), ("cuda",), ("humming", "triton")),
        (Dense(), ("cuda",), "torch"),
        (W8A8(smooth_alpha=None), (), ("humming", "triton")),
    ],
)
def test_on_a_gpu_with_all_of_them_auto_takes(
    scheme: Scheme,
    absent: tuple[str, ...],
    chosen: str | tuple[str, str],
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kernel in AVAILABLE[:-1]:
        lacks = "lacks" if kernel.name in absent else ""
        monkeypatch.setattr(type(kernel), "missing", lambda self, device, lacks=lacks: lacks)
    empty = Table(machine=MACHINE, best={})
    found = choose(layer(scheme), scheme.label, HALF, CPU, empty, exact=exact)
    assert found is not None
    assert found.name == (chosen if isinstance(chosen, str) else chosen[exact])


@pytest.mark.parametrize(
    ("measured", "chosen"), [("torch", "torch"), ("reference", None), ("forgotten", "humming")]
)
def test_what_was_measured_goes_first(measured: str, chosen: str | None) -> None:
    kernels = [Taking("humming"), Taking("torch")]
    table = Table(machine=MACHINE, best={"w4a16-g128": {"256x64": {"float16": measured}}})
    found = choose(layer(w4a16()), "w4a16-g128", HALF, CPU, table, kernels)
    assert (found and found.name) == chosen
    # Of another dtype nobody knows.
    other = choose(layer(w4a16()), "w4a16-g128", BFLOAT, CPU, table, kernels)
    assert other is kernels[0]


def test_a_table_comes_back_and_keeps_what_it_said_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_table(Table(machine=MACHINE, best={"fp8": {"8x16": {"float16": "torch"}}}))
    write_table(Table(machine=MACHINE, best={"fp8": {"8x32": {"float16": "humming"}}}))
    best = {"fp8": {"8x16": {"float16": "torch"}, "8x32": {"float16": "humming"}}}
    assert read_table(MACHINE).best == best
    assert table_path(MACHINE).parent == tmp_path / "specquant"
    other = Machine(gpu="NVIDIA H200", torch="2.12.0", triton="3.6.0", humming="0.1.19")
    assert read_table(other).best == {}


def test_a_table_of_earlier_kernels_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_table(Table(machine=MACHINE, best={"dense": {"8x16": {"float16": "torch"}}}))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    assert read_table(MACHINE).best == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}'])
def test_a_torn_table_counts_as_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_table(Table(machine=MACHINE, best={"fp8": {"8x16": {"float16": "torch"}}}))
    assert json.loads(path.read_text())["best"]
    path.write_text(text)
    assert read_table(MACHINE).best == {}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows_first", [True, False])
def test_an_unknown_order_of_codes_is_learnt_and_undone(bits: int, rows_first: bool) -> None:
    rows, columns, n, k = 8, 16, 24, 64
    generator = torch.Generator().manual_seed(bits)
    mixed = torch.randperm(rows * columns, generator=generator)
    flips = torch.randint(2**bits, (rows * columns,), generator=generator)

    def pack(packed: Tensor) -> Tensor:
        codes = unpack_nibbles(packed) if bits == 4 else packed.view(torch.int8)
        tiles = codes.view(codes.shape[0] // rows, rows, -1, columns).transpose(1, 2)
        if not rows_first:
            tiles = tiles.transpose(0, 1)
        sent = tiles.reshape(-1, rows * columns)[:, mixed] ^ flips.to(torch.int8)
        if bits == 8:
            return sent.contiguous().view(torch.int32)
        low, high = sent[:, 0::2] & 15, sent[:, 1::2] & 15
        return (low | (high << 4)).contiguous().view(torch.int32)

    stored = torch.randint(256, (n, k * bits // 8), dtype=torch.uint8, generator=generator)
    layout = Layout(pack, bits=bits, rows=rows, columns=columns, rows_first=rows_first)
    assert torch.equal(layout.unpack(pack(stored), n, k), stored)


def test_a_packer_that_mixes_tiles_is_noticed() -> None:
    layout = Layout(lambda p: p, bits=8, rows=8, columns=16, rows_first=True)
    with pytest.raises(ValueError, match="keep the codes of a tile of 8 x 16 together"):
        layout.unpack(torch.zeros(8, 64, dtype=torch.uint8), 8, 64)


def test_scales_that_lost_bits_are_restored_and_others_are_not_kept() -> None:
    exact = torch.tensor([0.1, 0.5])
    assert torch.equal(Rounded(exact, exact.half()).restored(exact.half()), exact)
    whole = torch.tensor([0.25, 0.5])
    assert Rounded(whole, whole.half()).exact is None


def test_stacked_layers_name_each_kernel_once() -> None:
    parts = [layer(w4a16()), layer(FP8())]
    assert StackedLinear(parts).kernel == "reference"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, 128, -1])
def test_our_own_layout_opens_to_the_references_bits(symmetric: bool, group_size: int) -> None:
    pytest.importorskip("triton")
    scheme = W4A16(group_size=group_size, symmetric=symmetric, range_search=False)
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    layer = scheme.layer(scheme.pack(weight))
    assert TritonKernel().unfit(layer, torch.float16) == ""
    fitted = TritonKernel().fit(layer, torch.float16)
    assert fitted.kernel == "triton"
    assert torch.equal(fitted.dequantize(), layer.dequantize())


@pytest.mark.parametrize(
    ("n", "k", "group_size", "dtype", "message"),
    [
        (96, 512, 128, torch.float16, "N in multiples of 64 and K of 256, got N=96, K=512"),
        (128, 384, 128, torch.float16, "got N=128, K=384"),
        (128, 512, 32, torch.float16, "group_size 64, 128 or a multiple of 256, got 32"),
        (128, 512, 128, torch.float32, "dtype=float16 or bfloat16, got torch.float32"),
    ],
)
def test_our_own_kernel_names_what_it_cannot_take(
    n: int, k: int, group_size: int, dtype: torch.dtype, message: str
) -> None:
    scheme = W4A16(group_size=group_size, symmetric=True, range_search=False)
    layer = scheme.layer(scheme.pack(torch.ones(n, k)))
    assert message in TritonKernel().unfit(layer, dtype)
    assert "needs a CUDA device" in TritonKernel().missing(torch.device("cpu"))
