"""Fresh processes, and what the system says about this one."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def run_fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function`'s result from a process that has done nothing else, so that its memory can be
    told from the rest. Exceptions pass through."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise OSError("the process that ran the model ended early (out of memory?)") from None


def resident_bytes() -> int | None:
    """Physical memory of this process, after giving back what is free; None where the system
    does not tell (it does on Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc: what is free stays counted
    try:
        # Unlike statm, summed over the page tables and so exact.
        with open("/proc/self/smaps_rollup") as lines:
            for line in lines:
                if line.startswith("Rss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
