"""A run: all arms at once on one emulated network, which take turns answering the same prompts on the same links.

Starting arms takes longer than asking them, so each is started once per kind of channel. Arms at rest send no more than
heartbeats. The results are rewritten after each answer.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bs_coordinator.broker.processes import open_broker
from common.cpu_idle import cpu_idle_disabled
from common.errors import WdmoeError
from testbed.network.emulated import EmulatedNetwork, emulated
from testbed.network.uniform import Links, write_network
from testbed.node_shares import Cores
from testbed.versus.arms import Peers, Place, make_arm
from testbed.versus.asking import Asker
from testbed.versus.killing import kill_devices
from testbed.versus.plot import draw_tpot
from testbed.versus.programs import RunningArm
from testbed.versus.results import Results, tables, write_results
from testbed.versus.settings import Settings
from testbed.versus.starting import Starter


def run_versus(settings: Settings, peers: Peers) -> None:
    """Measure, write results to the folder, and print the tables.

    Raises:
        WdmoeError: no arm made an answer that can be measured; the message says why the first failed.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    with cpu_idle_disabled() as stays_awake, _on_cores(settings.cores):
        results = Results(settings.as_results(stays_awake=stays_awake), list(settings.arms))
        write_results(results, settings.folder)  # so that no other run takes the folder
        kill = settings.kill
        for _, links in itertools.groupby(settings.links, key=lambda one: one.shared_air):
            _measure(settings, peers, results, list(links), kill=kill)
            kill = False
    write_results(results, settings.folder)
    draw_tpot(results, settings.links, settings.folder / "tpot.svg")
    settings.console.print(tables(results), highlight=False, markup=False, soft_wrap=True)
    if not any(answer.complete for answer in results.answers):
        first = next(iter(results.failures), None)
        why = f"{first.arm}: {first.why}" if first else "each ended before its second token"
        raise WdmoeError(f"no arm made an answer that can be measured: {why} (logs: {settings.folder / 'logs'})")


@contextmanager
def _on_cores(cores: Cores | None) -> Iterator[None]:
    """This process, the relay and the broker are on the base station's cores; so is what they start, if not moved."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores.station)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _measure(settings: Settings, peers: Peers, results: Results, links: Sequence[Links], *, kill: bool) -> None:
    """Measure on one kind of channel: start all arms, ask them in turns, read their memory, and kill a device of each.

    Args:
        links: of the channel, one after the other.
        kill: whether to kill devices.
    """
    with _site(settings, links) as (network, place), ExitStack() as stack:
        arms = [make_arm(name, number, place, peers) for number, name in enumerate(settings.arms)]
        for arm, one in itertools.product(arms, links):
            results.floors_ms.setdefault(one.profile, {})[arm.name] = arm.floor(one) if arm.floor else None
        asker = Asker(settings, results, network)
        # A preset chooses by the links that it finds.
        network.set_profile(links[0].profile)
        running = {}
        for name, started in Starter(settings, network, asker, _name(links[0])).start(arms, stack).items():
            if isinstance(started, RunningArm):
                running[name] = started
            else:
                asker.give_up(name, links[0], started)
        results.rest_bytes_per_s[links[0].profile] = asker.bytes_per_s_at_rest()
        for prompt in range(len(settings.prompts)):
            for turn, one in enumerate(links, prompt):
                network.set_profile(one.profile)
                names = list(running)
                # Another arm begins each time.
                for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
                    if not asker.ask(running[name], one, prompt):
                        # A head that hangs may still compute and send, beside the arms that go on.
                        running.pop(name).stop()
        for name, left in running.items():
            results.memory.setdefault(name, left.memory())
        write_results(results, settings.folder)
        if kill:
            network.set_profile(links[0].profile)
            kill_devices(asker, running, links[0], results)


def _name(links: Links) -> str:
    return "shared" if links.shared_air else "dedicated"


@contextmanager
def _site(settings: Settings, links: Sequence[Links]) -> Iterator[tuple[EmulatedNetwork, Place]]:
    """The network and a broker; this thread is on the base station meanwhile."""
    # Imported here because it needs Linux and pyroute2.
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION

    spec = settings.folder / "network.yaml"
    write_network(spec, f"bench{os.getpid()}", settings.devices, links)
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address, priority="normal") as broker,
    ):
        # Workers of distributed-llama send to each other.
        namespaces.forward_between_nodes()
        yield network, Place(
            bundle=settings.bundle, draft_model=settings.draft_model, shape=settings.shape,
            dims=settings.dims, addresses={node: network.node_address(node) for node in settings.devices},
            broker=broker, shared_air=links[0].shared_air, threads=settings.threads,
            head_threads=settings.head_threads, start_s=settings.start_s,
            trunk=tuple(word for pair in settings.trunk.items() for word in pair),
        )  # fmt: skip
