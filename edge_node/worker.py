"""From a work frame to its answer: no I/O, so that it can be tested and replayed without a network."""

import logging
import secrets
from collections import Counter
from contextlib import nullcontext

import numpy as np

from common import real_time
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError
from edge_node.experts.runtime import ExpertRuntime
from wire import frames
from wire.errors import FrameError
from wire.experts import UnitId, unit_name
from wire.frame_auth import FrameAuthenticator, ReplayGuard
from wire.frames import ErrorFrame, NodeDurations, PingFrame, PongFrame, ResultFrame, Status, WorkFrame
from wire.pong_stamps import stamped_payload
from wire.tensors import Array, all_finite

log = logging.getLogger(__name__)

_KEY_REASONS = ("forged", "sealed", "unsealed")
"""Reasons to drop a frame that an operator can do something about: each is logged once."""


class Worker:
    """Answers frames with the experts of a runtime.

    Attributes:
        boot_id: random per worker; frames with tags are accepted only if they were made for it.
        tagged: whether frames carry tags.
        rows: hidden states computed so far.
        counts: answered and refused frames and dropped bytes by reason, for logs.
    """

    def __init__(self, runtime: ExpertRuntime, *, node_key: bytes | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        """Take frames from now on.

        Args:
            node_key: answer only frames with a tag of this key, and none of them twice; frames without a tag if None.
            clock: for durations and time stamps.
        """
        self.boot_id = secrets.token_hex(8)
        self.tagged = node_key is not None
        self.rows = 0
        self.counts: Counter[str] = Counter()
        self._runtime = runtime
        self._authenticator = FrameAuthenticator(node_key, self.boot_id, at_node=True) if node_key else None
        self._clock = clock
        self._replays = ReplayGuard()
        self._hidden = runtime.manifest.dims.hidden

    def answer(self, payload: bytes, arrived_ns: int) -> bytes | None:
        """The encoded answer to an encoded frame; None, with the reason counted, if the bytes are not a valid request.

        Args:
            arrived_ns: `clock.perf_ns()` when the frame was read off the connection.
        """
        begun_ns = self._clock.perf_ns()
        try:
            frame = frames.decode(payload, authenticator=self._authenticator)
        except FrameError as error:
            self.counts[f"dropped:{error.reason}"] += 1
            if error.reason in _KEY_REASONS and self.counts[f"dropped:{error.reason}"] == 1:
                log.warning("a request was dropped: %s; a base station of an older version may have sent it", error)
            return None
        # Without tags, any client could make a request look like a replay by sending its number first.
        if self._authenticator is not None and not self._replays.is_new(*frame.id):
            self.counts["dropped:replayed"] += 1
            return None
        match frame:
            case PingFrame():
                self.counts["pings"] += 1
                durations = NodeDurations(queue_ns=begun_ns - arrived_ns, decode_ns=self._clock.perf_ns() - begun_ns)
                payload = stamped_payload(self._clock, arrived_ns, frame.reply_bytes)
                return frames.encode(PongFrame(frame.id, payload, durations), authenticator=self._authenticator)
            case WorkFrame():
                return self._work(frame, arrived_ns, begun_ns)
            case _:
                self.counts["dropped:kind"] += 1
                return None

    def _work(self, frame: WorkFrame, arrived_ns: int, begun_ns: int) -> bytes:
        queue_ns = begun_ns - arrived_ns
        if frame.deadline_ms and queue_ns > frame.deadline_ms * 1_000_000:
            return self._refuse(frame, Status.EXPIRED, f"waited {queue_ns / 1e6:.0f} ms in the queue")
        if frame.hidden.shape[1] != self._hidden:
            return self._refuse(
                frame,
                Status.WRONG_SHAPE,
                f"hidden size {frame.hidden.shape[1]}, this model has {self._hidden}",
            )
        missing = [id for s in frame.experts if (id := UnitId(frame.layer, s.expert)) not in self._runtime]
        if missing:
            name = unit_name(missing[0], self._runtime.manifest.dims.slices)
            return self._refuse(frame, Status.UNKNOWN_EXPERT, f"does not hold {name}")
        decoded_ns = self._clock.perf_ns()
        load_ns = -self._runtime.loads.ns
        try:
            with real_time.lowered() if len(frame.hidden) > real_time.MOST_TOKENS else nullcontext():
                output = self._compute(frame)
        except WdmoeError as error:  # an expert's files were changed or removed since the start
            log.error("%s", error)
            return self._refuse(frame, Status.INTERNAL, "an expert can't be loaded any more: see the node's log")
        computed_ns = self._clock.perf_ns()
        load_ns += self._runtime.loads.ns
        if not all_finite(output):
            return self._refuse(frame, Status.NOT_FINITE, "an expert's output is not finite")
        compute_ns = computed_ns - decoded_ns - load_ns
        durations = NodeDurations(queue_ns, decoded_ns - begun_ns, compute_ns, load_ns=load_ns)
        result = ResultFrame(frame.id, frame.layer, output, frame.dtype, durations)
        reply = frames.encode(result, began_ns=computed_ns, clock=self._clock, authenticator=self._authenticator)
        self.counts["answered"] += 1
        self.rows += len(frame.hidden)
        return reply

    def _compute(self, frame: WorkFrame) -> Array:
        """Per token the sum over experts of gate weight × output."""
        if len(frame.hidden) == len(frame.experts) == len(frame.experts[0].tokens) == 1:
            # As below, for decoding: with cold caches each call of numpy takes 10 to 30 µs.
            (part,) = frame.experts
            return self._runtime.run(UnitId(frame.layer, part.expert), frame.hidden) * part.weights[:, None]
        output = np.zeros(frame.hidden.shape, np.float32)
        for part in frame.experts:
            y = self._runtime.run(UnitId(frame.layer, part.expert), frame.hidden[part.tokens])
            output[part.tokens] += y * part.weights[:, None]
        return output

    def _refuse(self, frame: WorkFrame, status: Status, why: str) -> bytes:
        self.counts[f"refused:{status.name.lower()}"] += 1
        return frames.encode(ErrorFrame(frame.id, frame.layer, status, why), authenticator=self._authenticator)
