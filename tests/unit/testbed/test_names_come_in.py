"""Hosts, node ids, clusters and URLs are checked wherever they come in, with the reason in one line."""

from pathlib import Path

import pytest

from testbed.errors import FleetError, PlanError
from testbed.fleet.ansible import read_inventory
from testbed.keys.authority import hosts_of
from testbed.plan.reading import read_plan
from tests.in_process import run_in_process


def test_certificates_are_for_encoded_hosts(tmp_path: Path) -> None:
    hosts = ["--host", "Küche.local", "--host", "Broker.LAN.", "--host", "10.0.0.7", "--host", "2001:DB8::7"]
    done = run_in_process("testbed", "keys", "init", tmp_path / "keys", *hosts)
    assert done.returncode == 0, done.stderr
    known = hosts_of((tmp_path / "keys" / "broker" / "broker.crt").read_bytes())
    assert known == ["xn--kche-0ra.local", "broker.lan", "10.0.0.7", "2001:db8::7"]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("", "an empty text is not a host"),
        ("mqtts://pi:hush@10.0.0.7", "a URL is not a host"),
        ("10.0.0.7:8883", "without a port"),
        ("kitchen..local", "two dots"),
        ("fe80::7%wlan0", "has a zone"),
    ],
)
def test_certificates_for_no_host_are_not_made(tmp_path: Path, host: str, reason: str) -> None:
    done = run_in_process("testbed", "keys", "init", tmp_path / "keys", "--host", host)
    assert (done.returncode, done.stderr.count("\n")) == (51, 1)
    assert reason in done.stderr
    assert "hush" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("pi1", "pi1"), ("pi1", "PI1"), ("Broker",)])
def test_keys_of_two_nodes_are_never_in_one_folder(tmp_path: Path, names: tuple[str, ...]) -> None:
    nodes = [word for name in names for word in ("--node", name)]
    done = run_in_process("testbed", "keys", "init", tmp_path / "keys", "--host", "10.0.0.7", *nodes)
    assert (done.returncode, done.stderr.count("\n")) == (51, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "node",
    ["pi1=nanG", "pi1=infG", f"pi1={'9' * 400}", "pi1=1G,nan", "pi1=1G,inf", "pi1=1G,-1", "p/1=1G", "=1G", "pi1=7"],
)
def test_placements_on_no_device_are_refused(node: str) -> None:
    done = run_in_process("bs_coordinator", "place", "--bundle", "no-bundle", "--node", node)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pi1=3.5G,12" in done.stderr


def test_a_device_is_placed_on_once() -> None:
    done = run_in_process("bs_coordinator", "place", "--bundle", "b", "--node", "pi1=1G", "--node", "pi1=2G")
    assert done.returncode == 2
    assert "given twice" in done.stderr


@pytest.mark.parametrize("room", ["bs_coordinator", "edge_node"])
@pytest.mark.parametrize("url", ["mqtt://kitchen..local", "mqtt://pi:hush]@10.0.0.7", "mqtt://10.0.0.256"])
def test_brokers_at_no_host_are_refused_before_anything_is_read(room: str, url: str) -> None:
    more = ["nodes"] if room == "bs_coordinator" else ["--id", "pi1", "--experts", "L*:E0"]
    done = run_in_process(room, *more, "--bundle", "no-bundle", "--broker", url, "--allow-plaintext")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--broker" in done.stderr
    assert "hush" not in done.stderr


def test_plans_have_no_password_in_a_url(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "name: t\nnetwork: {external: {broker: 'mqtts://pi:hu/sh@10.0.0.7'}}\npolicies: [topk]\n"
        "workloads: [{kind: generate}]\n"
    )
    with pytest.raises(PlanError, match=r"network\.external\.broker: .*--password-file") as caught:
        read_plan(plan)
    assert "hu" not in str(caught.value).replace(str(plan), "")


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("wdmoe_address: mqtts://10.0.0.7", "a URL is not a host"),
        ("wdmoe_address: 10.0.0.7:8883", "without a port"),
        ("wdmoe_cluster: the lab", "cluster 'the lab' is not valid"),
        ("wdmoe_broker_port: 88830", "not a port"),
        ("wdmoe_broker_port: 02000", "line 3: wdmoe_broker_port: 02000 means 1024"),
        ("wdmoe_broker_port: '８８８３'", "not a port"),
        ("wdmoe_cluster: no", "wdmoe_cluster: False is not text"),
        ("wdmoe_home_assistant: 'a/#'", "'a/#' is not a prefix of topics"),
    ],
)
def test_inventories_name_their_broker(tmp_path: Path, variable: str, reason: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        f"all:\n  children:\n    base_station: {{hosts: {{box: {{}}}}, vars: {{{variable}}}}}\n"
        "    nodes: {hosts: {pi1: {}}}\n"
    )
    with pytest.raises(FleetError, match=reason) as caught:
        read_inventory(path)
    assert str(path) in str(caught.value)


def test_inventories_name_hosts_that_differ_in_more_than_case(tmp_path: Path) -> None:
    path = tmp_path / "fleet.ini"
    path.write_text("[base_station]\nbox ansible_host=Küche.local\n[nodes]\npi1\nbox\n")
    assert read_inventory(path).address() == "xn--kche-0ra.local"
    path.write_text("[base_station]\nbox\n[nodes]\npi1\nPI1\n")
    with pytest.raises(FleetError, match="upper and lower case only"):
        read_inventory(path)
