"""Freed memory is kept: the pages of large arrays are asked for once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hetis_exec.heap import keep_freed_memory

SCRIPT = """
import ctypes, resource, sys
import numpy as np
if sys.argv[1] == "kept":
    from hetis_exec.heap import keep_freed_memory
    assert keep_freed_memory()
def allocate():
    arrays = [np.empty(20 << 20, dtype=np.uint8) for _ in range(4)]
    for array in arrays:
        array[::4096] = 1
allocate()
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of 80 MiB that are allocated a third time."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True,
                          timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="an allocator that cannot be told so")
def test_freed_memory_is_used_again() -> None:
    """Left to itself the allocator asks for all of it anew."""
    assert faults("kept") < 10
    assert faults("left") > 20
