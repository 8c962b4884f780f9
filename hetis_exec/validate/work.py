"""Does the runs of a validation, and remembers what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hetis_exec.calibrate.pace import PaceKeeper, Seconds, slowdown_of, slowdowns
from hetis_exec.config import ExecutionConfig
from hetis_exec.places import devices_of
from hetis_exec.validate.keep import Kept, Shelf
from hetis_exec.validate.moments import Moments, plain
from hetis_exec.validate.runs import Outcome, Subject, capacity_rps, measure, simulate
from hetis_exec.validate.schedule import Run, Watch, count_of
from hetis_sim.spec.errors import HetisError
from hetis_sim.study.runs import Load

Tick = Callable[[str, int, int, float | None], None]
"""Told what comes next, how many of how many runs are over, and the seconds that are left if known."""


@dataclass(frozen=True)
class MachinePace:
    """How fast the machine is, against its profile.

    Attributes:
        references: seconds of the calibration, by type of device and part.
    """

    keeper: PaceKeeper
    references: Mapping[str, Mapping[str, float]]

    def now(self, subject: Subject, glance: bool = False) -> Seconds:
        """Of the devices of a policy's plan."""
        return self.keeper.seconds(subject.execution, devices_of(subject.prepared.plan), glance)

    def slowdowns(self, measured: Sequence[Seconds]) -> dict[str, dict[str, float]]:
        """The mean of some measurements over the calibration, by type of device and part."""
        return slowdowns(measured, self.references)


class Worker:
    """Does runs one after the other.

    Attributes:
        left_out: names of runs that the budget had no room for.
        failed: what ended a run, by its name.
    """

    def __init__(self, config: ExecutionConfig, subjects: Sequence[Subject], shelf: Shelf, pace: MachinePace,
                 watch: Watch) -> None:
        self.config = config
        self.subjects = {subject.label: subject for subject in subjects}
        self.shelf = shelf
        self._pace = pace
        self._watch = watch
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self._simulated: dict[tuple[str, float, int, int, str], Outcome] = {}
        self._capacities: dict[str, float] = {}

    # -- what a run is -------------------------------------------------------------------------------

    def capacity_rps(self, policy: str) -> float | None:
        """As measured the first time."""
        found = self.shelf.find(Run(policy, None, self.config.workload.seed).name)
        return None if found is None else found.capacity_rps

    def rate_rps(self, policy: str, load: float) -> float | None:
        """Of arrivals at a load; None where a capacity is missing."""
        own = self.config.validate.rates == "own"
        found = [self.capacity_rps(name) for name in ([policy] if own else self.subjects)]
        known = [capacity for capacity in found if capacity is not None]
        return load * min(known) if len(known) == len(found) else None

    def load_of(self, run: Run, runs: Sequence[Run]) -> Load | None:
        """Rate, number of requests and seed of a run; None where its rate is not known."""
        rate_rps = None if run.load is None else self.rate_rps(run.policy, run.load)
        if rate_rps is None:
            return None
        return Load(rate_rps, count_of(self.config.validate, rate_rps, self._run_s(runs)), run.seed)

    def _run_s(self, runs: Sequence[Run]) -> float:
        """How long requests arrive in each run: decided once, when capacities are known."""
        if "run_s" not in self.shelf.settings:
            first = [run for run in runs if run.load is not None and run.seed == self.config.workload.seed
                     and not run.turn]
            rates = [self.rate_rps(run.policy, run.load or 0.0) for run in first]
            known = [rate for rate in rates if rate is not None]
            self.shelf.set(run_s=self._watch.run_s(self.config.validate, known))
        return float(self.shelf.settings["run_s"])

    def remaining_s(self, runs: Sequence[Run]) -> float | None:
        """What runs will take together, no more than the budget has; None before capacities are known."""
        if "run_s" not in self.shelf.settings:
            return self._watch.left_s()
        loads = [self.load_of(run, runs) for run in runs if self.shelf.find(run.name) is None]
        need_s = sum(self._watch.expects_s(load.requests or 0, load.rate_rps) for load in loads if load)
        left_s = self._watch.left_s()
        return need_s if left_s is None else max(0.0, min(need_s, left_s))

    # -- doing it --------------------------------------------------------------------------------------

    def do(self, run: Run, runs: Sequence[Run]) -> bool:
        """Do a run, if there is time for it; whether it has been done."""
        load = self.load_of(run, runs)
        if run.load is not None and load is None:
            self.left_out.append(run.name)
            return False
        if not self._watch.fits(self._expects_s(load)):
            self.left_out.append(run.name)
            return False
        try:
            self.shelf.add(self._capacity(run) if load is None else self._measured(run, load))
        except HetisError as error:
            self.failed[run.name] = str(error)
            return False
        return True

    def _expects_s(self, load: Load | None) -> float:
        """What a run will take; one that measures capacity as long as the longest of them so far."""
        if load is not None:
            return self._watch.expects_s(load.requests or 0, load.rate_rps)
        seed = self.config.workload.seed
        known = [self.shelf.find(Run(policy, None, seed).name) for policy in self.subjects]
        return max((kept.took_s for kept in known if kept is not None), default=0.0)

    def _capacity(self, run: Run) -> Kept:
        begun_s, number = time.monotonic(), self.config.validate.capacity_requests
        found = capacity_rps(self.subjects[run.policy], number, run.seed)
        return Kept(run.name, 0.0, number, time.monotonic() - begun_s, capacity_rps=found)

    def _measured(self, run: Run, load: Load) -> Kept:
        subject, begun_s = self.subjects[run.policy], time.monotonic()
        before = self._pace.now(subject)
        moments = Moments(lambda: self._pace.now(subject, glance=True), subject.begin_s)
        outcome = measure(subject, load, moments if before else None)
        ends = [before, self._pace.now(subject)]
        pace = self._pace.slowdowns([seconds for _, seconds in moments.found] if moments.enough else ends)
        took_s = time.monotonic() - begun_s
        self._watch.took(took_s, load.requests or 0, load.rate_rps)
        return Kept(run.name, load.rate_rps, load.requests or 0, took_s, pace, outcome=outcome,
                    moments=plain(moments.found, self._pace.slowdowns))

    # -- in the simulator ------------------------------------------------------------------------------

    def simulated(self, run: Run, kept: Kept, paced: bool = False) -> Outcome:
        """The simulation of a run, at the profile's pace or at that of the machine beside the run."""
        key = (run.policy, kept.rate_rps, kept.count, run.seed, run.name if paced else "")
        if key not in self._simulated:
            load = Load(kept.rate_rps, kept.count, run.seed)
            self._simulated[key] = simulate(self.subjects[run.policy], load,
                                            slowdown_of(kept.pace) if paced else None)
        return self._simulated[key]

    def simulated_capacity_rps(self, policy: str) -> float:
        """What the simulator takes the capacity to be."""
        if policy not in self._capacities:
            self._capacities[policy] = capacity_rps(
                self.subjects[policy], self.config.validate.capacity_requests, self.config.workload.seed,
                simulate)
        return self._capacities[policy]
