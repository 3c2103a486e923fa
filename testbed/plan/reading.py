"""Reading a plan from its YAML file and checking what types alone can't."""

import re
from difflib import get_close_matches
from pathlib import Path

import msgspec
from msgspec import Struct

from bs_coordinator.selection import parse_policy
from common.names import first_twice
from common.sizes import parse_bytes
from testbed.errors import PlanError
from testbed.plan.cells import MAX_CELLS, count_cells
from testbed.plan.limits import RunLimits
from testbed.plan.schema import (
    Baselines,
    Broker,
    Choice,
    Churn,
    Generate,
    Items,
    LastWord,
    Network,
    Perplexity,
    Plan,
    Workload,
)
from testbed.yaml_files import decode_yaml
from wire.broker_url import check_broker_url
from wire.experts import check_selector_syntax
from wire.topics import check_name


def read_plan(path: Path, *, data: Path | None = None) -> Plan:
    """Read and check a plan; its paths become absolute.

    Args:
        data: folder of the data sets; default is the plan's own folder.

    Raises:
        PlanError: the file can't be read, or a field is wrong.
    """
    try:
        plan = decode_yaml(path.read_bytes(), Plan)
    except OSError as error:
        raise PlanError(f"can't read the plan {path}: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{path}: {error}{_nearest(str(error))}") from None
    try:
        check_plan(plan)
        return _with_paths(plan, path.parent, data)
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from None


_UNKNOWN = re.compile(r"unknown field `(?P<field>.*?)`(?: - at `\$\.(?:\w+\.)*(?P<where>\w+)[^.]*`)?$")
_FIELDS_OF: dict[str | None, tuple[type[Struct], ...]] = {
    None: (Plan,),
    "network": (Network,),
    "external": (Broker,),
    "workloads": (Generate, Choice, LastWord, Perplexity),  # msgspec does not say which kind it is
    "churn": (Churn,),
    "baselines": (Baselines,),
    "limits": (RunLimits,),
}


def _nearest(message: str) -> str:
    """A suggestion to append to msgspec's message about an unknown field."""
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return ""
    fields = [field for struct in _FIELDS_OF.get(unknown["where"], ()) for field in struct.__struct_fields__]
    near = get_close_matches(unknown["field"], fields, n=1)
    return f": did you mean '{near[0]}'?" if near else ""


def check_plan(plan: Plan, *, bundle: str | None = None, top_k: int = 2) -> None:
    """Check what the types of a plan can't express.

    Args:
        bundle: check the policies of this bundle; None for all.
        top_k: experts per token and layer of its model.

    Raises:
        ValueError: a field is wrong; the message begins with its name.
    """
    if not isinstance(plan.network, str) and (plan.network.emulated is None) == (plan.network.external is None):
        raise ValueError("network: use localhost, {emulated: FILE} or {external: {broker: URL}}")
    if plan.resident is not None:
        try:
            parse_bytes(plan.resident)
        except ValueError as error:
            raise ValueError(f"resident: {error}") from None
    if plan.profiles and plan.emulated is None:
        raise ValueError("profiles: only an emulated network has link profiles")
    if plan.external is not None and len(plan.bundles) > 1:
        raise ValueError("bundles: running nodes hold one bundle: name only that one")
    if plan.external is not None and plan.churn is not None:
        raise ValueError("churn: nodes of an external network can't be stopped from here")
    if strangers := sorted({*plan.own_policies} - {*plan.bundles}):
        raise ValueError(f"own_policies: '{strangers[0]}' is not one of the bundles")
    lists = {"policies": plan.policies} | {f"own_policies.{name}": own for name, own in plan.own_policies.items()}
    for field, policies in lists.items():
        if bundle is not None and field not in ("policies", f"own_policies.{bundle}"):
            continue
        for i, policy in enumerate(policies):
            try:
                parse_policy(policy, top_k=top_k)
            except ValueError as error:
                raise ValueError(f"{field}[{i}]: {error}") from None
    names = tuple(w.name for w in plan.workloads)
    for field, values in (
        ("policies", plan.policies), ("bundles", plan.bundles),
        *((f"own_policies.{bundle}", plan.policies_of(bundle)) for bundle in plan.own_policies),
    ):  # fmt: skip
        if repeated := sorted({v for v in values if values.count(v) > 1}):
            raise ValueError(f"{field}: '{repeated[0]}' is listed twice")
    for field, values in (
        ("profiles", plan.profiles), ("workloads", names),
        ("nodes", tuple(plan.nodes) if isinstance(plan.nodes, dict) else ()),
    ):  # fmt: skip
        if twice := first_twice(values):
            raise ValueError(f"{field}: '{twice}' is listed twice (upper and lower case count as equal)")
    if (cells := count_cells(plan)) > MAX_CELLS:
        raise ValueError(f"repetitions: the plan has {cells} cells, at most {MAX_CELLS} are possible")
    if plan.baseline is not None and plan.baseline not in plan.policies:
        raise ValueError(f"baseline: '{plan.baseline}' is not one of the policies")
    if plan.external is not None:
        try:
            check_broker_url(plan.external.broker)
        except ValueError as error:
            raise ValueError(f"network.external.broker: {error}") from None
        check_name("cluster", plan.external.cluster)
    if isinstance(plan.nodes, dict):
        for node, selector in plan.nodes.items():
            check_name("node", node)
            if selector == "" and plan.external is not None:
                continue  # whatever the running node holds
            try:
                check_selector_syntax(selector)
            except ValueError as error:
                raise ValueError(f"nodes.{node}: {error}") from None
    for i, workload in enumerate(plan.workloads):
        if isinstance(workload, Items) and isinstance(workload.items, tuple) and workload.items[0] >= workload.items[1]:
            raise ValueError(f"workloads[{i}].items: the range {list(workload.span)} is empty")
        if isinstance(workload, Items) and workload.choosing == "alone" and workload.where == "distributed":
            raise ValueError(f"workloads[{i}].choosing: 'alone' needs 'where: in-process'")
        if isinstance(workload, Perplexity) and (workload.dataset is None) == isinstance(workload.texts, int):
            raise ValueError(f"workloads[{i}]: perplexity needs either a list of texts, or a number and a dataset")


def at_most(plan: Plan, items: int) -> Plan:
    """The plan with at most this many items of each data set, from the first one of each workload."""

    def shortened(workload: Workload) -> Workload:
        if not isinstance(workload, Items):
            return workload
        first, end = workload.span
        return msgspec.structs.replace(workload, items=(first, min(end, first + items)))

    return msgspec.structs.replace(plan, workloads=tuple(map(shortened, plan.workloads)))


def _with_paths(plan: Plan, base: Path, data: Path | None) -> Plan:
    def beside(path: str, folder: Path = base) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    network = plan.network
    if plan.emulated is not None:
        network = Network(emulated=beside(plan.emulated))
    elif plan.external is not None:
        broker = plan.external
        names = ("password_file", "ca_file", "tls_cert", "tls_key", "cluster_key")
        files = {f: beside(path) for f in names if (path := getattr(broker, f)) is not None}
        network = Network(external=msgspec.structs.replace(broker, **files))
    workloads = tuple(
        msgspec.structs.replace(w, dataset=beside(w.dataset, data or base))
        if isinstance(w, Items | Perplexity) and w.dataset is not None
        else w
        for w in plan.workloads
    )
    bundles = {b: beside(b) if "/" in b else b for b in plan.bundles}
    own = {bundles[name]: policies for name, policies in plan.own_policies.items()}
    return msgspec.structs.replace(
        plan, network=network, workloads=workloads, bundles=tuple(bundles.values()), own_policies=own
    )
