"""How long a simulation takes, and that collapsed steps change nothing.

    python benchmarks/simulation.py [--requests 20000]

Hetis serves Llama-2-70B on the paper's cluster; ShareGPT lengths, Poisson arrivals at 80 % of the
throughput that an overloaded run reaches. Times are of one process on one core; compare them with
the plain Python loop that is timed in the same run.
"""

from __future__ import annotations

import argparse
import resource
import time

from hetis_sim.config import compose
from hetis_sim.run import Prepared, Result, make_result, make_simulation, prepare, run_prepared


def prepared(*overrides: str) -> Prepared:
    """The default combination with changes."""
    return prepare(compose(*overrides))


def timed(given: Prepared) -> tuple[Result, float, float]:
    """A run, and the seconds of wall clock and of processor time of its simulation.

    Without the figures made of it afterwards, which take as long for any simulator.
    """
    simulation = make_simulation(given)
    wall, cpu = time.perf_counter(), time.process_time()
    recorder = simulation.run()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return make_result(given, simulation, recorder), wall_s, cpu_s


def loop_s() -> float:
    """Seconds for ten million additions: how fast the machine is just now."""
    began = time.process_time()
    total = 0
    for n in range(10_000_000):
        total += n
    return time.process_time() - began


def capacity(requests: int = 2000) -> float:
    """Requests per second when there is always one waiting."""
    result = run_prepared(prepared("rate=1000", f"requests={requests}", "workload.arrivals=constant"))
    return result.summary.throughput.request_throughput


def agreement(rate: float, requests: int = 2000) -> float:
    """Largest relative difference of a first-token or finish time, collapse on against off."""
    frames = []
    for flag in ("true", "false"):
        given = prepared(f"rate={rate}", f"requests={requests}", f"scheduler.collapse={flag}")
        result = run_prepared(given)
        frames.append(result.requests.set_index("request_id").sort_index())
    on, off = frames
    return float(max((abs(on[c] - off[c]) / off[c]).max() for c in ("first_token_s", "finish_s")))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Time the simulation; see the head of this file.")
    parser.add_argument("--requests", type=int, default=20_000)
    most = parser.parse_args().requests
    top = capacity()
    rate = 0.8 * top
    print(f"capacity {top:.3f} requests/s (simulated); load {rate:.3f} requests/s")
    print(f"10 million additions: {loop_s():.2f} s of processor time")
    for requests in (most // 4, most // 2, most):
        result, wall_s, cpu_s = timed(prepared(f"rate={rate}", f"requests={requests}"))
        tokens = int(result.requests["output_tokens"].sum())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{requests:6d} requests: {wall_s:6.2f} s wall, {cpu_s:6.2f} s cpu, "
              f"{cpu_s / requests * 1e6:5.0f} us and {result.events / requests:4.1f} events a request, "
              f"{tokens} tokens, peak {peak:.0f} MiB")
    without = prepared(f"rate={rate}", f"requests={most // 4}", "scheduler.collapse=false")
    uncollapsed, wall_s, cpu_s = timed(without)
    print(f"{most // 4:6d} requests without collapse: {wall_s:6.2f} s wall, {cpu_s:6.2f} s cpu, "
          f"{uncollapsed.events / (most // 4):5.1f} events a request")
    print(f"largest relative difference, collapse on against off: {agreement(rate):.2e}")


if __name__ == "__main__":
    main()
