"""Edge nodes as processes on this machine: real `wdmoe-node` processes, only the devices are missing."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bs_coordinator.broker.processes import die_with_parent, stop_child
from common.errors import WdmoeError
from wire.broker_url import BrokerAddress


class LocalNodes:
    """Running node processes, by node id; each writes its log to `<folder>/<id>.log`."""

    def __init__(self, bundle: Path, address: BrokerAddress, folder: Path, *, cluster: str = "default") -> None:
        self.bundle = bundle
        self.address = address
        self.cluster = cluster
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, tuple[str, int, Sequence[str]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        node: str,
        experts: str,
        *,
        threads: int = 1,
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
        python: Sequence[str] = (sys.executable,),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start one node; it is ready when the base station sees it, not when this returns.

        Args:
            prefix: put before the command, for example to run it in a network namespace.
            options: more of `wdmoe-node`'s.
            python: the command that runs Python, for example that of another processor.
            environment: more variables.
        """
        self._started[node] = experts, threads, prefix
        argv = [
            *(*python, "-m", "edge_node", "--bundle", str(self.bundle)),
            *("--broker", str(self.address), "--id", node, "--experts", experts),
            *("--cluster", self.cluster, "--threads", str(threads)),
            # Emulated networks live on this machine.
            *([] if self.address.tls or self.address.on_loopback else ["--allow-plaintext"]),
            *options,
        ]
        with self.log_path(node).open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [*prefix, *die_with_parent(argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # One thread per node is what a shelf of devices has; BLAS must not take every core here.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    "OPENBLAS_NUM_THREADS": str(threads),
                    **(environment or {}),
                },
            )

    def restart(self, node: str) -> None:
        """Start a node again as it was started before; its log goes on."""
        experts, threads, prefix = self._started[node]
        self.start(node, experts, threads=threads, prefix=prefix)

    def log_path(self, node: str) -> Path:
        """Where a node's log goes."""
        return self._folder / f"{node}.log"

    def check(self) -> None:
        """Raise if a node has ended by itself.

        Raises:
            WdmoeError: with the last line of its log.
        """
        for node, process in self.processes.items():
            if process.poll() is not None:
                lines = self.log_path(node).read_text(errors="replace").strip().splitlines()
                raise WdmoeError(f"node '{node}' ended: {lines[-1] if lines else 'no output'}")

    def stop(self) -> None:
        """End all nodes, all at once."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            stop_child(process)


@contextmanager
def local_nodes(
    bundle: Path,
    address: BrokerAddress,
    folder: Path,
    experts_by_node: Mapping[str, str],
    *,
    threads: int = 1,
    prefixes: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[LocalNodes]:
    """A fleet that lives as long as the context. Meanwhile torch has as many threads here as nodes leave cores: its
    pool spins while it waits, on cores that nodes and network need.

    Args:
        prefixes: by node, see `LocalNodes.start`.
    """
    # Imported here: `LocalNodes` does without.
    import torch

    fleet = LocalNodes(bundle, address, folder)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - threads * len(experts_by_node)))
    try:
        for node, experts in experts_by_node.items():
            fleet.start(node, experts, threads=threads, prefix=(prefixes or {}).get(node, ()))
        # Most wrong settings end a node within its first moments; better told now than at a timeout.
        time.sleep(0.2)
        fleet.check()
        yield fleet
    finally:
        torch.set_num_threads(before)
        fleet.stop()
