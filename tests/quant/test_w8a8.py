import numpy as np
import pytest
import torch

from quant.scheme import QuantLinear
from quant.w8a8 import W8A8, W8A8Linear
from tests.quant import oracle

PLAIN = W8A8(smooth_alpha=None)
SMOOTH = W8A8(smooth_alpha=0.85)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_forward_is_the_integer_product_times_both_scales(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    stored = PLAIN.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    codes, scale = oracle.tokens(x)
    sums = codes @ stored["weight"].long().numpy().T
    expected = sums * oracle.column(stored["scales"]) * scale
    assert oracle.worst(PLAIN.layer(stored)(x), expected) < limit


def test_weights_are_the_nearest_on_a_float16_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    stored = PLAIN.pack(weight)
    scale = (np.abs(weight.numpy()).max(1) / np.float32(127)).astype(np.float16)
    assert stored["scales"].numpy().tolist() == scale.tolist()
    codes = np.rint(weight.numpy() / scale.astype(np.float32)[:, None]).clip(-127, 127)
    assert stored["weight"].numpy().tolist() == codes.tolist()


def test_smoothing_follows_both_ranges() -> None:
    weight = torch.tensor([[2.0, -8.0, 1.0, 0.0], [-4.0, 1.0, 0.5, 0.0]])
    absmax = torch.tensor([16.0, 0.5, 0.0, 3.0])
    smooth = SMOOTH.pack(weight, absmax)["smooth"]
    # Channel 2 never fired and channel 3 is not read: there is nothing to move.
    assert smooth.tolist() == pytest.approx([16**0.85 / 4**0.15, 0.5**0.85 / 8**0.15, 1, 1])


def test_smoothed_forward_divides_activations_first() -> None:
    torch.manual_seed(0)
    stored = SMOOTH.pack(torch.randn(48, 96), torch.rand(96) * 9 + 0.1)
    x = torch.randn(5, 96, dtype=torch.float64)
    codes, scale = oracle.tokens(x / stored["smooth"].double())
    sums = codes @ stored["weight"].long().numpy().T
    expected = sums * oracle.column(stored["scales"]) * scale
    assert oracle.worst(SMOOTH.layer(stored)(x), expected) < 1e-12


def test_smoothing_helps_where_a_channel_sticks_out() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(40, 128)
    x[:, 7] *= 100
    expected = x @ weight.t()
    plain = PLAIN.layer(PLAIN.pack(weight))(x) - expected
    smooth = SMOOTH.layer(SMOOTH.pack(weight, x.abs().amax(0)))(x) - expected
    assert smooth.norm() < 0.6 * plain.norm()


def test_smoothed_weight_is_given_as_unsmoothed_activations_meet_it() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    stored = SMOOTH.pack(weight, torch.rand(96) * 9 + 0.1)
    step = stored["scales"].float()[:, None] / stored["smooth"]
    error = (SMOOTH.layer(stored).dequantize() - weight).abs()
    assert bool((error <= 0.51 * step + 1e-6).all())


def test_smoothing_without_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs absmax of shape \[8\]"):
        SMOOTH.pack(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"needs absmax of shape \[8\]"):
        SMOOTH.pack(torch.randn(4, 8), torch.rand(7))
    with pytest.raises(ValueError, match="absmax must be finite"):
        SMOOTH.pack(torch.randn(4, 8), torch.full((8,), float("nan")))


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="smooth_alpha must be"):
        W8A8(smooth_alpha=1.2)


def test_only_smoothing_asks_for_calibration() -> None:
    assert [PLAIN.needs_absmax, SMOOTH.needs_absmax] == [False, True]


def test_a_plain_layer_has_no_smoothing_tensor() -> None:
    layer: QuantLinear = PLAIN.layer(PLAIN.pack(torch.randn(4, 8)))
    assert isinstance(layer, W8A8Linear)
    assert layer.smooth is None
