"""What compose.yaml runs, run as processes on this machine: broker configuration, commands and health checks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bs_coordinator.broker.processes import free_port, mosquitto_path
from tests.needs import needs
from tests.unit.test_containers import COMPOSE, DOCKERFILE, SERVICES
from tests.waiting import wait_until
from wire.manifest import Scheme

pytestmark = needs("mosquitto", "mosquitto_sub")


@contextmanager
def running(argv: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield
        assert process.poll() is None, log.read_text(errors="replace")
    finally:
        process.terminate()
        process.wait()


def healthy(check: str | list[str]) -> bool:
    return subprocess.run(check, shell=isinstance(check, str), capture_output=True, check=False).returncode == 0


def test_the_services_work_together(tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    broker_port, http_port = free_port(), free_port()
    key = tmp_path / "api.key"
    key.write_text("sesame\n")
    key.chmod(0o600)

    def here(text: str) -> str:
        """A text of the files with this machine's ports and paths."""
        for old, new in {
            "mqtt://broker": f"mqtt://127.0.0.1:{broker_port}", "-h broker": f"-h 127.0.0.1 -p {broker_port}",
            "listener 1883": f"listener {broker_port} 127.0.0.1", "/bundle/demo": str(tiny_bundle("int4")),
            "/run/secrets/api_key": str(key), "0.0.0.0": "127.0.0.1", "8080": str(http_port),  # noqa: S104
        }.items():  # fmt: skip
            text = text.replace(old, new)
        return text

    config = tmp_path / "mosquitto.conf"
    user = "user root\n" if os.getuid() == 0 else ""
    config.write_text(here(COMPOSE["configs"]["mosquitto"]["content"]) + user)
    packages = {"node0": "edge_node", "node1": "edge_node", "base-station": "bs_coordinator"}
    with ExitStack() as stack:
        stack.enter_context(running([str(mosquitto_path()), "-c", str(config)], tmp_path / "broker.log"))
        broker_check = [word.replace("$$", "$") for word in SERVICES["broker"]["healthcheck"]["test"][1:]]
        wait_until(lambda: healthy([*broker_check, "-p", str(broker_port)]), "the broker")
        node_checks = [here(SERVICES[node]["healthcheck"]["test"][1]) for node in ("node0", "node1")]
        assert not any(map(healthy, node_checks))
        for name, package in packages.items():
            command = [here(word) for word in SERVICES[name]["command"]]
            stack.enter_context(running([sys.executable, "-m", package, *command], tmp_path / f"{name}.log"))
        wait_until(lambda: all(map(healthy, node_checks)), "the nodes")
        (line,) = [line for line in DOCKERFILE.splitlines() if "urlopen(" in line and "CMD" in line]
        code = here(line.partition('"-c", "')[2].removesuffix('"]'))
        wait_until(lambda: healthy([sys.executable, "-c", code]), "the base station", poll_s=0.5)


def test_the_health_check_of_a_node_fails_after_its_last_will(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\n" + ("user root\n" if os.getuid() == 0 else "")
    )
    check = SERVICES["node0"]["healthcheck"]["test"][1].replace("-h broker", f"-h 127.0.0.1 -p {port}")
    topic = "wdmoe/v1/default/nodes/node0/status"
    with running([str(mosquitto_path()), "-c", str(config)], tmp_path / "broker.log"):
        for state, expected in (("online", True), ("offline", False)):
            publish = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(port), "-r", "-t", topic]
            message = f'{{"schema":1,"node":"node0","state":"{state}"}}'
            wait_until(lambda m=message, p=publish: healthy([*p, "-m", m]), "the broker")  # type: ignore[misc]
            assert healthy(check) is expected
