"""When a draft model should read during steps: learnt from the steps of all sequences of a model. Pure.

Reading saves the time that the same draft tokens would take after the step. It costs something where no core is free:
answers or the trunk's next layer come later. How much is measured, by steps with reading and steps without.
"""

import sys

from common.moving_average import MovingAverage

_MEMORY = 0.9
_STEPS_MEMORY = 0.8
"""Shorter, because there are few steps of the kind that does not pay."""
_FIRST_STEPS = 4
"""Steps with reading before it is judged, each followed by one without."""
_FEW_READS = 6
"""Most reads in a step while it is not known that they pay."""
_WITHOUT_EVERY, _WITH_EVERY = 8, 16
"""Every how many steps there is one without reading while it pays, and one with it while it does not."""
_LARGEST_EXCESS = 0.25
"""Most that counts as a step's delay, as a share of its expected time: a node that fails takes longer than any read."""


class SpareTime:
    """Learns how long waits and reads take, and by how much reading delays a step.

    Durations and excesses begin with the first that is seen.
    """

    def __init__(self) -> None:
        self._read_s, self._wait_s = MovingAverage(_MEMORY, None), MovingAverage(_MEMORY, None)
        self._reads = MovingAverage(_STEPS_MEMORY, None)
        self._excess_with, self._excess_without = MovingAverage(_STEPS_MEMORY, None), MovingAverage(_STEPS_MEMORY, None)
        self._steps_with = self._steps_without = 0
        self._since_other = 0

    @property
    def read_s(self) -> float:
        """Duration of reading one token, in seconds; 0 before any was read."""
        return self._read_s.value

    @property
    def wait_s(self) -> float:
        """Duration of a layer's wait, in seconds; 0 before the first."""
        return self._wait_s.value

    @property
    def most_reads(self) -> int:
        """Most reads in the next step."""
        return _FEW_READS if self._steps_with < _FIRST_STEPS or not self._pays else sys.maxsize

    @property
    def delay_s(self) -> float:
        """Seconds by which each read delays a step; 0 while too little is known."""
        if self._steps_with < _FIRST_STEPS or not self._steps_without:
            return 0.0
        excess = self._excess_with.value - self._excess_without.value
        return max(0.0, excess) / max(1.0, self._reads.value)

    @property
    def least_chance(self) -> float:
        """Probability that a text comes from which it is read.

        From there, reading is expected to save more time than it costs. While it never does, the likeliest texts are
        read in a few steps all the same: they show whether that is still so.
        """
        return self._breakeven if self._pays else 0.0

    def uses_next(self) -> bool:
        """Whether to read during the next step."""
        if self._steps_with < _FIRST_STEPS:
            return self._steps_with <= self._steps_without
        pays = self._pays
        return pays if self._since_other < (_WITHOUT_EVERY if pays else _WITH_EVERY) - 1 else not pays

    def fits(self, since_s: float) -> bool:
        """Whether a read is expected to be over before the answers come.

        Args:
            since_s: seconds since the wait began.
        """
        return since_s + self.read_s <= self.wait_s

    def observe_wait(self, seconds: float) -> None:
        """Take in how long a layer's answers were awaited."""
        self._wait_s.add(seconds)

    def observe_read(self, seconds: float) -> None:
        """Take in how long one read took."""
        self._read_s.add(seconds)

    def observe_step(self, seconds: float, expected_s: float, reads: int) -> None:
        """Take in a step.

        Args:
            seconds: its duration.
            expected_s: for as many rows, by all steps before.
            reads: number of reads during it.
        """
        most = _LARGEST_EXCESS * expected_s
        excess_s = max(-most, min(seconds - expected_s, most))
        usual = self._pays == (reads > 0)
        self._since_other = self._since_other + 1 if usual else 0
        if reads:
            self._steps_with += 1
            self._excess_with.add(excess_s)
            self._reads.add(reads)
        else:
            self._steps_without += 1
            self._excess_without.add(excess_s)

    @property
    def _breakeven(self) -> float:
        """Probability from which reading a text saves as much time as it costs; above 1 if it never does."""
        return self.delay_s / self.read_s if self.read_s else 0.0

    @property
    def _pays(self) -> bool:
        return self._breakeven < 1.0
