"""The recorder: what goes in comes out as typed tables."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from metrics_fakes import add_rejected, add_request, add_step

from hetis_sim.metrics import Recorder
from hetis_sim.spec.errors import SpecError


def test_requests_become_typed_rows_in_order_of_arrival() -> None:
    """Rows are sorted by arrival, integers are int64, times float64, words categories."""
    recorder = Recorder()
    add_request(recorder, 7, 2.0)
    add_request(recorder, 3, 1.0, instance=2, preemptions=1, moved_bytes=5.5)
    frame = recorder.requests()
    assert list(frame["request_id"]) == [3, 7]
    assert frame["request_id"].dtype == np.int64
    assert frame["finish_s"].dtype == np.float64
    assert str(frame["status"].dtype) == "category"
    first = frame.iloc[0]
    assert (first["instance"], first["preemptions"], first["moved_bytes"]) == (2, 1, 5.5)


def test_latencies_are_differences_of_the_clocks() -> None:
    """ttft, tpot, e2el and queue follow from arrival, first step, first token and finish."""
    recorder = Recorder()
    add_request(recorder, 0, 10.0, first_scheduled_s=10.5, first_token_s=12.0, finish_s=18.0, output_tokens=4)
    row = recorder.requests().iloc[0]
    assert (row["queue_s"], row["ttft_s"], row["tpot_s"], row["e2el_s"]) == (0.5, 2.0, 2.0, 8.0)


def test_a_single_token_has_no_time_per_output_token() -> None:
    """tpot of a request of one token is nan, its other latencies are not."""
    recorder = Recorder()
    add_request(recorder, 0, 0.0, output_tokens=1, first_token_s=2.0, finish_s=2.0)
    row = recorder.requests().iloc[0]
    assert math.isnan(row["tpot_s"])
    assert row["ttft_s"] == row["e2el_s"] == 2.0


def test_rejected_requests_stay_in_the_table_without_latencies() -> None:
    """A rejection is a row with its reason; a rejected request that got a first token has no ttft."""
    recorder = Recorder()
    add_rejected(recorder, 0, 1.0, "context_limit")
    add_request(recorder, 1, 2.0, status="rejected", reason="device_lost", first_token_s=3.0, finish_s=4.0)
    frame = recorder.requests()
    assert list(frame["reason"]) == ["context_limit", "device_lost"]
    assert frame[["ttft_s", "tpot_s", "e2el_s"]].isna().all().all()


def test_steps_keep_every_field() -> None:
    """A step comes back as it was recorded."""
    recorder = Recorder()
    recorder.step(1, 2, 1, 0.5, 1.5, 7, 32, 3, 224, 0.1, 0.2, 0.3, 0.15, 0.1, 0.05, 0.1)
    row = recorder.steps().iloc[0].to_dict()
    assert row == {
        "instance": 1, "lane": 2, "kind": "decode", "start_s": 0.5, "end_s": 1.5, "iterations": 7,
        "requests": 32, "prefill_tokens": 3, "decode_tokens": 224,
        "host_s": 0.1, "dense_s": 0.2, "collective_s": 0.3,
        "attention_s": 0.15, "head_transfer_s": 0.1, "hop_s": 0.05, "waiting_s": 0.1,
    }


def test_transfers_keep_places_and_kind() -> None:
    """Devices are ids, host memory is negative, the kind is a word."""
    recorder = Recorder()
    recorder.transfer(4, "swap_out", 1.0, 2.0, 100.0, 3, -2)
    row = recorder.transfers().iloc[0]
    assert (row["request_id"], row["kind"], row["source"], row["target"]) == (4, "swap_out", 3, -2)


def test_unknown_words_are_refused() -> None:
    """A kind of transfer or a status that does not exist is an error that names the allowed ones."""
    recorder = Recorder()
    with pytest.raises(SpecError, match="swap_in"):
        recorder.transfer(0, "teleport", 0.0, 1.0, 1.0, 0, 1)
    with pytest.raises(SpecError, match="finished"):
        add_request(recorder, 0, 0.0, status="lost")


def test_every_device_needs_a_capacity() -> None:
    """Labels without capacities are refused."""
    with pytest.raises(SpecError, match="capacity_bytes"):
        Recorder(devices=["a", "b"], capacity_bytes=[1.0])


def test_an_empty_recorder_has_empty_tables() -> None:
    """Nothing recorded gives tables of no rows with all columns."""
    recorder = Recorder(devices=["a"], capacity_bytes=[1.0])
    assert len(recorder.requests()) == len(recorder.steps()) == len(recorder.transfers()) == 0
    assert list(recorder.samples().columns) == ["now_s", "running", "waiting", "used_bytes_0", "busy_s_0",
                                                 "heads_0"]


def test_recording_goes_on_after_a_look_at_the_tables() -> None:
    """Tables are copies: more rows can be added, and the earlier tables do not change."""
    recorder = Recorder(devices=["a"], capacity_bytes=[1.0])
    add_step(recorder, 0.0, 1.0)
    recorder.itl(0.1, 0.2, 3, 2)
    recorder.sample(0.0, 1, 0, [0.5])
    before = recorder.records()
    add_step(recorder, 1.0, 2.0)
    recorder.itl(0.1, 0.2, 3, 2)
    recorder.sample(1.0, 1, 0, [0.5])
    after = recorder.records()
    assert (len(before.steps), len(before.itl), len(before.samples)) == (1, 1, 1)
    assert (len(after.steps), len(after.itl), len(after.samples)) == (2, 2, 2)


def test_memory_stays_near_the_raw_size() -> None:
    """20,000 steps and gaps cost at most 1.3 times their packed bytes."""
    recorder = Recorder()
    tracemalloc.start()
    for _ in range(20_000):
        recorder.step(0, 1, 1, 1.5, 2.5, 7, 32, 0, 224, 0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0)
        recorder.itl(0.05, 0.06, 7, 32)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    packed = 20_000 * (4 + 4 + 1 + 4 * 8 + 9 * 8 + 4 * 8)
    assert packed <= held <= 1.3 * packed


def test_counters_busy_time_and_peaks_add_up() -> None:
    """Counters and busy time are sums, peaks are maxima."""
    recorder = Recorder(devices=["a", "b"], capacity_bytes=[10.0, 10.0])
    recorder.count("moves")
    recorder.count("moves", 2)
    recorder.busy(1, 0.5)
    recorder.busy(1, 0.25)
    recorder.peak(0, 7.0)
    recorder.peak(0, 3.0)
    records = recorder.records()
    assert records.counters == {"moves": 3}
    assert records.busy_s == (0.0, 0.75)
    assert records.peak_bytes == (7.0, 0.0)


def sampled(times_s: np.ndarray, *, skip: bool) -> Recorder:
    """A recorder shown the system at these times, asking first where ``skip``."""
    recorder = Recorder()
    for now_s in times_s:
        if not skip or now_s >= recorder.next_sample_s:
            recorder.sample(float(now_s), 1, 2, [])
    return recorder


@pytest.mark.parametrize("length_s", [1.0, 100.0, 1e6])
def test_samples_are_bounded_and_spread_over_the_run(length_s: float) -> None:
    """However long the run, at most 2000 looks are kept, evenly enough to leave no gap of 1 %."""
    times_s = np.sort(np.random.default_rng(1).random(50_000)) * length_s
    now_s = sampled(times_s, skip=False).samples()["now_s"].to_numpy()
    assert 100 <= len(now_s) <= 2000
    assert (np.diff(now_s) > 0).all()
    assert np.diff(now_s).max() < 0.01 * length_s
    assert now_s[0] == times_s[0]


def test_skipping_calls_before_the_next_sample_changes_nothing() -> None:
    """A caller that looks at next_sample_s gets the same rows as one that always calls."""
    times_s = np.cumsum(np.random.default_rng(2).exponential(0.01, 20_000))
    every, some = sampled(times_s, skip=False), sampled(times_s, skip=True)
    assert every.samples().equals(some.samples())
