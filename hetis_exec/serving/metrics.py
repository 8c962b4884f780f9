"""Figures of a serving engine in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from hetis_exec.serving.engine import ServingEngine
from hetis_exec.totals import Histogram


def exposition(engine: ServingEngine) -> str:
    """All figures."""
    totals = engine.totals
    running, waiting = engine.running_and_waiting()
    lines = [
        *_counter("requests_total", "Requests that have ended, by reason", "reason", totals.requests),
        *_counter("steps_total", "Steps that have ended, by what they compute", "kind", totals.steps),
        *_counter("cache_sent_bytes_total", "Cache sent between devices, by kind", "kind", totals.sent_bytes),
        *_value("counter", "prompt_tokens_total", "Tokens in prompts of ended requests",
                totals.prompt_tokens),
        *_value("counter", "generated_tokens_total", "Tokens generated for ended requests",
                totals.generated_tokens),
        *_value("counter", "preemptions_total", "Times that ended requests lost their cache",
                totals.preemptions),
        *_value("counter", "moves_total", "Times that heads of ended requests have moved", totals.moves),
        *_value("gauge", "requests_running", "Requests that hold cache", running),
        *_value("gauge", "requests_waiting", "Requests that wait for cache", waiting),
        *_histogram("time_to_first_token_seconds", "From arrival to the first token", totals.ttft),
        *_histogram("time_between_tokens_seconds", "From a token to the next of its request", totals.gap),
        *_devices(engine)]
    return "\n".join(lines) + "\n"


def _head(kind: str, name: str, about: str) -> list[str]:
    return [f"# HELP hetis_{name} {about}.", f"# TYPE hetis_{name} {kind}"]


def _value(kind: str, name: str, about: str, value: float) -> list[str]:
    return [*_head(kind, name, about), f"hetis_{name} {value}"]


def _counter(name: str, about: str, label: str, values: Mapping[str, int]) -> list[str]:
    return [*_head("counter", name, about),
            *(f'hetis_{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items()))]


def _histogram(name: str, about: str, histogram: Histogram) -> Iterator[str]:
    yield from _head("histogram", name, about)
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    counts = list(accumulate(histogram.counts))
    for bound, count in zip(bounds, counts, strict=True):
        yield f'hetis_{name}_bucket{{le="{bound}"}} {count}'
    yield f"hetis_{name}_sum {histogram.total}"
    yield f"hetis_{name}_count {counts[-1]}"


def _devices(engine: ServingEngine) -> Iterator[str]:
    totals = engine.totals
    caches = totals.caches()
    yield from _head("gauge", "cache_used_bytes", "Cache in use on a device")
    for label, used, _ in caches:
        yield f'hetis_cache_used_bytes{{device="{_quoted(label)}"}} {used}'
    yield from _head("gauge", "cache_bytes", "Cache that a device has")
    for label, _, there in caches:
        yield f'hetis_cache_bytes{{device="{_quoted(label)}"}} {there}'
    yield from _head("counter", "busy_seconds_total", "Time that a device has computed")
    for label, seconds in zip(totals.recorder.devices, totals.device_busy_s, strict=True):
        yield f'hetis_busy_seconds_total{{device="{_quoted(label)}"}} {seconds}'


def _quoted(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
