"""A small made-up serving system whose record has every feature, for tests of the metrics."""

from __future__ import annotations

import math

import numpy as np

from hetis_sim.metrics.recorder import Recorder

DEVICES = ("0:a100-80gb@host0", "1:p100-12gb@host1")
CAPACITY_BYTES = (1000.0, 500.0)

PLAN = {"instances": [{"stages": [{"devices": [0], "layers": 4, "owned_groups": [8]}],
                       "attention_workers": [1], "role": "both"}]}


def add_request(recorder: Recorder, request_id: int, arrival_s: float, **changes: object) -> None:
    """One finished request of 10 prompt and 3 output tokens; ``changes`` override any field."""
    fields = {
        "prompt_tokens": 10, "output_tokens": 3, "status": "finished", "reason": "", "instance": 0,
        "first_scheduled_s": arrival_s + 0.5, "first_token_s": arrival_s + 1.0, "finish_s": arrival_s + 2.0,
        "preemptions": 0, "moves": 0, "moved_bytes": 0.0, "remote_share": 0.0,
    }
    recorder.request(request_id=request_id, arrival_s=arrival_s, **(fields | changes))


def add_rejected(recorder: Recorder, request_id: int, arrival_s: float, reason: str) -> None:
    """One request turned away on arrival."""
    nan = math.nan
    add_request(recorder, request_id, arrival_s, status="rejected", reason=reason, instance=-1,
                first_scheduled_s=nan, first_token_s=nan, finish_s=nan)


def add_step(recorder: Recorder, start_s: float, end_s: float, **changes: object) -> None:
    """One decode iteration of two requests, a quarter of its time for the host and the rest dense."""
    duration = end_s - start_s
    fields = {
        "instance": 0, "lane": 0, "kind": 1, "iterations": 1, "requests": 2, "prefill_tokens": 0,
        "decode_tokens": 2, "host_s": 0.25 * duration, "dense_s": 0.75 * duration, "collective_s": 0.0,
        "attention_s": 0.0, "head_transfer_s": 0.0, "hop_s": 0.0, "waiting_s": 0.0,
    }
    recorder.step(start_s=start_s, end_s=end_s, **(fields | changes))


Queue = tuple[np.ndarray, np.ndarray, np.ndarray]


def served_queue(n: int, load: float, *, seed: int, servers: int = 1) -> Queue:
    """Arrival, finish and begin-of-service times of a first-come M/M/c queue with mean service of 1 s."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / (load * servers), n))
    service_s = rng.exponential(1.0, n)
    free_s = [0.0] * servers
    begin_s = np.empty(n)
    for i in range(n):
        server = min(range(servers), key=free_s.__getitem__)
        begin_s[i] = max(free_s[server], arrival_s[i])
        free_s[server] = begin_s[i] + service_s[i]
    return arrival_s, begin_s + service_s, begin_s


def fake_run(n: int = 300, *, load: float = 0.5, seed: int = 1) -> Recorder:
    """A whole record: one prefill and one collapsed decode step a request, pushes, moves, rejections."""
    recorder = Recorder(devices=DEVICES, capacity_bytes=CAPACITY_BYTES)
    arrivals, finishes, begins = served_queue(n, load, seed=seed)
    events = [(t, 1, i) for i, t in enumerate(arrivals)] + [(t, 0, i) for i, t in enumerate(finishes)]
    inside = 0
    for now_s, arrives, i in sorted(events):
        inside += 1 if arrives else -1
        if not arrives:
            _serve(recorder, i, arrivals[i], begins[i], now_s)
        used_bytes = [100.0 * min(inside, 9), 50.0 * (inside > 0)]
        recorder.sample(now_s, min(inside, 1), max(inside - 1, 0), used_bytes)
    add_rejected(recorder, n, float(arrivals[-1]), "context_limit")
    recorder.count("dispatches", n)
    return recorder


def _serve(recorder: Recorder, i: int, arrival_s: float, begin_s: float, finish_s: float) -> None:
    """Record one service: a third of it prompt, the rest one decode step of 1 to 8 iterations."""
    first_s = begin_s + (finish_s - begin_s) / 3
    gaps = i % 8 + 1
    add_step(recorder, begin_s, first_s, kind=0, requests=1, prefill_tokens=10 + i, decode_tokens=0)
    add_step(recorder, first_s, finish_s, iterations=gaps, requests=1, decode_tokens=gaps)
    gap_s = (finish_s - first_s) / gaps
    recorder.itl(0.9 * gap_s, 1.1 * gap_s, gaps, 1)
    recorder.busy(0, finish_s - begin_s)
    recorder.busy(1, 0.5 * (finish_s - first_s))
    recorder.transfer(i, "push", begin_s, first_s, 100.0, 0, 1)
    if i % 50 == 0:
        recorder.transfer(i, "move", first_s, finish_s, 40.0, 1, -1)
    add_request(recorder, i, arrival_s, prompt_tokens=10 + i, output_tokens=gaps + 1,
                first_scheduled_s=begin_s, first_token_s=first_s, finish_s=finish_s,
                moves=int(i % 50 == 0), remote_share=0.5)
