"""Whether disks have room for what is about to be written to them."""

import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.errors import StorageError
from common.sizes import readable_bytes


class Room(NamedTuple):
    """Room that something needs.

    Attributes:
        place: file or folder to be written, which need not exist yet.
        bytes: size.
        what: the thing, for the message.
    """

    place: Path
    bytes: int
    what: str


def check_room(rooms: Iterable[Room], *, remedy: str) -> None:
    """Check that there is room for several things; those on one disk are added up.

    Args:
        remedy: what users can do about it, for the message.

    Raises:
        StorageError: there is not.
    """
    by_disk: dict[int, list[Room]] = defaultdict(list)
    for room in rooms:
        by_disk[_existing(room.place).stat().st_dev].append(room)
    for group in by_disk.values():
        place = _existing(group[0].place)
        free = shutil.disk_usage(place).free
        if sum(room.bytes for room in group) > free:
            needs = " and ".join(f"{room.what} needs {readable_bytes(room.bytes)}" for room in group if room.bytes)
            raise StorageError(f"{place} has {readable_bytes(free)} free, but {needs}: {remedy}")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
