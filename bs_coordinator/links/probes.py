"""Which probe to send next: pings and packet trains, to the node whose link is least well known. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from bs_coordinator.links.estimator import LinkEstimator, LinkSample
from bs_coordinator.links.packet_train import plan_train

PROBE_EVERY_S = 0.1
"""Between two probes of any nodes, in normal operation."""
_HURRIED_EVERY_S = 0.02
"""The same while probes are wanted, at the start or after a jump."""
_TRAIN_EVERY_S, _SURE_EVERY_S = 0.5, 2.0
"""Between two trains on a link that is in use, in alternating directions; and once both rates are well known."""
_SURE_RATE = 0.08
"""Relative standard deviation up to which a rate is well known."""
_TRAIN_SHARE, _HURRIED_SHARE = 0.02, 0.25
"""Share of each direction's time that trains may take in normal operation; and on shared air while in a hurry."""
_CHECK_EVERY_S = 3.0
"""When one link has jumped, all others are checked, because they may share the cause; at most this often."""
_LOST_S = 2.0
"""A probe without an answer for this long counts as lost, and another may be sent."""
_UNSURE_RTT = 0.3


class _Kind(Enum):
    PING = 0
    DOWN = 1
    UP = 2


_CHECK = (_Kind.DOWN, _Kind.UP)
_AT_FIRST = (_Kind.PING, *_CHECK, *_CHECK, _Kind.PING, *_CHECK)
_AFTER_JUMP = (*_CHECK, _Kind.PING)
"""If the rates have jumped, these trains differ from earlier ones, and more follow until they agree."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A ping or a packet train to send.

    Attributes:
        node: name of the node.
        down_bytes: payload of each message to the node.
        up_bytes: payload of each answer.
        count: number of messages; more than one form a train, sent back to back.
        lead: for a train, number of first arrivals that do not count (`PacketTrain.lead`).
    """

    node: str
    down_bytes: int
    up_bytes: int
    count: int = 1
    lead: int = 0


class _NodeProbes:
    """What is planned for one node, and when it was last probed and used."""

    __slots__ = ("last_train", "next_train_s", "probed_s", "wanted", "worked_s")

    def __init__(self) -> None:
        self.wanted = list(_AT_FIRST)
        self.last_train = _Kind.UP
        self.probed_s = self.next_train_s = self.worked_s = -math.inf

    def urgency(self, link: LinkEstimator, now_s: float) -> int:
        """0 if no probe is needed; otherwise the smaller, the more urgent."""
        if link.stale(now_s):
            return 1
        if self.wanted:
            return 2
        if link.unsure_of_rates() or link.relative_std()[0] > _UNSURE_RTT:
            return 3
        return 4 if self.worked_s > self.probed_s and now_s > self.next_train_s else 0

    def next_kind(self, link: LinkEstimator, now_s: float) -> _Kind:
        """The kind of probe to send now."""
        if self.wanted:
            return self.wanted.pop(0)
        rtt, down, up = link.relative_std()
        if link.stale(now_s) or (rtt > _UNSURE_RTT and not link.unsure_of_rates()):
            return _Kind.PING
        if link.unsure_of_rates():
            return _Kind.DOWN if down > up else _Kind.UP
        return _Kind.DOWN if self.last_train is _Kind.UP else _Kind.UP


class ProbeChooser:
    """Chooses which node to probe next, how, and when."""

    def __init__(self, *, shared_air: bool) -> None:
        """No node was probed yet.

        Args:
            shared_air: all links share one half-duplex channel.
        """
        self._shared_air = shared_air
        self._nodes: dict[str, _NodeProbes] = {}
        self._outstanding: dict[str, float] = {}
        self._last_probe_s = self._checked_s = -math.inf
        self._last_air_s = 0.0

    def next_probe(self, links: Iterable[tuple[str, LinkEstimator]], now_s: float) -> Probe | None:
        """The probe to send now, if any. It counts as sent.

        Links that are stale come first, then those that have jumped or are uncertain, then those in use whose rates
        were not measured for a while.

        Args:
            links: of the nodes that may be probed, by name.
            now_s: by the clock of the samples.
        """
        known = [(name, link, self._node(name)) for name, link in links]
        hurried = any(node.wanted for _, _, node in known)
        pause_s = _HURRIED_EVERY_S if hurried else PROBE_EVERY_S
        if self._shared_air:
            # Nodes on the same channel had to wait for the last probe, and must have time for answers.
            pause_s += self._last_air_s / (_HURRIED_SHARE if hurried else _TRAIN_SHARE)
        if now_s < self._last_probe_s + pause_s:
            return None
        candidates = [
            (urgency, node.probed_s, name, link)
            for name, link, node in known
            if now_s - self._outstanding.get(name, -math.inf) > _LOST_S and (urgency := node.urgency(link, now_s))
        ]
        if not candidates:
            return None
        _, _, name, link = min(candidates, key=lambda candidate: candidate[:3])
        node = self._nodes[name]
        node.probed_s = self._outstanding[name] = self._last_probe_s = now_s
        probe, self._last_air_s = _make_probe(name, node, link, node.next_kind(link, now_s))
        if probe.count > 1:
            # The directions alternate, so each has twice that time.
            every_s = _SURE_EVERY_S if max(link.relative_std()[1:]) < _SURE_RATE else _TRAIN_EVERY_S
            node.next_train_s = now_s + max(every_s, 0.5 * self._last_air_s / _TRAIN_SHARE)
        return probe

    def answered(self, node: str) -> None:
        """Take in that a probe of `node` came back, with or without a usable result."""
        self._outstanding.pop(node, None)

    def worked(self, node: str, time_s: float) -> None:
        """Take in that `node` answered a request."""
        self._node(node).worked_s = time_s

    def jumped(self, sample: LinkSample) -> None:
        """Take in that this sample showed a jump of its link."""
        # A train has measured its own direction already: the other one may have jumped as well, and other links too.
        # A request, on the other hand, may only have been delayed once.
        self._node(sample.node).wanted = list(_CHECK if sample.train else _AFTER_JUMP)
        if sample.train and sample.time_s - self._checked_s > _CHECK_EVERY_S:
            self._checked_s = sample.time_s
            for other in self._nodes.values():
                other.wanted = other.wanted or list(_CHECK)

    def odd_train(self, sample: LinkSample) -> None:
        """Take in that this train differed from those before it: the next one shows whether the link has changed."""
        wanted = self._node(sample.node).wanted
        kind = _Kind.DOWN if sample.down_bytes else _Kind.UP
        if kind not in wanted:
            wanted.append(kind)

    def _node(self, name: str) -> _NodeProbes:
        known = self._nodes.get(name)
        if known is None:
            known = self._nodes[name] = _NodeProbes()
        return known


def _make_probe(name: str, node: _NodeProbes, link: LinkEstimator, kind: _Kind) -> tuple[Probe, float]:
    """The probe of this kind, and its estimated time on the air in seconds."""
    if kind is _Kind.PING:
        return Probe(name, 0, 0), 0.0
    node.last_train = kind
    _, down, up = link.relative_std()
    if kind is _Kind.DOWN:
        s_per_byte, std, noise_s = link.down_s_per_byte, down, link.down_trains.noise_s
    else:
        s_per_byte, std, noise_s = link.up_s_per_byte, up, link.up_trains.noise_s
    # Assume a slow link: a train that is too short has to be repeated, one that is too long delays other messages.
    s_per_byte *= 1 + min(std, 1.0)
    train = plan_train(s_per_byte, link.rtt_s, noise_s)
    sizes = (train.message_bytes, 0) if kind is _Kind.DOWN else (0, train.message_bytes)
    return Probe(name, *sizes, train.count, train.lead), train.count * train.message_bytes * s_per_byte
