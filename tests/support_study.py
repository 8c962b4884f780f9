"""What tests of studies share: a small configuration, and runs against their bounds."""

from __future__ import annotations

from dataclasses import dataclass

from support import TINY
from support_runs import Scenario

from hetis_sim.metrics.recorder import Recorder
from hetis_sim.study.bound import Bound, upper_bound

SMALL = ("cluster=single-a100", "model=llama3-8b", "workload=humaneval", "study.workers=1", "output=json")
"""A system whose runs take a tenth of a second."""


@dataclass(frozen=True)
class Reached:
    """A run against the bound for the requests that it finished."""

    throughput_rps: float
    bound: Bound

    @property
    def share(self) -> float:
        """Throughput over bound."""
        return self.throughput_rps / self.bound.requests_per_s


def reached(scenario: Scenario, recorder: Recorder | None = None) -> Reached | None:
    """A scenario's throughput from first arrival to last end, and the bound; None where nothing finished."""
    requests = (recorder or scenario.run()).records().requests
    finished = requests.rows(requests["status"] == 0)
    if not len(finished):
        return None
    span_s = finished["finish_s"].max() - requests["arrival_s"].min()
    lengths = (finished["prompt_tokens"], finished["output_tokens"])
    bound = upper_bound(scenario.cluster(), TINY, scenario.cost, scenario.settings(), [lengths])
    return Reached(len(finished) / span_s, bound)
