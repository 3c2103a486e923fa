"""The experts of a device: loads them, proves that each computes what it should, and keeps the ones in use in memory.

Nodes use it, and a base station that computes some experts itself.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.clock import SYSTEM_CLOCK, Clock
from edge_node.errors import ProviderError
from edge_node.experts.memory import return_freed_memory, use_huge_pages
from edge_node.experts.prepacked import discard, prepacked_model
from edge_node.experts.providers import probe_tolerance
from edge_node.experts.session import ExpertSession
from wire.device_profiles import Provider
from wire.errors import BundleError, ProbeError
from wire.experts import UnitId
from wire.manifest import ExpertEntry, Manifest, verify_file
from wire.onnx_session import share_thread_pool
from wire.probe import probe_error, probe_input
from wire.tensors import Array

log = logging.getLogger(__name__)

BATCH_ROWS = 16
"""Size of a typical batch in hidden states: what draft tokens, or a few callers together, send to one expert."""
_LONELY_ROWS = 2
"""onnxruntime has special kernels for a single row, some of which round differently (int4 on processors with AVX2
only, for example). Two rows take 2 to 29 % longer there (docs/devices.md)."""
LARGE_EXPERT_BYTES = 16 << 20
"""Experts with less have no matrix that fills huge pages."""


@dataclass(slots=True)
class Loads:
    """What it has cost to keep only some experts in memory.

    Attributes:
        count: experts that were loaded while a request waited.
        ns: total time of these waits.
        evictions: experts that were removed to make room.
    """

    count: int = 0
    ns: int = 0
    evictions: int = 0


class ExpertRuntime:
    """Experts of one bundle, or slices of experts: each has a graph of its own.

    `run` is not thread-safe: all experts share one input and one output buffer. `add` and `drop` may be called from
    another thread, one at a time, as long as the expert is not run meanwhile.

    Attributes:
        manifest: of the bundle.
        most_loaded: number of experts in memory at once; None for all.
        least_rows: least number of rows per call: 2 if a single row would get another output than within a batch.
        same_in_batch: whether a hidden state then gets the same output alone and in a batch, as found with the first
            expert.
        loads: cost of loading experts since the start.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        ids: Iterable[UnitId],
        *,
        threads: int = 1,
        prepacked: Path | None = None,
        most_loaded: int | None = None,
        provider: Provider = "cpu",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Verify, load and prove every expert, even if only some of them stay in memory.

        Args:
            bundle: folder of the bundle.
            threads: computing threads, the same for all runtimes of this process.
            prepacked: folder of copies that are mapped instead of allocated (`edge_node.experts.prepacked`).
            most_loaded: keep this many in memory, those used last; others are loaded when a request needs them.
            provider: what computes; prepacked copies are used on the CPU only.
            clock: measures the waits for loading.

        Raises:
            BundleError: a file is missing, changed, or no valid model.
            StorageError: a prepacked copy can't be saved.
            ProbeError: an expert's output differs from the one recorded at export.
            ProviderError: the same on a GPU, or the GPU can't compute an expert at all.
        """
        if most_loaded is not None and most_loaded < 1:
            raise ValueError("most_loaded must be at least 1")
        share_thread_pool(threads)
        self.manifest = manifest
        self.most_loaded = most_loaded
        self.least_rows = 0
        self.same_in_batch = False
        self.loads = Loads()
        self._bundle = bundle
        self._clock = clock
        self._provider = provider
        self._prepacked = prepacked if provider == "cpu" else None
        self._hidden = manifest.dims.hidden
        self._entries: dict[UnitId, ExpertEntry] = {}
        self._sessions: dict[UnitId, ExpertSession] = {}  # the one used last comes last
        self._verified: dict[Path, tuple[int, ...]] = {}
        self._reserve(_LONELY_ROWS)
        for entry in manifest.entries(ids):
            self._make_room()
            self._load(entry)

    @property
    def ids(self) -> Sequence[UnitId]:
        """Experts that can be run, in the order in which they were added."""
        return tuple(self._entries)

    @property
    def loaded(self) -> Sequence[UnitId]:
        """Experts in memory. If not all of them are, those used last come last."""
        return tuple(self._sessions)

    def __contains__(self, id: UnitId) -> bool:
        return id in self._entries

    def add(self, id: UnitId) -> None:
        """Verify, load and prove one more expert.

        Raises:
            BundleError, StorageError, ProbeError: for the same reasons as the constructor.
        """
        (entry,) = self.manifest.entries([id])
        self._load(entry)

    def drop(self, id: UnitId) -> None:
        """Remove an expert and free its memory."""
        del self._entries[id]
        self._sessions.pop(id, None)
        return_freed_memory()

    def run(self, id: UnitId, x: Array) -> Array:
        """The expert's output, float32 [tokens, hidden], for `x` of the same shape.

        The result is a view that the next call overwrites.

        Raises:
            KeyError: the runtime does not have this expert.
            BundleError, StorageError, ProbeError: the expert was not in memory and can no longer be loaded.
        """
        session = self._sessions.get(id) or self._load_on_demand(self._entries[id])
        if self.most_loaded is not None:
            self._sessions[id] = self._sessions.pop(id)
        n = len(x)
        rows = max(n, self.least_rows)
        if rows > len(self._x):
            self._reserve(rows)
        self._x[:n] = x
        if rows > n:
            self._x[n:rows] = 0.0
        session.run(self._x, self._y, rows)
        return self._y[:n]

    def batch_invariant(self, id: UnitId) -> bool:
        """Whether this expert computes the same outputs, to the last bit, for `BATCH_ROWS` hidden states alone and
        together."""
        x = probe_input(self._hidden, BATCH_ROWS)
        alone = np.concatenate([self.run(id, row[None]).copy() for row in x])
        return np.array_equal(alone, self.run(id, x))

    def _find_least_rows(self, id: UnitId) -> None:
        """Set `least_rows` and `same_in_batch`; `least_rows` is 1 if two rows make no difference either."""
        for self.least_rows in (1, _LONELY_ROWS):
            self.same_in_batch = self.batch_invariant(id)
            if self.same_in_batch:
                return
        self.least_rows = 1

    def _reserve(self, tokens: int) -> None:
        self._x = np.zeros((tokens, self._hidden), np.float32)
        self._y = np.zeros((tokens, self._hidden), np.float32)

    def _load_on_demand(self, entry: ExpertEntry) -> ExpertSession:
        began_ns = self._clock.perf_ns()
        self.loads.evictions += self._make_room()
        session = self._load(entry)
        self.loads.count += 1
        self.loads.ns += self._clock.perf_ns() - began_ns
        return session

    def _make_room(self) -> int:
        """Remove the experts that have been unused for longest until there is room for one; returns how many."""
        evicted = 0
        while self.most_loaded is not None and len(self._sessions) >= self.most_loaded:
            del self._sessions[next(iter(self._sessions))]
            evicted += 1
        return evicted

    def _load(self, entry: ExpertEntry) -> ExpertSession:
        self._verify(entry)
        if self._prepacked is None:
            session = self._open(entry, self._bundle / entry.files[0].path)
        else:
            session = self._open_prepacked(entry, self._prepacked)
        self._entries[entry.id] = entry
        self._sessions[entry.id] = session
        if not self.least_rows:
            # All experts have the same graph, so the first one stands for all.
            self._find_least_rows(entry.id)
        return_freed_memory()
        if entry.bytes >= LARGE_EXPERT_BYTES:
            use_huge_pages()
        return session

    def _open(self, entry: ExpertEntry, model: Path) -> ExpertSession:
        session = ExpertSession(model, self._hidden, self._provider)
        self._prove(entry, session)
        return session

    def _open_prepacked(self, entry: ExpertEntry, folder: Path) -> ExpertSession:
        """Open the prepacked copy. It has no hash: if it is damaged, for example by a power cut, it is made again."""
        model = prepacked_model(self._bundle, entry, folder)
        try:
            return self._open(entry, model)
        except Exception as error:  # noqa: BLE001
            # A damaged model may load and then raise whatever onnxruntime raises.
            first_line = str(error).partition("\n")[0]
            log.warning("the prepacked copy of expert %s is damaged and is made again: %s", entry.name, first_line)
            discard(model)
        return self._open(entry, prepacked_model(self._bundle, entry, folder))

    def _verify(self, entry: ExpertEntry) -> None:
        """Check the files' hashes, unless they have not changed since the last check: an expert may be loaded many
        times."""
        for file in entry.files:
            path = self._bundle / file.path
            if path not in self._verified or _identity(path) != self._verified[path]:
                before = _identity(path)
                verify_file(self._bundle, file)
                self._verified[path] = before

    def _prove(self, entry: ExpertEntry, session: ExpertSession) -> None:
        x = probe_input(self._hidden)
        y = np.empty_like(x)
        try:
            session.run(x, y, 1)
        except Exception as failure:
            if self._provider == "cpu":
                raise
            # That the wheel has no kernels for a GPU shows only now.
            first_line = str(failure).partition("\n")[0]
            raise ProviderError(f"expert {entry.name} can't be computed: {first_line}") from None
        error = probe_error(entry.probe_output, y[0])
        # fp16 storage of the expected output alone can cost half a unit in the last place.
        tolerance = probe_tolerance(self.manifest, self._provider) + 2.0**-11
        if not error <= tolerance:  # also when error is NaN
            kind = ProbeError if self._provider == "cpu" else ProviderError
            raise kind(
                f"expert {entry.name} computes something else here than where it was exported: relative error "
                f"{error:.2g} on the probe input, {tolerance:.2g} allowed; export the bundle again with another "
                "--quant (wdmoe-export bundle)"
            )


def _identity(path: Path) -> tuple[int, ...]:
    """What the file system changes together with a file's content: inode, size and times.

    Raises:
        BundleError: the file is missing.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}): copy it again") from None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
