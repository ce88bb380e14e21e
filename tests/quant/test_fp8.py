import pytest
import torch

from quant.fp8 import FP8
from tests.quant import oracle

SCHEME = FP8()


def _e4m3(byte: int) -> float:
    """Decode a byte by the format's definition: sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def _values(codes: torch.Tensor) -> oracle.Array:
    table = torch.tensor([_e4m3(b) for b in range(256)], dtype=torch.float64)
    return oracle.column(table[codes.view(torch.uint8).long()])


def test_every_finite_byte_is_opened_by_the_formats_definition() -> None:
    codes = [b for b in range(256) if b & 0x7F != 0x7F]
    weight = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    layer = SCHEME.layer({"weight": weight, "scales": torch.ones(1)})
    assert layer.dequantize().tolist() == [[_e4m3(b) for b in codes]]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_forward_is_the_product_of_rounded_values_times_both_scales(
    dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = SCHEME.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    scale = x.abs().amax(1, keepdim=True) / 448
    rounded = _values((x / scale).to(torch.float8_e4m3fn))
    expected = rounded @ _values(stored["weight"]).T
    expected = expected * oracle.column(stored["scales"]) * scale.double().numpy()
    assert oracle.worst(SCHEME.layer(stored)(x), expected) < limit


def test_error_is_a_sixteenth_of_the_value() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    stored = SCHEME.pack(weight)
    smallest = stored["scales"][:, None] * 2.0**-9  # the subnormals' step
    error = (SCHEME.layer(stored).dequantize() - weight).abs()
    assert bool((error <= weight.abs() / 16 + smallest / 2).all())


def test_nan_codes_are_refused() -> None:
    weight = torch.tensor([[0x7F, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="weight must be finite"):
        SCHEME.layer({"weight": weight, "scales": torch.ones(1)})
