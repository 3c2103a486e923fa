"""Checks of this machine and of a plan's files; nothing is started or changed."""

import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import psutil

from bs_coordinator.broker.processes import mosquitto_path
from bs_coordinator.dispatch.readiness import measure_broker
from bs_coordinator.selection.registry import policy_for_model
from common.errors import WdmoeError
from testbed import facts
from testbed.evaluation.data_sets import DomainText, LastWordItem, item_kind, read_items
from testbed.experiment.networks import check_network
from testbed.experiment.plan_files import existing_bundle
from testbed.plan.estimate import estimate
from testbed.plan.reading import check_plan
from testbed.plan.schema import Choice, Items, Perplexity, Plan
from testbed.preflight.machine import clock, governor, load, priority
from testbed.preflight.verdicts import Check, Level
from wire.broker_address import BrokerAddress
from wire.experts import UnitId, format_selector, parse_selector
from wire.manifest import Manifest, load_manifest, sha256_file
from wire.topics import Topics
from wire.transports import connect

_STEP_BYTES = 60_000
"""Size of one token of the demo model in all tables, Parquet and CSV: 30 layers × about two requests."""
_SPARE_BYTES = 512 << 20
_BUSY = 0.5
_NODE_RAM_BYTES = 120 << 20
"""Memory of a node process without its experts."""


def plan_checks(plan: Plan, manifests: Mapping[str, Manifest]) -> list[Check]:
    """Checks of a plan's data sets, placement and network.

    Args:
        manifests: manifest of each usable bundle, by name.
    """
    checks = [
        checked(f"data {workload.name}", _data, workload)
        for workload in plan.workloads
        if isinstance(workload, Items | Perplexity) and workload.dataset is not None
    ]
    checks += _network(plan)
    for name, manifest in manifests.items():
        if not plan.external:
            checks.append(checked(f"placement {name}", _placement, plan, manifest))
            if plan.emulated:
                checks.append(checked("network", _emulated, plan, manifest.dims.experts))
            checks.append(_ram(name, plan, manifest))
    return checks


def machine_checks(plan: Plan, *, out: Path) -> list[Check]:
    """Checks of the base station's machine.

    Args:
        out: where the run's folder would be made.
    """
    machine = [clock(several_machines=plan.external is not None), governor(), load()]
    if plan.priority == "auto":
        machine.append(priority())
    return [_disk(plan, out), *machine, _survey(), _code()]


def checked(name: str, question: Callable[..., tuple[Level, str]], *about: object) -> Check:
    """The result of one check; an error of the project or the system fails it."""
    try:
        level, detail = question(*about)
    except (WdmoeError, OSError, ValueError) as error:
        level, detail = "fail", " ".join(str(error).split())
    return Check(name, level, detail)


def bundle_checks(plan: Plan, checks: list[Check]) -> Iterator[tuple[str, Manifest]]:
    """The manifests of the usable bundles, by name; appends one check per bundle to `checks`."""
    for name in plan.bundles:
        manifests: list[Manifest] = []
        checks.append(checked(f"bundle {Path(name).name}", _bundle, plan, name, manifests))
        yield from ((Path(name).name, manifest) for manifest in manifests)


def _bundle(plan: Plan, name: str, found: list[Manifest]) -> tuple[Level, str]:
    folder = existing_bundle(name)
    if folder is None:
        return "warn", "not exported yet: 'run' exports it, which takes minutes and may download about 100 MB"
    manifest = load_manifest(folder)
    files = [*manifest.trunk]
    if plan.external is None:
        files += [file for expert in manifest.experts for file in expert.files]
    for file in files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            return "fail", f"{path} is missing or has the wrong size: export the bundle again"
    check_plan(plan, bundle=name, top_k=manifest.dims.top_k)
    for policy in plan.policies_of(name):
        policy_for_model(policy, manifest)
    found.append(manifest)
    return "pass", f"{manifest.quantisation}, model {manifest.model_sha256[:12]}, in {folder}"


def _data(workload: Items | Perplexity) -> tuple[Level, str]:
    path = Path(workload.dataset or "")
    if isinstance(workload, Items):
        kind = item_kind(workload) if isinstance(workload, Choice) else LastWordItem
        count = len(read_items(path, kind))
        if count < workload.span[1]:
            return "fail", f"{path} has {count} items, the plan needs {workload.span[1]}"
    else:
        count = len(read_items(path, DomainText))
    return "pass", f"{count} items, SHA-256 {sha256_file(path)[:12]}…"


def _network(plan: Plan) -> list[Check]:
    if plan.external:
        return []  # its broker is running and has a check of its own
    checks = [_own_broker(plan)]
    if plan.emulated:
        checks.append(checked("privileges", _privileges))
    return checks


def _own_broker(plan: Plan) -> Check:
    installed = mosquitto_path()
    if plan.broker == "embedded":
        return Check("broker", "pass", "embedded")
    if installed:
        return Check("broker", "pass", f"mosquitto, {installed}")
    if plan.broker == "mosquitto":
        return Check("broker", "fail", "mosquitto is not installed: 'apt install mosquitto'")
    return Check("broker", "warn", "mosquitto is not installed; the embedded broker adds about 0.4 ms to a round trip")


def _privileges() -> tuple[Level, str]:
    from testbed.network.namespaces import check_privileges

    check_privileges()
    return "pass", "namespaces and TAP devices can be created"


def _emulated(plan: Plan, experts: int) -> tuple[Level, str]:
    check_network(plan, experts)
    return "pass", f"{plan.emulated} has the plan's nodes and profiles"


def check_broker(address: BrokerAddress, cluster: str) -> Check:
    """Check that a running broker answers, and how fast."""
    return checked("broker", _broker, address, cluster)


def _broker(address: BrokerAddress, cluster: str) -> tuple[Level, str]:
    client_id = f"wdmoe-preflight-{secrets.token_hex(4)}"
    with closing(connect(address, client_id)) as transport:
        round_trip_ms = measure_broker(transport, Topics(cluster).echo(client_id))
    return "pass", f"{address} answers in {round_trip_ms:.2f} ms, with TCP_NODELAY"


def _placement(plan: Plan, manifest: Manifest) -> tuple[Level, str]:
    dims = manifest.dims
    held: set[UnitId] = set()
    for node, selector in plan.node_experts(dims.experts).items():
        try:
            held |= set(parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices))
        except ValueError as error:
            return "fail", f"nodes.{node}: {error}"
    missing = {UnitId(layer, unit) for layer in range(dims.layers) for unit in range(dims.units)} - held
    if missing:
        return "fail", f"nodes: no node holds {format_selector(sorted(missing), dims.slices)}"
    noun = "experts" if dims.slices == 1 else "slices"
    return "pass", f"{len(plan.node_experts(dims.experts))} nodes hold all {len(held)} {noun}"


def _ram(name: str, plan: Plan, manifest: Manifest) -> Check:
    dims = manifest.dims
    size = {entry.id: entry.bytes for entry in manifest.experts}
    try:
        nodes = plan.node_experts(dims.experts).values()
        held = [
            id
            for text in nodes
            for id in parse_selector(text, layers=dims.layers, experts=dims.experts, slices=dims.slices)
        ]
    except ValueError:
        held = []
    needed = sum(size.get(id, 0) for id in held) + len(plan.node_experts(dims.experts)) * _NODE_RAM_BYTES
    needed += 2 * sum(file.bytes for file in manifest.trunk)
    free = psutil.virtual_memory().available
    level: Level = "fail" if needed > free else "warn" if needed > 0.8 * free else "pass"
    return Check(f"RAM {name}", level, f"about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")


def _disk(plan: Plan, out: Path) -> Check:
    expected = estimate(plan)
    steps = expected.tokens + expected.items + expected.texts
    needed = _SPARE_BYTES + steps * _STEP_BYTES
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    level: Level = "fail" if plan.limits.disk(free) else "warn" if free < needed else "pass"
    return Check("disk", level, f"about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free at {place}")


def _survey() -> Check:
    """How busy the channel of this machine's radio is."""
    for path in sorted(Path("/sys/class/net").glob("*/phy80211")):
        survey = facts.output("iw", "dev", path.parent.name, "survey", "dump")
        if (busy := busy_share(survey)) is not None:
            level: Level = "warn" if busy > _BUSY else "pass"
            return Check("channel", level, f"{busy:.0%} busy, measured by {path.parent.name}")
    return Check("channel", "unknown", "no radio here reports how busy its channel is")


def busy_share(survey: str) -> float | None:
    """Busy share of the channel in use, from the output of `iw dev … survey dump`.

    None if the driver doesn't measure it.
    """
    for block in survey.split("Survey data from ")[1:]:
        times = {
            name: int(found[1])
            for name in ("active", "busy")
            if (found := re.search(rf"channel {name} time:\s+(\d+) ms", block))
        }
        if "[in use]" in block and times.get("active") and "busy" in times:
            return times["busy"] / times["active"]
    return None


def _code() -> Check:
    commit, dirty = facts.commit()
    if dirty:
        return Check(
            "code", "warn", f"differs from commit {commit[:12]}: the numbers can't be reproduced from the commit alone"
        )
    return Check("code", "pass", f"commit {commit[:12]}")
