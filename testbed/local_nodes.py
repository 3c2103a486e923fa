"""Edge nodes as `wdmoe-node` processes on this machine, instead of on devices."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bs_coordinator.broker.processes import die_with_parent, stop_child
from common.errors import WdmoeError
from wire.broker_address import BrokerAddress


def node_argv(
    bundle: Path,
    address: BrokerAddress,
    node: str,
    experts: str,
    *,
    cluster: str = "default",
    threads: int = 1,
    options: Sequence[str] = (),
    python: Sequence[str] = (sys.executable,),
) -> list[str]:
    """The command of a node on this machine; the arguments are those of `LocalNodes.start`."""
    return [
        *(*python, "-m", "edge_node", "--bundle", str(bundle)),
        *("--broker", str(address), "--id", node, "--experts", experts),
        *("--cluster", cluster, "--threads", str(threads)),
        # A broker beyond loopback is on an emulated network of this machine.
        *([] if address.tls or address.on_loopback else ["--allow-plaintext"]),
        *options,
    ]


def blas_threads(threads: int) -> dict[str, str]:
    """Environment of a process that shares this machine with others: BLAS must not take every core."""
    return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


class LocalNodes:
    """Node processes by node id; each writes its log to `<folder>/<id>.log`."""

    def __init__(self, bundle: Path, address: BrokerAddress, folder: Path, *, cluster: str = "default") -> None:
        self.bundle = bundle
        self.address = address
        self.cluster = cluster
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, Callable[[], None]] = {}
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
        """Start a node's process, and return before it is ready.

        Args:
            node: node id.
            experts: selector of its experts.
            threads: threads for computing.
            prefix: words to put before the command, for example to run it in a network namespace.
            options: further options of `wdmoe-node`.
            python: command that runs Python, for example for another processor.
            environment: further environment variables.
        """
        self._starts[node] = partial(
            self.start, node, experts, threads=threads, prefix=prefix, options=options, python=python,
            environment=environment,
        )  # fmt: skip
        argv = node_argv(
            self.bundle, self.address, node, experts, cluster=self.cluster, threads=threads, options=options,
            python=python,
        )  # fmt: skip
        with self.log_path(node).open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [*prefix, *die_with_parent(argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **blas_threads(threads), **(environment or {})},
            )

    def restart(self, node: str) -> None:
        """Start a node again as it was started; its log is continued."""
        self._starts[node]()

    def log_path(self, node: str) -> Path:
        """Path of a node's log."""
        return self._folder / f"{node}.log"

    def check(self) -> None:
        """Check that all nodes are running.

        Raises:
            WdmoeError: a node has ended; the message contains the last line of its log.
        """
        for node, process in self.processes.items():
            if process.poll() is not None:
                lines = self.log_path(node).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise WdmoeError(f"node '{node}' ended: {lines[-1] if lines else 'no output'}")

    def stop(self) -> None:
        """Terminate all nodes at once, and wait until they have ended."""
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
    options: Sequence[str] = (),
) -> Iterator[LocalNodes]:
    """Run nodes for the duration of the context.

    Meanwhile torch in this process has only as many threads as the nodes leave cores: its idle threads spin, on cores
    that nodes and network need.

    Args:
        experts_by_node: selector of experts by node id.
        threads: threads per node.
        prefixes: by node, the words to put before its command.
        options: further options of `wdmoe-node`.
    """
    # Imported here because it is slow, and `LocalNodes` alone does not need it.
    import torch

    nodes = LocalNodes(bundle, address, folder)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - threads * len(experts_by_node)))
    try:
        for node, experts in experts_by_node.items():
            nodes.start(node, experts, threads=threads, prefix=(prefixes or {}).get(node, ()), options=options)
        # Most wrong settings end a node at once: report that now rather than after a timeout.
        time.sleep(0.2)
        nodes.check()
        yield nodes
    finally:
        torch.set_num_threads(before)
        nodes.stop()
