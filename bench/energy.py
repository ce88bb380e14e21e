"""What one run of something costs in energy, told by the driver's counter while it is repeated.

The counter (NVML's, in millijoules since the driver was loaded) moves every 20 to 100 ms: read at
both ends of a hold it would be off by up to such a period over the hold, 10 % of a second. So a
thread notes when it moves, and power is what came between two moves over the time between them.
What is left is how late each of the two is noticed: POLL_S, the calls that ask (2.7 ms in the
median and up to 18 on an H200) and, where the host is busy, Python's lock, 5 ms each time. For
holds of a second that is some 0.4 %, 1.2 % where the host is busy, and 3 % at worst; shorter ones
err by as much more. How right the sensor is, no hold tells; and it counts the whole card, whoever
uses it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median_low
from threading import Event
from time import sleep

import torch

from bench import gpu
from bench.machine import index_of
from bench.timer import Timer, now_s

POLL_S = 0.002  # between two looks at the counter
STILL_S = 1.0  # a counter that has not moved for so long is not working
LEAD = 0.5  # of a hold, before it: what the counter averages over is then of this run alone
INSTEAD = "cost.hold_s=0 works"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one run took in energy and time, and how the device was meanwhile.

    sm_mhz: median of looks at every move of the counter. power_capped: whether the cap on its power
    kept its clock down at most of them.
    """

    energy_mj: float
    held_ms: float
    sm_mhz: int
    power_capped: bool

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.energy_mj / self.held_ms


class Counter(ABC):
    """What a device tells of its energy. It may be asked from any thread."""

    @abstractmethod
    def energy_mj(self) -> int:
        """Energy since some moment in the past."""

    @abstractmethod
    def sm_mhz(self) -> int:
        """Clock of the multiprocessors now."""

    @abstractmethod
    def power_capped(self) -> bool:
        """Whether the cap on power keeps the clock down now."""


class Nvml(Counter):
    """The driver's own, of the GPU that has a uuid: its numbers ignore CUDA_VISIBLE_DEVICES."""

    def __init__(self, uuid: str) -> None:
        """Ask once for everything; ValueError that says what is needed where it is not there."""
        try:
            import pynvml  # optional
        except ImportError as error:
            raise ValueError("the package nvidia-ml-py (extra `gpu`), got none") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            sliced = self._sliced()
            self.energy_mj(), self.sm_mhz(), self.power_capped()
        except pynvml.NVMLError as error:
            raise ValueError(f"a GPU and a driver that count energy, got: {error}") from error
        if sliced:
            raise ValueError("a whole GPU, whose energy is counted, got one in slices (MIG)")

    def energy_mj(self) -> int:
        """Energy since the driver was loaded."""
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))

    def sm_mhz(self) -> int:
        """Clock of the multiprocessors as the driver reports it."""
        return int(self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM))

    def power_capped(self) -> bool:
        """Whether the cap on power is among what keeps the clock down."""
        reasons = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
        return bool(reasons & self._nvml.nvmlClocksEventReasonSwPowerCap)

    def _sliced(self) -> bool:
        try:
            now, _ = self._nvml.nvmlDeviceGetMigMode(self._device)
        except self._nvml.NVMLError_NotSupported:
            return False
        return bool(now == self._nvml.NVML_DEVICE_MIG_ENABLE)


def counter_of(device: torch.device) -> Counter:
    """Give the counter of a device in use; ValueError in one line where it has none."""
    try:
        return Nvml(str(torch.cuda.get_device_properties(device).uuid))
    except ValueError as error:
        raise ValueError(f"cost.hold_s needs {error}; {INSTEAD}") from error


def check(device: str, find: Callable[[str], Counter] = Nvml) -> None:
    """Check that a device counts energy, and that its counter moves, as an idle one's does too.

    find: gives the counter of a uuid. Raises ValueError in one line that ends with what works.
    """
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"cost.hold_s needs device=cuda, whose driver counts energy, got {device}; {INSTEAD}"
        )
    found = gpu.ask(index_of(device))
    if found is None:
        return  # nobody says what it is; its own process will
    try:
        counter = find(found.uuid)
    except ValueError as error:
        raise ValueError(f"cost.hold_s needs {error}; {INSTEAD}") from error
    began_s, before = now_s(), counter.energy_mj()
    while counter.energy_mj() == before:
        if now_s() - began_s > STILL_S:
            raise ValueError(f"cost.hold_s needs {_moving(before)}; {INSTEAD}")
        sleep(POLL_S)


def hold(
    run: Callable[[], object], counter: Counter, *, seconds: float, device: torch.device
) -> Held:
    """Repeat something back to back for so many seconds or a little more; tell what one run took.

    Raises RuntimeError where the counter stands still: a figure without it would be made up.
    """
    began_s = now_s()
    while now_s() - began_s < LEAD * seconds:
        run()
    timer, runs, over = Timer(device).start(), 0, Event()
    moves: list[_Move] = []
    with ThreadPoolExecutor(1) as pool:
        try:
            watching = pool.submit(_watch, counter, moves, over)
            while not watching.done() and _span_s(moves) < seconds:
                run()
                runs += 1
            wall_s = timer.stop().wall_s
        finally:
            over.set()
        watching.result()
    mj_per_s = (moves[-1].energy_mj - moves[0].energy_mj) / _span_s(moves)
    capped = sum(move.power_capped for move in moves)
    return Held(
        energy_mj=mj_per_s * wall_s / runs,
        held_ms=1e3 * wall_s / runs,
        sm_mhz=median_low(move.sm_mhz for move in moves),
        power_capped=2 * capped > len(moves),
    )


@dataclass(frozen=True, kw_only=True)
class _Move:
    """A counter's move: when it was noticed, to what, and how the device was then."""

    noticed_s: float
    energy_mj: int
    sm_mhz: int
    power_capped: bool


def _watch(counter: Counter, moves: list[_Move], over: Event) -> None:
    """Note when a counter moves, and to what, until it is over.

    What runs is asked for its clock here, since it may have ended before the caller could ask.
    """
    value, moved_s = counter.energy_mj(), now_s()
    while not over.wait(POLL_S):
        new, new_s = counter.energy_mj(), now_s()
        if new != value:
            value, moved_s = new, new_s
            move = _Move(
                noticed_s=new_s,
                energy_mj=new,
                sm_mhz=counter.sm_mhz(),
                power_capped=counter.power_capped(),
            )
            moves.append(move)
        elif new_s - moved_s > STILL_S:
            raise RuntimeError(f"a hold needs {_moving(value)}")


def _span_s(moves: list[_Move]) -> float:
    return moves[-1].noticed_s - moves[0].noticed_s if moves else 0.0


def _moving(value: int) -> str:
    return f"an energy counter that moves within {STILL_S:g} s, got one that stands at {value} mJ"
