"""What the evaluation runs: models, workloads, policies, and how much of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis_sim.policies.registry import policy_names

HETIS = "hetis"
BASELINES = ("splitwise", "hexgen")
"""The paper's own baselines."""

NEIGHBOURS = ("vllm", "vllm_all", "distserve", "lamina", "helix", "infinite")
"""Systems that the paper does not compare with; those that are registered are run, for the focus' model."""

MESHES = ("helix",)
"""Of these, requests go round a mesh of nodes: a step is that of a single node, so that no iteration of a
whole model is recorded."""

MODEL_NAMES = {"llama-13b": "Llama-13B", "opt-30b": "OPT-30B", "llama2-70b": "Llama-70B"}
WORKLOAD_NAMES = {"sharegpt": "ShareGPT", "humaneval": "HumanEval", "longbench": "LongBench"}
POLICY_NAMES = {"hetis": "Hetis", "splitwise": "Splitwise", "hexgen": "HexGen", "vllm": "vLLM, A100s only",
                "vllm_all": "vLLM, all cards", "distserve": "DistServe", "lamina": "Lamina", "helix": "Helix",
                "infinite": "Infinite-LLM"}

TTFT_S = {"sharegpt": 2.0, "humaneval": 1.0, "longbench": 10.0}
"""Limits on the time to first token (ours; the paper states none): about ten times what a mean prompt takes
with Llama-70B on two A100s."""
TTFT_OTHER_S = 5.0
TPOT_S = 0.2

COMMON_SHARE = 0.6
"""Rate at which latencies are compared, as a share of the least capacity among Hetis and the baselines."""


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        name: ``full`` or ``quick``.
        cluster, models, workloads, policies: what is run.
        seeds: of every figure that has an interval.
        requests_max: most requests of a run of a search.
        sojourns: arrivals of such a run last as many times as long as a request stays under overload.
        requests: of a run at a given rate.
        tolerance: of the searches for capacities.
        curve: rates of the curves of latency over load, in units of Hetis' capacity.
        focus: the cell (model, workload) of sweeps and switches; with its model, further systems are run.
        thetas, deltas, errors: values of the sweeps.
        error_draws: draws of wrong coefficients for each error.
        switches: most assumptions that are switched; None for all.
        hosts: of each of five types of GPU, in the plan searches on large clusters.
        rate_eviction: rate of the comparison of evictions, requests/s (the paper's).
    """

    name: str = "full"
    cluster: str = "paper"
    models: tuple[str, ...] = ("llama-13b", "opt-30b", "llama2-70b")
    workloads: tuple[str, ...] = ("sharegpt", "humaneval", "longbench")
    policies: tuple[str, ...] = (HETIS, *BASELINES, *NEIGHBOURS)
    seeds: int = 3
    requests_max: int = 5000
    sojourns: float = 2.5
    requests: int = 500
    tolerance: float = 0.1
    curve: tuple[float, ...] = (0.3, 0.6, 0.8, 1.0, 1.2, 1.5)
    focus: tuple[str, str] = ("llama2-70b", "sharegpt")
    thetas: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
    deltas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
    errors: tuple[float, ...] = (0.1, 0.2)
    error_draws: int = 4
    switches: int | None = None
    hosts: tuple[int, ...] = (1, 2, 4, 8)
    rate_eviction: float = 5.0

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Models and workloads."""
        return [(model, workload) for model in self.models for workload in self.workloads]

    @property
    def main(self) -> list[str]:
        """Hetis and the paper's baselines."""
        return [policy for policy in self.run_policies if policy in (HETIS, *BASELINES)]

    @property
    def run_policies(self) -> list[str]:
        """The policies that are registered, in order."""
        known = policy_names()
        return [policy for policy in self.policies if policy in known]


FULL = Scale()

QUICK = replace(
    FULL, name="quick", models=("llama2-70b",), workloads=("sharegpt",),
    policies=(HETIS, *BASELINES), seeds=2, requests_max=500, requests=250, tolerance=0.3,
    curve=(0.5, 1.0, 1.5), thetas=(0.1, 0.5, 2.0), deltas=(0.0, 0.05, 0.5), errors=(0.2,),
    error_draws=2, switches=2, hosts=(1,))
"""A look at everything in small; too few seeds and requests for its figures to be cited."""


def cell_name(model: str, workload: str) -> str:
    """For people: ``Llama-70B, ShareGPT``."""
    return f"{MODEL_NAMES.get(model, model)}, {WORKLOAD_NAMES.get(workload, workload)}"


def policy_name(policy: str) -> str:
    """For people."""
    return POLICY_NAMES.get(policy, policy)
