"""Fits of calibrations: timings made from known coefficients give them back, and bad ones are refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="calibration needs the extra exec")

from hetis_exec.calibrate.fit import (
    Fits,
    Fitted,
    curve_errors,
    fit_all,
    held_out_errors,
    least_relative,
    rising,
)
from hetis_exec.calibrate.samples import Point, Sample, Store, frame_of, means, medians
from hetis_exec.calibrate.write import profile_of, subjects_of, write_profile
from hetis_exec.measure_config import LIMITS, CalibrateConfig
from hetis_sim.cost import load_cost_model
from hetis_sim.cost.calibration import Calibration
from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec

MODEL = replace(MODELS["smollm2-135m"], weight_bytes=4, kv_bytes=4)
SHAPES = {MODEL.name: MODEL}
CORE = GpuSpec("cpu-core", 1 << 31, 1e10, 1e11, 1e11, 1e11)
PIPE = LinkSpec("pipe", 1.25e9, 1e-4)
ABOUT = Calibration("a machine", "", "2", "3", "2026-01-01", "float32", 4, (MODEL.name,))

A, B, C = 1.5e-6, 2.5e-9, 2e-4
"""Decode attention: of a head, of a byte, of a call."""
BETA, GAMMA = 1.2e-4, 3e-9
"""A message, and a byte of it."""
HOST, EACH = 1e-3, 4e-5
FIXED_S, FLOPS, BYTES = 1e-4, 5e9, 2e9
"""Prefill attention."""


def decode_s(rows: int, tokens: int) -> float:
    """Decode attention of so many KV groups over so many cached tokens."""
    return A * rows * MODEL.heads_per_group + B * tokens * MODEL.kv_bytes_per_token_per_layer_per_group + C


def prefill_s(new: int, context: int) -> float:
    """Prefill attention of all heads."""
    d, heads, kv_heads = MODEL.head_dim, MODEL.query_heads, MODEL.kv_heads
    flops = 4.0 * d * heads * new * (context + (new + 1) / 2)
    return FIXED_S + flops / FLOPS + d * 4 * (2 * heads * new + kv_heads * (6 * new + 2 * context)) / BYTES


def dense_s(tokens: int) -> float:
    """A layer."""
    return 2e-3 + 1e-4 * tokens


def points() -> Iterable[tuple[Point, float]]:
    """Every module, with what it takes by the coefficients above."""
    name = MODEL.name
    for tokens in (1, 2, 4, 8, 16, 24, 32, 64, 96, 128):
        yield Point("dense_layer", "cpu-core", name, 1, tokens=tokens), dense_s(tokens)
        yield Point("head", "cpu-core", name, 1, tokens=tokens), 5 * dense_s(tokens)
        yield Point("host_overhead", "host", tokens=tokens), HOST + EACH * tokens
    for batch in (1, 2, 4, 8, 16, 32):
        for context in (16, 64, 256):
            rows = batch * MODEL.kv_heads
            yield (Point("decode_attention", "cpu-core", name, 1, tokens=batch, rows=rows,
                         row_tokens=rows * context), decode_s(rows, rows * context))
            size = rows * MODEL.remote_bytes_per_token(MODEL.heads_per_group)
            yield (Point("remote_attention", "cpu-core", name, 1, tokens=batch, rows=rows,
                         row_tokens=rows * context), 2 * decode_s(rows, rows * context))
            yield Point("transfer", "pipe", size_bytes=size, messages=2), 2 * BETA + GAMMA * size
            yield Point("head_packing", "cpu-core", size_bytes=size, messages=1), BETA / 2 + GAMMA * size / 3
            yield Point("cache_packing", "cpu-core", size_bytes=size, messages=1), BETA / 4 + GAMMA * size / 5
    for new, context in ((8, 0), (32, 0), (64, 0), (128, 0), (256, 0), (32, 96), (128, 512), (256, 1024)):
        yield (Point("prefill_attention", "cpu-core", name, 1, new_tokens=new, context_tokens=context,
                     heads=MODEL.query_heads, kv_heads=MODEL.kv_heads), prefill_s(new, context))
    for size in (2000, 20_000, 200_000, 600_000):
        yield Point("hop", "pipe", size_bytes=size, messages=1), 5 * (BETA + GAMMA * size)
        yield Point("host_copy", "cpu-core", size_bytes=size, messages=2), 4 * BETA + 7 * GAMMA * size
        yield Point("all_reduce", "pipe", size_bytes=size, messages=1, ranks=2), 3 * (BETA + GAMMA * size)


def samples(noise: float = 0.0, repeats: int = 5) -> list[Sample]:
    """Samples of all points, each off by a factor of its own."""
    rng = np.random.default_rng(7)
    return [Sample(point, seconds * float(np.exp(noise * rng.standard_normal())))
            for _ in range(repeats) for point, seconds in points()]


def fitted(noise: float = 0.0) -> Fits:
    """Fits with the usual limits."""
    return fit_all(frame_of(samples(noise)), SHAPES, CalibrateConfig().limit)


def cost_of(fits: Fits, folder: Path) -> CostModel:
    """The cost model of what was fitted, by way of its files."""
    frame = frame_of(samples())
    for device, modules in subjects_of(fits.found).items():
        write_profile(folder, device, profile_of(device, modules, ABOUT), frame)
    return load_cost_model(profiles=[folder], gpus=[CORE], model=MODEL)


def test_known_coefficients_come_back(tmp_path: Path) -> None:
    """From timings without noise the simulator's cost model predicts what they were made from."""
    fits = fitted()
    assert fits.refused == []
    assert {made.module for made in fits.found} == set(LIMITS)
    cost = cost_of(fits, tmp_path)
    attention = cost.decode_attention(CORE, MODEL)
    found = attention.a_s_per_head, attention.b_s_per_byte, attention.c_s
    assert found == pytest.approx((A, B, C), rel=1e-3)
    remote = cost.remote_attention(CORE, MODEL)
    assert (remote.a_s_per_head, remote.c_s) == pytest.approx((2 * A, 2 * C), rel=1e-3)
    assert cost.transfer(PIPE).beta_s == pytest.approx(BETA, rel=1e-3)
    assert cost.transfer(PIPE).gamma_s_per_byte == pytest.approx(GAMMA, rel=1e-3)
    assert cost.hop(PIPE).beta_s == pytest.approx(5 * BETA, rel=1e-3)
    assert cost.head_packing(CORE).beta_s == pytest.approx(BETA / 2, rel=1e-3)
    sending = cost.cache_packing(CORE)
    assert (sending.beta_s, sending.gamma_s_per_byte) == pytest.approx((BETA / 4, GAMMA / 5), rel=1e-3)
    copy = cost.host_copy(CORE)
    assert (copy.beta_s, copy.gamma_s_per_byte) == pytest.approx((2 * BETA, 7 * GAMMA), rel=1e-3)
    assert cost.host_overhead_s(7) == pytest.approx(HOST + 7 * EACH, rel=1e-3)
    assert cost.dense_layer_s(CORE, MODEL, 24, 1) == pytest.approx(dense_s(24), rel=1e-3)
    assert cost.head_s(CORE, MODEL, 24, 1) == pytest.approx(5 * dense_s(24), rel=1e-3)
    for new, context in ((100, 0), (200, 300)):
        assert cost.prefill_attention_layer_s(CORE, MODEL, MODEL.query_heads, new, context) == pytest.approx(
            prefill_s(new, context), rel=0.01)
    assert cost.all_reduce_s(CORE, PIPE, 200_000, 2) == pytest.approx(3 * (BETA + GAMMA * 200_000), rel=0.01)


def test_messages_are_told_apart_by_who_waits_for_them(tmp_path: Path) -> None:
    """Between types of devices that were measured; of all others they are those of the link."""
    def message(size: int, between: str, share: float) -> Sample:
        point = Point("transfer", "pipe", size_bytes=size, messages=2, between=between)
        return Sample(point, share * (2 * BETA + GAMMA * size))

    slow = GpuSpec("weak-core", 1 << 31, 1e10, 1e11, 1e11, 1e11)
    pairs = [message(size, pair, share) for size in (3000, 12_000, 48_000, 96_000, 192_000)
             for pair, share in (("cpu-core>weak-core", 0.5), ("weak-core>cpu-core", 4.0))]
    others = [sample for sample in samples() if sample.point.module != "transfer"]
    fits = fit_all(frame_of([*others, *pairs]), SHAPES, CalibrateConfig().limit)
    assert fits.refused == []
    cost = cost_of(fits, tmp_path)
    for rank, worker, share in ((CORE, slow, 0.5), (slow, CORE, 4.0)):
        found = cost.head_transfer(PIPE, rank, worker)
        assert found.beta_s == pytest.approx(share * BETA, rel=0.01)
        assert found.gamma_s_per_byte == pytest.approx(share * GAMMA, rel=0.01)
    assert cost.head_transfer(PIPE, slow, slow) == cost.transfer(PIPE)


def test_attention_of_batches_that_occur_once_is_right_on_average(tmp_path: Path) -> None:
    """Every fourth of them takes twice as long: a fit to logarithms, or to the median, does not see that."""
    rng = np.random.default_rng(1)
    once = []
    for batch in (2, 3, 4, 6, 8, 12, 16, 24, 32):
        for number, context in enumerate(rng.integers(16, 400, 40)):
            rows, tokens = batch * MODEL.kv_heads, batch * int(context) * MODEL.kv_heads
            once.append(Sample(Point("decode_attention", "cpu-core", MODEL.name, 1, tokens=batch, rows=rows,
                                     row_tokens=tokens),
                               (2.0 if number % 4 == 0 else 1.0) * decode_s(rows, tokens)))
    others = [sample for sample in samples() if sample.point.module != "decode_attention"]
    limit = {"decode_attention": 1.0}
    fits = fit_all(frame_of([*others, *once]), SHAPES, CalibrateConfig(limits=limit).limit)
    attention = cost_of(fits, tmp_path).decode_attention(CORE, MODEL)
    for rows, tokens in ((12, 2400), (36, 7200)):
        moved = tokens * MODEL.kv_bytes_per_token_per_layer_per_group
        found = attention.seconds(rows * MODEL.heads_per_group, moved)
        assert found == pytest.approx(1.25 * decode_s(rows, tokens), rel=0.06)


def test_surfaces_are_as_fine_as_what_they_follow(tmp_path: Path) -> None:
    """Batches of 24 rows and more take three times as long: knots two octaves apart blur that."""
    def bent(sample: Sample) -> Sample:
        point = sample.point
        steep = point.module == "decode_attention" and point.rows >= 24
        return replace(sample, seconds=3.0 * sample.seconds) if steep else sample

    many = [Sample(Point("decode_attention", "cpu-core", MODEL.name, 1, tokens=rows, rows=rows,
                         row_tokens=rows * context), decode_s(rows, rows * context))
            for rows in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
            for context in (16, 32, 64, 128, 256)]
    others = [sample for sample in samples() if sample.point.module != "decode_attention"]
    cost = cost_of(fit_all(frame_of([*others, *map(bent, many)]), SHAPES, CalibrateConfig().limit), tmp_path)
    attention = cost.decode_attention(CORE, MODEL)
    assert attention.correction is not None
    first, second = attention.correction.knots[0][:2]
    assert second - first == pytest.approx(1.0, abs=0.2)
    for rows, share in ((12, 1.0), (32, 3.0)):
        moved = rows * 64 * MODEL.kv_bytes_per_token_per_layer_per_group
        found = attention.seconds(rows * MODEL.heads_per_group, moved)
        assert found == pytest.approx(share * decode_s(rows, rows * 64), rel=0.15)


def test_prompts_are_part_of_the_hosts_time(tmp_path: Path) -> None:
    """Where iterations with prompts were measured, time for such an iteration and for each of its prompts."""
    plain = cost_of(fitted(), tmp_path / "plain")
    assert plain.host_overhead_s(4, 4) == plain.host_overhead_s(4)
    prompts = [Sample(Point("host_overhead", "host", tokens=n, prompts=n), HOST + EACH * n + 9e-4 + 2e-4 * n)
               for n in (1, 2, 4, 16)]
    fits = fit_all(frame_of([*samples(), *prompts]), SHAPES, CalibrateConfig().limit)
    cost = cost_of(fits, tmp_path / "prompts")
    assert cost.host_overhead_s(7) == pytest.approx(plain.host_overhead_s(7), rel=1e-3)
    assert cost.host_overhead_s(5, 3) == pytest.approx(HOST + 5 * EACH + 9e-4 + 6e-4, rel=1e-3)


def test_starting_kernels_is_part_of_the_hosts_time(tmp_path: Path) -> None:
    """Where it was measured, time for a layer and each prompt in it; plain decoding knows nothing of it."""
    launches = [Sample(Point("host_launch", "host", tokens=n), 6e-4 + 5e-5 * n) for n in (1, 2, 4, 8)]
    fits = fit_all(frame_of([*samples(), *launches]), SHAPES, CalibrateConfig().limit)
    assert {made.module for made in fits.found} == set(LIMITS)
    cost = cost_of(fits, tmp_path)
    assert cost.host_beside_s(1, 30, True, prompts=2, eager=True) == pytest.approx(30 * 7e-4, rel=1e-3)
    assert cost.host_beside_s(1, 30, True, eager=True) == pytest.approx(30 * 6e-4, rel=1e-3)
    assert cost.host_beside_s(1, 30, True) == 0.0
    assert cost.graph_steps() == GraphSteps()
    assert cost_of(fitted(), tmp_path / "plain").host_beside_s(1, 30, True, prompts=2, eager=True) == 0.0


def test_sizes_of_graphs_are_part_of_the_profile(tmp_path: Path) -> None:
    """They are facts, not samples: they come through the file of samples and the profile as they are."""
    sizes = [Sample(Point("graph_prompt", "host", tokens=n, rows=16), 0.0) for n in (512, 16, 64)]
    sizes += [Sample(Point("graph_batch", "host", tokens=n), 0.0) for n in (1, 2, 4)]
    fits = fit_all(frame_of([*samples(), *sizes]), SHAPES, CalibrateConfig().limit)
    assert {made.module for made in fits.found} == set(LIMITS)
    graphs = cost_of(fits, tmp_path).graph_steps()
    assert graphs == GraphSteps(512, (16, 64, 512), (1, 2, 4), 16)
    assert [graphs.prompt_rows(n) for n in (1, 16, 17, 512, 600)] == [16, 16, 64, 512, 600]
    assert [graphs.takes(512, 16), graphs.takes(513, 1), graphs.takes(9, 17)] == [True, False, False]


def test_fits_are_of_what_things_take_on_average(tmp_path: Path) -> None:
    """Where every fourth sample takes twice as long, a median does not see it; sums of steps do."""
    once, slow = samples(), [replace(sample, seconds=2.0 * sample.seconds) for sample in samples()]
    rows = means(frame_of([*once, *once, *once, *slow]).query("module == 'dense_layer'"))
    assert rows.query("tokens == 16")["seconds"].iloc[0] == pytest.approx(1.25 * dense_s(16))
    cost = cost_of(fit_all(frame_of([*once, *once, *once, *slow]), SHAPES, CalibrateConfig().limit), tmp_path)
    assert cost.dense_layer_s(CORE, MODEL, 24, 1) == pytest.approx(1.25 * dense_s(24), rel=1e-3)
    assert cost.host_overhead_s(7) == pytest.approx(1.25 * (HOST + 7 * EACH), rel=1e-3)
    stalled = [replace(sample, seconds=100.0 * sample.seconds) for sample in samples()]
    rows = means(frame_of([*once, *once, *once, *stalled]).query("module == 'dense_layer'"))
    assert rows.query("tokens == 16")["seconds"].iloc[0] == pytest.approx(1.5 * dense_s(16))


def test_noise_is_averaged_out_and_reported(tmp_path: Path) -> None:
    """With samples off by 10 % the coefficients are near, and the held-out error is of that size."""
    fits = fitted(0.1)
    assert fits.refused == []
    attention = cost_of(fits, tmp_path).decode_attention(CORE, MODEL)
    assert attention.b_s_per_byte == pytest.approx(B, rel=0.15)
    decode = next(made for made in fits.found if made.module == "decode_attention")
    assert 0.005 < decode.median < 0.1
    assert decode.median <= decode.p95
    raw = json.loads((tmp_path / "cpu-core.json").read_text())
    held_out = raw["modules"]["decode_attention"]["held_out"]
    assert held_out["median"] == pytest.approx(decode.median, rel=0.01)
    assert held_out["n"] == 18


def test_a_bad_fit_is_refused_with_its_reason() -> None:
    """A module whose timings follow no line is left out; the text has the error, the limit and the key."""
    spoilt = [replace(sample, seconds=10.0 ** (-3 + sample.point.tokens * 7 % 5))
              if sample.point.module == "host_overhead" else sample for sample in samples()]
    fits = fit_all(frame_of(spoilt), SHAPES, CalibrateConfig().limit)
    ((module, subject, reason),) = fits.refused
    assert (module, subject) == ("host_overhead", "host")
    assert "limit of 30 %" in reason
    assert "calibrate.limits.host_overhead" in reason
    assert "host_overhead" not in {made.module for made in fits.found}
    generous = CalibrateConfig(limits={"host_overhead": 50.0})
    assert fit_all(frame_of(spoilt), SHAPES, generous.limit).refused == []


def test_too_few_points_are_refused() -> None:
    """A line through two points is no fit."""
    few = [sample for sample in samples() if sample.point.module != "host_overhead"
           or sample.point.tokens <= 2]
    refused = fit_all(frame_of(few), SHAPES, CalibrateConfig().limit).refused
    (reason,) = [reason for module, _, reason in refused if module == "host_overhead"]
    assert "2 points" in reason


def test_whole_groups_are_held_out() -> None:
    """A fit that remembers its rows knows nothing of the rows that it is judged by."""
    rows = medians(frame_of(samples())).query("module == 'decode_attention'")
    seen: list[set[int]] = []

    def fit(known):  # type: ignore[no-untyped-def]
        seen.append(set(known["tokens"]))
        return lambda unseen: np.where(unseen["tokens"].isin(seen[-1]), unseen["seconds"], 0.0)

    errors = held_out_errors(rows, ["tokens"], fit)
    assert len(errors) == len(rows)
    assert (errors == -1.0).all()


def test_least_relative_error_is_robust() -> None:
    """One wild sample among twelve does not move the coefficients, and none is negative."""
    x = np.arange(1.0, 13.0)
    y = 2.0 + 0.5 * x
    y[5] *= 10
    assert least_relative([np.ones(12), x], y) == pytest.approx([2.0, 0.5])
    assert least_relative([np.ones(12), x], 10.0 - 0.5 * x).min() >= 0.0


def test_curves_that_fall_are_levelled_not_raised() -> None:
    """A point that is too long does not lift all that come after it."""
    assert rising([1.0, 4.0, 1.0, 3.0]) == pytest.approx([1.0, 2.0, 2.0, 3.0])
    assert rising([2.0, 3.0, 5.0]) == pytest.approx([2.0, 3.0, 5.0])
    assert rising([8.0, 1.0]) == pytest.approx([8**0.5, 8**0.5])


def test_limits_name_modules() -> None:
    """A misspelt module is refused."""
    with pytest.raises(SpecError, match="dense_lair"):
        CalibrateConfig(limits={"dense_lair": 0.1})


def test_samples_survive_and_half_a_line_does_not(tmp_path: Path) -> None:
    """What was measured is there again; a task that was being written when the run ended is measured anew."""
    path = tmp_path / "deep" / "samples.jsonl"
    store = Store(path)
    some = samples()[:6]
    store.add("one", some, 2.5)
    store.add("two", some[:2], 1.0)
    text = path.read_text()
    path.write_text(text[:-20])
    again = Store(path)
    assert again.known("one")
    assert not again.known("two")
    assert again.samples(["one"]) == some
    assert again.took_s(["one"]) == 2.5


def test_a_profile_carries_its_samples_and_origin(tmp_path: Path) -> None:
    """Error, range and the file of the samples stand in it."""
    cost_of(fitted(), tmp_path)
    raw = json.loads((tmp_path / "cpu-core.json").read_text())
    assert raw["calibration"]["hardware"] == "a machine"
    decode = raw["modules"]["decode_attention"]
    assert decode["range"]["rows"] == [3, 96]
    assert decode["range"]["tokens_per_row"] == [16, 256]
    assert (tmp_path / "cpu-core.parquet").is_file()
    made = Fitted("head_packing", "x", {}, {}, np.empty(0), 0, 0)
    assert np.isnan(made.median)
    assert made.body("y")["held_out"] is None


def test_a_batch_of_one_request_has_a_line_of_its_own(tmp_path: Path) -> None:
    """It starts sooner where contexts of several requests must be brought together; others are unchanged."""
    def seconds(point: Point, seconds: float) -> float:
        lone = point.module == "decode_attention" and point.tokens == 1
        return seconds - 0.75 * C if lone else seconds

    made = [Sample(sample.point, seconds(sample.point, sample.seconds)) for sample in samples()]
    fits = fit_all(frame_of(made), SHAPES, CalibrateConfig().limit)
    cost = cost_of(fits, tmp_path)
    attention = cost.decode_attention(CORE, MODEL)
    assert attention.c_s == pytest.approx(C, rel=1e-3)
    assert attention.lone is not None
    assert attention.lone.c_s == pytest.approx(0.25 * C, rel=0.01)
    assert attention.lone.b_s_per_byte == pytest.approx(B, rel=1e-3)
    decode = next(fit for fit in fits.found if fit.module == "decode_attention")
    assert decode.median < 1e-3
    remote = cost.remote_attention(CORE, MODEL).lone
    assert remote is not None
    assert remote.c_s == pytest.approx(2 * C, rel=0.01)


def test_decode_attention_that_is_no_line_gets_what_is_left_over(tmp_path: Path) -> None:
    """A surface of what the line leaves, where points that were held out are predicted better by it."""
    def bend(rows: int, context: int) -> float:
        return float(np.exp(0.5 * np.tanh(np.log2(context) - 6.0) * np.tanh(np.log2(rows) - 5.0)))

    together = [(batch, context) for batch in (2, 3, 4, 6, 8, 12, 16, 24, 32)
                for context in (16, 32, 64, 128, 256, 512)]
    plain = [sample for sample in samples() if sample.point.module != "decode_attention"]
    made = [Sample(Point("decode_attention", "cpu-core", MODEL.name, 1, tokens=batch, rows=rows,
                         row_tokens=rows * context), decode_s(rows, rows * context) * bend(rows, context))
            for batch, context in together for rows in [batch * MODEL.kv_heads]]
    fits = fit_all(frame_of([*plain, *made]), SHAPES, CalibrateConfig().limit)
    attention = cost_of(fits, tmp_path).decode_attention(CORE, MODEL)
    line = replace(attention, correction=None)

    def error(cost: AttentionCost) -> float:
        size = MODEL.kv_bytes_per_token_per_layer_per_group
        return max(abs(cost.seconds(sample.point.rows * MODEL.heads_per_group, sample.point.row_tokens * size)
                       / sample.seconds - 1.0) for sample in made)

    assert attention.correction is not None
    assert error(attention) < 0.5 * error(line)
    straight = cost_of(fitted(), tmp_path / "line").decode_attention(CORE, MODEL)
    assert straight.correction is None


def test_products_may_take_less_time_for_more_tokens(tmp_path: Path) -> None:
    """As measured, a processor's library is faster with 16 tokens than with 8: the profile has it so."""
    def seconds(sample: Sample) -> float:
        dips = sample.point.module == "dense_layer" and sample.point.tokens == 16
        return 0.5 * sample.seconds if dips else sample.seconds

    made = [Sample(sample.point, seconds(sample)) for sample in samples()]
    cost = cost_of(fit_all(frame_of(made), SHAPES, lambda module: 9.0), tmp_path)
    dense = [cost.dense_layer_s(CORE, MODEL, tokens, 1) for tokens in (8, 16, 32)]
    assert dense[1] == pytest.approx(0.5 * dense_s(16), rel=1e-3)
    assert dense[1] < dense[0] < dense[2]


def test_curves_are_judged_by_what_predictions_need() -> None:
    """Between points by a curve through the others; where every size was measured, by repetition."""
    def frame(*points: tuple[int, float]) -> pd.DataFrame:
        return frame_of([Sample(Point("head", "cpu-core", MODEL.name, 1, tokens=tokens), seconds)
                         for tokens, seconds in points for _ in range(4)])

    def errors(*points: tuple[int, float]) -> list[float]:
        made = frame(*points)
        return curve_errors(medians(made), made, "tokens").tolist()

    assert errors((1, 1.0), (2, 3.0), (3, 1.0), (4, 2.0)) == [0.0, 0.0]
    (gap,) = errors((1, 1.0), (4, 4.0), (16, 1.0))
    assert gap == pytest.approx(1.0 / 4.0 - 1.0)
    uneven = frame((1, 1.0), (2, 1.0), (3, 1.0))
    uneven.loc[uneven["tokens"] == 2, "seconds"] = [1.1, 1.0, 1.1, 1.0]
    assert curve_errors(medians(uneven), uneven, "tokens") == pytest.approx([0.1])
