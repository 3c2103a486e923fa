"""Experts in the base station's own process: a thread that computes them, and one that exchanges them.

Computing has its own thread so that the nodes' answers are read off the socket as soon as they arrive: read later, a
fast link would look like a slow one.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bs_coordinator.dispatch.local_node import Computed
from bs_coordinator.resident.choice import Float, choose_resident
from bs_coordinator.resident.traffic import Traffic, write_traffic
from bs_coordinator.resident.wire_rounding import round_to_wire
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import StorageError, WdmoeError
from common.memory import available_bytes
from common.user_folders import describe
from edge_node.errors import MemoryBudgetError
from edge_node.experts import ExpertRuntime, fitting
from wire.experts import UnitId, expert_of, unit_name, units_of
from wire.frames import ExpertRows
from wire.manifest import Manifest
from wire.tensors import Array, WireDtype

log = logging.getLogger(__name__)

REVIEW_EVERY_S = 60.0
"""How often the choice is made again; traffic and links change over minutes."""
_CLOSE_S = 30.0


class ResidentExperts:
    """The experts that the base station keeps (`bs_coordinator.dispatch.local_node.LocalExperts`).

    Used from one thread. Experts are exchanged in the background; those that go are dropped only after that thread has
    called `changes`, and so no longer asks for them.

    Attributes:
        traffic: what the choice is made from.
        slots: how many experts there is room for.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        budget_bytes: int,
        wire: WireDtype,
        threads: int,
        traffic: Traffic,
        traffic_path: Path | None = None,
        prepacked: Path | None = None,
        review_every_s: float = REVIEW_EVERY_S,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            budget_bytes: RAM for them.
            wire: dtype of hidden states on the wire. Local inputs and outputs are rounded to it too, so that tokens do
                not depend on where experts are.
            threads: of the expert runtime.
            traffic_path: file that keeps the counts for the next start.
            prepacked: as of `ExpertRuntime`.
            review_every_s: how often the choice is made again.

        Raises:
            MemoryBudgetError: the budget is too small for one expert, or larger than the available memory.
        """
        available = available_bytes()
        if budget_bytes > available:
            raise MemoryBudgetError(
                f"--resident asks for {budget_bytes >> 20} MiB, {available >> 20} MiB are available: ask for less",
                needed_bytes=budget_bytes,
                available_bytes=available,
            )
        # Experts are kept whole: a token that waits for one slice elsewhere waits as long as for all.
        self.slots = fitting(manifest.experts, manifest.quantisation.scheme, budget_bytes) // manifest.dims.slices
        if not self.slots:
            raise MemoryBudgetError(
                f"--resident {budget_bytes >> 20}M has no room for a single expert of this bundle: ask for more",
                needed_bytes=manifest.dims.slices * max(entry.bytes for entry in manifest.experts),
                available_bytes=budget_bytes,
            )
        self.traffic = traffic
        self._traffic_path = traffic_path
        self._manifest = manifest
        self._slices = manifest.dims.slices
        self._wire = wire
        self._clock = clock
        self._runtime = ExpertRuntime(bundle, manifest, [], threads=threads, prepacked=prepacked)
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="resident-experts")
        self._under_way: list[Future[Computed]] = []
        self._offered: queue.SimpleQueue[frozenset[UnitId]] = queue.SimpleQueue()
        self._taken = threading.Event()
        self._stop = threading.Event()
        self._exchange: threading.Thread | None = None
        self._review_every_s = review_every_s
        self._next_review_s = float("inf")

    @property
    def ids(self) -> frozenset[UnitId]:
        """The units that are loaded: experts, or slices of experts."""
        return frozenset(self._runtime.ids)

    def observe(self, layer: int, gate: Array) -> None:
        """Count a layer's gate weights, float32 [tokens, experts], as traffic."""
        self.traffic.observe(layer, gate)

    def fill(self, remote_s: Float, local_s: float) -> "Future[frozenset[UnitId]]":
        """Choose and load the first experts, before any is asked for, and give those that are loaded.

        Args:
            remote_s, local_s: as of `choose_resident`.
        """
        return self._computing.submit(self._fill, remote_s, local_s)

    def submit(self, layer: int, hidden: Array, experts: Sequence[ExpertRows]) -> "Future[Computed]":
        """Start to compute a request of one layer; `hidden`, float32 [rows, hidden], must not change meanwhile."""
        future = self._computing.submit(self._compute, layer, hidden, experts, self._clock.perf_ns())
        self._under_way = [other for other in self._under_way if not other.done()]
        self._under_way.append(future)
        return future

    def changes(self) -> frozenset[UnitId] | None:
        """The experts to ask from now on if they have changed and no request is under way, else None. Cheap."""
        if self._offered.empty() or not all(future.done() for future in self._under_way):
            return None
        ids = self._offered.get()
        self._taken.set()
        return ids

    def review_is_due(self) -> bool:
        """Whether the choice should be made again."""
        return self._clock.monotonic_s() >= self._next_review_s

    def review(self, remote_s: Float, local_s: float) -> None:
        """Make the choice again and exchange experts in the background, unless an exchange is under way.

        Args:
            remote_s, local_s: as of `choose_resident`.
        """
        self._next_review_s = self._clock.monotonic_s() + self._review_every_s
        if self._exchange is None or not self._exchange.is_alive():
            pairs = self.traffic.pairs.copy()
            self._exchange = threading.Thread(
                target=self._exchange_experts, args=(pairs, remote_s, local_s), name="resident-exchange", daemon=True
            )
            self._exchange.start()

    def close(self) -> None:
        """Stop the threads and save the counts."""
        self._stop.set()
        self._taken.set()
        self._computing.shutdown(cancel_futures=True)
        if self._exchange is not None:
            self._exchange.join(_CLOSE_S)
        self._keep_traffic()

    def _fill(self, remote_s: Float, local_s: float) -> frozenset[UnitId]:
        for id in units_of(sorted(choose_resident(self.traffic.pairs, remote_s, local_s, self.slots)), self._slices):
            if self._stop.is_set():
                break
            self._runtime.add(id)
        self._next_review_s = self._clock.monotonic_s() + self._review_every_s
        return self.ids

    def _compute(self, layer: int, hidden: Array, experts: Sequence[ExpertRows], submitted_ns: int) -> Computed:
        begun_ns = self._clock.perf_ns()
        x = round_to_wire(hidden, self._wire)
        output = np.zeros(hidden.shape, np.float32)
        for part in experts:
            y = self._runtime.run(UnitId(layer, part.expert), x[part.tokens])
            output[part.tokens] += round_to_wire(y * part.weights[:, None], self._wire)
        done_ns = self._clock.perf_ns()
        return Computed(output, begun_ns - submitted_ns, done_ns - begun_ns, done_ns)

    def _exchange_experts(self, pairs: Float, remote_s: Float, local_s: float) -> None:
        self._keep_traffic()
        before = self.ids
        held = {expert_of(unit, self._slices) for unit in before}
        chosen = choose_resident(pairs, remote_s, local_s, self.slots, current=held)
        wanted = frozenset(units_of(chosen, self._slices))
        if wanted == before:
            return
        log.info("exchanging %d of the local experts", len(wanted - before) // self._slices)
        self._offer(before & wanted)
        if not self._wait_until_taken():
            return
        for id in before - wanted:
            self._runtime.drop(id)
        for id in sorted(wanted - before):
            if self._stop.is_set():
                return
            try:
                self._runtime.add(id)
            except WdmoeError as error:
                log.warning("%s is not kept locally: %s", unit_name(id, self._slices), error)
        self._offer(self.ids)

    def _offer(self, ids: frozenset[UnitId]) -> None:
        self._taken.clear()
        self._offered.put(ids)

    def _wait_until_taken(self) -> bool:
        """Wait until the experts that go are no longer asked for; False if the base station stops meanwhile."""
        self._taken.wait()
        return not self._stop.is_set()

    def _keep_traffic(self) -> None:
        if self._traffic_path is None:
            return
        try:
            write_traffic(self.traffic, self._traffic_path, self._manifest.model_sha256)
        except StorageError as error:
            log.warning("experts' traffic is not saved: %s", describe(error, "state") or error)
