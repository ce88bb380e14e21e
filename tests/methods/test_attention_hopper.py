"""One launch that turns, writes and attends, against two launches and against itself."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from methods import fused
from methods.rope import Rope
from quant.block_float import BlockFloat, round_blocks
from tests.methods.kernel_parts import DEVICE, ON_GPU, base_of, near, random_parents
from tests.methods.test_attention_kernels import COARSE, FINE, exact_attention

if ON_GPU:
    from methods.kernels import attention_hopper, rope_write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
DTYPES = [torch.float16, torch.bfloat16]
SIZES = [(64, 8, 128), (8, 2, 64), (7, 1, 128), (16, 1, 64)]
LEVELS = 80  # of every tree: combining is compiled for them
CONTEXTS = [0, 1, 63, 64, 65, 255, 256, 257, 300, 512, 1000]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Text:
    """A line of tokens as projected, [length, (H + 2G) * d], and what a cache of it holds."""

    qkv: Tensor
    groups: int
    dim: int
    table: tuple[Tensor, Tensor]

    @property
    def heads(self) -> int:
        return self.qkv.shape[1] // self.dim - 2 * self.groups

    def cache(self, room: int) -> Tensor:
        """All tokens' entries, in order; behind them, what nobody wrote."""
        n = len(self.qkv)
        made = torch.full((2, self.groups, n + room, self.dim), torch.nan).to(self.qkv)
        rope_write.rope_write(
            *(self.qkv, *self.table, torch.arange(n, device=DEVICE), made, base_of(0), 0),
            norm=None,
            eps=0.0,
            bias=None,
        )
        return made


def draw(length: int, heads: int, groups: int, dim: int, dtype: torch.dtype) -> Text:
    qkv = torch.randn(length, (heads + 2 * groups) * dim, device=DEVICE).to(dtype)
    table = Rope(theta=10000.0).table(length + 8, dim, dtype, torch.device(DEVICE))
    return Text(qkv, groups, dim, table)


def read(
    text: Text,
    rows: Tensor,
    cache: Tensor,
    base: int,
    scratch: int,
    *,
    positions: Tensor,
    ancestors: Tensor | None = None,
    few: int | None = None,
) -> Tensor:
    """Read rows of a text behind base + scratch slots."""
    with pytest.MonkeyPatch.context() as patch:
        if few is not None:
            patch.setattr(attention_hopper, "FEW", few)
        out = attention_hopper.rope_attend(
            *(text.qkv[rows].contiguous(), *text.table, positions, cache, base_of(base), scratch),
            ancestors=ancestors,
            digits=False,
        )
    assert isinstance(out, Tensor)
    return out


def span(start: int, end: int) -> Tensor:
    return torch.arange(start, end, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "dim"), SIZES)
@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_one_launch_does_what_two_do(
    n: int, heads: int, groups: int, dim: int, dtype: torch.dtype, shape: str
) -> None:
    for base, scratch in ((0, 0), (63, 3), (300, 0), (512, 9)):
        text = draw(base + scratch + n, heads, groups, dim, dtype)
        whole, ancestors = text.cache(5), None
        rows = span(base + scratch, base + scratch + n)
        positions = rows
        if shape == "tree":
            parents = random_parents(scratch + n)
            _, depths, paths = fused.ancestry(parents, LEVELS)
            ancestors = paths[scratch:].contiguous()
            positions = base + depths
            known = text.qkv[base:].contiguous()
            fused.rope_write(known, *text.table, positions, whole, base_of(base), 0)
            positions = positions[scratch:].contiguous()
        taken = whole.clone()
        taken[:, :, base + scratch :] = torch.nan
        own = text.qkv[rows].contiguous()
        queries = fused.rope_write(
            own, *text.table, positions, whole.clone(), base_of(base), scratch
        )
        out = read(text, rows, taken, base, scratch, positions=positions, ancestors=ancestors)
        end = base + scratch + n
        assert torch.equal(taken[:, :, :end], whole[:, :, :end])
        assert bool(taken[:, :, end:].isnan().all())
        assert near(out, exact_attention(queries, whole, base, scratch, ancestors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "dim"), SIZES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_node_is_bit_equal_alone_in_a_chain_and_in_a_tree(
    heads: int, groups: int, dim: int, dtype: torch.dtype, context: int
) -> None:
    n = 60
    text = draw(context + n, heads, groups, dim, dtype)
    _, depths, paths = fused.ancestry(random_parents(n), LEVELS)
    positions = context + depths
    cache, rows = text.cache(0), span(context, context + n)
    whole = read(*(text, rows, cache, context, 0), positions=positions, ancestors=paths, few=COARSE)
    fine = read(*(text, rows, cache, context, 0), positions=positions, ancestors=paths, few=FINE)
    assert torch.equal(fine, whole)
    for node in (0, 7, n // 2, n - 1):
        path = paths[node][paths[node] >= 0].long()
        line = torch.cat([span(0, context), context + path])
        own = Text(text.qkv[line].contiguous(), groups, dim, text.table)
        decided, end = own.cache(0), len(line)
        for few in (FINE, COARSE):
            for base in {0, context // 2, context, end - 1}:
                for begin in {base, max(base, end - 2), end - 1}:
                    new = span(begin, end)
                    one = read(*(own, new, decided, base, begin - base), positions=new, few=few)
                    assert torch.equal(one[-1], whole[node])
        for some in (2, 3, 8, 16, 32):  # of a tile that warps share, and of a warp's own
            chosen = (node + span(0, some)) % n
            # All of the tree lies in scratch, and some of it is read behind it once more.
            again = read(
                *(text, context + chosen, _wider(cache, some), context, n),
                positions=positions[chosen],
                ancestors=_ending_here(paths[chosen], n),
            )
            assert torch.equal(again[0], whole[node])


def _wider(cache: Tensor, room: int) -> Tensor:
    return torch.nn.functional.pad(cache, (0, 0, 0, room), value=torch.nan)


def _ending_here(paths: Tensor, scratch: int) -> Tensor:
    """Let each path end with the slot of its own row in this read."""
    made = paths.clone()
    last = (paths >= 0).sum(1) - 1
    rows = torch.arange(len(paths), device=paths.device)
    made[rows, last] = (scratch + rows).int()
    return made


@pytest.mark.parametrize("length", [2100, 5000])
@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_long_contexts_are_bit_equal_however_much_is_decided(n: int, length: int) -> None:
    text = draw(length, 8, 2, 128, torch.float16)
    cache = text.cache(0)
    new = span(length - n, length)
    outs = [
        read(text, new, cache, base, length - n - base, positions=new, few=few)[-1]
        for base in (length - n, length - n - 100)
        for few in (FINE, COARSE)
    ]
    queries = fused.rope_write(
        *(text.qkv[new].contiguous(), *text.table, new, cache.clone(), base_of(length - n), 0)
    )
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert near(outs[0][None], exact_attention(queries, cache, length - n, 0, None)[-1:])


@pytest.mark.parametrize("few", [FINE, COARSE])
@pytest.mark.parametrize("base", [0, 63, 300])
def test_a_long_chain_is_bit_equal_in_order_and_by_its_paths(base: int, few: int) -> None:
    n = 150
    text = draw(base + n, 8, 2, 128, torch.float16)
    rows = span(base, base + n)
    _, _, paths = fused.ancestry(span(0, n) - 1, n)
    one, other = (
        read(text, rows, text.cache(0), base, 0, positions=rows, ancestors=seen, few=few)
        for seen in (None, paths)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("n", [1, 3])
def test_a_launch_turns_coarse_on_the_device_without_a_change_of_bits(n: int) -> None:
    steps = 8  # of a tile of 2 groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_hopper, "FEW", 2 * steps)
        for context in (64 * steps - 1, 64 * steps, 64 * steps + 63, 64 * steps + 64, 1400):
            text = draw(context + n, 8, 2, 128, torch.float16)
            new, cache = span(context, context + n), text.cache(1500)
            out = read(text, new, cache, context, 0, positions=new)
            for few in (FINE, COARSE):
                same = read(text, new, cache, context, 0, positions=new, few=few)
                assert torch.equal(same, out)


@pytest.mark.parametrize("few", [FINE, COARSE])
@pytest.mark.parametrize("n", [1, 3, 13])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(64, 8, 128), (8, 2, 64)])
def test_digits_are_those_of_what_is_given_else(
    heads: int, groups: int, dim: int, n: int, few: int
) -> None:
    text = draw(600, heads, groups, dim, torch.float16)
    text.qkv[:, -dim:] *= 1e-3  # some blocks have other powers of two
    new = span(600 - n, 600)
    inputs = (text.qkv[new].contiguous(), *text.table, new, text.cache(0), base_of(600 - n), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_hopper, "FEW", few)
        rows = attention_hopper.rope_attend(*inputs, ancestors=None, digits=False)
        made = attention_hopper.rope_attend(*inputs, ancestors=None, digits=True)
    assert isinstance(rows, Tensor)
    assert isinstance(made, BlockFloat)
    expected = round_blocks(rows)
    assert torch.equal(made.digits, expected.digits)
    assert torch.equal(made.scales[:, :n], expected.scales[:, :n])


def test_other_sizes_are_left_to_two_launches() -> None:
    cache = torch.zeros(2, 2, 8, 32, device=DEVICE, dtype=torch.float16)
    assert not attention_hopper.takes(cache, 4)
    assert not attention_hopper.takes(cache.float().repeat(1, 1, 1, 2), 4)
    assert attention_hopper.takes(cache.repeat(1, 1, 1, 2), 4)
    assert not attention_hopper.takes(cache.repeat(1, 1, 1, 2), 34)
