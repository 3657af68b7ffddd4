"""What the system says about this process's memory."""

from __future__ import annotations

import ctypes
import gc


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


def reset_peak() -> bool:
    """Makes ``peak_resident_bytes`` count from now on; whether the system does."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """The most physical memory since ``reset_peak``; None where the system does not tell."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
