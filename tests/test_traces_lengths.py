"""Quantile tables reproduce the data they were fitted to, and say where it is from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hetis_sim.spec.errors import SpecError
from traces import LengthTable, RngStreams, load_table, table_names
from traces.fit_lengths import TABLES, fit_component, goodness, ks_distance, main, spearman
from traces.fit_sources import SOURCES, DataSet
from traces.lengths import RowSource, TableSource, table_from_json

# Published means: LongBench's own count is in words, the rest are tokens.
MEANS = {
    "azure_code": (2048, 28), "azure_conv": (1155, 211), "humaneval": (156, 66),
    "mooncake_conv": (12035, 343), "sharegpt": (246, 326), "sharegpt_short": (74, 229),
    "sharegpt_multiturn": (2340, 439), "arxiv": (2588, 291),
}


def drawn(table: LengthTable, seed: int = 0, count: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens of draws."""
    lengths = table.draw(RngStreams(seed).stream("lengths"), count)
    return lengths.prompt_tokens, lengths.output_tokens


def test_the_promised_tables_are_there() -> None:
    """A fresh clone has every table, fitted by the script that has its source."""
    assert set(table_names()) == set(SOURCES) == {*MEANS, "longbench"}


@pytest.mark.parametrize("name", table_names())
def test_tables_are_well_formed(name: str) -> None:
    """Weights add up, quantiles never fall, and provenance names source, licence, rows and fit."""
    table = load_table(name)
    assert sum(part.weight for part in table.components) == pytest.approx(1.0, abs=1e-4)
    for part in table.components:
        for grid, values in ((part.prompt_probabilities, part.prompt_tokens[None]),
                             (part.output_probabilities, part.output_tokens)):
            assert (grid[0], grid[-1]) == (0.0, 1.0)
            assert np.all(np.diff(grid) > 0)
            assert values.shape[1] == len(grid)
            assert np.all(np.diff(values) >= 0)
            assert values.min() >= 1
    assert {"repository", "commit", "path", "licence", "rows"} <= set(table.provenance["source"])
    fit = table.provenance["goodness"]
    assert max(fit[what]["ks"] for what in ("prompt_tokens", "output_tokens")) <= 0.03


@pytest.mark.parametrize("name", table_names())
def test_draws_keep_to_the_data(name: str) -> None:
    """Lengths are at least 1, within the largest quantile, and within the largest total."""
    table = load_table(name)
    prompt, output = drawn(table)
    assert min(prompt.min(), output.min()) >= 1
    assert prompt.max() <= max(part.prompt_tokens.max() for part in table.components)
    assert (prompt + output).max() <= table.total_tokens_max


@pytest.mark.parametrize(("name", "means"), MEANS.items())
def test_means_are_those_of_the_data(name: str, means: tuple[int, int]) -> None:
    """Means of draws lie within 4 standard errors, and 2 % of fit, of the data's."""
    for tokens, mean in zip(drawn(load_table(name)), means, strict=True):
        error = tokens.std() / np.sqrt(len(tokens))
        assert abs(tokens.mean() - mean) <= 4 * error + 0.02 * mean


def test_longbench_subsets() -> None:
    """Tasks can be picked, keep their proportions, and differ as the benchmark's tasks do."""
    table = load_table("longbench")
    assert len(table.components) == 21
    gov, trec = (drawn(table.part([task])) for task in ("gov_report", "trec"))
    assert gov[1].mean() > 250
    assert set(trec[1].tolist()) == {64}
    both = drawn(table.part(["gov_report", "trec"]))
    assert (both[1] == 64).mean() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(SpecError, match=r"subset='gov'.*gov_report"):
        table.part(["gov"])


def test_humaneval_says_what_its_outputs_are() -> None:
    """Canonical solutions are not passed off as a model's generations."""
    assert "not generations of a model" in " ".join(load_table("humaneval").provenance["notes"])


@pytest.mark.parametrize("name", ["sharegpt", "longbench"])
def test_first_lengths_do_not_depend_on_the_count(name: str) -> None:
    """Blocks of any size draw the same row of lengths."""
    table = load_table(name)
    whole = TableSource(table, RngStreams(1)).next_block(1000)
    source = TableSource(table, RngStreams(1))
    parts = [source.next_block(n) for n in (1, 99, 900)]
    assert np.array_equal(np.concatenate([p.prompt_tokens for p in parts]), whole.prompt_tokens)
    assert np.array_equal(np.concatenate([p.output_tokens for p in parts]), whole.output_tokens)


def test_dependence_is_kept() -> None:
    """Output that follows the prompt in the data follows it in the draws."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, 2000, 5000)
    output = np.maximum(2000 - prompt + rng.integers(-100, 100, 5000), 1)
    labels = np.zeros(5000, dtype=np.int64)
    data = DataSet("made_up", "", prompt, output, labels, ("all",), {}, (), {})
    part = fit_component("all", 1.0, prompt, output)
    table = table_from_json({"schema": 1, "name": "made_up", "total_tokens_max": 10**6, "components": [part]})
    fit = goodness(table, data)
    assert fit["spearman"]["real"] < -0.98
    assert fit["spearman"]["drawn"] < -0.98
    assert max(fit[what]["ks"] for what in ("prompt_tokens", "output_tokens")) < 0.02


def test_equal_prompts_share_all_outputs() -> None:
    """Ties of the prompt are broken at random: outputs in file order must not look dependent."""
    prompt = np.full(4000, 7)
    output = np.arange(4000)
    part = fit_component("all", 1.0, prompt, output)
    medians = [row[len(row) // 2] for row in part["output_tokens"]]
    assert max(abs(m - 2000) for m in medians) < 500


def test_distances() -> None:
    """KS distance and rank correlation agree with hand-made cases."""
    a, b = np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])
    assert ks_distance(a, b) == 0.5
    assert ks_distance(a, a) == 0.0
    assert spearman(a, b) == pytest.approx(1.0)
    assert spearman(a, -b) == pytest.approx(-1.0)
    assert spearman(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2])) == pytest.approx(0.0)
    assert spearman(a, np.ones(4, dtype=np.int64)) == 0.0


def test_unknown_tables() -> None:
    """An unknown table or schema names what there is."""
    with pytest.raises(SpecError, match=r"table='sharegtp'.*sharegpt"):
        load_table("sharegtp")
    with pytest.raises(SpecError, match="schema=2"):
        table_from_json({"schema": 2})


def test_rows_of_a_trace_in_three_orders() -> None:
    """Rows come once in order, round and round, or drawn with return."""
    prompt, output = np.arange(1, 6), np.arange(11, 16)
    once = RowSource(prompt, output, "trace", RngStreams(0))
    assert [once.next_block(3).prompt_tokens.tolist() for _ in range(3)] == [[1, 2, 3], [4, 5], []]
    assert RowSource(prompt, output, "cycle", RngStreams(0)).next_block(7).output_tokens.tolist() == [
        11, 12, 13, 14, 15, 11, 12]
    back = RowSource(prompt, output, "bootstrap", RngStreams(0)).next_block(5000)
    assert np.array_equal(back.output_tokens - back.prompt_tokens, np.full(5000, 10))
    counts = np.bincount(back.prompt_tokens)[1:]
    assert np.all(np.abs(counts - 1000) <= 4 * np.sqrt(5000 * 0.2 * 0.8))


def test_refitting_gives_the_shipped_tables(shared_data: Path, tmp_path: Path) -> None:
    """The script run on the public data reproduces a shipped table."""
    assert main(["--data", str(shared_data), "--out", str(tmp_path), "--only", "humaneval"]) == 0
    new = json.loads((tmp_path / "humaneval.json").read_text())
    shipped = json.loads((TABLES / "humaneval.json").read_text())
    assert new["components"] == shipped["components"]


def test_shipped_tables_are_close_to_the_data(
    shared_data: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """The check of the script passes on tables of one and of many components."""
    assert main(["--data", str(shared_data), "--check", "--only", "longbench", "--only", "humaneval"]) == 0
    assert capsys.readouterr().out.startswith("longbench")


def test_fitting_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder or file is an error of one line."""
    assert main(["--data", str(tmp_path / "none")]) == 2
    assert "must be a folder that exists" in capsys.readouterr().err
    assert main(["--data", str(tmp_path), "--only", "longbench"]) == 2
    assert "must be an existing file" in capsys.readouterr().err
