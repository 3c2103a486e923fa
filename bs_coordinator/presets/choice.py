"""What a preset chooses, from measured links, memory and the model, with a reason for each choice. Pure.

`exact` uses only what leaves tokens as they are. `fast` also uses what costs quality, within limits, on models on which
that cost was measured. `field` uses nothing that depends on what is measured, so that two runs do the same.
"""

import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

from bs_coordinator.config import BaseStationConfig, DraftMode, PresetName
from bs_coordinator.presets.facts import Facts
from bs_coordinator.presets.scores import INT8_WIRE, MOST_LOST_POINTS, MOST_PERPLEXITY, POLICIES, PolicyScore
from common.config import config_fields
from common.sizes import parse_bytes, readable_bytes
from wire.tensors import WireDtype

MEMORY_SHARE = 0.5
"""Share of the free memory that experts may take: caches of answers and other programs grow later."""
LEAST_SAVED_AIR = 0.01
"""Share of a round trip that a smaller number format must save to be worth its cost in quality."""
UNEVEN = 1.5
"""How many times as long as the median the slowest link must take for a policy to have something to avoid. The links on
which policies were measured have 3."""
WORTH_MS = 1.0
"""How many ms more than the median it must take as well: less may be noise, and is little beside a layer's own work."""
_MIB = 1 << 20


class Lever(NamedTuple):
    """One choice.

    Attributes:
        name: the option's, without dashes.
        value: as the option would be written.
        why: the reason.
        quality: what it costs in quality; empty if answers stay as they are.
    """

    name: str
    value: str
    why: str
    quality: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.why}" + (f"; quality: {self.quality}" if self.quality else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a preset has chosen.

    Attributes:
        config: with the choice in place of the preset's defaults.
        levers: all choices, with reasons.
    """

    preset: PresetName
    config: BaseStationConfig
    levers: tuple[Lever, ...]

    @property
    def lines(self) -> list[str]:
        """One line per choice, for people."""
        return [f"preset {self.preset}: {lever}" for lever in self.levers]

    @property
    def values(self) -> dict[str, str]:
        """Value by name, for programs."""
        return {"preset": self.preset} | {lever.name: lever.value for lever in self.levers}


def choose(preset: PresetName, config: BaseStationConfig, facts: Facts) -> Choice:
    """Choose for all options of `config` that were not given.

    Args:
        preset: whose rules count.
        config: what the user asks for.
        facts: what is known about links, machine and model.
    """
    given = _given(config)
    own = _given_levers(config, given)
    chosen: dict[str, Lever] = {}
    if preset == "field":
        chosen = _reproducible()
    else:
        chosen["wire"] = _wire(facts) if preset == "fast" else _AS_SENT
        wire = own.get("wire", chosen["wire"]).value
        chosen["resident"] = _resident(facts, exactly=preset == "exact", wire=wire)
        chosen["policy"] = Lever("policy", "topk", "the experts that the model chooses")
        if preset == "fast":
            wanted = "draft" not in own or own["draft"].value != "none"
            drafts = wanted and facts.draft_model and not facts.why_no_drafts
            room = own.get("resident", chosen["resident"]).value
            all_here = room != "none" and parse_bytes(room) >= facts.all_experts_bytes
            chosen["policy"] = _policy(facts, drafts=drafts, all_here=all_here)
        chosen["draft"] = _draft(facts, own.get("policy", chosen["policy"]).value)
        chosen["degrade"] = (
            Lever("degrade", "no", "an answer without one of its experts would be another one, so it ends in an error")
            if preset == "exact"
            else Lever("degrade", "yes", "an answer goes on without a lost expert, and is marked")
        )
    levers = {name: own.get(name, chosen[name]) for name in _ORDER}
    return Choice(preset, _applied(config, levers, given), tuple(levers.values()))


_ORDER = ("draft", "wire", "policy", "resident", "degrade")
"""In which the choices are told."""
_AS_SENT = Lever("wire", "fp16", "as without a preset; its rounding costs no perplexity that we could measure")


def _reproducible() -> dict[str, Lever]:
    levers = (
        Lever("draft", "none", "each step computes one token, whatever was guessed before"),
        Lever("wire", "fp16", "as without a preset"),
        Lever("policy", "topk", "the experts that the model chooses, whatever is measured"),
        Lever("resident", "none", "local experts would be exchanged as traffic changes"),
        Lever("degrade", "yes", "an answer goes on without a lost expert, and is marked"),
    )
    return {lever.name: lever for lever in levers}


def _draft(facts: Facts, policy: str) -> Lever:
    why = "with the draft model; answers stay the same"
    if facts.why_no_drafts:
        why = f"none: {facts.why_no_drafts}, so they could change answers"
    elif policy.partition(":")[0] != "topk":  # others choose by what else is in a step
        why = f"none beside the policy {policy}: they could change answers"
    elif not facts.draft_model:
        why = "look-ups only, as there is no draft model: 'wdmoe-export draft' adds one"
    return Lever("draft", "auto", why)


def _policy(facts: Facts, *, drafts: bool, all_here: bool) -> Lever:
    """The policy that saves most waiting within the limit of quality."""

    def topk(why: str) -> Lever:
        return Lever("policy", "topk", why)

    scores = POLICIES.get(facts.model_sha256)
    if drafts:
        return topk("drafts save more, and are checked exactly with topk only")
    if all_here:
        return topk("all experts are here, so there is no link to avoid")
    if not facts.scored:
        return topk("how this model scores its experts is not known")
    if scores is None:
        return topk("no other policy's cost was measured on this model")
    within = [score for score in scores if min(score.points) >= -MOST_LOST_POINTS]
    if not within:
        best = max(scores, key=lambda score: min(score.points))
        return topk(f"{best.policy} loses {-min(best.points):.1f} points of accuracy on this model")
    if not facts.links:
        return topk("no link was measured, so there is nothing to choose by")
    if (uneven := facts.unevenness) < UNEVEN:
        return topk(f"the links are alike: the slowest takes {uneven:.1f} times as long as the median")
    if (more_ms := facts.slowest_more_ms) < WORTH_MS:
        return topk(f"the slowest link takes only {more_ms:.1f} ms more than the median")
    air = int(facts.shared_air)
    best = max(within, key=lambda score: score.waits_less[air])
    return Lever(
        "policy", best.policy,
        f"the slowest link takes {uneven:.1f} times as long as the median; measured with links like that: "
        f"{best.waits_less[air]:.0%} less waiting",
        _quality(best, air),
    )  # fmt: skip


def _quality(score: PolicyScore, air: int) -> str:
    return f"{score.points[air]:+.1f} points of accuracy, {score.perplexity:+.1%} perplexity on this model"


def _wire(facts: Facts) -> Lever:
    """The number format with least time on the air within the limit of quality."""

    def fp16(why: str) -> Lever:
        return Lever("wire", "fp16", why)

    rise = INT8_WIRE.get(facts.model_sha256)
    if rise is None:
        return fp16("the cost of int8 was not measured on this model")
    if rise > MOST_PERPLEXITY:
        return fp16(f"int8 costs {rise:.1%} perplexity on this model")
    if not facts.links:
        return fp16("no link was measured, so it is not known what int8 would save")
    saved = statistics.median(saved_share(facts))
    if saved < LEAST_SAVED_AIR:
        return fp16(f"int8 would save {saved:.1%} of a round trip")
    return Lever("wire", "int8", f"saves {saved:.1%} of a round trip", f"{rise:+.2%} perplexity on this model")


def saved_share(facts: Facts) -> list[float]:
    """For each link, the share of a layer's round trip that int8 on the wire saves compared with fp16."""
    rows = facts.top_k if facts.shared_air else 1
    shares = []
    for link in facts.links:
        fp16_ms, int8_ms = (
            rows * link.row_ms(dtype.codec.row_bytes(facts.hidden)) for dtype in (WireDtype.FP16, WireDtype.INT8)
        )
        shares.append((fp16_ms - int8_ms) / (link.rtt_ms + fp16_ms))
    return shares


def _resident(facts: Facts, *, exactly: bool, wire: str) -> Lever:
    """How much memory local experts get."""

    def none(why: str) -> Lever:
        return Lever("resident", "none", why)

    if exactly and facts.other_arch:
        return none(f"{facts.other_arch} has another kind of processor, which may round differently")
    if exactly and wire != "fp32" and facts.sums_units:
        return none(
            f"{facts.sums_units} holds several experts of a layer and rounds their sum, which local experts would not: "
            "--wire fp32 avoids that"
        )
    budget = min(int(MEMORY_SHARE * facts.free_bytes), facts.all_experts_bytes) // _MIB * _MIB
    if budget < facts.one_expert_bytes:
        return none(f"half of the free memory ({readable_bytes(facts.free_bytes)}) has no room for one expert")
    if budget + _MIB > facts.all_experts_bytes:
        budget = -(-facts.all_experts_bytes // _MIB) * _MIB
        why = "all experts fit into half of the free memory: nodes are asked where they are faster"
    else:
        why = f"{budget / facts.all_experts_bytes:.0%} of the experts, which fit into half of the free memory"
    return Lever("resident", f"{budget // _MIB}M", why)


def _given(config: BaseStationConfig) -> frozenset[str]:
    """Names of the fields that the user set."""
    changed = {
        field.name
        for field in config_fields(BaseStationConfig)
        if field.option is not None and getattr(config, field.name) != field.default
    }
    resident = set() if config.resident.budget_bytes is None else {"resident"}
    return frozenset(changed) | config.given | resident


def _given_levers(config: BaseStationConfig, given: frozenset[str]) -> dict[str, Lever]:
    room = config.resident.budget_bytes
    values = {
        "draft": config.draft,
        "wire": config.wire.name.lower(),
        "policy": config.policy,
        "resident": f"{room // _MIB}M" if room else "none",
        "degrade": "yes" if config.degrade else "no",
    }
    return {name: Lever(name, value, "as given") for name, value in values.items() if name in given}


def _applied(config: BaseStationConfig, levers: dict[str, Lever], given: frozenset[str]) -> BaseStationConfig:
    draft: DraftMode = "none" if levers["draft"].value == "none" else "auto"
    room = levers["resident"].value
    resident = replace(config.resident, budget_bytes=None if room == "none" else parse_bytes(room))
    return replace(
        config,
        draft=config.draft if "draft" in given else draft,
        wire=WireDtype.named(levers["wire"].value),
        policy=levers["policy"].value,
        resident=config.resident if "resident" in given else resident,
        degrade=levers["degrade"].value == "yes",
    )
