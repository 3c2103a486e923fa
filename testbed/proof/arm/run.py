"""Sends the same inputs to nodes on emulated boards and to a node on this machine, and compares their answers.

Times under emulation say nothing about boards, so none are recorded.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import prove_nodes
from bs_coordinator.engine.experts import Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.errors import PlacementError
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from common.files import atomic_write
from common.user_folders import user_path
from testbed import facts
from testbed.demo_assets import demo_model, export_demo_bundle
from testbed.errors import AgreementError
from testbed.evaluation.variants import VARIANTS
from testbed.local_nodes import LocalNodes
from testbed.proof.arm.agreement import SCHEMA, BoardResult, markdown, row_error, tolerance, total_error
from testbed.proof.arm.boards import Board
from testbed.proof.arm.reference import PROMPT, Reference, ask, make_reference
from testbed.proof.arm.site import CLUSTER, Site, open_site
from testbed.proof.arm.userland import Userland, link_our_code, prepare
from wire.experts import ExpertId, parse_selector
from wire.manifest import load_manifest
from wire.tensors import Array, WireDtype

LOCAL_NODE = "here"
_START_TIMEOUT_S = 600.0
"""Importing onnxruntime, hashing and proving take dozens of times as long on an emulated node."""
_LAYER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare.

    Attributes:
        variants: names of bundle variants.
        boards: boards to emulate.
        experts: selector of the experts to compare.
        layers: layers of the demo model.
        rows: hidden states per expert.
        tokens: tokens to generate on each board; 0 for none.
        apt_sources: apt's list of sources with arm64; None for the system's own.
        out: folder for results, bundles and logs.
    """

    variants: Sequence[str]
    boards: Sequence[Board]
    experts: str
    layers: int
    rows: int
    tokens: int
    apt_sources: Path | None
    out: Path


def run_arm(settings: Settings, console: Console) -> list[BoardResult]:
    """Compare, and write `agreement.json` and `agreement.md` after every quantisation.

    Raises:
        AgreementError: a board's answers differ from this machine's by more than the tolerance.
        EmulationError, DownloadError: boards can't be emulated on this machine.
    """
    cache = user_path("cache")
    with console.status("arm64") as status:
        userland = prepare(
            cache, apt_sources=settings.apt_sources, on_progress=lambda what: status.update(f"arm64: {what}")
        )
    model = demo_model(layers=settings.layers, console=console)
    bundles = settings.out / "bundles"
    export_demo_bundle(model, bundles / "fp32", "fp32", console=console)
    dims = load_manifest(bundles / "fp32").dims
    ids = parse_selector(settings.experts, layers=dims.layers, experts=dims.experts)
    reference = make_reference(bundles / "fp32", ids, rows=settings.rows)
    results: list[BoardResult] = []
    with open_site([LOCAL_NODE, *(board.name for board in settings.boards)]) as site:
        for variant in settings.variants:
            scheme, block = VARIANTS[variant]
            export_demo_bundle(model, bundles / variant, scheme, block=block, console=console)
            site.sign(bundles / variant)
            with console.status(f"{variant}: nodes start"):
                results += _compare(variant, bundles / variant, site, ids, reference, userland, settings, console)
            _write(results, userland, settings)
    console.print(markdown(results), soft_wrap=True)
    console.print(f"results in {settings.out / 'agreement.json'} and agreement.md")
    if bad := [f"{r.quantisation} on {r.board}" for r in results if not r.agrees]:
        raise AgreementError(f"answers differ from this machine's by more than the tolerance: {', '.join(bad)}")
    return results


def _compare(
    variant: str, bundle: Path, site: Site, ids: Sequence[ExpertId], reference: Reference,
    userland: Userland, settings: Settings, console: Console,
) -> list[BoardResult]:  # fmt: skip
    nodes = LocalNodes(bundle, site.address, settings.out / "nodes" / variant, cluster=CLUSTER)
    with ExitStack() as stack:
        stack.callback(nodes.stop)
        # This node holds all experts, so that the model is complete.
        nodes.start(LOCAL_NODE, "L*:E*", options=site.node_options(LOCAL_NODE))
        code = link_our_code(settings.out / "code")
        for board in settings.boards:
            nodes.start(
                board.name,
                settings.experts,
                python=userland.python(board),
                environment=userland.environment(code),
                options=["--no-telemetry", *site.node_options(board.name)],  # telemetry would describe this machine
            )
        config = BaseStationConfig(
            bundle=bundle, cluster=CLUSTER, cluster_key=site.cluster_key, wire=WireDtype.FP32,
            nodes_timeout_s=_START_TIMEOUT_S, layer_timeout_s=_LAYER_TIMEOUT_S, degrade=False, draft="none",
        )  # fmt: skip
        station = stack.enter_context(open_base_station(config, site.address))
        _wait_for(nodes, station.dispatcher)
        prove_nodes(station.dispatcher, station.manifest)
        here = _answers(station, LOCAL_NODE, ids, reference, settings.tokens)
        found = []
        for board in settings.boards:
            console.print(f"{variant}: {board.name} answers", style="dim")
            there = _answers(station, board.name, ids, reference, settings.tokens)
            found.append(_result(variant, board, station, ids, reference, here, there))
        return found


def _wait_for(nodes: LocalNodes, dispatcher: Dispatcher) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while missing := nodes.processes.keys() - dispatcher.registry.nodes.keys():
        nodes.check()
        if time.monotonic() > deadline:
            raise PlacementError(f"nodes not announced after {_START_TIMEOUT_S:.0f} s: {', '.join(sorted(missing))}")
        dispatcher.pump(0.2)


class _OneNode:
    """Experts that are all computed by one node."""

    def __init__(self, dispatcher: Dispatcher, node: str) -> None:
        self._dispatcher = dispatcher
        self._node = node

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        return Ready(self._dispatcher.ask(self._node, layer, hidden, gate))

    def forecast(self, layer: int) -> LayerForecast:
        return self._dispatcher.forecast(layer)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Outputs by expert, float32 [rows, hidden], for rows sent alone and together; ids of generated tokens."""

    alone: dict[ExpertId, Array]
    together: dict[ExpertId, Array]
    tokens: list[int]


def _answers(station: BaseStation, node: str, ids: Sequence[ExpertId], reference: Reference, tokens: int) -> _Answers:
    experts, count = _OneNode(station.dispatcher, node), station.manifest.dims.experts
    alone, together = {}, {}
    for id in ids:
        hidden = reference.hidden[id.layer]
        alone[id] = np.concatenate([ask(experts, id, row[None], count) for row in hidden])
        together[id] = ask(experts, id, hidden, count)
    dims = station.manifest.dims
    generated: list[int] = []
    if tokens and len(ids) == dims.layers * dims.experts:
        model = DistributedModel(station.model.trunk, experts, TopK(dims.top_k))
        prompt = station.tokenizer.encode(PROMPT)
        sequence = TokenSequence(model, station.tokenizer)
        generated = [event.id for event in sequence.generate(prompt, SamplingConfig(max_tokens=tokens))]
    return _Answers(alone, together, generated)


def _result(
    variant: str, board: Board, station: BaseStation, ids: Sequence[ExpertId], reference: Reference, here: _Answers,
    there: _Answers,
) -> BoardResult:  # fmt: skip
    manifest = station.manifest
    status = station.dispatcher.registry.nodes[board.name]
    limit, why = tolerance(manifest.quantisation.scheme, dot_product=board.dot_product)
    return BoardResult(
        board=board.name,
        variant=variant,
        quantisation=str(manifest.quantisation),
        tolerance=limit,
        why=why,
        experts=[str(id) for id in ids],
        difference=[
            max(row_error(there.alone[id], here.alone[id]), row_error(there.together[id], here.together[id]))
            for id in ids
        ],
        error=[total_error(there.alone[id], reference.output[id]) for id in ids],
        error_here=[total_error(here.alone[id], reference.output[id]) for id in ids],
        together=[row_error(there.together[id], there.alone[id]) for id in ids],
        tokens=there.tokens,
        tokens_here=here.tokens,
        node=msgspec.to_builtins(status.machine),
        device=msgspec.to_builtins(status.device),
    )


def _write(results: Sequence[BoardResult], userland: Userland, settings: Settings) -> None:
    document: dict[str, Any] = {
        **facts.result_header(SCHEMA),
        "qemu": userland.qemu_version(),
        "boards": [msgspec.to_builtins(board) for board in settings.boards],
        "wheels": userland.wheels(),
        "parameters": {
            "layers": settings.layers, "experts": settings.experts, "rows": settings.rows, "prompt": PROMPT,
        },
        "results": results,
    }  # fmt: skip
    with atomic_write(settings.out / "agreement.json") as file:
        file.write(msgspec.json.format(msgspec.json.encode(document), indent=1))
    with atomic_write(settings.out / "agreement.md") as file:
        file.write(markdown(results).encode())
