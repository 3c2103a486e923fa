"""Inputs that are nearly right, drawn from a seed; pure."""

import random
from collections.abc import Sequence

_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"{",
    b'"',
    b"-",
)
_MOST_BYTES = 1 << 16


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after one to four changes: bits, bytes, numbers, cuts, repetitions, splices."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                value = rng.choice(_INTERESTING)
                data[at : at + len(value)] = value
            case 3:
                del data[at : at + rng.randint(1, 16)]
            case 4:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 5:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case _:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data[:_MOST_BYTES])
