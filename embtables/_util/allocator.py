"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Has the C library (glibc) keep what a step frees for the next one, instead of giving it back to the system.

    Activations of some megabytes are otherwise mapped, and their pages zeroed, anew in each step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3
    # Older releases take no more than 32 MiB.
    for option in (mmap_threshold, trim_threshold):
        mallopt(option, 2**30) or mallopt(option, 2**25)
