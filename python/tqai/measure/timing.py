"""Times of several things beside each other, on a machine that others may use as well."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Long enough that a short call is repeated, so that one turn has a median of its own.
_TURN_SECONDS = 20e-3
_MIN_ROUNDS = 3
BUFFER_BYTES = 256 << 20
"""What the machine's bandwidth is measured over: more than its caches hold."""


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round: the median of its turn, which short calls fill several
    times.

    All calls have a turn in every round, so that what disturbs the machine disturbs all alike. The
    first round is not counted. Rounds end after `seconds`, but not before three.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    repeats = {}
    for name, call in calls.items():
        call()  # whatever runs for the first time
        repeats[name] = max(1, min(1000, int(_TURN_SECONDS / max(_seconds_of(call), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if repeats[name] > 1:
                call()  # brings back into the caches what the others' turns have pushed out
            turn = [_seconds_of(call) for _ in range(repeats[name])]
            times[name].append(statistics.median(turn))
            if progress is not None:
                progress(done, rounds, name)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long `slow` takes: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def wait_for(device: torch.device) -> None:
    """Returns when `device` has done what it was given; the CPU has."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)


def memory_reader() -> Callable[[], Any]:
    """A call that reads ``BUFFER_BYTES`` once, with torch's threads: a sum."""
    import torch

    buffer = torch.ones(BUFFER_BYTES // 4)
    return buffer.sum


def keep_freed_memory() -> bool:
    """Has the C library keep what this process frees from now on; whether that was possible, which
    it is with glibc.

    A call's temporaries of megabytes otherwise come from the system anew each time, which clears
    them page by page, or do not, by what happened to be allocated before: that alone made torch's
    product of one query with 8192 keys two and a half times as slow in one process as in another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    # −1 never gives back the end of the heap; no allocation has a mapping of its own.
    return bool(libc.mallopt(trim_threshold, -1)) and bool(libc.mallopt(mmap_max, 0))


def _seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
