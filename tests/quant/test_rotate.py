import pytest
import torch
from torch import Tensor

from quant.rotate import Rotation, fold_norm, random_rotation, rotate_inputs, rotate_outputs

HADAMARD = [1, 2, 4, 12, 20, 28, 36, 64, 108, 128, 148, 256, 768]
LLAMA = [3072, 4096, 5120, 8192, 13824, 14336, 18944, 28672]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [*HADAMARD, 3, 100, 172])
def test_q_is_orthogonal(size: int) -> None:
    q = random_rotation(size, 7).matrix
    assert q.dtype == torch.float64
    assert float((q @ q.t() - torch.eye(size)).abs().max()) < 1e-12
    assert float((q.t() @ q - torch.eye(size)).abs().max()) < 1e-12


@pytest.mark.parametrize("size", HADAMARD)
def test_entries_are_of_one_magnitude(size: int) -> None:
    q = random_rotation(size, 7).matrix
    assert float((q.abs() * size**0.5 - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("size", LLAMA)
def test_large_sizes_are_hadamard_as_well(size: int) -> None:
    rows = torch.zeros(6, size, dtype=torch.float64)
    for row, channel in enumerate((0, 1, size // 3, size // 2, size - 2, size - 1)):
        rows[row, channel] = 1
    q = random_rotation(size, 3).apply(rows)
    assert float((q @ q.t() - torch.eye(6)).abs().max()) < 1e-12
    assert float((q.abs() * size**0.5 - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [24, 100])
def test_applying_is_multiplying_by_the_matrix(size: int) -> None:
    rotation, rows = random_rotation(size, 0), _randn(2, 5, size)
    assert torch.allclose(rotation.apply(rows), rows @ rotation.matrix, rtol=0, atol=1e-12)


def test_sylvesters_matrix_written_out() -> None:
    plain = Rotation(
        signs=torch.tensor([1.0, -1.0, 1.0, 1.0]).double(),
        doublings=2,
        core=torch.ones(1, 1).double(),
    )
    assert (plain.matrix * 2).tolist() == [
        [1, 1, 1, 1],
        [-1, 1, -1, 1],
        [1, 1, -1, -1],
        [1, -1, -1, 1],
    ]


@pytest.mark.parametrize("size", [96, 100])
def test_the_seed_decides(size: int) -> None:
    first, again, other = (random_rotation(size, seed).matrix for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_rotation_between_writer_and_reader_cancels_across_a_norm() -> None:
    writer, reader, norm, x = (
        _randn(96, 40),
        _randn(24, 96, seed=1),
        _randn(96, seed=2),
        _randn(5, 40),
    )

    def rms(values: Tensor) -> Tensor:
        return values / values.square().mean(-1, keepdim=True).sqrt()

    expected = (rms(x @ writer.t()) * norm) @ reader.t()
    q = random_rotation(96, 0)
    turned = rotate_outputs(writer, q)
    assert torch.allclose(x @ turned.t(), x @ writer.t() @ q.matrix, atol=1e-12)
    given = rms(x @ turned.t()) @ rotate_inputs(fold_norm(reader, norm), q).t()
    assert float((given - expected).abs().max()) < 1e-12


@pytest.mark.parametrize(("query_heads", "value_heads"), [(6, 6), (6, 2)])
def test_a_rotation_of_value_heads_cancels_in_the_output_projection(
    query_heads: int, value_heads: int
) -> None:
    size, tokens = 12, 5
    values, out = _randn(value_heads * size, 40), _randn(30, query_heads * size, seed=1)
    x = _randn(tokens, 40, seed=2)
    weights = _randn(query_heads, tokens, tokens, seed=3).softmax(-1)

    def attend(values: Tensor, out: Tensor) -> Tensor:
        read = (x @ values.t()).view(tokens, value_heads, size).transpose(0, 1)
        mixed = weights @ read.repeat_interleave(query_heads // value_heads, 0)
        return mixed.transpose(0, 1).flatten(1) @ out.t()

    q = random_rotation(size, 0)
    turned = rotate_outputs(values, q, heads=value_heads)
    assert not torch.allclose(turned, values)
    given = attend(turned, rotate_inputs(out, q, heads=query_heads))
    assert float((given - attend(values, out)).abs().max()) < 1e-12


def test_an_outlier_is_spread_over_all_channels() -> None:
    weight = torch.zeros(1, 128)
    weight[0, 17] = 1
    spread = rotate_inputs(weight, random_rotation(128, 0))
    assert spread.abs().flatten().tolist() == pytest.approx([128**-0.5] * 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_come_back_in_their_dtype_rounded_once(dtype: torch.dtype) -> None:
    weight, norm, q = _randn(24, 96).to(dtype), _randn(96, seed=1).to(dtype), random_rotation(96, 0)
    expected = [
        (weight.double() * norm.double()).to(dtype),
        (weight.double() @ q.matrix).to(dtype),
    ]
    given = [fold_norm(weight, norm), rotate_inputs(weight, q)]
    for actual, wanted in zip(given, expected, strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, wanted)


def test_sizes_that_do_not_fit_are_refused() -> None:
    q = random_rotation(12, 0)
    with pytest.raises(ValueError, match=r"in-channels must be .* = 1 \* 12, got 24"):
        rotate_inputs(_randn(5, 24), q)
    with pytest.raises(ValueError, match=r"out-channels must be .* = 3 \* 12, got 24"):
        rotate_outputs(_randn(24, 5), q, heads=3)
    with pytest.raises(ValueError, match=r"norm's weight must be of shape \[24\], got \[1\]"):
        fold_norm(_randn(5, 24), _randn(1))
    with pytest.raises(ValueError, match="size of a rotation must be positive, got 0"):
        random_rotation(0, 0)
