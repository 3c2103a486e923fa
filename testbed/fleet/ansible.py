"""Runs Ansible playbooks in a child process and reads their results."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from common.jsonl import decode_json
from common.names import check_host, first_twice
from edge_node.home_assistant import DEFAULT_PREFIX, check_prefix
from testbed.errors import FleetError
from testbed.yaml_files import check_yaml
from wire.topics import check_name

PLAYBOOKS = Path(__file__).parent / "playbooks"
BASE_STATION, NODES = "base_station", "nodes"
_ROOT = str(Path(__file__).parents[2])
_LIST_S = 60.0
_DEFAULT_PORT = 8883
_MOST_PORT = 65535
_YAML = (".yaml", ".yml")


class HostRecap(Struct, frozen=True):
    """Result of a playbook run on one host.

    Attributes:
        ok, changed, failures, unreachable: numbers of tasks with that result.
        changed_tasks: names of the tasks that changed something.
        error: message of the last failure; empty if there was none.
    """

    ok: int
    changed: int
    failures: int
    unreachable: int
    changed_tasks: list[str]
    error: str


class Inventory(Struct, frozen=True):
    """Hosts of a deployment and their variables.

    Attributes:
        folder: folder of the inventory, to which its paths are relative.
        base_station: host name of the base station.
        nodes: host names of the nodes, which are also their node ids.
        variables: Ansible variables by host.
    """

    folder: Path
    base_station: str
    nodes: list[str]
    variables: dict[str, dict[str, Any]]

    def address(self) -> str:
        """Host name or IP address at which nodes reach the broker, in the form that certificates have.

        Raises:
            ValueError: it is neither.
        """
        own = self.variables.get(self.base_station, {})
        return check_host(
            _text("wdmoe_address", own.get("wdmoe_address") or own.get("ansible_host") or self.base_station)
        )

    @property
    def cluster(self) -> str:
        """Name of the cluster.

        Raises:
            ValueError: it is no text, such as `no`, which is false in YAML.
        """
        return _text("wdmoe_cluster", self.variables.get(self.base_station, {}).get("wdmoe_cluster", "default"))

    def broker_port(self) -> int:
        """TCP port of the broker.

        Raises:
            ValueError: `wdmoe_broker_port` is not a port.
        """
        value = self.variables.get(self.base_station, {}).get("wdmoe_broker_port", _DEFAULT_PORT)
        if not re.fullmatch(r"[1-9][0-9]{0,4}", str(value)) or int(value) > _MOST_PORT:
            raise ValueError(f"wdmoe_broker_port: {str(value)[:80]!r} is not a port from 1 to {_MOST_PORT}")
        return int(value)

    def home_assistant(self) -> str | None:
        """Prefix of the discovery topics of the Home Assistant to which nodes announce themselves; None without one.

        Raises:
            ValueError: no topic can begin with it.
        """
        value = self.variables.get(self.base_station, {}).get("wdmoe_home_assistant") or None
        return DEFAULT_PREFIX if value is True else value and check_prefix(_text("wdmoe_home_assistant", value))

    def path(self, host: str, name: str) -> Path | None:
        """The path in a host's variable `name`, relative to the inventory's folder; None if it is not set."""
        value = self.variables.get(host, {}).get(name)
        return None if value is None else self.folder / str(value)


def read_inventory(path: Path) -> Inventory:
    """Read an inventory through Ansible.

    Raises:
        FleetError: Ansible is not installed or rejects the inventory, a host name is not a valid node id, or the groups
            are not one base station and at least one node.
    """
    if not path.is_file():
        raise FleetError(f"there is no inventory {path}: 'wdmoe-testbed fleet init {path}' writes an example")
    if path.suffix in _YAML:
        try:
            check_yaml(path.read_bytes())
        except ValueError as error:
            raise FleetError(f"{path}: {error}") from None
    done = _ansible("inventory", "-i", str(path), "--list", timeout_s=_LIST_S)
    if done.returncode:
        raise FleetError(f"{path} is not a valid inventory: {_last(done.stderr)}")
    try:
        listed = decode_json(done.stdout.encode(), dict[str, Any])
        groups = {name: list(listed.get(name, {}).get("hosts", [])) for name in (BASE_STATION, NODES)}
        variables = dict(listed["_meta"]["hostvars"])
    except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
        raise FleetError(f"{path} is not a valid inventory: {error}") from None
    if len(groups[BASE_STATION]) != 1 or not groups[NODES]:
        raise FleetError(
            f"{path} needs one host in the group 'base_station' and at least one in 'nodes': it has "
            f"{len(groups[BASE_STATION])} and {len(groups[NODES])}"
        )
    for host in (*groups[BASE_STATION], *groups[NODES]):
        try:
            check_name("host name", host)
        except ValueError as error:
            raise FleetError(f"{path}: {error}") from None
    if twice := first_twice({*groups[BASE_STATION], *groups[NODES]}):
        raise FleetError(f"{path}: '{twice}' differs from another host in upper and lower case only")
    inventory = Inventory(path.absolute().parent, groups[BASE_STATION][0], groups[NODES], variables)
    try:
        inventory.address()
        check_name("cluster", inventory.cluster)
        inventory.broker_port()
        inventory.home_assistant()
    except ValueError as error:
        raise FleetError(f"{path}: {inventory.base_station}: {error}") from None
    return inventory


def _text(name: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not text: write it in quotes")
    return str(value)


def run_playbook(
    name: str, inventory: Path, *, variables: Mapping[str, Any], limit: str | None, check: bool, quiet: bool,
    timeout_s: float,
) -> dict[str, HostRecap]:  # fmt: skip
    """Run a playbook of `PLAYBOOKS`.

    Args:
        name: file name without `.yml`.
        variables: extra variables, passed as data: Ansible does not evaluate them as templates.
        limit: Ansible pattern of the hosts to run on; None for all.
        check: report what would change, and change nothing.
        quiet: don't print Ansible's output.

    Returns:
        Results by host, without localhost.

    Raises:
        FleetError: the playbook could not start, took longer than `timeout_s`, or failed on a host.
    """
    with tempfile.TemporaryDirectory(prefix="wdmoe-fleet-") as folder:
        recap_path, extra = Path(folder) / "recap.json", Path(folder) / "extra.json"
        extra.write_bytes(msgspec.json.encode(_as_data(variables)))
        arguments = ["playbook", "-i", str(inventory.absolute()), "--extra-vars", f"@{extra}"]
        arguments += [str(PLAYBOOKS / f"{name}.yml")]
        arguments += [f"--limit={limit},localhost"] if limit else []
        arguments += ["--check", "--diff"] if check else []
        try:
            done = _ansible(*arguments, timeout_s=timeout_s, quiet=quiet, WDMOE_RECAP=str(recap_path))
        except subprocess.TimeoutExpired:
            raise FleetError(
                f"the deployment took more than {timeout_s:.0f} s: run the command again to continue"
            ) from None
        try:
            hosts = decode_json(recap_path.read_bytes(), dict[str, HostRecap])
        except (OSError, msgspec.DecodeError):
            reason = _last(done.stderr) if quiet else f"exit code {done.returncode}"
            raise FleetError(f"the playbook {name} could not be run: {reason}") from None
    for host, recap in hosts.items():
        if recap.failures or recap.unreachable:
            raise FleetError(f"{host}: {recap.error}")
    if done.returncode:
        raise FleetError(f"the playbook {name} failed: exit code {done.returncode}")
    return {host: recap for host, recap in hosts.items() if host != "localhost"}


def _as_data(value: Any) -> Any:
    """Mark every text in a JSON value as data: in a plain extra variable Ansible would evaluate `{{ … }}`."""
    match value:
        case str():
            return {"__ansible_unsafe": value}
        case Mapping():
            return {name: _as_data(item) for name, item in value.items()}
        case list() | tuple():
            return [_as_data(item) for item in value]
        case _:
            return value


def _ansible(
    command: str, *arguments: str, timeout_s: float, quiet: bool = True, **environment: str
) -> "subprocess.CompletedProcess[str]":
    if importlib.util.find_spec("ansible") is None:
        raise FleetError("deployment needs Ansible: pip install -c constraints.txt -e '.[testbed,fleet]'")
    return subprocess.run(
        [sys.executable, "-m", "ansible", command, *arguments],
        env={
            # Tasks call `wdmoe-testbed fleet`: make sure that they import this copy.
            # Ansible refuses locales without UTF-8; LANGUAGE would translate the messages of what it runs.
            **os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "", "PYTHONPATH": os.pathsep.join([_ROOT, *_python_path()]),
            "ANSIBLE_CONFIG": str(PLAYBOOKS / "ansible.cfg"),
            "ANSIBLE_FORCE_COLOR": "1" if sys.stdout.isatty() and not quiet else "0", **environment,
        },
        stdin=subprocess.DEVNULL, capture_output=quiet, encoding="utf-8", errors="replace", timeout=timeout_s,
        check=False,
    )  # fmt: skip


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no error message"
