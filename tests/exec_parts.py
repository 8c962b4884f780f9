"""Attention in parts, for kernels of any kind: each row's cache is divided over three tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from exec_kernels import torch

from hetis_exec.kvcache import KvPool, Table, TableKey


def divided(pool: KvPool, keys: Sequence[TableKey],
            lengths: Sequence[int]) -> tuple[list[Table], list[int], list[int]]:
    """Tables of parts, the positions that kernels are told, and the row that each belongs to.

    Those with the new token come first. Of every row the first block is one part, and each second one
    of the others but the last another one.
    """
    tails, ranges = [], []
    for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        units, last = pool.table(key).units, length // pool.block_tokens
        odd = [n for n in range(1, last) if n % 2]
        even = [n for n in range(1, last + 1) if n not in odd]
        if last == 0:
            even = [0]
        newest = (len(even) - 1) * pool.block_tokens + length % pool.block_tokens
        tails.append((Table(units[:, even], 0), newest, row))
        ranges += [(Table(units[:, blocks], 0), -1 - len(blocks) * pool.block_tokens, row)
                   for blocks in ([0], odd) if blocks and last]
    tables, positions, rows = zip(*tails, *ranges, strict=True)
    return list(tables), list(positions), list(rows)


def joined_parts(kernels: Any, pool: KvPool, keys: Sequence[TableKey], lengths: Sequence[int],
                 queries: Any, new: Callable[[TableKey], tuple[Any, Any]], layer: int,
                 splits: int | None = None) -> Any:
    """Attention of all rows, in parts that are joined; of so many pieces each, if given."""
    tables, positions, rows = divided(pool, keys, lengths)
    plan = kernels.plan_parts(tables, positions)
    if splits is not None:
        plan = cut(kernels.paged, plan, splits)
    k, v = (torch.stack(parts) for parts in zip(*[new(key) for key in keys], strict=True))
    values, sums = kernels.decode_parts(plan, layer, queries[list(rows)], k, v)
    joining = kernels.joining(len(keys), queries)
    for piece in _pieces(rows):
        joining.add((torch.tensor([rows[n] for n in piece], device=queries.device),),
                    (values[piece], sums[piece]))
    return joining.result()


def cut(paged: Any, plan: Any, splits: int | None) -> Any:
    """The plan of a CUDA device with the longest of its rows in so many pieces."""
    if splits is None:
        return plan
    at = plan.positions.cpu().numpy()
    cached = np.where(at < 0, -1 - at, at)
    found = paged.cut(cached, max(1, -(-plan.longest // splits)), len(at) * splits)
    pieces, runs = (torch.from_numpy(part).to(plan.spans.device) for part in found)
    return replace(plan, pieces=pieces, runs=runs)


def _pieces(rows: Sequence[int]) -> list[list[int]]:
    """Parts as several devices would have them: no row twice."""
    pieces: list[list[int]] = []
    for n, row in enumerate(rows):
        home = next((piece for piece in pieces if row not in [rows[m] for m in piece]), None)
        if home is None:
            pieces.append([n])
        else:
            home.append(n)
    return pieces
