"""What sums over tensor-parallel ranks cost, exchanged by messages and by all_reduce.

    python benchmarks/exec_sums.py path/to/model [--ranks 2] [--context 256] [--batch 1 8 32] [--prompt 256]

Ranks of this host hold the model and decode batches, as ``executor.collectives`` says: two sets of ranks take
turns, one with ordered sums and one with gloo's all_reduce, so that other work on the machine disturbs both
alike. KV heads are dealt out as evenly as they can be. Printed are medians of the steps' wall time and of
what the rank that waits least has in its sums.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hetis_exec.crew import WorkerSpec
from hetis_exec.distributed import DistributedCrew
from hetis_exec.joining import NetSettings
from hetis_exec.messages import Beat, Control, Failed, Op, Open, Row, StageDone, Task
from hetis_exec.models.architecture import read_architecture
from hetis_exec.places import owned_groups
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.policies.plan import InstancePlan, StagePlan

BLOCK = 16
TIMEOUT_S = 120.0


class Ranks:
    """One set of ranks with a batch, and a driver that tells them what to do."""

    def __init__(self, backend: TorchBackend, ranks: int, collectives: str, steps: int) -> None:
        spec = self._spec = backend.architecture.spec
        owned = tuple(spec.kv_heads // ranks + (rank < spec.kv_heads % ranks) for rank in range(ranks))
        self._stage = StagePlan(tuple(range(ranks)), spec.layers, owned)
        self._steps = steps
        plan = InstancePlan((self._stage,))
        self._seq = 0
        self._used = [0] * ranks
        capacity = 1 << 20
        self.crew = DistributedCrew([WorkerSpec(rank, plan, 0, rank, capacity, BLOCK, backend, TIMEOUT_S)
                                     for rank in range(ranks)], NetSettings(collectives=collectives))
        self.crew.start()

    def tell(self, ops: Sequence[Sequence[Op]], task: Task | None) -> tuple[float, float]:
        """Have all ranks do something; seconds from saying so to the last report, and in the sums of one."""
        self._seq += 1
        began = time.perf_counter()
        for rank, own in enumerate(ops):
            self.crew.endpoint.send(rank, Control(self._seq, tuple(own), self._used[rank], task))
        done: list[StageDone] = []
        while task is not None and len(done) < len(ops):
            message = self.crew.endpoint.receive(TIMEOUT_S)
            if message is None or isinstance(message, Failed):
                raise SystemExit(f"a rank is lost: {message}")
            if isinstance(message, StageDone):
                done.append(message)
            else:
                assert isinstance(message, Beat)
        return time.perf_counter() - began, min((one.times.collective_s for one in done), default=0.0)

    def open(self, first: int, batch: int, context: int) -> list[Row]:
        """Room for a batch of requests; their next step."""
        blocks = (context + self._steps) // BLOCK + 1
        ops: list[list[Op]] = []
        for rank in range(len(self._used)):
            groups = tuple(owned_groups(self._stage, rank))
            ops.append([Open(first + n, 0, groups, self._spec.layers, blocks, 1) for n in range(batch)])
            self._used[rank] += batch * len(groups) * self._spec.layers * blocks
        self.tell(ops, None)
        holders = tuple(rank for rank, count in enumerate(self._stage.owned_groups) for _ in range(count))
        return [Row(first + n, context, 1, True, False, holders, -1) for n in range(batch)]

    def step(self, rows: Sequence[Row]) -> tuple[float, float]:
        """One step of the batch."""
        tokens = np.full(sum(row.new_tokens for row in rows), 7)
        return self.tell([()] * len(self._used), Task(tuple(rows), tokens))


def measure(sets: dict[str, Ranks], batch: int, context: int, steps: int, prompt: int,
            first: int) -> list[float]:
    """Of each set the median milliseconds of a step, and in its sums; the sets take turns."""
    rows = {name: ranks.open(first, batch, context) for name, ranks in sets.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    for n in range(steps):
        for name, ranks in sets.items():
            now = [row._replace(position=0, new_tokens=prompt, prefill=True) if prompt
                   else row._replace(position=row.position + n) for row in rows[name]]
            found[name].append(ranks.step(now))
    return [1e3 * x for name in sets for x in np.median(np.array(found[name][2:]), axis=0)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    backend = TorchBackend(read_architecture(options.model), options.model)
    sets = {name: Ranks(backend, options.ranks, name, options.steps) for name in ("ordered", "all_reduce")}
    print(f"{'':>12}", *[f"{name:>26}" for name in sets], "   all_reduce / ordered")
    print(f"{'':>12}", *[f"{'step (ms)':>13}{'sums (ms)':>13}" for _ in sets], f"{'step':>12}{'sums':>9}")
    first = 0
    try:
        cases = [(f"batch {batch}", batch, options.context, 0) for batch in options.batch]
        cases.append((f"prompt {options.prompt}", 1, options.prompt, options.prompt))
        for label, batch, context, prompt in cases:
            a, b, c, d = measure(sets, batch, context, options.steps, prompt, first)
            first += batch
            print(f"{label:>12} {a:13.1f}{b:13.2f} {c:13.1f}{d:13.2f} {c / a:12.2f}{d / b:9.2f}", flush=True)
    finally:
        for ranks in sets.values():
            ranks.crew.stop(at_once=True)


if __name__ == "__main__":
    main()
