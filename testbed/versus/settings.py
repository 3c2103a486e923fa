"""What a comparison runs, and where it says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from testbed.network.uniform import Links
from testbed.node_shares import Cores
from testbed.versus.floors import Shape
from wire.manifest import Dims


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run.

    Attributes:
        shape, dims: of the bundle.
        arms: names that `check_arm` accepts.
        links: the arms are started anew when `shared_air` changes.
        devices: ids of the devices besides the base station.
        prompts: texts to answer.
        tokens: longest answer.
        ignore_eos: end tokens do not end answers, so each has `tokens` tokens.
        threads: of each program on a device.
        head_threads: of each program on the base station.
        trunk: options of `wdmoe-bs serve` for where the trunk is computed.
        cores: a core for all programs of a device, and those of the base station; None for no such limits.
        deadline_s: silence after which an answer counts as hung.
        start_s: longest wait for an arm to be ready.
        kill: whether to kill a device at the end.
        folder: for results and logs.
    """

    bundle: Path
    draft_model: Path | None
    shape: Shape
    dims: Dims
    arms: Sequence[str]
    links: Sequence[Links]
    devices: Sequence[str]
    prompts: Sequence[str]
    tokens: int
    ignore_eos: bool
    threads: int
    head_threads: int
    trunk: Mapping[str, str]
    cores: Cores | None
    deadline_s: float
    start_s: float
    kill: bool
    folder: Path
    console: Console

    def say(self, line: str) -> None:
        """Print a line of progress."""
        self.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    def as_results(self, *, stays_awake: bool) -> dict[str, object]:
        """These settings as results keep them.

        Args:
            stays_awake: whether the processor's idle states are off.
        """
        return {
            "bundle": self.bundle.name, "shape": self.shape._asdict(), "experts": self.dims.experts,
            "links": [{"profile": one.profile, **one._asdict()} for one in self.links],
            "devices": len(self.devices), "prompts": list(self.prompts), "tokens": self.tokens,
            "ignore_eos": self.ignore_eos, "threads": self.threads, "head_threads": self.head_threads,
            "trunk": dict(self.trunk),
            "cores": self.cores and {"station": list(self.cores.station), "devices": list(self.cores.nodes)},
            "deadline_s": self.deadline_s, "start_s": self.start_s, "stays_awake": stays_awake,
        }  # fmt: skip
