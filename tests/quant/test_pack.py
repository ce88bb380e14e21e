import pytest
import torch

from quant.pack import pack_nibbles, unpack_high_nibbles, unpack_nibbles


def test_byte_holds_the_even_input_low_and_the_odd_input_high() -> None:
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.int8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F]]


def test_every_byte_unpacks_to_its_two_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    expected = [[c for b in row for c in (b % 16, b // 16)] for row in packed.tolist()]
    assert unpack_nibbles(packed).tolist() == expected
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_every_byte_unpacks_to_its_two_signed_codes_times_16() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    signed = [*range(8), *range(-8, 0)]
    expected = [[16 * signed[c] for b in row for c in (b % 16, b // 16)] for row in packed.tolist()]
    opened = unpack_high_nibbles(packed)
    assert opened.dtype == torch.int8
    assert opened.tolist() == expected


def test_signed_codes_come_back() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_high_nibbles(pack_nibbles(codes)), codes * 16)


def test_odd_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="K must be even"):
        pack_nibbles(torch.zeros(2, 5, dtype=torch.int8))
