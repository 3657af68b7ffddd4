"""What disks, networks and programs do to bytes."""

from __future__ import annotations

import os
import random

CORRUPTIONS = int(os.environ.get("TQAI_TEST_CORRUPTIONS", "3000"))
"""100 000 with scripts/test --full."""


def damage(data: bytes, chance: random.Random) -> bytes:
    """`data`, changed in one of the ways in which disks, networks and programs change it."""
    damaged = bytearray(data)
    kind = chance.randrange(7)
    at = chance.randrange(len(data))
    length = min(chance.choice((1, 2, 8, 64, 4096)), len(data) - at)
    if kind == 0:
        damaged[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        damaged[at : at + length] = chance.randbytes(length)
    elif kind == 2:
        damaged[at : at + length] = bytes(length)
    elif kind == 3:
        del damaged[at:]
    elif kind == 4:
        del damaged[at : at + length]
    elif kind == 5:
        damaged[at:at] = chance.randbytes(length)
    else:
        source = chance.randrange(len(data) - length + 1)
        damaged[at : at + length] = data[source : source + length]
    return bytes(damaged)
