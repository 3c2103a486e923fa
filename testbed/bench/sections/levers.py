"""Everything that saves time, alone and together: drafts, local experts, a policy, int8 on the wire, slices.

Each answer is given with every arm in turns, on one emulated network, so that machine and links are the same for all.
Answers take seconds each; they are kept in a `sample_log`, and an interrupted benchmark continues.
"""

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from msgspec import Struct

from bs_coordinator.config import BaseStationConfig, DraftMode, PresetName, ResidentConfig, SamplingConfig
from bs_coordinator.engine.answer_stats import summarise
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.presets import choose
from bs_coordinator.presets.look import look
from bs_coordinator.resident.choice import choose_resident
from bs_coordinator.resident.room import needed_room
from bs_coordinator.selection import parse_policy
from common.cores import usable_cores
from exporter.bundle.bundle import export_bundle
from testbed.bench.chat_prompts import CHAT_PROMPTS
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sample_log import sample_log
from testbed.bench.sections.resident import learn
from testbed.bench.system import why_not
from testbed.bench.two_fleets import Holding, TwoFleets, two_fleets
from testbed.demo_assets import demo_bundle, demo_draft, demo_model, demo_quantisation
from testbed.prompts import PROMPTS
from wire.tensors import WireDtype

NODES = 8
SLICES = 4
RESIDENT_SHARE = 0.25
WHOLE = {f"node{k}": f"L*:E{k}" for k in range(NODES)}
SLICED = {f"node{k}": f"L*:E{k // 4 * 4}-{k // 4 * 4 + 3}/{k % SLICES}" for k in range(NODES)}
"""A slice of each expert of one half, so that a token asks four nodes, or eight."""
_EVEN = "default: {down_mbps: 100, up_mbps: 100, delay_ms: 2.5}"
CHANNELS: dict[str, tuple[bool, str]] = {
    "dedicated links of 100 Mbit/s, 5 ms": (False, _EVEN),
    "one channel of 100 Mbit/s, 5 ms": (True, _EVEN),
}
"""For each network whether its nodes share the air, and the description of its links."""
_TOKENS = 24
_LEARNT_FROM = PROMPTS[-2:]
"""Prompts that traffic, links and the cost of steps are learnt from; others are measured."""
_SETTLED_S = 1.0
_PUMPED_S = 0.01
_PLAIN = "plain"
_PRESETS: tuple[PresetName, ...] = ("exact", "fast")
_MOST_JOBS = 8


class Arm(NamedTuple):
    """What is on.

    Attributes:
        draft: kind of draft.
        resident: a quarter of the experts is on the base station.
    """

    draft: DraftMode = "none"
    resident: bool = False
    policy: str = "topk"
    wire: WireDtype = WireDtype.FP16
    sliced: bool = False


ALONE: dict[str, Arm] = {
    _PLAIN: Arm(),
    "drafts": Arm(draft="auto"),
    "a quarter of the experts here": Arm(resident=True),
    "policy subset": Arm(policy="subset"),
    "int8 on the wire": Arm(wire=WireDtype.INT8),
    f"{SLICES} slices": Arm(sliced=True),
}
EVERYTHING = Arm("dense", resident=True, policy="subset", wire=WireDtype.INT8)
"""`auto` does not draft beside `subset`, because drafts could change answers; here they may."""


class Measured(Struct, frozen=True, kw_only=True):
    """One measured answer: a line of `levers.jsonl`.

    Attributes:
        ids: token ids.
        tpot_ms: time per token after the first, drafting included.
        token_bytes: frames to and from the nodes per token after the first.
    """

    channel: str
    arm: str
    prompt: int
    ids: list[int]
    tpot_ms: float
    token_bytes: float


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per network and arm, each compared with plain decoding."""
    if why := why_not():
        yield Skipped("levers on an emulated network", why)
        return
    prompts = range(max(2, min(len(CHAT_PROMPTS), settings.samples // 5)))
    with sample_log(settings.folder, f"levers-{settings.device}", Measured) as log, _fleets(settings) as fleets:
        done = {(one.channel, one.arm, one.prompt): one for one in log.samples}
        bench = _Bench(fleets)
        for number, channel in enumerate(CHANNELS):
            arms = bench.begin(channel, number)
            if any((channel, arm, prompt) not in done for arm in arms for prompt in prompts):
                bench.warm_up(channel, arms)
            for prompt in prompts:
                turn = prompt % len(arms)
                for arm in (*list(arms)[turn:], *list(arms)[:turn]):
                    if (channel, arm, prompt) not in done:
                        one = done[channel, arm, prompt] = bench.answer(channel, arm, arms[arm], prompt)
                        log.add(one)
            for arm in arms:
                if arm != _PLAIN:
                    pairs = [(done[channel, arm, prompt], done[channel, _PLAIN, prompt]) for prompt in prompts]
                    name = f"{arm}, {channel}"
                    if any(_decoded(*pair) for pair in pairs):
                        yield compared(name, pairs, arms[arm])
                    else:
                        yield Skipped(name, "no answer has a second token, so none has a time per token")


class _Bench:
    """Both fleets, with every arm's own record of what its drafts have cost."""

    def __init__(self, fleets: TwoFleets) -> None:
        """Learn which experts are asked together, and keep the quarter of them that saves most."""
        self._fleets = fleets
        self._speculation: dict[str, Speculation] = {}
        station = fleets.whole
        every = station.dispatcher.registry.local_experts
        pairs, away_s, here_s = learn(station, _LEARNT_FROM)
        self._resident = choose_resident(pairs, away_s, here_s, round(RESIDENT_SHARE * len(every)))

    def begin(self, channel: str, number: int) -> dict[str, Arm]:
        """Switch to a network, measure its links, and give the arms, by name."""
        self._fleets.network.set_profile(f"net{number}")
        for station in (self._fleets.whole, self._fleets.sliced):
            station.dispatcher.links.shared_air = CHANNELS[channel][0]
            station.dispatcher.measure_links(_SETTLED_S)
        self._speculation = {}
        return {**ALONE, **self._presets(CHANNELS[channel][0]), "everything": EVERYTHING}

    def warm_up(self, channel: str, arms: Mapping[str, Arm]) -> None:
        """Let arms learn what others have: what drafts cost, and how the second fleet's nodes answer."""
        for name, arm in arms.items():
            if arm.draft != "none" or arm.sliced:
                self.answer(channel, name, arm, -1)

    def answer(self, channel: str, name: str, arm: Arm, prompt: int) -> Measured:
        """Answer a prompt with an arm; −1 is one that is not measured."""
        sliced, whole = self._fleets.sliced, self._fleets.whole
        station = sliced if arm.sliced else whole
        dispatcher, manifest = station.dispatcher, station.manifest
        for other in (sliced, whole):
            other.dispatcher.pump(_PUMPED_S)
        if not arm.sliced:
            dispatcher.registry.hold_locally(self._resident if arm.resident else frozenset())
        dispatcher.use_wire(arm.wire)
        station.model.policy = parse_policy(arm.policy, top_k=manifest.dims.top_k)
        speculation = self._speculation.setdefault(name, station.speculation.restarted(arm.draft))
        text = _LEARNT_FROM[0] if prompt < 0 else CHAT_PROMPTS[prompt]
        ids = station.tokenizer.encode_chat([{"role": "user", "content": text}])
        sequence = TokenSequence(station.model, station.tokenizer, speculation=speculation)
        events = list(sequence.generate(ids, SamplingConfig(max_tokens=_TOKENS)))
        stats = summarise(events)
        return Measured(
            channel=channel, arm=name, prompt=prompt, ids=[event.id for event in events], tpot_ms=stats.tpot_ms,
            token_bytes=stats.down_bytes + stats.up_bytes,
        )  # fmt: skip

    def _presets(self, shared_air: bool) -> dict[str, Arm]:
        """What the presets choose on these links, with memory for a quarter of the experts; one arm if they agree."""
        station = self._fleets.whole
        config = BaseStationConfig(
            bundle=station.config.bundle, draft_model=station.config.draft_model, shared_air=shared_air,
            resident=ResidentConfig(round(RESIDENT_SHARE * needed_room(station.manifest).all_bytes)),
        )  # fmt: skip
        why_no_drafts = "" if station.speculation.mode == "auto" else "this base station does not draft"
        facts = look(station.dispatcher, config, station.manifest, scored=True, why_no_drafts=why_no_drafts)
        found: dict[Arm, list[str]] = {}
        for preset in _PRESETS:
            chosen = choose(preset, config, facts).config
            arm = Arm(chosen.draft, bool(chosen.resident.budget_bytes), chosen.policy, chosen.wire)
            found.setdefault(arm, []).append(preset)
        return {f"preset {' and '.join(names)}": arm for arm, names in found.items()}


def _fleets(settings: Settings) -> AbstractContextManager[TwoFleets]:
    bundle, model = demo_bundle("int4", console=settings.console), demo_model(console=settings.console)
    cut = settings.folder / f"sliced-{SLICES}"
    export_bundle(model, cut, demo_quantisation("int4"), jobs=min(_MOST_JOBS, usable_cores()), slices=SLICES)
    return two_fleets(
        settings, Holding(bundle, WHOLE), Holding(cut, SLICED), draft_model=demo_draft(console=settings.console),
        spec=network_spec(f"bench{os.getpid()}"),
    )  # fmt: skip


def network_spec(name: str) -> str:
    """The description of all networks, one profile each."""
    profiles = "".join(
        f"  net{number}: {{shared_air: {str(shared).lower()}, {links}}}\n"
        for number, (shared, links) in enumerate(CHANNELS.values())
    )
    return f"name: {name}\nnodes: [{', '.join(WHOLE)}]\nprofiles:\n{profiles}"


def compared(name: str, pairs: Sequence[tuple[Measured, Measured]], arm: Arm) -> Row:
    """A row from pairs of the same answer with an arm and plainly, at least one of which has decode steps."""
    decoded = [pair for pair in pairs if _decoded(*pair)]
    parameters = {
        "draft": arm.draft,
        "resident_share": RESIDENT_SHARE if arm.resident else 0,
        "policy": arm.policy,
        "wire": arm.wire.name.lower(),
        "slices": SLICES if arm.sliced else 1,
        "tokens": _TOKENS,
        "token_bytes": statistics.mean(ours.token_bytes for ours, _ in decoded),
        "plain_token_bytes": statistics.mean(plain.token_bytes for _, plain in decoded),
        "identical": sum(ours.ids == plain.ids for ours, plain in pairs),
        "compared": len(pairs),
        "samples": "mean ms per token of one answer after its first",
    }
    ours_ms, plain_ms = [ours.tpot_ms for ours, _ in decoded], [plain.tpot_ms for _, plain in decoded]
    return Row(name, _PLAIN, ours_ms, plain_ms, None, parameters)


def _decoded(ours: Measured, plain: Measured) -> bool:
    """Whether both answers have decode steps: one of a single token has none."""
    return min(len(ours.ids), len(plain.ids)) > 1
