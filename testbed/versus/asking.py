"""Asks an arm for an answer, and records what came of it: times, traffic, and how it ended."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from testbed.network.emulated import EmulatedNetwork
from testbed.network.uniform import Links
from testbed.versus.arms import OURS
from testbed.versus.client import Account, AnswerEndedError, Piece, chat_request, local_experts, stream_answer
from testbed.versus.programs import RunningArm
from testbed.versus.results import Answer, Failure, Results, Traffic, write_results
from testbed.versus.settings import Settings

_WARM_UP_TOKENS = 4
_REST_S = 2.0
_END_S = 5.0
"""How long a head that broke an answer off may take to end."""


class Kill(NamedTuple):
    """A device to kill during an answer, after so many tokens."""

    device: str
    after: int


class Asker:
    """Asks arms on one network."""

    def __init__(self, settings: Settings, results: Results, network: EmulatedNetwork) -> None:
        """Nothing is asked yet; what arms answer is added to `results`."""
        self._settings = settings
        self._results = results
        self._network = network

    def warm_up(self, running: RunningArm) -> None:
        """Ask for a short answer that is not measured, and a base station how many experts it keeps.

        Raises:
            AnswerEndedError: an answer is missing.
        """
        settings, name = self._settings, running.arm.name
        for _ in self._stream(running, 0, min(_WARM_UP_TOKENS, settings.tokens), Account()):
            pass
        if name in OURS:
            self._results.local_experts[name] = local_experts(
                running.arm.port, settings.shape.slices, deadline_s=settings.deadline_s
            )

    def ask(self, running: RunningArm, links: Links, prompt: int, *, kill: Kill | None = None) -> bool:
        """Measure one answer; returns whether the arm can go on.

        Args:
            links: as they are now.
            prompt: its index.
            kill: what to kill meanwhile.
        """
        pieces: list[Piece] = []
        account = Account()
        first = Traffic()
        outcome, why = "finished", ""
        try:
            for piece in self._stream(running, prompt, self._settings.tokens, account):
                pieces.append(piece)
                if len(pieces) == 1:
                    first = self._traffic()
                if kill and len(pieces) == kill.after:
                    running.kill(kill.device)
        except AnswerEndedError as error:
            outcome, why = error.outcome, why_ended(error, running)
        last = self._traffic()
        if account.degraded_tokens:
            outcome, why = (
                ("degraded" if outcome == "finished" else outcome),
                why or f"{account.degraded_tokens} of {account.tokens or len(pieces)} tokens",
            )
        answer = Answer(
            arm=running.arm.name, profile=links.profile, prompt=prompt, outcome=outcome, why=why,
            pieces=[piece.text for piece in pieces], at_ms=[1e3 * piece.at_s for piece in pieces],
            said_tokens=account.tokens, prompt_tokens=account.prompt_tokens,
            traffic=last.since(first) if pieces else Traffic(), killed=kill.device if kill else "",
        )  # fmt: skip
        self._results.answers.append(answer)
        self._settings.say(
            f"{links.profile}, prompt {prompt + 1}, {answer.arm}: {answer.tokens} tokens, "
            + (f"{answer.tpot_ms:.1f} ms each, " if answer.complete else "")
            + (f"{answer.killed} killed, " if kill else "")
            + " ".join(filter(None, (outcome, why)))
        )
        fine = outcome in ("finished", "degraded")
        if not fine and not kill:
            self.give_up(answer.arm, links, f"{outcome}: {why}")
        write_results(self._results, self._settings.folder)
        return fine

    def give_up(self, name: str, links: Links, why: str) -> None:
        """Record that an arm is not asked any more."""
        self._results.failures.append(Failure(name, links.profile, why))
        self._settings.say(f"{name} is given up: {why}")

    def bytes_per_s_at_rest(self) -> float:
        """What all arms send while none is asked, over all links."""
        before = self._traffic()
        time.sleep(_REST_S)
        passed = self._traffic().since(before)
        return (passed.down_bytes + passed.up_bytes) / _REST_S

    def _stream(self, running: RunningArm, prompt: int, tokens: int, account: Account) -> Iterator[Piece]:
        settings = self._settings
        request = chat_request(settings.prompts[prompt], tokens, ignore_eos=settings.ignore_eos)
        return stream_answer(running.arm.port, request, account, deadline_s=settings.deadline_s)

    def _traffic(self) -> Traffic:
        """What the relay has carried over all links so far."""
        nodes = self._network.status().nodes
        return Traffic(
            sum(node.down.sent_bytes for node in nodes), sum(node.up.sent_bytes for node in nodes),
            sum(node.down.sent_frames for node in nodes), sum(node.up.sent_frames for node in nodes),
        )  # fmt: skip


def why_ended(error: AnswerEndedError, running: RunningArm) -> str:
    """Why an answer ended before its last token, with the head's last words."""
    return f"{error}; {running.last_words(wait_s=_END_S if error.outcome == 'aborted' else 0.0)}"
