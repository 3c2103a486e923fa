"""What lies between the base station and the nodes of an experiment, as the runner sees it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bs_coordinator.broker.processes import LOOPBACK
from testbed.errors import PlanError
from testbed.experiment.plan import DEFAULT_PROFILE, Plan

if TYPE_CHECKING:
    from testbed.network.emulated import EmulatedNetwork

Truth = Sequence[tuple[str, str, float]]
"""Node, quantity with its unit, value."""


class Network(Protocol):
    """A network that a run goes over.

    Attributes:
        address: where a private broker listens so that the nodes reach it.
        profiles: of its links, by name; the first one is set when it comes up.
    """

    @property
    def address(self) -> str:
        """See the class."""

    @property
    def profiles(self) -> tuple[str, ...]:
        """See the class."""

    def prefix(self, node: str) -> list[str]:
        """What to put before a command so that it runs on `node`."""

    def set_profile(self, name: str) -> None:
        """Give the links of that profile, from its beginning.

        Raises:
            WdmoeError: it could not be set.
        """

    def shared_air(self, profile: str) -> bool:
        """Whether all links share one channel in that profile."""

    def truth(self) -> Truth:
        """The links as they are configured now; empty where nobody knows."""


class Loopback:
    """This machine's loopback, or a network that is simply there."""

    address = LOOPBACK
    profiles: tuple[str, ...] = ()

    def prefix(self, node: str) -> list[str]:
        """See `Network.prefix`."""
        return []

    def set_profile(self, name: str) -> None:
        """There is only one."""

    def shared_air(self, profile: str) -> bool:
        """Nobody said so."""
        return False

    def truth(self) -> Truth:
        """Nobody configured it."""
        return ()


class Emulated:
    """An emulated network that is up."""

    def __init__(self, network: "EmulatedNetwork") -> None:
        self._network = network

    @property
    def address(self) -> str:
        """See `Network.address`."""
        return self._network.bs_address

    @property
    def profiles(self) -> tuple[str, ...]:
        """See `Network.profiles`."""
        return tuple(self._network.spec.profiles)

    def prefix(self, node: str) -> list[str]:
        """See `Network.prefix`."""
        return self._network.prefix(node)

    def set_profile(self, name: str) -> None:
        """See `Network.set_profile`."""
        self._network.set_profile(self._known(name))

    def shared_air(self, profile: str) -> bool:
        """See `Network.shared_air`."""
        return self._network.spec.profiles[self._known(profile)].shared_air

    def truth(self) -> Truth:
        """See `Network.truth`; with the round trip that follows from the delay, for comparison with estimates."""
        rows = self._network.truth()
        return [*rows, *((node, "rtt_ms", 2 * value) for node, quantity, value in rows if quantity == "delay_ms")]

    def _known(self, profile: str) -> str:
        spec = self._network.spec
        return spec.first_profile if profile == DEFAULT_PROFILE and profile not in spec.profiles else profile


def check_network(plan: Plan, experts: int) -> None:
    """Refuse a plan whose nodes or profiles its emulated network does not have.

    Raises:
        PlanError: with what is missing.
        NetworkSpecError: the network's description is wrong.
    """
    if plan.emulated is None:
        return
    from testbed.network.spec import read_spec

    spec = read_spec(Path(plan.emulated))
    if unknown := sorted(set(plan.profiles) - set(spec.profiles)):
        raise PlanError(f"profiles: {plan.emulated} has no profile '{unknown[0]}', only {', '.join(spec.profiles)}")
    if unknown := sorted(set(plan.node_experts(experts)) - set(spec.node_ids)):
        raise PlanError(f"nodes: {plan.emulated} has no node '{unknown[0]}', only {', '.join(spec.node_ids)}")


@contextmanager
def open_network(plan: Plan) -> Iterator[Network]:
    """The network of a plan, for as long as the context lasts; this thread is on its base station meanwhile.

    Raises:
        NetworkSpecError, PrivilegeError, NetworkError: an emulated network does not come up.
    """
    if plan.emulated is None:
        yield Loopback()
        return
    # Needs Linux and pyroute2, which other plans do not.
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION
    from testbed.network.emulated import emulated

    with (
        emulated(Path(plan.emulated)) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
    ):
        yield Emulated(network)
