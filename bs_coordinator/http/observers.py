"""Observers of the answers: what metrics and live views are made from."""

from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.errors import BusyError
from bs_coordinator.http.requests import Request
from common.errors import WdmoeError


class AnswerObserver:
    """Sees every request from its place in the queue to its end. Subclasses define the methods they need.

    No method may block or raise: the next token waits for it. An observer that raises is logged and no longer called.
    `accepted` and `refused` are called on the thread of the caller, `accepted` while the server is locked, so that it
    comes before anything else of the request: it must not call the server. All others are called on the answers thread,
    before the caller gets the same update.
    """

    def accepted(self, request: Request) -> None:
        """A request has got its place; its prompt is not tokenised yet."""

    def refused(self, error: BusyError) -> None:
        """A request has got no place."""

    def progressed(self, request: Request, progress: Progress) -> None:
        """A step has run for a request.

        Args:
            progress: the answer so far, the step's new tokens with their records (none while the prompt is computed),
                and the error that ends the answer, if any.
        """

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        """A request is over, once for each that was accepted.

        Args:
            error: why it failed; None if the answer is finished or the caller no longer wants it.
        """

    def polled(self) -> None:
        """The answers thread has run a step, or has waited for messages while there was nothing to do (at most 20 ms).

        The place to read the dispatcher, its nodes and links, which belong to this thread.
        """
