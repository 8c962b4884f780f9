"""What a profile that was measured on one machine says about that machine, and who may use it.

Shipped profiles are fits of public tables and know no machine. A calibrated one was measured with
the code that serves; it is for the device, the number type and the model shapes that it names, and
for nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hetis_sim.spec.errors import SpecError, require, require_finite
from hetis_sim.spec.model import ModelSpec

KEY = "calibration"
FINGERPRINT = "sha256"
TEXTS = ("hardware", "driver", "torch", "python", "date", "dtype")


@dataclass(frozen=True)
class Calibration:
    """How a profile was measured.

    Attributes:
        hardware: name of the processor or card.
        driver, torch, python: versions; empty where there is none.
        date: of the measurement, ISO 8601.
        dtype: of weights, activations and cache, as torch calls it.
        element_bytes: its size.
        models: names of the models that were measured.
        throttle: factors by which the software slowed the device down, by kind of work; empty for none.
        settings: what else decided the measurement.
        samples: file with the samples, beside the profile.
        seconds: that the measurement took.
        reference: seconds of a short piece of work by part (``dense``, ``attention``), taken between the
            samples: who measures it again sees how fast the machine is by then. Empty where it was not taken.
        reference_layers: of the model, in that piece of work on a processor; 0 for all, as in older profiles.
    """

    hardware: str
    driver: str
    torch: str
    python: str
    date: str
    dtype: str
    element_bytes: int
    models: tuple[str, ...] = ()
    throttle: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: str = ""
    seconds: float = 0.0
    reference: Mapping[str, float] = field(default_factory=dict)
    reference_layers: int = 0

    @classmethod
    def parse(cls, raw: Any, key: str) -> Calibration:
        """Read the block of a profile; :class:`SpecError` names the faulty key."""
        require(isinstance(raw, dict), key, raw, "an object")
        for name in TEXTS:
            require(isinstance(raw.get(name), str), f"{key}.{name}", raw.get(name), "a text")
        size = raw.get("element_bytes")
        require(size in (1, 2, 4), f"{key}.element_bytes", size, "1, 2 or 4")
        models = raw.get("models") or []
        require(isinstance(models, list) and all(isinstance(name, str) for name in models), f"{key}.models",
                models, "a list of names")
        throttle, settings = raw.get("throttle") or {}, raw.get("settings") or {}
        require(isinstance(throttle, dict), f"{key}.throttle", throttle, "an object")
        require(isinstance(settings, dict), f"{key}.settings", settings, "an object")
        reference = raw.get("reference") or {}
        require(isinstance(reference, dict), f"{key}.reference", reference, "an object")
        for part, seconds in reference.items():
            require_finite(f"{key}.reference.{part}", seconds, 0.0, open_low=True)
        layers = raw.get("reference_layers", 0)
        require(type(layers) is int and layers >= 0, f"{key}.reference_layers", layers, "0 or more")
        return cls(raw["hardware"], raw["driver"], raw["torch"], raw["python"], raw["date"], raw["dtype"],
                   int(size), tuple(models), throttle, settings, str(raw.get("samples", "")),
                   float(raw.get("seconds", 0.0)), reference, layers)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        return asdict(self) | {"models": list(self.models)}

    def check_model(self, model: ModelSpec, profile: str) -> None:
        """Raise :class:`SpecError` where the model's numbers are of another size than those measured."""
        for key, size in (("weight_bytes", model.weight_bytes), ("kv_bytes", model.kv_bytes)):
            if size != self.element_bytes:
                raise SpecError(f"model.{key}", size,
                                f"{self.element_bytes}: profile {profile!r} was measured in {self.dtype}")


def fingerprint(raw: Mapping[str, Any]) -> str:
    """Hash of a profile's content, but for the hash itself."""
    text = json.dumps({key: value for key, value in raw.items() if key != FINGERPRINT}, sort_keys=True,
                      separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_fingerprint(raw: Mapping[str, Any], key: str) -> None:
    """Refuse a calibrated profile whose content is not what was measured.

    Raises:
        SpecError: no hash, or another one: somebody has changed the device or a coefficient.
    """
    found = raw.get(FINGERPRINT)
    if found != fingerprint(raw):
        raise SpecError(f"{key}: {FINGERPRINT}", found, "the hash of the content: this profile has been "
                        "changed since it was measured; calibrate again")
