"""Runs all checks: this machine, the plan, the broker and every node. What it starts, it stops again."""

import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL, Popen

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bs_coordinator.broker.processes import open_broker, stop_child
from bs_coordinator.nodes.registry import NodeRegistry
from common.errors import WdmoeError
from testbed.experiment.networks import Network, open_network
from testbed.experiment.system_under_test import broker_of
from testbed.keys.authority import expiry
from testbed.keys.folder import KeyFolder
from testbed.local_nodes import LocalNodes
from testbed.plan.schema import Broker, Plan
from testbed.preflight.nodes import gather
from testbed.preflight.plan_checks import bundle_checks, check_broker, checked, machine_checks, plan_checks
from testbed.preflight.verdicts import Check, Level, NodeFacts, certificate, judge
from wire.broker_address import BrokerAddress
from wire.frame_auth import read_cluster_key
from wire.manifest import Manifest

OnProgress = Callable[[str], None]
_START_S = 60.0
_QUIET: OnProgress = lambda line: None  # noqa: E731


def run_preflight(
    plan: Plan, *, out: Path, keys: Path | None = None, quick: bool = False, on_progress: OnProgress = _QUIET
) -> list[Check]:
    """Run all checks of a plan.

    Args:
        out: where the run's folder would be made.
        keys: folder of `wdmoe-testbed keys`, to check when the nodes' certificates expire.
        quick: start no nodes and measure no rates.
        on_progress: called with each step of the check, in words.
    """
    checks: list[Check] = []
    manifests = dict(bundle_checks(plan, checks))
    checks += plan_checks(plan, manifests)
    until: dict[str, datetime] = {}
    if keys is not None:
        checks.append(checked("keys", _keys, keys, until))
    for manifest in list(manifests.values())[:1]:
        if plan.external:
            checks += _external(plan, plan.external, manifest, until, quick=quick, on_progress=on_progress)
        elif plan.emulated and not quick and all(check.level != "fail" for check in checks):
            checks += _emulated(plan, next(iter(plan.bundles)), manifest, on_progress)
    return checks + machine_checks(plan, out=out)


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print one row per check, those of this machine first, and then a verdict per node."""
    colours = {"pass": "green", "warn": "yellow", "fail": "red", "unknown": "dim"}
    table = Table("", "node", "check", "result", show_edge=False)
    for check in sorted(checks, key=lambda check: check.node):
        table.add_row(
            f"[{colours[check.level]}]{check.level}[/]", escape(check.node), escape(check.name), escape(check.detail)
        )
    console.print(table)
    for node, level in verdicts(checks).items():
        why = ", ".join(check.name for check in checks if check.node == node and check.level == level != "pass")
        console.print(f"[{colours[level]}]{level}[/] {escape(node)}{f': {why}' if why else ''}", highlight=False)


def verdicts(checks: Sequence[Check]) -> dict[str, Level]:
    """The worst level of each node's checks; `unknown` counts as `pass`."""
    nodes = sorted({check.node for check in checks if check.node})
    of = {node: {check.level for check in checks if check.node == node} for node in nodes}
    return {node: "fail" if "fail" in some else "warn" if "warn" in some else "pass" for node, some in of.items()}


def _external(
    plan: Plan,
    broker: Broker,
    manifest: Manifest,
    until: Mapping[str, datetime],
    *,
    quick: bool,
    on_progress: OnProgress,
) -> Iterator[Check]:
    """Checks of the broker and nodes of an external network, which must be running."""
    try:
        with open_broker(broker.broker, access=broker.access) as address:
            yield from _certificates(broker, address)
            on_progress("broker")
            check = check_broker(address, broker.cluster)
            yield check
            key = read_cluster_key(Path(broker.cluster_key), broker.cluster) if broker.cluster_key else None
            named = tuple(plan.nodes) if isinstance(plan.nodes, dict) else ()
            facts = gather(
                address,
                broker.cluster,
                manifest,
                named=named,
                cluster_key=key,
                until=until,
                iperf=not quick,
                on_progress=on_progress,
            )
    except (WdmoeError, ValueError) as error:
        yield Check("nodes", "fail", " ".join(str(error).split()))
        return
    yield from judge(facts, plan.limits)
    yield _placement(manifest, facts)


def _placement(manifest: Manifest, facts: Sequence[NodeFacts]) -> Check:
    registry = NodeRegistry(manifest.dims, manifest.model_sha256)
    for node in facts:
        if node.status is not None:
            registry.apply(node.status)
    if registry.missing():
        return Check("placement", "fail", registry.describe_missing())
    return Check("placement", "pass", "every expert has a holder")


def _certificates(broker: Broker, address: BrokerAddress) -> Iterator[Check]:
    now = datetime.now(UTC)
    for name, path in (("our certificate", broker.tls_cert), ("authority", broker.ca_file)):
        if path is not None:
            yield checked(name, lambda path=path: certificate(expiry(Path(path).read_bytes()), now))
    if address.tls:
        yield checked("broker's certificate", lambda: certificate(_served_until(address), now))


def _served_until(address: BrokerAddress) -> datetime:
    """When the broker's own certificate expires."""
    pem = ssl.get_server_certificate((address.host, address.port), timeout=5.0)
    return expiry(pem.encode())


def _keys(folder: Path, until: dict[str, datetime]) -> tuple[Level, str]:
    expiries = KeyFolder(folder).expiries()
    until |= {e.name: e.until for e in expiries}
    first = expiries[0]
    level, detail = certificate(first.until, datetime.now(UTC))
    return level, f"{len(expiries)} certificates, the first to expire: {first.name}, {detail}"


def _emulated(plan: Plan, bundle: str, manifest: Manifest, on_progress: OnProgress) -> list[Check]:
    """Checks of the nodes of an emulated network, which are started for the checks and stopped again."""
    from testbed.experiment.start import bundle_path

    folder = bundle_path(bundle, console=Console(quiet=True))
    experts = plan.node_experts(manifest.dims.experts)
    try:
        with ExitStack() as stack:
            on_progress("starting network, broker and nodes")
            network = stack.enter_context(open_network(plan))
            if plan.profiles:
                network.set_profile(plan.profiles[0])
            address = stack.enter_context(open_broker(broker_of(plan), host=network.address))
            check = check_broker(address, "default")
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wdmoe-preflight-")))
            nodes = LocalNodes(folder, address, logs)
            stack.callback(nodes.stop)
            for node, selector in experts.items():
                nodes.start(node, selector, threads=plan.node_threads, prefix=network.prefix(node))
                stack.enter_context(_serving_iperf(network, node))
            ended = _wait(nodes)
            facts = gather(
                address,
                "default",
                manifest,
                named=tuple(experts),
                wait_s=min(plan.nodes_timeout_s, _START_S),
                on_progress=on_progress,
            )
    except (WdmoeError, OSError) as error:
        return [Check("nodes", "fail", " ".join(str(error).split()))]
    checks = [check, *judge(facts, plan.limits), _placement(manifest, facts)]
    # The last line of a process that ended says more than that the node never came online.
    return [
        Check(c.name, c.level, f"the node process ended: {ended[c.node]}", c.node)
        if c.name == "online" and c.node in ended
        else c
        for c in checks
    ]


def _wait(nodes: LocalNodes) -> dict[str, str]:
    """The last log line of each node that ended within its first seconds."""
    time.sleep(2.0)
    ended = {}
    for node, process in nodes.processes.items():
        if process.poll() is not None:
            lines = nodes.log_path(node).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            ended[node] = lines[-1] if lines else f"exit code {process.returncode}"
    return ended


@contextmanager
def _serving_iperf(network: Network, node: str) -> Iterator[None]:
    """Run an iperf3 server on a node for the duration of the context, if iperf3 is installed."""
    try:
        server = Popen([*network.prefix(node), "iperf3", "--server"], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    except FileNotFoundError:
        yield
        return
    try:
        yield
    finally:
        stop_child(server)
