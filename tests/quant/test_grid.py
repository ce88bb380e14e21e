import pytest
import torch
from torch import Tensor

from quant.grid import (
    INT4,
    INT8,
    UINT4,
    UINT4_AROUND_8,
    Grid,
    decode,
    encode,
    fit,
    pieces,
    round_tokens,
    round_tokens_e4m3,
)

GRIDS = [INT8, INT4, UINT4_AROUND_8, UINT4]


def _values(kind: str) -> Tensor:
    torch.manual_seed(0)
    values = torch.randn(32, 4, 64)
    if kind == "outliers":
        values[:, :, 5] *= 30
    if kind == "positive":
        values.abs_().add_(1)
    return values


def _squared_error(values: Tensor, grid: Grid, *, range_search: bool) -> Tensor:
    placed = fit(values, grid, scale_dtype=torch.float16, range_search=range_search)
    return (decode(encode(values, grid, placed), placed) - values).square().sum(-1)


def test_symmetric_scales_are_the_range_over_the_number_of_steps() -> None:
    values = torch.tensor([[-3.0, 1.5, 0.0, 2.0]])
    scales = [
        fit(values, g, scale_dtype=torch.float32, range_search=False).scale.item()
        for g in GRIDS[:3]
    ]
    assert scales == pytest.approx([3 / 127, 3 / 7, 6 / 15])


def test_a_free_zero_lies_where_the_range_puts_it() -> None:
    values = torch.tensor([[-1.0, 2.0], [0.5, 3.0], [-3.0, -0.5]])
    placed = fit(values, UINT4, scale_dtype=torch.float32, range_search=False)
    assert placed.scale.flatten().tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert placed.zero.flatten().tolist() == [5, 0, 15]


def test_codes_round_to_nearest_and_ties_to_even() -> None:
    values = torch.tensor([[-7.0, -2.5, -1.5, 0.5, 1.5, 2.4, 7.0]])
    placed = fit(values, INT4, scale_dtype=torch.float32, range_search=False)
    assert encode(values, INT4, placed).tolist() == [[-7, -2, -2, 0, 2, 2, 7]]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "positive"])
def test_full_range_errs_by_half_a_step_at_most(grid: Grid, kind: str) -> None:
    values = _values(kind)
    placed = fit(values, grid, scale_dtype=torch.float16, range_search=False)
    error = (decode(encode(values, grid, placed), placed) - values).abs()
    # The float16 scale may fall short of the range by 2^-11 of it.
    slack = 1 + (grid.high - grid.low) * 2.0**-10
    assert bool((error <= 0.5 * placed.scale.float() * slack).all())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "positive"])
def test_range_search_is_never_worse_in_any_piece(grid: Grid, kind: str) -> None:
    values = _values(kind)
    searched = _squared_error(values, grid, range_search=True)
    plain = _squared_error(values, grid, range_search=False)
    assert bool((searched <= plain).all())


def test_range_search_gains_on_four_bits() -> None:
    values = _values("normal")
    searched = _squared_error(values, UINT4_AROUND_8, range_search=True).sum()
    assert searched < 0.95 * _squared_error(values, UINT4_AROUND_8, range_search=False).sum()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("range_search", [False, True])
def test_a_piece_of_zeros_comes_back_as_zeros(grid: Grid, range_search: bool) -> None:
    values = torch.zeros(2, 8)
    values[1, 0] = 1e-12  # far below the smallest float16
    placed = fit(values, grid, scale_dtype=torch.float16, range_search=range_search)
    assert decode(encode(values, grid, placed), placed).tolist() == [[0.0] * 8] * 2


def test_a_range_beyond_the_scale_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must fit torch\.float16"):
        fit(torch.tensor([[1e9, 0.0]]), INT8, scale_dtype=torch.float16, range_search=False)


def test_pieces_are_neighbours_in_a_row() -> None:
    weight = torch.arange(16.0).view(2, 8)
    assert pieces(weight, 4)[1, 0].tolist() == [8, 9, 10, 11]
    assert pieces(weight, -1).shape == (2, 1, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_token_takes_its_scale_from_itself(dtype: torch.dtype) -> None:
    x = torch.tensor([[127.0, -64.0, 0.25], [-1.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    codes, scale = round_tokens(x)
    assert codes.tolist() == [[127, -64, 0], [-127, 64, 0], [0, 0, 0]]
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scale.flatten().tolist()[:2] == pytest.approx([1.0, 1 / 127])


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e30, 3e38])
def test_tokens_of_any_size_stay_finite(size: float) -> None:
    x = torch.tensor([[size, -size / 2, 0.0]])
    for codes, scale in (round_tokens(x), round_tokens_e4m3(x)):
        assert bool(torch.isfinite(codes.float() * scale).all())
