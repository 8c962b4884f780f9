"""Estimated against simulated throughput of layouts: python benchmarks/planner.py llama2-70b sharegpt.

For the layouts with the best estimates, and some others, a closed loop keeps as many requests in flight as
the estimate assumes. The table in docs/planner.md comes from here. Further words are overrides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from hetis_sim.config import compose
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.search import Layout, LayoutSearch
from hetis_sim.policies.shape import instance_shape
from hetis_sim.run import planning_problem, prepare, run_prepared

BEST, OTHERS, ALL = 4, 2, 10_000
FLIGHTS, WARM, END = 6, 0.3, 0.8
RESERVE = 0.05


def layouts(problem: PlanningProblem) -> Iterator[tuple[str, Layout]]:
    """Every layout of the search: all sets of primary types, instance counts and tensor-parallel degrees."""
    types, search = gpu_types(problem), LayoutSearch(Estimator(problem, RESERVE))
    for size in range(len(types)):
        for more in combinations(types[1:], size):
            primaries = [types[0], *more]
            workers = [kind for kind in types if kind not in primaries]
            for layout in search.run(primaries, workers, keep=ALL).layouts:
                yield layout.describe().partition(":")[0], layout


def simulated(problem: PlanningProblem, layout: Layout, *words: str) -> float:
    """Requests per second of the instances together, each in a closed loop of its own."""
    total = 0.0
    known: dict[object, float] = {}
    for draft, estimate in zip(layout.drafts, layout.estimates, strict=True):
        shape = instance_shape(problem, draft.groups, draft.workers)
        key = (estimate, tuple(stage.gpu.name for stage in shape.stages), len(draft.workers))
        if key not in known:
            users = estimate.requests
            requests = max(400, FLIGHTS * users)
            prepared = prepare(compose("workload=closed", f"workload.users={users}", f"requests={requests}",
                                       "workload.think_time_s=0", *words))
            plan = Plan((shape.with_layers(estimate.layers),))
            ends = np.sort(run_prepared(replace(prepared, plan=plan)).requests["finish_s"].to_numpy())
            first, last = int(WARM * len(ends)), int(END * len(ends))
            known[key] = (last - first) / float(ends[last] - ends[first])
        total += known[key]
    return total


def main() -> None:
    """Print one line for each layout, the best estimate first."""
    model, workload, *more = sys.argv[1:]
    base = prepare(compose(f"model={model}", f"workload={workload}", "requests=5000", "rate=1", *more))
    problem = planning_problem(base.cluster, base.model, base.cost, base.settings, base.workload,
                               base.config.slo.slo())
    ordered = sorted(layouts(problem), key=lambda item: item[1].cost_s)
    rest = ordered[BEST:]
    words = (f"model={model}", f"workload.table={workload}", "workload.over_context=clamp", *more)
    others = [rest[len(rest) * n // OTHERS] for n in range(OTHERS)] if rest else []
    for name, layout in ordered[:BEST] + others:
        estimated = sum(estimate.requests_per_s for estimate in layout.estimates)
        found = simulated(problem, layout, *words)
        print(f"| {name} | {1.0 / layout.cost_s:.3g} | {estimated:.3g} | {found:.3g} | "
              f"{estimated / found - 1.0:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
