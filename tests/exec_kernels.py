"""Where tests compute with the kernels of CUDA devices.

That is a CUDA device if there is one. Elsewhere CPU tensors do, and Triton's interpreter runs its kernels:
Triton reads ``TRITON_INTERPRET`` when it is imported, ``conftest.py`` sets it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="real models need the extra exec")

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def triton_kernels(name: str) -> Any:
    """A module of kernels; skips the test where they cannot run."""
    pytest.importorskip("triton", reason="kernels are written in Triton")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a CUDA device or its interpreter")
    return pytest.importorskip(f"hetis_exec.kernels.{name}")
