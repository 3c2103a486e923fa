"""A small Kalman filter for costs that are positive, drift, jump, and are measured with outliers.

The state x holds costs (a round trip, time per byte, time per expert); a measurement is z = h·x + noise. Four
things are added to the textbook:

- an innovation beyond `_CLIP` standard deviations counts as if measured with accordingly more noise (Huber), so
  that a retransmission of 200 ms does not drag a state of 5 ms;
- the measurement noise is learnt by counting how often an innovation exceeds its predicted median, which no
  outlier can blow up;
- innovations that stay on one side (CUSUM) mean that the state has jumped: its variance is inflated;
- states are kept at or above their floors by conditioning on them.

Two or three states in plain Python floats take a few µs; numpy's calls alone would take several times that.
"""

import math
from collections.abc import Sequence

_CLIP = 2.5
_MEDIAN = 0.6745
"""Half of a normal distribution lies within this many standard deviations."""
_SLOWEST_LEARNING = 0.04
_ALLOWANCE = 0.75
"""Of the CUSUM, in standard deviations: a smaller shift is left to the drift."""
_ALARM = 6.0
"""With the allowance, one false alarm in some 40,000 normal innovations; a shift of two needs five of them."""
_JUMP = 0.6
"""Relative uncertainty of every state after an alarm."""


class RobustFilter:
    """State, covariance and learnt noise. Units are the caller's; about 1 is best.

    Attributes:
        x: the state.
        noise: standard deviation of one measurement.
        count: measurements taken in.
        alarms: jumps noticed.
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
            std: prior standard deviation; also the most that silence lets the uncertainty grow to, unless the
                state itself is larger.
            drift: relative standard deviation that each state gains in a second, of a random walk.
            floor: smallest values, positive.
            noise: first guess of the measurement noise.
            least_noise: it is never believed to be smaller.
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
        """Let time pass: uncertainty grows, the state stays."""
        if seconds > 0:
            for i, x in enumerate(self.x):
                row = self._p[i]
                row[i] = min(row[i] + self._drift[i] * x * x * seconds, max(self._cap[i], x * x, row[i]))

    def predict(self, h: Sequence[float]) -> tuple[float, float]:
        """Mean of a measurement, and its variance as far as the state's uncertainty goes."""
        mean = var = 0.0
        for hi, xi, row in zip(h, self.x, self._p, strict=True):
            mean += hi * xi
            if hi:
                s = 0.0
                for hj, pij in zip(h, row, strict=True):
                    s += hj * pij
                var += hi * s
        return mean, max(var, 0.0)

    def update(self, h: Sequence[float], z: float, *, extra_std: float = 0.0) -> float:
        """Take in a measurement.

        Args:
            extra_std: of noise that is known beforehand, on top of the learnt one.

        Returns:
            The innovation in predicted standard deviations.
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
        return ratio

    def anchor(self, i: int, value: float, std: float) -> None:
        """Take in word of one state from elsewhere.

        Such word may repeat the same error again and again, so it never makes the state surer than itself.
        """
        if self._p[i][i] > std * std:
            self._correct([row[i] for row in self._p], value - self.x[i], self._p[i][i] + std * std)

    def replace(self, i: int, value: float, std: float) -> None:
        """Take over better word of one state from elsewhere, whatever was believed of it."""
        self._p[i][i] = max(self._p[i][i], (3 * std) ** 2)
        self._correct([row[i] for row in self._p], value - self.x[i], self._p[i][i] + std * std)

    def bound(self, i: int, *, least: float | None = None, most: float | None = None) -> None:
        """Move the state to where one component keeps a bound; `least` holds from now on."""
        if least is not None:
            self._floor[i] = least
            self._keep_floors()
        if most is not None and self.x[i] > most >= self._floor[i]:
            self._condition(i, most)
            self._keep_floors()

    def alarm(self) -> None:
        """The state has jumped: every component becomes unsure, correlations are forgotten."""
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
            # Rounding must not make a variance vanish: the state would never move again.
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
        """The most probable state in which component i has this value; the covariance stays as it was."""
        shift = (value - self.x[i]) / self._p[i][i]
        for j, row in enumerate(self._p):
            self.x[j] += row[i] * shift
        self.x[i] = value

    def _learn_noise(self, size: float, share: float) -> None:
        # Half of all innovations should lie within the median. An uncertain state (small share) explains them
        # without any noise, and so teaches little about it.
        rate = share * max(_SLOWEST_LEARNING, 1.0 / (self.count + 1))
        self.noise = max(self._least_noise, self.noise * math.exp(rate if size > _MEDIAN else -rate))

    def _watch_for_jumps(self, ratio: float) -> None:
        # Clipped to 2, so that an outlier counts like two steps of a real jump and no more.
        step = max(-2.0, min(2.0, ratio))
        self._high = max(0.0, self._high + step - _ALLOWANCE)
        self._low = max(0.0, self._low - step - _ALLOWANCE)
        if max(self._high, self._low) > _ALARM:
            self.alarm()
