"""What it costs to distribute heads, over the sum of the parts by themselves.

    python benchmarks/exec_heads.py path/to/model [--batch 3 6 12 24] [--context 256]
        [--links rings pipes frames]

A primary and an attention worker, each a process on a core of its own, decode batches of which one or two in
three KV groups live with the worker. Beside that, in turns, the parts are measured by themselves on the same
cores: dense modules, host time and attention in steps whose heads are all at home (attention of as many rows
as the primary keeps, and as many as the worker gets), and round trips of messages of that size on an idle
link.
The prediction is the cost model's composition of them: per layer dense, and the longer of the attention here
and the round trip with the attention there; and host time per step. It is made anew in every round, of that
round's parts, so that drift is in both; figures are medians of wall clock over the rounds, and of the
overhead an interval that holds its median in 95 of 100 resamplings.

Batches must be multiples of three, for a model with three KV groups: a third of the rows is then a batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from exec_links import echo_pipe, round_trip_s
from numpy.typing import NDArray

from hetis_exec.crew import WorkerSpec
from hetis_exec.distributed import DistributedCrew
from hetis_exec.joining import NetSettings
from hetis_exec.messages import Beat, Control, Drop, Failed, Op, Open, Row, StageDone, Task
from hetis_exec.models.architecture import read_architecture
from hetis_exec.pipes import PipeEndpoint, pair_region
from hetis_exec.processes import SPIN_S, ProcessCrew
from hetis_exec.torch_backend import TorchBackend
from hetis_exec.transport import Endpoint
from hetis_sim.policies.plan import InstancePlan, StagePlan

BLOCK = 16
TIMEOUT_S = 120.0
CAPACITY_UNITS = 1 << 20
PRIMARY, WORKER = 0, 1
WARM = 2
"""Rounds that are not counted."""


Series = NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """Of steps of one kind, a value for each round, in seconds.

    Attributes:
        step: wall clock at the driver.
        host: of it, outside the worker's step.
        dense, attention, packing, waiting: parts of the worker's step.
        busy: of the attention worker.
    """

    step: Series
    host: Series
    dense: Series
    attention: Series
    packing: Series
    waiting: Series
    busy: Series


class Pair:
    """A primary and an attention worker, and a driver that tells them what to do."""

    def __init__(self, backend: TorchBackend, links: str, steps: int, cores: Sequence[int]) -> None:
        self.spec = backend.architecture.spec
        self._steps = steps
        plan = InstancePlan((StagePlan((PRIMARY,), self.spec.layers, (self.spec.kv_heads,)),), (WORKER,))
        specs = [WorkerSpec(device, plan, stage, 0, CAPACITY_UNITS, BLOCK, backend, TIMEOUT_S,
                            core=cores[device % len(cores)])
                 for device, stage in ((PRIMARY, 0), (WORKER, -1))]
        self.crew = (DistributedCrew(specs, NetSettings()) if links == "frames" else
                     ProcessCrew(specs, rings=links == "rings"))
        self.crew.start()
        self._seq = 0
        self._next = 0
        self._used = [0, 0]

    def open(self, batch: int, context: int, remote: int) -> list[Row]:
        """Room for a batch, the last ``remote`` groups of each request with the worker; their next step."""
        spec, blocks = self.spec, self._blocks(context)
        kept = spec.kv_heads - remote
        parts = tuple(range(kept)), tuple(range(kept, spec.kv_heads))
        numbers = range(self._next, self._next + batch)
        self._next += batch
        self._tell([[Open(n, 0, groups, spec.layers, blocks, 1) for n in numbers if groups]
                    for groups in parts], [len(groups) * batch * blocks for groups in parts])
        holders = (PRIMARY,) * kept + (WORKER,) * remote
        return [Row(n, context, 1, True, False, holders, -1) for n in numbers]

    def drop(self, rows: Sequence[Row]) -> None:
        """Free what a batch holds."""
        holders, blocks = rows[0].holders, self._blocks(rows[0].position)
        self._tell([[Drop(row.request_id) for row in rows if device in holders] for device in (0, 1)],
                   [-holders.count(device) * len(rows) * blocks for device in (0, 1)])

    def _blocks(self, context: int) -> int:
        return (context + self._steps) // BLOCK + 1

    def _tell(self, ops: Sequence[Sequence[Op]], layer_units: Sequence[int]) -> None:
        self._seq += 1
        for device in (PRIMARY, WORKER):
            self._used[device] += self.spec.layers * layer_units[device]
            self.crew.endpoint.send(device, Control(self._seq, tuple(ops[device]), self._used[device], None))

    def step(self, rows: Sequence[Row]) -> tuple[float, StageDone]:
        """One step of a batch: seconds from saying so to the report, and the report."""
        self._seq += 1
        task = Task(tuple(rows), np.full(len(rows), 7))
        begun_s = time.perf_counter()
        self.crew.endpoint.send(PRIMARY, Control(self._seq, (), self._used[PRIMARY], task))
        self.crew.endpoint.send(WORKER, Control(self._seq, (), self._used[WORKER], None))
        while True:
            message = self.crew.endpoint.receive(TIMEOUT_S)
            if message is None or isinstance(message, Failed):
                raise SystemExit(f"a worker is lost: {message}")
            if isinstance(message, StageDone):
                return time.perf_counter() - begun_s, message
            assert isinstance(message, Beat)


def times_of(found: Sequence[tuple[float, StageDone]]) -> Times:
    """Of steps, without the first two."""
    rows = np.array([(wall, wall - (done.times.ended_s - done.times.begun_s), done.times.dense_s,
                      done.times.attention_s, done.times.packing_s,
                      done.times.head_transfer_s - done.times.packing_s,
                      sum(busy for _, busy in done.worker_busy_s)) for wall, done in found[WARM:]])
    return Times(*rows.T)


def interval(values: Series, resamplings: int = 1000) -> tuple[float, float]:
    """Where the median lies in 95 of 100 resamplings."""
    drawn = np.random.default_rng(0).choice(values, (resamplings, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def idle_link(links: str, cores: Sequence[int]) -> Endpoint:
    """A link to a process that answers at once, on the primary's core: the driver is on the worker's.

    Who is woken on another core takes longer to come than on the same, and so it is in a step.
    """
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    spin_s = SPIN_S if links == "rings" else 0.0
    regions = pair_region() if links == "rings" else None
    process = context.Process(target=echo_pipe, args=(there, regions, spin_s), daemon=True)
    process.start()
    os.sched_setaffinity(process.pid or 0, {cores[PRIMARY]})
    return PipeEndpoint(PRIMARY, {WORKER: here}, regions={WORKER: regions} if regions is not None else None,
                        spin_s=spin_s)


def measure(pair: Pair, link: Endpoint, batch: int, context: int, remote: int, steps: int) -> str:
    """A line of the table; all kinds of steps take turns."""
    third = batch // pair.spec.kv_heads
    kinds = {"split": pair.open(batch, context, remote), "home": pair.open(batch, context, 0),
             "here": pair.open(third * (pair.spec.kv_heads - remote), context, 0),
             "there": pair.open(third * remote, context, 0)}
    found: dict[str, list[tuple[float, StageDone]]] = {name: [] for name in kinds}
    trips: list[float] = []
    for n in range(steps):
        for name, rows in kinds.items():
            found[name].append(pair.step([row._replace(position=row.position + n) for row in rows]))
        trips.append(statistics.median(round_trip_s(link, batch * remote, n) for _ in range(9)))
    for rows in kinds.values():
        pair.drop(rows)
    split, home, here, there = (times_of(found[name]) for name in ("split", "home", "here", "there"))
    links = pair.spec.layers * np.array(trips[WARM:])
    predicted = home.host + home.dense + np.maximum(here.attention, links + there.attention)
    over = split.step / predicted - 1
    low, high = interval(over)
    packed = np.median(split.step / (predicted + split.packing) - 1)
    parts = (split.step, predicted, split.dense, home.dense, split.attention, here.attention, split.busy,
             there.attention, links, split.waiting, split.packing, split.host, home.host)
    figures = [1e3 * float(np.median(x)) for x in parts]
    return (f"{batch:5} {remote:4}/3 {np.median(over):+7.1%} [{low:+6.1%}, {high:+6.1%}] {packed:+7.1%} |"
            + "".join(f"{x:7.2f}" for x in figures))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[3, 6, 12, 24])
    parser.add_argument("--context", type=int, nargs="+", default=[256])
    parser.add_argument("--links", nargs="+", default=["rings"],
                        choices=["rings", "pipes", "frames"])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    architecture = read_architecture(options.model)
    if any(batch % architecture.spec.kv_heads for batch in options.batch):
        parser.error(f"--batch must be multiples of the {architecture.spec.kv_heads} KV groups of the model")
    cores = sorted(os.sched_getaffinity(0))[:2]
    idle = {links: idle_link(links, cores) for links in options.links}
    os.sched_setaffinity(0, {cores[WORKER % len(cores)]})
    backend = TorchBackend(architecture, options.model)
    print("links  context batch remote    over [interval]  with packing | medians, ms: step, predicted;\n"
          "of the step and alone: dense, attention here, attention there; links alone; waiting, packing; host"
          " of the step, alone")
    for links in options.links:
        pair = Pair(backend, links, options.steps, cores)
        try:
            for context in options.context:
                for batch in options.batch:
                    for remote in (1, 2):
                        line = measure(pair, idle[links], batch, context, remote, options.steps)
                        print(f"{links:6} {context:7} {line}", flush=True)
        finally:
            pair.crew.stop(at_once=True)


if __name__ == "__main__":
    main()
