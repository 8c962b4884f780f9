"""Cache of prompts that will live elsewhere: it leaves layer by layer, as soon as a layer has it."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_exec.backend import Tensor
from hetis_exec.messages import CacheData, Onward, Row, Span
from hetis_exec.shares import columns_of
from hetis_exec.workers import Worker


class LeavingCache:
    """Sends what one rank has computed.

    Args:
        worker: of the rank.
        stage: that it is in.
        groups: KV groups that it owns.
    """

    def __init__(self, worker: Worker, stage: int, groups: Sequence[int]) -> None:
        self._worker = worker
        self._stage = stage
        self._groups = groups

    def send(self, seq: int, layer: int, row: Row, keys: Tensor, values: Tensor) -> None:
        """Send what of a prompt's layer will live elsewhere; keys and values of all groups."""
        if row.push_tag >= 0:
            self._push(seq, layer, row, keys, values)
        for onward in row.onward:
            self._send_onward(onward, layer, row.request_id, keys, values)

    def _push(self, seq: int, layer: int, row: Row, keys: Tensor, values: Tensor) -> None:
        """To attention workers and other ranks."""
        worker, first = self._worker, 0
        for last, holders in (*row.older, Span(row.position + row.new_tokens, row.holders)):
            for device, columns in columns_of(holders, self._groups) if last > first else ():
                if device != worker.device:
                    groups = tuple(self._groups[n] for n in columns)
                    k, v = worker.packed(device, [x[columns][None, :, first:last] for x in (keys, values)],
                                         bulk=True)
                    worker.send(device, CacheData(seq, row.push_tag, row.request_id, self._stage, (layer,),
                                                  groups, first, k, v, False))
            first = last

    def _send_onward(self, onward: Onward, layer: int, request_id: int, keys: Tensor, values: Tensor) -> None:
        """To the instance that will decode the request."""
        abroad = onward.abroad
        at = layer - abroad.first
        if onward.source != self._worker.device or not 0 <= at < abroad.layers:
            return
        columns = [self._groups.index(g) for g in onward.groups]
        k, v = self._worker.packed(onward.target, [x[columns][None] for x in (keys, values)], bulk=True)
        self._worker.send(onward.target, CacheData(abroad.after, onward.tag, request_id, abroad.stage,
                                                   (abroad.at + at,), onward.groups, 0, k, v, False))
