"""Totals of a run that has no end: what a monitor reads while it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hetis_exec.holdings import Shipment
from hetis_exec.messages import StageDone
from hetis_exec.places import AnyEngine
from hetis_exec.records import Measurements, StepRecord
from hetis_sim.control.mesh.walk import NodeStep
from hetis_sim.control.state import RequestState, Status
from hetis_sim.control.step import Outcome, Step

LATENCY_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values up to each of some bounds.

    Attributes:
        counts: for each bound, values between the bound before and it; then those beyond all.
        total: sum of the values.
    """

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        place = next((n for n, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += times
        self.total += value * times


class Totals(Measurements):
    """Counts what :class:`Measurements` keeps row by row.

    Attributes:
        requests: ended requests, by their reason; ``length`` for those that have all their tokens.
        prompt_tokens, generated_tokens: of ended requests.
        preemptions, moves: of the same.
        steps: that have ended, by what they compute.
        sent_bytes: of cache that has gone from one device to another, by kind.
        ttft, gap: seconds to the first token, and between tokens.
        device_busy_s: seconds of work of every device.
    """

    def __init__(self, labels: Sequence[str], engines: Sequence[AnyEngine], unit_bytes: int) -> None:
        super().__init__(labels, engines, unit_bytes)
        self.requests: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.prompt_tokens = self.generated_tokens = self.preemptions = self.moves = 0
        self.ttft, self.gap = Histogram(), Histogram()
        self.device_busy_s = [0.0] * len(labels)

    def tokens(self, instance: int, lane: int, fresh: Sequence[RequestState], decoding: int,
               now_s: float) -> None:
        if decoding > len(fresh):
            self.gap.add(now_s - self._last_token_s[instance, lane], decoding - len(fresh))
        for state in fresh:
            self.gap.add(now_s - state.last_token_s)
        self._last_token_s[instance, lane] = now_s

    def step(self, step: Step, begun_s: float, ended_s: float, stages: Sequence[StageDone]) -> None:
        self.steps[step.kind.name.lower()] += 1

    def node_step(self, step: NodeStep, track: int, made: int, record: StepRecord, now_s: float,
                  done: StageDone) -> None:
        self.steps[step.kind.name.lower()] += 1

    def busy(self, done: StageDone) -> None:
        self.device_busy_s[done.device] += done.times.dense_s + done.times.attention_s
        for device, seconds in done.worker_busy_s:
            self.device_busy_s[device] += seconds

    def gaps(self, outcome: Outcome) -> None:
        for gap_s in outcome.gaps_s:
            self.gap.add(gap_s)

    def shipment(self, shipment: Shipment, now_s: float) -> None:
        self.sent_bytes[shipment.kind] += int(sum(size for _, _, size in shipment.flows))

    def ended(self, state: RequestState) -> None:
        self.requests[state.reason or "length"] += 1
        if state.first_token_s == state.first_token_s:
            self.ttft.add(state.first_token_s - state.request.arrival_s)
        if state.status == Status.FINISHED or state.generated_base:
            self.prompt_tokens += state.request.prompt_tokens
            self.generated_tokens += state.generated_base
        self.preemptions += state.preemptions
        self.moves += state.moves

    def sample(self, now_s: float, outside: int) -> None:
        """Nothing is kept of the past."""

    def peaks(self) -> None:
        """Nothing is kept of the past."""

    def caches(self) -> list[tuple[str, int, int]]:
        """Cache of every device: label, bytes in use and bytes there are."""
        found = []
        for engine in self._engines:
            for d, device in enumerate(engine.plan.devices):
                found.append((self.recorder.devices[device], engine.books.ledger.used[d] * self._unit_bytes,
                              engine.books.ledger.capacity[d] * self._unit_bytes))
        return found
