"""The emulated boards: a processor model for qemu, and the matching `/proc/cpuinfo`.

onnxruntime chooses its kernels by both, and crashes at import if they contradict each other.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Board:
    """A board to emulate.

    Attributes:
        name: short name, also the node id.
        model: model name as in the device tree.
        cpu: qemu's name of the processor.
        part: Arm's part number of the processor.
        variant: major revision of the processor.
        features: features that Linux lists in `/proc/cpuinfo`.
    """

    name: str
    model: str
    cpu: str
    part: int
    variant: int
    features: str

    @property
    def dot_product(self) -> bool:
        """Whether the processor has the dot-product instructions that the 4-bit and 8-bit block kernels use."""
        return "asimddp" in self.features.split()

    def cpuinfo(self) -> str:
        """Content of the board's `/proc/cpuinfo`, with four cores."""
        core = (
            "processor\t: {core}\n"
            "BogoMIPS\t: 108.00\n"
            f"Features\t: {self.features}\n"
            "CPU implementer\t: 0x41\n"
            "CPU architecture: 8\n"
            f"CPU variant\t: {self.variant:#x}\n"
            f"CPU part\t: {self.part:#x}\n"
            "CPU revision\t: 1\n\n"
        )
        return "".join(core.format(core=k) for k in range(4)) + f"Model\t\t: {self.model}\n"


BOARDS = (
    Board(
        "pi5", "Raspberry Pi 5 Model B", "cortex-a76", 0xD0B, 4,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
    Board("pi4", "Raspberry Pi 4 Model B", "cortex-a72", 0xD08, 0, "fp asimd evtstrm crc32 cpuid"),
)  # fmt: skip
