"""The fields of a plan, as users write them in YAML. docs/experiments.md documents them."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from bs_coordinator.config import DraftMode, PresetName
from common.real_time import Priority
from testbed.plan.limits import RunLimits, Seconds
from testbed.prompts import PROMPTS
from wire.broker_url import Access
from wire.tensors import WireDtype

Count = Annotated[int, Meta(ge=1, le=10**9)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Range = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=2, max_length=2)]
"""First and one past the last. Not a fixed-length tuple: msgspec 0.22 crashes on those in garbage collection."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Where = Literal["distributed", "in-process"]
Form = Literal["question", "continuation", "blank"]
"""How a multiple-choice item is put to the model, as `testbed.evaluation.data_sets.alternatives` defines."""
DEFAULT_PROFILE = "default"
"""Name of the link profile of a network that has only one."""


class Broker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A broker that is already running.

    Attributes:
        broker: URL.
        password_file, tls_key, cluster_key: paths; the files are only read when connecting.
    """

    broker: str
    cluster: str = "default"
    password_file: str | None = None
    ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    cluster_key: str | None = None
    allow_plaintext: bool = False

    @property
    def access(self) -> Access:
        """The credentials for the connection."""
        names = ("password_file", "ca_file", "tls_cert", "tls_key")
        password, ca, cert, key = (Path(p) if (p := getattr(self, name)) else None for name in names)
        return Access(password, ca, cert, key, allow_plaintext=self.allow_plaintext)


class Network(Struct, frozen=True, forbid_unknown_fields=True):
    """A network other than this machine's loopback; exactly one attribute is set.

    Attributes:
        emulated: file that describes the links between node processes.
        external: broker of nodes that are already running, usually on physical devices.
    """

    emulated: str | None = None
    external: Broker | None = None


class Generate(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="generate"):
    """Answers to prompts, on which latency is measured.

    Attributes:
        prompts: texts, or the number of built-in prompts.
        prompts_per_cell: number of prompts per repetition; the next repetition continues with those that follow. All
            prompts if not set.
        max_tokens: most tokens per answer.
        seed: seed of sampling; each repetition adds its number.
        draft: how draft tokens are made (`bs_coordinator.engine.speculation`); answers don't depend on it. If not set,
            as the plan's preset says, and not at all without one.
        repetitions: overrides the plan's.
    """

    name: Name = "generate"
    prompts: Annotated[tuple[str, ...], Meta(min_length=1)] | Annotated[int, Meta(ge=1, le=len(PROMPTS))] = 4
    prompts_per_cell: Count | None = None
    max_tokens: Count = 32
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Seed = 0
    draft: DraftMode | None = None
    repetitions: Count | None = None

    @property
    def where(self) -> Where:
        """Always on nodes, because latency is measured."""
        return "distributed"

    def prompts_of(self, repetition: int) -> list[tuple[int, str]]:
        """The prompts of a repetition, each with its number in the workload."""
        texts = PROMPTS[: self.prompts] if isinstance(self.prompts, int) else self.prompts
        numbered = list(enumerate(texts))
        if self.prompts_per_cell is None:
            return numbered
        start = repetition * self.prompts_per_cell
        return [numbered[(start + i) % len(texts)] for i in range(min(self.prompts_per_cell, len(texts)))]


class Items(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Items of a data set, on which accuracy is measured.

    Attributes:
        dataset: JSON Lines file (`testbed.evaluation.data_sets`), relative to `--data` or else to the plan.
        items: number of items, or [first, one past the last].
        batch: items per forward step.
        where: on the nodes, or with all experts in this process and the nodes' measured costs.
        choosing: whether the tokens of a step choose their experts together, as in batches, or each on its own, as in
            decoding. `alone` works only in this process, because nodes would still be asked by batches.
        repetitions: overrides the plan's.
    """

    dataset: str
    name: Name = "items"
    items: Count | Range = 100
    batch: Annotated[int, Meta(ge=1, le=16)] = 8
    where: Where = "distributed"
    choosing: Literal["together", "alone"] = "together"
    repetitions: Count | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first item, and one past the last."""
        return (0, self.items) if isinstance(self.items, int) else (self.items[0], self.items[1])

    @property
    def count(self) -> int:
        """Number of items."""
        return self.span[1] - self.span[0]


class Choice(Items, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="choice"):
    """Multiple choice.

    Attributes:
        form: how an item is put to the model (`testbed.evaluation.data_sets.alternatives`).
    """

    name: Name = "choice"
    form: Form = "question"


class LastWord(Items, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="last-word"):
    """Prediction of the last word of texts: how often greedy decoding gives it, and its perplexity."""

    name: Name = "last-word"


class Perplexity(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="perplexity"):
    """Loss on texts, from which perplexity is computed.

    Attributes:
        texts: texts, or the number of texts per domain of `dataset`.
        dataset: JSON Lines file (`testbed.evaluation.data_sets.DomainText`); set if `texts` is a number.
        tokens: most tokens per text, from its beginning.
        where: on the nodes, or with all experts in this process and the nodes' measured costs.
        repetitions: overrides the plan's.
    """

    name: Name = "perplexity"
    texts: Annotated[tuple[str, ...], Meta(min_length=1)] | Count = 2
    dataset: str | None = None
    tokens: Annotated[int, Meta(ge=2)] = 256
    where: Where = "distributed"
    repetitions: Count | None = None


Workload = Generate | Choice | LastWord | Perplexity


class Churn(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Kill node processes one at a time and start them again, as devices come and go overnight.

    Attributes:
        every_s: mean time between two losses, drawn uniformly from 0.5 to 1.5 times this.
        down_s: time until the node is started again.
    """

    every_s: Seconds = 300.0
    down_s: Seconds = 20.0


WireName = Annotated[str, Meta(pattern=f"^({'|'.join(dtype.name.lower() for dtype in WireDtype)})$")]
BaselineKind = Literal["station", "one-node", "loopback", "wired", "wifi"]
BASELINES: tuple[BaselineKind, ...] = ("station", "one-node", "loopback", "wired", "wifi")


class Baselines(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Baselines that every session measures before its first cell and after its last, to compare days and places.

    Attributes:
        kinds: baselines to measure; those that don't apply to the plan's network are recorded with the reason.
        tokens: tokens that each baseline generates.
        prompt: prompt of each baseline.
    """

    kinds: Annotated[tuple[BaselineKind, ...], Meta(min_length=1)] = BASELINES
    tokens: Annotated[int, Meta(ge=2)] = 16
    prompt: str = "What is rain?"


class Plan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An experiment.

    Defaults are the plan's own, not those of `wdmoe-bs`: an old plan must go on meaning the same experiment. So nodes
    have two minutes to start, nothing is drafted unless a workload asks for it, and a lost expert fails the cell.

    Attributes:
        bundles: quantisations of the demo model (`int4`, `int4-b128`, `fp32`, …), or of the second one
            (`qwen3-moe-int4`, …), or folders from `wdmoe-export`.
        nodes: expert selector by node id, or the number of nodes that share the experts of each layer evenly.
        node_threads: threads of each node process.
        own_policies: further policies of one bundle only, by its name in `bundles`, such as those with a table of a
            model.
        profiles: link profiles of the network, by name.
        repetitions: cells per combination of the other coordinates.
        seed: seed of the order of policies and of all bootstrap intervals.
        warm_up_tokens: tokens generated before every cell to settle links and caches; results leave them out.
        settle_s: time for measuring links after a change of the link profile.
        shared_air: whether forecasts assume that all links share one channel; if not set, as the network's description
            says.
        baseline: policy that others are compared with; by default `topk` if the plan has it, else the first policy.
        broker: broker to start; `auto` is mosquitto if it is installed, else the embedded one.
        preset: chooses `wire`, `resident` and drafts where they are not set (`bs_coordinator.presets`), each time that
            the system starts; policies are always the plan's.
        wire: wire dtype of hidden states; if not set, the preset's or fp16.
        resident: RAM for local experts on the base station, such as `200M`; if not set, the preset's or none.
        attempts: attempts before a cell counts as failed.
        layer_timeout_s: deadline for the answers of one layer.
        nodes_timeout_s: deadline for the nodes to become ready.
        cell_timeout_s: deadline for a cell.
        sample_s: seconds between two samples of clocks and links.
        pause_s: pause between two cells, to let devices cool down or to spread a run over a night.
        churn: loss and return of local node processes; None for none.
        baselines: baselines to measure; None for none.
        limits: limits for alerts and preflight.
        stay_awake: keep the base station's cores from entering idle states (`common.cpu_idle`).
        priority: real-time priority of base station, broker and local nodes where permitted, or none
            (`common.real_time`).
    """

    name: Name
    network: Literal["localhost"] | Network = "localhost"
    bundles: Annotated[tuple[str, ...], Meta(min_length=1)] = ("int4",)
    nodes: Count | Annotated[dict[str, str], Meta(min_length=1)] = 8
    node_threads: Annotated[int, Meta(ge=1, le=256)] = 1
    policies: Annotated[tuple[str, ...], Meta(min_length=1)]
    own_policies: dict[str, tuple[str, ...]] = {}
    profiles: tuple[Name, ...] = ()
    workloads: Annotated[tuple[Workload, ...], Meta(min_length=1)]
    repetitions: Count = 1
    seed: Seed = 0
    warm_up_tokens: Annotated[int, Meta(ge=0)] = 4
    settle_s: Annotated[float, Meta(ge=0, le=1e7)] = 0.5
    shared_air: bool | None = None
    baseline: str | None = None
    broker: Literal["auto", "mosquitto", "embedded"] = "auto"
    preset: PresetName | None = None
    wire: WireName | None = None
    resident: str | None = None
    attempts: Count = 2
    layer_timeout_s: Seconds = 30.0
    nodes_timeout_s: Seconds = 120.0
    cell_timeout_s: Seconds = 900.0
    sample_s: Seconds = 1.0
    pause_s: Annotated[float, Meta(ge=0, le=1e7)] = 0.0
    churn: Churn | None = None
    baselines: Baselines | None = None
    limits: RunLimits = RunLimits()
    stay_awake: bool = False
    priority: Priority = "auto"

    @property
    def emulated(self) -> str | None:
        """File that describes the emulated network; None for other networks."""
        return None if isinstance(self.network, str) else self.network.emulated

    @property
    def external(self) -> Broker | None:
        """Broker of nodes that are already running; None for other networks."""
        return None if isinstance(self.network, str) else self.network.external

    @property
    def draft(self) -> DraftMode:
        """Draft mode of the base station: that of the most demanding workload."""
        wanted = {self.draft_of(w) for w in self.workloads if isinstance(w, Generate)}
        return next((mode for mode in ("dense", "auto", "ngram") if mode in wanted), "none")

    def draft_of(self, workload: Generate) -> DraftMode:
        """Draft mode of a workload."""
        return workload.draft or ("auto" if self.preset in ("fast", "exact") else "none")

    @property
    def wire_dtype(self) -> WireDtype:
        """Wire dtype that the plan asks for; a preset may choose another one if `wire` is not set."""
        return WireDtype.named(self.wire or "fp16")

    @property
    def resolved(self) -> "Plan":
        """The plan with what it leaves open, as far as no preset chooses that."""
        if self.preset:
            return self
        workloads = [replace(w, draft=self.draft_of(w)) if isinstance(w, Generate) else w for w in self.workloads]
        return replace(self, wire=self.wire_dtype.name.lower(), workloads=tuple(workloads))

    @property
    def profile_names(self) -> tuple[str, ...]:
        """Names of the link profiles; at least one."""
        return self.profiles or (DEFAULT_PROFILE,)

    @property
    def baseline_policy(self) -> str:
        """The policy that others are compared with."""
        return self.baseline or ("topk" if "topk" in self.policies else self.policies[0])

    def policies_of(self, bundle: str) -> tuple[str, ...]:
        """The policies of a bundle."""
        return self.policies + self.own_policies.get(bundle, ())

    @property
    def every_policy(self) -> tuple[str, ...]:
        """The policies of all bundles, without repetition."""
        return tuple(dict.fromkeys(policy for bundle in self.bundles for policy in self.policies_of(bundle)))

    def workload(self, name: str) -> Workload:
        """The workload with the given name."""
        return next(w for w in self.workloads if w.name == name)

    def node_experts(self, experts: int) -> dict[str, str]:
        """Expert selector by node id. With a number n of nodes, node k holds experts k, k + n, … of every layer."""
        if isinstance(self.nodes, dict):
            return self.nodes
        return {f"node{k}": f"L*:E{','.join(map(str, range(k, experts, self.nodes)))}" for k in range(self.nodes)}
