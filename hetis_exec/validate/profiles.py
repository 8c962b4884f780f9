"""Whether the profiles of a validation were calibrated on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from hetis_exec.calibrate.machine import machine_at
from hetis_exec.config import ExecutionConfig
from hetis_exec.run import Execution
from hetis_exec.throttle import described, read_throttles
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.cost.load import profile_path
from hetis_sim.cost.profile import read_profile
from hetis_sim.spec.errors import SpecError


def check_profiles(config: ExecutionConfig, execution: Execution) -> None:
    """Refuse profiles that were not calibrated on this machine, slowed down as it is now.

    Raises:
        SpecError: none, or one that differs; the text says in what.
    """
    profiles = [read_profile(file) for file in files_of(config)]
    calibrated = {profile.device: profile.calibration for profile in profiles if profile.calibration}
    if not calibrated:
        raise SpecError("profile", list(config.cost.profiles),
                        "a folder that python -m hetis_exec calibrate has written for this machine")
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    cluster = execution.prepared.cluster
    throttles = described(read_throttles(config.executor.throttle, cluster))
    for device in cluster.devices:
        kind = device.gpu.name
        found = calibrated.get(kind)
        if found is None:
            continue
        machine = machine_at(backend.place(device.device_id))
        for key, there, here in (("hardware", found.hardware, machine.hardware),
                                 ("dtype", found.dtype, backend.dtype),
                                 ("throttle", dict(found.throttle), throttles.get(kind, {}))):
            if there != here:
                raise SpecError(f"profile of {kind}: {key}", there,
                                f"{here!r}, as it is here and now; calibrate again")


def files_of(config: ExecutionConfig) -> list[Path]:
    """The files of all profiles that are given."""
    paths = [profile_path(path) for path in config.cost.profiles]
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def hashes_of(config: ExecutionConfig) -> dict[str, str]:
    """The hash of each profile's content, by file name."""
    return {file.name: str(json.loads(file.read_text(encoding="utf-8")).get("sha256"))
            for file in files_of(config)}


def reference_layers_of(config: ExecutionConfig) -> dict[str, int]:
    """Layers that the reference work was done on, by type of device; 0 for all."""
    profiles = [read_profile(file) for file in files_of(config)]
    return {profile.device: profile.calibration.reference_layers for profile in profiles
            if profile.calibration is not None}


def references_of(config: ExecutionConfig) -> dict[str, dict[str, float]]:
    """Seconds of the reference work by type of device and part, of profiles that have them."""
    profiles = [read_profile(file) for file in files_of(config)]
    return {profile.device: dict(profile.calibration.reference) for profile in profiles
            if profile.calibration is not None and profile.calibration.reference}
