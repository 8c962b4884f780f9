"""Host time of an engine iteration: what the devices wait for, and what runs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hetis_sim.cost.model import ProvenanceRow
from hetis_sim.cost.parse import positive
from hetis_sim.spec.errors import require_finite


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Host time of one engine iteration; a setting of its own, never part of a kernel.

    The defaults (2 ms and 20 us per sequence) are an assumption of ours for an engine of the
    vLLM V1 kind; engines of 2023 took 40 to 65 ms, which a user sets here.

    Attributes:
        base_s, per_sequence_s: scheduling, inputs and outputs of one iteration.
        launch_s_per_layer: time in which the host queues the kernels of one layer. It runs ahead of the
            devices, so an iteration takes the longer of the two. Nothing with CUDA graphs.
        overlap: the host schedules the next iteration while this one computes (vLLM's asynchronous
            scheduling), so its time counts only where it is the longer.
    """

    base_s: float = 2e-3
    per_sequence_s: float = 2e-5
    launch_s_per_layer: float = 0.0
    overlap: bool = False

    def __post_init__(self) -> None:
        for key in ("base_s", "per_sequence_s", "launch_s_per_layer"):
            require_finite(f"cost.host_overhead.{key}", getattr(self, key), 0.0)

    def seconds(self, sequences: int) -> float:
        """Host time of an iteration over ``sequences``."""
        return self.base_s + self.per_sequence_s * sequences

    def waited_s(self, sequences: int) -> float:
        """The part that the devices wait for."""
        return 0.0 if self.overlap else self.seconds(sequences)

    def beside_s(self, sequences: int, layers: int, leads: bool) -> float:
        """The part that runs while the devices compute; ``leads`` where the iteration is scheduled."""
        scheduling = self.seconds(sequences) if self.overlap and leads else 0.0
        return scheduling + self.launch_s_per_layer * layers

    def provenance(self) -> ProvenanceRow:
        """The row that says that this is a setting."""
        note = f"{self.base_s:g} s + {self.per_sequence_s:g} s per sequence"
        if self.launch_s_per_layer:
            note += f"; launching a layer takes {self.launch_s_per_layer:g} s beside the devices"
        if self.overlap:
            note += "; beside the devices"
        return ProvenanceRow("host_overhead", "host", "setting", "", "configuration", note=note)

    @classmethod
    def parse(cls, raw: dict[str, Any], key: str) -> HostOverhead:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        return cls(positive(raw.get("base_s"), f"{key}.base_s", zero=True),
                   positive(raw.get("per_sequence_s"), f"{key}.per_sequence_s", zero=True))

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        return {"base_s": float(f"{self.base_s:.4g}"), "per_sequence_s": float(f"{self.per_sequence_s:.4g}")}
