"""A mixed-integer linear program for HiGHS, built column by column and row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import HetisError

Terms = list[tuple[int, float]]
"""(column, coefficient) pairs."""

INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Budget:
    """When the solver stops: nodes of its tree, distance from the bound, seconds."""

    nodes: int
    gap: float
    time_s: float


@dataclass(frozen=True, slots=True)
class Solved:
    """What the solver found.

    Attributes:
        values: of all columns, None where it found no solution.
        bound: that no solution exceeds.
        stopped: ``optimal`` (within the gap), ``nodes`` or ``time``.
    """

    values: NDArray[np.float64] | None
    bound: float
    stopped: str


class Milp:
    """Columns from 0 upwards and rows, of which the objective is to be as large as can be."""

    def __init__(self) -> None:
        self._upper: list[float] = []
        self._objective: list[float] = []
        self._whole: list[bool] = []
        self._rows: list[tuple[float, float, Terms]] = []

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self._upper)

    def add(self, upper: float = INFINITY, objective: float = 0.0, whole: bool = False) -> int:
        """Add a column; returns its number."""
        self._upper.append(upper)
        self._objective.append(objective)
        self._whole.append(whole)
        return len(self._upper) - 1

    def at_most(self, terms: Terms, limit: float) -> None:
        """Add a row with an upper limit."""
        self._rows.append((-INFINITY, limit, terms))

    def equal(self, terms: Terms, value: float) -> None:
        """Add an equality."""
        self._rows.append((value, value, terms))

    def solve(self, budget: Budget, start: dict[int, float] | None = None) -> Solved:
        """Search within a budget, from values of some columns where they are given.

        One thread and a fixed seed: the result depends on the program and the budget alone, unless time
        runs out.

        Raises:
            HetisError: the solver fails.
        """
        import highspy

        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (("output_flag", False), ("threads", 1), ("random_seed", 0),
                              ("mip_max_nodes", budget.nodes), ("mip_rel_gap", budget.gap),
                              ("time_limit", budget.time_s)):
            solver.setOptionValue(option, value)
        solver.passModel(self._model())
        if start:
            columns = np.array(list(start), dtype=np.int32)
            solver.setSolution(len(columns), columns, np.array(list(start.values())))
        solver.run()
        status = solver.getModelStatus()
        names = {highspy.HighsModelStatus.kOptimal: "optimal",
                 highspy.HighsModelStatus.kSolutionLimit: "nodes",
                 highspy.HighsModelStatus.kTimeLimit: "time"}
        if status not in names:
            raise HetisError(f"HiGHS stops with {solver.modelStatusToString(status)!r} on Helix's placement")
        info = solver.getInfo()
        found = np.array(solver.getSolution().col_value) if info.primal_solution_status == 2 else None
        return Solved(found, -float(info.mip_dual_bound), names[status])

    def _model(self) -> Any:
        import highspy

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.columns, len(self._rows)
        lp.col_cost_, lp.col_lower_ = -np.array(self._objective), np.zeros(self.columns)
        lp.col_upper_ = np.array(self._upper)
        lp.row_lower_ = np.array([low for low, _, _ in self._rows])
        lp.row_upper_ = np.array([high for _, high, _ in self._rows])
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in self._whole]
        matrix = lp.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(row) for _, _, row in self._rows)])
        matrix.index_ = np.array([column for _, _, row in self._rows for column, _ in row])
        matrix.value_ = np.array([value for _, _, row in self._rows for _, value in row])
        return lp
