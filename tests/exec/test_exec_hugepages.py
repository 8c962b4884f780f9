"""Memory in huge pages: what is asked of the system, and that nothing in memory changes."""

from __future__ import annotations

import numpy as np
import pytest

from hetis_exec import hugepages
from hetis_exec.hugepages import MADV_COLLAPSE, MADV_HUGEPAGE, PAGE_BYTES, use_huge_pages


def test_what_is_in_memory_stays_as_it_is() -> None:
    """Whatever this system can do."""
    array = np.arange(3 * PAGE_BYTES // 8)
    moved = use_huge_pages([(array.ctypes.data, array.nbytes)])
    assert 0 <= moved <= 4
    assert (array == np.arange(len(array))).all()


def test_each_page_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans may share a page; one that cannot be moved at once is to be moved in time."""
    asked: list[tuple[int, int]] = []

    def advise(address: int, size: int, what: int) -> int:
        assert size == PAGE_BYTES
        asked.append((address // PAGE_BYTES, what))
        return -1 if (address, what) == (4 * PAGE_BYTES, MADV_COLLAPSE) else 0

    monkeypatch.setattr(hugepages, "_advise", lambda: advise)
    spans = [(PAGE_BYTES, PAGE_BYTES), (2 * PAGE_BYTES - 1, 2), (5 * PAGE_BYTES - 1, 1), (0, 0)]
    moved = use_huge_pages(spans)
    assert moved == 2
    assert asked == [(1, MADV_COLLAPSE), (2, MADV_COLLAPSE), (4, MADV_COLLAPSE), (4, MADV_HUGEPAGE)]


def test_a_system_without_them_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of it."""
    monkeypatch.setattr(hugepages.sys, "platform", "darwin")
    assert use_huge_pages([(PAGE_BYTES, PAGE_BYTES)]) == 0


def test_moving_pages_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not been moved by then stays where it is."""
    monkeypatch.setattr(hugepages, "LIMIT_S", -1.0)
    monkeypatch.setattr(hugepages, "_advise", lambda: lambda *_: pytest.fail("it goes on"))
    assert use_huge_pages([(PAGE_BYTES, PAGE_BYTES)]) == 0
