"""Timelines that Perfetto opens: valid JSON, slices of one track never overlap."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_fakes import add_step, fake_run

from hetis_sim.metrics import Recorder, write_timeline

Event = dict[str, Any]


def timeline(path: Path, recorder: Recorder, **options: Any) -> list[Event]:
    """Write a timeline and read it back."""
    write_timeline(path, recorder.steps(), recorder.transfers(), recorder.samples(), **options)
    return json.loads(path.read_text())["traceEvents"]


def assert_disjoint(events: list[Event]) -> None:
    """On every track a slice ends before the next begins (to a hundredth of a nanosecond)."""
    slices = sorted((e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X")
    for before, after in itertools.pairwise(slices):
        if before[:2] == after[:2]:
            assert before[3] <= after[2] + 1e-5


def test_every_step_and_transfer_is_a_slice(tmp_path: Path) -> None:
    """All rows appear, with their figures, on tracks that have names."""
    recorder = fake_run(100)
    events = timeline(tmp_path / "timeline.json", recorder)
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(recorder.steps()) + len(recorder.transfers())
    assert slices[0]["args"]["host_s"] == pytest.approx(0.25e-6 * slices[0]["dur"])
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in slices} <= named
    assert_disjoint(events)


def test_overlapping_transfers_get_tracks_of_their_own(tmp_path: Path) -> None:
    """Three transfers at once on one link lie on three tracks, the fourth reuses one."""
    recorder = Recorder()
    for start_s, end_s in ((0.0, 3.0), (1.0, 4.0), (2.0, 5.0), (3.0, 6.0)):
        recorder.transfer(0, "push", start_s, end_s, 1.0, 0, -1)
    events = timeline(tmp_path / "timeline.json", recorder)
    assert_disjoint(events)
    assert len({event["tid"] for event in events if event["ph"] == "X"}) == 3
    assert "device 0 to host 0 memory" in {event["args"].get("name") for event in events}


def test_random_transfers_never_overlap_on_a_track(tmp_path: Path) -> None:
    """Whatever the times, the tracks are sound."""
    rng = np.random.default_rng(1)
    recorder = Recorder()
    for i in range(500):
        start_s = rng.random() * 10
        recorder.transfer(i, "move", start_s, start_s + rng.exponential(0.2), 1.0, int(rng.integers(3)), 3)
    assert_disjoint(timeline(tmp_path / "timeline.json", recorder))


def test_steps_that_touch_do_not_overlap_after_rounding(tmp_path: Path) -> None:
    """Consecutive steps late in a long run still touch, though microseconds are coarse there."""
    recorder = Recorder()
    ends_s = 1e6 + np.cumsum(np.random.default_rng(2).random(1000) * 1e-6)
    for start_s, end_s in itertools.pairwise(ends_s):
        add_step(recorder, float(start_s), float(end_s))
    slices = [event for event in timeline(tmp_path / "timeline.json", recorder) if event["ph"] == "X"]
    for before, after in itertools.pairwise(slices):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1e-3)


def test_counters_show_the_system(tmp_path: Path) -> None:
    """Every sample gives the number of requests and the cache of each device."""
    recorder = fake_run(50)
    counters = [event for event in timeline(tmp_path / "timeline.json", recorder) if event["ph"] == "C"]
    assert len(counters) == 3 * len(recorder.samples())
    assert {event["name"] for event in counters} == {"requests", "KV of device 0", "KV of device 1"}


def test_a_stretch_can_be_cut_out(tmp_path: Path) -> None:
    """Only what begins in the stretch is written."""
    events = timeline(tmp_path / "timeline.json", fake_run(100), from_s=10.0, to_s=20.0)
    begins = [event["ts"] for event in events if "ts" in event]
    assert begins
    assert 10e6 <= min(begins) <= max(begins) < 20e6


def test_an_empty_run_has_a_valid_timeline(tmp_path: Path) -> None:
    """No rows, no events, no temporary file left."""
    assert timeline(tmp_path / "timeline.json", Recorder()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]
