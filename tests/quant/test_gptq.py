from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.dense import Dense
from quant.fp8 import FP8
from quant.gptq import GPTQ
from quant.scheme import Scheme
from quant.w4a8_qoq import W4A8QoQ
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16
from tests.quant import oracle
from tests.quant.obq_oracle import Even, Floats, Format, Progressive, gptq

N, K, G = 24, 96, 16
DAMPING = 0.01
PLAIN = GPTQ(
    damping=DAMPING, max_damping=DAMPING, block_size=40, desc_act=False, static_groups=False
)


@dataclass
class Case:
    scheme: Scheme
    group: int
    form: Callable[[oracle.Array], Format]  # from the weight to round
    codes: Callable[[dict[str, Tensor]], oracle.Array]


def _nibbles(stored: dict[str, Tensor]) -> oracle.Array:
    return oracle.nibbles(stored["packed"]).astype(np.float64)


def _signed(stored: dict[str, Tensor]) -> oracle.Array:
    codes = _nibbles(stored)
    return np.where(codes > 7, codes - 16, codes)


def _bytes(name: str) -> Callable[[dict[str, Tensor]], oracle.Array]:
    return lambda stored: oracle.column(stored[name].float())


def _weight_only(kind: type[W4A16] | type[W8A16], group: int, *, symmetric: bool) -> Case:
    bits = 4 if kind is W4A16 else 8
    zero = 2 ** (bits - 1) if symmetric else None
    return Case(
        kind(group_size=group, symmetric=symmetric, range_search=False),
        K if group == -1 else group,
        lambda _: Even(0, 2**bits - 1, zero, np.float16),
        _nibbles if bits == 4 else _bytes("packed"),
    )


CASES = [
    _weight_only(W4A16, G, symmetric=True),
    _weight_only(W4A16, G, symmetric=False),
    _weight_only(W4A16, -1, symmetric=True),
    _weight_only(W8A16, G, symmetric=True),
    _weight_only(W8A16, G, symmetric=False),
    _weight_only(W8A16, -1, symmetric=True),
    Case(
        W4A8QQQ(group_size=-1, range_search=False),
        K,
        lambda _: Even(-7, 7, 0, np.float32),
        _signed,
    ),
    Case(
        W4A8QQQ(group_size=G, range_search=False),
        G,
        lambda _: Even(0, 15, 8, np.float32),
        _nibbles,
    ),
    Case(
        W4A8QoQ(group_size=-1, range_search=False),
        K,
        lambda _: Even(0, 15, None, np.float16),
        _nibbles,
    ),
    Case(W4A8QoQ(group_size=G, range_search=False), G, Progressive, _nibbles),
    Case(W8A8(smooth_alpha=None), K, lambda _: Even(-127, 127, 0, np.float16), _bytes("weight")),
    Case(W8A8(smooth_alpha=0.85), K, lambda _: Even(-127, 127, 0, np.float16), _bytes("weight")),
    Case(FP8(), K, lambda _: Floats(), _bytes("weight")),
]
SEARCHED: list[Scheme] = [
    W4A16(group_size=G, symmetric=True, range_search=True),
    W4A16(group_size=G, symmetric=False, range_search=True),
    W4A8QQQ(group_size=-1, range_search=True),
    W4A8QQQ(group_size=G, range_search=True),
    W4A8QoQ(group_size=-1, range_search=True),
    W4A8QoQ(group_size=G, range_search=True),
]

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.scheme.label)


def _weight() -> Tensor:
    return torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 20


def _inputs(rows: int = 400) -> Tensor:
    """Inputs that say much about each other, of different sizes."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K // 4, K, dtype=torch.float64, generator=generator)
    hidden = torch.randn(rows, K // 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(rows, K, dtype=torch.float64, generator=generator)
    return (hidden @ mix + noise) * torch.linspace(0.3, 3, K, dtype=torch.float64).roll(37)


def _hessian(x: Tensor) -> Tensor:
    return 2 / len(x) * x.t() @ x


def _absmax(scheme: Scheme) -> Tensor | None:
    return _inputs().abs().amax(0) if scheme.needs_absmax else None


def _error(scheme: Scheme, stored: dict[str, Tensor], hessian: Tensor) -> float:
    error = scheme.layer(stored).dequantize().double() - _weight()
    return float((error @ hessian @ error.t()).trace())


@by_case
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
def test_codes_are_the_textbooks(case: Case, desc_act: bool, static: bool) -> None:
    if desc_act and not static and case.group != K and "a16" not in case.scheme.label:
        pytest.skip("it cannot store an order")
    weight, hessian, absmax = _weight(), _hessian(_inputs()), _absmax(case.scheme)
    given, met = weight.numpy(), hessian.numpy()
    if absmax is not None:
        smooth = case.scheme.pack(weight, absmax)["smooth"].double().numpy()
        given, met = given * smooth, met / smooth / smooth[:, None]
    algorithm = replace(PLAIN, desc_act=desc_act, static_groups=static)
    stored = algorithm.pack(case.scheme, weight, hessian, absmax).stored
    expected = gptq(
        case.form(given),
        given,
        met,
        group=case.group,
        damping=DAMPING,
        desc_act=desc_act,
        static_groups=static or case.group == K,
    )
    ordered = "order" in stored
    assert ordered == (desc_act and not static and case.group != K)
    if ordered:
        assert stored["order"].tolist() == expected.order.tolist()
    codes = expected.codes if ordered else expected.codes[:, np.argsort(expected.order)]
    assert case.codes(stored).tolist() == codes.tolist()
    if not isinstance(case.scheme, W4A8QQQ):  # whose groups are rounded once more, to 8 bits
        values = expected.values if absmax is None else expected.values / smooth
        # QoQ per channel rounds zero * scale to float16, 2^-11 of it.
        limit = 1e-3 if isinstance(case.scheme, W4A8QoQ) and case.group == K else 1e-6
        assert oracle.worst(case.scheme.layer(stored).dequantize(), values) < limit


@pytest.mark.parametrize("block_size", [1, G - 1, G, 2 * G + 5, K, 1000])
@pytest.mark.parametrize("desc_act", [False, True])
def test_block_size_changes_no_code(block_size: int, desc_act: bool) -> None:
    scheme, hessian = CASES[1].scheme, _hessian(_inputs())
    first, second = (
        replace(PLAIN, desc_act=desc_act, block_size=size).pack(scheme, _weight(), hessian).stored
        for size in (block_size, 7)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scheme", [c.scheme for c in CASES] + SEARCHED, ids=lambda s: s.label)
def test_without_correlation_it_is_rounding_to_nearest(scheme: Scheme) -> None:
    weight, absmax = _weight().float(), _absmax(scheme)
    stored = PLAIN.pack(scheme, weight, torch.eye(K), absmax).stored
    nearest = scheme.pack(weight, absmax)
    assert stored.keys() == nearest.keys()
    for name, tensor in nearest.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("scheme", [c.scheme for c in CASES] + SEARCHED, ids=lambda s: s.label)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_err_less_than_with_nearest(
    scheme: Scheme, static: bool, dtype: torch.dtype
) -> None:
    hessian, absmax = _hessian(_inputs()), _absmax(scheme)
    algorithm = replace(PLAIN, static_groups=static)
    rounded = algorithm.pack(scheme, _weight(), hessian.to(dtype), absmax)
    nearest = scheme.pack(_weight(), absmax)
    assert _error(scheme, rounded.stored, hessian) < 0.8 * _error(scheme, nearest, hessian)


def test_large_activations_first_errs_less() -> None:
    scheme, hessian = CASES[0].scheme, _hessian(_inputs())
    first, as_they_come = (
        _error(
            scheme, replace(PLAIN, desc_act=act).pack(scheme, _weight(), hessian).stored, hessian
        )
        for act in (True, False)
    )
    assert first < as_they_come


def test_output_error_is_the_share_of_the_outputs_energy() -> None:
    scheme, x = CASES[0].scheme, _inputs()
    rounded = replace(PLAIN, desc_act=True).pack(scheme, _weight(), _hessian(x))
    given = scheme.layer(rounded.stored).dequantize().double()
    expected = (x @ (given - _weight()).t()).square().sum() / (x @ _weight().t()).square().sum()
    assert rounded.output_error == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("desc_act", [False, True])
def test_inputs_that_never_fire_are_rounded_to_zero_and_disturb_nobody(desc_act: bool) -> None:
    x = _inputs()
    dead = [0, 5, 40, 95]
    x[:, dead] = 0
    case = CASES[0]
    stored = replace(PLAIN, desc_act=desc_act).pack(case.scheme, _weight(), _hessian(x)).stored
    given = case.scheme.layer(stored).dequantize()
    assert bool((given[:, dead] == 0).all())
    expected = gptq(
        case.form(_weight().numpy()),
        _weight().numpy(),
        _hessian(x).numpy(),
        group=G,
        damping=DAMPING,
        desc_act=desc_act,
        static_groups=False,
    )
    assert oracle.worst(given, expected.values) < 1e-6


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_unit_of_the_inputs_does_not_matter(desc_act: bool) -> None:
    x = _inputs()
    x[:, [0, 5, 40, 95]] = 0
    scheme, algorithm = CASES[1].scheme, replace(PLAIN, desc_act=desc_act)
    small = algorithm.pack(scheme, _weight(), _hessian(x)).stored
    large = algorithm.pack(scheme, _weight(), _hessian(x) * 2.0**20).stored
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_fewer_rows_than_inputs_will_do() -> None:
    scheme, hessian = CASES[0].scheme, _hessian(_inputs(rows=K // 8))
    rounded = PLAIN.pack(scheme, _weight(), hessian)
    assert rounded.damping == DAMPING
    nearest = scheme.pack(_weight())
    assert _error(scheme, rounded.stored, hessian) < 0.3 * _error(scheme, nearest, hessian)


def _indefinite() -> Tensor:
    hessian = torch.eye(K, dtype=torch.float64)
    hessian[3, 8] = hessian[8, 3] = 1.05  # eigenvalue -0.05
    return hessian


def test_damping_grows_tenfold_as_far_as_it_may() -> None:
    rounded = replace(PLAIN, max_damping=0.5).pack(CASES[0].scheme, _weight(), _indefinite())
    assert rounded.damping == pytest.approx(0.1)


def test_an_indefinite_hessian_is_refused_where_damping_may_not_grow() -> None:
    with pytest.raises(ValueError, match=r"positive definite once damped.* at 0\.01 of"):
        PLAIN.pack(CASES[0].scheme, _weight(), _indefinite())


def test_heavy_tails_and_strong_correlation_do_not_overflow_qoqs_int8() -> None:
    scheme = W4A8QoQ(group_size=G, range_search=False)
    x = _inputs()
    x += 30 * x[:, :1]  # every input nearly the same: errors pile up in the last columns
    stored = PLAIN.pack(scheme, _weight() ** 3, _hessian(x)).stored
    k = 2 * stored["packed"].shape[1]
    opened = oracle.nibbles(stored["packed"]) * oracle.spread(stored["s2_scales"], k)
    assert np.abs(opened + oracle.spread(stored["s2_zeros"], k)).max() <= 127
    assert stored["s2_scales"].min() >= 1


@pytest.mark.parametrize("scheme", [CASES[7].scheme, CASES[9].scheme], ids=lambda s: s.label)
def test_schemes_that_store_no_order_refuse_desc_act_on_moving_groups(scheme: Scheme) -> None:
    with pytest.raises(ValueError, match=f"stores an order of inputs, got {scheme.label}"):
        replace(PLAIN, desc_act=True).pack(scheme, _weight(), _hessian(_inputs()))


def test_dense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got dense"):
        PLAIN.pack(Dense(), _weight(), _hessian(_inputs()))


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(K - 1), r"of shape \[96, 96\]"),
        (torch.eye(K).half(), r"float32 or float64 .* got torch\.float16"),
        (torch.eye(K) * float("nan"), "hessian must be finite"),
        (torch.zeros(K, K), "inputs that are not all zero"),
    ],
    ids=["shape", "dtype", "nan", "zeros"],
)
def test_what_is_no_hessian_is_refused(hessian: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLAIN.pack(CASES[0].scheme, _weight(), hessian)


@pytest.mark.parametrize(
    "changes", [{"damping": 0.0}, {"damping": 0.1}, {"damping": -1.0}, {"block_size": 0}]
)
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        replace(PLAIN, **changes)  # type: ignore[arg-type]
