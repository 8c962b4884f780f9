"""What a driver calls while it runs; everything becomes tables at the end."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hetis_sim.metrics.columns import (
    ITL,
    REQUEST,
    STATUSES,
    STEP,
    STEP_KINDS,
    TRANSFER,
    TRANSFER_KINDS,
    Table,
)
from hetis_sim.metrics.itl import Segments
from hetis_sim.metrics.records import Records, WireTraffic
from hetis_sim.spec.errors import SpecError, require

if TYPE_CHECKING:
    import pandas as pd

SAMPLES_MAX = 2000
FIRST_INTERVAL_S = 2.0**-7

_pack_step = STEP.pack
_pack_itl = ITL.pack
_pack_transfer = TRANSFER.pack
_pack_request = REQUEST.pack
_transfer_code = {kind: code for code, kind in enumerate(TRANSFER_KINDS)}
_status_code = {status: code for code, status in enumerate(STATUSES)}


class Recorder:
    """Collects the rows of one run.

    :meth:`step` and :meth:`itl` are called for every event of a run and cost well under a
    microsecond; nothing here reads a clock.

    Args:
        devices: one label for each device id.
        capacity_bytes: cache capacity of each device.

    Attributes:
        next_sample_s: before this time :meth:`sample` keeps nothing, so callers may skip it.
        busy_s: seconds of work of each device so far; drivers may add to it directly.

    Raises:
        SpecError: labels and capacities of different number.
    """

    def __init__(self, *, devices: Sequence[str] = (), capacity_bytes: Sequence[float] = ()) -> None:
        require(len(devices) == len(capacity_bytes), "capacity_bytes", list(capacity_bytes),
                f"one number for each of {len(devices)} devices")
        self.devices = tuple(devices)
        self.capacity_bytes = tuple(float(size) for size in capacity_bytes)
        self.busy_s = [0.0] * len(devices)
        self.peak_bytes = [0.0] * len(devices)
        self.counters: dict[str, float] = {}
        self._wires: list[WireTraffic] = []
        self.next_sample_s = -math.inf
        self._interval_s = FIRST_INTERVAL_S
        self._samples = array("d")
        self._steps = bytearray()
        self._itl = bytearray()
        self._transfers = bytearray()
        self._requests = bytearray()
        self._reasons: dict[str, int] = {"": 0}
        # Gaps carry no time of their own: (time, bytes of gaps so far) at the end of each request dates them.
        self._mark_s = array("d")
        self._mark_bytes = array("q")

    def step(self, instance: int, lane: int, kind: int, start_s: float, end_s: float, iterations: int,
             requests: int, prefill_tokens: int, decode_tokens: int,
             host_s: float, dense_s: float, collective_s: float, attention_s: float, head_transfer_s: float,
             hop_s: float, waiting_s: float) -> None:
        """Keep one step of one lane; it may stand for several equal decode iterations.

        Steps of one lane do not overlap. The parts are sums over the step's iterations of what
        lies on its critical path, so that together they make ``end_s - start_s``.

        Args:
            instance: which replica.
            lane: which of its micro-batches.
            kind: 0 prefill, 1 decode, 2 both.
            start_s: begin, in seconds since the start of the run.
            end_s: end of its last iteration.
            iterations: how many it stands for.
            requests: in the batch, of each iteration.
            prefill_tokens: prompt tokens computed in the whole step.
            decode_tokens: tokens decoded in the whole step, over all iterations.
            host_s: between kernels.
            dense_s: dense modules.
            collective_s: tensor-parallel collectives.
            attention_s: prefill and decode attention.
            head_transfer_s: queries and outputs of remote heads on the links.
            hop_s: activations between pipeline stages.
            waiting_s: for a busy stage or link.
        """
        self._steps += _pack_step(instance, lane, kind, start_s, end_s, iterations, requests, prefill_tokens,
                                  decode_tokens, host_s, dense_s, collective_s, attention_s, head_transfer_s,
                                  hop_s, waiting_s)

    def itl(self, first_s: float, last_s: float, count: int, weight: int) -> None:
        """Keep ``count`` gaps between tokens, linear from ``first_s`` to ``last_s``.

        ``weight`` requests feel each of them.
        """
        self._itl += _pack_itl(first_s, last_s, count, weight)

    def transfer(self, request_id: int, kind: str, start_s: float, end_s: float, size_bytes: float,
                 source: int, target: int) -> None:
        """Keep one transfer of cache between two places.

        Args:
            request_id: whose cache.
            kind: ``push``, ``move``, ``swap_out``, ``swap_in`` or ``handoff``.
            start_s: begin, in seconds since the start of the run.
            end_s: when the last byte is there.
            size_bytes: bytes moved.
            source: id of the device they leave; ``-1 - h`` for the memory of host h.
            target: likewise, where they go.

        Raises:
            SpecError: an unknown kind.
        """
        if kind not in _transfer_code:
            raise SpecError("transfer.kind", kind, f"one of {', '.join(TRANSFER_KINDS)}")
        self._transfers += _pack_transfer(request_id, _transfer_code[kind], start_s, end_s, size_bytes,
                                          source, target)

    def request(self, *, request_id: int, arrival_s: float, prompt_tokens: int, output_tokens: int,
                status: str, reason: str, instance: int, first_scheduled_s: float, first_token_s: float,
                finish_s: float, preemptions: int, moves: int, moved_bytes: float,
                remote_share: float) -> None:
        """Keep one request, once, when it has ended.

        Times are seconds since the start of the run, nan where they never happened; see
        ``docs/metrics.md`` for where each clock is read.

        Args:
            request_id: unique.
            arrival_s: as submitted.
            prompt_tokens: as submitted.
            output_tokens: as submitted.
            status: ``finished`` or ``rejected``.
            reason: of a rejection, in a word (``context_limit``); empty otherwise.
            instance: where it ran, -1 for nowhere.
            first_scheduled_s: begin of the first step that computes part of its prompt.
            first_token_s: end of the step that computed the last part.
            finish_s: when the last token is there; of a rejected request when it left the
                system, if that was after its arrival.
            preemptions: times it lost its cache or had it swapped out.
            moves: times its heads changed device.
            moved_bytes: cache moved by those moves.
            remote_share: share of its cache that attention workers hold, after its last placement or move.

        Raises:
            SpecError: an unknown status.
        """
        if status not in _status_code:
            raise SpecError("request.status", status, f"one of {', '.join(STATUSES)}")
        code = self._reasons.setdefault(reason, len(self._reasons))
        self._requests += _pack_request(
            request_id, arrival_s, prompt_tokens, output_tokens, _status_code[status], code, instance,
            first_scheduled_s, first_token_s, finish_s, preemptions, moves, moved_bytes, remote_share)
        if not math.isnan(finish_s):
            self._mark_s.append(finish_s)
            self._mark_bytes.append(len(self._itl))

    def sample(self, now_s: float, running: int, waiting: int, used_bytes: Sequence[float],
               heads: Sequence[float] = ()) -> None:
        """Look at the system: requests running and waiting, cache in use and heads on every device.

        At most one look is kept in each interval of a grid over the run's own time. The grid
        starts at 1/128 s and doubles whenever more than 2000 looks are held, so what is kept
        depends on nothing but the times of the calls.

        Args:
            now_s: seconds since the start of the run.
            running, waiting: requests.
            used_bytes: per device.
            heads: per device, averaged over the layers of the model; empty where nobody counts them.
        """
        if now_s < self.next_sample_s:
            return
        samples = self._samples
        samples.extend([now_s, running, waiting, *used_bytes, *self.busy_s,
                        *(heads or [math.nan] * len(self.devices))])
        if len(samples) > SAMPLES_MAX * self._sample_width:
            self._thin_samples()
        self.next_sample_s = (math.floor(now_s / self._interval_s) + 1) * self._interval_s

    def busy(self, device: int, seconds: float) -> None:
        """Add time in which a device computes."""
        self.busy_s[device] += seconds

    def peak(self, device: int, used_bytes: float) -> None:
        """Tell the most cache a device ever held; samples alone may miss it."""
        self.peak_bytes[device] = max(self.peak_bytes[device], used_bytes)

    def wire(self, name: str, bandwidth_bytes_per_s: float, size_bytes: Mapping[str, float]) -> None:
        """Tell, once and at the end, what a wire has carried in the whole run, by kind (``WIRE_KINDS``)."""
        self._wires.append(WireTraffic(name, bandwidth_bytes_per_s, dict(size_bytes)))

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0) + amount

    @property
    def _sample_width(self) -> int:
        return 3 + 3 * len(self.devices)

    def _thin_samples(self) -> None:
        rows = np.array(self._samples).reshape(-1, self._sample_width)
        while len(rows) > SAMPLES_MAX // 2:
            self._interval_s *= 2
            cells = np.floor(rows[:, 0] / self._interval_s)
            rows = rows[np.concatenate(([True], cells[1:] != cells[:-1]))]
        self._samples = array("d", rows.tobytes())

    def records(self) -> Records:
        """Everything recorded so far, as tables; recording may go on."""
        return Records(
            requests=self._request_table(),
            steps=Table(STEP.columns(self._steps), {"kind": STEP_KINDS}),
            transfers=Table(TRANSFER.columns(self._transfers), {"kind": TRANSFER_KINDS}),
            samples=self._sample_table(),
            itl=self._segments(),
            devices=self.devices, capacity_bytes=self.capacity_bytes,
            busy_s=tuple(self.busy_s), peak_bytes=tuple(self.peak_bytes), counters=dict(self.counters),
            wires=tuple(self._wires),
        )

    def _request_table(self) -> Table:
        raw = REQUEST.columns(self._requests)
        order = np.lexsort((raw["request_id"], raw["arrival_s"]))
        names = sorted(self._reasons)
        to_sorted = np.array([names.index(reason) for reason in self._reasons])
        raw["reason"] = to_sorted[raw["reason"]]
        table = Table(raw, {"status": STATUSES, "reason": tuple(names)}).rows(order)
        return derive_latencies(table)

    def _sample_table(self) -> Table:
        rows = np.array(self._samples).reshape(-1, self._sample_width)
        ids = range(len(self.devices))
        columns = {"now_s": rows[:, 0], "running": rows[:, 1].astype(np.int64),
                   "waiting": rows[:, 2].astype(np.int64)}
        columns |= {f"used_bytes_{i}": rows[:, 3 + i] for i in ids}
        columns |= {f"busy_s_{i}": rows[:, 3 + len(ids) + i] for i in ids}
        columns |= {f"heads_{i}": rows[:, 3 + 2 * len(ids) + i] for i in ids}
        return Table({name: np.ascontiguousarray(values) for name, values in columns.items()})

    def _segments(self) -> Segments:
        columns = ITL.columns(self._itl)
        marks_s = np.append(np.array(self._mark_s), np.inf)
        marks = np.array(self._mark_bytes, dtype=np.int64) // ITL.size_bytes
        rows = np.arange(len(columns["count"]))
        recorded_s = marks_s[np.searchsorted(marks, rows, side="right")]
        return Segments.of(columns["first_s"], columns["last_s"], columns["count"], columns["weight"],
                           recorded_s)

    def requests(self) -> pd.DataFrame:
        """One row per ended request in order of arrival, with ttft_s, tpot_s, e2el_s and queue_s."""
        return self._request_table().to_pandas()

    def steps(self) -> pd.DataFrame:
        """One row per step in the order of recording."""
        return Table(STEP.columns(self._steps), {"kind": STEP_KINDS}).to_pandas()

    def transfers(self) -> pd.DataFrame:
        """One row per transfer in the order of recording."""
        return Table(TRANSFER.columns(self._transfers), {"kind": TRANSFER_KINDS}).to_pandas()

    def samples(self) -> pd.DataFrame:
        """State of the system over time: at most 4000 rows.

        ``used_bytes_i`` is the cache in use on device i, ``busy_s_i`` its seconds of work so far,
        ``heads_i`` the query heads that it holds, averaged over the layers of the model.
        """
        return self._sample_table().to_pandas()


def derive_latencies(requests: Table) -> Table:
    """Add the latencies of finished requests, in seconds; nan for the rejected.

    ``tpot_s`` is nan for a single output token.
    """
    finished = requests["status"] == STATUSES.index("finished")
    arrival_s, first_token_s = requests["arrival_s"], requests["first_token_s"]
    gaps = requests["output_tokens"] - 1
    several = finished & (gaps >= 1)
    decoding_s = requests["finish_s"] - first_token_s
    columns = dict(requests.columns)
    columns["queue_s"] = requests["first_scheduled_s"] - arrival_s
    columns["ttft_s"] = np.where(finished, first_token_s - arrival_s, np.nan)
    columns["tpot_s"] = np.where(several, decoding_s / np.maximum(gaps, 1), np.nan)
    columns["e2el_s"] = np.where(finished, requests["finish_s"] - arrival_s, np.nan)
    return Table(columns, requests.categories)
