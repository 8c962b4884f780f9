"""The dispatcher's linear program, solved by HiGHS.

    min  sum over stages of layers_s * f_s
    s.t. f_s >= base_p + sum_j w_jp x_jp                       ranks p of stage s
         T_d >= base_d + sum_j,s u_jd x_jsd                    attention workers d
         f_s >= T_d + wire_sd (base + sum_j x_jsd)             pairs (s, d) in use, d on a wire of its own
         f_s >= T_d + wire_s (base + sum_j,d x_jsd)            the others, which share the stage's interface
         sum_p x_jp = heads_j                                  every item j, every stage
         sum_j units_j x_jp <= free                            every device
         0 <= x_jp <= heads that p may hold

The paper states it for one stage: minimise the largest completion time over all devices,
computation plus communication, under each device's free memory. The sum over stages, and the
time that stages wait for each other at an attention worker (T_d), are ours. Heads are
counted in KV groups, so the rows of a solution need rounding to whole numbers only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hetis_sim.policies.hetis.attention import AttentionContext

Pair = tuple[int, int]
"""(stage, attention worker)"""

# Times are handed to the solver in microseconds, so that its tolerance of 1e-7 is far below any of them.
SCALE = 1e6
OPTIONS = {"output_flag": False, "threads": 1, "solver": "simplex", "presolve": "off"}


@dataclass(frozen=True, slots=True)
class Item:
    """Heads to be spread: ``count`` requests of ``tokens`` context and ``blocks`` blocks a group."""

    tokens: float
    blocks: float
    count: float = 1.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A solution: F in seconds times micro-batches, and groups of every item at every position."""

    time: float
    groups: np.ndarray[Any, np.dtype[np.float64]]


class _Rows:
    """Constraint rows, collected as (row, column, value) triples."""

    def __init__(self) -> None:
        self.count = 0
        self.lower: list[float] = []
        self.upper: list[float] = []
        self._parts: list[tuple[Any, Any, Any]] = []

    def at_most(self, columns: Any, values: Any, bound: float, lower: float = -np.inf) -> None:
        """``sum(values * x[columns]) <= bound`` (and >= ``lower``)."""
        self._parts.append((np.full(len(columns), self.count), columns, values))
        self.lower.append(lower)
        self.upper.append(bound)
        self.count += 1

    def compressed(self) -> tuple[Any, Any, Any]:
        """Start of each row, columns and values."""
        rows, columns, values = (np.concatenate([part[i] for part in self._parts]) for i in range(3))
        start = np.zeros(self.count + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=self.count), out=start[1:])
        return start, columns.astype(np.int32), values.astype(np.float64)


def solve(context: AttentionContext, items: Sequence[Item], groups: Sequence[float], tokens: Sequence[float],
          free: dict[int, int] | dict[int, float], pairs: Collection[Pair]) -> Spread | None:
    """Spread items over an instance that carries a load already.

    Args:
        context: the instance.
        items: what to spread.
        groups, tokens: the load that stays, per position.
        free: units by device id.
        pairs: attention workers that may be used, by stage; those in use are always.

    Returns:
        None where memory does not suffice.
    """
    problem = _Problem(context, items, groups, tokens, pairs)
    problem.add_stage_rows()
    problem.add_worker_rows()
    problem.add_memory_rows(free)
    return problem.run()


class _Problem:
    """Columns: x of item j at position p is ``j*P + p``; then one f for each stage, one T for each worker."""

    def __init__(self, context: AttentionContext, items: Sequence[Item], groups: Sequence[float],
                 tokens: Sequence[float], pairs: Collection[Pair]) -> None:
        self.context = context
        self.items = items
        self.groups = groups
        self.tokens = tokens
        self.columns = len(items) * context.positions
        self.workers = range(len(context.workers))
        self.pairs = [[(stage.index, d) in pairs or groups[stage.middle + d] > 0 for d in self.workers]
                      for stage in context.stages]
        self.rows = _Rows()
        self._j = np.arange(len(items)) * context.positions
        self._length = np.array([item.tokens for item in items])
        self._blocks = np.array([item.blocks for item in items])
        self.upper = np.zeros((len(items), context.positions))

    def f(self, stage: int) -> int:
        """Column of a stage's time."""
        return self.columns + stage

    def t(self, worker: int) -> int:
        """Column of an attention worker's time."""
        return self.columns + len(self.context.stages) + worker

    def add_stage_rows(self) -> None:
        """All heads are somewhere, and no rank is slower than its stage."""
        heads, count = self.context.kv_heads, np.array([item.count for item in self.items])
        for stage in self.context.stages:
            width = np.arange(stage.first, stage.last)
            for j, item in enumerate(self.items):
                total = heads * item.count
                self.rows.at_most(self._j[j] + width, np.ones(len(width)), total, total)
            for p, rank in enumerate(stage.local, stage.first):
                self.upper[:, p] = rank.owned * count
                base = rank.a * self.groups[p] + rank.b * self.tokens[p] + rank.fixed
                self.rows.at_most(np.append(self._j + p, self.f(stage.index)),
                                  np.append((rank.a + rank.b * self._length) * SCALE, -1.0), -base * SCALE)
            for d in self.workers:
                if self.pairs[stage.index][d]:
                    self.upper[:, stage.middle + d] = heads * count

    def add_worker_rows(self) -> None:
        """An attention worker's time is the sum of its jobs, and delays the stages that use it."""
        for d in self.workers:
            columns, values, base = [], [], 0.0
            for stage in self.context.stages:
                if self.pairs[stage.index][d]:
                    p, remote = stage.middle + d, stage.remote[d]
                    columns.append(self._j + p)
                    values.append((remote.a + remote.b * self._length) * SCALE)
                    base += remote.a * self.groups[p] + remote.b * self.tokens[p] + remote.fixed
                    through = [stage.middle + w for w in stage.shared] if remote.shared else [p]
                    each_s = stage.shared_wire if remote.shared else remote.wire
                    sent = np.concatenate([self._j + q for q in through])
                    wire = np.append(np.full(len(sent), each_s * SCALE), (1.0, -1.0))
                    waiting = each_s * sum(self.groups[q] for q in through) + remote.wire_fixed
                    delayed = np.append(sent, (self.t(d), self.f(stage.index)))
                    self.rows.at_most(delayed, wire, -waiting * SCALE)
            if columns:
                self.rows.at_most(np.append(np.concatenate(columns), self.t(d)),
                                  np.append(np.concatenate(values), -1.0), -base * SCALE)

    def add_memory_rows(self, free: dict[int, int] | dict[int, float]) -> None:
        """No device takes more than its free units."""
        for stage in self.context.stages:
            for p, rank in enumerate(stage.local, stage.first):
                self.rows.at_most(self._j + p, self._blocks * stage.layers, max(0, free[rank.device]))
        for d in self.workers:
            columns = np.concatenate([self._j + stage.middle + d for stage in self.context.stages])
            units = np.concatenate([self._blocks * stage.layers for stage in self.context.stages])
            self.rows.at_most(columns, units, max(0, free[self.context.workers[d]]))

    def run(self) -> Spread | None:
        """Solve; each call starts cold, so that equal inputs have equal answers."""
        import highspy

        stages = self.context.stages
        extra = len(stages) + len(self.workers)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.columns + extra, self.rows.count
        lp.col_cost_ = np.concatenate([np.zeros(self.columns), [stage.layers for stage in stages],
                                       np.zeros(len(self.workers))])
        lp.col_lower_ = np.zeros(self.columns + extra)
        lp.col_upper_ = np.concatenate([self.upper.ravel(), np.full(extra, np.inf)])
        lp.row_lower_, lp.row_upper_ = np.array(self.rows.lower), np.array(self.rows.upper)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = self.rows.compressed()
        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        for key, value in OPTIONS.items():
            solver.setOptionValue(key, value)
        solver.passModel(lp)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        x = np.array(solver.getSolution().col_value[:self.columns]).reshape(len(self.items), -1)
        return Spread(solver.getInfo().objective_function_value / SCALE, np.maximum(x, 0.0))
