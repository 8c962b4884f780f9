"""Plans of peers served in whole runs, and loads for their routing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.plan import InstancePlan, Plan, StagePlan
from hetis_sim.policies.rated import RatedInstance
from hetis_sim.policies.view import InstanceLoad
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.request import Request


def requests(count: int, rate: float, prompt: int, output: int, seed: int = 0) -> list[Request]:
    """Requests at exponential gaps, with lengths up to twice the means."""
    random, now_s, made = Random(seed), 0.0, []
    for number in range(count):
        now_s += random.expovariate(rate)
        made.append(Request(number, now_s, random.randint(1, 2 * prompt - 1),
                            random.randint(1, 2 * output - 1)))
    return made


def serve(policy: Policy, given: PlanningProblem, workload: list[Request], *, chunked: bool = False,
          plan: Plan | None = None) -> Simulation:
    """A whole run with all invariants checked; the simulation that has ended."""
    chosen = plan or policy.plan(replace(given, chunk_tokens=512 if chunked else 0))
    settings = SchedulerSettings(given.limits, chunked_prefill=chunked)
    simulation = Simulation(SimulationInput(given.cluster, given.model, given.cost, policy, chosen, workload,
                                            settings, 2_000_000, debug=True))
    simulation.run()
    return simulation


def one_card(device: int, layers: int, kv_heads: int, role: str, strength: float = 1.0,
             prompt_rate: float = 1.0) -> RatedInstance:
    """The whole model on one card."""
    stage = StagePlan((device,), layers, (kv_heads,))
    return RatedInstance((stage,), (), role, strength, prompt_rate)  # type: ignore[arg-type]


def load(plan: InstancePlan, index: int = 0, waiting_tokens: int = 0, context_tokens: int = 0,
         guests: int = 0) -> InstanceLoad:
    """How much an instance has to do."""
    running, waiting = bool(context_tokens) + guests, bool(waiting_tokens)
    return InstanceLoad(index, plan, dict.fromkeys(plan.devices, 1000), running, waiting, waiting_tokens,
                        context_tokens, guests)
