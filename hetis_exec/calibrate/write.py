"""Profiles of a calibration: one file for each type of device, one for links, one for the host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hetis_exec.calibrate.regression import Fitted
from hetis_sim.cost.calibration import FINGERPRINT, KEY, Calibration, fingerprint
from hetis_sim.cost.profile import HOST_DEVICE, LINKS_DEVICE, SCHEMA, parse_profile
from hetis_sim.metrics.strictjson import plain
from hetis_sim.spec.errors import HetisError


@dataclass(frozen=True)
class Written:
    """A profile and the samples beside it."""

    profile: Path
    samples: Path


def profile_of(device: str, modules: Sequence[Fitted], calibration: Calibration) -> dict[str, Any]:
    """The content of a profile file."""
    source = f"measured on {calibration.hardware}, samples in {calibration.samples}"
    raw = plain({"schema": SCHEMA, "name": f"calibrated-{device}", "device": device,
                 KEY: calibration.dump(), "modules": {made.module: made.body(source) for made in modules}})
    signed: dict[str, Any] = {**raw, FINGERPRINT: fingerprint(raw)}
    parse_profile(signed, device)
    return signed


def write_profile(folder: Path, device: str, raw: dict[str, Any], samples: pd.DataFrame) -> Written:
    """Write a profile and its samples.

    Raises:
        HetisError: the folder cannot be written to.
    """
    written = Written(folder / f"{device}.json", folder / f"{device}.parquet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        samples.to_parquet(written.samples, index=False)
        written.profile.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HetisError(f"calibrate.out: {folder} cannot be written: {error}") from error
    return written


def subjects_of(modules: Sequence[Fitted]) -> dict[str, list[Fitted]]:
    """The modules of each file, devices first."""
    found: dict[str, list[Fitted]] = {}
    for made in sorted(modules, key=lambda made: made.subject in (LINKS_DEVICE, HOST_DEVICE)):
        found.setdefault(made.subject, []).append(made)
    return found
