"""Deployment without devices: which wheels and files go where, what is made before, how releases change on a device.

`make fleet-proof` deploys for real, to machines with systemd and sshd.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from common import real_time
from testbed.errors import FleetError
from testbed.fleet.ansible import PLAYBOOKS, HostRecap, Inventory, read_inventory, run_playbook
from testbed.fleet.files import Needed, needed_files
from testbed.fleet.prepare import prepare_bundles, prepare_keys
from testbed.fleet.wheelhouse import LOCK, Target, lock, release_name, source_root
from testbed.keys.folder import KeyFolder
from tests.conftest import Run
from wire.errors import BundleError
from wire.manifest import MANIFEST_NAME, FileEntry, Scheme, load_manifest, verify_file
from wire.signature import check_signature

Bundle = Callable[[Scheme], Path]
has_ansible = pytest.mark.skipif(
    importlib.util.find_spec("ansible") is None, reason="Ansible is not installed: pip install -e '.[fleet]'"
)
PI5 = Target(machine="aarch64", python="3.11", glibc="2.36", extra="edge")


def module(name: str) -> ModuleType:
    """One of the modules that run on devices; Ansible loads them by path as well."""
    spec = importlib.util.spec_from_file_location(name, PLAYBOOKS / "library" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def inventory(folder: Path, bundle: Path, **experts: str) -> Path:
    """An inventory file with these nodes."""
    nodes = {name: {"ansible_host": f"10.0.0.{k}", "wdmoe_experts": e} for k, (name, e) in enumerate(experts.items())}
    path = folder / "fleet.yaml"
    path.write_bytes(
        msgspec.yaml.encode(
            {
                "all": {
                    "vars": {"wdmoe_bundle": str(bundle), "wdmoe_keys": "keys"},
                    "children": {
                        "base_station": {"hosts": {"bs": {"ansible_connection": "local", "wdmoe_address": "10.0.0.9"}}},
                        "nodes": {"hosts": nodes},
                    },
                }
            }
        )
    )
    return path


def local_inventory(folder: Path, bundle: Path, *nodes: str) -> Path:
    """An inventory of a base station and nodes that are all this machine, each with folders of its own."""
    own = {
        host: {"wdmoe_root": str(folder / host / "opt"), "wdmoe_state": str(folder / host / "var")}
        for host in ("bs", *nodes)
    }
    shared = {
        "ansible_connection": "local", "ansible_pipelining": True, "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
        "wdmoe_python": sys.executable, "wdmoe_bundle": str(bundle), "wdmoe_experts": "L*:E*",
        "wdmoe_address": "127.0.0.1",
    }  # fmt: skip
    groups = {"base_station": {"hosts": {"bs": own.pop("bs")}}, "nodes": {"hosts": own}}
    path = folder / "fleet.yaml"
    path.write_bytes(msgspec.yaml.encode({"all": {"vars": shared, "children": groups}}))
    return path


def program(folder: Path, name: str, script: str) -> None:
    """A shell script in place of a program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


SYSTEMCTL = """case "$1" in
    --version) echo systemd 252;;
    show) echo LoadState=loaded; echo ActiveState=active;;
esac
"""


def play(name: str, path: Path, *, check: bool = False, **variables: object) -> dict[str, HostRecap]:
    """Run a playbook on all hosts."""
    return run_playbook(name, path, variables=variables, limit=None, check=check, quiet=not check, timeout_s=500)


class TestWheels:
    def test_pip_finds_the_wheels_of_a_pi_for_the_tags_we_give(self) -> None:
        """pip's own rule, packaging.tags: what it would accept on such a device is what we ask for."""
        from packaging.tags import compatible_tags, cpython_tags

        asked = PI5.platforms()
        assert asked[0] == "manylinux_2_36_aarch64"
        assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(asked)
        accepted = {str(tag) for tag in (*cpython_tags((3, 11), platforms=asked), *compatible_tags((3, 11)))}
        # What PyPI has for aarch64 of the packages that a node needs.
        for wheel in ("cp311-cp311-manylinux_2_28_aarch64", "cp311-abi3-manylinux2014_aarch64", "py3-none-any"):
            assert wheel in accepted
        assert "cp311-cp311-manylinux_2_39_aarch64" not in accepted

    @pytest.mark.parametrize("glibc", ["2.36;rm -rf", "3.0", "", "2.x"])
    def test_a_device_can_not_put_words_into_the_command_line(self, glibc: str, run_process: Run) -> None:
        done = run_process("testbed", "fleet", "wheels", "--machine", "aarch64", "--python", "3.11", "--glibc", glibc)
        assert done.returncode == 2
        assert "glibc" in done.stderr

    def test_pip_takes_a_locked_wheel_and_refuses_a_changed_one(self, tmp_path: Path) -> None:
        wheels = tmp_path / "wheels"
        source = tmp_path / "source"
        source.mkdir()
        (source / "pyproject.toml").write_text('[project]\nname = "tiny"\nversion = "1"\n')
        wheel = wheels / "tiny-1-py3-none-any.whl"
        wheels.mkdir()
        _write_wheel(wheel, "x = 1\n")
        (wheels / LOCK).write_text(lock([wheel]))
        assert _install(wheels, tmp_path / "a") == 0
        _write_wheel(wheel, "x = 2\n")
        assert _install(wheels, tmp_path / "b") != 0
        assert not (tmp_path / "b" / "tiny.py").exists()

    def test_a_release_is_named_by_what_is_in_it(self, tmp_path: Path) -> None:
        root = source_root()
        clone = tmp_path / "clone"
        for name in ("common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed", "wdmoe"):
            shutil.copytree(root / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            shutil.copy(root / name, clone / name)
        assert release_name(clone) == release_name(root)
        code = clone / "wire" / "topics.py"
        code.write_text(code.read_text() + "\n")
        assert release_name(clone) != release_name(root)


class TestFiles:
    @pytest.mark.parametrize("chosen", [{0}, {1, 3}, set(range(8))])
    def test_nodes_get_their_experts_and_nothing_else(self, chosen: set[int], tiny_bundle: Bundle) -> None:
        bundle = tiny_bundle("int4")
        manifest = load_manifest(bundle)
        needed = needed_files(bundle, experts=f"L*:E{','.join(map(str, sorted(chosen)))}", trunk=False)
        experts = {file.path for entry in manifest.experts if entry.expert in chosen for file in entry.files}
        assert {file.path for file in needed.files} - experts == {MANIFEST_NAME}
        assert experts <= {file.path for file in needed.files}
        assert needed.files[-1].path == MANIFEST_NAME
        for file in needed.files:
            verify_file(bundle, file)

    def test_the_base_station_gets_the_trunk(self, tiny_bundle: Bundle, run_process: Run) -> None:
        bundle = tiny_bundle("int4")
        needed = msgspec.json.decode(run_process("testbed", "fleet", "files", bundle, "--trunk").stdout, type=Needed)
        trunk = {file.path for file in load_manifest(bundle).trunk}
        assert {file.path for file in needed.files} == trunk | {MANIFEST_NAME}

    def test_the_base_station_gets_the_bundle_s_draft_model(self, tiny_bundle: Bundle, tmp_path: Path) -> None:
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle("int4"), bundle)
        manifest = load_manifest(bundle)
        draft = FileEntry(path="draft/model.onnx", bytes=7, sha256="0" * 64)
        (bundle / MANIFEST_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, draft=(draft,))))
        assert draft in needed_files(bundle, experts=None, trunk=True).files
        assert draft not in needed_files(bundle, experts="L*:E0", trunk=False).files

    def test_wrong_experts_are_reported(self, tiny_bundle: Bundle, run_process: Run) -> None:
        done = run_process("testbed", "fleet", "files", tiny_bundle("int4"), "--experts", "L*:E99")
        assert done.returncode == 2
        assert "99" in done.stderr


@has_ansible
class TestOnTheDevice:
    def test_only_missing_and_changed_files_are_sent(self, tiny_bundle: Bundle, tmp_path: Path) -> None:
        wrong_files = module("wdmoe_bundle").wrong_files
        bundle = tiny_bundle("int4")
        files = msgspec.to_builtins(needed_files(bundle, experts="L*:E0", trunk=False).files)
        device = tmp_path / "bundle"
        device.mkdir()
        assert wrong_files(device, files) == [file["path"] for file in files]
        for file in files:
            (device / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(bundle / file["path"], device / file["path"])
        assert wrong_files(device, files) == []
        # As a failing card does it: same size, same time.
        victim = device / files[1]["path"]
        before = victim.stat()
        raw = bytearray(victim.read_bytes())
        raw[1000] ^= 1
        victim.write_bytes(raw)
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        (device / files[0]["path"]).unlink()
        assert wrong_files(device, files) == [files[0]["path"], files[1]["path"]]

    def test_releases_are_switched_rolled_back_and_pruned(self, tmp_path: Path) -> None:
        release = module("wdmoe_release")
        root, history = tmp_path / "opt", tmp_path / "releases.log"

        def install(name: str, age_s: int) -> None:
            folder = root / "releases" / name
            folder.mkdir(parents=True)
            (folder / release.COMPLETE).touch()
            os.utime(folder, (10**9 - age_s, 10**9 - age_s))

        for age, name in enumerate(("d", "c", "b", "a")):
            install(name, age)
        assert release.switch(root, "a", history, check=False)
        assert not release.switch(root, "a", history, check=False)
        assert release.switch(root, "b", history, check=True)
        assert (root / "current").readlink() == Path("releases/a")
        assert release.switch(root, "b", history, check=False)
        # d does not serve: the next rollback must not choose it.
        assert release.switch(root, "d", history, check=False)
        assert release.restore(root, "b", "a", history, check=True)
        assert release.linked(root / "current") == "d"
        assert release.restore(root, "b", "a", history, check=False)
        assert [release.linked(root / link) for link in ("current", "previous")] == ["b", "a"]
        assert not release.restore(root, "b", None, history, check=False)
        assert release.linked(root / "previous") == "a"
        assert release.switch(root, "d", history, check=False)
        # a is the oldest and not in use; c is, too, but among the newest two.
        assert release.prune(root, 2, check=False) == ["a"]
        assert {path.name for path in (root / "releases").iterdir()} == {"b", "c", "d"}
        assert [line.split(" ", 1)[1] for line in history.read_text().splitlines()] == [
            "switched to a from nothing", "switched to b from a", "switched to d from b", "switched to b from d",
            "d did not serve", "switched to d from b",
        ]  # fmt: skip
        # The switch to d has removed a.
        assert release.restore(root, "b", "a", history, check=False)
        assert [release.linked(root / link) for link in ("current", "previous")] == ["b", None]
        (root / "releases" / "d" / release.COMPLETE).unlink()
        with pytest.raises(release.ReleaseError, match="not installed"):
            release.switch(root, "d", history, check=False)

    def test_a_service_is_stale_if_a_file_it_uses_is_newer(self, tmp_path: Path) -> None:
        service = module("wdmoe_service")
        old = tmp_path / "old"
        old.write_text("")
        os.utime(old, (1, 1))  # a copy keeps its time of modification; that it came now still counts
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                began = service.started_at(process.pid)
                assert abs(began - old.stat().st_ctime) < 5
                assert service.newest_change([old]) == old.lstat().st_ctime
                assert service.newest_change([tmp_path]) >= service.newest_change([old])
            finally:
                process.kill()
        assert service.started_at(0) == 0.0

    @pytest.mark.parametrize(
        ("line", "offset_ms"),
        [
            ("System time     : 0.000012345 seconds slow of NTP time", -0.012),
            ("System time     : 1.500000000 seconds fast of NTP time", 1500.0),
            ("506 Cannot talk to daemon", None),
            ("", None),
        ],
    )
    def test_clock_offsets_have_a_sign(self, line: str, offset_ms: float | None) -> None:
        assert module("wdmoe_status").clock_offset_ms(f"Stratum : 3\n{line}\n") == offset_ms

    def test_the_node_s_service_may_have_the_level_that_the_node_asks_for(self) -> None:
        text = (PLAYBOOKS / "roles/node/templates/wdmoe-node.service.j2").read_text()
        settings = dict(re.findall(r"(?m)^([A-Z]\w+)=(.*)$", text))
        assert settings["LimitRTPRIO"] == str(real_time.LEVEL)
        assert settings.get("RestrictRealtime", "no") == "no"

    @pytest.mark.skipif(bool(real_time.why_not()), reason=f"no real-time priority here: {real_time.why_not()}")
    def test_the_broker_s_service_gives_it_the_same_priority_as_we_do(self) -> None:
        tasks = msgspec.yaml.decode((PLAYBOOKS / "roles/broker/tasks/main.yml").read_bytes())
        (content,) = (task["ansible.builtin.copy"]["content"] for task in tasks if "real-time" in task["name"])
        (command,) = re.findall(r"(?m)^ExecStartPost=-\+(.*)$", content)
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                # Its path is Debian's; other systems keep chrt elsewhere.
                argv = command.replace("/usr/bin/", "").replace("$MAINPID", str(process.pid)).split()
                subprocess.run(argv, check=True, timeout=60)
                assert real_time.lower_thread(process.pid)  # only if the priority is just as `raise_thread` gives it
            finally:
                process.kill()


@has_ansible
class TestInventory:
    def test_ansible_understands_the_playbooks(self) -> None:
        example, playbooks = PLAYBOOKS.parent / "example.yaml", sorted(PLAYBOOKS.glob("*.yml"))
        assert len(playbooks) >= 7
        done = subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "--syntax-check", "-i", example, *playbooks],
            env={"LC_ALL": "C.UTF-8", **os.environ, "ANSIBLE_CONFIG": str(PLAYBOOKS / "ansible.cfg")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr

    def test_the_example_is_one(self, tmp_path: Path, run_process: Run) -> None:
        path = tmp_path / "fleet.yaml"
        assert run_process("testbed", "fleet", "init", path).returncode == 0
        read = read_inventory(path)
        assert (read.base_station, read.nodes) == ("laptop", ["pi5", "pi4", "orin", "nuc"])
        assert read.address() == "192.168.1.10"
        assert read.path("pi4", "wdmoe_bundle") == tmp_path / "bundle-int8-dynamic"
        again = run_process("testbed", "fleet", "init", path)
        assert again.returncode == FleetError.exit_code
        done = run_process("testbed", "fleet", "up", "-i", path)
        assert done.returncode == BundleError.exit_code
        assert "bundle" in done.stderr

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("all: {hosts: {a: {}}}", "one host in the group 'base_station'"),
            ("all: {children: {base_station: {hosts: {a: {}, b: {}}}, nodes: {hosts: {c: {}}}}}", "it has 2 and 1"),
            ("all: {children: {base_station: {hosts: {a: {}}}}}", "it has 1 and 0"),
        ],
    )
    def test_an_inventory_of_another_shape_is_refused(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        with pytest.raises(FleetError, match=re.escape(said)):
            read_inventory(path)

    def test_the_inventory_overrides_defaults_of_every_group(self, tmp_path: Path) -> None:
        path = tmp_path / "fleet.yaml"
        path.write_text(
            "all: {vars: {wdmoe_clock: false}, children: {base_station: {hosts: {a: {}}},"
            " nodes: {vars: {wdmoe_python: python3.11}, hosts: {b: {wdmoe_cpu_governor: ''}, c: {}}}}}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "ansible", "inventory", "-i", path, "--playbook-dir", PLAYBOOKS, "--list"],
            env={"LC_ALL": "C.UTF-8", **os.environ, "ANSIBLE_CONFIG": str(PLAYBOOKS / "ansible.cfg")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        hosts = msgspec.json.decode(done.stdout)["_meta"]["hostvars"]
        names = ("wdmoe_clock", "wdmoe_python", "wdmoe_cpu_governor")
        assert [[hosts[host][name] for name in names] for host in "abc"] == [
            [False, "python3", "performance"], [False, "python3.11", ""], [False, "python3.11", "performance"]
        ]  # fmt: skip

    def test_a_missing_inventory_names_the_command_that_makes_one(self, tmp_path: Path, run_process: Run) -> None:
        done = run_process("testbed", "fleet", "status", "-i", tmp_path / "none.yaml")
        assert done.returncode == FleetError.exit_code
        assert "fleet init" in done.stderr

    def test_a_host_that_can_not_be_reached_is_one_line(
        self, tiny_bundle: Bundle, tmp_path: Path, run_process: Run
    ) -> None:
        path = inventory(tmp_path, tiny_bundle("int4"), a="L*:E*")
        text = path.read_text().replace("10.0.0.0", "127.0.0.1\n          ansible_port: 1")
        path.write_text(
            text.replace("ansible_connection: local\n", "ansible_host: 127.0.0.1\n          ansible_port: 1\n")
        )
        done = run_process("testbed", "fleet", "down", "-i", path)
        assert done.returncode == FleetError.exit_code
        assert done.stderr.strip().splitlines()[-1].startswith("wdmoe-testbed: error: ")
        assert "Traceback" not in done.stderr


@has_ansible
@pytest.mark.parametrize(
    "prompt",
    [
        "{{ lookup('pipe', 'touch evaluated') }} {% raw %} {# comment #}",
        "\"double\" 'single' \\ $(touch evaluated) `touch evaluated`\nsecond line: {{ wdmoe_state }}",
        '{"json": [1, 2]}',
    ],
)
def test_a_prompt_is_data_and_never_a_template(prompt: str, run_process: Run, tmp_path: Path) -> None:
    path = local_inventory(tmp_path, tmp_path, "pi5")
    program(tmp_path / "bin", "wdmoe-fleet-bs", "cat")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = run_process("testbed", "fleet", "ask", "-i", path, prompt, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{prompt}\n"
    assert not list(tmp_path.rglob("evaluated"))


@pytest.mark.slow
@has_ansible
class TestPlaybooks:
    """On this machine, with a systemctl of the test's own."""

    def test_check_reports_a_bare_device_and_changes_nothing(
        self, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.as_in(tmp_path, monkeypatch)
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset cpu io pids\n")
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle("int4"), bundle)
        program(tmp_path / "bin", "systemctl", SYSTEMCTL)
        path = local_inventory(tmp_path, bundle, "pi5")
        read = read_inventory(path)
        there = set(tmp_path.rglob("*"))
        assert [line.split(" /")[0] for line in prepare_keys(read, check=True)] == [
            "would make keys of a new cluster in"
        ]
        assert prepare_bundles(read, check=True)[0] == f"would sign {bundle} with the cluster's key"
        hosts = play("site", path, check=True, ansible_facts={"service_mgr": "systemd", "pkg_mgr": "apt"})
        assert set(tmp_path.rglob("*")) == there
        # No part of it is deployed yet, not even keys: the check reports all steps that it can foresee.
        every = {"release : Report that it would be installed", "bundle : Report what would be sent"}
        steps = {
            "Make this release the current one",
            "Install the service",
            "Start the service, or restart it if something changed",
        }
        assert every | {f"node : {step}" for step in steps} <= set(hosts["pi5"].changed_tasks)
        assert every | {"base_station : Install the command"} <= set(hosts["bs"].changed_tasks)
        assert capfd.readouterr().out.count("its kernel has no memory controller") == 1

    def test_a_rollback_after_a_failed_update_skips_the_failed_release(
        self, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = local_inventory(tmp_path, tiny_bundle("int4"), "pi4", "pi5")
        self.as_in(tmp_path, monkeypatch)
        prepare_keys(read_inventory(path))
        for folder in ("wdmoe/keys", "systemd/system"):
            (tmp_path / "etc" / folder).mkdir(parents=True)
        for node in ("pi4", "pi5"):
            (tmp_path / node / "var/bundle").mkdir(parents=True)
            (tmp_path / node / "var/bundle" / MANIFEST_NAME).touch()
        new = tmp_path / "pi5/opt/releases/new"
        program(tmp_path / "bin", "systemd-analyze", "")
        program(
            tmp_path / "bin", "systemctl",
            f'{SYSTEMCTL}[ "$1" != restart ] || [ "$(readlink -f {tmp_path}/pi5/opt/current)" != {new} ]',
        )  # fmt: skip
        release = module("wdmoe_release")
        for host in ("bs", "pi4", "pi5"):
            root, history = tmp_path / host / "opt", tmp_path / host / "var/releases.log"
            history.parent.mkdir(parents=True, exist_ok=True)
            for name in ("older", "old", "new"):
                (root / "releases" / name).mkdir(parents=True)
                (root / "releases" / name / release.COMPLETE).touch()
            for name in ("older", "old"):
                release.switch(root, name, history, check=False)
        release.switch(tmp_path / "bs/opt", "new", tmp_path / "bs/var/releases.log", check=False)

        def links() -> dict[str, list[str]]:
            names = ("current", "previous")
            return {h: [release.linked(tmp_path / h / "opt" / n) for n in names] for h in ("bs", "pi4", "pi5")}

        with pytest.raises(FleetError, match="its old release serves again"):
            play("node", path, wdmoe_release="new", wdmoe_serial=1)
        assert links() == {"bs": ["new", "old"], "pi4": ["new", "old"], "pi5": ["old", "older"]}
        # Fails for another reason, with nothing new: it keeps what it has.
        release.switch(tmp_path / "pi5/opt", "new", tmp_path / "pi5/var/releases.log", check=False)
        with pytest.raises(FleetError, match="the node does not start:"):
            play("node", path, wdmoe_release="new", wdmoe_serial=1)
        assert links()["pi5"] == ["new", "old"]
        release.restore(tmp_path / "pi5/opt", "old", "older", tmp_path / "pi5/var/releases.log", check=False)

        hosts = play("rollback", path)
        assert links() == {"bs": ["old", "new"], "pi4": ["old", "new"], "pi5": ["old", "older"]}
        assert "Switch the release" not in hosts["pi5"].changed_tasks
        lacks = tmp_path / "pi4/opt/releases/older" / release.COMPLETE
        lacks.unlink()
        with pytest.raises(FleetError, match="pi4: Fail if it is not installed: release older is not installed here"):
            play("rollback", path, wdmoe_target="older")
        assert links() == {"bs": ["old", "new"], "pi4": ["old", "new"], "pi5": ["old", "older"]}
        lacks.touch()
        play("rollback", path, wdmoe_target="older")
        assert links() == {host: ["older", "old"] for host in ("bs", "pi4", "pi5")}

    def test_chrony_gets_addresses_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """chronyd ends at names that do not resolve."""
        self.as_in(tmp_path, monkeypatch)
        path = local_inventory(tmp_path, tmp_path, "by-name", "v4", "v6", "off", "mute")
        read = msgspec.yaml.decode(path.read_bytes())
        nodes = read["all"]["children"]["nodes"]["hosts"]
        nodes["v4"]["ansible_host"], nodes["v6"]["ansible_host"] = "192.168.1.21", "fd00::1:2"
        nodes["off"] |= {"ansible_connection": "ssh", "ansible_host": "off.invalid"}
        nodes["mute"]["wdmoe_python"] = "/nonexistent"
        path.write_bytes(msgspec.yaml.encode(read))
        program(tmp_path / "bin", "systemctl", SYSTEMCTL)
        (tmp_path / "etc/chrony/conf.d").mkdir(parents=True)
        play("clock", path)
        lines = (tmp_path / "etc/chrony/conf.d/wdmoe.conf").read_text().splitlines()
        assert lines[3:6] == ["allow 127.0.0.1", "allow 192.168.1.21", "allow fd00::1:2"]
        assert [line.split(" and ")[0] for line in lines[6:]] == [
            "# off is not allowed: off.invalid is not an address", "# mute is not allowed: mute is not an address"
        ]  # fmt: skip

    def as_in(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All playbooks, and some for one role each, with /etc in `root` and files owned by the current user."""
        copy = root / "playbooks"
        shutil.copytree(PLAYBOOKS, copy)
        for file in (path for path in copy.rglob("*") if path.suffix in (".yml", ".j2")):
            text = re.sub(r"(?m)^ +(owner|group): wdmoe\n", "", file.read_text())
            file.write_text(re.sub(r"(?<= )/(etc|sys/fs/cgroup)/", rf"{root}/\1/", text))
        # As in site.yml.
        node = {"hosts": "nodes", "serial": 1, "any_errors_fatal": True, "roles": ["node"]}
        clock = {"hosts": "base_station", "strategy": "free", "roles": ["clock"]}
        for name, one in (("node", node), ("clock", clock)):
            (copy / f"{name}.yml").write_bytes(msgspec.yaml.encode([one]))
        monkeypatch.setattr("testbed.fleet.ansible.PLAYBOOKS", copy)
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")


class TestPrepare:
    def read(self, folder: Path, bundle: Path, address: str = "10.0.0.9", **experts: str) -> Inventory:
        """An inventory as Ansible would read it."""
        shared = {"wdmoe_bundle": str(bundle), "wdmoe_keys": "keys"}
        nodes = {name: {**shared, "wdmoe_experts": selector} for name, selector in experts.items()}
        return Inventory(folder, "bs", list(nodes), {"bs": {**shared, "wdmoe_address": address}, **nodes})

    def test_keys_are_made_once_and_added_for_new_nodes(self, tiny_bundle: Bundle, tmp_path: Path) -> None:
        bundle = tiny_bundle("int4")
        assert len(prepare_keys(self.read(tmp_path, bundle, a="L*:E*"))) == 1
        first = (tmp_path / "keys/nodes/a/node.key").read_bytes()
        assert prepare_keys(self.read(tmp_path, bundle, a="L*:E*")) == []
        assert "b" in prepare_keys(self.read(tmp_path, bundle, a="L*:E*", b="L*:E*"))[0]
        assert (tmp_path / "keys/nodes/a/node.key").read_bytes() == first
        assert KeyFolder(tmp_path / "keys").nodes == ["a", "b"]
        with pytest.raises(FleetError, match=re.escape("is for 10.0.0.9")):
            prepare_keys(self.read(tmp_path, bundle, address="10.0.0.8", a="L*:E*"))

    def test_no_keys_are_made_where_a_bundle_is_missing(self, tmp_path: Path, run: Run) -> None:
        path = inventory(tmp_path, tmp_path / "no-bundle", a="L*:E*")
        for command in ("up", "update"):
            refused = run("testbed", "fleet", command, "-i", path)
            assert refused.returncode == BundleError.exit_code, refused.stderr
            assert "no-bundle" in refused.stderr
            assert [found.name for found in tmp_path.iterdir()] == ["fleet.yaml"]

    def test_home_assistant_gets_keys_if_the_inventory_asks_for_them(self, tiny_bundle: Bundle, tmp_path: Path) -> None:
        read = self.read(tmp_path, tiny_bundle("int4"), a="L*:E*")
        prepare_keys(read)
        keys = KeyFolder(tmp_path / "keys")
        for value, prefix in ((True, "homeassistant"), ("home", "home")):
            read.variables["bs"]["wdmoe_home_assistant"] = value
            (would,) = prepare_keys(read, check=True)
            assert would.startswith("would make keys for Home Assistant")
            assert keys.home_assistant != prefix
            assert len(prepare_keys(read)) == 1
            assert prepare_keys(read) == []
            assert keys.home_assistant == prefix
            assert f"topic write {prefix}/device/default/a/config" in (tmp_path / "keys/broker/acl").read_text()

    def test_bundles_are_signed_and_experts_without_a_holder_are_reported(
        self, tiny_bundle: Bundle, tmp_path: Path
    ) -> None:
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle("int4"), bundle)
        read = self.read(tmp_path, bundle, a="L*:E0-3", b="L0:E4-7 L1:E4-6")
        prepare_keys(read)
        signed, missing = prepare_bundles(read)
        assert "signed" in signed
        assert "1 experts, such as L01:E7" in missing
        raw = (bundle / MANIFEST_NAME).read_bytes()
        check_signature(raw, bundle, tmp_path / "keys/nodes/a/bundle.pub")
        assert prepare_bundles(read) == [missing]

    def test_bundles_of_different_models_are_refused(self, tiny_bundle: Bundle, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        for bundle in (one, other):
            shutil.copytree(tiny_bundle("int4"), bundle)
        manifest = load_manifest(other)
        source = msgspec.structs.replace(manifest.source, name="another")
        (other / MANIFEST_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, source=source)))
        read = self.read(tmp_path, one, a="L*:E*", b="L*:E*")
        read.variables["b"]["wdmoe_bundle"] = str(other)
        prepare_keys(read)
        with pytest.raises(FleetError, match="different models"):
            prepare_bundles(read)

    def test_an_inventory_without_experts_for_a_node_is_refused_with_what_to_write(
        self, tiny_bundle: Bundle, tmp_path: Path
    ) -> None:
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle("int4"), bundle)
        read = self.read(tmp_path, bundle, a="L*:E*")
        prepare_keys(read)
        del read.variables["a"]["wdmoe_experts"]
        with pytest.raises(FleetError, match="wdmoe_experts"):
            prepare_bundles(read)


def _write_wheel(path: Path, code: str) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", code)
        wheel.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        wheel.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.dist-info/RECORD", "")


def _install(wheels: Path, target: Path) -> int:
    """As the playbook does it."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", f"--find-links={wheels}", "--require-hashes",
         f"--requirement={wheels / LOCK}", f"--target={target}"],
        capture_output=True, check=False,
    ).returncode  # fmt: skip
