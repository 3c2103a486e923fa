"""How a node is configured. The options of `wdmoe-node` are made from these classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from common.config import Config, Option
from common.real_time import Priority
from edge_node.home_assistant import DEFAULT_PREFIX, check_prefix
from wire.broker_url import Access, check_broker_url
from wire.device_profiles import DeviceName, Provider
from wire.topics import check_name

_EXPERTS, _CONNECTION, _LIMITS, _POWER = "Experts and device", "Connection", "Limits", "Telemetry and power"
"""Headings of `--help`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingConfig(Config):
    """Experts and device."""

    bundles: Annotated[
        tuple[Path, ...],
        Option(
            "Folder made by wdmoe-export; repeatable: the same experts in other quantisations, for --tuned.",
            flag="--bundle",
        ),
    ]  # fmt: skip
    experts: Annotated[str, Option("Experts to hold, such as 'L*:E3' or 'L0-14:E0,2 L15:E*'; 'L*:E*/0' for slices.")]
    profile: Annotated[Literal["auto"] | DeviceName, Option("Kind of device: decides threads and provider.")] = "auto"
    provider: Annotated[
        Literal["auto"] | Provider,
        Option(
            "Execution provider of onnxruntime; if a GPU fails its probes, the CPU computes. 'auto' takes the "
            "profile's."
        ),
    ] = "auto"
    memory_budget_bytes: Annotated[
        int | None,
        Option(
            "Refuse to start with experts that need more RAM than this, such as 800M or 2G.",
            flag="--memory-budget",
            size=True,
            heading=_LIMITS,
        ),
    ] = None
    residency: Annotated[
        Literal["all", "lru"],
        Option("Keep all experts in memory, or (lru) as many as fit, and load others when they are asked for."),
    ] = "all"
    bundle_key: Annotated[Path | None, Option("Refuse bundles that this Ed25519 public key did not sign.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig(HoldingConfig):
    """Node."""

    broker: Annotated[
        str, Option("MQTT broker: mqtt://[user@]host[:port] or mqtts://…", check=check_broker_url, heading=_CONNECTION)
    ]
    node: Annotated[
        str,
        Option(
            "Name of this node, unique in its cluster.",
            flag="--id",
            check=lambda name: check_name("node id", name),
            heading=_CONNECTION,
        ),
    ]
    cluster: Annotated[
        str,
        Option(
            "Name that keeps clusters on one broker apart.",
            check=lambda name: check_name("cluster", name),
            heading=_CONNECTION,
        ),
    ] = "default"
    tuned: Annotated[
        Path | None,
        Option(
            "Choose bundle and threads by this file; if it is missing or does not fit, measure and write it first.",
            heading=_EXPERTS,
        ),
    ] = None
    threads: Annotated[
        int | None,
        Option("Threads to compute with.  [default: the profile's]", minimum=1, maximum=256, heading=_EXPERTS),
    ] = None
    max_celsius: Annotated[
        float | None,
        Option(
            "Take no work above this temperature in °C.  [default: no limit]",
            flag="--max-temperature",
            minimum=0,
            heading=_LIMITS,
        ),
    ] = None
    min_free_bytes: Annotated[
        int,
        Option("Take no work with less RAM available than this.", flag="--min-free-memory", size=True, heading=_LIMITS),
    ] = 64 << 20
    prepacked: Annotated[
        Path | None,
        Option("Folder for prepacked copies of experts, which are mapped from disk instead of RAM.", heading=_EXPERTS),
    ] = None
    telemetry: Annotated[
        bool, Option("Report radio, temperatures and power to the base station every second.", heading=_POWER)
    ] = True
    home_assistant: Annotated[
        str | None,
        Option(
            f"Announce this node to Home Assistant, whose discovery prefix is PREFIX ('{DEFAULT_PREFIX}' if left out).",
            bare=DEFAULT_PREFIX,
            metavar="[PREFIX]",
            check=check_prefix,
            heading=_POWER,
        ),
    ] = None
    stay_awake: Annotated[
        bool, Option("Disable this device's CPU idle states: lower latency, more power.", heading=_POWER)
    ] = False
    priority: Annotated[
        Priority,
        Option(
            "Real-time priority for the thread that answers, where permitted: a busy device answers as fast as a quiet "
            "one. 'normal': never.",
            heading=_POWER,
        ),
    ] = "auto"
    frame_key: Annotated[
        Path | None,
        Option("Key that authenticates frames between base station and node; a file of mode 600.", heading=_CONNECTION),
    ] = None
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Config):
    """Choice."""

    prefer: Annotated[
        Literal["token", "batch"],
        Option("Minimise the time of one token, or of a batch, as with drafts or several callers."),
    ] = "token"
    max_error: Annotated[float, Option("Largest relative error of outputs against fp32 to accept.", minimum=0)] = 0.25
    exact: Annotated[bool, Option("Accept only bundles that give a token the same output in every batch.")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig(HoldingConfig):
    """Tuning."""

    tuned: Annotated[Path, Option("File to write the choice to.")]
    threads: Annotated[
        tuple[int, ...],
        Option("Number of threads to try; repeatable.  [default: 1, 2, 4, … the profile's]", minimum=1, maximum=256),
    ] = ()
    rule: Rule = field(default_factory=Rule)
