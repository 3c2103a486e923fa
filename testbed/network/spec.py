"""Description of an emulated network: nodes, link profiles and changes over time. Pure, except for reading the file."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from common.names import first_twice
from testbed.errors import NetworkSpecError
from testbed.yaml_files import decode_yaml
from wire.topics import check_name

MAX_NODES = 200

Mbps = Annotated[float, Meta(gt=0, le=1000)]
Ms = Annotated[float, Meta(ge=0, le=10_000)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Duration = Annotated[float, Meta(gt=0, le=1e7)]
NetworkName = Annotated[str, Meta(pattern="^[a-z0-9]{1,20}$")]
ProfileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class LinkSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Configured properties of one node's link.

    Attributes:
        down_mbps: rate from base station to node, as TCP goodput of full segments, which is what iperf3 reports.
        up_mbps: rate from node to base station.
        delay_ms: one-way delay; a round trip takes twice that.
        jitter_ms: each frame's delay is uniform in `delay_ms` ± `jitter_ms`; frames keep their order.
        loss_percent: probability of losing a frame, in each direction.
    """

    down_mbps: Mbps = 100.0
    up_mbps: Mbps = 100.0
    delay_ms: Ms = 0.5
    jitter_ms: Ms = 0.0
    loss_percent: Percent = 0.0


class LinkChange(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """New values for some of a link's properties; those that are None do not change."""

    down_mbps: Mbps | None = None
    up_mbps: Mbps | None = None
    delay_ms: Ms | None = None
    jitter_ms: Ms | None = None
    loss_percent: Percent | None = None

    def values(self) -> dict[str, float]:
        """The properties that change, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class Event(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A change during a profile, with exactly one of `set` and `ramp_to`.

    Attributes:
        at_s: seconds after the start of the profile.
        for_s: duration of `set` or of the ramp.
        nodes: nodes concerned; None for all.
        set: values from `at_s` on, for `for_s`, or without `for_s` to the end.
        ramp_to: values reached linearly within `for_s`, and kept afterwards.
    """

    at_s: Seconds
    for_s: Duration | None = None
    nodes: tuple[str, ...] | None = None
    set: LinkChange | None = None
    ramp_to: LinkChange | None = None

    def apply(self, link: LinkSpec, at_s: float) -> LinkSpec:
        """The link at `at_s`, where `link` already includes the earlier events."""
        passed_s = at_s - self.at_s
        if passed_s < 0:
            return link
        if self.ramp_to is not None and self.for_s is not None:
            share = min(1.0, passed_s / self.for_s)
            target = self.ramp_to.values()
            return msgspec.structs.replace(
                link, **{name: (1 - share) * getattr(link, name) + share * value for name, value in target.items()}
            )
        if self.set is not None and (self.for_s is None or passed_s < self.for_s):
            return msgspec.structs.replace(link, **self.set.values())
        return link


class Profile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The links of all nodes over time.

    Attributes:
        shared_air: one channel for all nodes and both directions, on which air times add up.
        default: link of every node.
        nodes: differences from the default, by node.
        events: changes over time; of overlapping events, the later one changes the result of the earlier one.
        repeat_s: period after which the events start over.
    """

    shared_air: bool = False
    default: LinkSpec = LinkSpec()
    nodes: dict[str, LinkChange] = {}
    events: tuple[Event, ...] = ()
    repeat_s: Duration | None = None

    def link(self, node: str, at_s: float) -> LinkSpec:
        """A node's link at a moment.

        Args:
            at_s: seconds after the start of the profile.
        """
        if self.repeat_s is not None:
            at_s %= self.repeat_s
        change = self.nodes.get(node)
        link = msgspec.structs.replace(self.default, **change.values()) if change else self.default
        for event in sorted(self.events, key=lambda event: event.at_s):
            if event.nodes is None or node in event.nodes:
                link = event.apply(link, at_s)
        return link

    def ramping(self, node: str, at_s: float) -> bool:
        """Whether a ramp is changing a node's link at a moment."""
        if self.repeat_s is not None:
            at_s %= self.repeat_s
        return any(
            event.ramp_to is not None
            and (event.nodes is None or node in event.nodes)
            and 0 <= at_s - event.at_s < for_s
            for event in self.events
            if (for_s := event.for_s) is not None
        )

    def settled(self, at_s: float) -> bool:
        """Whether no link changes after `at_s`."""
        if not self.events:
            return True
        return self.repeat_s is None and at_s > max(event.at_s + (event.for_s or 0.0) for event in self.events)


class NetworkSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An emulated network.

    Attributes:
        name: part of the namespaces' names.
        nodes: node ids, or a number n for `node0` to `node<n - 1>`.
        subnet: the base station gets its first address, the nodes the following ones.
        queue_ms: frames that would wait longer than this at their link's rate are dropped, as by a Wi-Fi driver.
        seed: seeds loss and jitter.
        profiles: profiles by name; the first is active when the network comes up.
    """

    name: NetworkName
    nodes: Annotated[int, Meta(ge=1, le=MAX_NODES)] | Annotated[tuple[str, ...], Meta(min_length=1)] = 8
    subnet: str = "10.77.0.0/24"
    queue_ms: Annotated[float, Meta(ge=5, le=5000)] = 100.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    profiles: Annotated[dict[ProfileName, Profile], Meta(min_length=1)]

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Ids of all nodes, in the order of their addresses."""
        return tuple(f"node{k}" for k in range(self.nodes)) if isinstance(self.nodes, int) else self.nodes

    @property
    def first_profile(self) -> str:
        """Name of the profile that is active when the network comes up."""
        return next(iter(self.profiles))

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The subnet, parsed."""
        return ipaddress.IPv4Network(self.subnet)

    def address(self, index: int) -> str:
        """IPv4 address of a host: index 0 is the base station, k + 1 is node k."""
        return str(self.network.network_address + 1 + index)

    def links(self, profile: str, at_s: float) -> dict[str, LinkSpec]:
        """The links of all nodes at a moment of a profile, by node."""
        return {node: self.profiles[profile].link(node, at_s) for node in self.node_ids}


def read_spec(path: Path) -> NetworkSpec:
    """Read and check a description.

    Raises:
        NetworkSpecError: the file can't be read, or a field is wrong; the message names it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise NetworkSpecError(f"can't read the network's description {path}: {error.strerror}") from None
    try:
        spec = decode_yaml(raw, NetworkSpec)
        check_spec(spec)
    except ValueError as error:
        raise NetworkSpecError(f"{path}: {error}") from None
    return spec


def check_spec(spec: NetworkSpec) -> None:
    """Check what types alone can't express.

    Raises:
        ValueError: a field is wrong; the message names it.
    """
    nodes = spec.node_ids
    for node in nodes:
        check_name("node", node)
    if "bs" in nodes:
        raise ValueError("nodes: 'bs' is the base station's name")
    for field, names in (("nodes", nodes), ("profiles", spec.profiles)):
        if twice := first_twice(names):
            raise ValueError(f"{field}: '{twice}' is listed twice (upper and lower case count as equal)")
    try:
        network = spec.network
    except ValueError as error:
        raise ValueError(f"subnet: {error}") from None
    base = network.network_address
    if network.prefixlen < 8 or base.is_loopback or base.is_multicast or base.is_reserved or base.is_unspecified:
        raise ValueError(f"subnet: {spec.subnet} has addresses that no link can have: use for example 10.77.0.0/24")
    if network.num_addresses < len(nodes) + 3 or len(nodes) > MAX_NODES:
        raise ValueError(f"subnet: {spec.subnet} has no room for a base station and {len(nodes)} nodes")
    for name, profile in spec.profiles.items():
        _check_profile(f"profiles.{name}", profile, nodes)


def _check_profile(where: str, profile: Profile, nodes: tuple[str, ...]) -> None:
    for node in profile.nodes:
        _check_node(f"{where}.nodes", node, nodes)
    for i, event in enumerate(profile.events):
        at = f"{where}.events[{i}]"
        for node in event.nodes or ():
            _check_node(f"{at}.nodes", node, nodes)
        if (event.set is None) == (event.ramp_to is None):
            raise ValueError(f"{at}: give either set or ramp_to")
        if event.ramp_to is not None and event.for_s is None:
            raise ValueError(f"{at}: a ramp needs for_s, its duration in seconds")
        if profile.repeat_s is not None and event.at_s >= profile.repeat_s:
            raise ValueError(f"{at}: at_s {event.at_s:g} is never reached with repeat_s {profile.repeat_s:g}")
    times = {0.0} | {t for event in profile.events for t in (event.at_s, event.at_s + (event.for_s or 0.0))}
    for node in nodes:
        _check_jitter(where, node, {at_s: profile.link(node, at_s) for at_s in times})


def _check_node(where: str, node: str, nodes: tuple[str, ...]) -> None:
    if node not in nodes:
        raise ValueError(f"{where}: '{node}' is not one of the nodes {', '.join(nodes)}")


def _check_jitter(where: str, node: str, links: Mapping[float, LinkSpec]) -> None:
    for at_s, link in sorted(links.items()):
        if link.jitter_ms > link.delay_ms:
            raise ValueError(
                f"{where}: jitter_ms {link.jitter_ms:g} of {node} at {at_s:g} s is more than its delay_ms "
                f"{link.delay_ms:g}: a frame would arrive before it is sent"
            )
