"""What a plan for a fleet is asked for, and what it says. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bs_coordinator.placement.predict import Station
from bs_coordinator.placement.shapes import Variant
from wire.manifest import Quantisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a plan is asked for.

    Attributes:
        quantisations: to choose from, the most wanted first: the first that fits is taken.
        slices: numbers of slices to choose from; empty for all that are possible.
        replicas: most copies of each expert; fewer if they do not fit.
        station: times of the base station.
        shared_air: whether all links share one channel.
        prompt_tokens: length of the prompt whose time is predicted.
        draft: rows of a step with drafts, and the mean number of tokens that it yields; None for no drafts. With
            drafts, the time with drafts decides.
        resident_bytes: RAM of the base station for experts.
        resident_bytes_per_s: memory bandwidth with which it computes them.
        exported: a variant whose exact size is known.
    """

    quantisations: Sequence[Quantisation]
    station: Station
    slices: Sequence[int] = ()
    replicas: int = 2
    shared_air: bool = False
    prompt_tokens: int = 512
    draft: tuple[int, float] | None = None
    resident_bytes: int = 0
    resident_bytes_per_s: float = 20e9
    exported: Variant | None = None


@dataclass(frozen=True, slots=True)
class BoardPlan:
    """What one device holds.

    Attributes:
        experts: selector of its experts or slices.
        units: number of these.
        fits: how many would fit.
        ram_bytes: that they take, by the node's own upper estimate.
        ram_limit_bytes: RAM for experts.
        traffic: share of all traffic for which it is the first holder.
    """

    name: str
    kind: str
    experts: str
    units: int
    fits: int
    ram_bytes: int
    ram_limit_bytes: int
    traffic: float


@dataclass(frozen=True, slots=True)
class SliceOption:
    """A number of slices that was considered.

    Attributes:
        ms_per_token: predicted, without drafts.
        draft_ms_per_token: with drafts; None without.
        boards_asked: mean number of devices that a layer asks, here and below in a step with drafts if there are any.
        read_mb: what the device with most work reads per layer, in 10⁶ bytes.
        air_ms: what a layer's messages take on the air, all together.
    """

    slices: int
    ms_per_token: float
    draft_ms_per_token: float | None
    boards_asked: float
    read_mb: float
    air_ms: float


@dataclass(frozen=True, slots=True)
class OneMore:
    """What one more device brings.

    Attributes:
        kind: of the device; its link is that of the fleet's first device of this kind.
        replicas: copies that fit then, at most those that are wanted.
        slices: best number of slices then, with as many copies as without it.
        ms_per_token: predicted then, without drafts.
        draft_ms_per_token: with drafts; None without.
    """

    kind: str
    replicas: int
    slices: int
    ms_per_token: float
    draft_ms_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """A plan and its predictions.

    Attributes:
        bundle: how to export the experts, for people.
        replicas: copies of each expert.
        ms_per_token: of one answer without drafts.
        draft_ms_per_token: with drafts; None without.
        prompt_s: time of the prompt.
        resident: selector of the experts that the base station keeps; empty for none.
        resident_bytes: RAM that these take.
        options: the numbers of slices that were compared.
        more: one entry per kind of device in the fleet.
        missing_for_next_copy: what one more copy needs, for people; empty if all wanted copies fit.
    """

    model: str
    quantisation: str
    slices: int
    replicas: int
    shared_air: bool
    ms_per_token: float
    draft_ms_per_token: float | None
    prompt_tokens: int
    prompt_s: float
    boards: list[BoardPlan]
    resident: str
    resident_bytes: int
    options: list[SliceOption]
    more: list[OneMore] = field(default_factory=list)
    missing_for_next_copy: str = ""


def decisive_ms(ms_per_token: float, draft_ms_per_token: float | None) -> float:
    """Per token, as answers will be decoded: with drafts if there are any. By this time plans are chosen."""
    return ms_per_token if draft_ms_per_token is None else draft_ms_per_token
