"""The reads of a cache: which one is opened, and that they compute the same."""

import pytest
import torch
from torch import Tensor

from methods import fused
from methods.kv import KVCache
from methods.norm import HeadNorm
from methods.rope import Rope
from methods.window import Chunk, Slices, Slots, Window, window

HEADS, GROUPS, DIM, SLOTS, DECIDED = 4, 2, 64, 64, 9


def cache(device: str, dtype: torch.dtype, batch: int = 1) -> KVCache:
    """A cache with decided slots and one of scratch."""
    place = torch.device(device)
    angles = Rope(theta=10000.0).angles(torch.arange(SLOTS), DIM, dtype)
    kv = KVCache(
        num_layers=2,
        num_kv_heads=GROUPS,
        head_dim=DIM,
        capacity=SLOTS,
        dtype=dtype,
        device=place,
        batch=batch,
        angles=(angles[0].to(place), angles[1].to(place)),
    )
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    kv.advance(DECIDED)
    kv.extend(1)
    return kv


def positions(n: int, device: str) -> Tensor:
    return DECIDED + 1 + torch.arange(n, device=device)


def read(view: Window, n: int, *, extras: bool) -> Tensor:
    """Attend in the second layer. extras: a bias, and norms of heads."""
    generator = torch.Generator().manual_seed(1)
    kv = view.kv.data
    width = (HEADS + 2 * GROUPS) * DIM
    projected, bias = torch.randn(n + 1, width, generator=generator).split([n, 1])
    queries, keys = torch.rand(2, DIM, generator=generator)
    norm = HeadNorm(heads=HEADS, groups=GROUPS, queries=queries, keys=keys, eps=1e-6).to(kv)
    out = view.attend(
        1,
        projected.to(kv)[None],
        bias=bias[0].to(kv) if extras else None,
        norm=norm if extras else None,
        digits=False,
    )
    assert isinstance(out, Tensor)
    return out


def check(device: str, dtype: torch.dtype, *, extras: bool) -> None:
    """Hold a chunk against slices: the cache bit for bit, and what attention gives."""
    for n in (1, 17):
        plain, kv = cache(device, dtype), cache(device, dtype)
        place = positions(n, device)
        chunk = window(kv, place, None, shared=HEADS // GROUPS, base=None)
        assert type(chunk) is Chunk
        assert plain.angles is not None
        rotation = (plain.angles[0][place], plain.angles[1][place])
        seen = chunk.seen
        slices = Slices(kv=plain, rotation=rotation, seen=seen)
        expected = read(slices, n, extras=extras)
        found = read(chunk, n, extras=extras)
        assert found.shape == expected.shape == (1, n, HEADS * DIM)
        torch.testing.assert_close(found, expected)
        if extras:  # a norm's sum may be taken in another order
            torch.testing.assert_close(kv.data, plain.data)
        else:
            assert torch.equal(kv.data, plain.data)


@pytest.mark.parametrize("extras", [False, True])
def test_a_chunk_computes_what_slices_do(extras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "attends", lambda _: True)
    check("cpu", torch.float32, extras=extras)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chunk_computes_what_slices_do_on_a_gpu(dtype: torch.dtype, extras: bool) -> None:
    check("cuda", dtype, extras=extras)


def test_which_window_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = cache("cpu", torch.float32), cache("cpu", torch.float32, batch=3)
    base = torch.tensor([DECIDED])
    for kernels, kv, known, kind in (
        (False, one, None, Slices),
        (False, one, base, Slices),
        (True, one, None, Chunk),
        (True, one, base, Slots),
        (True, three, None, Slices),
        (True, three, base, Slices),
    ):
        monkeypatch.setattr(fused, "attends", lambda _, answer=kernels: answer)
        opened = window(kv, positions(2, "cpu"), None, shared=HEADS // GROUPS, base=known)
        assert type(opened) is kind
