"""The arms: which programs each runs on which device, with which arguments. Pure.

An arm of ours is a row of `OURS`. Other programs' arms are named `llama` (llama.cpp on the base station alone),
`llama-N` (its layers on N workers) and `dllama-N` (distributed-llama on N nodes, one of which is on the base station).
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bs_coordinator.placement.predict import MESSAGE_BYTES
from testbed.local_nodes import blas_threads, node_argv
from testbed.network.daemon import BASE_STATION
from testbed.node_shares import selectors_of
from testbed.versus import floors
from testbed.versus.floors import Floor, Shape
from wire.broker_address import BrokerAddress
from wire.frames import HEADER_BYTES, RESULT_BYTES, ROW_BYTES
from wire.manifest import Dims
from wire.tensors import WireDtype

OURS: Mapping[str, tuple[str, ...]] = {
    "ours": ("--draft", "none"),
    "ours-drafts": ("--draft", "auto"),
    "ours-fast": ("--preset", "fast"),
}
"""Options of `wdmoe-bs serve`, by arm."""

_OTHERS = re.compile(r"(llama|dllama)-([1-9]\d?)|llama")
_CONTEXT_TOKENS = 2048
_HEAD_PORT, _WORKER_PORT = 20000, 20100
_LOOPBACK = "127.0.0.1"
_BY_LINE = ("stdbuf", "-oL")
"""Lets a program that would write its log in blocks write it line by line, so that its last words are not lost."""
_HEAD_HERE = "^(output|token_embd)=CPU"
_NO_BACKTRACE: Mapping[str, str] = MappingProxyType({"GGML_NO_BACKTRACE": "1"})
"""Leaves the reason why llama.cpp aborts as the last line of its log."""
_NO_SAVED_PROMPTS: Mapping[str, str] = MappingProxyType({"LLAMA_ARG_CACHE_RAM": "0"})
"""llama-server otherwise fetches the keys and values of the last prompt from its workers before it reads another one,
which is a part of TTFT. Its option --cache-ram is not known to earlier versions; the variable does not disturb them."""
_ZEROED: Mapping[str, str] = MappingProxyType({"MALLOC_PERTURB_": "255"})
"""Makes glibc fill new memory with zeros: dllama-api takes the token behind the prompt's last for the first to decode,
which is whatever lay there before, and ends with a segmentation fault if that is no token."""


class Program(NamedTuple):
    """A program of an arm.

    Attributes:
        device: where it runs: a node's id, or `BASE_STATION`.
        port: a worker is ready when it listens there; None if the arm's head waits for it by itself.
        environment: variables that it needs.
    """

    device: str
    argv: tuple[str, ...]
    port: int | None = None
    environment: Mapping[str, str] = MappingProxyType({})


class Arm(NamedTuple):
    """An arm, ready to be started.

    Attributes:
        workers: started first.
        head: answers requests at `port` of the base station's loopback.
        ready_path: what the head answers with status 200 once it is ready.
        floor: time of a token on the links; None where the number of steps per token is not known beforehand.
    """

    name: str
    workers: tuple[Program, ...]
    head: Program
    port: int
    ready_path: str
    floor: Floor | None


@dataclass(frozen=True, slots=True)
class Peers:
    """Files of other programs; None where the user named none."""

    llama_server: Path | None = None
    llama_rpc: Path | None = None
    gguf: Path | None = None
    dllama: Path | None = None
    dllama_api: Path | None = None
    dllama_model: Path | None = None
    dllama_tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where arms run.

    Attributes:
        addresses: of the devices, by node id.
        draft_model: for drafts; None for the bundle's own.
        dims: of the bundle.
        threads: of each program on a device.
        head_threads: of each program on the base station.
        trunk: options of `wdmoe-bs serve` for where the trunk is computed.
        start_s: how long a head may take to be ready.
    """

    bundle: Path
    draft_model: Path | None
    shape: Shape
    dims: Dims
    addresses: Mapping[str, str]
    broker: BrokerAddress
    shared_air: bool
    threads: int
    head_threads: int
    start_s: float
    trunk: tuple[str, ...] = ()


def default_arms(peers: Peers, shape: Shape, devices: int) -> list[str]:
    """All arms that these files allow; distributed-llama on as many nodes as it takes."""
    names = [*OURS, "llama", *(f"llama-{n}" for n in (2, 4, 8) if n <= devices)]
    names.append(f"dllama-{min(shape.kv_heads, devices + 1)}")
    return [name for name in names if not missing(name, peers)]


def check_arm(name: str, peers: Peers, devices: int) -> None:
    """Check that an arm can be made.

    Raises:
        ValueError: there is no such arm, a file of it was not named, or there are too few devices.
    """
    if name not in OURS and not _OTHERS.fullmatch(name):
        raise ValueError(f"'{name}' is no arm: use {', '.join(OURS)}, llama, llama-N or dllama-N, with N as a number")
    if options := missing(name, peers):
        raise ValueError(f"the arm '{name}' needs {' and '.join(options)}")
    if (workers := _workers(name)) > devices:
        raise ValueError(f"the arm '{name}' needs {workers} devices besides the base station, there are {devices}")


def missing(name: str, peers: Peers) -> list[str]:
    """Options that name files of an arm, and were not given."""
    if name in OURS:
        return []
    needed = {
        "llama": ("llama_server", "gguf"),
        "dllama": ("dllama", "dllama_api", "dllama_model", "dllama_tokenizer"),
    }[name.partition("-")[0]] + (("llama_rpc",) if name.startswith("llama-") else ())
    return [f"--{field.replace('_', '-')}" for field in needed if getattr(peers, field) is None]


def make_arm(name: str, number: int, place: Place, peers: Peers) -> Arm:
    """The programs of an arm that `check_arm` accepts.

    Args:
        number: of this arm among all that run at the same time; its ports follow from it.
    """
    head_port, port = _HEAD_PORT + number, _WORKER_PORT + number
    devices = list(place.addresses)[: _workers(name)]
    reached = [f"{place.addresses[device]}:{port}" for device in devices]
    if name in OURS:
        return _ours(name, head_port, place)
    make = _llama if name.startswith("llama") else _dllama
    return make(name, devices, reached, head_port, port, place, peers)


def _workers(name: str) -> int:
    """Devices besides the base station that an arm of other programs needs."""
    kind, _, number = name.partition("-")
    if name in OURS or not number:
        return 0
    return int(number) - (kind == "dllama")


_PRIORITY = ("--priority", "normal")
"""That of the other programs: none is to have an advantage beside other work."""


def _ours(name: str, head_port: int, place: Place) -> Arm:
    holds = selectors_of(place.dims, len(place.addresses))
    workers = tuple(
        Program(
            node,
            tuple(
                node_argv(
                    place.bundle, place.broker, node, experts, cluster=name, threads=place.threads, options=_PRIORITY
                )
            ),
        )
        for node, experts in zip(place.addresses, holds.values(), strict=False)
    )
    head = (
        *(sys.executable, "-m", "bs_coordinator", "serve", "--bundle", str(place.bundle)),
        *(
            "--broker",
            str(place.broker),
            "--allow-plaintext",
            "--cluster",
            name,
            "--nodes-timeout",
            f"{place.start_s:g}",
        ),
        *_PRIORITY,
        *place.trunk,
        *("--host", _LOOPBACK, "--port", str(head_port)),
        *(["--shared-air"] if place.shared_air else []),
        *(["--draft-model", str(place.draft_model)] if place.draft_model and "none" not in OURS[name] else []),
        *OURS[name],
    )
    values_bytes = WireDtype.FP16.codec.row_bytes(place.shape.hidden)
    floor = floors.experts(
        place.shape, len(workers), MESSAGE_BYTES + HEADER_BYTES + ROW_BYTES + values_bytes,
        MESSAGE_BYTES + RESULT_BYTES + values_bytes,
    )  # fmt: skip
    # With drafts, a step makes several tokens.
    program = Program(BASE_STATION, head, environment=blas_threads(place.head_threads))
    return Arm(name, workers, program, head_port, "/health", floor if name == "ours" else None)


def _llama(
    name: str, devices: Sequence[str], reached: Sequence[str], head_port: int, port: int, place: Place, peers: Peers
) -> Arm:
    threads = str(place.threads)
    workers = tuple(
        Program(
            device,
            (str(peers.llama_rpc), "--host", place.addresses[device], "--port", str(port), "--threads", threads),
            port,
        )
        for device in devices
    )
    head = (
        *(str(peers.llama_server), "--model", str(peers.gguf), "--host", _LOOPBACK, "--port", str(head_port)),
        *("--ctx-size", str(_CONTEXT_TOKENS), "--parallel", "1"),
        *("--threads", str(place.head_threads), "--threads-batch", str(place.head_threads)),
        # Every layer on the workers, in equal shares; the head stays, as its result is far larger than a hidden state.
        *(("--n-gpu-layers", "999", "--rpc", ",".join(reached), "--override-tensor", _HEAD_HERE) if workers else ()),
        *(("--tensor-split", ",".join("1" for _ in workers)) if workers else ()),
    )
    floor = floors.pipeline(place.shape, len(workers)) if workers else floors.no_network
    environment = {**_NO_BACKTRACE, **_NO_SAVED_PROMPTS, **blas_threads(place.head_threads)}
    return Arm(name, workers, Program(BASE_STATION, head, environment=environment), head_port, "/health", floor)


def _dllama(
    name: str, devices: Sequence[str], reached: Sequence[str], head_port: int, port: int, place: Place, peers: Peers
) -> Arm:
    threads = ("--nthreads", str(place.threads))
    workers = tuple(
        Program(
            device,
            (*_BY_LINE, str(peers.dllama), "worker", "--host", place.addresses[device], "--port", str(port), *threads),
            port,
        )
        for device in devices
    )
    head = (
        *(
            *_BY_LINE,
            str(peers.dllama_api),
            "--model",
            str(peers.dllama_model),
            "--tokenizer",
            str(peers.dllama_tokenizer),
        ),
        *("--host", _LOOPBACK, "--port", str(head_port), "--max-seq-len", str(_CONTEXT_TOKENS), *threads),
        # The only format in which it exchanges sums of 4-bit weights.
        *("--buffer-float-type", "q80"),
        *(("--workers", *reached) if workers else ()),
    )
    floor = floors.tensor_parallel(place.shape, 1 + len(workers))
    return Arm(name, workers, Program(BASE_STATION, head, environment=_ZEROED), head_port, "/v1/models", floor)
