"""How long a decoded token spends in each kind of module."""

from __future__ import annotations

import numpy as np

from hetis_sim.metrics.columns import PARTS, STEP_KINDS
from hetis_sim.run import Result


def module_times(result: Result) -> dict[str, float]:
    """Seconds of an iteration by part, averaged over decoded tokens; steps that only decode.

    A token goes through all stages of its instance, and every part is summed over them. So
    ``decode_dense_s`` is the latency of the dense modules of a whole model, ``decode_attention_s`` that of
    decode attention on the slowest device of every stage, ``decode_head_transfer_s`` what the links to
    attention workers add to it.
    """
    steps = result.recorder.records().steps
    decode = steps.rows((steps["kind"] == STEP_KINDS.index("decode")) & (steps["decode_tokens"] > 0))
    weight = decode["decode_tokens"] / np.maximum(decode["iterations"], 1)
    total = float(decode["decode_tokens"].sum())
    return {f"decode_{part}_s": float((weight * decode[f"{part}_s"]).sum()) / total if total else float("nan")
            for part in PARTS}
