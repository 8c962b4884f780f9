"""Figures of a run, on rows made by hand and on a made-up queue."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from metrics_fakes import PLAN, add_rejected, add_request, add_step, fake_run

from hetis_sim.metrics import (
    Recorder,
    Records,
    Trim,
    little_residual,
    record_violations,
    roles_of_plan,
    summarize,
)
from hetis_sim.metrics.columns import Table
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.slo import Slo

SLO = Slo(ttft_s=1.5, tpot_s=0.6)


def four_requests() -> Recorder:
    """Arrivals at 0, 10, 20, 30 s; latencies as in the table below; the last one is rejected.

    ======= ====== ====== ====== ======
    request ttft   tokens e2el   SLO
    ======= ====== ====== ====== ======
    0       1 s    3      2 s    holds
    1       2 s    1      2 s    ttft too long
    2       1 s    11     11 s   tpot 1 s, too long
    ======= ====== ====== ====== ======
    """
    recorder = Recorder()
    add_request(recorder, 0, 0.0, preemptions=2)
    add_request(recorder, 1, 10.0, output_tokens=1, first_token_s=12.0, finish_s=12.0, moves=3)
    add_request(recorder, 2, 20.0, output_tokens=11, first_token_s=21.0, finish_s=31.0)
    add_rejected(recorder, 3, 30.0, "cache_capacity")
    return recorder


def test_rates_run_from_the_first_arrival_to_the_last_end() -> None:
    """With nothing left out, throughput divides by the time that vllm bench serve divides by."""
    rates = summarize(four_requests(), slo=SLO).throughput
    assert rates.duration_s == 31.0
    assert rates.request_throughput == pytest.approx(3 / 31)
    assert rates.output_throughput == pytest.approx(15 / 31)
    assert rates.total_token_throughput == pytest.approx((15 + 30) / 31)
    assert rates.request_goodput == pytest.approx(1 / 31)


def test_latencies_of_finished_requests() -> None:
    """Means, percentiles and numbers of samples are those of the finished requests."""
    summary = summarize(four_requests(), slo=SLO)
    assert (summary.ttft_s.n, summary.tpot_s.n, summary.e2el_s.n) == (3, 2, 3)
    assert summary.ttft_s.mean == pytest.approx(4 / 3)
    assert summary.ttft_s.p50 == 1.0
    assert summary.tpot_s.mean == pytest.approx(0.75)
    assert summary.e2el_s.p90 == pytest.approx(np.percentile([2, 2, 11], 90))
    assert summary.queue_s.mean == 0.5


def test_every_request_is_accounted_for() -> None:
    """Submitted is finished, rejected (by reason) and unfinished together."""
    counts = summarize(four_requests(), slo=SLO, submitted=6, horizon_s=40.0).requests
    assert (counts.submitted, counts.finished, counts.rejected, counts.unfinished) == (6, 3, 1, 2)
    assert counts.rejected_by_reason == {"cache_capacity": 1}
    with pytest.raises(SpecError, match="submitted=3"):
        summarize(four_requests(), slo=SLO, submitted=3)


def test_a_stopped_run_is_measured_up_to_where_it_was_stopped() -> None:
    """Rates of a run that was cut divide by the time it ran."""
    assert summarize(four_requests(), slo=SLO, horizon_s=60.0).throughput.request_throughput == 3 / 60


def test_rejected_requests_count_against_the_slo() -> None:
    """One of four holds the SLO; a single token is held to the first limit alone."""
    assert summarize(four_requests(), slo=SLO).slo.attainment == 0.25
    assert summarize(four_requests(), slo=Slo(ttft_s=2.0, tpot_s=0.6)).slo.attainment == 0.5


def test_preemptions_and_moves_are_summed() -> None:
    """Both are counted over all requests."""
    summary = summarize(four_requests(), slo=SLO)
    assert (summary.preemptions, summary.moves) == (2, 3)


def test_trimming_leaves_out_requests_by_arrival() -> None:
    """A quarter off each end leaves requests 1 and 2, and the window between arrivals 1 and 3."""
    summary = summarize(four_requests(), slo=SLO, trim=Trim(0.25, 0.25))
    window = summary.window
    assert (window.from_s, window.to_s, window.dropped_warmup, window.dropped_tail) == (10.0, 30.0, 1, 1)
    assert summary.ttft_s.mean == 1.5
    assert summary.requests.measured == 2
    assert summary.throughput.request_throughput == 1 / 20
    # Tokens at 12 s, at 21 s and nine of the ten that are made between 21 s and 31 s.
    assert summary.throughput.output_throughput == pytest.approx(11 / 20)
    assert summary.whole_run.output_throughput == pytest.approx(15 / 31)
    assert window.sentence == "2 of 4 requests measured: without the first 1 and the last 1 by arrival"


def test_gaps_outside_the_window_are_left_out() -> None:
    """With a warm-up, gaps recorded before the window do not count."""
    recorder = Recorder()
    for i in range(4):
        recorder.itl(0.1 * (i + 1), 0.1 * (i + 1), 1, 1)
        add_request(recorder, i, 10.0 * i)
    assert summarize(recorder, slo=SLO).itl_s.mean == pytest.approx(0.25)
    assert summarize(recorder, slo=SLO, trim=Trim(0.5)).itl_s.mean == pytest.approx(0.35)


@pytest.mark.parametrize(("warmup", "tail", "key"), [
    (-0.1, 0.0, "warmup_fraction"), (math.nan, 0.0, "warmup_fraction"), (0.0, 1.5, "drop_tail_fraction"),
    (0.6, 0.4, "drop_tail_fraction"),
])
def test_trims_that_leave_nothing_are_refused(warmup: float, tail: float, key: str) -> None:
    """The error names the key and the value."""
    with pytest.raises(SpecError, match=key):
        Trim(warmup, tail)


def test_cache_use_is_averaged_over_time() -> None:
    """A look holds until the next one: 100 bytes for 1 s and 300 for 3 s are 250 on average."""
    recorder = Recorder(devices=["a", "b"], capacity_bytes=[1000.0, 0.0])
    add_request(recorder, 0, 0.0, finish_s=4.0)
    recorder.sample(0.0, 1, 0, [100.0, 0.0])
    recorder.sample(1.0, 1, 0, [300.0, 0.0])
    recorder.peak(0, 400.0)
    recorder.busy(0, 3.0)
    summary = summarize(recorder, slo=SLO, roles=["primary", "idle"])
    first, second = summary.devices
    assert (first.kv_used_mean, first.kv_used_max, first.busy_share) == (0.25, 0.4, 0.75)
    assert (first.role, second.role) == ("primary", "idle")
    assert math.isnan(second.kv_used_mean)
    assert (summary.kv_used_mean, summary.kv_used_max) == (0.25, 0.3)


def test_busy_share_of_a_window_is_read_off_the_samples() -> None:
    """A device that works only in the second half is busy half of the time, and all of it there."""
    recorder = Recorder(devices=["a"], capacity_bytes=[1.0])
    for i in range(11):
        add_request(recorder, i, float(i), first_token_s=i + 0.5, finish_s=i + 1.0)
    for now_s in range(12):
        recorder.busy_s[0] = max(0.0, now_s - 5.5)
        recorder.sample(float(now_s), 1, 0, [0.5])
    assert summarize(recorder, slo=SLO).devices[0].busy_share == pytest.approx(5.5 / 11)
    assert summarize(recorder, slo=SLO, trim=Trim(0.6)).devices[0].busy_share == pytest.approx(1.0)


def test_work_told_at_the_end_is_spread_over_the_run() -> None:
    """Without work in the samples, a window gets the share of the whole run."""
    recorder = Recorder(devices=["a"], capacity_bytes=[1.0])
    for i in range(10):
        add_request(recorder, i, float(i))
        recorder.sample(float(i), 1, 0, [0.5])
    recorder.busy(0, 5.5)
    assert summarize(recorder, slo=SLO, trim=Trim(0.5)).devices[0].busy_share == pytest.approx(5.5 / 11)


def test_iteration_time_is_shared_out_by_part_and_kind() -> None:
    """Shares are of the summed durations; time that no part claims is called other."""
    recorder = Recorder()
    add_request(recorder, 0, 0.0, finish_s=10.0)
    add_step(recorder, 0.0, 1.0, kind=0, host_s=0.5, dense_s=0.5)
    add_step(recorder, 1.0, 4.0, iterations=3, requests=2, host_s=0.0, dense_s=1.5)
    use = summarize(recorder, slo=SLO).iterations
    assert use["all"].time_s == 4.0
    assert (use["all"].shares["host"], use["all"].shares["dense"]) == (0.125, 0.5)
    assert use["all"].shares["other"] == pytest.approx(0.375)
    assert (use["decode"].iterations, use["decode"].batch_mean) == (3, 2.0)
    assert use["prefill"].shares["other"] == 0.0
    assert "mixed" not in use


def test_transfers_are_counted_by_kind() -> None:
    """Number, distinct requests and bytes of each kind that occurred."""
    recorder = four_requests()
    recorder.transfer(0, "push", 0.0, 1.0, 10.0, 0, 1)
    recorder.transfer(0, "push", 0.0, 1.0, 20.0, 0, 2)
    recorder.transfer(1, "swap_out", 2.0, 3.0, 5.0, 0, -1)
    use = summarize(recorder, slo=SLO).transfers
    assert set(use) == {"push", "swap_out"}
    assert (use["push"].transfers, use["push"].requests, use["push"].size_bytes) == (2, 1, 30.0)


def test_a_run_of_nothing_and_one_of_rejections_have_summaries() -> None:
    """No division by zero: figures that do not exist are nan."""
    assert math.isnan(summarize(Recorder(), slo=SLO).throughput.request_throughput)
    recorder = Recorder()
    add_rejected(recorder, 0, 1.0, "context_limit")
    summary = summarize(recorder, slo=SLO)
    assert summary.requests.rejected == 1
    assert summary.slo.attainment == 0.0
    assert math.isnan(summary.ttft_s.p99)


def test_a_saturated_run_has_no_intervals_of_latency() -> None:
    """Where the queue grows there is no mean to bound; times per token keep their intervals."""
    summary = summarize(fake_run(1000, load=1.5), slo=SLO)
    assert summary.saturation.verdict == "saturated"
    assert math.isnan(summary.ttft_s.mean_interval.low)
    assert summary.itl_s.mean_interval.low > 0
    steady = summarize(fake_run(1000, load=0.5), slo=SLO)
    assert steady.ttft_s.mean_interval.low < steady.ttft_s.mean < steady.ttft_s.mean_interval.high


def test_roles_come_from_the_plan() -> None:
    """Devices of a stage are primary, or named after the phase that their instance serves."""
    assert roles_of_plan(PLAN, 3) == ("primary", "attention", "idle")
    split = {"instances": [{"stages": [{"devices": [1]}], "role": "prefill"}]}
    assert roles_of_plan(split, 2) == ("idle", "prefill")


def test_a_sound_record_has_no_violations() -> None:
    """The made-up queue obeys the identity between N(t) and sojourn times, and all other rules."""
    records = fake_run(500, load=0.8).records()
    assert record_violations(records) == []
    assert little_residual(records.requests) < 1e-12


def test_the_identity_catches_a_wrong_count() -> None:
    """A driver that counts one request too many for a while breaks the identity."""
    requests = four_requests().records().requests
    times_s, number = np.array([0.0, 2.0, 10.0, 12.0, 20.0, 31.0]), np.array([1, 0, 1, 0, 1, 0])
    assert little_residual(requests, times_s, number) == 0.0
    number[1] += 1
    assert little_residual(requests, times_s, number) > 0.1


def broken(name: str, change: Callable[[Table], dict[str, np.ndarray]]) -> Records:
    """The sound record with columns of one table replaced."""
    records = fake_run(100).records()
    table = getattr(records, name)
    return dataclasses.replace(records, **{name: Table(table.columns | change(table), table.categories)})


BROKEN = {
    "a request id occurs twice": broken("requests", lambda t: {"request_id": t["request_id"] // 2}),
    "first_token_s <= finish_s": broken("requests", lambda t: {"finish_s": t["first_token_s"] - 0.1}),
    "without a reason": broken("requests", lambda t: {"reason": np.zeros_like(t["reason"])}),
    "end before they start": broken("steps", lambda t: {"end_s": t["start_s"] - 1.0}),
    "do not make their duration": broken("steps", lambda t: {"dense_s": t["dense_s"] * 1.01}),
    "negative length": broken("steps", lambda t: {"hop_s": t["hop_s"] - 1, "waiting_s": t["waiting_s"] + 1}),
    "overlap on their lane": broken("steps", lambda t: {"start_s": t["start_s"] - 0.01}),
    "transfers end before": broken("transfers", lambda t: {"end_s": t["start_s"] - 1.0}),
    "samples out of order": broken("samples", lambda t: {"now_s": t["now_s"][::-1].copy()}),
    "more cache than device 1": broken("samples", lambda t: {"used_bytes_1": t["used_bytes_1"] + 600}),
    "another number in the system": broken("samples", lambda t: {"waiting": t["waiting"] + 1}),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_each_kind_of_broken_record_is_caught(expected: str) -> None:
    """The sentence says what is wrong."""
    assert any(expected in sentence for sentence in record_violations(BROKEN[expected]))
