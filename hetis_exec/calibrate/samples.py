"""What was measured: points, their samples, and the file that keeps them between runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from hetis_sim.spec.errors import HetisError


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured. A number that means nothing for a module is 0.

    Attributes:
        module: of the profile.
        subject: type of device, name of the link, or ``host``.
        model: whose shape.
        tp: tensor-parallel degree.
        tokens: of the batch; of the LM head and of host time, the sequences.
        new_tokens, context_tokens: of a prompt.
        heads, kv_heads: query heads and KV groups of a prompt's attention on the device.
        rows, row_tokens: KV groups of all requests of a decode batch, and their cached tokens; of a size of
            graphs, ``rows`` are the most prompts.
        size_bytes: of the messages; both ways, for a round trip.
        messages: that the time is of.
        ranks: of a collective.
        prompts: of an iteration, for host time.
        between: types of devices that a message travels between; see :func:`hetis_sim.cost.links.pair_of`.
    """

    module: str
    subject: str
    model: str = ""
    tp: int = 0
    tokens: int = 0
    new_tokens: int = 0
    context_tokens: int = 0
    heads: int = 0
    kv_heads: int = 0
    rows: int = 0
    row_tokens: int = 0
    size_bytes: int = 0
    messages: int = 0
    ranks: int = 0
    prompts: int = 0
    between: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a point.

    Attributes:
        at_s: when it had been taken (Unix time); 0 for no moment.
    """

    point: Point
    seconds: float
    at_s: float = field(default_factory=time.time)


Samples = list[Sample]

PREFIX = "reference_"
"""Of modules that tell the pace of a device and are not fitted; see :mod:`hetis_exec.calibrate.reference`."""

GRAPH_PROMPT, GRAPH_BATCH = GRAPHS = ("graph_prompt", "graph_batch")
"""Of points that state a size of the steps that are replayed from graphs, and are not measured."""

EXCESS_MAX = 3.0
"""A sample counts for so many times the median of its point at most: what is more has another cause."""

COLUMNS = tuple(one.name for one in fields(Point))


def frame_of(samples: Iterable[Sample]) -> pd.DataFrame:
    """One row for each sample."""
    rows = [{**asdict(sample.point), "seconds": sample.seconds, "at_s": sample.at_s} for sample in samples]
    return pd.DataFrame(rows, columns=[*COLUMNS, "seconds", "at_s"])


def clipped(seconds: Iterable[float]) -> pd.Series:
    """Measurements of the same thing, none more than ``EXCESS_MAX`` times their median."""
    found = pd.Series(list(seconds), dtype=float)
    return found.clip(upper=EXCESS_MAX * found.median())


def medians(samples: pd.DataFrame) -> pd.DataFrame:
    """One row for each point: the median of its samples, and how many there are."""
    found = samples.groupby(list(COLUMNS), sort=True)["seconds"].agg(["median", "size"]).reset_index()
    return found.rename(columns={"median": "seconds", "size": "repeats"})


def means(samples: pd.DataFrame) -> pd.DataFrame:
    """The same with what each point takes on average.

    Of a few samples the median is the surer figure, but steps on a machine that others use as well take
    longer than their median more often than less, and a sum of steps has all of that. So medians are drawn
    out by what samples exceed theirs by on average, over all points.
    """
    keys = samples.groupby(list(COLUMNS), sort=False)["seconds"]
    excess = (samples["seconds"] / keys.transform("median")).clip(upper=EXCESS_MAX)
    repeated = excess[keys.transform("size") > 1]
    rows = medians(samples)
    return rows.assign(seconds=rows["seconds"] * (float(repeated.mean()) if len(repeated) else 1.0))


class Store:
    """Keeps the samples of finished tasks in a file, so that a run that was cut short goes on there.

    Args:
        path: of the file; each line is a task, its samples and how long it took.

    Raises:
        HetisError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tasks: dict[str, tuple[Samples, float]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise HetisError(f"calibrate.out: {path} cannot be used: {error}") from error
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        """One task; a line that was cut short is left out, and its task measured again."""
        try:
            raw: dict[str, Any] = json.loads(line)
            samples = [Sample(Point(**item["point"]), float(item["seconds"]), float(item["at_s"]))
                       for item in raw["samples"]]
            self._tasks[str(raw["task"])] = samples, float(raw["took_s"])
        except (ValueError, KeyError, TypeError):
            return

    def known(self, task: str) -> bool:
        """Whether a task has been measured."""
        return task in self._tasks

    def add(self, task: str, samples: Sequence[Sample], took_s: float) -> None:
        """Keep a task's samples."""
        self._tasks[task] = list(samples), took_s
        line = {"task": task, "took_s": took_s, "samples": [asdict(sample) for sample in samples]}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def samples(self, tasks: Iterable[str]) -> Samples:
        """The samples of some tasks."""
        return [sample for task in tasks for sample in self._tasks[task][0]]

    def took_s(self, tasks: Iterable[str]) -> float:
        """How long they took to measure."""
        return sum(self._tasks[task][1] for task in tasks)


def references_of(samples: pd.DataFrame, subject: str) -> dict[str, float]:
    """Mean seconds of a device's reference work, by part; empty where none was taken.

    What takes many times as long as it usually does has another cause than the machine's pace.
    """
    own = samples[(samples["subject"] == subject) & samples["module"].str.startswith(PREFIX)]
    return {str(module).removeprefix(PREFIX): float(clipped(rows).mean())
            for module, rows in own.groupby("module")["seconds"]}
