"""The run folder: whole or not there, the same bytes for the same run, and read back as written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metrics_fakes import PLAN, add_request, fake_run

from hetis_sim.metrics import (
    Recorder,
    Run,
    Trim,
    build_manifest,
    load_run,
    roles_of_plan,
    summarize,
    write_run,
)
from hetis_sim.metrics.manifest import file_sha256, git_revision, value_sha256
from hetis_sim.metrics.runfolder import ITL_ROWS_MAX
from hetis_sim.metrics.strictjson import dump_line
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.slo import Slo

FILES = {"manifest.json", "plan.json", "requests.parquet", "steps.parquet", "transfers.parquet",
         "samples.parquet", "itl.parquet", "summary.json"}


def write(path: Path, recorder: Recorder | None = None, **options: Any) -> Run:
    """Write the made-up run (or another) and open it."""
    recorder = recorder or fake_run()
    roles = roles_of_plan(PLAN, len(recorder.devices)) if recorder.devices else ()
    manifest = build_manifest(label="simulated", seeds={"arrivals": 1}, hashes={"trace": "ab"})
    write_run(path, recorder=recorder, summary=summarize(recorder, slo=Slo(), roles=roles), manifest=manifest,
              plan=PLAN, **options)
    return load_run(path)


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_folder_holds_its_files_and_nothing_else(tmp_path: Path) -> None:
    """All tables, figures, manifest and plan are there; temporary files are gone."""
    write(tmp_path / "run")
    assert set(content(tmp_path / "run")) == FILES


def test_what_is_optional_is_written_when_given(tmp_path: Path) -> None:
    """Configuration and decision log appear on demand, and come back."""
    run = write(tmp_path, config={"rate": 2.0}, decisions=iter(['{"at":1}', '{"at":2}']))
    assert run.config == {"rate": 2.0}
    assert list(run.decisions()) == [{"at": 1}, {"at": 2}]
    assert list(write(tmp_path / "bare").decisions()) == []


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    """Two recordings of the same run write the same bytes."""
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_another_hash_seed_gives_equal_bytes(tmp_path: Path, project_root: Path) -> None:
    """Processes with different PYTHONHASHSEED write the same bytes."""
    code = ("import sys; from pathlib import Path; sys.path.insert(0, 'tests'); "
            "from test_metrics_runfolder import write; write(Path(sys.argv[1]))")
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], cwd=project_root, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed})
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_tables_come_back_as_recorded(tmp_path: Path) -> None:
    """Every table has the same rows and types after a round trip."""
    recorder = fake_run()
    run = write(tmp_path, recorder)
    for name in ("requests", "steps", "transfers", "samples"):
        pd.testing.assert_frame_equal(getattr(run, name), getattr(recorder, name)(), check_categorical=False)
    assert str(run.requests["status"].dtype) == "category"
    assert run.itl_percentile(99) == recorder.records().itl.percentile_s(99)


def test_figures_of_a_loaded_run_can_be_made_anew(tmp_path: Path) -> None:
    """The same settings give the same summary, another window another one."""
    run = write(tmp_path)
    roles = roles_of_plan(run.plan, len(run.devices))
    assert json.loads(dump_line(summarize(run.records(), slo=Slo(), roles=roles))) == run.summary
    trimmed = summarize(run.records(), slo=Slo(), roles=roles, trim=Trim(0.2, 0.2))
    assert trimmed.requests.measured == 181
    assert trimmed.itl_s.n < run.summary["itl_s"]["n"]


def test_devices_come_as_a_table(tmp_path: Path) -> None:
    """One row a device with its role."""
    assert list(write(tmp_path).devices["role"]) == ["primary", "attention"]


def refuse(constant: str) -> None:
    """Called for NaN and Infinity, which are not JSON."""
    raise AssertionError(f"{constant} is not JSON")


def test_json_files_are_strict(tmp_path: Path) -> None:
    """What is not a number is null, in figures that do not exist as well."""
    recorder = Recorder()
    add_request(recorder, 0, 0.0, output_tokens=1)
    run = write(tmp_path, recorder)
    for name in ("summary.json", "manifest.json", "plan.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    assert run.summary["tpot_s"]["mean"] is None
    assert run.summary["ttft_s"]["mean"] == 1.0


def test_json_keeps_order_and_refuses_what_has_none() -> None:
    """NumPy values and tuples are written plainly; a set is an error, for its order is not its own."""
    assert dump_line({"b": np.float64(0.5), "a": (np.int64(1), float("inf")), 3: None}) == (
        '{"b":0.5,"a":[1,null],"3":null}')
    with pytest.raises(TypeError, match="set"):
        dump_line({"a": {1, 2}})


def failing_log() -> Iterator[str]:
    """A decision log that breaks off."""
    yield "{}"
    raise RuntimeError("disk full")


def test_a_failed_write_leaves_no_run(tmp_path: Path) -> None:
    """If writing breaks off, nothing is left behind and the folder does not load."""
    with pytest.raises(RuntimeError, match="disk full"):
        write(tmp_path / "run", decisions=failing_log())
    assert content(tmp_path / "run") == {}
    with pytest.raises(SpecError, match=r"summary.json missing"):
        load_run(tmp_path / "run")


def test_a_failed_rewrite_keeps_the_earlier_run(tmp_path: Path) -> None:
    """Until all new files are there, the old ones stay."""
    write(tmp_path, config={"rate": 1})
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match="disk full"):
        write(tmp_path, fake_run(50), decisions=failing_log())
    assert content(tmp_path) == before


def test_a_rewrite_leaves_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    """Optional files of the run before do not stay beside the new run; foreign files do."""
    (tmp_path / ".hydra").mkdir()
    write(tmp_path, config={"rate": 1}, decisions=["{}"])
    write(tmp_path, fake_run(50))
    assert {path.name for path in tmp_path.iterdir()} == FILES | {".hydra"}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    """The error names the folder and what is missing."""
    with pytest.raises(SpecError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"manifest.json and summary.json missing"):
        load_run(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    """A folder of a layout this reader does not know is not guessed at."""
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(SpecError, match="format 1, not 99"):
        load_run(tmp_path)


def test_the_record_of_gaps_is_bounded(tmp_path: Path) -> None:
    """A long run writes a bounded number of segments, with all its gaps and nearly its percentiles."""
    recorder = Recorder()
    for i in range(ITL_ROWS_MAX + 50_000):
        recorder.itl(0.01 + i * 1e-6, 0.01 + i * 1.01e-6, 3, 2)
    add_request(recorder, 0, 0.0)
    run = write(tmp_path, recorder)
    written = run.records().itl
    assert len(written) <= ITL_ROWS_MAX
    assert written.n == 6 * (ITL_ROWS_MAX + 50_000)
    assert run.itl_percentile(99) == pytest.approx(run.summary["itl_s"]["p99"], rel=1e-3)


def test_the_manifest_says_what_made_the_run() -> None:
    """Versions, seeds, hashes and further facts are in it; hosts and times of day are not."""
    manifest = build_manifest(label="measured", seeds={"arrivals": 3}, hashes={}, extra={"cards": ["t4"]})
    assert manifest["versions"]["numpy"] == np.__version__
    assert (manifest["label"], manifest["seeds"], manifest["cards"]) == ("measured", {"arrivals": 3}, ["t4"])
    assert os.uname().nodename not in json.dumps(manifest["platform"])
    with pytest.raises(SpecError, match="simulated, measured"):
        build_manifest(label="guessed", seeds={}, hashes={})


def test_the_revision_is_that_of_the_checkout(tmp_path: Path) -> None:
    """Outside a checkout there is none; inside, the commit and whether files differ from it."""
    assert git_revision(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        result = subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True,
                                capture_output=True, text=True)
        return result.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path)["modified"] is True


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    """Files hash by their bytes, values by their JSON."""
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert value_sha256({"a": 1}) == value_sha256({"a": 1})
    assert value_sha256({"a": 1}) != value_sha256({"a": 2})
