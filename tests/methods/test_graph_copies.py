"""What crosses between host and device around a graph: one copy each way, none too early."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.decode import Method
from methods.graph import GRAPHS, Captured
from methods.recipe import Family
from quant.dense import Dense
from tests.methods.parts import RECIPES, load, make_parts

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, on_gpu]
CUDA = torch.device("cuda", 0)
LONG = 2_000_000  # cycles: a millisecond, in which the host could overwrite many inputs


def capture(
    function: Callable[..., tuple[Tensor, ...]],
    *inputs: Tensor,
    fetched: int | None = None,
    borrows: bool = False,
) -> Captured:
    captured = Captured(function, device=CUDA, fetched=fetched, borrows=borrows)
    with GRAPHS.warm_up():
        captured(*inputs)
    return captured


def mixed(x: Tensor, y: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return (x.sum() + y.long() * 3 + rows[:, 0].long(), z * rows[:, 1:].sum())


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Host inputs of three dtypes, and one on the device."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 99, (3,), generator=generator),
        torch.randint(0, 9, (5,), generator=generator).to(torch.int8),
        torch.randn(7, generator=generator),
        torch.randn(5, 4, generator=generator).to(CUDA),
    )


def test_a_replay_gives_what_a_call_gives_for_inputs_of_any_dtype_and_place() -> None:
    captured = capture(mixed, *draw(0))
    missed = GRAPHS.missed
    for seed in range(1, 20):
        inputs = draw(seed)
        expected = mixed(*(tensor.to(CUDA) for tensor in inputs))
        for out, wanted in zip(captured(*inputs), expected, strict=True):
            assert torch.equal(out, wanted)
    assert GRAPHS.missed == missed


def test_all_host_inputs_lie_in_one_pinned_buffer_and_its_one_copy() -> None:
    captured = capture(mixed, *draw(0))
    (graph,) = captured._graphs.values()
    places = [tensor.untyped_storage().data_ptr() for tensor in graph.inputs]
    assert places[:3] == [graph.sent.whole.data_ptr()] * 3
    assert all(tensor.is_pinned() for tensor in graph.inputs[:3])
    assert graph.inputs[3].is_cuda
    arrived = [part.untyped_storage().data_ptr() for part in graph.arrived.parts]
    assert arrived == [graph.arrived.whole.data_ptr()] * 3


def test_inputs_may_be_overwritten_at_once_by_callers_that_wait_for_nothing() -> None:
    def slow(x: Tensor, y: Tensor) -> tuple[Tensor]:
        torch.cuda._sleep(LONG)
        return (x * 1000 + y,)

    def slower(y: Tensor, x: Tensor) -> tuple[Tensor]:
        torch.cuda._sleep(LONG)
        return (y - x,)

    x, y = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    one, other = capture(slow, x, y), capture(slower, y, x)
    ahead = capture(lambda: (torch.cuda._sleep(20 * LONG), torch.empty(1, device=CUDA))[1:])
    ahead()  # the device lags from here on
    sums, differences = [], []
    for i in range(20):
        x.fill_(i)
        y.fill_(2 * i)
        sums.append(one(x, y)[0].clone())
        differences.append(other(y, x)[0].clone())
    assert [s.tolist() for s in sums] == [[1002 * i] * 2 for i in range(20)]
    assert [d.tolist() for d in differences] == [[i] * 2 for i in range(20)]


def test_what_is_fetched_is_the_output_on_the_device() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.cuda._sleep(LONG)
        return x + 1, 5 * x

    captured = capture(run, torch.arange(4), fetched=1)
    other = capture(lambda x: (x * 7,), torch.arange(4))
    for i in range(20):
        given = torch.arange(i, i + 4)
        _, out = captured(given)
        other(given)  # as a commit is launched before the path is read
        given.zero_()
        landed = captured.fetch()
        assert landed.is_pinned()
        assert landed.tolist() == [5 * (i + j) for j in range(4)]
        assert torch.equal(landed, out.cpu())


def test_what_is_fetched_is_the_newest_calls_where_it_had_no_graph() -> None:
    captured = capture(lambda x: (3 * x,), torch.arange(4), fetched=0)
    captured(torch.tensor([2]))  # of another shape
    assert captured.fetch().tolist() == [6]
    captured(torch.arange(4))
    assert captured.fetch().tolist() == [0, 3, 6, 9]


def test_a_graph_is_for_inputs_that_lie_where_those_lay_it_was_captured_with() -> None:
    captured = capture(lambda x, y: (x - y,), torch.arange(4), torch.arange(4))
    missed = GRAPHS.missed
    (out,) = captured(torch.arange(4), torch.ones(4, dtype=torch.int64, device=CUDA))
    assert out.tolist() == [-1, 0, 1, 2]
    assert GRAPHS.missed == missed + 1


def test_what_is_borrowed_is_read_in_place_and_all_else_is_copied() -> None:
    first = capture(lambda x: (x + 1,), torch.arange(4))
    (lent,) = first(torch.arange(4))
    second = capture(lambda y, x: (y * x,), lent, torch.arange(4), borrows=True)
    (graph,) = second._graphs.values()
    assert graph.inputs[0] is lent
    (lent,) = first(torch.arange(5, 9))
    assert second(lent, torch.full((4,), 2))[0].tolist() == [12, 14, 16, 18]
    strange = torch.arange(4, device=CUDA)
    assert second(strange, torch.full((4,), 3))[0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("name", RECIPES)
def test_a_commit_reads_the_verifications_outputs_where_they_lie(family: Family, name: str) -> None:
    parts = make_parts(family, target=load(family.target, Dense(), torch.float32, "cuda"))
    method: Method = RECIPES[name].method(parts)
    method.warm_up()
    lent = {id(out) for graph in method._verify._graphs.values() for out in graph.outputs}
    for graph in method._commit._graphs.values():
        assert {id(tensor) for tensor in graph.inputs if tensor.is_cuda} <= lent
