"""Counters of energy that are made up."""

from collections.abc import Callable

from bench.energy import Counter
from bench.timer import now_s


class Made(Counter):
    """Reads what it is told to."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def energy_mj(self) -> int:
        return self._read()

    def sm_mhz(self) -> int:
        return 1410

    def power_capped(self) -> bool:
        return True


class Paced(Made):
    """Counts a constant power, and moves once a period."""

    def __init__(self, *, watts: float, period_s: float) -> None:
        super().__init__(lambda: round(1e3 * watts * (now_s() // period_s) * period_s))
