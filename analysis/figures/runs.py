"""The runs of a report: opened, checked against each other, named and ordered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.figures.charts import Floats
from analysis.figures.naming import flat, names_of
from hetis_sim.metrics.load import Run, load_run
from hetis_sim.metrics.window import Window
from hetis_sim.spec.errors import SpecError, require

if TYPE_CHECKING:
    import pandas as pd

RUN_FILES = ("requests.parquet", "steps.parquet", "transfers.parquet", "samples.parquet", "itl.parquet",
             "plan.json")


class Load(NamedTuple):
    """How hard a run was driven: requests per second, or users of a closed loop."""

    value: float
    unit: str


class Device(NamedTuple):
    """One device: label, kind of card, host, role."""

    label: str
    card: str
    host: str
    role: str


@dataclass(frozen=True)
class ReportRun:
    """One run of a report.

    Attributes:
        run: its folder.
        name: unique among the runs of the report.
        group: the same without load and seed.
        number: its place in the report, from 0.
        group_number: place of its group.
    """

    run: Run
    name: str
    group: str
    number: int
    group_number: int

    @property
    def slug(self) -> str:
        """The name for files and anchors."""
        return f"{self.number:02d}-{re.sub(r'[^a-z0-9.]+', '-', self.name.lower()).strip('-.')}".rstrip("-")

    @property
    def summary(self) -> dict[str, Any]:
        """All figures."""
        return self.run.summary

    @property
    def origin(self) -> str:
        """``simulated`` or ``measured``."""
        return str(self.summary["label"])

    @property
    def policy(self) -> str:
        """Name of the policy, or of the folder where nothing else is known."""
        policy = (self.run.config or {}).get("policy")
        return str(policy["name"]) if isinstance(policy, Mapping) and "name" in policy else self.run.path.name

    @property
    def workload_hash(self) -> str | None:
        """Equal for runs of the same requests at the same times; None in a closed loop, and where unknown."""
        if (self.run.manifest.get("workload") or {}).get("closed"):
            return None
        found = self.run.manifest["hashes"].get("workload")
        return None if found is None else str(found)

    @property
    def seed(self) -> int | None:
        """Seed of the workload."""
        found = self.run.manifest["seeds"].get("workload")
        return None if found is None else int(found)

    @property
    def saturated(self) -> bool:
        """Whether the queue grew for as long as the run lasted."""
        return bool(self.summary["saturation"]["verdict"] == "saturated")

    @cached_property
    def load(self) -> Load:
        """Users of a closed loop, else the configured rate, else the rate of the arrivals."""
        workload = (self.run.config or {}).get("workload") or {}
        if workload.get("arrivals") == "closed":
            return Load(float(workload["users"]), "users")
        if workload.get("rate"):
            return Load(float(workload["rate"]), "requests/s")
        return Load(float(f"{self.arrival_rate:.3g}"), "requests/s")

    @cached_property
    def arrival_rate(self) -> float:
        """Requests per second between the first and the last arrival; nan for a single one."""
        arrival_s = self.run.requests["arrival_s"]
        stretch_s = float(arrival_s.max() - arrival_s.min())
        return (len(arrival_s) - 1) / stretch_s if stretch_s > 0 else float("nan")

    @cached_property
    def window(self) -> Window:
        """What is measured."""
        return Window(**self.summary["window"])

    @cached_property
    def measured(self) -> pd.DataFrame:
        """Rows of the measured requests, in order of arrival."""
        return self.run.requests.iloc[self.window.first:self.window.last]

    @cached_property
    def end_s(self) -> float:
        """When the last request had left."""
        return max(float(np.nanmax(self.run.requests["finish_s"])),
                   float(self.run.requests["arrival_s"].max()))

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Every device by id."""
        return tuple(_device(row) for row in self.summary["devices"])

    @cached_property
    def capacity_bytes(self) -> Floats:
        """Cache of each device; nan where unknown."""
        return np.array([row["capacity_bytes"] for row in self.summary["devices"]], dtype=np.float64)

    def samples(self, column: str) -> Floats:
        """``used_bytes``, ``busy_s`` or ``heads`` over time: samples x devices."""
        frame = self.run.samples
        columns = [np.asarray(frame[f"{column}_{i}"], dtype=np.float64) for i in range(len(self.devices))]
        return np.stack(columns, axis=1) if columns else np.zeros((len(frame), 0))


def _device(row: Mapping[str, Any]) -> Device:
    """Parts of a label like ``4:rtx3090@host1``; other labels are kept whole."""
    label = str(row["label"])
    card, at, host = label.partition(":")[2].partition("@")
    return Device(label, card or label, host if at else "", row["role"] or "")


def by_card(run: ReportRun, devices: Sequence[int]) -> dict[str, list[int]]:
    """Devices by kind of card."""
    found: dict[str, list[int]] = {}
    for device in devices:
        found.setdefault(run.devices[device].card, []).append(device)
    return found


def alike_instances(run: ReportRun) -> list[tuple[list[int], Mapping[str, Any]]]:
    """Numbers of instances of equal shape, and the first of them."""
    found: dict[str, tuple[list[int], Mapping[str, Any]]] = {}
    for number, instance in enumerate(run.run.plan["instances"]):
        shape = repr(([(stage["layers"], stage["owned_groups"],
                        [run.devices[d].card for d in stage["devices"]])
                       for stage in instance["stages"]],
                      sorted(run.devices[d].card for d in instance.get("attention_workers", ())),
                      instance.get("role", "both")))
        found.setdefault(shape, ([], instance))[0].append(number)
    return list(found.values())


def alike_nodes(run: ReportRun) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Nodes of a mesh that hold the same layers, under a label, from the front of the model to its end."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for node in (run.run.plan.get("mesh") or {}).get("nodes", ()):
        found.setdefault((node["first_layer"], node["layers"]), []).append(node)
    return [(f"layers {first}-{first + layers - 1}", nodes)
            for (first, layers), nodes in sorted(found.items())]


def place_name(run: ReportRun, place: int) -> str:
    """Host of a device of a transfer record; ``-1 - h`` is the memory of host h."""
    if place < 0:
        return f"host{-1 - place} memory"
    return run.devices[place].host or run.devices[place].label


# -- opening ------------------------------------------------------------------------------


def open_runs(paths: Iterable[str | Path]) -> list[ReportRun]:
    """Open run folders, and the run folders right below a folder of a sweep.

    Runs are ordered as given, those of a sweep by policy, load and seed.

    Raises:
        SpecError: no folders, one that is no whole run, one without a finished request, the
            same one twice, or runs of different models.
    """
    folders = [folder for path in paths for folder in expanded(Path(path))]
    require(len(folders) > 0, "run", "", "at least one run folder")
    twice = {folder for folder in folders if folders.count(folder) > 1}
    require(not twice, "run", ", ".join(sorted(map(str, twice))), "named once")
    runs = [_checked(load_run(folder)) for folder in folders]
    _require_one_model(runs)
    names = names_of([run.config or {"policy": {"name": run.path.name}} for run in runs],
                     [run.path.name for run in runs], [run.summary["label"] for run in runs])
    groups = list(dict.fromkeys(group for _, group in names))
    return [ReportRun(run, name, group, i, groups.index(group))
            for i, (run, (name, group)) in enumerate(zip(runs, names, strict=True))]


def expanded(path: Path) -> list[Path]:
    """The folder itself, or the run folders right below it where it is none."""
    if not path.is_dir():
        return [path]
    if (path / "summary.json").is_file() or (path / "manifest.json").is_file():
        return [path.resolve()]
    below = [folder.resolve() for folder in path.iterdir() if (folder / "summary.json").is_file()]
    return sorted(below, key=_sweep_order) or [path.resolve()]


def _sweep_order(folder: Path) -> tuple[str, float, float, str]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    workload = config.get("workload") or {}
    return (str((config.get("policy") or {}).get("name")), float(workload.get("rate") or 0.0),
            float(workload.get("seed") or 0), folder.name)


def _checked(run: Run) -> Run:
    path = str(run.path)
    missing = [name for name in RUN_FILES if not (run.path / name).is_file()]
    require(not missing, "run", path, f"a whole run folder ({' and '.join(missing)} missing)")
    try:
        counts = run.summary["requests"]
        run.requests, run.steps, run.transfers, run.samples, run.plan  # noqa: B018  (read now, or refused now)
    except (OSError, ValueError, KeyError) as error:
        raise SpecError("run", path, f"a readable run folder ({type(error).__name__}: {error})") from error
    if counts["finished"] == 0:
        reasons = ", ".join(f"{name}: {number}" for name, number in counts["rejected_by_reason"].items())
        raise SpecError("run", path, "a run in which some request finished "
                        f"({counts['submitted']} submitted, {counts['rejected']} rejected"
                        f"{f' ({reasons})' if reasons else ''})")
    return run


def _require_one_model(runs: Sequence[Run]) -> None:
    """Runs whose model is not known are compared by their number of layers."""
    models = {run.path: tuple(sorted(flat(run.config["model"]).items(), key=lambda item: item[0]))
              for run in runs if run.config and "model" in run.config}
    layers = {run.path: _layers(run.plan) for run in runs}
    if len(set(models.values())) > 1 or len(set(layers.values())) > 1:
        shown = ", ".join(f"{run.path.name}: {_model_name(run)}" for run in runs)
        raise SpecError("run", shown, "runs of one model; make a report for each")


def _layers(plan: Mapping[str, Any]) -> int:
    if plan.get("mesh"):
        return int(max(node["first_layer"] + node["layers"] for node in plan["mesh"]["nodes"]))
    return sum(stage["layers"] for stage in plan["instances"][0]["stages"])


def _model_name(run: Run) -> str:
    model = (run.config or {}).get("model") or {}
    settings = {key: value for key, value in model.items() if value is not None and key != "name"}
    return f"{model.get('name', '?')} {settings}"


def model_name(run: ReportRun) -> str:
    """Name of the model, where the folder says it."""
    return str(((run.run.config or {}).get("model") or {}).get("name", "an unnamed model"))


def section_name(run: ReportRun, section: str) -> str:
    """Name of the cluster or of the workload."""
    return str(((run.run.config or {}).get(section) or {}).get("name", f"an unnamed {section}"))


def origin_of(runs: Sequence[ReportRun]) -> str:
    """The label of figures that show all of them."""
    return " and ".join(sorted({run.origin for run in runs}, reverse=True))
