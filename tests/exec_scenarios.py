"""Runs of the executor that split and disturb the work in every way; the same for all backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exec_toys import (
    Dividing,
    Fixed,
    Handing,
    Relieving,
    Turning,
    given,
    pipeline,
    pools,
    slow_cache,
    workload,
)

from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.records import StepRecord
from hetis_exec.transport import Delay
from hetis_sim.control.step import StepKind
from hetis_sim.policies.plan import InstancePlan, Plan, StagePlan

TRIES = 3
ONE = pipeline([[0]], [4])
SPREAD = pipeline([[0]], [4], [1, 2])
TWO = pipeline([[0], [1]], [3, 1], [2])
THREE = pipeline([[0], [1], [2]], [1, 2, 1], [3, 4])
RANKS = pipeline([[0, 1], [2]], [2, 2], [3, 4], owned=[[3, 1], [4]])
REPLICAS = Plan((InstancePlan((StagePlan((0,), 4, (4,)),), (1,)),
                 InstancePlan((StagePlan((2,), 1, (4,)), StagePlan((3,), 3, (4,))), (4,))))

SHORT = workload(10)
LONG = workload(8, (8, 30), (10, 24), gap_s=0.0)
PLACES = [(4, 0, 0), (1, 2, 1), (0, 0, 4), (2, 0, 2)]
STAGE_PLACES = [(2, 2, 3, 1), (4, 0, 0, 4), (0, 4, 2, 2)]
# Groups that change places between attention workers, because ranks take only their own.
RANK_PLACES = [(1, 1, 1, 1, 4, 0, 0), (2, 1, 1, 0, 0, 2, 2), (1, 0, 0, 3, 1, 0, 3), (3, 1, 0, 0, 4, 0, 0)]


@dataclass(frozen=True)
class Scenario:
    """A run, and what must have happened in it for its test to be worth anything.

    ``make`` takes further settings of :func:`exec_toys.given`.
    """

    make: Callable[..., ExecutorInput]
    delay: Delay | None = None
    preempts: bool = False
    moves: bool = False
    strays: bool = False
    kinds: frozenset[str] = frozenset()
    step_kinds: frozenset[StepKind] = frozenset((StepKind.PREFILL, StepKind.DECODE))


def scenario(plan: Plan, policy: Fixed, requests: list[Any] = SHORT, delay: Delay | None = None, *,
             preempts: bool = False, moves: bool = False, strays: bool = False,
             kinds: tuple[str, ...] = (), **settings: Any) -> Scenario:
    """A scenario; ``kinds`` are the transfers that must occur.

    ``strays``: a prefill instance must decode, or a decode instance prefill.
    """
    mixed = {StepKind.MIXED} if settings.get("chunked_prefill") and "handoff" not in kinds else set()
    return Scenario(lambda **more: given(plan, policy, requests, **settings, **more), delay, preempts, moves,
                    strays, frozenset(kinds), frozenset({StepKind.PREFILL, StepKind.DECODE} | mixed))


CHUNKS = {"chunked_prefill": True, "chunk_tokens": 12}
SCENARIOS = {
    "all_local": scenario(ONE, Fixed()),
    "spread": scenario(SPREAD, Fixed((1, 2, 1)), kinds=("push",)),
    "all_remote": scenario(SPREAD, Fixed((0, 2, 2)), kinds=("push",)),
    "two_stages": scenario(TWO, Fixed((2, 2, 3, 1)), kinds=("push",)),
    "three_stages": scenario(THREE, Fixed((2, 1, 1, 4, 0, 0, 0, 3, 1)), kinds=("push",)),
    "uneven_ranks": scenario(RANKS, Fixed((1, 1, 1, 1, 2, 0, 2)), kinds=("push",)),
    "replicas": scenario(REPLICAS, Fixed(), hosts=(2, 3)),
    "chunked": scenario(SPREAD, Fixed((1, 2, 1)), LONG, kinds=("push",), **CHUNKS),
    "chunked_stages": scenario(TWO, Fixed((1, 3, 3, 1)), LONG, kinds=("push",), **CHUNKS),
    "recompute": scenario(ONE, Fixed(), LONG, preempts=True, units=200),
    "recompute_stages": scenario(TWO, Fixed((2, 2, 3, 1)), LONG, preempts=True, kinds=("push",), units=150),
    "recompute_chunked": scenario(TWO, Fixed((1, 3, 3, 1)), LONG, preempts=True, kinds=("push",), units=160,
                                  **CHUNKS),
    "swap": scenario(SPREAD, Fixed((1, 2, 1), "swap"), LONG, preempts=True, units=100, hosts=(1, 2),
                     kinds=("push", "swap_out", "swap_in")),
    "swap_stages": scenario(TWO, Fixed((2, 2, 3, 1), "swap"), LONG, preempts=True, units=150,
                            kinds=("push", "swap_out", "swap_in")),
    "moves": scenario(SPREAD, Turning(PLACES), LONG, slow_cache(0.003), moves=True, kinds=("push", "move")),
    "moves_stages": scenario(TWO, Turning(STAGE_PLACES), LONG, slow_cache(0.003), moves=True,
                             kinds=("push", "move"), moves_max=3),
    "moves_ranks": scenario(RANKS, Turning(RANK_PLACES), LONG, slow_cache(0.003), moves=True,
                            kinds=("push", "move"), moves_max=2),
    "moves_tight": scenario(SPREAD, Turning(PLACES), LONG, slow_cache(0.003), moves=True, preempts=True,
                            kinds=("push", "move"), units=260),
    "moves_swap_tight": scenario(SPREAD, Turning(PLACES, "swap"), LONG, slow_cache(0.003), moves=True,
                                 preempts=True, kinds=("push", "move", "swap_out", "swap_in"), units=260),
    "relief": scenario(SPREAD, Relieving((4, 0, 0)), LONG, moves=True, kinds=("move",), units=260),
}


# -- divided tokens --------------------------------------------------------------------------------------

# Tails at home or with a worker; ranges at both workers, at home, at one of them, nowhere.
PARTS = [((4, 0, 0), (0, 3, 4)), ((4, 0, 0), (0, 7, 0)), ((0, 4, 0), (3, 0, 2)), ((4, 0, 0), (0, 0, 8)),
         ((1, 2, 1), (0, 0, 0)), ((4, 0, 0), (0, 2, 1)), ((0, 0, 4), (8, 0, 0))]
STAGE_PARTS = [((4, 0, 4, 0), (0, 6, 0, 2)), ((0, 4, 4, 0), (4, 0, 0, 0)), ((2, 2, 4, 0), (0, 0, 0, 8)),
               ((4, 0, 0, 4), (0, 3, 7, 0))]
RANK_PARTS = [((3, 1, 0, 0, 4, 0, 0), (0, 0, 3, 4, 0, 2, 3)), ((0, 0, 4, 0, 0, 4, 0), (4, 4, 0, 3, 5, 0, 2)),
              ((3, 1, 0, 0, 2, 1, 1), (0, 0, 0, 7, 0, 0, 0)), ((2, 0, 1, 1, 0, 0, 4), (0, 0, 0, 0, 2, 5, 0))]
SCENARIOS |= {
    "parts": scenario(SPREAD, Dividing(PARTS), kinds=("push",)),
    "parts_stages": scenario(TWO, Dividing(STAGE_PARTS), kinds=("push",)),
    "parts_ranks": scenario(RANKS, Dividing(RANK_PARTS), kinds=("push",)),
    "parts_chunked": scenario(SPREAD, Dividing(PARTS), LONG, kinds=("push",), **CHUNKS),
    "parts_chunked_ranks": scenario(RANKS, Dividing(RANK_PARTS), LONG, kinds=("push",), **CHUNKS),
    "parts_move": scenario(SPREAD, Dividing(PARTS, moves=True), LONG, slow_cache(0.003), moves=True,
                           kinds=("push", "move"), moves_max=3),
    "parts_move_stages": scenario(TWO, Dividing(STAGE_PARTS, moves=True), LONG, slow_cache(0.003), moves=True,
                                  kinds=("push", "move"), moves_max=3),
    "parts_move_ranks": scenario(RANKS, Dividing(RANK_PARTS, moves=True), LONG, slow_cache(0.003), moves=True,
                                 kinds=("push", "move"), moves_max=3),
    "parts_tight": scenario(SPREAD, Dividing(PARTS, moves=True), LONG, slow_cache(0.003), moves=True,
                            preempts=True, kinds=("push", "move"), units=200),
    "parts_swap": scenario(SPREAD, Dividing(PARTS, "swap", moves=True), LONG, slow_cache(0.003),
                           preempts=True, kinds=("push", "move", "swap_out", "swap_in"), units=200),
}

# -- pools ---------------------------------------------------------------------------------------------

# Layers and heads are cut in one way where prompts are computed and in others where requests decode.
RANKS_TO_STAGES = pools(("prefill", pipeline([[0, 1]], [4], owned=[[3, 1]])),
                        ("decode", pipeline([[2], [3]], [1, 3])))
STAGES_TO_RANKS = pools(("prefill", pipeline([[0], [1, 2], [3]], [1, 2, 1], owned=[[4], [2, 2], [4]])),
                        ("decode", pipeline([[4, 5, 6]], [4], owned=[[1, 1, 2]])))
MANY = pools(("prefill", pipeline([[0]], [4])), ("prefill", pipeline([[1], [2]], [2, 2])),
             ("decode", pipeline([[3, 4], [5]], [3, 1], [6], owned=[[2, 2], [4]])),
             ("decode", pipeline([[7]], [4])))
TIGHT = {0: 220, 1: 220, 2: 100, 3: 240}
SWAPS = ("handoff", "swap_out", "swap_in")
POOL_SCENARIOS = {
    "handed": scenario(RANKS_TO_STAGES, Handing(), kinds=("handoff",)),
    "handed_ranks": scenario(STAGES_TO_RANKS, Handing(), delay=slow_cache(0.002), kinds=("handoff",)),
    "streamed": scenario(RANKS_TO_STAGES, Handing(streams=True), kinds=("handoff",)),
    "streamed_ranks": scenario(STAGES_TO_RANKS, Handing(streams=True), delay=slow_cache(0.002),
                               kinds=("handoff",)),
    "streamed_many": scenario(MANY, Handing(streams=True), LONG, kinds=("handoff",), hosts=(3, 5)),
    "streamed_chunks": scenario(STAGES_TO_RANKS, Handing(streams=True), LONG, kinds=("handoff",), **CHUNKS),
    "mixed": scenario(RANKS_TO_STAGES, Handing(streams=True, mixes=True), LONG, strays=True,
                      kinds=("handoff",), units=TIGHT),
    "evicted": scenario(RANKS_TO_STAGES, Handing(streams=True), LONG, preempts=True, kinds=("handoff",),
                        units=TIGHT),
    "swapped": scenario(RANKS_TO_STAGES, Handing("swap"), LONG, preempts=True, kinds=SWAPS, units=TIGHT),
}
SCENARIOS |= POOL_SCENARIOS


def has_happened(what: Scenario, executor: Executor, result: ExecutionResult) -> bool:
    """Whether preemptions, moves, transfers and kinds of steps have occurred where they must."""
    states = executor.controller.states.values()
    return (sum(state.preemptions for state in states) >= what.preempts
            and any(_strays(step, executor.given.plan) for step in result.record.steps) >= what.strays
            and sum(state.moves for state in states) >= what.moves
            and what.kinds <= {kind for _, kind, _ in result.record.arrivals}
            and what.step_kinds <= {StepKind(step.kind) for step in result.record.steps})


def run_until_it_happens(what: Scenario, once: Callable[[], tuple[Executor, ExecutionResult]]
                         ) -> tuple[Executor, ExecutionResult]:
    """A run in which what its scenario is about has occurred.

    When cache arrives is a matter of real time: on a machine that is busy elsewhere a run may go without.
    """
    for _ in range(TRIES):
        executor, result = once()
        if has_happened(what, executor, result):
            return executor, result
    raise AssertionError(f"what the scenario is about has not happened in {TRIES} runs: {what}")


def _strays(step: StepRecord, plan: Plan) -> bool:
    """Whether a step is not what the role of its instance says."""
    role = plan.instances[step.instance].role
    return (role == "prefill" and step.decoding > 0) or (role == "decode" and bool(step.chunks))
