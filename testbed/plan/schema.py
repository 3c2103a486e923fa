"""What an experiment is: a plan as users write it, and the cells that it stands for. Pure but for reading files.

A cell is one combination of repetition, bundle, link profile, workload and policy. Policies are the arms that a
report compares, so they take turns within each block of otherwise equal cells, in an order drawn from the seed.
"""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from bs_coordinator.config import DraftMode
from testbed.plan.limits import Limits, Seconds
from testbed.prompts import PROMPTS
from wire.broker_url import Access
from wire.tensors import WireDtype

Count = Annotated[int, Meta(ge=1)]
Range = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=2, max_length=2)]
"""First, one past the last. Not a fixed-length tuple: msgspec 0.22 crashes on those when garbage is collected."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Where = Literal["distributed", "in-process"]
DEFAULT_PROFILE = "default"
"""Of a network that has only one."""


class Broker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A broker that is already running.

    Attributes:
        password_file, tls_key, cluster_key: read when connecting; only their paths are kept.
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
        """As the connection needs it."""
        names = ("password_file", "ca_file", "tls_cert", "tls_key")
        password, ca, cert, key = (Path(p) if (p := getattr(self, name)) else None for name in names)
        return Access(password, ca, cert, key, allow_plaintext=self.allow_plaintext)


class Network(Struct, frozen=True, forbid_unknown_fields=True):
    """A network beyond this machine's loopback; exactly one is set.

    Attributes:
        emulated: file with the description of the links between node processes.
        external: broker of nodes that are already running, usually physical ones.
    """

    emulated: str | None = None
    external: Broker | None = None


class Generate(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="generate"):
    """Answers to prompts; what latency is measured on.

    Attributes:
        prompts: texts, or how many of the built-in ones.
        prompts_per_cell: a repetition takes this many, the next one those that follow; all when not set.
        seed: of the draw of tokens; each repetition adds its number.
        draft: how tokens are guessed (`bs_coordinator.engine.speculation`); answers stay the same.
        repetitions: instead of the plan's.
    """

    name: Name = "generate"
    prompts: Annotated[tuple[str, ...], Meta(min_length=1)] | Annotated[int, Meta(ge=1, le=len(PROMPTS))] = 4
    prompts_per_cell: Count | None = None
    max_tokens: Count = 32
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int = 0
    draft: DraftMode = "none"
    repetitions: Count | None = None

    @property
    def where(self) -> Where:
        """Latency can only be measured on nodes."""
        return "distributed"

    def prompts_of(self, repetition: int) -> list[tuple[int, str]]:
        """The prompts of one cell, each with its number in the workload."""
        texts = PROMPTS[: self.prompts] if isinstance(self.prompts, int) else self.prompts
        numbered = list(enumerate(texts))
        if self.prompts_per_cell is None:
            return numbered
        start = repetition * self.prompts_per_cell
        return [numbered[(start + i) % len(texts)] for i in range(min(self.prompts_per_cell, len(texts)))]


class Choice(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="choice"):
    """Multiple choice; what accuracy is measured on.

    Attributes:
        dataset: JSON lines (`testbed.evaluation.items.ChoiceItem`); relative to `--data`, else to the plan.
        items: how many, or [first, one past the last].
        batch: items per forward step.
        where: on the nodes, or all experts in this process with the nodes' costs as they were measured.
        choosing: whether the tokens of a step choose their experts together, as in batches, or each as if it were
            alone, as in decoding; that only in this process, for nodes would still be asked by batches.
    """

    dataset: str
    name: Name = "choice"
    items: Count | Range = 100
    batch: Annotated[int, Meta(ge=1, le=16)] = 8
    where: Where = "distributed"
    choosing: Literal["together", "alone"] = "together"
    repetitions: Count | None = None

    @property
    def span(self) -> tuple[int, int]:
        """First item, one past the last."""
        return (0, self.items) if isinstance(self.items, int) else (self.items[0], self.items[1])

    @property
    def count(self) -> int:
        """Items in all."""
        return self.span[1] - self.span[0]


class Perplexity(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="perplexity"):
    """Loss on texts.

    Attributes:
        texts: texts, or how many of each domain of `dataset`.
        dataset: JSON lines (`testbed.evaluation.items.DomainText`), where `texts` is a number.
        tokens: of each text at most, from its beginning.
    """

    name: Name = "perplexity"
    texts: Annotated[tuple[str, ...], Meta(min_length=1)] | Count = 2
    dataset: str | None = None
    tokens: Annotated[int, Meta(ge=2)] = 256
    where: Where = "distributed"
    repetitions: Count | None = None


Workload = Generate | Choice | Perplexity


class Churn(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Node processes that come and go, as devices do overnight: one at a time is killed and started again.

    Attributes:
        every_s: between two losses, drawn evenly from half to one and a half times this.
        down_s: that a node stays away.
    """

    every_s: Seconds = 300.0
    down_s: Seconds = 20.0


WireName = Annotated[str, Meta(pattern=f"^({'|'.join(dtype.name.lower() for dtype in WireDtype)})$")]
BaselineKind = Literal["station", "one-node", "loopback", "wired", "wifi"]
BASELINES: tuple[BaselineKind, ...] = ("station", "one-node", "loopback", "wired", "wifi")


class Baselines(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every session measures before its first cell and after its last, to compare days and places.

    Attributes:
        kinds: those that do not apply to the network at hand are noted with the reason.
        tokens: that each of them generates.
        prompt: what they answer.
    """

    kinds: Annotated[tuple[BaselineKind, ...], Meta(min_length=1)] = BASELINES
    tokens: Annotated[int, Meta(ge=2)] = 16
    prompt: str = "What is rain?"


class Plan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An experiment.

    Defaults are the plan's own, not those of `wdmoe-bs`: an old plan must go on meaning the same experiment. So nodes
    have two minutes to start, nothing is drafted unless a workload asks for it, and a lost expert fails the cell.

    Attributes:
        bundles: quantisations of the demo model (`int4`, `int4-b128`, `fp32`, …) or folders from `wdmoe-export`.
        nodes: node id to expert selector, or a number of nodes that share every layer's experts evenly.
        profiles: link profiles of the network, by name.
        seed: of the order of the arms and of all bootstrap intervals.
        warm_up_tokens: generated before every cell and marked; links and caches settle meanwhile.
        settle_s: pause after a change of the link profile.
        shared_air: predict with all links on one channel; the network's own description where not set.
        baseline: the policy that others are compared with; `topk` where the plan has it, else the first.
        wire: how hidden states travel.
        resident: RAM for experts that the base station keeps itself, such as `200M`.
        attempts: how often a cell is tried before it counts as failed.
        sample_s: seconds between two samples of clocks and links.
        pause_s: between two cells: devices cool down, a long run is spread over a night.
        churn: of node processes that the run starts; None for none.
        baselines: None for none.
        limits: of alerts and preflight.
        stay_awake: keep the cores of the base station's machine from sleeping, see `common.cpu_idle`.
    """

    name: Name
    network: Literal["localhost"] | Network = "localhost"
    bundles: Annotated[tuple[str, ...], Meta(min_length=1)] = ("int4",)
    nodes: Count | Annotated[dict[str, str], Meta(min_length=1)] = 8
    node_threads: Count = 1
    policies: Annotated[tuple[str, ...], Meta(min_length=1)]
    profiles: tuple[Name, ...] = ()
    workloads: Annotated[tuple[Workload, ...], Meta(min_length=1)]
    repetitions: Count = 1
    seed: int = 0
    warm_up_tokens: Annotated[int, Meta(ge=0)] = 4
    settle_s: Annotated[float, Meta(ge=0)] = 0.5
    shared_air: bool | None = None
    baseline: str | None = None
    broker: Literal["auto", "mosquitto", "embedded"] = "auto"
    wire: WireName = "fp16"
    resident: str | None = None
    attempts: Count = 2
    layer_timeout_s: Seconds = 30.0
    nodes_timeout_s: Seconds = 120.0
    cell_timeout_s: Seconds = 900.0
    sample_s: Seconds = 1.0
    pause_s: Annotated[float, Meta(ge=0)] = 0.0
    churn: Churn | None = None
    baselines: Baselines | None = None
    limits: Limits = Limits()
    stay_awake: bool = False

    @property
    def emulated(self) -> str | None:
        """File of the emulated network, if the plan has one."""
        return None if isinstance(self.network, str) else self.network.emulated

    @property
    def external(self) -> Broker | None:
        """Broker of nodes that are already running, if the plan uses such."""
        return None if isinstance(self.network, str) else self.network.external

    @property
    def draft(self) -> DraftMode:
        """Of the base station: what the most demanding workload needs."""
        wanted = {w.draft for w in self.workloads if isinstance(w, Generate)}
        return next((mode for mode in ("dense", "auto", "ngram") if mode in wanted), "none")

    @property
    def profile_names(self) -> tuple[str, ...]:
        """At least one."""
        return self.profiles or (DEFAULT_PROFILE,)

    @property
    def baseline_policy(self) -> str:
        """What other policies are compared with."""
        return self.baseline or ("topk" if "topk" in self.policies else self.policies[0])

    def workload(self, name: str) -> Workload:
        """The workload of that name."""
        return next(w for w in self.workloads if w.name == name)

    def node_experts(self, experts: int) -> dict[str, str]:
        """Node id to expert selector; of `n` nodes node k holds experts k, k + n, … of every layer."""
        if isinstance(self.nodes, dict):
            return self.nodes
        return {f"node{k}": f"L*:E{','.join(map(str, range(k, experts, self.nodes)))}" for k in range(self.nodes)}
