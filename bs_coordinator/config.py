"""How a base station is configured. The options of `wdmoe-bs` are made from these classes.

This module imports none of the base station's other modules, so that `--help` needs no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from common.config import Config, ConfigError, Option
from common.names import check_host, check_origin
from common.real_time import Priority
from wire.broker_url import Access, check_broker_url
from wire.tensors import WireDtype
from wire.topics import check_name

PRIVATE_BROKERS = ("embedded", "mosquitto")
"""Values of `--broker` that start a broker on loopback instead of naming one by its URL."""
TrunkDtype = Literal["fp32", "bf16", "fp16"]
"""What the trunk computes in."""
TrunkQuantisation = Literal["none", "int8", "int4"]
"""How the trunk keeps the weights of its linear layers; none is its dtype."""
DraftMode = Literal["none", "ngram", "dense", "auto"]
"""How tokens are drafted: not at all, by look-up in the text so far, by the draft model, or by whichever pays off."""
PresetName = Literal["fast", "exact", "field"]
"""A choice of the options that trade time for quality (`bs_coordinator.presets`)."""

_MODEL, _CONNECTION, _EXPERTS, _LIMITS, _LOGS = "Model", "Connection", "Experts and policies", "Limits", "Logs"
"""Headings of `--help`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Config):
    """Bundle, broker and nodes."""

    bundle: Annotated[Path, Option("Bundle of the model: a folder made by wdmoe-export.", heading=_MODEL)]
    broker: Annotated[
        str,
        Option(
            "MQTT broker: mqtt://[user@]host[:port] or mqtts://…; 'embedded' or 'mosquitto' starts a private one on "
            "loopback.",
            check=lambda broker: None if broker in PRIVATE_BROKERS else check_broker_url(broker),
            heading=_CONNECTION,
        ),
    ] = "embedded"
    broker_port: Annotated[
        int, Option("Port of a private broker; 0 takes any free one.", minimum=0, maximum=65535, heading=_CONNECTION)
    ] = 0
    cluster: Annotated[
        str,
        Option(
            "Name that keeps clusters on one broker apart.",
            check=lambda name: check_name("cluster", name),
            heading=_CONNECTION,
        ),
    ] = "default"
    cluster_key: Annotated[
        Path | None,
        Option(
            "Key that authenticates frames between base station and nodes; a file of mode 600.", heading=_CONNECTION
        ),
    ] = None
    bundle_key: Annotated[
        Path | None, Option("Refuse bundles that this Ed25519 public key did not sign.", heading=_MODEL)
    ] = None
    priority: Annotated[
        Priority,
        Option(
            "Real-time priority for the thread that generates and for a private broker, where permitted: a busy "
            "machine answers as fast as a quiet one. 'normal': never.",
            heading=_CONNECTION,
        ),
    ] = "auto"
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True)
class ResidentConfig(Config):
    """Experts kept on the base station.

    Attributes:
        budget_bytes: 0 for none; None as well, unless a preset chooses.
        traffic: file that counts how often experts are asked for, for the next start; not kept if None.
    """

    budget_bytes: Annotated[
        int | None,
        Option(
            "RAM for experts that the base station computes itself, such as 2G.  [default: none]",
            flag="--resident", size=True, minimum=0, heading=_EXPERTS,
        ),
    ] = None  # fmt: skip
    begin_with: Annotated[
        Path | None,
        Option(
            "latency.csv of an earlier run: decides which experts to keep until traffic has been counted here.",
            flag="--resident-from", exists=True, heading=_EXPERTS,
        ),
    ] = None  # fmt: skip
    prepacked: Annotated[
        Path | None,
        Option("Folder for prepacked copies of these experts, which are mapped from disk.", heading=_EXPERTS),
    ] = None
    traffic: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStationConfig(ClusterConfig):
    """Model and base station.

    Attributes:
        given: names of the fields that the user set, also to their defaults; a preset leaves them as they are. Fields
            that differ from their defaults count as set in any case.
    """

    preset: Annotated[
        PresetName | None,
        Option(
            "Choose drafts, wire, policy, local experts and logs by the measured links and free memory, and print the "
            "choice: fast (some quality for time), exact (the model's own answers), field (reproducible, for "
            "experiments). Options given beside it stay as they are.",
            heading=_EXPERTS,
        ),
    ] = None

    device: Annotated[str, Option("Device of the trunk: cpu, cuda, cuda:1, …", heading=_MODEL)] = "cpu"
    dtype: Annotated[TrunkDtype, Option("Number format of the trunk.", heading=_MODEL)] = "fp32"
    trunk_quantisation: Annotated[
        TrunkQuantisation,
        Option(
            "Number format of the trunk's large weights (attention's products, the head, shared experts); none keeps "
            "--dtype.",
            heading=_MODEL,
        ),
    ] = "none"
    wire: Annotated[
        WireDtype, Option("Number format of hidden states in messages to and from nodes.", heading=_EXPERTS)
    ] = WireDtype.FP16
    policy: Annotated[
        str, Option("Policy that chooses experts: NAME or NAME:OPTION=VALUE,… (docs/policies.md).", heading=_EXPERTS)
    ] = "topk"
    nodes_timeout_s: Annotated[
        float,
        Option(
            "Seconds to wait at the start until every expert has a node.",
            flag="--nodes-timeout",
            minimum=0,
            heading=_LIMITS,
        ),
    ] = 60.0
    layer_timeout_s: Annotated[
        float,
        Option("Seconds that one layer may wait for its nodes.", flag="--layer-timeout", minimum=0.1, heading=_LIMITS),
    ] = 30.0
    degrade: Annotated[
        bool,
        Option(
            "Continue with the next best experts when no node answers for an expert; such answers are marked.",
            heading=_EXPERTS,
        ),
    ] = True
    draft: Annotated[
        DraftMode,
        Option(
            "How to make draft tokens, of which a step checks several: not at all, by look-up, with a draft model, or "
            "whichever pays off and leaves answers unchanged.",
            heading=_MODEL,
        ),
    ] = "auto"
    draft_model: Annotated[
        Path | None, Option("Folder of the draft model.  [default: the bundle's own, if it has one]", heading=_MODEL)
    ] = None
    shared_air: Annotated[
        bool, Option("All nodes share one Wi-Fi channel: their air times add up in estimates.", heading=_EXPERTS)
    ] = False
    link_log: Annotated[
        Path | None, Option("Append every link sample to this file; 'wdmoe-bs replay' reads it.", heading=_LOGS)
    ] = None
    stay_awake: Annotated[
        bool, Option("Disable this machine's CPU idle states: lower latency, more power.", heading=_MODEL)
    ] = False
    resident: ResidentConfig = field(default_factory=ResidentConfig)
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        chosen_later = self.resident.budget_bytes is None and self.preset in ("exact", "fast")
        if self.resident.budget_bytes or chosen_later:
            return
        for flag, path in (("--resident-from", self.resident.begin_with), ("--prepacked", self.resident.prepacked)):
            if path is not None:
                raise ConfigError(f"{flag}: no experts are kept here: give --resident as well, or --preset fast")


def check_seed(seed: int) -> None:
    """Refuse what torch's random generator does not take as a seed.

    Raises:
        ValueError: the seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{seed} does not fit into 64 bits")


@dataclass(frozen=True, slots=True)
class SamplingConfig(Config):
    """Sampling.

    Attributes:
        skip: draws already made by an earlier process, for the same `seed`.
        min_tokens: no end token is chosen before so many new tokens.
        ignore_eos: end tokens do not end the answer.
        logprobs: for each new token, keep its log-probability and those of so many of the most probable tokens; None
            for none of them.
        prompt_logprobs: keep them for the prompt's tokens as well, which are then all computed.
    """

    max_tokens: Annotated[int, Option("Stop after this many new tokens.", minimum=1)] = 256
    temperature: Annotated[
        float, Option("0 (and anything below 0.0001) always takes the most probable token.", minimum=0, maximum=10)
    ] = 0.0
    top_p: Annotated[
        float, Option("Probability mass to draw from; 1 means all tokens.", minimum=0, maximum=1, positive=True)
    ] = 1.0
    seed: Annotated[int, Option("Seed of the draw: the same seed gives the same tokens.", check=check_seed)] = 0
    skip: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class ServeConfig(Config):
    """HTTP server."""

    host: Annotated[str, Option("Address to listen on.", check=check_host)] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on.", minimum=1, maximum=65535)] = 8080
    max_live: Annotated[int, Option("Answers generated at the same time.", minimum=1, maximum=256, heading=_LIMITS)] = 8
    max_waiting: Annotated[
        int,
        Option(
            "Further requests that may wait; the rest get status 429 and a time to retry.", minimum=0, heading=_LIMITS
        ),
    ] = 16
    api_key_file: Annotated[
        Path | None, Option("File of mode 600 with the API key that callers must send; required beyond loopback.")
    ] = None
    api_keys_file: Annotated[
        Path | None,
        Option(
            "File of mode 600 with API keys by name: lines NAME KEY, or NAME KEY REQUESTS to limit how many requests "
            "this key may have at the same time."
        ),
    ] = None
    model_alias: Annotated[
        tuple[str, ...], Option("Further name under which requests may ask for the model; repeatable.")
    ] = ()
    request_log: Annotated[
        Path | None,
        Option(
            "Append a line of JSON for each request to this file: key, tokens, times, status; no text.", heading=_LOGS
        ),
    ] = None
    trace: Annotated[
        bool,
        Option(
            "Send OpenTelemetry traces of answers to OTEL_EXPORTER_OTLP_ENDPOINT, or to http://localhost:4318 "
            "(docs/metrics.md).",
            heading=_LOGS,
        ),
    ] = False
    cors_origin: Annotated[
        str,
        Option(
            "Origin of web pages that may call the server, besides this machine's, such as https://chat.example.",
            check=lambda origin: check_origin(origin) if origin else None,
        ),
    ] = ""
