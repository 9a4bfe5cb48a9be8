"""Times of several calls, taken in turns so that all of them meet the same machine."""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

# A call: does its work and waits for the result.
Call = Callable[[], object]

# A sample shorter than this would measure the clock; short calls are repeated within a sample.
_SAMPLE_SECONDS = 4e-3
_MOST_REPEATS = 2000
# After a pause calls take up to twice as long at first: threads sleep, caches are cold, and a
# processor saves energy. So much time of calls goes by before a sample, unless one takes more.
_WARM_SECONDS = 2e-2
# The threads of one library wait busily for more work, which slows the next one down: OpenMP's,
# under compiled torch, made a call of 55 us take 150 us after 2 ms still.
_PAUSE_SECONDS = 2e-2


class Samples(NamedTuple):
    """One figure for each round, in the order of the rounds: seconds per call, or their ratio."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """As many rounds were above as below."""
        return self._quantile(0.5)

    @property
    def lower(self) -> float:
        """The lower quartile."""
        return self._quantile(0.25)

    @property
    def upper(self) -> float:
        """The upper quartile."""
        return self._quantile(0.75)

    @property
    def samples(self) -> int:
        """How many rounds there were."""
        return len(self.values)

    def scaled(self, factor: float) -> "Samples":
        """The same measurement in another unit."""
        return Samples(tuple(value * factor for value in self.values))

    def over(self, other: "Samples") -> "Samples":
        """The ratio in each round: where a machine's speed changes, both sides of it meet that."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.values, share))


class Effort(NamedTuple):
    """How long to measure: until `seconds` are over, but within these numbers of rounds."""

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 51


def interleave(calls: Mapping[str, Call], effort: Effort) -> dict[str, Samples]:
    """Times calls round by round, each round in a random order, so that none has a fixed neighbour.

    Before a sample there is a pause, and then calls that do not count, unless calls are long.

    Args:
      calls: what to time; each has been called before, so that nothing is left to compile.
      effort: how long to go on.
    """
    names = list(calls)
    costs = {name: _cost(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    start = time.perf_counter()
    for round_ in range(effort.most_rounds):
        if round_ >= effort.least_rounds and time.perf_counter() - start > effort.seconds:
            break
        for name in draw.sample(names, len(names)):
            samples[name].append(_sample(calls[name], costs[name]))
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def _cost(call: Call) -> float:
    seconds = _once(call)
    if seconds < 10 * _SAMPLE_SECONDS:
        # The first calls of a program are slow; sampled by few, it would stay the slow one.
        seconds = min(seconds, *(_once(call) for _ in range(9)))
    return seconds


def _sample(call: Call, cost: float) -> float:
    """Seconds per call, of one that takes about `cost`."""
    repeats = max(1, min(_MOST_REPEATS, round(_SAMPLE_SECONDS / max(cost, 1e-9))))
    time.sleep(_PAUSE_SECONDS)
    warm = time.perf_counter() + _WARM_SECONDS
    while cost < _WARM_SECONDS and time.perf_counter() < warm:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
