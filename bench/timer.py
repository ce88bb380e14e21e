"""The only clock: marks -> seconds per stage.

On a GPU a mark records an event and nothing waits until `stop`, so the device never idles for the
clock's sake; on the CPU a mark reads the wall clock.
"""

from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter  # noqa: TID251
from typing import Self, TypeAlias

import torch

Instant: TypeAlias = float | torch.cuda.Event  # noqa: TID251


@dataclass(frozen=True, kw_only=True)
class Timing:
    """stage_s: seconds of every occurrence of each stage. wall_s: start to stop, host clock."""

    stage_s: dict[str, list[float]]
    wall_s: float


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
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            stage_s[stage].append(_seconds(before, after))
        self._marks = []
        return Timing(stage_s=dict(stage_s), wall_s=wall_s)

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
