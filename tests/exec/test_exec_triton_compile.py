"""Kernels compile for cards of every generation, without one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="real models need the extra exec")
pytest.importorskip("triton", reason="kernels are written in Triton")

SCRIPT = Path(__file__).parents[1] / "triton_compile.py"
TARGETS = (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)


def compile_all(cases: list[list[Any]]) -> list[dict[str, Any]]:
    """Compile cases in a process in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), json.dumps(cases)], env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(cases)
    assert all(made["bytes"] > 1000 for made in found)
    return found


def test_some_kernels_compile_for_old_and_new_cards() -> None:
    """Matrix units are used where there are any."""
    found = compile_all([["decode", 60, "fp16", 1, 64], ["decode", 90, "bf16", 4, 64],
                         ["join", 60, "fp16", 4, 64], ["turn_norm", 90, "bf16", 4, 64],
                         ["decode_parts", 60, "fp16", 1, 64], ["join_parts", 60, "fp16", 1, 64]])
    assert [made["matrix_units"] for made in found] == [False, True, False, False, False, False]


@pytest.mark.slow
def test_what_lies_between_matrix_products_compiles() -> None:
    """On the newest card and on the oldest."""
    compile_all([[kernel, target, kind, 4, 128] for target, kind in ((60, "fp16"), (90, "bf16"))
                 for kernel in ("join", "join_parts", "decode_parts", "norm", "add_layer_norm", "turn",
                                "turn_norm", "gate")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_decode_attention_compiles_for_every_card(target: int, kind: str) -> None:
    """All group sizes."""
    found = compile_all([["decode", target, kind, heads, 128] for heads in (1, 4, 8, 16)])
    if target < 80 or kind == "fp32":
        assert not any(made["matrix_units"] for made in found)
    else:
        assert all(made["matrix_units"] for made in found)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_decode_attention_compiles_for_other_heads(head_dim: int) -> None:
    """On cards with matrix units and without."""
    compile_all([["decode", target, kind, 4, head_dim]
                 for target, kind in ((70, "fp16"), (80, "fp16"), (90, "bf16"), (90, "fp32"))])


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 86, 90, 120])
def test_attention_of_prompts_compiles(target: int) -> None:
    """On cards with matrix units, for heads of all sizes."""
    found = compile_all([["prompt", target, "bf16", heads, head_dim]
                         for heads, head_dim in ((1, 128), (4, 128), (8, 128), (7, 64), (3, 80), (2, 256))])
    assert all(made["matrix_units"] for made in found)
    assert all(made["shared_bytes"] <= 99 << 10 for made in found)
