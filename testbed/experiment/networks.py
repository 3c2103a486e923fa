"""What lies between the base station and the nodes of an experiment, as the runner sees it."""

from collections.abc import Sequence
from typing import Protocol

Truth = Sequence[tuple[str, str, float]]
"""Node, quantity with its unit, value."""


class Network(Protocol):
    """A network that a run goes over."""

    def prefix(self, node: str) -> list[str]:
        """What to put before a command so that it runs on `node`."""

    def set_profile(self, name: str) -> None:
        """Give the links of that profile.

        Raises:
            WdmoeError: it could not be set.
        """

    def truth(self) -> Truth:
        """The links as they are configured now; empty where nobody knows."""


class Loopback:
    """This machine's loopback, or a network that is simply there."""

    def prefix(self, node: str) -> list[str]:
        """See `Network.prefix`."""
        return []

    def set_profile(self, name: str) -> None:
        """There is only one."""

    def truth(self) -> Truth:
        """Nobody configured it."""
        return ()
