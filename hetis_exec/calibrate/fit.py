"""Fits the modules of a profile to samples, and says how well they predict samples they did not see.

Coefficients make the mean relative error least and are never negative: a linear program. Held out are
whole groups: all samples of a batch size, of a prompt, of a message size. Every group is predicted once,
by a fit to the others; what is written was fitted to all.

What is fitted is what things take on average, for latencies are sums of many of them; see
:func:`hetis_exec.calibrate.samples.means`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from hetis_exec.calibrate.regression import (
    POINTS_MIN,
    Fitted,
    Floats,
    Predict,
    ends_of,
    held_out_errors,
    least_relative,
)
from hetis_exec.calibrate.samples import EXCESS_MAX, GRAPHS, PREFIX, means
from hetis_exec.calibrate.surface import OCTAVES, fit_surface
from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.model import AttentionCost
from hetis_sim.cost.profile import PACKING
from hetis_sim.cost.tables import TokenTables
from hetis_sim.spec.model import ModelSpec

LONE_MIN = 3
"""Batches of one request, by length, that are enough for a line of their own."""

LEAST_S_PER_BYTE = 1e-18
BLOCKS = (1, 16, 64, 128)
"""Sizes of a block of queries that are tried: kernels round prompts up to whole blocks."""

NO_LIMIT_PER_S = 1e18
LINK_MODULES = ("transfer", "hop", "all_reduce")

DECODE_OCTAVES = (0.0, OCTAVES, OCTAVES / 2)
"""Distances of knots that are tried; 0 for no surface."""

DECODE_POWER = 0.5
"""A line cannot follow kernels whose launch is the limit: what is long counts for more, within reason."""


@dataclass(frozen=True)
class Fits:
    """What could be fitted, and what could not: (module, subject, reason)."""

    found: list[Fitted] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)


# -- token tables ----------------------------------------------------------------------------------------


def fit_tables(module: str, subject: str, samples: pd.DataFrame, shapes: dict[str, ModelSpec]) -> Fitted:
    """Curves by token count for each shape and degree; their errors are those of :func:`curve_errors`."""
    rows = means(samples)
    tables, errors = [], []
    for _, part in rows.groupby(["model", "tp"]):
        curve = curve_of(part, "tokens", falls=True)
        name, tp = str(part["model"].iloc[0]), int(part["tp"].iloc[0])
        tables.append(TokenTables.dump_table(shapes[name], tp, curve))
        own = samples[(samples["model"] == name) & (samples["tp"] == tp)]
        errors.append(curve_errors(part, own, "tokens"))
    return Fitted(module, subject, {"tables": tables},
                  {"tokens": ends_of(rows["tokens"]), "tp": ends_of(rows["tp"])}, np.concatenate(errors),
                  len(rows), len(samples))


def curve_of(rows: pd.DataFrame, size: str, falls: bool = False) -> Curve:
    """A curve through the points; where points fall and it may not, through their geometric mean."""
    rows = rows.sort_values(size)
    seconds = rows["seconds"].tolist()
    return Curve(tuple(rows[size].astype(float)), tuple(seconds if falls else rising(seconds)), falls)


def rising(seconds: Sequence[float]) -> list[float]:
    """The sequence that never falls and is nearest in logarithms (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in np.log(seconds).tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [float(np.exp(value)) for value, number in pools for _ in range(number)]


def curve_errors(rows: pd.DataFrame, samples: pd.DataFrame, size: str) -> Floats:
    """Error at every inner point of a curve.

    Where there is something between a point and its neighbours, the curve through the others is what a
    prediction would be. Where every size is measured nothing is interpolated: there, half of the samples
    predict the other half.
    """
    rows = rows.sort_values(size)
    sizes = rows[size].tolist()
    errors = []
    for n in range(1, len(rows) - 1):
        if sizes[n + 1] - sizes[n - 1] <= 2:
            seconds = samples[samples[size] == sizes[n]]["seconds"].to_numpy()
            if len(seconds) > 1:
                errors.append(float(np.median(seconds[::2]) / np.median(seconds[1::2])) - 1.0)
            continue
        curve = curve_of(rows.drop(rows.index[n]), size, falls=True)
        errors.append(curve.at(float(sizes[n])) / float(rows["seconds"].iloc[n]) - 1.0)
    return np.array(errors)


# -- attention -------------------------------------------------------------------------------------------


def fit_decode(module: str, subject: str, samples: pd.DataFrame, shapes: dict[str, ModelSpec]) -> Fitted:
    """a*h + b*g + c for each head size and number of query heads per KV head.

    Batches of one request have a line of their own: nothing has to be brought together there. Of the others,
    a surface of what the line leaves over is taken where it predicts better, and how fine it is likewise.
    """
    rows = means(samples)
    classes, errors = [], []
    for (head_dim, group), part in _by_class(rows, shapes):
        model = shapes[str(part["model"].iloc[0])]
        lone = part["tokens"] == 1
        together = part[~lone] if (~lone).sum() >= POINTS_MIN else part
        tries = {octaves: held_out_errors(together, ["tokens"], partial(
            _decode_model, model=model, octaves=octaves)) for octaves in DECODE_OCTAVES}
        best = min(tries, key=lambda octaves: _mean_error(tries[octaves]))
        cost = _on_average(_decode_cost(together, model, best), samples, model)
        errors.append(tries[best])
        if len(together) < len(part) and lone.sum() >= LONE_MIN:
            cost = replace(cost, lone=_lone_line(part[lone], model, cost))
            errors.append(held_out_errors(part[lone], ["row_tokens", "rows"], partial(
                _lone_model, model=model, together=cost), least=LONE_MIN - 1))
        classes.append(DecodeClass(head_dim, group, cost).dump())
    per_row = rows["row_tokens"] / rows["rows"]
    models = [shapes[str(name)] for name in rows["model"].unique()]
    ranges = {"rows": ends_of(rows["rows"]), "tokens_per_row": ends_of(per_row),
              "heads_per_group": ends_of([model.heads_per_group for model in models]),
              "head_dim": ends_of([model.head_dim for model in models])}
    return Fitted(module, subject, {"classes": classes}, ranges, np.concatenate(errors),
                  len(rows), len(samples))


def _on_average(cost: AttentionCost, samples: pd.DataFrame, model: ModelSpec) -> AttentionCost:
    """The same such that it is right on average over the batches: each has contexts of its own, drawn once.

    A batch counts for ``EXCESS_MAX`` times what it is to take at most.
    """
    batches = samples[(samples["model"] == model.name) & (samples["tokens"] > 1)]
    if not len(batches):
        return cost
    excess = batches["seconds"].to_numpy() / _seconds_of(cost, batches, model)
    return cost.scaled(float(np.minimum(excess, EXCESS_MAX).mean()))


def _decode_line(rows: pd.DataFrame, model: ModelSpec) -> AttentionCost:
    a, b, c = least_relative(_decode_columns(rows, model), rows["seconds"].to_numpy(), DECODE_POWER)
    return AttentionCost(a, max(b, LEAST_S_PER_BYTE), c)


def _decode_cost(rows: pd.DataFrame, model: ModelSpec, octaves: float) -> AttentionCost:
    """The line, and a surface of what it leaves over, unless ``octaves`` are 0."""
    line = _decode_line(rows, model)
    if not octaves:
        return line
    heads, moved, _ = _decode_columns(rows, model)
    left = np.log(rows["seconds"].to_numpy() / _of_line(line, heads, moved))
    return replace(line, correction=fit_surface((np.log2(heads), np.log2(moved / heads)), left, octaves))


def _of_line(line: AttentionCost, heads: Floats, moved: Floats) -> Floats:
    return line.a_s_per_head * heads + line.b_s_per_byte * moved + line.c_s


def _decode_model(known: pd.DataFrame, model: ModelSpec, octaves: float) -> Predict:
    cost = _decode_cost(known, model, octaves)
    return lambda rows: _seconds_of(cost, rows, model)


def _seconds_of(cost: AttentionCost, rows: pd.DataFrame, model: ModelSpec) -> Floats:
    heads, moved, _ = _decode_columns(rows, model)
    line_s = _of_line(cost, heads, moved)
    if cost.correction is None:
        return line_s
    corrected_s: Floats = line_s * np.exp(cost.correction.at(np.log2(heads), np.log2(moved / heads)))
    return corrected_s


def _lone_line(rows: pd.DataFrame, model: ModelSpec, together: AttentionCost) -> AttentionCost:
    """Of one request: its heads are nearly always the same, so a head costs what it does in a batch."""
    heads, moved, ones = _decode_columns(rows, model)
    left = np.maximum(rows["seconds"].to_numpy() - together.a_s_per_head * heads, 1e-9)
    b, c = least_relative([moved, ones], left)
    return AttentionCost(together.a_s_per_head, max(b, LEAST_S_PER_BYTE), c)


def _lone_model(known: pd.DataFrame, model: ModelSpec, together: AttentionCost) -> Predict:
    line = _lone_line(known, model, together)
    weights = np.array([line.a_s_per_head, line.b_s_per_byte, line.c_s])
    return lambda rows: np.column_stack(_decode_columns(rows, model)) @ weights


def _by_class(rows: pd.DataFrame,
              shapes: dict[str, ModelSpec]) -> list[tuple[tuple[int, int], pd.DataFrame]]:
    kinds = rows["model"].map(lambda name: (shapes[name].head_dim, shapes[name].heads_per_group))
    return [(kind, rows[kinds == kind]) for kind in sorted(set(kinds))]


def _decode_columns(rows: pd.DataFrame, model: ModelSpec) -> list[Floats]:
    heads = rows["rows"].to_numpy(dtype=np.float64) * model.heads_per_group
    moved = rows["row_tokens"].to_numpy(dtype=np.float64) * model.kv_bytes_per_token_per_layer_per_group
    return [heads, moved, np.ones(len(rows))]


def _linear(known: pd.DataFrame, columns: Callable[[pd.DataFrame], list[Floats]],
            power: float = 0.0) -> Predict:
    found = least_relative(columns(known), known["seconds"].to_numpy(), power)
    return lambda rows: np.column_stack(columns(rows)) @ found


def fit_prefill(subject: str, samples: pd.DataFrame, shapes: dict[str, ModelSpec]) -> Fitted:
    """Fixed time, query-key pairs and bytes moved, for each head size.

    The size of a block, and whether a surface of what is left is of use, are tried out.
    """
    rows = means(samples)
    classes, errors = [], []
    for head_dim in sorted({shapes[name].head_dim for name in rows["model"]}):
        part = rows[rows["model"].map(lambda name, d=head_dim: shapes[name].head_dim == d)]
        kv_bytes = shapes[str(part["model"].iloc[0])].kv_bytes
        tries = {(block, corrected): _prefill_errors(part, head_dim, kv_bytes, block, corrected)
                 for block in BLOCKS for corrected in (False, True)}
        best = min(tries, key=lambda form: _mean_error(tries[form]))
        classes.append(_prefill_class(part, head_dim, kv_bytes, *best).dump())
        errors.append(tries[best])
    keys = rows["new_tokens"] + rows["context_tokens"]
    return Fitted("prefill_attention", subject, {"classes": classes},
                  {"keys": ends_of(keys), "new_tokens": ends_of(rows["new_tokens"])}, np.concatenate(errors),
                  len(rows), len(samples))


def _mean_error(errors: Floats) -> float:
    return float(np.abs(errors).mean()) if len(errors) else 0.0


def _prefill_errors(rows: pd.DataFrame, head_dim: int, kv_bytes: int, block: int,
                    corrected: bool) -> Floats:
    return held_out_errors(rows, ["new_tokens", "context_tokens"],
                           lambda known: _prefill_model(known, head_dim, kv_bytes, block, corrected))


PREFILL = ("heads", "kv_heads", "new_tokens", "context_tokens")


def _prefill_class(rows: pd.DataFrame, head_dim: int, kv_bytes: int, block: int,
                   corrected: bool) -> PrefillClass:
    heads, kv_heads, new, context = (rows[key].to_numpy(dtype=np.float64) for key in PREFILL)
    padded = np.ceil(new / block) * block
    flops = 4.0 * head_dim * heads * padded * (context + (new + 1.0) / 2.0)
    moved = head_dim * kv_bytes * (2.0 * heads * new + kv_heads * (6.0 * new + 2.0 * context))
    compute, memory, fixed = least_relative([flops, moved, np.ones(len(rows))], rows["seconds"].to_numpy())
    found = PrefillClass(head_dim, block, 1.0 / max(compute, 1.0 / NO_LIMIT_PER_S), NO_LIMIT_PER_S,
                         1.0 / max(memory, 1.0 / NO_LIMIT_PER_S), float(fixed), 8.0)
    if not corrected:
        return found
    left = np.log(rows["seconds"].to_numpy() / found.base_s(heads, kv_heads, new, context, kv_bytes))
    blocks = np.log2(heads * np.ceil(new / block))
    coordinates = blocks, np.log2(context + new), np.log2(heads / kv_heads)
    return found.with_correction(fit_surface(coordinates, left))


def _prefill_model(known: pd.DataFrame, head_dim: int, kv_bytes: int, block: int,
                   corrected: bool) -> Predict:
    found = _prefill_class(known, head_dim, kv_bytes, block, corrected)

    def predict(rows: pd.DataFrame) -> Floats:
        heads, kv_heads, new, context = (rows[key].to_numpy(dtype=np.float64) for key in PREFILL)
        return found.seconds(heads, kv_heads, new, context, kv_bytes)
    return predict


# -- messages and host -----------------------------------------------------------------------------------


def fit_packing(module: str, subject: str, samples: pd.DataFrame) -> Fitted:
    """beta + gamma*d of what a device does with a message or a copy."""
    rows = means(samples)
    beta, gamma = least_relative(_message_columns(rows), rows["seconds"].to_numpy())
    errors = held_out_errors(rows, ["size_bytes"], lambda known: _linear(known, _message_columns))
    return Fitted(module, subject, {"gamma_s_per_byte": gamma, "beta_s": beta},
                  {"bytes": ends_of(rows["size_bytes"])}, errors, len(rows), len(samples))


def fit_messages(module: str, samples: pd.DataFrame) -> Fitted:
    """beta + gamma*d of a message, for each link, and on it for each pair of types that is told apart."""
    rows = means(samples)
    links: dict[str, dict[str, Any]] = {}
    errors = []
    for link, part in rows.groupby("subject"):
        pairs = {str(pair): own for pair, own in part.groupby("between") if pair and len(own) >= POINTS_MIN}
        links[str(link)] = _message_line(part)
        if pairs:
            links[str(link)]["pairs"] = {pair: _message_line(own) for pair, own in pairs.items()}
        errors += [held_out_errors(own, ["size_bytes", "messages"],
                                   lambda known: _linear(known, _message_columns))
                   for own in pairs.values() or [part]]
    return Fitted(module, "links", links, {"bytes": ends_of(rows["size_bytes"])}, np.concatenate(errors),
                  len(rows), len(samples))


def _message_line(rows: pd.DataFrame) -> dict[str, Any]:
    beta, gamma = least_relative(_message_columns(rows), rows["seconds"].to_numpy())
    return {"gamma_s_per_byte": max(float(gamma), 1e-15), "beta_s": float(beta)}


def _message_columns(rows: pd.DataFrame) -> list[Floats]:
    return [rows[key].to_numpy(dtype=np.float64) for key in ("messages", "size_bytes")]


def fit_reduces(samples: pd.DataFrame) -> Fitted:
    """beta + gamma*d as a curve by size, for each link and number of ranks."""
    rows = means(samples)
    links: dict[str, Any] = {}
    errors = []
    for _, part in rows.groupby(["subject", "ranks"]):
        link, ranks = str(part["subject"].iloc[0]), int(part["ranks"].iloc[0])
        line = _linear(part, _message_columns)
        smooth = part.assign(seconds=line(part))
        links.setdefault(link, {})[str(ranks)] = curve_of(smooth, "size_bytes").dump()
        errors.append(held_out_errors(part, ["size_bytes"], lambda known: _linear(known, _message_columns)))
    return Fitted("all_reduce", "links", links, {"bytes": ends_of(rows["size_bytes"])},
                  np.concatenate(errors), len(rows), len(samples))


def fit_host(samples: pd.DataFrame, launches: pd.DataFrame) -> Fitted:
    """Time of an iteration besides what workers account for.

    A base and something for each sequence; where there are prompts, something more for the iteration and for
    each of them. ``launches`` are of starting kernels without graphs, where the host has to do that; the
    sizes of graphs are among them.
    """
    rows = means(samples)
    plain = rows["prompts"] == 0
    base, each = least_relative(_per_token(rows[plain]), rows[plain]["seconds"].to_numpy())
    errors = held_out_errors(rows[plain], ["tokens"], lambda known: _linear(known, _per_token))
    found = HostOverhead(float(base), float(each))
    if (~plain).any():
        step, prompt = _of_prompts(rows[~plain], found)
        found = replace(found, prompt_step_s=step, per_prompt_s=prompt)
    sizes = launches["module"].isin(GRAPHS)
    if not sizes.all():
        starts = means(launches[~sizes])
        layer, prompt = least_relative(_per_token(starts), starts["seconds"].to_numpy())
        found = replace(found, eager_s_per_layer=float(layer), eager_s_per_prompt=float(prompt))
    found = replace(found, graphs=graphs_of(launches[sizes]))
    return Fitted("host_overhead", "host", found.dump(),
                  {"sequences": ends_of(rows["tokens"])}, errors, len(rows), len(samples))


def graphs_of(sizes: pd.DataFrame) -> GraphSteps:
    """The steps that an engine has recorded, from points that state a size each."""
    prompts, batches = (sizes[sizes["module"] == module] for module in GRAPHS)
    of_prompts, of_batches = (tuple(sorted({int(n) for n in part["tokens"]})) for part in (prompts, batches))
    most = int(prompts["rows"].max()) if len(prompts) else 0
    return GraphSteps(max(of_prompts, default=0), of_prompts, of_batches, most)


def _per_token(rows: pd.DataFrame) -> list[Floats]:
    return [np.ones(len(rows)), rows["tokens"].to_numpy(dtype=np.float64)]


def _of_prompts(rows: pd.DataFrame, plain: HostOverhead) -> tuple[float, float]:
    """What an iteration with prompts takes more than one of as many sequences, and each of its prompts."""
    usual = np.array([plain.seconds(int(n)) for n in rows["tokens"]])
    columns = [np.ones(len(rows)), rows["prompts"].to_numpy(dtype=np.float64)]
    step, prompt = least_relative(columns, rows["seconds"].to_numpy(), known=usual)
    return float(step), float(prompt)


# -- all of it -------------------------------------------------------------------------------------------


def fit_all(samples: pd.DataFrame, shapes: dict[str, ModelSpec], limit: Callable[[str], float]) -> Fits:
    """Fit every module that there are samples of.

    Args:
        samples: as :func:`hetis_exec.calibrate.samples.frame_of` makes them.
        shapes: models by name.
        limit: of a module, the largest median error on held-out points with which it is accepted.
    """
    fits = Fits()
    launching = samples["module"].isin(["host_launch", *GRAPHS])
    pace = samples["module"].str.startswith(PREFIX)
    for module, subject, part in _parts(samples[~launching & ~pace]):
        made = _fit(module, subject, part, shapes, samples[launching])
        reason = reason_against(made, limit(module))
        if reason:
            fits.refused.append((module, subject, reason))
        else:
            fits.found.append(made)
    return fits


def _parts(samples: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Modules of devices each for themselves; all links together."""
    joint = samples["module"].isin(LINK_MODULES)
    subjects = samples["subject"].where(~joint, "links")
    keys = sorted(set(zip(samples["module"], subjects, strict=True)))
    return [(module, subject, samples[(samples["module"] == module) & (subjects == subject)])
            for module, subject in keys]


def _fit(module: str, subject: str, samples: pd.DataFrame, shapes: dict[str, ModelSpec],
         launches: pd.DataFrame) -> Fitted:
    if module in ("dense_layer", "head"):
        return fit_tables(module, subject, samples, shapes)
    if module in ("decode_attention", "remote_attention"):
        return fit_decode(module, subject, samples, shapes)
    if module == "prefill_attention":
        return fit_prefill(subject, samples, shapes)
    if module in PACKING:
        return fit_packing(module, subject, samples)
    if module in ("transfer", "hop"):
        return fit_messages(module, samples)
    return fit_reduces(samples) if module == "all_reduce" else fit_host(samples, launches)


def reason_against(made: Fitted, limit: float) -> str:
    """Why a fit is not good enough to be written; empty if it is."""
    if made.points < POINTS_MIN:
        return f"{made.points} points, at least {POINTS_MIN} are needed: measure more sizes"
    if not made.median <= limit:
        return (f"median error {100 * made.median:.1f} % on held-out points, more than the limit of "
                f"{100 * limit:.0f} % (calibrate.limits.{made.module})")
    return ""
