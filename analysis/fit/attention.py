"""Fits attention: the block model of prompts and the linear model of decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linprog

from analysis.fit.errors import Floats, Mask
from analysis.fit.gemm import fit_surface
from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.model import AttentionCost

KV_BYTES = 2
BLOCKS = (64, 128)
BLOCK_KNOTS = (0.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 16.0)
KEY_KNOTS = (4.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 17.0)
GROUP_KNOTS = (0.0, 1.0, 3.0, 6.0)
PREFILL_SHARED = ("flops_per_s", "block_flops_per_s", "bytes_per_s", "fixed_s", "sharpness")


def predict_prefill(model: PrefillClass, rows: pd.DataFrame, *, corrected: bool = True) -> Floats:
    """Seconds for each row of one head size."""
    heads, kv_heads, new, context, batch = (rows[key].to_numpy(dtype=np.float64) for key in (
        "heads", "kv_heads", "new", "context", "batch"))
    call = model.seconds if corrected else model.base_s
    return call(heads, kv_heads, new, context, KV_BYTES, batch=batch)


def fit_prefill(rows: pd.DataFrame, flops_per_s: float, bytes_per_s: float) -> PrefillClass:
    """The block model of one head size: coordinate descent for each block size, then the correction."""
    tries = [_descend(_prefill_start(int(rows["head_dim"].iloc[0]), block, flops_per_s, bytes_per_s), rows,
                      flops_per_s, bytes_per_s) for block in BLOCKS]
    model = min(tries, key=lambda found: found[0])[1]
    blocks = rows["batch"] * rows["heads"] * np.ceil(rows["new"] / model.block)
    keys = (rows["context"] + rows["new"]).to_numpy(dtype=np.float64)
    group = (rows["heads"] / rows["kv_heads"]).to_numpy()
    coordinates = (np.log2(blocks.to_numpy()), np.log2(keys), np.log2(group))
    target = np.log(rows["seconds"].to_numpy() / predict_prefill(model, rows))
    return model.with_correction(fit_surface(coordinates, target, (BLOCK_KNOTS, KEY_KNOTS, GROUP_KNOTS)))


def _prefill_start(head_dim: int, block: int, flops_per_s: float, bytes_per_s: float) -> PrefillClass:
    rate = 0.6 * flops_per_s
    return PrefillClass(head_dim, block, rate, rate / 100, 0.8 * bytes_per_s, fixed_s=8e-6, sharpness=3.0)


def _descend(model: PrefillClass, rows: pd.DataFrame, flops_per_s: float,
             bytes_per_s: float) -> tuple[float, PrefillClass]:
    """(loss, model) after shrinking steps along each coefficient."""
    log_time = np.log(rows["seconds"].to_numpy())
    limits = {"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s, "sharpness": 12.0}

    def loss(candidate: PrefillClass) -> float:
        error = np.abs(np.log(predict_prefill(candidate, rows)) - log_time)
        return float(error.mean() + 0.3 * np.quantile(error, 0.95))

    best, step = loss(model), 0.4
    for _ in range(20):
        for key in PREFILL_SHARED:
            for factor in (np.exp(step), np.exp(-step)):
                value = min(getattr(model, key) * factor, limits.get(key, np.inf))
                changed: dict[str, Any] = {key: float(max(value, 1.2) if key == "sharpness" else value)}
                trial = replace(model, **changed)
                found = loss(trial)
                if found < best:
                    best, model = found, trial
        step *= 0.8
    return best, model


def decode_work(rows: pd.DataFrame) -> tuple[Floats, Floats]:
    """(h, g) of each row: query heads of the batch, bytes of cache read."""
    heads = (rows["batch"] * rows["heads"]).to_numpy(dtype=np.float64)
    moved = 2.0 * KV_BYTES * rows["batch"] * rows["kv_heads"] * rows["head_dim"] * rows["length"]
    return heads, moved.to_numpy(dtype=np.float64)


def fit_decode(rows: pd.DataFrame, limited: Mask, bytes_per_s: float) -> AttentionCost:
    """Least mean relative error of a*h + b*g + c with a, c >= 0 and b >= 1/bandwidth, as a linear program.

    Rows where the launch is the limit steer c and a, at a fifth of the weight of the others.
    """
    heads, moved = decode_work(rows)
    seconds = rows["seconds"].to_numpy()
    weight = np.where(limited, 1.0, 0.2)
    unit = (1e-9, 1e-12, 1e-6)
    columns = [heads * unit[0], moved * unit[1], np.full(len(rows), unit[2])]
    design = np.column_stack(columns) / seconds[:, None]
    count = len(rows)
    identity = np.eye(count)
    found = linprog(np.concatenate([np.zeros(3), weight]),
                    A_ub=np.block([[design, -identity], [-design, -identity]]),
                    b_ub=np.concatenate([np.ones(count), -np.ones(count)]),
                    bounds=[(0, None), (1.0 / bytes_per_s / unit[1], None), (0, None)] + [(0, None)] * count,
                    method="highs")
    a, b, c = (float(x) * u for x, u in zip(found.x[:3], unit, strict=True))
    return AttentionCost(a, b, c)


def predict_decode(cost: AttentionCost, rows: pd.DataFrame) -> Floats:
    """Seconds for each row of one class."""
    heads, moved = decode_work(rows)
    return cost.a_s_per_head * heads + cost.b_s_per_byte * moved + cost.c_s


def decode_classes(rows: pd.DataFrame, limited: Mask, bytes_per_s: float,
                   least: int = 12) -> list[DecodeClass]:
    """One fit for each head size and number of heads per group with at least ``least`` limited rows."""
    found = []
    head_dims = rows["head_dim"].to_numpy()
    groups = (rows["heads"] // rows["kv_heads"]).to_numpy()
    for head_dim, group in sorted(set(zip(head_dims.tolist(), groups.tolist(), strict=True))):
        chosen = (head_dims == head_dim) & (groups == group)
        if (chosen & limited).sum() >= least:
            cost = fit_decode(rows[chosen], limited[chosen], bytes_per_s)
            found.append(DecodeClass(head_dim, group, cost))
    return found
