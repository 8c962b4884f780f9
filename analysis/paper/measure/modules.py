"""How long a decoded token spends in each kind of module."""

from __future__ import annotations

import numpy as np

from hetis_sim.metrics.columns import PARTS, STEP_KINDS, Table
from hetis_sim.run import Result


def module_times(result: Result) -> dict[str, float]:
    """Seconds of an iteration by part, in steps of one kind alone.

    ``decode_X_s`` are averages over decoded tokens, ``prefill_X_s`` over prompt tokens.

    A token goes through all stages of its instance, and every part is summed over them. So
    ``decode_dense_s`` is the latency of the dense modules of a whole model, ``decode_attention_s`` that of
    decode attention on the slowest device of every stage, ``decode_head_transfer_s`` what the links to
    attention workers add to it.
    """
    steps = result.recorder.records().steps
    found: dict[str, float] = {}
    for kind in ("prefill", "decode"):
        rows = steps.rows((steps["kind"] == STEP_KINDS.index(kind)) & (steps[f"{kind}_tokens"] > 0))
        tokens = rows[f"{kind}_tokens"]
        weight, total = tokens / np.maximum(rows["iterations"], 1), float(tokens.sum())
        found |= {f"{kind}_{part}_s": float((weight * rows[f"{part}_s"]).sum()) / total if total
                  else float("nan") for part in PARTS}
    return found


def mean_gap_s(requests: Table) -> float:
    """Mean seconds from one token of a request to its next, over all tokens of the finished requests."""
    gaps = requests["output_tokens"] - 1
    decoding_s = requests["finish_s"] - requests["first_token_s"]
    several = np.isfinite(decoding_s) & (gaps >= 1)
    return float(decoding_s[several].sum() / gaps[several].sum()) if several.any() else float("nan")
