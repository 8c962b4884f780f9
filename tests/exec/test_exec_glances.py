"""Samples held against the pace of their moment."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="real models need the extra exec")

from hetis_exec.calibrate.glances import APART_S, SHARE, Glances, at_mean_pace
from hetis_exec.calibrate.reference import PARTS, reference_samples
from hetis_exec.calibrate.samples import Point, Sample, Samples, frame_of
from hetis_exec.calibrate.tasks import Work
from hetis_exec.calibrate.turns import turns

TIMES, FAST_THEN_SLOW = [10.0, 10.1, 11.0, 11.1], [False, False, True, True]
SLOW = {"dense": 1.2, "attention": 1.3, "prompt": 1.1, "prompt_attention": 1.4}


def glances(kind: str, times: list[float], slow: list[bool]) -> Samples:
    """The reference work of a device that takes a second for each part, longer while it is slow."""
    found = []
    for at_s, is_slow in zip(times, slow, strict=True):
        parts = {part: SLOW[part] if is_slow else 1.0 for part in PARTS}
        found += reference_samples({kind: parts}, "m", at_s)
    return found


@pytest.mark.parametrize(("module", "tokens", "part"), [
    ("dense_layer", 1, "dense"), ("head", 8, "dense"), ("dense_layer", 64, "prompt"),
    ("dense_layer", 512, "prompt"), ("decode_attention", 4, "attention"),
    ("remote_attention", 4, "attention"), ("prefill_attention", 64, "prompt_attention")])
def test_samples_of_a_slow_spell_are_as_those_of_a_fast_one(module: str, tokens: int, part: str) -> None:
    """Each module by the part of the reference work that is like it, at the mean of all glances."""
    point = Point(module, "core", tokens=tokens)
    times, slow = [100.0, 101.0, 102.0, 103.0, 140.0, 141.0, 142.0, 143.0], [False] * 4 + [True] * 4
    raw = [Sample(point, 7.0, 101.5), Sample(point, 7.0 * SLOW[part], 141.5)]
    found = at_mean_pace(frame_of([*raw, *glances("core", times, slow)]))
    own = found[found["module"] == module]["seconds"].tolist()
    assert own == pytest.approx([7.0 * (1.0 + SLOW[part]) / 2.0] * 2)


def test_between_two_speeds_is_their_mean() -> None:
    """Which of them a sample had between two glances is not known; after the last it is theirs."""
    point, looks = Point("decode_attention", "core", tokens=2), glances("core", TIMES, FAST_THEN_SLOW)
    found = at_mean_pace(frame_of([Sample(point, 1.0, 10.5), Sample(point, 1.0, 15.0), *looks]))
    assert found["seconds"][:2].tolist() == pytest.approx([1.0, 1.15 / 1.3])


def test_what_the_reference_work_says_nothing_about_stays() -> None:
    """Host time, links, copies, devices that are not looked at, and samples far from any glance."""
    points = [Point("host_overhead", "host", tokens=2), Point("transfer", "loopback", size_bytes=8),
              Point("host_copy", "core", size_bytes=8), Point("dense_layer", "card", tokens=1),
              Point("head_packing", "core", size_bytes=8)]
    late = Sample(Point("head", "core", tokens=1), 1.0, 99.0)
    raw = [*(Sample(point, 1.0, 11.5) for point in points), late]
    found = at_mean_pace(frame_of([*raw, *glances("core", TIMES, FAST_THEN_SLOW)]))
    assert found["seconds"][:6].tolist() == [1.0] * 6


def test_glances_are_taken_when_there_is_time_for_them() -> None:
    """Each takes 0.3 s here: the next is due when as many times that has passed as their share asks for."""
    clock = [0.0]

    def look() -> Samples:
        clock[0] += 0.3
        return glances("core", [clock[0]], [False])

    watch = Glances(look, lambda: clock[0])
    for _ in range(1000):
        watch()
        clock[0] += 0.01
    taken = len(watch.samples) / len(PARTS)
    assert taken == pytest.approx(clock[0] / (0.3 + 0.3 / SHARE), abs=1.5)
    assert APART_S < 0.3 / SHARE


def test_whoever_measures_waits_for_the_glance() -> None:
    """A process that measures goes on when its parent has done what there is to do between samples."""
    seen: list[int] = []
    found = Work("ticks", _ticks, apart=True).run(apart=True, tick=lambda: seen.append(len(seen)))
    assert seen == [0, 1, 2]
    assert [sample.seconds for sample in found] == [0.0, 1.0, 2.0]


def _ticks(tick: object) -> Samples:
    assert callable(tick)
    found = []
    for n in range(3):
        found.append(Sample(Point("head", "core"), float(n)))
        tick()
    return found


@pytest.mark.parametrize(("each_s", "quick", "number"), [(0.1, False, 5), (4.0, False, 3), (40.0, False, 2),
                                                         (4.0, True, 2), (0.1, True, 5)])
def test_slow_devices_take_fewer_turns(each_s: float, quick: bool, number: int) -> None:
    """Two at least, none that begins after enough time, and no more than were asked for."""
    clock = [0.0]
    found = []
    for turn in turns(5, 10.0, quick, lambda: clock[0]):
        found.append(turn)
        clock[0] += each_s
    assert found == list(range(number))
