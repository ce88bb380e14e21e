"""How long this process has been there, from before its first import on.

Without torch, since a command that only plans or reports has no use for it.
"""

import os
from contextlib import suppress
from pathlib import Path

STARTED = 19  # place of starttime, in ticks since boot, among /proc/self/stat's after the name


def process_age_s() -> float:
    """Seconds since this process was started; 0 where nobody says, elsewhere than on Linux."""
    with suppress(OSError, IndexError, ValueError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields[STARTED]) / os.sysconf("SC_CLK_TCK")
        since_boot_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return max(0.0, since_boot_s - started_s)
    return 0.0
