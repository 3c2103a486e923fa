"""What every session measures besides its cells: how fast the parts are alone, at its start and at its end.

One short answer each, with top-k, so that a day or a place can be told from a policy:

station    all experts in this process, no network
one-node   one node process that holds all experts, over the network at hand
loopback   the plan's nodes as processes on this machine's loopback
wired      the plan's nodes over cable: running ones whose way to the broker is a cable, or the emulated network's
           profile `wired` or `lan`
wifi       the plan's nodes over the air: running ones on Wi-Fi, or the emulated network as the plan's profiles are
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.selection import TopK
from common.errors import StorageError, one_line
from edge_node.experts.memory import check_memory, needed_bytes
from testbed.experiment.networks import Loopback, Network
from testbed.experiment.plan import BaselineKind, Plan
from testbed.experiment.rundir import BundleFacts, RunDir
from testbed.experiment.site import Site, in_process_site
from wire.manifest import load_manifest

FILE = "baselines.jsonl"
Phase = Literal["start", "end"]
Route = Literal["wired", "wifi"]
Say = Callable[[str], None]
_WIRED_PROFILES = ("wired", "lan")
_EVERYTHING = "L*:E*"


class Baseline(Struct, frozen=True, kw_only=True):
    """One of them, or why it was not measured.

    Attributes:
        session: counts the starts of the runner, from 1.
        over: the network: `loopback`, a link profile, or how running nodes reach the broker.
        first_token_ns: until the first token, prefill included.
        token_ns: of each token after it.
        broker_ms: median round trip of a small message through the broker.
        nodes_ms: of one token to each node and back.
        why_not: why there are no numbers.
    """

    session: int
    phase: Phase
    kind: BaselineKind
    bundle: str
    unix_ns: int
    over: str = ""
    first_token_ns: int | None = None
    token_ns: list[int] = []
    broker_ms: float | None = None
    nodes_ms: dict[str, float] = {}
    why_not: str = ""


class _NotHereError(Exception):
    """It does not apply to the network at hand: the reason."""


OpenSite = Callable[[Plan, BundleFacts, Network], AbstractContextManager[Site]]
Routes = Callable[[], Mapping[str, Route | None]]
"""By running node how it reaches the broker; None where it does not say."""


def measure_baselines(
    run: RunDir, network: Network, open_site: OpenSite, routes: Routes, *, session: int, phase: Phase, say: Say
) -> None:
    """Measure all kinds of the plan and append them to the run's file; what can't be measured is noted, not raised.

    Args:
        open_site: starts nodes, see `distributed_site`.

    Raises:
        StorageError: the file can't be written.
    """
    plan = run.plan
    if plan.baselines is None:
        return
    bundle = run.manifest.bundles[0]
    for kind in plan.baselines.kinds:
        say(f"baseline {kind}, {phase}")
        for profile in _profiles(kind, plan, network):
            made = Baseline(session=session, phase=phase, kind=kind, bundle=bundle.name, unix_ns=time.time_ns())
            try:
                with _site(kind, profile, plan, bundle, network, open_site) as site:
                    over = _over(kind, profile, routes() if plan.external else {})
                    made = _measured(msgspec.structs.replace(made, over=over), site, plan, bundle.top_k)
            except Exception as error:  # noqa: BLE001 (libraries raise what they like: it must not keep cells away)
                made = msgspec.structs.replace(made, why_not=one_line(error))
            _append(run, made)


def read_baselines(run: RunDir) -> list[Baseline]:
    """All of them, in order; a line that a crash cut off is left out."""
    path = run.path / FILE
    decoder = msgspec.json.Decoder(Baseline)
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return found


def _append(run: RunDir, made: Baseline) -> None:
    path = run.path / FILE
    try:
        with path.open("ab") as file:
            # Before the line, not after it: what a crash cut off must not swallow it.
            file.write((b"\n" if file.tell() else b"") + msgspec.json.encode(made))
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error


def _profiles(kind: BaselineKind, plan: Plan, network: Network) -> Iterable[str]:
    """Link profiles that a kind is measured with; one without a name where the network has none."""
    if kind == "wifi":
        return plan.profiles or network.profiles[:1] or ("",)
    if kind == "wired":
        return [name for name in _WIRED_PROFILES if name in network.profiles][:1] or ("",)
    return network.profiles[:1] if kind == "one-node" and network.profiles else ("",)


@contextmanager
def _site(
    kind: BaselineKind, profile: str, plan: Plan, bundle: BundleFacts, network: Network, open_site: OpenSite
) -> Iterator[Site]:
    """The system to measure.

    Raises:
        _NotHereError: there is none here.
    """
    plan = msgspec.structs.replace(plan, churn=None)
    if kind == "station":
        manifest = load_manifest(Path(bundle.path))
        check_memory(needed_bytes(manifest.experts, manifest.quantisation.scheme), budget=None)
        yield in_process_site(plan, bundle)
        return
    if kind == "loopback":
        if plan.external:
            raise _NotHereError("the nodes run elsewhere")
        plan, network = msgspec.structs.replace(plan, network="localhost", profiles=()), Loopback()
    elif kind == "one-node":
        if plan.external:
            raise _NotHereError("no running node is known to hold all experts")
        plan = msgspec.structs.replace(plan, nodes={next(iter(plan.node_experts(bundle.experts))): _EVERYTHING})
    elif not plan.external and not network.profiles:
        raise _NotHereError("the nodes are on this machine's loopback")
    elif kind == "wired" and not plan.external and not profile:
        raise _NotHereError(f"the emulated network has no profile {' or '.join(_WIRED_PROFILES)}")
    if profile:
        network.set_profile(profile)
    with open_site(plan, bundle, network) as site:
        yield site


def _over(kind: BaselineKind, profile: str, routes: Mapping[str, Route | None]) -> str:
    """What the numbers were measured over.

    Raises:
        _NotHereError: running nodes have another way to the broker.
    """
    if kind == "station":
        return "no network"
    if not routes:
        return profile or "loopback"
    found = {route: sorted(node for node, r in routes.items() if r == route) for route in ("wired", "wifi", None)}
    all_wired = len(found["wired"]) == len(routes)
    if (kind == "wired") != all_wired:
        raise _NotHereError("every node is on a cable" if all_wired else "not every node says that it is on a cable")
    return "; ".join(f"{route or 'not said'}: {', '.join(nodes)}" for route, nodes in found.items() if nodes)


def _measured(made: Baseline, site: Site, plan: Plan, top_k: int) -> Baseline:
    assert plan.baselines is not None  # noqa: S101 (asked before)
    site.model.policy = TopK(top_k)
    site.model.deadline = time.monotonic() + plan.cell_timeout_s
    ids = site.tokenizer.encode(plan.baselines.prompt)
    config = SamplingConfig(max_tokens=plan.baselines.tokens)
    times: list[int] = []
    # Twice: the first answer fills caches and settles what is known of the links.
    for _ in range(2):
        times, began_ns = [], time.perf_counter_ns()
        for _event in Sequence(site.model, site.tokenizer).generate(ids, config):
            now_ns = time.perf_counter_ns()
            times.append(now_ns - began_ns)
            began_ns = now_ns
    station = site.station
    return msgspec.structs.replace(
        made,
        first_token_ns=times[0],
        token_ns=times[1:],
        broker_ms=station.broker_ms if station else None,
        nodes_ms=station.nodes_ms if station else {},
    )
