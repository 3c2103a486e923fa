"""The network between the base station and the nodes of an experiment, as the runner sees it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bs_coordinator.broker.processes import LOOPBACK
from testbed.errors import PlanError
from testbed.plan.schema import DEFAULT_PROFILE, Plan

if TYPE_CHECKING:
    from testbed.network.emulated import EmulatedNetwork

Truth = Sequence[tuple[str, str, float]]
"""Configured link values: node, quantity (its name ends in the unit), value."""


class Network(Protocol):
    """A network that a run uses."""

    @property
    def address(self) -> str:
        """Address on which a private broker is reachable from the nodes."""

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the link profiles; the first one is active when the network comes up."""

    def prefix(self, node: str) -> list[str]:
        """What to put before a command to run it on `node`."""

    def set_profile(self, name: str) -> None:
        """Switch to a link profile and start it from its beginning.

        Raises:
            WdmoeError: the profile can't be set.
        """

    def shared_air(self, profile: str) -> bool:
        """Whether all links share one channel in a profile."""

    def truth(self) -> Truth:
        """The links as configured now; empty if the configuration is unknown."""


class Loopback:
    """This machine's loopback, or a network that the testbed doesn't control."""

    address = LOOPBACK
    profiles: tuple[str, ...] = ()

    def prefix(self, node: str) -> list[str]:
        """Nothing: nodes run on this machine."""
        return []

    def set_profile(self, name: str) -> None:
        """Does nothing: there is only one profile."""

    def shared_air(self, profile: str) -> bool:
        """Unknown, so False."""
        return False

    def truth(self) -> Truth:
        """Nothing is configured, so nothing is known."""
        return ()


class Emulated:
    """An emulated network that is up (`Network`)."""

    def __init__(self, network: "EmulatedNetwork") -> None:
        self._network = network

    @property
    def address(self) -> str:
        """Address of the base station in the emulated network."""
        return self._network.bs_address

    @property
    def profiles(self) -> tuple[str, ...]:
        """Profiles of the network's description."""
        return tuple(self._network.spec.profiles)

    def prefix(self, node: str) -> list[str]:
        """Command that enters the node's network namespace."""
        return self._network.prefix(node)

    def set_profile(self, name: str) -> None:
        """Switch all links to a profile and start its timeline."""
        self._network.set_profile(self._known(name))

    def shared_air(self, profile: str) -> bool:
        """Whether the profile puts all links on one channel."""
        return self._network.spec.profiles[self._known(profile)].shared_air

    def truth(self) -> Truth:
        """The links as configured now, with the round trip that follows from each delay."""
        rows = self._network.truth()
        return [*rows, *((node, "rtt_ms", 2 * value) for node, quantity, value in rows if quantity == "delay_ms")]

    def _known(self, profile: str) -> str:
        spec = self._network.spec
        return spec.first_profile if profile == DEFAULT_PROFILE and profile not in spec.profiles else profile


def check_profiles(plan: Plan) -> None:
    """Check that an emulated network has the profiles of a plan; other networks always pass.

    Raises:
        PlanError: a profile is missing.
        NetworkSpecError: the network's description is wrong.
    """
    if plan.emulated is None:
        return
    from testbed.network.spec import read_spec

    spec = read_spec(Path(plan.emulated))
    if unknown := sorted(set(plan.profiles) - set(spec.profiles)):
        raise PlanError(f"profiles: {plan.emulated} has no profile '{unknown[0]}', only {', '.join(spec.profiles)}")


def check_network(plan: Plan, experts: int) -> None:
    """Check that an emulated network has the nodes and profiles of a plan; other networks always pass.

    Raises:
        PlanError: a node or profile is missing.
        NetworkSpecError: the network's description is wrong.
    """
    if plan.emulated is None:
        return
    check_profiles(plan)
    from testbed.network.spec import read_spec

    spec = read_spec(Path(plan.emulated))
    if unknown := sorted(set(plan.node_experts(experts)) - set(spec.node_ids)):
        raise PlanError(f"nodes: {plan.emulated} has no node '{unknown[0]}', only {', '.join(spec.node_ids)}")


@contextmanager
def open_network(plan: Plan) -> Iterator[Network]:
    """Bring up the network of a plan for the duration of the context.

    In an emulated network, this thread runs in the base station's network namespace meanwhile.

    Raises:
        NetworkSpecError, PrivilegeError, NetworkError: an emulated network doesn't come up.
    """
    if plan.emulated is None:
        yield Loopback()
        return
    # Imported here: needs Linux and pyroute2, which other plans don't.
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION
    from testbed.network.emulated import emulated

    with (
        emulated(Path(plan.emulated)) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
    ):
        yield Emulated(network)
