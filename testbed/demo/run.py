"""The demo: the whole system on one machine, with node processes as devices, answers three questions."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.commands.answers import for_terminal
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.answer_stats import AnswerStats, summarise
from bs_coordinator.engine.sequence import TokenEvent
from testbed.demo.next_steps import after_demo
from testbed.demo.up import spread_experts
from testbed.demo_assets import demo_bundle
from testbed.latency_log import LatencyLog
from testbed.local_nodes import local_nodes
from wire.manifest import load_manifest

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why leaves are green.",
    "Write a Python function that adds two numbers.",
)


def run_demo(
    *, model: str, broker: str, questions: Sequence[str], max_tokens: int, nodes: int, runs: Path, console: Console
) -> None:
    """Answer `questions` and print how long each part took.

    Args:
        model: one of `exporter.demo_model.assembly.DEMO_MODELS`.
        broker: `embedded`, `mosquitto` or a URL.
        questions: user messages, answered one after the other.
        max_tokens: maximum length of each answer.
        nodes: number of node processes; node k holds experts k, k + nodes, … of every layer.
        runs: folder for the latency log and the nodes' logs.
        console: where to print.
    """
    bundle = demo_bundle("int4", model=model, console=console)
    held = load_manifest(bundle).dims.experts
    folder = runs / time.strftime("demo-%Y%m%d-%H%M%S")
    console.print(f"starting {min(nodes, held)} nodes and loading the model", style="dim")
    with (
        open_broker(broker) as address,
        local_nodes(bundle, address, folder / "nodes", spread_experts(held, nodes)),
        open_base_station(
            BaseStationConfig(bundle=bundle, degrade=False, draft="none"), address,
            on_progress=lambda line: console.print(f"waiting: {line}", style="dim", markup=False),
        ) as station,
    ):  # fmt: skip
        console.print(
            f"{len(station.nodes_ms)} nodes are ready; broker round trip {station.broker_ms:.2f} ms, one token "
            f"through the slowest node {max(station.nodes_ms.values()):.1f} ms\n",
            style="dim",
        )
        with LatencyLog(folder / "latency.csv") as log:
            answers = [_ask(station, log, i, q, max_tokens, console) for i, q in enumerate(questions)]
    _print_tables(answers, console)
    seconds = sum((a.tokens - 1) * a.tpot_ms for a in answers) / 1000
    if seconds > 0:
        console.print(f"{sum(a.tokens - 1 for a in answers) / seconds:.1f} tokens per second, without drafts\n")
    console.print(f"latency log: {folder / 'latency.csv'}\n", style="dim")
    console.print(after_demo(bundle), highlight=False, markup=False, soft_wrap=True)


def _ask(
    station: BaseStation, log: LatencyLog, number: int, question: str, max_tokens: int, console: Console
) -> AnswerStats:
    console.print(f"[bold]> {question}[/bold]", highlight=False)
    ids = station.tokenizer.encode_chat([{"role": "user", "content": question}])
    events: list[TokenEvent] = []
    for event in station.new_sequence().generate(ids, SamplingConfig(max_tokens=max_tokens)):
        log.append(number, len(events), event)
        events.append(event)
        sys.stdout.write(for_terminal(event.text))
        sys.stdout.flush()
    sys.stdout.write("\n\n")
    return summarise(events)


def _print_tables(answers: Sequence[AnswerStats], console: Console) -> None:
    # Short words on several lines, and no lines between columns: the table must fit into 80 columns.
    table = Table(title="per answer; TPOT and its parts are means per decoded token", box=SIMPLE_HEAD, padding=(0, 0))
    for column in (
        "", "tokens", "tokens\nper s", "TTFT\nms", "TPOT\nms", "trunk\nms", "network\nms", "node\ncompute\nms",
        "node\nwait\nms", "framing\nms", "down\nKiB", "up\nKiB",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for i, a in enumerate(answers, 1):
        parts = (
            a.ttft_ms,
            a.tpot_ms,
            a.trunk_ms,
            a.network_ms,
            a.compute_ms,
            a.wait_ms,
            a.framing_ms,
        )
        table.add_row(
            str(i), str(a.tokens), f"{1000 / a.tpot_ms:.1f}" if a.tpot_ms else "–", *(f"{ms:.1f}" for ms in parts),
            f"{a.down_bytes / 1024:.1f}", f"{a.up_bytes / 1024:.1f}",
        )  # fmt: skip
    console.print(table)
    shares = Table(title="hidden states computed by each node")
    nodes = sorted({node for a in answers for node in a.tokens_by_node})
    for node in nodes:
        shares.add_column(node, justify="right")
    shares.add_row(*(str(sum(a.tokens_by_node.get(node, 0) for a in answers)) for node in nodes))
    console.print(shares)
