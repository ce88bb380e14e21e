"""What every scheme keeps, for every yaml in conf/quant."""

import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from quant.scheme import Scheme

# All but the one that is no format of its own: layers as a checkpoint stores them.
YAMLS = [
    path
    for path in sorted((Path(__file__).parents[2] / "conf" / "quant").glob("*.yaml"))
    if path.stem != "checkpoint"
]
N, K = 256, 384

LABELS = {
    "dense": "dense",
    "fp8": "fp8",
    "w4a16": "w4a16-g128",
    "w4a16_asym": "w4a16-g128-asym",
    "w4a16_channel": "w4a16-channel",
    "w4a8_qoq": "w4a8-qoq-channel",
    "w4a8_qoq_g128": "w4a8-qoq-g128",
    "w4a8_qqq": "w4a8-qqq-channel",
    "w4a8_qqq_g128": "w4a8-qqq-g128",
    "w8a16": "w8a16-g128",
    "w8a8": "w8a8",
    "w8a8_smooth": "w8a8-smooth",
}
CODES_8, CODES_4, GROUPS = N * K, N * K // 2, N * K // 128
BYTES = {
    "dense": 4 * N * K,
    "fp8": CODES_8 + 4 * N,
    "w4a16": CODES_4 + 2 * GROUPS,
    "w4a16_asym": CODES_4 + 3 * GROUPS,
    "w4a16_channel": CODES_4 + 2 * N,
    "w4a8_qoq": CODES_4 + 4 * N,
    "w4a8_qoq_g128": CODES_4 + 2 * N + 2 * GROUPS,
    "w4a8_qqq": CODES_4 + 4 * N,
    "w4a8_qqq_g128": CODES_4 + 4 * N + 2 * GROUPS,
    "w8a16": CODES_8 + 2 * GROUPS,
    "w8a8": CODES_8 + 2 * N,
    "w8a8_smooth": CODES_8 + 2 * N + 4 * K,
}
# Relative error of the product of normal weights and activations, measured and rounded up.
ERRORS = {
    "dense": 0.0,
    "fp8": 0.04,
    "w4a16": 0.11,
    "w4a16_asym": 0.10,
    "w4a16_channel": 0.12,
    "w4a8_qoq": 0.12,
    "w4a8_qoq_g128": 0.11,
    "w4a8_qqq": 0.13,
    "w4a8_qqq_g128": 0.11,
    "w8a16": 0.007,
    "w8a8": 0.015,
    "w8a8_smooth": 0.015,
}
WORST = 0.2  # of a scheme that is not listed: whoever adds one may add its own figures above
INTEGER = [y for y in YAMLS if y.stem.startswith(("w8a8", "w4a8"))]

by_yaml = pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)


def build(path: Path) -> Scheme:
    fields = {str(name): value for name, value in OmegaConf.load(path).items()}
    module, name = fields.pop("_target_").rsplit(".", 1)
    scheme = getattr(importlib.import_module(module), name)(**fields)
    assert isinstance(scheme, Scheme)
    return scheme


def packed(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    absmax = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 3
    return scheme.pack(weight, absmax if scheme.needs_absmax else None)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 20


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(7, K, generator=torch.Generator().manual_seed(2))


def test_labels_tell_formats_apart() -> None:
    labels = {y.stem: build(y).label for y in YAMLS}
    assert len(set(labels.values())) == len(YAMLS)
    assert LABELS.items() <= labels.items()


@by_yaml
def test_yaml_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert second == f"#   specquant run quant={path.stem}"


@by_yaml
def test_weight_bytes_count_every_stored_tensor(path: Path, weight: Tensor) -> None:
    scheme = build(path)
    stored = packed(scheme, weight)
    expected = BYTES.get(path.stem, sum(t.nbytes for t in stored.values()))
    assert scheme.layer(stored).weight_bytes == expected
    wide = {name: torch.cat([t, t])[: len(t)] for name, t in stored.items()}
    assert scheme.layer(wide).weight_bytes == expected


@by_yaml
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_product_is_near_the_dense_one(
    path: Path, dtype: torch.dtype, weight: Tensor, x: Tensor
) -> None:
    scheme = build(path)
    y = scheme.layer(packed(scheme, weight))(x.to(dtype))
    expected = x.double() @ weight.double().t()
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 1e-2)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= (
        ERRORS.get(path.stem, WORST) + rounding
    ) * expected.norm()


@by_yaml
def test_dequantized_weight_gives_the_layers_product(path: Path, weight: Tensor, x: Tensor) -> None:
    scheme = build(path)
    layer = scheme.layer(packed(scheme, weight))
    given = layer.dequantize()
    assert (given.dtype, given.shape) == (torch.float32, (N, K))
    # What is left between the two is the rounding of activations, where a format rounds them.
    y, expected = layer(x.double()), x.double() @ given.double().t()
    limit = {"fp8": 0.03, "int8": 0.01}.get(scheme.activation_format, 1e-12)
    assert (y - expected).norm() <= limit * expected.norm()


@by_yaml
def test_leading_dimensions_are_kept(path: Path, weight: Tensor, x: Tensor) -> None:
    scheme = build(path)
    layer = scheme.layer(packed(scheme, weight))
    flat = layer(x[:6].double())
    assert torch.allclose(layer(x[:6].double().view(2, 3, K)), flat.view(2, 3, N), rtol=1e-12)
    assert torch.allclose(layer(x[0].double()), flat[0], rtol=1e-12)
    assert layer(x[:0]).shape == (0, N)


@by_yaml
def test_a_token_of_zeros_gives_zeros(path: Path, weight: Tensor, x: Tensor) -> None:
    scheme = build(path)
    tokens = x.clone()
    tokens[3] = 0
    y = scheme.layer(packed(scheme, weight))(tokens)
    assert bool((y[3] == 0).all())
    assert bool(torch.isfinite(y).all())


@by_yaml
def test_a_broken_token_stays_visible_and_alone(path: Path, weight: Tensor, x: Tensor) -> None:
    scheme = build(path)
    tokens = x.clone()
    tokens[3, 5] = float("nan")
    y = scheme.layer(packed(scheme, weight))(tokens)
    assert torch.isnan(y).all(-1).tolist() == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("path", INTEGER, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_do_not_depend_on_how_many_are_multiplied(
    path: Path, dtype: torch.dtype, weight: Tensor, x: Tensor
) -> None:
    scheme = build(path)
    layer = scheme.layer(packed(scheme, weight))
    tokens = x.to(dtype)
    assert torch.equal(layer(tokens), torch.cat([layer(row[None]) for row in tokens]))


@by_yaml
def test_every_stored_tensor_takes_part(path: Path, weight: Tensor, x: Tensor) -> None:
    scheme = build(path)
    stored = packed(scheme, weight)
    before = scheme.layer(stored)(x)
    for name, tensor in stored.items():
        values = tensor.double().flatten()
        values[values.abs().argmax()] *= 0.9
        changed = values.to(tensor.dtype).view_as(tensor)
        after = scheme.layer(stored | {name: changed})(x)
        assert not torch.equal(after, before), name


@by_yaml
def test_a_cast_moves_no_format(path: Path, weight: Tensor) -> None:
    if path.stem == "dense":
        pytest.skip("its dtype is the weight's own")
    scheme = build(path)
    layer = scheme.layer(packed(scheme, weight))
    before = {name: (b.dtype, b.clone()) for name, b in layer.named_buffers()}
    layer.to(torch.bfloat16).double()
    for name, buffer in layer.named_buffers():
        dtype, value = before[name]
        assert buffer.dtype == dtype
        assert torch.equal(buffer.view(torch.uint8), value.view(torch.uint8))


@by_yaml
def test_missing_and_foreign_tensors_are_refused(path: Path, weight: Tensor) -> None:
    scheme = build(path)
    stored = packed(scheme, weight)
    for name in stored:
        with pytest.raises(ValueError, match="stored tensors must be"):
            scheme.layer({other: t for other, t in stored.items() if other != name})
    with pytest.raises(ValueError, match="stored tensors must be"):
        scheme.layer(stored | {"bias": torch.zeros(N)})


@by_yaml
def test_tensors_of_a_wrong_shape_or_dtype_are_refused(path: Path, weight: Tensor) -> None:
    scheme = build(path)
    stored = packed(scheme, weight)
    for name, tensor in stored.items():
        with pytest.raises(ValueError, match="must be"):
            scheme.layer(stored | {name: tensor[None]})
        with pytest.raises(ValueError, match="must be"):
            scheme.layer(stored | {name: tensor.to(torch.int64)})
        if tensor.ndim == 1:
            with pytest.raises(ValueError, match="must be"):
                scheme.layer(stored | {name: tensor[:-1]})


@by_yaml
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 128),
        torch.zeros(4, 0),
        torch.zeros(128),
        torch.zeros(4, 128, dtype=torch.int8),
        torch.full((4, 128), float("nan")),
        torch.full((4, 128), float("inf")),
    ],
    ids=["no rows", "no columns", "vector", "integers", "nan", "inf"],
)
def test_what_is_no_weight_is_refused(path: Path, weight: Tensor) -> None:
    scheme = build(path)
    with pytest.raises(ValueError, match="weight must be"):
        scheme.pack(weight, torch.ones(128) if scheme.needs_absmax else None)


@by_yaml
def test_packing_a_half_precision_weight_is_packing_its_values(path: Path, weight: Tensor) -> None:
    if path.stem == "dense":
        pytest.skip("it keeps the dtype")
    scheme = build(path)
    half = packed(scheme, weight.bfloat16())
    for name, tensor in packed(scheme, weight.bfloat16().float()).items():
        assert torch.equal(half[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.gpu
@by_yaml
@pytest.mark.parametrize("n", [1, 17, 60])
def test_cuda_gives_what_the_cpu_gives(path: Path, n: int, weight: Tensor) -> None:
    scheme = build(path)
    layer = scheme.layer(packed(scheme, weight))
    x = torch.randn(n, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = layer(x)
    actual = layer.cuda()(x.cuda()).cpu()
    assert (actual - expected).norm() <= 1e-12 * expected.norm()
