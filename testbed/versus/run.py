"""A run: all arms at once on one emulated network, which take turns answering the same prompts on the same links.

Starting arms takes longer than asking them, so each is started once per kind of channel, other programs' all at once.
Arms at rest send no more than heartbeats. The results are rewritten after each answer.
"""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bs_coordinator.broker.processes import open_broker
from common.cpu_idle import cpu_idle_disabled
from common.errors import WdmoeError
from testbed.network.bypass import bypass
from testbed.network.emulated import EmulatedNetwork, emulated
from testbed.network.uniform import Links, write_network
from testbed.node_shares import Cores
from testbed.versus.arms import OURS, Arm, Peers, Place, make_arm
from testbed.versus.client import Account, AnswerEndedError, Piece, chat_request, local_experts, stream_answer
from testbed.versus.floors import Shape
from testbed.versus.plot import draw_tpot
from testbed.versus.programs import RunningArm
from testbed.versus.results import Answer, Failure, Results, Traffic, tables, write_results
from wire.manifest import Dims

_WARM_UP_TOKENS = 4
_REST_S = 2.0
_TOKENS_BEFORE_KILL = 8
_END_S = 5.0
"""How long a head that broke an answer off may take to end."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run.

    Attributes:
        shape, dims: of the bundle.
        arms: names that `check_arm` accepts.
        links: the arms are started anew when `shared_air` changes.
        devices: ids of the devices besides the base station.
        prompts: texts to answer.
        tokens: longest answer.
        ignore_eos: end tokens do not end answers, so each has `tokens` tokens.
        threads: of each program on a device.
        head_threads: of each program on the base station.
        trunk: options of `wdmoe-bs serve` for where the trunk is computed.
        cores: a core for all programs of a device, and those of the base station; None for no such limits.
        deadline_s: silence after which an answer counts as hung.
        start_s: longest wait for an arm to be ready.
        kill: whether to kill a device at the end.
        folder: for results and logs.
    """

    bundle: Path
    draft_model: Path | None
    shape: Shape
    dims: Dims
    arms: Sequence[str]
    links: Sequence[Links]
    devices: Sequence[str]
    prompts: Sequence[str]
    tokens: int
    ignore_eos: bool
    threads: int
    head_threads: int
    trunk: Mapping[str, str]
    cores: Cores | None
    deadline_s: float
    start_s: float
    kill: bool
    folder: Path
    console: Console


def run_versus(settings: Settings, peers: Peers) -> None:
    """Measure, write results to the folder, and print the tables.

    Raises:
        WdmoeError: no arm made an answer that can be measured; the message says why the first failed.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    with cpu_idle_disabled() as stays_awake, _on_cores(settings.cores):
        results = Results(_parameters(settings, stays_awake=stays_awake), list(settings.arms))
        kill = settings.kill
        for shared_air, links in itertools.groupby(settings.links, key=lambda one: one.shared_air):
            _Channel(settings, peers, results, list(links), shared_air).measure(kill=kill)
            kill = False
    write_results(results, settings.folder)
    draw_tpot(results, settings.links, settings.folder / "tpot.svg")
    settings.console.print(tables(results), highlight=False, markup=False, soft_wrap=True)
    if not any(answer.complete for answer in results.answers):
        first = next(iter(results.failures), None)
        why = f"{first.arm}: {first.why}" if first else "each ended before its second token"
        raise WdmoeError(f"no arm made an answer that can be measured: {why}")


@contextmanager
def _on_cores(cores: Cores | None) -> Iterator[None]:
    """This process, the relay and the broker are on the base station's cores; so is what they start, if not moved."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores.station)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _parameters(settings: Settings, *, stays_awake: bool) -> dict[str, object]:
    return {
        "bundle": settings.bundle.name, "shape": settings.shape._asdict(), "experts": settings.dims.experts,
        "links": [{"profile": one.profile, **one._asdict()} for one in settings.links],
        "devices": len(settings.devices), "prompts": list(settings.prompts), "tokens": settings.tokens,
        "ignore_eos": settings.ignore_eos, "threads": settings.threads, "head_threads": settings.head_threads,
        "trunk": dict(settings.trunk),
        "cores": settings.cores and {"station": list(settings.cores.station), "devices": list(settings.cores.nodes)},
        "deadline_s": settings.deadline_s, "start_s": settings.start_s, "stays_awake": stays_awake,
    }  # fmt: skip


def _why(error: AnswerEndedError, running: RunningArm) -> str:
    return f"{error}; {running.last_words(wait_s=_END_S if error.outcome == 'aborted' else 0.0)}"


class _Channel:
    """All that is measured on one kind of channel."""

    def __init__(
        self, settings: Settings, peers: Peers, results: Results, links: Sequence[Links], shared_air: bool
    ) -> None:
        self._settings = settings
        self._peers = peers
        self._results = results
        self._links = links
        self._shared_air = shared_air

    def measure(self, *, kill: bool) -> None:
        """Start all arms, ask them in turns, measure their memory, and kill a device of each."""
        with self._site() as (network, place), ExitStack() as stack:
            self._network = network
            running = self._start(place, stack)
            network.set_profile(self._links[0].profile)
            self._results.rest_bytes_per_s[self._links[0].profile] = self._at_rest()
            for prompt in range(len(self._settings.prompts)):
                for turn, links in enumerate(self._links, prompt):
                    network.set_profile(links.profile)
                    names = list(running)
                    # Another arm begins each time.
                    for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
                        if not self._ask(running[name], links, prompt):
                            # A head that hangs may still compute and send, beside the arms that go on.
                            running.pop(name).stop()
            for name, arm in running.items():
                self._results.memory.setdefault(name, arm.memory())
            write_results(self._results, self._settings.folder)
            if kill:
                network.set_profile(self._links[0].profile)
                for name, arm in running.items():
                    # In the longest answer that this arm gave, well before its end.
                    longest = max(
                        self._results.of(self._links[0].profile, name), key=lambda one: len(one.pieces), default=None
                    )
                    if arm.arm.workers and longest is not None:
                        after = min(_TOKENS_BEFORE_KILL, len(longest.pieces) // 2)
                        self._ask(arm, self._links[0], longest.prompt, kill=arm.arm.workers[0].device, after=after)

    @contextmanager
    def _site(self) -> Iterator[tuple[EmulatedNetwork, Place]]:
        """The network and a broker; this thread is on the base station meanwhile."""
        # Imported here because it needs Linux and pyroute2.
        from testbed.network import namespaces
        from testbed.network.daemon import BASE_STATION

        settings = self._settings
        spec = settings.folder / "network.yaml"
        write_network(spec, f"bench{os.getpid()}", settings.devices, self._links)
        with (
            emulated(spec) as network,
            namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
            open_broker("mosquitto", host=network.bs_address, priority="normal") as broker,
        ):
            # Workers of distributed-llama send to each other.
            namespaces.forward_between_nodes()
            yield network, Place(
                bundle=settings.bundle, draft_model=settings.draft_model, shape=settings.shape,
                dims=settings.dims, addresses={node: network.node_address(node) for node in settings.devices},
                broker=broker, shared_air=self._shared_air, threads=settings.threads,
                head_threads=settings.head_threads, start_s=settings.start_s,
                trunk=tuple(word for pair in settings.trunk.items() for word in pair),
            )  # fmt: skip

    def _start(self, place: Place, stack: ExitStack) -> dict[str, RunningArm]:
        """Start all arms; those that fail are recorded."""
        arms = [make_arm(name, number, place, self._peers) for number, name in enumerate(self._settings.arms)]
        for arm, links in itertools.product(arms, self._links):
            floor = None if arm.floor is None else arm.floor(links)
            self._results.floors_ms.setdefault(links.profile, {})[arm.name] = floor
        # A preset chooses by the links that it finds.
        self._network.set_profile(self._links[0].profile)
        ours, others = ([arm for arm in arms if (arm.name in OURS) == of_ours] for of_ours in (True, False))
        started = {arm.name: self._start_one(self._made(arm, stack)) for arm in ours}
        if others:
            # Processes end with the thread that started them, so the threads stay until all arms have ended. They
            # inherit this thread's network and cores.
            pool = stack.enter_context(ThreadPoolExecutor(len(others)))
            made = [self._made(arm, stack) for arm in others]
            # They send the whole model to their workers, which the links would make the longest part of a run.
            with bypass(self._network.spec):
                started |= zip((arm.name for arm in others), pool.map(self._start_one, made), strict=True)
        running = {}
        for name in self._settings.arms:
            one = started[name]
            if isinstance(one, RunningArm):
                running[name] = one
            else:
                self._give_up(name, self._links[0], one)
        return running

    def _made(self, arm: Arm, stack: ExitStack) -> RunningArm:
        """An arm that is not started yet, and ends with `stack`."""
        folder = self._settings.folder / "logs" / ("shared" if self._shared_air else "dedicated") / arm.name
        made = RunningArm(arm, self._prefix, folder, self._settings.threads)
        stack.callback(made.stop)
        return made

    def _start_one(self, one: RunningArm) -> RunningArm | str:
        """Start an arm, and ask for a first answer; returns why there is none otherwise."""
        name = one.arm.name
        self._say(f"starting {name}")
        began_s = time.monotonic()
        try:
            one.start(self._settings.start_s)
            ready_s = time.monotonic() - began_s
            list(self._stream(one, 0, min(_WARM_UP_TOKENS, self._settings.tokens), Account()))
            if name in OURS:
                self._results.local_experts[name] = local_experts(
                    one.arm.port, self._settings.shape.slices, deadline_s=self._settings.deadline_s
                )
        except AnswerEndedError as error:
            why = f"{error.outcome}: {_why(error, one)}"
            one.stop()
            return why
        except WdmoeError as error:
            one.stop()
            return str(error)
        self._say(f"{name} was ready after {ready_s:.1f} s and warm after {time.monotonic() - began_s:.1f} s")
        return one

    def _prefix(self, device: str) -> Sequence[str]:
        """Words before a command; this thread is on the base station already."""
        settings = self._settings
        if device not in settings.devices:
            return ()
        core = settings.cores and settings.cores.nodes[settings.devices.index(device)]
        return [*self._network.prefix(device), *(() if core is None else ("taskset", "-c", str(core)))]

    def _ask(self, running: RunningArm, links: Links, prompt: int, *, kill: str = "", after: int = 0) -> bool:
        """Measure one answer; returns whether the arm can go on.

        Args:
            kill: device to kill during the answer; empty for none.
            after: number of tokens before that.
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
                if kill and len(pieces) == after:
                    running.kill(kill)
        except AnswerEndedError as error:
            outcome, why = error.outcome, _why(error, running)
        last = self._traffic()
        if account.degraded_tokens:
            outcome, why = (
                ("degraded" if outcome == "finished" else outcome),
                why or f"{account.degraded_tokens} tokens",
            )
        answer = Answer(
            arm=running.arm.name, profile=links.profile, prompt=prompt, outcome=outcome, why=why,
            pieces=[piece.text for piece in pieces], at_ms=[1e3 * piece.at_s for piece in pieces],
            said_tokens=account.tokens, prompt_tokens=account.prompt_tokens,
            traffic=last.since(first) if pieces else Traffic(), killed=kill,
        )  # fmt: skip
        self._results.answers.append(answer)
        self._say(
            f"{links.profile}, prompt {prompt + 1}, {answer.arm}: {answer.tokens} tokens, "
            + (f"{answer.tpot_ms:.1f} ms each, " if answer.complete else "")
            + (f"{kill} killed, " if kill else "")
            + " ".join(filter(None, (outcome, why)))
        )
        fine = outcome in ("finished", "degraded")
        if not fine and not kill:
            self._give_up(answer.arm, links, f"{outcome}: {why}")
        write_results(self._results, self._settings.folder)
        return fine

    def _stream(self, running: RunningArm, prompt: int, tokens: int, account: Account) -> Iterator[Piece]:
        settings = self._settings
        request = chat_request(settings.prompts[prompt], tokens, ignore_eos=settings.ignore_eos)
        return stream_answer(running.arm.port, request, account, deadline_s=settings.deadline_s)

    def _give_up(self, name: str, links: Links, why: str) -> None:
        self._results.failures.append(Failure(name, links.profile, why))
        self._say(f"{name} is given up: {why}")

    def _at_rest(self) -> float:
        before = self._traffic()
        time.sleep(_REST_S)
        passed = self._traffic().since(before)
        return (passed.down_bytes + passed.up_bytes) / _REST_S

    def _traffic(self) -> Traffic:
        """What the relay has carried over all links so far."""
        nodes = self._network.status().nodes
        return Traffic(
            sum(node.down.sent_bytes for node in nodes), sum(node.up.sent_bytes for node in nodes),
            sum(node.down.sent_frames for node in nodes), sum(node.up.sent_frames for node in nodes),
        )  # fmt: skip

    def _say(self, line: str) -> None:
        self._settings.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
