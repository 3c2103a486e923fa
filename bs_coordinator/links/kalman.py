"""A small Kalman filter for costs that are positive, drift, jump, and are measured with outliers.

The state x holds costs (a round trip, time per byte, time per expert); a measurement is z = h·x + noise. It extends the
textbook filter by four things:

- an innovation beyond `_CLIP` standard deviations is treated as measured with accordingly more noise (Huber), so a
  retransmission of 200 ms does not drag a state of 5 ms;
- the measurement noise is learnt by counting how often an innovation exceeds its predicted median, which outliers
  hardly affect;
- innovations that stay on one side (CUSUM; Page, Biometrika 41, 1954) mean that the state has jumped: its variance is
  inflated;
- states are kept at or above their floors by conditioning on them.

With two to four states, plain Python floats take a few µs; numpy's calls alone would take several times as long.
"""

import math
from collections.abc import Sequence

_CLIP = 2.5
_MEDIAN = 0.6745
"""Half of a normal distribution lies within this many standard deviations."""
_SLOWEST_LEARNING = 0.04
_ALLOWANCE = 0.75
"""Of the CUSUM, in standard deviations: smaller shifts are left to the drift."""
_ALARM = 6.0
"""With this allowance, one false alarm in about 40,000 normal innovations; a shift by two needs five innovations."""
_JUMP = 0.6
"""Relative uncertainty of every state after an alarm."""


class RobustFilter:
    """State, covariance and learnt noise. Choose units in which all states are about 1.

    Attributes:
        x: the state.
        noise: standard deviation of one measurement.
        count: number of measurements.
        alarms: number of jumps detected.
    """

    __slots__ = ("_cap", "_drift", "_floor", "_high", "_least_noise", "_low", "_p", "alarms", "count", "noise", "x")

    def __init__(
        self,
        x: Sequence[float],
        std: Sequence[float],
        *,
        drift: Sequence[float],
        floor: Sequence[float],
        noise: float,
        least_noise: float,
    ) -> None:
        """Begin with a prior.

        Args:
            x: prior mean.
            std: prior standard deviation; without measurements the uncertainty grows to this, or to the state itself
                if that is larger.
            drift: of a random walk: relative standard deviation that each state gains per second.
            floor: smallest value of each state, positive.
            noise: first estimate of the measurement noise.
            least_noise: lower limit of the learnt noise.
        """
        n = len(x)
        self.x = list(x)
        self.noise = noise
        self.count = 0
        self.alarms = 0
        self._p = [[std[i] ** 2 if i == j else 0.0 for j in range(n)] for i in range(n)]
        self._cap = [s * s for s in std]
        self._drift = [d * d for d in drift]
        self._floor = list(floor)
        self._least_noise = least_noise
        self._high = self._low = 0.0

    def std(self, i: int) -> float:
        """Standard deviation of state i."""
        return math.sqrt(self._p[i][i])

    def advance(self, seconds: float) -> None:
        """Let time pass: the uncertainty grows, the state stays."""
        if seconds > 0:
            for i, x in enumerate(self.x):
                row = self._p[i]
                most = max(self._cap[i], x * x)
                if row[i] < most:
                    row[i] = min(row[i] + self._drift[i] * x * x * seconds, most)

    def predict(self, h: Sequence[float]) -> float:
        """Mean of a measurement h·x."""
        mean = 0.0
        for hi, xi in zip(h, self.x, strict=True):
            mean += hi * xi
        return mean

    def update(self, h: Sequence[float], z: float, *, extra_std: float = 0.0) -> None:
        """Take in a measurement.

        Args:
            h: coefficients of the states.
            z: the measured value.
            extra_std: standard deviation of known noise, in addition to the learnt one.
        """
        x, p = self.x, self._p
        ph = []
        mean = var = 0.0
        for hi, xi, row in zip(h, x, p, strict=True):
            s = 0.0
            for hj, pij in zip(h, row, strict=True):
                s += hj * pij
            ph.append(s)
            var += hi * s
            mean += hi * xi
        noise_var = self.noise * self.noise + extra_std * extra_std
        total = max(var, 0.0) + noise_var
        std = math.sqrt(total)
        innovation = z - mean
        ratio = innovation / std
        size = abs(ratio)
        self._correct(ph, innovation, total * size / _CLIP if size > _CLIP else total)
        self.count += 1
        self._learn_noise(size, self.noise * self.noise / total)
        self._watch_for_jumps(ratio)

    def anchor(self, i: int, value: float, std: float) -> None:
        """Take in a value of state i from another source.

        Such values may repeat the same error, so they never make the state more certain than they are themselves.
        """
        if self._p[i][i] > std * std:
            self._correct([row[i] for row in self._p], value - self.x[i], self._p[i][i] + std * std)

    def replace(self, i: int, value: float, std: float) -> None:
        """Adopt a better value of state i from another source, even if it contradicts the state."""
        self._p[i][i] = max(self._p[i][i], (3 * std) ** 2)
        self._correct([row[i] for row in self._p], value - self.x[i], self._p[i][i] + std * std)

    def bound(self, i: int, *, least: float | None = None, most: float | None = None) -> None:
        """Move the state so that component i keeps a bound. `least` applies from now on, `most` once."""
        if least is not None:
            self._floor[i] = least
            self._keep_floors()
        if most is not None and self.x[i] > most >= self._floor[i]:
            self._condition(i, most)
            self._keep_floors()

    def alarm(self) -> None:
        """Treat the state as having jumped: every component becomes uncertain, and correlations are dropped."""
        self._high = self._low = 0.0
        self.alarms += 1
        n = len(self.x)
        self._p = [
            [max(self._p[i][i], (_JUMP * self.x[i]) ** 2) if i == j else 0.0 for j in range(n)] for i in range(n)
        ]

    def _correct(self, ph: list[float], innovation: float, total: float) -> None:
        x, p = self.x, self._p
        for i, phi in enumerate(ph):
            gain = phi / total
            x[i] += gain * innovation
            row = p[i]
            for j, phj in enumerate(ph):
                row[j] -= gain * phj
            # Rounding must not make a variance zero: the state would never change again.
            if row[i] < 1e-18:
                row[i] = 1e-18
        for i, xi in enumerate(x):
            if xi < self._floor[i]:
                self._keep_floors()
                break

    def _keep_floors(self) -> None:
        for _ in self.x:
            below = [i for i, xi in enumerate(self.x) if xi < self._floor[i]]
            if not below:
                return
            for i in below:
                self._condition(i, self._floor[i])
        self.x = [max(xi, floor) for xi, floor in zip(self.x, self._floor, strict=True)]

    def _condition(self, i: int, value: float) -> None:
        """Set the most probable state in which component i has this value; the covariance stays as it was."""
        shift = (value - self.x[i]) / self._p[i][i]
        for j, row in enumerate(self._p):
            self.x[j] += row[i] * shift
        self.x[i] = value

    def _learn_noise(self, size: float, share: float) -> None:
        # Half of all innovations should lie within the median. If the state is uncertain (small share), its
        # uncertainty explains them, and they teach little about the noise.
        rate = share * max(_SLOWEST_LEARNING, 1.0 / (self.count + 1))
        self.noise = max(self._least_noise, self.noise * math.exp(rate if size > _MEDIAN else -rate))

    def _watch_for_jumps(self, ratio: float) -> None:
        # Clipped to 2, so an outlier counts no more than two steps of a real jump.
        step = max(-2.0, min(2.0, ratio))
        self._high = max(0.0, self._high + step - _ALLOWANCE)
        self._low = max(0.0, self._low - step - _ALLOWANCE)
        if max(self._high, self._low) > _ALARM:
            self.alarm()
