"""How fast a worker decodes, beside transformers on the same core.

    python benchmarks/exec_decode.py path/to/model [--context 256] [--batch 1 8 32]

One primary worker holds the whole model and computes the steps of a driver; transformers computes the same
batch at the same context with its own cache. Both use float32 and one thread and take turns. Times are
medians of processor time, since other work on the machine stretches the wall clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hetis_exec.crew import WorkerSpec, build_worker
from hetis_exec.messages import DRIVER, Control, Open, Row, Task
from hetis_exec.models.architecture import read_architecture
from hetis_exec.torch_backend import TorchBackend
from hetis_exec.transport import InProcessTransport
from hetis_exec.workers import Worker
from hetis_sim.policies.plan import InstancePlan, StagePlan

BLOCK = 16
STEPS = 10


class Decoder:
    """A worker with a batch of requests whose cache is full up to a context."""

    def __init__(self, backend: TorchBackend, batch: int, context: int) -> None:
        spec = backend.architecture.spec
        groups = tuple(range(spec.kv_heads))
        blocks = (context + STEPS) // BLOCK + 1
        self._units = batch * spec.layers * len(groups) * blocks
        plan = InstancePlan((StagePlan((0,), spec.layers, (len(groups),)),))
        transport = InProcessTransport()
        self._driver = transport.endpoint(DRIVER)
        self._worker: Worker = build_worker(
            WorkerSpec(0, plan, 0, 0, 2 * self._units, BLOCK, backend, timeout_s=60.0),
            transport.endpoint(0))
        self._rows = [Row(request, context, 1, True, False, (0,) * len(groups), -1)
                      for request in range(batch)]
        self._send(tuple(Open(request, 0, groups, spec.layers, blocks, 1) for request in range(batch)), None)

    def step(self) -> None:
        """One iteration of the batch."""
        tokens = np.full(len(self._rows), 7)
        self._send((), Task(tuple(self._rows), tokens))
        self._rows = [row._replace(position=row.position + 1) for row in self._rows]

    def _send(self, ops: tuple[Open, ...], task: Task | None) -> None:
        # By its endpoint: a worker that finds nothing there waits a while, and comes back to cold caches.
        self._driver.send(0, Control(self._worker.cache.seq + 1, ops, self._units, task))
        with self._worker.cache.pool.kernels.working():
            self._worker.turn()


def reference(model: Any, batch: int, context: int) -> Callable[[], object]:
    """One iteration of the batch in transformers."""
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randint(model.config.vocab_size, (batch, context)), past_key_values=cache)

    def step() -> object:
        with torch.no_grad():
            return model(torch.full((batch, 1), 7), past_key_values=cache).logits[:, -1].argmax(dim=-1)

    return step


def processor_ms(step: Callable[[], object]) -> float:
    """Of this thread, for one call."""
    began = time.thread_time()
    step()
    return 1e3 * (time.thread_time() - began)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    backend = TorchBackend(read_architecture(options.model), options.model)
    print("batch  worker ms  transformers ms  transformers / worker")
    for batch in options.batch:
        ours, theirs = Decoder(backend, batch, options.context), reference(model, batch, options.context)
        times = np.array([(processor_ms(ours.step), processor_ms(theirs)) for _ in range(STEPS)])[1:]
        a, b = np.median(times, axis=0)
        print(f"{batch:5}  {a:9.1f}  {b:15.1f}  {np.median(times[:, 1] / times[:, 0]):21.2f}")


if __name__ == "__main__":
    main()
