"""The only clock: marks -> seconds per stage.

On a GPU a mark records an event and nothing waits until `stop`, so the device never idles for the
clock's sake; on the CPU a mark reads the wall clock. A `Stopwatch`, for what comes before anything
is measured, waits at every mark.
"""

from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter  # noqa: TID251
from typing import Self, TypeAlias

import torch

from bench.age import process_age_s

Instant: TypeAlias = float | torch.cuda.Event  # noqa: TID251


def now_s() -> float:
    """Read the host's clock, of which only differences mean anything; nothing waits."""
    return perf_counter()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """stage_s: seconds of every occurrence of each stage. wall_s: start to stop, host clock.

    first_end_s: seconds from start to the first end of each stage.
    """

    stage_s: dict[str, list[float]]
    wall_s: float
    first_end_s: dict[str, float]


class Stopwatch:
    """Adds up where a process's time goes, by stage, from its very start on."""

    def __init__(self) -> None:
        self.stage_s: dict[str, float] = {}
        self._last = perf_counter() - process_age_s()

    def mark(self, stage: str) -> None:
        """Wait for the device, and charge what has passed since the last mark to a stage."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # noqa: TID251
        now = perf_counter()
        self.add(stage, now - self._last)
        self._last = now

    def add(self, stage: str, seconds: float) -> None:
        """Charge seconds that another clock has measured."""
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds


class Timer:
    """Measures from `start` to `stop`; whatever lies between two marks belongs to the later one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Instant]] = []
        self._began = 0.0

    def start(self) -> Self:
        """Wait for earlier work, then start."""
        self._wait()
        self._began = perf_counter()
        self._marks = [("", self._now())]
        return self

    def mark(self, stage: str) -> None:
        """Note that a stage ends here."""
        assert self._marks, "start comes first"
        self._marks.append((stage, self._now()))

    def stop(self) -> Timing:
        """Wait for the device once, and add up."""
        assert self._marks, "start comes first"
        self._wait()
        wall_s = perf_counter() - self._began
        stage_s: dict[str, list[float]] = defaultdict(list)
        first_end_s: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            stage_s[stage].append(_seconds(before, after))
            if stage not in first_end_s:
                first_end_s[stage] = _seconds(self._marks[0][1], after)
        self._marks = []
        return Timing(stage_s=dict(stage_s), wall_s=wall_s, first_end_s=first_end_s)

    def _now(self) -> Instant:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # noqa: TID251
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # noqa: TID251


def _seconds(before: Instant, after: Instant) -> float:
    if isinstance(before, float):
        assert isinstance(after, float)
        return after - before
    assert not isinstance(after, float)
    elapsed_ms: float = before.elapsed_time(after)
    return elapsed_ms / 1000
