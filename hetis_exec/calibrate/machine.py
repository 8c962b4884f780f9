"""What machine this is, as far as it decides how long things take."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hetis_exec.places import CPU

CPU_FILE = Path("/proc/cpuinfo")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Machine:
    """One place of this host.

    Attributes:
        hardware: name of the processor or card.
        driver: of the card; of a processor, the operating system.
        cores: that this process may use.
    """

    hardware: str
    driver: str
    torch: str
    python: str
    cores: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def machine_at(place: str) -> Machine:
    """The machine behind one of torch's devices."""
    cores = len(os.sched_getaffinity(0))
    versions = torch.__version__, platform.python_version(), cores
    if place == CPU:
        return Machine(_processor(), f"{platform.system()} {platform.release()}", *versions)
    return Machine(torch.cuda.get_device_name(place), _driver(), *versions)


def _processor() -> str:
    try:
        lines = CPU_FILE.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str:
    """Version of the driver of CUDA cards; that of CUDA alone where the driver does not say."""
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return f"{found[1] if found else 'unknown'}, CUDA {torch.version.cuda}"
