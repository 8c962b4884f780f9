"""Rings of shared memory: records from one process of a host to another, without a call of the system.

One process writes and one reads. Positions count bytes from the beginning and only grow; a record lies in one
piece, and where there is no room for it before the end of the ring the rest is skipped. An empty ring begins
anew, so that records of like size use the same memory again, which caches hold. What has been read belongs to
whoever refers to it: arrays and tensors may be views of it, and its room is given back when the last is gone.

The memory has no name, so nothing is left of it whatever becomes of the processes. Writers rely on stores
being seen in their order, which x86 processors guarantee; elsewhere there are no rings.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections import deque
from multiprocessing.reduction import DupFd
from threading import Lock
from typing import Any
from weakref import ref

LINE_BYTES = 64
"""Of a cache: records and what either side writes begin at such."""

WRITTEN, READ, ASLEEP = 0, LINE_BYTES // 8, 2 * LINE_BYTES // 8
"""Words of eight bytes in front of a ring: two positions, and whether the reader is to be woken."""

CONTROL_BYTES = 3 * LINE_BYTES
SKIPPED = (1 << 64) - 1
"""Size of a record that only says that the next one is at the beginning of the ring."""

_FENCE = Lock()
"""Taking a lock is an operation that no store of this thread is seen after."""


def has_rings() -> bool:
    """Whether this system and this processor can have them."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


class Region:
    """Memory that processes of this host share, zeros at first.

    It goes along with the arguments of a process that is being started.
    """

    def __init__(self, size_bytes: int, number: int | None = None) -> None:
        if number is None:
            number = os.memfd_create("hetis-ring", os.MFD_CLOEXEC)
            os.ftruncate(number, size_bytes)
        self._number = number
        self._size_bytes = size_bytes
        self.memory = mmap.mmap(number, size_bytes)
        self.words = memoryview(self.memory).cast("Q")

    def __reduce__(self) -> tuple[Any, ...]:
        return _region_of, (self._size_bytes, DupFd(self._number))

    def keep(self) -> None:
        """No process is going to be given it any more."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def close(self) -> None:
        """Leave it to those that have been given it."""
        self.keep()
        self.words.release()
        self.memory.close()


def _region_of(size_bytes: int, duplicate: Any) -> Region:
    region = Region(size_bytes, duplicate.detach())
    region.keep()
    return region


def lines(size_bytes: int) -> int:
    """A size in whole cache lines, in bytes."""
    return -(-size_bytes // LINE_BYTES) * LINE_BYTES


class RingWriter:
    """The end that writes.

    Args:
        begin, size_bytes: of the ring in the region, its control words among them; whole cache lines.
    """

    def __init__(self, region: Region, begin: int, size_bytes: int) -> None:
        self.memory = region.memory
        self._words = region.words
        self._control = begin // 8
        self._begin = begin + CONTROL_BYTES
        self._size = size_bytes - CONTROL_BYTES
        self._written = 0
        self._taken = 0

    def room(self, size_bytes: int) -> int | None:
        """Where in the memory a record of some size may be written; None if there is no room for it."""
        need = LINE_BYTES + lines(size_bytes)
        read = self._words[self._control + READ]
        at = self._written % self._size
        free, rest = self._size - (self._written - read), self._size - at
        if read == self._written and 0 < need <= at:
            at = self._skip(at, rest)
        elif rest < need:
            if free < rest + need:
                return None
            at = self._skip(at, rest)
        elif free < need:
            return None
        self._taken = need
        return self._begin + at + LINE_BYTES

    def _skip(self, at: int, rest: int) -> int:
        self._words[(self._begin + at) // 8] = SKIPPED
        self._written += rest
        self._words[self._control + WRITTEN] = self._written
        return 0

    def publish(self, number: int) -> bool:
        """Hand over the record for which there was room last; whether the reader is to be woken."""
        words, at = self._words, (self._begin + self._written % self._size) // 8
        words[at], words[at + 1] = self._taken, number
        self._written += self._taken
        words[self._control + WRITTEN] = self._written
        with _FENCE:
            pass
        return words[self._control + ASLEEP] != 0


class RingReader:
    """The end that reads; see :class:`RingWriter`."""

    def __init__(self, region: Region, begin: int, size_bytes: int) -> None:
        self.memory = region.memory
        self._words = region.words
        self._control = begin // 8
        self._begin = begin + CONTROL_BYTES
        self._size = size_bytes - CONTROL_BYTES
        self._at = 0
        self._held: deque[_Held] = deque()

    def next(self) -> int | None:
        """Number of the next record; None if there is none."""
        words = self._words
        while self._at != words[self._control + WRITTEN]:
            at = self._at % self._size
            place = (self._begin + at) // 8
            if words[place] != SKIPPED:
                return words[place + 1]
            self._at += self._size - at
            self._held.append(_Held(self._at))
            self._give_back()
        return None

    def take(self) -> ctypes.Array[ctypes.c_char]:
        """The next record, which there must be; its room is given back when nothing refers to it any more."""
        place = self._begin + self._at % self._size
        need = self._words[place // 8]
        record = (ctypes.c_char * (need - LINE_BYTES)).from_buffer(self.memory, place + LINE_BYTES)
        self._at += need
        held = _Held(self._at)
        held.record = ref(record, lambda _: self._forget(held))
        self._held.append(held)
        return record

    def sleep(self) -> None:
        """Have the writer say from now on that this end is to be woken."""
        self._words[self._control + ASLEEP] = 1
        with _FENCE:
            pass

    def wake(self) -> None:
        """The other end need not say so any more."""
        self._words[self._control + ASLEEP] = 0

    def _forget(self, held: _Held) -> None:
        held.record = None
        self._give_back()

    def _give_back(self) -> None:
        while self._held and self._held[0].record is None:
            self._words[self._control + READ] = self._held.popleft().end


class _Held:
    """A piece of the ring up to some position, and the record that is there for as long as there is one."""

    __slots__ = ("end", "record")

    def __init__(self, end: int) -> None:
        self.end = end
        self.record: Any = None
