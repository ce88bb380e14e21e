"""Energy of a run that is held, by counters that are made up; on a GPU by the driver's own."""

import sys
import time
from collections.abc import Callable

import pytest
import torch

from bench import gpu
from bench.energy import Counter, Nvml, check, counter_of, hold
from bench.gpu import Gpu
from bench.timer import now_s
from tests.bench.counters import Made, Paced

CPU = torch.device("cpu")
STANDS = "an energy counter that moves within 1 s, got one that stands at 5 mJ"


def wait() -> None:
    time.sleep(0.002)


def test_energy_is_power_times_the_time_of_a_run() -> None:
    held = hold(wait, Paced(watts=300, period_s=0.02), seconds=0.3, device=CPU)
    assert held.watts == pytest.approx(300, rel=0.1)
    assert held.held_ms >= 2
    assert held.energy_mj == pytest.approx(held.watts * held.held_ms)
    assert (held.sm_mhz, held.power_capped) == (1410, True)


def test_a_counter_that_seldom_moves_is_read_when_it_does() -> None:
    # Two reads 0.3 s apart would see 300 or 600 W for 450.
    held = hold(wait, Paced(watts=450, period_s=0.2), seconds=0.3, device=CPU)
    assert held.watts == pytest.approx(450, rel=0.1)


def test_energy_of_a_run_is_what_it_adds_to_the_counter() -> None:
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        wait()

    held = hold(run, Made(lambda: 70 * (runs // 10)), seconds=0.3, device=CPU)
    assert held.energy_mj == pytest.approx(7, rel=0.1)


def test_what_a_device_takes_before_it_is_warm_is_not_counted() -> None:
    began_s = now_s()

    def read() -> int:  # 1,000 W for 0.1 s, then 100
        passed_s = now_s() - began_s
        return round(1e3 * (100 * passed_s + 900 * min(passed_s, 0.1)))

    held = hold(wait, Made(read), seconds=0.2, device=CPU)
    assert held.watts == pytest.approx(100, rel=0.1)


def test_a_counter_that_stands_still_fails_the_hold() -> None:
    with pytest.raises(RuntimeError, match=f"^a hold needs {STANDS}$"):
        hold(wait, Made(lambda: 5), seconds=0.1, device=CPU)


def test_a_run_that_fails_ends_the_hold() -> None:
    def run() -> None:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        hold(run, Paced(watts=1, period_s=0.01), seconds=0.1, device=CPU)


def test_a_counter_that_fails_ends_the_hold() -> None:
    def lost() -> int:
        raise OSError("GPU is lost")

    with pytest.raises(OSError, match="GPU is lost"):
        hold(wait, Made(lost), seconds=0.1, device=CPU)


def have(patch: pytest.MonkeyPatch) -> None:
    found = Gpu(name="X", capability=(9, 0), free_bytes=0, uuid="dead-beef")
    patch.setattr(gpu, "ask", lambda index: found)


def find(read: Callable[[], int]) -> Callable[[str], Counter]:
    def found(uuid: str) -> Counter:
        assert uuid == "dead-beef"
        return Made(read)

    return found


def refusal(device: str, found: Callable[[str], Counter] = Nvml) -> str:
    with pytest.raises(ValueError) as refused:
        check(device, found)
    return str(refused.value)


def test_a_cpu_counts_no_energy() -> None:
    assert refusal("cpu") == (
        "cost.hold_s needs device=cuda, whose driver counts energy, got cpu; cost.hold_s=0 works"
    )


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert refusal("cuda:1") == (
        "cost.hold_s needs the package nvidia-ml-py (extra `gpu`), got none; cost.hold_s=0 works"
    )


def test_no_driver_or_no_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pynvml")
    have(monkeypatch)
    told = refusal("cuda")
    assert told.startswith("cost.hold_s needs a GPU and a driver that count energy, got: ")
    assert told.endswith("; cost.hold_s=0 works")
    assert "\n" not in told


def test_a_counter_that_stands_still_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch)
    told = refusal("cuda", find(lambda: 5))
    assert told == f"cost.hold_s needs {STANDS}; cost.hold_s=0 works"


def test_a_counter_that_moves_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch)
    check("cuda", find(Paced(watts=75, period_s=0.1).energy_mj))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_driver_counts_the_energy_of_products() -> None:
    device = torch.device("cuda")
    check("cuda")
    x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    out = torch.empty_like(x)

    def products(count: int) -> None:
        for _ in range(count):
            torch.matmul(x, x, out=out)
        torch.cuda.current_stream().synchronize()

    counter = counter_of(device)
    few, many = (
        hold(lambda count=count: products(count), counter, seconds=0.3, device=device)
        for count in (5, 20)
    )
    for held in (few, many):
        assert 50 < held.watts < 1000
        assert 200 < held.sm_mhz < 3000
    assert 2.5 < many.energy_mj / few.energy_mj < 6
    assert 2.5 < many.held_ms / few.held_ms < 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_found_by_its_uuid() -> None:
    last = torch.cuda.device_count() - 1
    found = gpu.ask(last)
    assert found is not None
    assert found.uuid == str(torch.cuda.get_device_properties(last).uuid)
    assert Nvml(found.uuid).energy_mj() > 0
