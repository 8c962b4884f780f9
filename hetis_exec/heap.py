"""Memory that is freed stays with the process: what comes next need not ask the system for pages again.

Activations of a long prompt are allocated and freed in every layer. Left to itself the allocator gives
much of that back to the system, which hands it out again page by page, each of them zeroed.
"""

from __future__ import annotations

import ctypes
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``: memory at the end of the heap that is kept, and sizes that get memory
of their own, which goes back to the system with them."""

KEPT_BYTES = 1 << 30
OWN_BYTES = 32 << 20
"""The largest that glibc takes."""


@cache
def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed, for as long as the process lives.

    Returns:
        Whether it can be told so: that of glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES) and mallopt(MMAP_THRESHOLD, OWN_BYTES))
