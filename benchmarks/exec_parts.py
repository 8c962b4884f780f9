"""What it costs a CPU to attend to tokens in two parts and join them, over attending to them at once.

    python benchmarks/exec_parts.py

Processor time of one layer of decode attention with the heads of SmolLM2-135M (three KV groups of three
query heads, head dimension 64), one thread, as the median of some repetitions that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.kvcache import KvPool, Table, TableKey

GROUPS, HEADS, HEAD_DIM, BLOCK = 3, 3, 64, 16
CASES = ((1, 1024), (8, 1024), (32, 256), (8, 4096))
REPETITIONS, CALLS = 9, 20


def of_case(batch: int, context: int) -> tuple[float, float]:
    """Microseconds of processor time: at once, and in parts."""
    rows, blocks = batch * GROUPS, context // BLOCK + 1
    kernels = CpuKernels(rows * blocks, BLOCK, HEAD_DIM)
    pool = KvPool(rows * blocks, BLOCK, kernels)
    for row in range(rows):
        pool.open(TableKey(row, 0, 0), 1, blocks, 0)
    tables = [pool.table(TableKey(row, 0, 0)) for row in range(rows)]
    every = pool.spots(list(pool.tables), 0, context)
    pool.write_groups(every, 0, *(torch.randn(rows * context, HEAD_DIM) for _ in range(2)))
    queries, (keys, values) = torch.randn(rows, HEADS, HEAD_DIM), torch.randn(2, rows, HEAD_DIM)
    half = blocks // 2
    whole = kernels.plan(tables, [context] * rows)
    newest = kernels.plan_parts([Table(table.units[:, half:], 0) for table in tables],
                                [context - half * BLOCK] * rows)
    oldest = kernels.plan_parts([Table(table.units[:, :half], 0) for table in tables],
                                [-1 - half * BLOCK] * rows)
    at = (torch.arange(rows),)

    def at_once() -> torch.Tensor:
        return kernels.decode(whole, 0, queries, keys, values)

    def in_parts() -> torch.Tensor:
        joining = kernels.joining(rows, queries)
        joining.add(at, kernels.decode_parts(newest, 0, queries, keys, values))
        joining.add(at, kernels.decode_parts(oldest, 0, queries, keys[:0], values[:0]))
        return joining.result()

    assert torch.allclose(at_once(), in_parts(), atol=1e-5)
    spent = [(_microseconds(at_once), _microseconds(in_parts)) for _ in range(REPETITIONS)]
    return median(a for a, _ in spent), median(b for _, b in spent)


def _microseconds(call: Callable[[], object]) -> float:
    begun_s = time.process_time()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.process_time() - begun_s) / CALLS


if __name__ == "__main__":
    torch.set_num_threads(1)
    for batch, context in CASES:
        once, parts = of_case(batch, context)
        print(f"batch {batch:3}, context {context:5}: at once {once:7.0f} us, in parts {parts:7.0f} us, "
              f"{parts / once:.2f} times")
