"""The placement of largest flow, as a mixed-integer linear program for HiGHS.

The source has one variable for the first layer of each node, one for each number of layers that it
could hold, one for the flow of each pair of nodes, and switches that allow a flow where the layers
meet. Two of its facts make that smaller (ours): nodes of one kind are interchangeable, and where the
links between nodes carry more than the nodes compute, only the layers at which flow enters and leaves
a node matter. With n the number of nodes of kind c that hold layers s .. s+k-1, and f the flow that
enters them at layer l:

    maximise    sum f(c, s, k, l = 0)
    sum_l f(c, s, k, l) <= rate(c, k) * n(c, s, k)        a node computes no more than its rate
    sum_(s, k) n(c, s, k) <= nodes of kind c
    flow that ends at layer l = flow that enters at layer l, 0 < l < layers

Without partial inference l = s. Where links do bind, the flow of the placement found is worked
out with them, so that it is comparable with others, but it need not be the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_sim.policies.helix.flow import Range
from hetis_sim.policies.helix.heuristics import Ranges
from hetis_sim.policies.helix.sites import SiteKind
from hetis_sim.spec.errors import HetisError


@dataclass(frozen=True, slots=True)
class Budget:
    """When the solver stops: nodes of its tree, distance from the bound, seconds."""

    nodes: int
    gap: float
    time_s: float


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What the solver found.

    Attributes:
        ranges: the placement, None where it found none.
        bound: tokens per second that no placement exceeds.
        stopped: ``optimal`` (within the gap), ``nodes`` or ``time``.
    """

    ranges: Ranges | None
    bound: float
    stopped: str


class _Choice(NamedTuple):
    """Nodes of a kind that hold one range: their variable, and the flows that enter (layer, variable)."""

    kind: int
    first: int
    layers: int
    number: int
    flows: list[tuple[int, int]]


class PlacementProgram:
    """The program of some kinds of nodes; ``columns`` counts its variables."""

    def __init__(self, kinds: Sequence[SiteKind], layers: int, partial: bool) -> None:
        self._kinds = kinds
        self._layers = layers
        self._scale = max(max(kind.rates) for kind in kinds)
        self._choices: list[_Choice] = []
        self.columns = 0
        for c, kind in enumerate(kinds):
            for k in range(1, min(kind.layers_most, layers) + 1):
                for s in range(layers - k + 1):
                    entries = range(s, s + k) if partial else range(s, s + 1)
                    number, self.columns = self.columns, self.columns + 1
                    flows = [(layer, self.columns + n) for n, layer in enumerate(entries)]
                    self.columns += len(flows)
                    self._choices.append(_Choice(c, s, k, number, flows))
        self._rows: list[tuple[float, float, list[tuple[int, float]]]] = []
        self._add_rows()

    def _add_rows(self) -> None:
        inf = float("inf")
        per_kind: list[list[tuple[int, float]]] = [[] for _ in self._kinds]
        balance: list[list[tuple[int, float]]] = [[] for _ in range(self._layers + 1)]
        for choice in self._choices:
            rate = self._kinds[choice.kind].rates[choice.layers - 1] / self._scale
            self._rows.append((-inf, 0.0, [(choice.number, -rate), *((f, 1.0) for _, f in choice.flows)]))
            per_kind[choice.kind].append((choice.number, 1.0))
            for layer, f in choice.flows:
                balance[layer].append((f, 1.0))
                balance[choice.first + choice.layers].append((f, -1.0))
        self._rows += [(-inf, float(len(kind.groups)), row)
                       for kind, row in zip(self._kinds, per_kind, strict=True)]
        self._rows += [(0.0, 0.0, row) for row in balance[1:self._layers]]

    def solve(self, budget: Budget, start: Ranges | None = None) -> ProgramResult:
        """Search within a budget, from a placement where one is given.

        Raises:
            HetisError: the solver fails.
        """
        import highspy

        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 0)
        solver.setOptionValue("mip_max_nodes", budget.nodes)
        solver.setOptionValue("mip_rel_gap", budget.gap)
        solver.setOptionValue("time_limit", budget.time_s)
        solver.passModel(self._model())
        if start is not None:
            columns = np.array([choice.number for choice in self._choices], dtype=np.int32)
            solver.setSolution(len(columns), columns, self._counts(start))
        solver.run()
        status = solver.getModelStatus()
        names = {highspy.HighsModelStatus.kOptimal: "optimal",
                 highspy.HighsModelStatus.kSolutionLimit: "nodes",
                 highspy.HighsModelStatus.kTimeLimit: "time"}
        if status not in names:
            raise HetisError(f"HiGHS stops with {solver.modelStatusToString(status)!r} on Helix's placement")
        info = solver.getInfo()
        values = solver.getSolution().col_value
        found = self._ranges(values) if info.primal_solution_status == 2 else None
        return ProgramResult(found, -float(info.mip_dual_bound) * self._scale, names[status])

    def _model(self) -> Any:
        import highspy

        lp = highspy.HighsLp()
        counts = [choice.number for choice in self._choices]
        upper = np.full(self.columns, np.inf)
        integer = np.zeros(self.columns, dtype=bool)
        cost = np.zeros(self.columns)
        integer[counts] = True
        upper[counts] = [len(self._kinds[choice.kind].groups) for choice in self._choices]
        for choice in self._choices:
            cost[[f for layer, f in choice.flows if layer == 0]] = -1.0
        lp.num_col_, lp.num_row_ = self.columns, len(self._rows)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(self.columns), upper
        lp.row_lower_ = np.array([low for low, _, _ in self._rows])
        lp.row_upper_ = np.array([high for _, high, _ in self._rows])
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in integer]
        matrix = lp.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(row) for _, _, row in self._rows)])
        matrix.index_ = np.array([column for _, _, row in self._rows for column, _ in row])
        matrix.value_ = np.array([value for _, _, row in self._rows for _, value in row])
        return lp

    def _counts(self, ranges: Ranges) -> NDArray[np.float64]:
        held: dict[tuple[int, int, int], int] = {}
        for c, item in zip(self._kind_of_site(), ranges, strict=True):
            if item is not None:
                held[c, *item] = held.get((c, *item), 0) + 1
        return np.array([float(held.get((choice.kind, choice.first, choice.layers), 0))
                         for choice in self._choices])

    def _kind_of_site(self) -> list[int]:
        return [c for c, kind in enumerate(self._kinds) for _ in kind.groups]

    def _ranges(self, values: Sequence[float]) -> Ranges:
        """Layers of each node; nodes of one kind take theirs in order."""
        held: list[list[Range]] = [[] for _ in self._kinds]
        for choice in self._choices:
            flow = sum(values[f] for _, f in choice.flows)
            if flow > 1e-9:
                held[choice.kind] += [(choice.first, choice.layers)] * round(values[choice.number])
        found: list[Range | None] = []
        for kind, mine in zip(self._kinds, held, strict=True):
            mine.sort()
            found += mine + [None] * (len(kind.groups) - len(mine))
        return tuple(found)
