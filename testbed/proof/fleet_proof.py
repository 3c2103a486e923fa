"""`make fleet-proof`: deploy from a clone to fresh machines, get an answer, and check redeployment, update, rollback.

Needs root, debootstrap and systemd-nspawn. docs/deploy.md lists what it can't show.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from common.child_output import c_locale, run_parsed
from common.console import run as run_console
from common.files import atomic_write
from testbed.errors import FleetError
from testbed.fleet.wheelhouse import source_root

_SPEC = Path("testbed/proof/machines/four.yaml")
_LAST = "node3"
_QUESTION = "What is the capital of France?"
_STEP_S = 3600.0


class Proof:
    """Runs steps in a clone, and records result and duration of each.

    Args:
        out: new folder for the clone, the machines and the report.
        arm64: run the last node's programs as arm64 with qemu-user.
    """

    def __init__(self, out: Path, *, arm64: bool) -> None:
        self.arm64 = arm64
        self.out = out.absolute()
        self.clone = self.out / "clone"
        self.machines = self.out / "machines"
        self.inventory = self.machines / "fleet.yaml"
        self.steps: list[dict[str, object]] = []

    def step(self, what: str, do: Callable[[], str]) -> str:
        """Run a step, and print and return its result."""
        began = time.monotonic()
        result = do()
        seconds = round(time.monotonic() - began, 1)
        self.steps.append({"step": what, "result": result, "seconds": seconds})
        click.echo(f"{what:52} {result}  ({seconds:.0f} s)")
        return result

    def testbed(self, *arguments: str) -> str:
        """Run `wdmoe-testbed` of the clone, and return its output.

        Raises:
            FleetError: the command failed.
        """
        # `python -m` prefers the packages in the current folder: run there, it imports the clone's code.
        done = subprocess.run(
            [sys.executable, "-m", "testbed", *arguments], cwd=self.clone, capture_output=True,
            encoding="utf-8", errors="replace", timeout=_STEP_S, check=False, stdin=subprocess.DEVNULL, env=c_locale(),
        )  # fmt: skip
        with (self.out / "steps.log").open("a") as log:
            log.write(f"$ wdmoe-testbed {' '.join(arguments)}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            raise FleetError(f"wdmoe-testbed {' '.join(arguments[:2])}: {_last(done.stderr)} ({self.out}/steps.log)")
        return done.stdout

    def fleet(self, command: str, *arguments: str) -> str:
        """Run `wdmoe-testbed fleet` with the machines' inventory, and return its output."""
        return self.testbed("fleet", command, "-i", str(self.inventory), *arguments)

    def shell(self, host: str, script: str) -> str:
        """Run a shell script on a machine as root, and return its output.

        Raises:
            FleetError: the machine can't be reached, or the script failed.
        """
        address = {"bs": "10.79.0.1", **{f"node{k}": f"10.79.0.{k + 2}" for k in range(4)}}[host]
        # sudo does not work under qemu-user.
        user = "root" if self.arm64 and host == _LAST else "pi"
        command = [str(self.machines / "ssh"), "-o", "BatchMode=yes", f"{user}@{address}", "sudo", "sh", "-s"]
        done = subprocess.run(
            command, input=script, capture_output=True, encoding="utf-8", errors="replace", timeout=300, check=False,
            env=c_locale(),
        )  # fmt: skip
        if done.returncode:
            raise FleetError(f"{host}: a script ended with {done.returncode}: {_last(done.stderr)}")
        return done.stdout

    def releases(self) -> set[str]:
        """Names of the current releases of all machines."""
        hosts = json.loads(self.fleet("status", "--json"))
        return {str(now["release"]) for now in hosts.values()}


def _prove(proof: Proof) -> None:
    proof.step("git clone", lambda: _clone(proof))
    up = ["machines", "up", str(_SPEC), "--folder", str(proof.machines)]
    up += ["--arm64", _LAST] if proof.arm64 else []
    proof.step("1. machines up", lambda: _last(proof.testbed(*up)).partition(";")[0])
    proof.step("2. fleet up", lambda: _last(proof.fleet("up")))
    answer = proof.step("3. fleet ask", lambda: _ask(proof))
    proof.step("machines' own CPUs", lambda: " ".join(proof.shell(f"node{k}", "uname -m").strip() for k in range(4)))
    proof.step("fleet up again", lambda: _expect(_last(proof.fleet("up")), "5 hosts, 0 changed"))
    proof.step("a changed byte in an expert, fleet up --limit", lambda: _heal(proof))
    proof.step("a killed node comes back", lambda: _kill(proof))
    before = proof.releases()
    logs = {host: _log(proof, host) for host in ("bs", "node0", _LAST)}
    readme = proof.clone / "README.md"
    readme.write_text(readme.read_text() + "\nAnother release.\n")
    proof.step("another release, fleet update", lambda: _last(proof.fleet("update")))
    after = proof.releases()
    proof.step("releases", lambda: f"{_one(before)} -> {_one(after, but=before)}")
    proof.step("log kept over the update", lambda: _kept(proof, logs))
    proof.step("fleet rollback", lambda: _last(proof.fleet("rollback")))
    proof.step("release is the first again", lambda: _one(proof.releases() & before))
    proof.step("log kept over the rollback", lambda: _kept(proof, logs))
    proof.step("3. fleet ask, same answer", lambda: _expect(_ask(proof), answer))
    proof.step("fleet logs", lambda: _fetched(proof))
    proof.step("fleet uninstall", lambda: _last(proof.fleet("uninstall", "--yes")))
    proof.step("log kept over the removal", lambda: _kept(proof, logs))


def _clone(proof: Proof) -> str:
    command = ["git", "clone", "--quiet", str(source_root()), str(proof.clone)]
    subprocess.run(command, check=True, timeout=600)
    head = ["git", "-C", str(proof.clone), "rev-parse", "--short", "HEAD"]
    done = run_parsed(head, timeout_s=60)
    done.check_returncode()
    return done.stdout.strip()


def _ask(proof: Proof) -> str:
    return " ".join(proof.fleet("ask", _QUESTION, "--max-tokens", "12").split())


def _heal(proof: Proof) -> str:
    file = "/var/lib/wdmoe/bundle/experts/L00/E0.weights"
    hashed = f"sha256sum {file}"
    whole = proof.shell("node0", hashed)
    proof.shell("node0", f"printf 'x' | dd of={file} bs=1 seek=1000 conv=notrunc status=none")
    if proof.shell("node0", hashed) == whole:
        raise FleetError("the byte could not be changed")
    result = _expect(_last(proof.fleet("up", "--limit", "node0")), "1 hosts, 1 changed")
    _expect(proof.shell("node0", hashed), whole)
    return result


def _kill(proof: Proof) -> str:
    proof.shell("node0", "systemctl kill --kill-who=main --signal=KILL wdmoe-node")
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        shown = proof.shell("node0", "systemctl show wdmoe-node -p ActiveState,NRestarts --value").split()
        if "active" in shown and shown != ["active", "0"]:
            return f"{' '.join(shown)} restart"
        time.sleep(2)
    raise FleetError("the node was not started again")


def _log(proof: Proof, host: str) -> str:
    """Log of a host so far: link samples on the base station, the start of the journal on nodes."""
    if host == "bs":
        return proof.shell(host, "cat /var/lib/wdmoe/runs/links.jsonl")
    return proof.shell(host, "journalctl --no-pager -o cat -u wdmoe-node | head -n 40")


def _kept(proof: Proof, logs: dict[str, str]) -> str:
    kept = []
    for host, before in logs.items():
        now = _log(proof, host)
        if not before.strip() or not now.startswith(before):
            raise FleetError(f"the log of {host} has changed or is empty")
        kept.append(f"{host} {len(before.splitlines())} lines {hashlib.sha256(before.encode()).hexdigest()[:8]}")
    return ", ".join(kept)


def _fetched(proof: Proof) -> str:
    folder = proof.out / "logs"
    proof.fleet("logs", "--out", str(folder))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return f"{len(files)} files, {sum((folder / path).stat().st_size for path in files)} bytes"


def _one(releases: set[str], *, but: frozenset[str] | set[str] = frozenset()) -> str:
    if len(releases) != 1 or releases & but:
        raise FleetError(f"all machines should have the same release: {', '.join(sorted(releases))}")
    return next(iter(releases))


def _expect(text: str, start: str) -> str:
    if not text.startswith(start):
        raise FleetError(f"'{text}' should begin with '{start}'")
    return text


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/fleet-proof"), show_default=True)
@click.option("--keep", is_flag=True, help="Leave the machines running.")
@click.option("--arm64", is_flag=True, help="Run one node's programs as arm64 with qemu-user: much slower.")
def cli(out: Path, keep: bool, arm64: bool) -> None:
    """Deploy to fresh machines and check what docs/deploy.md promises."""
    if out.exists():
        raise FleetError(
            f"{out} exists already: run 'wdmoe-testbed machines down --folder {out}/machines' and remove it"
        )
    out.mkdir(parents=True)
    proof = Proof(out, arm64=arm64)
    try:
        _prove(proof)
    finally:
        with atomic_write(out / "proof.json") as file:
            file.write(json.dumps(proof.steps, indent=1).encode())
        if not keep and proof.clone.is_dir():
            proof.testbed("machines", "down", "--folder", str(proof.machines))
            shutil.rmtree(proof.clone)
    click.echo(f"all steps passed; {out}/proof.json, {out}/steps.log")


if __name__ == "__main__":
    run_console(cli, "make fleet-proof", extra="testbed")
