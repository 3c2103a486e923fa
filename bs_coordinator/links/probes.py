"""Which probe to send next: pings and packet trains, to the node whose link is least well known. Pure."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from bs_coordinator.links.budget import ProbeBudget, Use
from bs_coordinator.links.estimator import LinkEstimator, LinkSample
from bs_coordinator.links.packet_train import SHORTEST, plan_train

PROBE_EVERY_S = 0.1
"""Between two probes of any nodes, in normal operation."""
_HURRIED_EVERY_S = 0.02
"""The same while probes are wanted, at the start or after a jump."""
_TRAIN_EVERY_S, _UNSURE_EVERY_S, _SURE_EVERY_S = 0.5, 2.0, 6.0
"""Between two trains on a link that is in use, in alternating directions; with `_ENOUGH_TRAINS` each way; and once both
rates are known, if trains found no change for `_CHANGED_S`."""
_ENOUGH_TRAINS, _CHANGED_S = 3, 30.0
_TRAIN_SHARE, _HURRIED_SHARE = 0.02, 0.25
"""Share of the time that a train may be on the way on shared air in normal operation, and in a hurry: others must have
time for answers."""
_FLEET_SHARE = 0.05
"""The same on separate links in normal operation: all probes pass the base station's own connection."""
_REGULAR_PART, _TRAIN_PART = 0.7, 0.95
"""Of the budget: trains on links that are only in use leave some to urgent trains, and these some to pings."""
_HELD_UP_TRAINS = 2
"""After so many trains in a row that hosts held up, there are no more than where rates are known."""
_AGAIN_S = 0.1
"""After a probe did not fit into the budget, until the next attempt at the same link."""
_FIRST_S_PER_BYTE = 1.6e-7
"""A direction's first trains, until there are `_ENOUGH_TRAINS`, are planned for 50 Mbit/s, so that none of them decides
how long the others are. The very first one is the shortest, because the budget can't tell what it takes."""
_MOST_AIR_S = 0.1
"""If the budget counts more than this for a train, half of what a channel may take while tokens flow, the shortest one
is tried as well: if only small messages passed lately, the budget takes the link for as slow as these."""
_OVERHEAD_BYTES = 256
"""Of a message without payload: our frame, MQTT's topic, headers of TCP, IP and link, and its acknowledgement."""
_ACK_SHARE = 0.03
"""Acknowledgements of a train, relative to its bytes, in the other direction: one of 66 bytes for two segments."""
_HURRIES, _HURRY_EVERY_S = 12.0, 8.0
"""Urgent trains that a link may get because others were odd or requests took longer, and the time until it may have one
more. Once trains agree that the link has changed, it may have all of them again; on a busy host they don't agree."""
_CHECK_EVERY_S = 1.0
"""When one link has jumped, all others are checked, because they may share the cause; at most this often."""
_LOST_S = 2.0
"""A probe without an answer for this long counts as lost, and another may be sent."""
_UNSURE_RTT = 0.3
_REGULAR = 4
"""The least urgent: the link is only in use."""


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

    __slots__ = (
        "_hurried_s",
        "_hurries",
        "_new",
        "again_s",
        "changed_s",
        "last_train",
        "next_train_s",
        "probed_s",
        "refused",
        "wanted",
        "worked_s",
    )

    def __init__(self) -> None:
        self.wanted = list(_AT_FIRST)
        self.last_train = _Kind.UP
        self.refused = False
        self._new = True
        self._hurries, self._hurried_s = _HURRIES, 0.0
        self.probed_s = self.next_train_s = self.again_s = self.changed_s = self.worked_s = -math.inf

    def urgency(self, link: LinkEstimator, now_s: float) -> int:
        """0 if no probe is needed; otherwise the smaller, the more urgent."""
        if now_s < self.again_s:
            return 0
        if link.stale(now_s):
            return 1
        if self.wanted and (self.hurries(now_s) >= 1 or now_s >= self.next_train_s):
            return 2
        if now_s < self.next_train_s:
            return 0
        if link.unsure_of_rates() or link.relative_std()[0] > _UNSURE_RTT:
            return 3
        return _REGULAR if self.worked_s > self.probed_s else 0

    def hurries(self, now_s: float) -> float:
        """How many trains may be sent at once now, rather than at the normal pace."""
        return min(_HURRIES, self._hurries + (now_s - self._hurried_s) / _HURRY_EVERY_S)

    def changed(self, time_s: float) -> None:
        """Take in that trains agree that the link has changed, so hurrying was right."""
        self._hurries, self.changed_s = _HURRIES, time_s

    def kinds(self, link: LinkEstimator, now_s: float) -> Iterator[_Kind]:
        """The kind of probe to send now, then what to send instead if that is too much."""
        stale = link.stale(now_s)
        rtt, down, up = link.relative_std()
        if self.wanted:
            yield from dict.fromkeys(self.wanted)
            if stale:
                yield _Kind.PING
        elif stale or (rtt > _UNSURE_RTT and not link.unsure_of_rates()):
            yield _Kind.PING
        elif link.unsure_of_rates():
            yield _Kind.DOWN if down > up else _Kind.UP
        else:
            yield _Kind.DOWN if self.last_train is _Kind.UP else _Kind.UP

    def sent(self, kind: _Kind, now_s: float, next_train_s: float) -> None:
        """Take in that a probe was sent."""
        if kind in self.wanted:
            self.wanted.remove(kind)
            if kind is not _Kind.PING and not self._new:
                self._hurries, self._hurried_s = max(0.0, self.hurries(now_s) - 1), now_s
        self._new = self._new and bool(self.wanted)
        if kind is not _Kind.PING:
            self.last_train = kind
        self.probed_s, self.next_train_s, self.refused = now_s, next_train_s, False


class ProbeChooser:
    """Chooses which node to probe next, how, and when."""

    def __init__(self, budget: ProbeBudget, refused: Counter[str]) -> None:
        """No node was probed yet.

        Args:
            budget: what probes may take.
            refused: counts probes that did not fit into the budget, by node. One that waits until it fits counts once.
        """
        self._budget = budget
        self._refused = refused
        self._nodes: dict[str, _NodeProbes] = {}
        self._outstanding: dict[str, float] = {}
        self._last_probe_s = self._checked_s = -math.inf
        self._last_air_s = 0.0

    def next_probe(self, links: Iterable[tuple[str, LinkEstimator]], now_s: float, *, shared_air: bool) -> Probe | None:
        """The probe to send now, if any. It counts as sent.

        Links that are stale come first, then those that have jumped or are uncertain, then those in use whose rates
        were not measured for a while. A probe that does not fit into the budget is left out.

        Args:
            links: of the nodes that may be probed, by name.
            now_s: by the clock of the samples.
            shared_air: all links share one half-duplex channel.
        """
        known = [(name, link, self._node(name)) for name, link in links]
        hurried = any(node.wanted and node.hurries(now_s) >= 1 for _, _, node in known)
        pause_s = _HURRIED_EVERY_S if hurried else PROBE_EVERY_S
        if shared_air:
            # Nodes on the same channel had to wait for the last probe, and must have time for answers.
            pause_s += self._last_air_s / (_HURRIED_SHARE if hurried else _TRAIN_SHARE)
        elif not hurried:
            pause_s += self._last_air_s / _FLEET_SHARE
        if now_s < self._last_probe_s + pause_s:
            return None
        candidates = [
            (urgency, node.probed_s, name, link)
            for name, link, node in known
            if now_s - self._outstanding.get(name, -math.inf) > _LOST_S and (urgency := node.urgency(link, now_s))
        ]
        for urgency, _, name, link in sorted(candidates, key=lambda candidate: candidate[:3]):
            if probe := self._affordable(name, link, now_s, urgency == _REGULAR, shared_air):
                self._outstanding[name] = self._last_probe_s = now_s
                return probe
        return None

    def _affordable(
        self, name: str, link: LinkEstimator, now_s: float, regular: bool, shared_air: bool
    ) -> Probe | None:
        """The probe of a node that fits into the budget, if any. It counts as sent."""
        node = self._nodes[name]
        for kind, probe, air_s in _probes(name, link, node.kinds(link, now_s)):
            part = 1.0 if kind is _Kind.PING else _REGULAR_PART if regular else _TRAIN_PART
            if self._budget.spend(uses(probe, link), now_s, shared_air=shared_air, part=part):
                self._last_air_s = air_s
                # The directions alternate, so each has twice that time.
                pause_s = max(_every_s(link, now_s - node.changed_s), 0.5 * air_s / _TRAIN_SHARE)
                node.sent(kind, now_s, now_s + pause_s)
                return probe
            if not node.refused:
                node.refused = True
                self._refused[name] += 1
            node.again_s = now_s + _AGAIN_S
        return None

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
        node = self._node(sample.node)
        node.wanted = list(_AFTER_JUMP)
        if sample.train:
            node.wanted = [_Kind.UP if sample.down_bytes else _Kind.DOWN]
            node.changed(sample.time_s)
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


def uses(probe: Probe, link: LinkEstimator) -> tuple[Use, Use]:
    """What a probe needs of both directions of its link."""
    down, up = probe.count * probe.down_bytes, probe.count * probe.up_bytes
    messages = probe.count * _OVERHEAD_BYTES
    down, up = messages + down + int(_ACK_SHARE * up), messages + up + int(_ACK_SHARE * down)
    return (
        Use((probe.node, "down"), down, link.measured_s_per_byte(down=True), link.passed_s_per_byte(down=True)),
        Use((probe.node, "up"), up, link.measured_s_per_byte(down=False), link.passed_s_per_byte(down=False)),
    )


def _every_s(link: LinkEstimator, since_change_s: float) -> float:
    """Time between two trains on a link in use."""
    if max(link.down_trains.held_up, link.up_trains.held_up) >= _HELD_UP_TRAINS:
        return _SURE_EVERY_S
    if not link.unsure_of_rates():
        return _SURE_EVERY_S if since_change_s > _CHANGED_S else _UNSURE_EVERY_S
    enough = min(link.down_trains.recent, link.up_trains.recent) >= _ENOUGH_TRAINS
    return _UNSURE_EVERY_S if enough else _TRAIN_EVERY_S


def _probes(name: str, link: LinkEstimator, kinds: Iterable[_Kind]) -> Iterator[tuple[_Kind, Probe, float]]:
    """Probes of these kinds, each with its estimated time on the air in seconds."""
    for kind in kinds:
        if kind is _Kind.PING:
            yield kind, Probe(name, 0, 0), 0.0
            continue
        down = kind is _Kind.DOWN
        trains = link.down_trains if down else link.up_trains
        s_per_byte, measured = _FIRST_S_PER_BYTE, link.measured_s_per_byte(down=down)
        if measured and trains.recent >= _ENOUGH_TRAINS:
            # If it may be slower, assume so: a train that is too short is repeated, one too long delays other messages.
            s_per_byte = measured * (1 + min(link.relative_std()[kind.value], 1.0))
        planned = plan_train(s_per_byte, link.rtt_s, max(trains.noise_s, link.noise_s))
        for train in (planned, SHORTEST) if measured else (SHORTEST,):
            sizes = (train.message_bytes, 0) if down else (0, train.message_bytes)
            probe = Probe(name, *sizes, train.count, train.lead)
            yield kind, probe, train.count * train.message_bytes * s_per_byte
            if max(use.air_ns for use in uses(probe, link)) <= 1e9 * _MOST_AIR_S:
                break
