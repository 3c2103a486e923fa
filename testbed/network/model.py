"""A model of frames on the air. Pure: the caller passes the time, and nothing here waits or does I/O.

Every node has two queues, down and up. A *channel* serves its queues one frame at a time: a frame occupies
the channel for its bits divided by its link's rate, and arrives after the link's delay. Dedicated links have a channel
per queue. On shared air there is one channel for all: stations (the base station is one) take turns frame by frame,
and the base station's queues take turns within its turn, so a frame waits for each other station at most once.

Rates are TCP goodput of full segments: of 1500 bytes of IP, 1448 are payload. iperf3 and
applications then see the configured rate; IP packets cross the air 3.6 % faster.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum

from testbed.network.spec import LinkSpec

ETHERNET_BYTES = 14
MTU_BYTES = 1500
GOODPUT_SHARE = 1448 / MTU_BYTES
"""Payload share of a full IP packet with IPv4 and TCP headers and TCP time stamps."""
MIN_QUEUE_FRAMES = 16
"""A queue always holds this many frames, so a slow link does not drop short bursts."""


class Direction(IntEnum):
    """Direction of a frame: DOWN from the base station to a node, UP from a node to the base station."""

    DOWN = 0
    UP = 1


def air_bits(frame_bytes: int) -> float:
    """Bits of a frame that count against a link's rate.

    Args:
        frame_bytes: length with the Ethernet header.
    """
    return max(frame_bytes - ETHERNET_BYTES, 1) * 8 * GOODPUT_SHARE


class Queue:
    """One direction of one node's link.

    Attributes:
        node: number of the node, from 0.
        rate_bps: TCP goodput in bit/s.
        waiting: queued frames, each with its time of arrival and its bits.
        waiting_bits: sum of the queued bits.
        sent_frames, sent_bytes: delivered to the other end.
        dropped_frames: dropped because the queue was full.
        lost_frames: lost on the air.
    """

    __slots__ = (
        "channel",
        "delay_s",
        "direction",
        "dropped_frames",
        "jitter_s",
        "last_due",
        "loss",
        "lost_frames",
        "node",
        "rate_bps",
        "sent_bytes",
        "sent_frames",
        "waiting",
        "waiting_bits",
    )  # fmt: skip

    def __init__(self, node: int, direction: Direction) -> None:
        self.node = node
        self.direction = direction
        self.rate_bps = 1.0
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.loss = 0.0
        self.waiting: deque[tuple[float, float, bytes]] = deque()
        self.waiting_bits = 0.0
        self.last_due = 0.0
        self.channel = Channel()
        self.sent_frames = self.sent_bytes = self.dropped_frames = self.lost_frames = 0

    @property
    def station(self) -> int:
        """Number of the sending station: the node's, or -1 for the base station."""
        return self.node if self.direction is Direction.UP else -1


class Channel:
    """A medium that carries one frame at a time.

    Attributes:
        free_at: time at which the current frame leaves the channel.
        scheduled: whether an event for the next transmission is pending.
    """

    __slots__ = ("_turns", "free_at", "scheduled")

    def __init__(self) -> None:
        self.free_at = 0.0
        self.scheduled = False
        self._turns: deque[deque[Queue]] = deque()

    def add(self, queue: Queue) -> None:
        """Add a queue that was empty and now has a frame to send."""
        for turn in self._turns:
            if turn[0].station == queue.station:
                turn.append(queue)
                return
        self._turns.append(deque([queue]))

    def clear(self) -> None:
        """Remove all queues, before another channel serves them."""
        self._turns.clear()

    @property
    def wanted(self) -> bool:
        """Whether any frame waits for this channel."""
        return bool(self._turns)

    def next(self) -> Queue:
        """The queue whose turn it is. Call only if `wanted`, and then take one frame from that queue."""
        turn = self._turns.popleft()
        queue = turn.popleft()
        if len(queue.waiting) > 1:
            turn.append(queue)
        if turn:
            self._turns.append(turn)
        return queue


class AirModel:
    """All links of an emulated network.

    Args:
        nodes: number of nodes.
        queue_s: queue length in seconds at the link's rate; a frame that would wait longer is dropped.
        seed: seeds loss and jitter.
    """

    def __init__(self, nodes: int, *, queue_s: float, seed: int = 0) -> None:
        self._queue_s = queue_s
        self._random = random.Random(seed).random  # noqa: S311 (loss and jitter are no secrets)
        self._events: list[tuple[float, int, Channel | Queue, bytes]] = []
        self._count = 0
        self._shared_air = False
        self.queues: tuple[list[Queue], list[Queue]] = (
            [Queue(k, Direction.DOWN) for k in range(nodes)],
            [Queue(k, Direction.UP) for k in range(nodes)],
        )

    def configure(self, now: float, links: Sequence[LinkSpec], *, shared_air: bool) -> None:
        """Set the links of all nodes. Frames on the air are not affected, queued frames stay queued.

        Args:
            now: seconds, never less than in earlier calls.
            shared_air: all queues on one channel instead of one each.
        """
        for k, link in enumerate(links):
            for queue, mbps in ((self.queues[0][k], link.down_mbps), (self.queues[1][k], link.up_mbps)):
                queue.rate_bps = mbps * 1e6
                queue.delay_s = link.delay_ms / 1e3
                queue.jitter_s = link.jitter_ms / 1e3
                queue.loss = link.loss_percent / 100
        if shared_air == self._shared_air:
            return
        self._shared_air = shared_air
        common = Channel()
        for queue in (*self.queues[0], *self.queues[1]):
            queue.channel.clear()
            queue.channel = common if shared_air else Channel()
            if queue.waiting:
                queue.channel.add(queue)
                if not queue.channel.scheduled:
                    self._schedule(queue.channel, now)

    def offer(self, now: float, node: int, direction: Direction, frame: bytes) -> bool:
        """Put a frame into its sender's queue.

        Args:
            now: seconds, never less than in earlier calls.

        Returns:
            False if it was dropped.
        """
        queue = self.queues[direction][node]
        bits = air_bits(len(frame))
        if queue.waiting_bits + bits > queue.rate_bps * self._queue_s and len(queue.waiting) >= MIN_QUEUE_FRAMES:
            queue.dropped_frames += 1
            return False
        channel = queue.channel
        if not channel.scheduled and channel.free_at <= now:
            # The channel is idle and no other frame waits: send at once.
            self._put_on_air(queue, now, bits, frame)
            return True
        if not queue.waiting:
            channel.add(queue)
        queue.waiting.append((now, bits, frame))
        queue.waiting_bits += bits
        if not channel.scheduled:
            self._schedule(channel, channel.free_at)
        return True

    def due(self, now: float) -> Iterator[tuple[int, Direction, bytes]]:
        """Yield (node, direction, frame) for each frame that has arrived by `now`, in order of arrival."""
        events = self._events
        while events and events[0][0] <= now:
            time, _, subject, frame = heapq.heappop(events)
            if isinstance(subject, Channel):
                self._send(subject, time)
            else:
                subject.sent_frames += 1
                subject.sent_bytes += len(frame)
                yield subject.node, subject.direction, frame

    def wake_at(self) -> float:
        """Time of the next event for `due`; infinity if there is none."""
        return self._events[0][0] if self._events else float("inf")

    def counters(self) -> Mapping[str, list[dict[str, float]]]:
        """By direction (`down`, `up`), per node: frames and bytes sent, dropped, lost and waiting."""
        return {
            direction.name.lower(): [
                {
                    "sent_frames": queue.sent_frames,
                    "sent_bytes": queue.sent_bytes,
                    "dropped_frames": queue.dropped_frames,
                    "lost_frames": queue.lost_frames,
                    "waiting_frames": len(queue.waiting),
                    "waiting_ms": queue.waiting_bits / queue.rate_bps * 1e3,
                }
                for queue in self.queues[direction]
            ]
            for direction in Direction
        }

    def _schedule(self, channel: Channel, time: float) -> None:
        channel.scheduled = True
        self._push(time, channel, b"")

    def _push(self, time: float, subject: Channel | Queue, frame: bytes) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, subject, frame))

    def _send(self, channel: Channel, time: float) -> None:
        """Put the next frame on the air of a channel that has become free."""
        channel.scheduled = False
        if not channel.wanted:
            return
        queue = channel.next()
        arrived, bits, frame = queue.waiting.popleft()
        queue.waiting_bits = queue.waiting_bits - bits if queue.waiting else 0.0
        # Use the event's time, not the clock: a relay that wakes late loses no capacity that way.
        self._put_on_air(queue, max(time, arrived), bits, frame)
        if channel.wanted:
            self._schedule(channel, channel.free_at)

    def _put_on_air(self, queue: Queue, time: float, bits: float, frame: bytes) -> None:
        queue.channel.free_at = free_at = time + bits / queue.rate_bps
        if queue.loss and self._random() < queue.loss:
            queue.lost_frames += 1
        else:
            delay_s = queue.delay_s
            if queue.jitter_s:
                delay_s += queue.jitter_s * (2 * self._random() - 1)
            queue.last_due = max(queue.last_due, free_at + delay_s)
            self._push(queue.last_due, queue, frame)
