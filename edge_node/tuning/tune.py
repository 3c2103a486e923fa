"""Chooses among bundles of one model in several quantisations, by measurements on this device."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import onnxruntime

from common.systemd import notify
from edge_node.config import Rule
from edge_node.errors import TuningError
from edge_node.experts.memory import fitting, needed_bytes, room_bytes
from edge_node.experts.prepacked import processor
from edge_node.tuning.measurement import TIMEOUT_S, measure_apart, sample
from edge_node.tuning.tuning_file import (
    Conditions,
    Tuning,
    TuningMeasurement,
    decide,
    read_tuning,
    what_changed,
    write_tuning,
)
from wire.device_profiles import Provider
from wire.experts import format_selector, parse_selector
from wire.manifest import Manifest
from wire.signature import load_trusted_manifest

log = logging.getLogger(__name__)
ROUNDS = 2


class Variants:
    """The bundles to choose from, and the experts that the device is to hold."""

    def __init__(
        self,
        bundles: Sequence[Path],
        selector: str,
        *,
        key: Path | None = None,
        budget: int | None = None,
        all_resident: bool = True,
        most_threads: int,
        threads: Sequence[int] = (),
        providers: Sequence[Provider] = ("cpu",),
    ) -> None:
        """Read the manifests.

        Args:
            bundles: folders of the bundles.
            selector: experts that the device is to hold.
            key: public key with which the bundles must be signed; not checked if None.
            budget: the user's limit of memory in bytes.
            all_resident: whether all experts must be in memory at once.
            most_threads: largest number of threads to try.
            threads: numbers of threads to try; powers of two and `most_threads` if empty.
            providers: execution providers, to be tried in this order.

        Raises:
            ValueError: the selector is not valid for this model.
            BundleError: a bundle is not valid, or lacks an expert.
            TuningError: the bundles are not variants of one model.
        """
        self._manifests: dict[str, tuple[Path, Manifest]] = {}
        for bundle in bundles:
            manifest = load_trusted_manifest(bundle, key)
            name = str(manifest.quantisation)
            if name in self._manifests:
                raise TuningError(f"{self._manifests[name][0]} and {bundle} are both {name}: name one of them")
            self._manifests[name] = (bundle, manifest)
        first_bundle, first = next(iter(self._manifests.values()))
        for bundle, manifest in self._manifests.values():
            if manifest.model_sha256 != first.model_sha256:
                raise TuningError(f"{bundle} and {first_bundle} were cut from different checkpoints")
            if manifest.dims.slices != first.dims.slices:
                raise TuningError(f"{bundle} and {first_bundle} are cut into different numbers of slices")
        dims = first.dims
        self._ids = parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
        self._budget = budget
        self._all_resident = all_resident
        self._threads_given = bool(threads)
        self._threads = tuple(threads) or thread_numbers(most_threads)
        self._providers = tuple(providers)
        self._conditions = Conditions(
            model_sha256=first.model_sha256,
            experts=format_selector(self._ids, dims.slices),
            available=tuple(sorted(self._manifests)),
            threads=self._threads,
            providers=self._providers,
            processor=hashlib.sha256(processor().encode()).hexdigest()[:16],
            onnxruntime=onnxruntime.__version__,
        )

    def chosen(self, file: Path) -> tuple[Path, Tuning]:
        """The bundle to serve from, by the choice in `file`. A choice that is missing or no longer valid is made first.

        Raises:
            TuningError: no bundle can be used, or `file` is not a tuning file.
            StorageError: `file` can't be written.
        """
        tuning = read_tuning(file)
        if tuning is not None and not self._threads_given:
            self._threads = tuning.conditions.threads
            self._conditions = msgspec.structs.replace(self._conditions, threads=self._threads)
        if tuning is None:
            log.info("choosing quantisation and threads: measuring them once on this device")
            tuning = self.tune(file, Rule())
        elif changed := what_changed(tuning.conditions, self._conditions):
            log.info("measuring again: %s changed since %s was written", changed, file)
            tuning = self.tune(file, tuning.rule)
        return self._manifests[tuning.quantisation][0], tuning

    def tune(self, file: Path, rule: Rule) -> Tuning:
        """Measure, choose by `rule`, and write the choice to `file`.

        Raises:
            TuningError: no bundle can be used.
            StorageError: `file` can't be written.
        """
        measurements: dict[tuple[str, int], TuningMeasurement] = {}
        arms = [(name, threads) for name in self._manifests for threads in self._threads]
        for round in range(ROUNDS):
            # Forwards, then backwards, so that no combination always meets the warmer processor.
            for name, threads in arms if round % 2 == 0 else reversed(arms):
                if (before := measurements.get((name, threads))) and before.refused:
                    continue
                notify(f"EXTEND_TIMEOUT_USEC={int(2 * TIMEOUT_S * 1e6)}")
                measurement = self._measure(name, threads)
                measurements[name, threads] = before.joined(measurement) if before else measurement
                log.info(
                    "%s on %d threads: %s", name, threads, measurement.refused or f"{measurement.token_ms[0]:.3g} ms"
                )
        tuning = decide(list(measurements.values()), rule, self._conditions)
        write_tuning(file, tuning)
        return tuning

    def _measure(self, name: str, threads: int) -> TuningMeasurement:
        bundle, manifest = self._manifests[name]
        entries, scheme = manifest.entries(self._ids), manifest.quantisation.scheme
        room, tried = room_bytes(self._budget), sample(entries)
        fits = needed_bytes(entries, scheme) <= room if self._all_resident else fitting(entries, scheme, room) > 0
        if not fits or needed_bytes(tried, scheme) > room:
            needed = needed_bytes(entries, scheme) >> 20
            why = f"needs about {needed} MiB of RAM, there are {room >> 20}"
            return TuningMeasurement(quantisation=name, threads=threads, refused=why)
        return measure_apart(bundle, manifest, [entry.id for entry in tried], threads, self._providers)


def thread_numbers(most: int) -> tuple[int, ...]:
    """Numbers of threads to try: the powers of two below `most`, and `most`."""
    return (*(1 << k for k in range(most.bit_length()) if 1 << k < most), most)
