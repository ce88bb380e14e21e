"""Layers that read digits get them wherever something can give them, and nothing else changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from methods.kv import KVCache
from methods.norm import RMSNorm
from methods.recipe import Family
from methods.rope import Rope
from methods.transformer import MLP, Attention, Block
from methods.window import Slices, Slots, Window, window
from quant.block_float import BlockFloat, round_blocks, values
from quant.dense import Dense
from quant.scheme import QuantLinear
from tests.methods.parts import RECIPES, decode, make_parts

HEADS, GROUPS, DIM, INNER = 3, 1, 64, 200
WIDTH, MOST = HEADS * DIM, 6


class Reader(QuantLinear):
    """Multiplies rows of digits, whether it is given them or rounds by itself."""

    def __init__(self, weight: Tensor, *, most: int) -> None:
        """most: rows that it wants as digits."""
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.register_buffer("weight", weight)
        self.most = most
        self.given: list[type] = []

    def reads_digits(self, n: int) -> bool:
        return n <= self.most

    def forward(self, x: Tensor | BlockFloat) -> Tensor:
        self.given.append(type(x))
        weight = self.get_buffer("weight")
        shape = (-1,) if isinstance(x, BlockFloat) else x.shape[:-1]
        rows = x if isinstance(x, BlockFloat) else round_blocks(x.flatten(0, -2))
        assert isinstance(x, Tensor) or self.reads_digits(x.digits.shape[1])
        y = values(rows, self.in_features) @ weight.double().t()
        return y.to(weight.dtype).view(*shape, self.out_features)

    def dequantize(self) -> Tensor:
        return self.get_buffer("weight").float()


def block(*, most: int) -> Block:
    generator = torch.Generator().manual_seed(0)

    def linear(n: int, k: int) -> Reader:
        return Reader(torch.randn(n, k, generator=generator) / k**0.5, most=most)

    def norm() -> RMSNorm:
        return RMSNorm(torch.randn(WIDTH, generator=generator), 1e-5)

    return Block(
        input_norm=norm(),
        attention=Attention(
            qkv=linear((HEADS + 2 * GROUPS) * DIM, WIDTH),
            out=linear(WIDTH, WIDTH),
            out_bias=torch.randn(WIDTH, generator=generator),
        ),
        mlp_norm=norm(),
        mlp=MLP(gate_up=linear(2 * INNER, WIDTH), down=linear(WIDTH, INNER)),
    )


def view(n: int, batch: int, *, slots: bool) -> Window:
    """A read of n tokens behind five that are decided."""
    generator = torch.Generator().manual_seed(1)
    kv = KVCache(
        num_layers=1,
        num_kv_heads=GROUPS,
        head_dim=DIM,
        capacity=40,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch=batch,
        angles=Rope(theta=10000.0).angles(torch.arange(40), DIM, torch.float32),
    )
    kv.data.copy_(torch.randn(kv.data.shape, generator=generator))
    kv.advance(5)
    positions = 5 + torch.arange(n)
    if not slots:
        return window(kv, positions, None, shared=HEADS // GROUPS, base=None)
    assert kv.angles is not None
    base = torch.tensor([5])
    return Slots(kv=kv, angles=kv.angles, positions=positions, base=base, ancestors=None)


def read(
    n: int, *, batch: int = 1, most: int, slots: bool = True
) -> tuple[list[Tensor], list[type]]:
    """What a block gives, and what its layers are given, in their order."""
    x, delta = torch.randn(2, batch, n, WIDTH, generator=torch.Generator().manual_seed(2))
    one = block(most=most)
    out = one(x, delta, view(n, batch, slots=slots), 0)
    layers = (one.attention.qkv, one.attention.out, one.mlp.gate_up, one.mlp.down)
    return list(out), [given for layer in layers for given in layer.given]


@pytest.mark.parametrize("n", [1, MOST])
def test_all_layers_of_a_block_get_digits(n: int) -> None:
    out, given = read(n, most=MOST)
    plain, taken = read(n, most=0)
    assert given == [BlockFloat] * 4
    assert taken == [Tensor] * 4
    assert [x.shape for x in out] == [(1, n, WIDTH)] * 3
    for found, expected in zip(out, plain, strict=True):
        assert torch.equal(found, expected)


def test_layers_that_want_fewer_rows_get_none() -> None:
    assert read(MOST + 1, most=MOST)[1] == [Tensor] * 4


def test_only_slots_give_attentions_digits() -> None:
    out, given = read(2, most=MOST, slots=False)
    assert isinstance(view(2, 1, slots=False), Slices)
    assert given == [BlockFloat, Tensor, BlockFloat, BlockFloat]
    for found, expected in zip(out, read(2, most=0, slots=False)[0], strict=True):
        assert torch.equal(found, expected)


def test_rows_of_a_batch_keep_their_shape() -> None:
    out, given = read(2, batch=3, most=MOST, slots=False)
    # What the gate gives has no shape but rows; others would not know the batch again.
    assert given == [Tensor, Tensor, Tensor, BlockFloat]
    assert [x.shape for x in out] == [(3, 2, WIDTH)] * 3
    for found, expected in zip(out, read(2, batch=3, most=0, slots=False)[0], strict=True):
        assert torch.equal(found, expected)


def test_a_single_row_without_a_batch_stays_one() -> None:
    norm, x = RMSNorm(torch.ones(8), 1e-5), torch.randn(8)
    normed, _ = norm.add(x, None, reader=Reader(torch.ones(2, 8), most=MOST))
    assert isinstance(normed, Tensor)
    assert torch.equal(normed, norm(x))


def test_a_block_without_an_input_norm_reads_what_enters_as_it_is() -> None:
    one = block(most=MOST)
    one.input_norm = None
    x = torch.randn(1, 2, WIDTH)
    entered, stream, delta = one(x, None, view(2, 1, slots=True), 0)
    assert torch.equal(entered, x)
    assert stream.shape == delta.shape == x.shape
    given = [one.attention.qkv.given, one.attention.out.given, one.mlp.gate_up.given]
    assert given == [[Tensor], [BlockFloat], [BlockFloat]]


@dataclass(frozen=True, kw_only=True)
class Read(Dense):
    """Dense weights whose layers read digits. made: all of them."""

    most: int
    made: list[Reader] = field(default_factory=list, compare=False)

    def layer(self, stored: Mapping[str, Tensor]) -> QuantLinear:
        self.made.append(Reader(stored["weight"], most=self.most))
        return self.made[-1]


@pytest.mark.parametrize("name", ["vanilla", "eagle2", "eagle3"])
def test_decoding_gives_the_tokens_that_it_gives_without(family: Family, name: str) -> None:
    prompt = [5, 17, 3, 60, 22]
    found, given = [], []
    for most in (40, 0):
        scheme, drafts = Read(most=most), Read(most=most)
        parts = make_parts(family, scheme=scheme, draft_scheme=drafts, lm_head=drafts)
        found.append(decode(RECIPES[name], parts, prompt))
        given.append([{g for r in s.made for g in r.given} for s in (scheme, drafts)])
    assert found[0] == found[1]
    assert BlockFloat in given[0][0]
    assert BlockFloat in given[0][1] or name == "vanilla"
    assert BlockFloat not in given[1][0] | given[1][1]
