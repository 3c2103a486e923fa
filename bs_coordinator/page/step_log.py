"""The last steps of the model, as the live page shows them, and what their requests tell about each node."""

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.engine.step_parts import as_ms, parts_ms
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.page.documents import StepView
from common.moving_average import MovingAverage

KEPT_STEPS = 128
_REMEMBERED = 256
"""Steps whose repetition is recognised: an answer shows the steps of its prompt only with its first token."""
_MOST_NODES = 512
_MEMORY = 0.95
"""Weight of earlier requests in a node's moving averages: about the last twenty count."""


@dataclass(slots=True)
class RequestTimes:
    """One node's requests.

    Attributes:
        measured_ms, predicted_ms: moving averages over requests of decoding steps; None before the first.
    """

    measured_ms: MovingAverage | None = None
    predicted_ms: MovingAverage | None = None

    def add(self, measured_ns: int, predicted_ns: int) -> None:
        """Take in a request of a decoding step."""
        if self.measured_ms is None or self.predicted_ms is None:
            self.measured_ms = MovingAverage(_MEMORY, measured_ns / 1e6)
            self.predicted_ms = MovingAverage(_MEMORY, predicted_ns / 1e6)
            return
        self.measured_ms.add(measured_ns / 1e6)
        self.predicted_ms.add(predicted_ns / 1e6)


@dataclass(slots=True)
class _Step:
    """A step, and the answers that it ran for."""

    record: StepRecord
    answers: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    degraded: int = 0
    draft_ns: int = 0


class StepLog:
    """Steps in the order in which they ran. Answers that share a step share its entry.

    Attributes:
        steps: the last ones.
        tokens, drafted, accepted, degraded: sums over all steps.
        nodes: by name, what the requests to each node showed.
    """

    def __init__(self, layers: int, experts: int) -> None:
        """An empty log.

        Args:
            layers, experts: layers with experts, and experts in each of them.
        """
        self.steps: deque[StepView] = deque(maxlen=KEPT_STEPS)
        self.tokens = self.drafted = self.accepted = self.degraded = 0
        self.nodes: dict[str, RequestTimes] = {}
        self._asked: NDArray[np.int64] = np.zeros((layers, experts), np.int64)
        self._serial = 0
        self._open: list[_Step] = []
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()

    def add(self, progress: Progress) -> None:
        """Take in what a step did for one answer. `close` ends the step."""
        for event in progress.events:
            if not event.steps:  # an accepted draft token, which came with the token before it
                if self._open:
                    self._open[-1].tokens += 1
                    self._open[-1].degraded += event.degraded
                continue
            for record in event.steps:
                step = self._find(record)
                if step is not None:
                    step.drafted += record.drafted
                    step.accepted += record.accepted
                    step.draft_ns = max(step.draft_ns, record.draft_ns)
            if (step := self._find(event.steps[-1])) is not None:
                step.answers += 1
                step.tokens += 1
                step.degraded += event.degraded

    def close(self) -> bool:
        """Turn what was added since the last call into entries; whether there are any."""
        for step in self._open:
            self._observe_requests(step.record)
            view = self._view(step)
            self.steps.append(view)
            self.tokens += view.tokens
            self.drafted += view.drafted
            self.accepted += view.accepted
            self.degraded += view.degraded
        any_new = bool(self._open)
        self._open = []
        return any_new

    def since(self, serial: int) -> list[StepView]:
        """The entries that are kept with a higher serial number."""
        return [step for step in self.steps if step.serial > serial]

    @property
    def last_serial(self) -> int:
        """Serial number of the newest entry; 0 before the first."""
        return self._serial

    def take_active(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) for each expert that was asked since the last call."""
        places = np.argwhere(self._asked)
        active = [(int(layer), int(expert), int(self._asked[layer, expert])) for layer, expert in places]
        self._asked[:] = 0
        return active

    def _find(self, record: StepRecord) -> _Step | None:
        """The entry of a step that is not closed, a new one if it was not seen before; None if it was closed."""
        key = (record.total_ns, record.head_ns)  # in ns, so different for any two steps
        for step in self._open:
            if (step.record.total_ns, step.record.head_ns) == key:
                return step
        if key in self._seen:
            return None
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self._open.append(_Step(record))
        return self._open[-1]

    def _observe_requests(self, record: StepRecord) -> None:
        for layer in record.layers:
            for gate, _ in layer.asked:
                self._asked[layer.layer] += np.count_nonzero(gate, axis=0)
            for request in layer.dispatches:
                if record.phase == "decode" and (node := self._node(request.node)) is not None:
                    node.add(request.round_trip_ns, request.predicted_ns)

    def _node(self, name: str) -> RequestTimes | None:
        if name not in self.nodes and len(self.nodes) < _MOST_NODES:
            self.nodes[name] = RequestTimes()
        return self.nodes.get(name)

    def _view(self, step: _Step) -> StepView:
        self._serial += 1
        record = step.record
        return StepView(
            serial=self._serial,
            prefill=record.phase == "prefill",
            answers=step.answers,
            tokens=step.tokens,
            drafted=step.drafted,
            accepted=step.accepted,
            degraded=step.degraded,
            **(parts_ms(record) | {"draft_ms": as_ms(step.draft_ns)}),
        )
