"""Who is told when a step waits for nodes: others may use the processor meanwhile."""

from typing import Protocol


class WaitListener(Protocol):
    """Told about the waits of one step. Its methods return at once."""

    def wait_begins(self) -> None:
        """From now on, the step waits for a layer's answers."""

    def wait_ends(self) -> None:
        """The answers have come, or the layer has failed."""

    def step_ends(self) -> None:
        """The step will not wait any more, because it is over or has failed."""


class NoListener:
    """Is told, and does nothing; implements `WaitListener`."""

    def wait_begins(self) -> None:
        pass

    def wait_ends(self) -> None:
        pass

    def step_ends(self) -> None:
        pass
