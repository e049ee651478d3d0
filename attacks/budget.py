"""What a run may spend: gradients and seconds."""

import math
import time

from .checks import positive, whole


class Budget:
    """Counts what is spent, in gradient evaluations: a forward and a backward pass count 1/2 each."""

    def __init__(self, max_gradients: int | None, max_seconds: float | None) -> None:
        """Begin the clock; `max_gradients` is a mean for each sample, whose number `start` tells."""
        if max_gradients is not None:
            whole("max_gradients", max_gradients)
        if max_seconds is not None:
            positive("max_seconds", max_seconds)
        self._each, self._seconds = max_gradients, max_seconds
        self._total = math.inf
        self._spent = 0.0
        self._begin = time.perf_counter()

    def start(self, samples: int) -> None:
        """Set the number of samples that share the budget."""
        self._total = math.inf if self._each is None else float(self._each * samples)

    def spend(self, forwards: int, gradients: int) -> None:
        """Count passes; `forwards` includes those of the gradients, as `Victim` counts."""
        self._spent += (forwards + gradients) / 2

    def affordable(self, cost: float, wanted: int) -> int:
        """Return for how many of `wanted` samples the budget reaches, at `cost` gradients each.

        A gradient is taken to last as long as they did on average so far, which is a guess: as long as time is left,
        it is left for one sample.
        """
        count = min(wanted, int((self._total - self._spent) / cost)) if self._total < math.inf else wanted
        if self._seconds is None or count <= 0:
            return max(0, count)
        passed = time.perf_counter() - self._begin
        left = (self._seconds - passed) * self._spent / passed
        return 0 if left <= 0 else max(1, min(count, int(left / cost)))
