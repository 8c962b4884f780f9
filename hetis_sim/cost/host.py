"""Host time of an iteration: scheduling, input and output, between the devices' work."""

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
    """

    base_s: float = 2e-3
    per_sequence_s: float = 2e-5

    def __post_init__(self) -> None:
        require_finite("cost.host_overhead.base_s", self.base_s, 0.0)
        require_finite("cost.host_overhead.per_sequence_s", self.per_sequence_s, 0.0)

    def seconds(self, sequences: int) -> float:
        """Host time of an iteration over ``sequences``."""
        return self.base_s + self.per_sequence_s * sequences

    def provenance(self) -> ProvenanceRow:
        """The row that says that this is a setting."""
        return ProvenanceRow("host_overhead", "host", "setting", "", "configuration",
                             note=f"{self.base_s:g} s + {self.per_sequence_s:g} s per sequence")

    @classmethod
    def parse(cls, raw: dict[str, Any], key: str) -> HostOverhead:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        return cls(positive(raw.get("base_s"), f"{key}.base_s", zero=True),
                   positive(raw.get("per_sequence_s"), f"{key}.per_sequence_s", zero=True))

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        return {"base_s": float(f"{self.base_s:.4g}"), "per_sequence_s": float(f"{self.per_sequence_s:.4g}")}
