"""Huge pages for memory that is read again and again: a processor finds its way through it faster.

Weights of a model are read once in each step, in order, from memory: with pages of 4 KiB fetching ahead
stops at the end of each.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable

PAGE_BYTES = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
"""Of Linux: pages become huge in time, or at once (from Linux 6.1 on)."""

LIMIT_S = 20.0
"""What has not been moved by then stays where it is: huge pages are a matter of speed alone."""


def use_huge_pages(spans: Iterable[tuple[int, int]]) -> int:
    """Have memory moved into huge pages, where the system can do so.

    Args:
        spans: address and bytes of memory that is in use, and that whoever calls keeps.

    Returns:
        Huge pages that there are now, as far as the system has said so.
    """
    advise = _advise()
    if advise is None:
        return 0
    pages = sorted({page for address, size in spans if size
                    for page in range(address // PAGE_BYTES, (address + size - 1) // PAGE_BYTES + 1)})
    begun_s, moved = time.monotonic(), 0
    for page in pages:
        if time.monotonic() - begun_s > LIMIT_S:
            break
        done = advise(page * PAGE_BYTES, PAGE_BYTES, MADV_COLLAPSE) == 0
        moved += done
        if not done:
            advise(page * PAGE_BYTES, PAGE_BYTES, MADV_HUGEPAGE)
    return moved


def _advise() -> ctypes._NamedFuncPointer | None:
    """The call of the system's library, on Linux with pages of 4 KiB."""
    if not sys.platform.startswith("linux") or os.sysconf("SC_PAGE_SIZE") != 4096:
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found.restype = ctypes.c_int
    return found
