"""Every kernel on a GPU: against float64, bit-equal layouts, graphs, rows it must not write."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.dense import Dense
from quant.fp8 import FP8
from quant.kernels import humming_build
from quant.kernels.choice import named
from quant.kernels.humming import HummingKernel
from quant.scheme import QuantLinear, Scheme
from quant.w4a8_qoq import W4A8QoQ
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16

pytestmark = pytest.mark.gpu

N, K = 384, 1024  # several tiles of every layout, and no power of two
WIDTHS = (1, 3, 16, 17, 33, 64, 129)


def w4a16(group_size: int, *, symmetric: bool) -> W4A16:
    return W4A16(group_size=group_size, symmetric=symmetric, range_search=False)


SCHEMES: dict[str, Scheme] = {
    "dense": Dense(),
    "w4a16-g128": w4a16(128, symmetric=True),
    "w4a16-g64": w4a16(64, symmetric=True),
    "w4a16-g32": w4a16(32, symmetric=True),
    "w4a16-channel": w4a16(-1, symmetric=True),
    "w4a16-g128-asym": w4a16(128, symmetric=False),
    "w4a16-g32-asym": w4a16(32, symmetric=False),
    "w4a16-channel-asym": w4a16(-1, symmetric=False),
    "w8a16-g128": W8A16(group_size=128, symmetric=True, range_search=False),
    "w8a16-g128-asym": W8A16(group_size=128, symmetric=False, range_search=False),
    "w8a8": W8A8(smooth_alpha=None),
    "w8a8-smooth": W8A8(smooth_alpha=0.5),
    "fp8": FP8(),
    "qqq-channel": W4A8QQQ(group_size=-1, range_search=False),
    "qqq-g128": W4A8QQQ(group_size=128, range_search=False),
    "qoq-channel": W4A8QoQ(group_size=-1, range_search=False),
    "qoq-g128": W4A8QoQ(group_size=128, range_search=False),
}
OWN = {f"w4a16-{groups}" for groups in ("g128", "g64", "channel", "g128-asym", "channel-asym")}
COMPUTED = {
    "triton": OWN | {"w8a8", "w8a8-smooth"},
    "cuda": OWN | {"dense"},
    "humming": {*SCHEMES} - {"dense", "qqq-g128", "qoq-channel"},
    "torch": {"dense", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w8a8", "w8a8-smooth", "fp8"},
}
# Only where the package computes the dtype at all.
ONE_DTYPE = {
    ("humming", "w8a16-g128"): torch.float16,
    ("humming", "w8a16-g128-asym"): torch.float16,
    ("torch", "w4a16-g128"): torch.bfloat16,
    ("torch", "w4a16-g64"): torch.bfloat16,
    ("torch", "w4a16-g32"): torch.bfloat16,
    ("torch", "fp8"): torch.bfloat16,
}
# ||y - y64|| / ||y64||: three roundings of 2^-9 in bfloat16, of 2^-12 in float16; e4m3 sums are
# kept to about 14 bits by the tensor cores.
ERRORS = {torch.float16: 1e-3, torch.bfloat16: 5e-3}

CASES = [
    (kernel, label, dtype)
    for kernel, labels in COMPUTED.items()
    for label in sorted(labels)
    for dtype in ERRORS
    if ONE_DTYPE.get((kernel, label), dtype) == dtype
]
cases = pytest.mark.parametrize(
    ("kernel", "label", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def _skip_without_package(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    wanted = params.params.get("kernel", "humming") if params else "humming"
    if wanted == "humming" and find_spec("humming") is None:
        pytest.skip("needs humming-kernels")


def reference(label: str, n: int = N) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, K, generator=generator) * torch.rand(n, 1, generator=generator)
    scheme = SCHEMES[label]
    absmax = torch.rand(K, generator=generator) + 1 if scheme.needs_absmax else None
    return scheme.layer(scheme.pack(weight, absmax)).to("cuda")


def inputs(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, K, generator=torch.Generator().manual_seed(n))
    return (x * torch.linspace(0.1, 8, K)).to("cuda", dtype)


def fitted(kernel: str, label: str, dtype: torch.dtype) -> QuantLinear:
    layer, own = reference(label), named(kernel)
    assert own.refuses(layer, dtype, torch.device("cuda")) == ""
    return own.fit(layer, dtype)


@cases
def test_products_are_those_of_float64(kernel: str, label: str, dtype: torch.dtype) -> None:
    layer, exact = fitted(kernel, label, dtype), reference(label)
    for n in WIDTHS:
        x = inputs(n, dtype)
        expected = exact(x.double())
        error = (layer(x).double() - expected).norm() / expected.norm()
        assert float(error) < ERRORS[dtype], n


@cases
def test_dequantize_unpacks_the_stored_weight_bit_for_bit(
    kernel: str, label: str, dtype: torch.dtype
) -> None:
    layer = fitted(kernel, label, dtype)
    assert torch.equal(layer.dequantize(), reference(label).dequantize())
    assert layer.kernel == kernel


@cases
def test_a_replayed_graph_gives_the_eager_product_of_new_inputs(
    kernel: str, label: str, dtype: torch.dtype
) -> None:
    layer = fitted(kernel, label, dtype)
    for n in (1, 33):
        x = inputs(n, dtype)
        layer(x)  # cuBLAS's own workspace
        torch.cuda.synchronize()  # noqa: TID251
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(inputs(n + 1, dtype)[1:])
        y.fill_(torch.nan)
        graph.replay()
        expected = reference(label)(x.double())
        assert float((y.double() - expected).norm() / expected.norm()) < ERRORS[dtype]


@cases
def test_weight_bytes_are_the_schemes_own_but_for_narrower_scales(
    kernel: str, label: str, dtype: torch.dtype
) -> None:
    own, theirs = fitted(kernel, label, dtype).weight_bytes, reference(label).weight_bytes
    if label == "dense":
        assert own == theirs // 2  # from float32
    else:
        assert 0.95 * theirs < own < 1.15 * theirs  # tinygemm stores a zero beside each scale


@cases
def test_what_it_cannot_read_is_refused_before_launch(
    kernel: str, label: str, dtype: torch.dtype
) -> None:
    layer = fitted(kernel, label, dtype)
    with pytest.raises(ValueError, match="must be contiguous"):
        layer(inputs(K, dtype).t())
    with pytest.raises(ValueError, match="must be torch"):
        layer(inputs(2, torch.float32))
    assert layer(inputs(0, dtype)).shape == (0, N)
    assert layer(inputs(6, dtype).view(2, 3, K)).shape == (2, 3, N)


@pytest.mark.parametrize("label", ["w8a8", "qqq-channel", "qoq-g128"])
def test_integer_sums_are_exact(label: str) -> None:
    # Codes and scales of powers of two leave nothing to round but the end: float16 holds it all.
    layer = fitted("humming", label, torch.float16)
    own = layer.reference().to("cuda")  # type: ignore[operator]
    x = torch.zeros(5, K, dtype=torch.float16, device="cuda")
    x[torch.arange(5), torch.arange(5)] = 127.0  # a code of 127 on a scale of one
    x[torch.arange(5), torch.arange(5) + 200] = -3.0
    expected = own(x.double())
    assert torch.allclose(layer(x).double(), expected, rtol=2**-9, atol=0)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_tokens_are_rounded_as_the_reference_rounds_them(codes: torch.dtype) -> None:
    from quant.grid import round_tokens, round_tokens_e4m3
    from quant.kernels.tokens_triton import round_rows

    x = inputs(65, torch.bfloat16)
    x[3] = 0
    expected = (round_tokens if codes == torch.int8 else round_tokens_e4m3)(x.cpu())
    found = round_rows(x, codes=codes)
    assert torch.equal(found.codes.cpu().view(torch.int8), expected.codes.view(torch.int8))
    assert torch.equal(found.scale.cpu(), expected.scale)


def test_a_nan_is_not_hidden() -> None:
    layer, x = fitted("humming", "w8a8", torch.float16), inputs(2, torch.float16)
    x[1, 7] = torch.nan
    y = layer(x)
    assert bool(y[0].isfinite().all())
    assert bool(y[1].isnan().all())


@pytest.fixture
def _torn_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import humming.utils.jit as places

    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path))
    places.get_humming_cache_dir.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    os.environ.pop("HUMMING_CACHE_DIR", None)
    places.get_humming_cache_dir.cache_clear()


def relative_binaries(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.cubin")}


def test_a_torn_binary_is_compiled_anew(_torn_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = reference("w4a16-g64", n=512)
    kernel = HummingKernel()
    kernel.fit(layer, torch.float16)
    binaries = relative_binaries(_torn_cache)
    assert binaries
    torn = _torn_cache / "torn"  # under another path, since a loaded binary stays loaded
    shutil.copytree(_torn_cache, torn, ignore=shutil.ignore_patterns("torn"))
    for binary in torn.rglob("*.cubin"):
        binary.write_bytes(binary.read_bytes()[:100])
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(torn))
    humming_build._forget()
    humming_build.compiler_problem.cache_clear()  # as a new process
    assert kernel.refuses(layer, torch.float16, torch.device("cuda")) == ""
    assert not relative_binaries(torn)
    x = inputs(4, torch.float16)
    expected = layer(x.double())
    error = (kernel.fit(layer, torch.float16)(x).double() - expected).norm() / expected.norm()
    assert float(error) < ERRORS[torch.float16]
    assert relative_binaries(torn) >= binaries  # every torn one is there again


TRITON = """
import sys, torch
from methods.fused import silu_mul
from quant.kernels import triton_cache
triton_cache.prepare()
x = torch.linspace(-2, 2, 64, device="cuda").view(2, 32)
gate, up = x.chunk(2, dim=1)
assert torch.allclose(silu_mul(x), torch.nn.functional.silu(gate) * up, atol=1e-6)
"""


def test_a_torn_kernel_of_tritons_is_compiled_anew(tmp_path: Path) -> None:
    def run() -> None:
        env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", TRITON], env=env, check=True, timeout=120)

    run()
    torn = [
        path
        for kind in ("cubin", "json", "so")
        for path in sorted(tmp_path.glob(f"*/*.{kind}"))[:1]
    ]
    assert {path.suffix for path in torn} >= {".cubin", ".json"}
    for kept in torn:
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2])
        run()
        assert len(kept.read_bytes()) > len(whole) // 2
