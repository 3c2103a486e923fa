"""After the connection to the broker is lost: connect again, and find out which nodes are online."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from bs_coordinator.dispatch.receiver import MessageRouter
from bs_coordinator.dispatch.sender import RequestSender
from bs_coordinator.nodes.registry import NodeRegistry
from common.clock import Clock
from wire.errors import BrokerAuthError, BrokerError
from wire.transport import Transport

log = logging.getLogger(__name__)

_BROKER_TIMEOUT_S = 60.0
_NODES_TIMEOUT_S = 12.0
"""Once the broker is back: nodes reconnect within seconds of each other and repeat their status every few seconds."""


class Reconnector:
    """Replaces a lost connection.

    Attributes:
        active: whether a lost connection is being replaced.
    """

    def __init__(
        self,
        connect: Callable[[], Transport] | None,
        *,
        sender: RequestSender,
        router: MessageRouter,
        registry: NodeRegistry,
        pump: Callable[[float], None],
        clock: Clock,
    ) -> None:
        """Nothing is lost yet.

        Args:
            connect: opens a new connection; None: a lost connection is an error.
            pump: receives messages for that many seconds.
        """
        self._connect = connect
        self._sender = sender
        self._router = router
        self._registry = registry
        self._pump = pump
        self._clock = clock
        self._given_up = threading.Event()
        self.active = False

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Entered from any thread: a `recover` that is under way ends, and meanwhile others fail at once."""
        self._given_up.set()
        try:
            yield
        finally:
            self._given_up.clear()

    def recover(self, lost: BrokerError) -> None:
        """Connect again and wait for the nodes; statuses from before the loss no longer count.

        Raises:
            BrokerError: `lost` if there is no way to reconnect, else the last error after 60 s of attempts, or after
                the one under way when `given_up` is entered.
        """
        if self._connect is None or self._given_up.is_set():
            raise lost
        log.warning("%s; trying again for %.0f s", lost, _BROKER_TIMEOUT_S)
        self._sender.transport.close()
        give_up_s = self._clock.monotonic_s() + _BROKER_TIMEOUT_S

        def too_late(state: RetryCallState) -> bool:
            return self._given_up.is_set() or self._clock.monotonic_s() >= give_up_s

        def pause(seconds: float) -> None:
            self._clock.wait(self._given_up, seconds)

        attempts = Retrying(
            stop=too_late,
            sleep=pause,
            wait=wait_random_exponential(multiplier=0.2, max=3.0),
            retry=retry_if_exception(
                lambda e: isinstance(e, BrokerError) and not (isinstance(e, BrokerAuthError) and e.final)
            ),
            reraise=True,
        )
        self.active = True
        try:
            attempts(self._rejoin, self._connect)
        finally:
            self.active = False
        log.warning("the broker is back, %d nodes are online", len(self._registry.nodes))

    def _rejoin(self, connect: Callable[[], Transport]) -> None:
        self._sender.transport = connect()
        self._registry.forget()
        self._router.fresh_only = True
        try:
            self._router.subscribe(self._sender.transport)
            deadline_s = self._clock.monotonic_s() + _NODES_TIMEOUT_S
            while (
                self._registry.missing() and self._clock.monotonic_s() < deadline_s and not self._given_up.is_set()
            ):  # fmt: skip
                self._pump(0.1)
        finally:
            self._router.fresh_only = False
