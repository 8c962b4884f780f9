"""Figures of a validation show what its files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.figures.charts import DotChart, ScatterChart, XYChart
from analysis.validation.figures import validation_charts

LOADS = (0.3, 0.9)


def cases() -> list[dict[str, object]]:
    """Two loads of one policy; nothing is known of the noise at the second."""
    return [{"policy": "vllm", "load": load, "errors": [
        {"metric": metric, "statistic": statistic, "error": 0.1 * load, "low": 0.0, "high": 0.2 * load,
         "noise_low": -0.01 if load < 0.5 else None, "noise_high": 0.03 if load < 0.5 else None,
         "measured": 0.5, "paced": 0.02}
        for metric in ("ttft", "tpot", "e2el") for statistic in ("mean", "p95")],
        "parts": [{"kind": "decode", "part": "dense", "measured_s": 0.01, "same_s": 0.012,
                   "same_paced_s": 0.011}],
        "runs": [{"slowdown": {"core": {"dense": factor}}} for factor in (1.25, 0.8)]} for load in LOADS]


ORDER = {"metric": "tpot", "load": 0.3, "first": "vllm", "second": "hetis", "measured": 0.1, "noise": 0.02,
         "simulated": -0.1, "paced": None, "verdict": "other"}


def requests() -> pd.DataFrame:
    """Ten requests at each load; one of them has a single token, and so no time per token."""
    rows = []
    for load in LOADS:
        for n in range(10):
            row = {"policy": "vllm", "load": load, "request_id": n, "seed": 0}
            for metric in ("ttft", "tpot", "e2el"):
                row |= {f"{metric}_s": 0.1 * (n + 1), f"{metric}_s_sim": 0.2 * (n + 1)}
            rows.append(row)
    frame = pd.DataFrame(rows)
    frame.loc[0, ["tpot_s", "tpot_s_sim"]] = np.nan
    return frame


def written(folder: Path) -> Path:
    """A folder as a validation leaves it."""
    folder.mkdir()
    (folder / "validation.json").write_text(json.dumps({
        "format": 2, "cases": cases(), "complete": False, "left_out": ["a", "b"], "ranking": [ORDER]}))
    requests().to_parquet(folder / "requests.parquet")
    return folder


def test_charts_hold_the_figures() -> None:
    """Errors in percent with their intervals and noise, each request once, and both distributions."""
    charts = {chart.key: chart for chart in validation_charts(cases(), requests())}
    assert set(charts) == {f"{kind}-{metric}" for metric in ("ttft", "tpot", "e2el")
                           for kind in ("error", "scatter", "cdf-0")}
    error = charts["error-ttft"]
    assert isinstance(error, DotChart)
    assert list(error.rows) == ["vllm, 30%", "vllm, 90%"]
    assert error.series[0].values == pytest.approx([3.0, 9.0])
    assert error.series[0].high == pytest.approx([6.0, 18.0])
    assert error.series[1].values[0] == pytest.approx(1.0)
    assert error.series[1].high is not None
    assert error.series[1].high[0] == pytest.approx(3.0)
    assert np.isnan(error.series[1].values[1])
    scatter = charts["scatter-tpot"]
    assert isinstance(scatter, ScatterChart)
    assert len(scatter.clouds[0].x) == 19
    assert scatter.clouds[0].y == pytest.approx(2 * scatter.clouds[0].x)
    overlay = charts["cdf-0-e2el"]
    assert isinstance(overlay, XYChart)
    assert [line.name for line in overlay.lines] == ["30% measured", "30% simulated", "90% measured",
                                                     "90% simulated"]
    assert len({line.style for line in overlay.lines}) == 4
    assert {chart.origin for chart in charts.values()} == {"simulated and measured"}


def test_the_command_draws_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file for each figure and format, the same every time."""
    folder = written(tmp_path / "run")
    assert main(["validation", str(folder), "--formats", "svg"]) == 0
    files = sorted((folder / "figures").glob("*.svg"))
    assert len(files) == 9
    assert capsys.readouterr().out.strip() == str(folder / "figures")
    text = (folder / "figures" / "validation.md").read_text()
    assert "Incomplete: 2 runs are missing" in text
    assert "| vllm | 30% | tpot mean | 0.5 | +3.0 % | +0.0 % to +6.0 % | -1.0 % to +3.0 % | +2.0 % |" in text
    assert "| vllm | 90% | tpot mean | 0.5 | +9.0 % | +0.0 % to +18.0 % |  | +2.0 % |" in text
    assert "| vllm | 30% | core | dense | 0.80 to 1.25 |" in text
    assert "10.00 (+2.00, +1.00)" in text
    assert "0 of 1 pairs of policies rank as measured" in text
    assert "| tpot | 30% | vllm | hetis | +10.0 % | 2.0 % | -10.0 % |  | other |" in text
    before = [path.read_bytes() for path in files]
    assert main(["validation", str(folder), "--formats", "svg"]) == 0
    assert [path.read_bytes() for path in files] == before


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a validation, or with one of another format, is named."""
    assert main(["validation", str(tmp_path)]) == 2
    assert "hetis_exec validate" in capsys.readouterr().err
    folder = written(tmp_path / "run")
    (folder / "validation.json").write_text(json.dumps({"format": 99, "cases": []}))
    assert main(["validation", str(folder)]) == 2
    assert "format" in capsys.readouterr().err
