"""What a preset decides by: the links as measured, this machine's memory, the nodes, and the model. Pure."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """The link of a node as measured.

    Attributes:
        rtt_ms: round trip of an empty message.
        down_mbps, up_mbps: goodput to and from the node, 10⁶ bit/s; inf if it is not known.
    """

    rtt_ms: float
    down_mbps: float
    up_mbps: float

    def row_ms(self, row_bytes: int) -> float:
        """Time for a hidden state of so many bytes to the node and for one back, without the round trip."""
        return 8e-3 * row_bytes * (1 / self.down_mbps + 1 / self.up_mbps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a preset decides by.

    Attributes:
        links: of the nodes whose links are known.
        shared_air: whether all links share one channel.
        free_bytes: RAM that this process may still take.
        all_experts_bytes, one_expert_bytes: RAM that all experts take here, and the largest alone.
        sums_units: a node that holds several experts (or slices) of a layer; empty if there is none.
        other_arch: a node of another processor architecture than this machine's; empty if there is none.
        model_sha256: of the manifest.
        hidden: values of a hidden state.
        top_k: experts per token.
        scored: whether it is known how the model scores its experts.
        draft_model: whether there is a draft model.
        why_no_drafts: why drafts could change answers; empty if they can't.
    """

    links: tuple[Link, ...]
    shared_air: bool
    free_bytes: int
    all_experts_bytes: int
    one_expert_bytes: int
    sums_units: str
    other_arch: str
    model_sha256: str
    hidden: int
    top_k: int
    scored: bool
    draft_model: bool
    why_no_drafts: str

    @property
    def unevenness(self) -> float:
        """How many times as long as on the median link a hidden state takes on the slowest, to the node and back."""
        return max(self._times_ms) / statistics.median(self._times_ms)

    @property
    def slowest_more_ms(self) -> float:
        """How many ms longer it takes on the slowest link than on the median one."""
        return max(self._times_ms) - statistics.median(self._times_ms)

    @property
    def _times_ms(self) -> list[float]:
        return [link.rtt_ms + link.row_ms(2 * self.hidden) for link in self.links]
