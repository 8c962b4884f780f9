"""Host time of an engine iteration: what the devices wait for, and what runs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hetis_sim.cost.graphs import NO_GRAPHS, GraphSteps
from hetis_sim.cost.model import ProvenanceRow
from hetis_sim.cost.parse import positive
from hetis_sim.spec.errors import require_finite

OF_PROMPTS = ("prompt_step_s", "per_prompt_s")
EAGER = ("eager_s_per_layer", "eager_s_per_prompt")


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Host time of one engine iteration; a setting of its own, never part of a kernel.

    The defaults (2 ms and 20 us per sequence) are an assumption of ours for an engine of the
    vLLM V1 kind; engines of 2023 took 40 to 65 ms, which a user sets here.

    Attributes:
        base_s, per_sequence_s: scheduling, inputs and outputs of one iteration.
        prompt_step_s, per_prompt_s: what an iteration with prompts takes more, and each of them: tables of
            new requests, their tokens, whatever is told to whoever asked.
        launch_s_per_layer: time in which the host queues the kernels of one layer. It runs ahead of the
            devices, so an iteration takes the longer of the two. Nothing with CUDA graphs.
        overlap: the host schedules the next iteration while this one computes (vLLM's asynchronous
            scheduling), so its time counts only where it is the longer.
        eager_s_per_layer, eager_s_per_prompt: the same as ``launch_s_per_layer`` in iterations that are not
            replayed from a graph, and what each prompt adds to it in every layer.
        graphs: steps that are replayed from graphs where one device has the whole model and its cache.
    """

    base_s: float = 2e-3
    per_sequence_s: float = 2e-5
    launch_s_per_layer: float = 0.0
    overlap: bool = False
    eager_s_per_layer: float = 0.0
    eager_s_per_prompt: float = 0.0
    graphs: GraphSteps = NO_GRAPHS
    prompt_step_s: float = 0.0
    per_prompt_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("base_s", "per_sequence_s", "launch_s_per_layer", *OF_PROMPTS, *EAGER):
            require_finite(f"cost.host_overhead.{key}", getattr(self, key), 0.0)

    def seconds(self, sequences: int, prompts: int = 0) -> float:
        """Host time of an iteration that samples ``sequences`` tokens and has ``prompts`` in it."""
        plain = self.base_s + self.per_sequence_s * sequences
        return plain + self.prompt_step_s + self.per_prompt_s * prompts if prompts else plain

    def waited_s(self, sequences: int, prompts: int = 0) -> float:
        """The part that the devices wait for."""
        return 0.0 if self.overlap else self.seconds(sequences, prompts)

    def beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                 eager: bool = False) -> float:
        """The part that runs while the devices compute.

        Args:
            leads: the iteration is scheduled here.
            eager: it is not replayed from a graph.
        """
        scheduling = self.seconds(sequences, prompts) if self.overlap and leads else 0.0
        launch_s = self.launch_s_per_layer
        if eager:
            launch_s = max(launch_s, self.eager_s_per_layer + self.eager_s_per_prompt * prompts)
        return scheduling + launch_s * layers

    def provenance(self) -> ProvenanceRow:
        """The row that says that this is a setting."""
        note = f"{self.base_s:g} s + {self.per_sequence_s:g} s per sequence"
        if self.prompt_step_s or self.per_prompt_s:
            note += f", {self.prompt_step_s:g} s with prompts + {self.per_prompt_s:g} s per prompt"
        if self.launch_s_per_layer:
            note += f"; launching a layer takes {self.launch_s_per_layer:g} s beside the devices"
        if self.overlap:
            note += "; beside the devices"
        return ProvenanceRow("host_overhead", "host", "setting", "", "configuration", note=note)

    @classmethod
    def parse(cls, raw: dict[str, Any], key: str) -> HostOverhead:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        layer_s, prompt_s, step_s, each_s = (positive(raw.get(name, 0.0), f"{key}.{name}", zero=True)
                                             for name in (*EAGER, *OF_PROMPTS))
        base_s = positive(raw.get("base_s"), f"{key}.base_s", zero=True)
        per_sequence_s = positive(raw.get("per_sequence_s"), f"{key}.per_sequence_s", zero=True)
        graphs = GraphSteps.parse(raw, key)
        return cls(base_s, per_sequence_s, 0.0, False, layer_s, prompt_s, graphs, step_s, each_s)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        names = ("base_s", "per_sequence_s", *(name for name in (*OF_PROMPTS, *EAGER) if getattr(self, name)))
        found: dict[str, Any] = {name: float(f"{getattr(self, name):.4g}") for name in names}
        return found | self.graphs.dump()
