"""The fit recovers known coefficients, is deterministic, keeps held-out rows out, and is as good as told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit import attention, curves, gemm, modules
from analysis.fit.cards import card
from analysis.fit.data import Store, gemm_aiconfigurator
from analysis.fit.errors import held_out, relative_error
from analysis.fit.recipes import RECIPES
from hetis_sim.cost.attention import PrefillClass
from hetis_sim.cost.load import read_shipped
from hetis_sim.cost.model import AttentionCost
from hetis_sim.cost.profile import Profile

# Documented in docs/cost.md: (median, p95) over held-out rows where the GPU is the limit, with a
# margin of a tenth for the subsamples used here.
DOCUMENTED = {
    ("a100-80gb", "gemm"): (0.027, 0.125), ("a100-80gb", "prefill_attention"): (0.014, 0.085),
    ("h100-sxm", "gemm"): (0.032, 0.130), ("h100-sxm", "prefill_attention"): (0.027, 0.120),
    ("h100-sxm", "decode_attention"): (0.025, 0.155), ("l40s", "gemm"): (0.049, 0.185),
    ("l40s", "decode_attention"): (0.049, 0.120), ("rtx-pro-6000", "gemm"): (0.026, 0.100),
    ("rtx-pro-6000", "decode_attention"): (0.010, 0.055),
    ("rtx-pro-6000", "prefill_attention"): (0.008, 0.055),
}
MARGIN = 1.1
SMALL = gemm.Card(100e12, 1e12, 50)


def shipped(name: str) -> Profile:
    """The profile of the wheel."""
    found = read_shipped(name)
    assert found is not None
    return found


def made_up_rows() -> pd.DataFrame:
    """Timings of a card whose coefficients are known."""
    sizes = [256, 512, 1024, 2048, 4096, 8192]
    grid = [(m, n, k) for m in (1, 8, 64, 200, 512, 1500, 4096) for n in sizes for k in sizes]
    rows = pd.DataFrame(grid, columns=["m", "n", "k"])
    truth = gemm.start(SMALL, None)
    return rows.assign(seconds=gemm.predict(truth, rows, 2))


def test_a_fit_of_products_recovers_a_known_card() -> None:
    """On timings made by the model itself the fit is exact to a few percent."""
    rows = made_up_rows()
    fitted = gemm.fit_base(rows, SMALL, starts=1)
    error = relative_error(gemm.predict(fitted, rows, 2), rows["seconds"].to_numpy())
    assert np.median(error) < 0.02
    assert np.quantile(error, 0.95) < 0.1


def test_the_correction_takes_up_a_smooth_error() -> None:
    """A bend in log m that the base does not have ends up in the correction."""
    rows = made_up_rows()
    base = gemm.start(SMALL, None)
    bent = rows.assign(seconds=rows["seconds"] * (1.0 + 0.2 * np.sin(np.log2(rows["m"]) / 3.0)))
    knots = (gemm.M_KNOTS, (8.0, 13.0), (8.0, 13.0))
    correction = gemm.fit_correction(bent, gemm.predict(base, bent, 2), knots)
    measured, corrected = bent["seconds"].to_numpy(), base.with_correction(correction)
    before = relative_error(gemm.predict(base, bent, 2), measured)
    after = relative_error(gemm.predict(corrected, bent, 2), measured)
    assert np.median(after) < 0.01 < np.median(before)


def test_fitting_twice_gives_the_same_coefficients() -> None:
    """The fit depends on the rows alone."""
    rows = made_up_rows()
    knots = (gemm.M_KNOTS, (8.0, 13.0), (8.0, 13.0))
    first, second = (gemm.fit(rows, SMALL, knots, starts=2).dump() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


def test_decode_coefficients_are_recovered_and_bounded() -> None:
    """The linear program finds a, b and c exactly; b stays above the inverse of the bandwidth."""
    truth = AttentionCost(3e-9, 8e-13, 1.2e-5)
    shapes = [(b, n) for b in (1, 8, 64, 256, 512) for n in (64, 500, 4000, 16000)]
    rows = pd.DataFrame(shapes, columns=["batch", "length"]).assign(heads=32, kv_heads=8, head_dim=128)
    rows["seconds"] = attention.predict_decode(truth, rows)
    everywhere = np.ones(len(rows), dtype=bool)
    found = attention.fit_decode(rows, everywhere, 2e12)
    assert found.a_s_per_head == pytest.approx(truth.a_s_per_head, rel=1e-3)
    assert found.b_s_per_byte == pytest.approx(truth.b_s_per_byte, rel=1e-3)
    assert found.c_s == pytest.approx(truth.c_s, rel=1e-3)
    assert attention.fit_decode(rows, everywhere, 1e12).b_s_per_byte == pytest.approx(1e-12)


def test_prompt_coefficients_are_recovered() -> None:
    """On timings made by the block model the fit is exact to a few percent."""
    truth = PrefillClass(128, 128, 60e12, 0.8e12, 0.8e12, 9e-6, 3.0)
    shapes = [(h, n, c) for h in (4, 16, 32, 64) for n in (16, 128, 512, 2048, 8192) for c in (0, 1000, 9000)]
    rows = pd.DataFrame(shapes, columns=["heads", "new", "context"]).assign(batch=1, head_dim=128)
    rows["kv_heads"] = rows["heads"] // 4
    rows["seconds"] = attention.predict_prefill(truth, rows)
    fitted = attention.fit_prefill(rows, 100e12, 1e12)
    error = relative_error(attention.predict_prefill(fitted, rows), rows["seconds"].to_numpy())
    assert np.quantile(error, 0.95) < 0.05


def test_a_fitted_curve_never_falls() -> None:
    """Noise that makes a larger message look faster is smoothed away."""
    sizes = 2.0 ** np.arange(10, 30)
    noise = np.where(np.arange(20) % 2 == 0, 1.3, 0.7)
    curve = curves.fit_curve(sizes, (1e-5 + sizes / 1e10) * noise, modules.SIZE_KNOTS)
    assert list(curve.seconds) == sorted(curve.seconds)


def test_held_out_groups_are_whole() -> None:
    """No weight shape is on both sides of the split, and about a quarter is held out."""
    rows = pd.DataFrame([(m, n, k) for m in range(1, 20) for n in range(30) for k in range(30)],
                        columns=["m", "n", "k"])
    held = held_out(rows, ["n", "k"])
    sides = rows.assign(held=held).groupby(["n", "k"])["held"].nunique()
    assert (sides == 1).all()
    assert 0.2 < held.mean() < 0.3


@pytest.mark.parametrize(("name", "module"), [key for key in DOCUMENTED if key[1] == "gemm"])
def test_held_out_products_are_as_good_as_documented(shared_data: Path, name: str, module: str) -> None:
    """The shipped coefficients on weight shapes that they never saw."""
    rows = RECIPES[name].gemm
    assert rows is not None
    found = modules.gemm_rows(name, rows.rows(Store(shared_data)))
    held = found[modules.gemm_split(found)].iloc[::3]
    fitted = shipped(name).gemm
    assert fitted is not None
    chosen = held[modules.gemm_limited(held, card(name))]
    error = relative_error(gemm.predict(fitted, chosen, 2), chosen["seconds"].to_numpy())
    median, p95 = DOCUMENTED[name, module]
    assert np.median(error) <= MARGIN * median
    assert np.quantile(error, 0.95) <= MARGIN * p95


@pytest.mark.parametrize(("name", "module"), [key for key in DOCUMENTED if key[1] == "prefill_attention"])
def test_held_out_prompts_are_as_good_as_documented(shared_data: Path, name: str, module: str) -> None:
    """The shipped coefficients on shapes that they never saw."""
    table = RECIPES[name].prefill
    assert table is not None
    rows = modules.prefill_rows(table.rows(Store(shared_data)))
    rows = rows[modules.prefill_split(rows)]
    rows = rows[modules.prefill_limited(name, rows)]
    predicted = modules.predict_prefill(shipped(name).prefill_attention, rows)
    error = relative_error(predicted, rows["seconds"].to_numpy())
    median, p95 = DOCUMENTED[name, module]
    assert np.median(error) <= MARGIN * median
    assert np.quantile(error, 0.95) <= MARGIN * p95


@pytest.mark.parametrize(("name", "module"), [key for key in DOCUMENTED if key[1] == "decode_attention"])
def test_held_out_decodes_are_as_good_as_documented(shared_data: Path, name: str, module: str) -> None:
    """The paper's linear model on shapes that the fit never saw."""
    table = RECIPES[name].decode
    assert table is not None
    rows = modules.decode_rows(name, table.rows(Store(shared_data)))
    rows = rows[modules.decode_split(rows)]
    rows = rows[modules.decode_limited(rows)]
    predicted = modules.predict_decode(shipped(name).decode_attention, rows)
    known = ~np.isnan(predicted)
    error = relative_error(predicted[known], rows["seconds"].to_numpy()[known])
    median, p95 = DOCUMENTED[name, module]
    assert np.median(error) <= MARGIN * median
    assert np.quantile(error, 0.95) <= MARGIN * p95


def test_another_cards_profile_fails_the_documented_errors(shared_data: Path) -> None:
    """The thresholds tell cards apart: an H100's products do not fit an A100's profile."""
    file = "kernels/aiconfigurator/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"
    rows = modules.gemm_rows("h100-sxm", gemm_aiconfigurator(Store(shared_data), file)).iloc[::50]
    fitted = shipped("a100-80gb").gemm
    assert fitted is not None
    error = relative_error(gemm.predict(fitted, rows, 2), rows["seconds"].to_numpy())
    assert np.median(error) > 0.5


def test_shipped_coefficients_are_those_of_the_script(shared_data: Path) -> None:
    """Fitting a small module anew gives the shipped numbers, so nothing was edited by hand."""
    table = RECIPES["rtx4090"].decode
    assert table is not None
    store = Store(shared_data)
    fitted, body = modules.decode_module("rtx4090", table.rows(store), store.sources(list(table.files)))
    stored = shipped("rtx4090")
    assert [c.dump() for c in stored.decode_attention] == [c.dump() for c in fitted]
    assert stored.infos["decode_attention"].median_error == body["held_out"]["median"]
