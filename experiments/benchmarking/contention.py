"""Whether other programs were at work while the benchmark ran, which makes its ratios worthless."""

import os
import time
from pathlib import Path

_STATISTICS = Path("/proc/stat")
# The fields of a line of it: user, nice, system, idle, iowait, irq, softirq, steal.
_FIELDS, _IDLE = 8, (3, 4)


class Contention:
    """Counts what other programs do on the cores of this process, from now on."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._before = _others()

    def cores(self) -> float | None:
        """How many cores other programs kept busy, on average; None where nothing tells that."""
        now, seconds = _others(), time.monotonic() - self._start
        if now is None or self._before is None:
            return None
        return max(0.0, now - self._before) / max(seconds, 1e-9)


def _others() -> float | None:
    """Seconds of the cores of this process that neither it nor its finished children used."""
    if not _STATISTICS.exists():
        return None
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in _STATISTICS.read_text().splitlines():
        name, *numbers = line.split()
        if name in names:
            ticks += sum(
                int(number) for field, number in enumerate(numbers[:_FIELDS]) if field not in _IDLE
            )
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
