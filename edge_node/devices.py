"""Which device this is, from what its kernel and system say."""

from pathlib import Path


def board_model(root: Path = Path("/")) -> str:
    """The board's name in the device tree, such as `Raspberry Pi 5 Model B Rev 1.0`; empty on a PC."""
    try:
        return (root / "proc/device-tree/model").read_text(errors="replace").rstrip("\0\n")
    except OSError:
        return ""
