"""Calibrations that come with the package: by name, from anywhere, for what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis_sim.config import compose
from hetis_sim.cost.load import load_cost_model, measured_names, profile_path
from hetis_sim.cost.profile import read_profile
from hetis_sim.run import prepare
from hetis_sim.spec.errors import SpecError


@pytest.mark.parametrize("name", measured_names())
def test_what_comes_along_is_whole(name: str) -> None:
    """Profiles that nobody has changed, with where and when they were measured, and their samples."""
    folder = profile_path(name)
    profiles = [read_profile(file) for file in sorted(folder.glob("*.json"))]
    assert any(profile.device == "host" for profile in profiles)
    for profile in profiles:
        assert profile.calibration is not None
        assert profile.calibration.date
        assert profile.calibration.driver
        assert (folder / profile.calibration.samples).is_file()


def test_a_calibration_is_used_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever folder one is; a path of the same name goes before it."""
    monkeypatch.chdir(tmp_path)
    words = ("cluster=h200", "model=llama3-8b", "policy=vllm", "rate=2", "requests=5")
    rows = prepare(compose(*words, "profile=h200")).provenance()
    sources = {(row.module, row.subject): row.kind for row in rows}
    assert sources["dense_layer", "h200"] == "measured"
    assert sources["host_overhead", "host"] == "measured"
    (tmp_path / "h200").mkdir()
    with pytest.raises(SpecError, match="a folder with a profile"):
        load_cost_model(profiles=["h200"])


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    """And so is a path to nowhere."""
    with pytest.raises(SpecError, match=r"profile='h999'.*comes with the package: .*h200"):
        load_cost_model(profiles=["h999"])
