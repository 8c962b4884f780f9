"""How often the printed 95 % intervals hold the truth: python benchmarks/interval_coverage.py.

M/M/1 queues in steady state, whose sojourn times have a known distribution, many seeds
each. The figures in docs/metrics.md come from here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.intervals import mean_interval, percentile_interval
from hetis_sim.metrics.saturation import saturation

SEEDS = 400
SERVICE_S = 1.0

Floats = NDArray[np.float64]


def queue(
    rng: np.random.Generator, load: float, customers: int, start_wait_s: float
) -> tuple[Floats, Floats, Floats]:
    """Arrival, start of service and end of each customer of a first-come queue (Lindley's recursion)."""
    arrival_s = np.cumsum(rng.exponential(SERVICE_S / load, customers))
    service_s = rng.exponential(SERVICE_S, customers)
    before = np.concatenate(([0.0], np.cumsum(service_s)[:-1]))
    free_s = np.maximum.accumulate(np.maximum(arrival_s - before, start_wait_s + arrival_s[0]))
    start_s = free_s + before
    return arrival_s, start_s, start_s + service_s


def stationary_wait_s(rng: np.random.Generator, load: float) -> float:
    """Work found by an arrival in steady state: zero with probability 1 - load, else exponential."""
    return float(rng.exponential(SERVICE_S / (1 - load))) if rng.random() < load else 0.0


def coverage(load: float, customers: int) -> tuple[float, float, float]:
    """Share of seeds whose intervals hold the true mean, p95 and p99 of the sojourn time."""
    mean_s = SERVICE_S / (1 - load)
    truths = (mean_s, -mean_s * np.log(0.05), -mean_s * np.log(0.01))
    hits = np.zeros(3)
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        arrival_s, _, end_s = queue(rng, load, customers, stationary_wait_s(rng, load))
        sojourn_s = end_s - arrival_s
        ascending = np.sort(sojourn_s)
        found = (
            mean_interval(sojourn_s),
            percentile_interval(sojourn_s, ascending, 95),
            percentile_interval(sojourn_s, ascending, 99),
        )
        for i, ((low, high), truth) in enumerate(zip(found, truths, strict=True)):
            hits[i] += not (truth < low or truth > high)
    mean, p95, p99 = hits / SEEDS
    return float(mean), float(p95), float(p99)


def verdicts(load: float, customers: int) -> dict[str, float]:
    """Share of seeds that get each verdict on saturation, the queue starting empty."""
    found = {"stable": 0, "undetermined": 0, "saturated": 0}
    for seed in range(SEEDS):
        arrival_s, start_s, end_s = queue(np.random.default_rng(seed), load, customers, 0.0)
        found[saturation(arrival_s, end_s, start_s).verdict] += 1
    return {name: count / SEEDS for name, count in found.items()}


def main() -> None:
    """Print both tables."""
    print(
        f"coverage of 95 % intervals, {SEEDS} seeds\n{'load':>5} {'n':>7} {'mean':>6} {'p95':>6} {'p99':>6}"
    )
    for load in (0.5, 0.7, 0.8, 0.9):
        for customers in (1000, 10_000):
            mean, p95, p99 = coverage(load, customers)
            print(f"{load:5.2f} {customers:7d} {mean:6.1%} {p95:6.1%} {p99:6.1%}")
    print(f"\nverdict on saturation, {SEEDS} seeds")
    print(f"{'load':>5} {'n':>7} {'stable':>8} {'unknown':>8} {'saturated':>10}")
    for load in (0.5, 0.8, 0.9, 1.0, 1.05, 1.1, 1.3):
        for customers in (1000, 10_000):
            share = verdicts(load, customers)
            print(
                f"{load:5.2f} {customers:7d} {share['stable']:8.1%} {share['undetermined']:8.1%} "
                f"{share['saturated']:10.1%}"
            )


if __name__ == "__main__":
    main()
