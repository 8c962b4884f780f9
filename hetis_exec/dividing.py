"""Decode attention of one rank's batches: heads that go to attention workers, and those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hetis_exec.backend import Joining, Part, Tensor
from hetis_exec.batches import Batch
from hetis_exec.messages import AttentionBatch, AttentionRequest, AttentionResult
from hetis_exec.shares import Share
from hetis_exec.workers import Worker


class Found(NamedTuple):
    """Attention of the heads that stay: of whole contexts, and of parts of divided ones; None for nothing."""

    whole: Tensor | None = None
    parts: Part | None = None


class DividedHeads:
    """Sends heads off, attends to those that stay, and puts all of them together.

    Args:
        worker: of the rank.
        stage: that it is in.
    """

    def __init__(self, worker: Worker, stage: int) -> None:
        self._worker = worker
        self._cache = worker.cache
        self._kernels = worker.cache.pool.kernels
        self._stage = stage

    def tell(self, batch: Batch) -> None:
        """Tell attention workers what they are going to be asked about."""
        for device, share in batch.remote.items():
            self._worker.send(device, AttentionBatch(batch.seq, self._worker.device, self._stage,
                                                     tuple(share.items), tuple(share.parts)))

    def send(self, batch: Batch, layer: int, heads: Sequence[Tensor]) -> list[Tensor]:
        """Ask attention workers for their heads of a layer.

        Args:
            heads: queries, keys and values of all.

        Returns:
            Those of the heads that stay; empty where none do.
        """
        worker = self._worker
        arrays = self._kernels.host(heads) if batch.remote else None
        for device, share in batch.remote.items():
            if arrays is not None and share.is_view and not worker.keeps(device):
                # Slices of arrays take a fraction of the time of slices of tensors.
                sent = [pick(x) for pick, x in zip(share.picks, arrays, strict=True)]
            else:
                sent = worker.packed(device, [pick(x) for pick, x in zip(share.picks, heads, strict=True)])
            worker.send(device, AttentionRequest(batch.seq, worker.device, layer, *sent))
        local = batch.local
        if not local.items and not local.parts:
            return []
        return [pick(x) for pick, x in zip(local.picks, heads, strict=True)]

    def attend(self, batch: Batch, layer: int, picked: Sequence[Tensor]) -> Found:
        """Decode attention of the heads that stay, and of the tokens of divided ones that do."""
        local, cache = batch.local, self._cache
        if not picked:
            return Found()
        if not local.parts:
            return Found(cache.decode_attention(batch.plan, layer, *picked))
        (q, k, v), rows = picked, local.plain
        whole = cache.decode_attention(batch.plan, layer, q[:rows], k[:rows], v[:rows]) if rows else None
        return Found(whole, cache.decode_parts(batch.parts_plan, layer, q[rows:], k[rows:], v[rows:]))

    def put(self, local: Share, attended: Tensor, found: Found, joining: Joining | None) -> Tensor:
        """All that has been attended, with what has been found here."""
        if found.whole is not None:
            arrays = self._kernels.host((attended, found.whole)) if local.block is not None else None
            if arrays is not None:
                local.put(*arrays)
            else:
                attended = local.put(attended, found.whole)
        if found.parts is not None and joining is not None:
            joining.add(local.joined, found.parts)
        return attended

    def take(self, share: Share, attended: Tensor, result: AttentionResult,
             joining: Joining | None) -> Tensor:
        """All that has been attended, with the answer of an attention worker."""
        kernels = self._kernels
        if share.block is not None and isinstance(result.values, np.ndarray):
            arrays = kernels.host((attended,))
            if arrays is not None:
                share.put(arrays[0], result.values)
                return attended
        values = kernels.from_wire(result.values)
        attended = share.put(attended, values[:share.plain])
        if joining is not None and result.sums is not None:
            joining.add(share.joined, (values[share.plain:], kernels.from_wire(result.sums)))
        return attended
