"""Allocates one channel's bandwidth to nodes so that layers wait as little as possible.

The problem is that of arXiv 2411.06681: with `rows[i, k]` hidden states for node k in layer i,

    minimise  Σ_i max_k ( fixed_s[i, k] + rows[i, k] · τ_k(B_k) )   subject to  Σ_k B_k ≤ B,  B_k ≥ 0,

where the maximum is over the nodes that layer i asks (rows > 0) and τ_k is the air time of one row to the node and
back. `fixed_s` does not depend on bandwidth: the node's compute, queue and round trip. With one layer the problem is
solved by root finding (`allocate_layer`), with several by an interior-point method (`allocate_common`).

The problem is convex, so both find its optimum: a link's rate B · log2(1 + c/B) is concave and increasing in B, the
reciprocal of a positive concave function is convex, and sums and maxima preserve convexity. Leading axes are
independent problems, for example channel draws. This module does no I/O.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

_LN2 = float(np.log(2.0))
_PRECISE = 1e-12
"""Relative step at which root finding stops."""
_CENTRED = 1e-3
"""Newton decrement at which a point counts as the barrier's minimum; far below what the gap allows."""
_GAP = 1e-8
"""Distance from the optimum, relative to the time with equal shares, at which the interior-point method stops."""
_MAX_STEPS = 100
_MAX_HALVINGS = 40


class RowTime(NamedTuple):
    """Seconds per row and its derivatives with respect to bandwidth; float64 [..., nodes]."""

    seconds: Float
    slope: Float
    curvature: Float


class Links(Protocol):
    """Air time per row of each node as a function of its bandwidth.

    The time must be convex and decreasing, infinite at 0, and log τ convex in log B with slopes from -1 to 0.
    """

    def row_time(self, bandwidth: Float) -> RowTime:
        """Time per row and its derivatives at `bandwidth` > 0, float64 [..., nodes]."""

    def each_layer(self) -> "Links":
        """The same links with an axis for layers before the nodes: [..., 1, nodes]."""


@dataclass(frozen=True, slots=True, eq=False)
class ShannonLinks:
    """Radio links at Shannon's rate, B · log2(1 + P·g / (N0·B)) bit/s. A node uses its B in both directions in turn.

    Attributes:
        row_bits: size of one hidden state.
        down_hz: float64 [..., nodes], P·g / N0 of the base station's signal at each node: the bandwidth at which
            signal and noise are equally strong.
        up_hz: float64 [..., nodes], the same for each node's signal at the base station.
    """

    row_bits: float
    down_hz: Float
    up_hz: Float

    def row_time(self, bandwidth: Float) -> RowTime:
        """Time per row and its derivatives; bandwidth in Hz."""
        down = _shannon_time(self.row_bits, self.down_hz, bandwidth)
        up = _shannon_time(self.row_bits, self.up_hz, bandwidth)
        return RowTime(*(d + u for d, u in zip(down, up, strict=True)))

    def each_layer(self) -> "ShannonLinks":
        """The same links with an axis for layers before the nodes."""
        return ShannonLinks(self.row_bits, self.down_hz[..., None, :], self.up_hz[..., None, :])


@dataclass(frozen=True, slots=True, eq=False)
class ShareLinks:
    """Links of given rates that take turns: with a share s of the time, a row takes `row_s / s`.

    Attributes:
        row_s: float64 [..., nodes], seconds of one row with the whole channel.
    """

    row_s: Float

    def row_time(self, bandwidth: Float) -> RowTime:
        """Time per row and its derivatives; bandwidth is a share of the time."""
        seconds = self.row_s / bandwidth
        return RowTime(seconds, -seconds / bandwidth, 2 * seconds / bandwidth**2)

    def each_layer(self) -> "ShareLinks":
        """The same links with an axis for layers before the nodes."""
        return ShareLinks(self.row_s[..., None, :])


def layer_seconds(links: Links, bandwidth: Float, rows: Float, fixed_s: Float) -> Float:
    """Time of each layer with an allocation, float64 [...].

    Args:
        links: time per row as a function of bandwidth.
        bandwidth: float64 [..., nodes], positive where rows are.
        rows: float64 [..., nodes], hidden states for each node.
        fixed_s: float64 [..., nodes], the part that does not depend on bandwidth.
    """
    row_s = links.row_time(np.where(bandwidth > 0, bandwidth, 1.0)).seconds
    time_s: Float = np.where(rows > 0, fixed_s + rows * row_s, 0.0).max(axis=-1)
    return time_s


def allocate_layer(links: Links, rows: Float, fixed_s: Float, total: float) -> Float:
    """The optimal allocation for one layer, float64 [..., nodes]; 0 for a node that is not asked.

    At the optimum all asked nodes finish at the same time T; otherwise the last one could be given bandwidth of the
    others. So T solves Σ_k B_k(T) = B with B_k(T) = τ_k⁻¹((T - fixed_k) / rows_k). The inverse of a convex decreasing
    function is convex and decreasing too, so Newton's method from a T that is too short approaches the root from below.

    Args:
        links: time per row as a function of bandwidth.
        rows: float64 [..., nodes], hidden states for each node; at least one node is asked.
        fixed_s: float64 [..., nodes], the part that does not depend on bandwidth.
        total: bandwidth of the channel, in the links' unit.
    """
    asked = rows > 0
    per_node = np.where(asked, rows, 1.0)
    bandwidth = np.full(rows.shape, total)
    # No node is faster than with the whole channel.
    time_s = layer_seconds(links, bandwidth, rows, fixed_s)[..., None]
    for _ in range(_MAX_STEPS):
        bandwidth = _bandwidth_for(links, np.where(asked, (time_s - fixed_s) / per_node, np.inf), bandwidth)
        excess = np.where(asked, bandwidth, 0.0).sum(axis=-1, keepdims=True) - total
        gained = np.where(asked, 1 / (per_node * links.row_time(bandwidth).slope), 0.0).sum(axis=-1, keepdims=True)
        step_s = -excess / gained
        time_s = time_s + step_s
        if (step_s <= _PRECISE * time_s).all():
            break
    given = np.where(asked, bandwidth, 0.0)
    given *= total / given.sum(axis=-1, keepdims=True)
    return given


def _bandwidth_for(links: Links, row_s: Float, start: Float) -> Float:
    """The bandwidth at which a row takes `row_s`, or `start` where that is infinite: Newton's method on log τ(log B).

    That function is convex and decreasing: from the right, a step leads to the left of the root, and from there on the
    bandwidth grows. Steps to the left are limited, because the function is almost flat where noise dominates.
    """
    wanted = np.isfinite(row_s)
    bandwidth = start
    for _ in range(_MAX_STEPS):
        time = links.row_time(bandwidth)
        step = np.log(np.where(wanted, row_s / time.seconds, 1.0)) * time.seconds / (bandwidth * time.slope)
        bandwidth = bandwidth * np.exp(np.maximum(step, -5.0))
        if (np.abs(step) <= _PRECISE).all():
            break
    return bandwidth


def allocate_common(links: Links, rows: Float, fixed_s: Float, total: float) -> Float:
    """The optimal single allocation for all layers, float64 [..., nodes]; 0 for a node that no layer asks.

    Uses the barrier method (Boyd & Vandenberghe, "Convex Optimization", section 11.3) on the problem's epigraph form:
    minimise Σ_i T_i with fixed_s[i, k] + rows[i, k]·τ_k(B_k) ≤ T_i. With m constraints and weight m/gap on the
    objective, the barrier problem's optimum is within `gap` of the problem's.

    Args:
        links: time per row as a function of bandwidth.
        rows: float64 [..., layers, nodes], hidden states for each node; each layer asks at least one node.
        fixed_s: float64 [..., layers, nodes] or broadcastable to it.
        total: bandwidth of the channel, in the links' unit.
    """
    asked = rows > 0
    used = np.asarray(asked.any(axis=-2))
    share = used / used.sum(axis=-1, keepdims=True)
    layers_s = layer_seconds(links.each_layer(), share[..., None, :] * total, rows, fixed_s)
    # Times are in units of the time with equal shares, which is at most `nodes` times the optimum.
    unit_s = layers_s.sum(axis=-1, keepdims=True)
    barrier = _Barrier(links, rows, fixed_s, asked, used, total, unit_s[..., None])
    point = _Point(share, (layers_s / unit_s) + 1 / rows.shape[-2])
    gap = 1.0
    while gap >= _GAP:
        point = barrier.centre(point, asked.sum(axis=(-1, -2)) / gap)
        gap /= 10
    bandwidth: Float = point.share / point.share.sum(axis=-1, keepdims=True) * total
    return bandwidth


class _Point(NamedTuple):
    share: Float
    """[..., nodes], shares of the total bandwidth."""
    time: Float
    """[..., layers], upper bounds of the layers' times."""

    def moved(self, direction: "_Point", length: Float) -> "_Point":
        return _Point(*(p + length[..., None] * d for p, d in zip(self, direction, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class _Barrier:
    """weight · Σ_i T_i - Σ_ik log(T_i - load_ik), on Σ_k share_k = 1."""

    links: Links
    rows: Float
    fixed_s: Float
    asked: Bool
    used: Bool
    total: float
    unit_s: Float

    def centre(self, point: _Point, weight: Float) -> _Point:
        """The minimum, by Newton's method with backtracking from a feasible point; `weight` is float64 [...]."""
        for _ in range(_MAX_STEPS):
            slack, slope, curvature = self._constraints(point)
            direction, decrement = self._newton(slack, slope, curvature, weight)
            moving = decrement >= _CENTRED
            length = np.where(moving, 1.0, 0.0)
            for _ in range(_MAX_HALVINGS):
                moving &= self._rise(point, point.moved(direction, length), slack, weight) > -0.1 * length * decrement
                if not moving.any():
                    break
                length = np.where(moving, length / 2, length)
            length[moving] = 0.0  # no step decreases the function: rounding errors dominate
            if not length.any():
                break
            point = point.moved(direction, length)
        return point

    def _constraints(self, point: _Point) -> tuple[Float, Float, Float]:
        """Slack of each constraint (infinite for nodes not asked) and derivatives of the load; [..., layers, nodes]."""
        bandwidth = np.where(self.used & (point.share > 0), point.share, 1.0) * self.total
        seconds, slope, curvature = (part[..., None, :] for part in self.links.row_time(bandwidth))
        load = (self.fixed_s + self.rows * seconds) / self.unit_s
        slack = np.where(self.asked, point.time[..., None] - load, np.inf)
        per_row = self.rows / self.unit_s
        return slack, per_row * slope * self.total, per_row * curvature * self.total**2

    def _rise(self, point: _Point, to: _Point, slack: Float, weight: Float) -> Float:
        """Change of the barrier function, [...]; infinite outside its domain. A difference, for precision."""
        ahead, _, _ = self._constraints(to)
        inside = np.asarray((ahead > 0).all(axis=(-1, -2)) & ((to.share > 0) | ~self.used).all(axis=-1))
        ratio = np.divide(ahead, slack, out=np.ones_like(slack), where=self.asked & inside[..., None, None])
        rise: Float = weight * (to.time - point.time).sum(axis=-1) - np.log(ratio).sum(axis=(-1, -2))
        return np.where(inside, rise, np.inf)

    def _newton(self, slack: Float, slope: Float, curvature: Float, weight: Float) -> tuple[_Point, Float]:
        """The Newton direction and its decrement λ² [...]. The times are eliminated from the system by layer."""
        price = 1 / slack
        square = price**2
        layer = square.sum(axis=-1, keepdims=True)
        pull = square * slope
        gradient_time = weight[..., None] - price.sum(axis=-1)
        gradient_share = (price * slope).sum(axis=-2)
        others = 1 - np.eye(slope.shape[-1])
        # Avoids differences of large numbers: near the optimum, one constraint's square exceeds all others.
        hessian = -np.swapaxes(pull / layer, -1, -2) @ pull * others
        diagonal: Float = (pull * slope * (square @ others) / layer + price * curvature).sum(axis=-2)
        hessian += np.where(self.used, diagonal, 1.0)[..., None] * np.eye(slope.shape[-1])
        right = np.stack([-gradient_share - (pull * (gradient_time[..., None] / layer)).sum(axis=-2), self.used], -1)
        free, budget = np.moveaxis(np.linalg.solve(hessian, right), -1, 0)
        share = free - budget * (free.sum(axis=-1, keepdims=True) / budget.sum(axis=-1, keepdims=True))
        time = ((pull * share[..., None, :]).sum(axis=-1) - gradient_time) / layer[..., 0]
        decrement: Float = -(gradient_share * share).sum(axis=-1) - (gradient_time * time).sum(axis=-1)
        return _Point(share, time), decrement


def _shannon_time(bits: float, signal_hz: Float, bandwidth: Float) -> RowTime:
    """Seconds for `bits` at B · log2(1 + signal_hz/B), with derivatives with respect to B."""
    snr = signal_hz / bandwidth
    rate = bandwidth * np.log1p(snr) / _LN2
    # ln(1+x) - x/(1+x) suffers from cancellation for weak signals; its series does not.
    series = snr**2 * (1 / 2 - snr * (2 / 3 - snr * (3 / 4 - snr * 4 / 5)))
    rate_slope = np.where(snr < 1e-3, series, np.log1p(snr) - snr / (1 + snr)) / _LN2
    rate_curvature = -((snr / (1 + snr)) ** 2) / bandwidth / _LN2
    seconds = bits / rate
    slope = -seconds * rate_slope / rate
    return RowTime(seconds, slope, seconds * (2 * (rate_slope / rate) ** 2 - rate_curvature / rate))
