"""Cache on its way to the memory of its host and back, as it goes when a request is swapped out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.kvcache import KvPool, TableKey

COPY_TOKENS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cached:
    """Tables of requests 0, 1, ... in a pool, as a bench has filled them.

    Attributes:
        tokens: of each request.
        groups: KV groups of each; all layers have them.
        token_bytes: of one token in all groups and layers.
    """

    pool: KvPool
    tokens: dict[int, int]
    groups: int
    token_bytes: int

    def _there_and_back(self, request: int, tokens: int) -> float:
        """Seconds to copy a request's first tokens out of its tables and into them again."""
        pool, groups = self.pool, tuple(range(self.groups))
        pool.kernels.synchronize()
        begun_s = time.perf_counter()
        keys, values = pool.leave(request, 0, groups, 0, tokens, slice(None)).arrays()
        k, v = (pool.kernels.from_wire(x) for x in (keys, values))
        spots = pool.spots([TableKey(request, 0, g) for g in groups], 0, tokens)
        pool.write_groups(spots, slice(None), k, v)
        pool.kernels.synchronize()
        return time.perf_counter() - begun_s

    def samples(self, kind: str, model: str, repeats: int, tick: Callable[[], None]) -> Samples:
        """Round trips by size; requests take turns, so that none is found in a cache."""
        found: Samples = []
        for turn in range(1 + repeats):
            for tokens in COPY_TOKENS:
                long = [request for request, most in self.tokens.items() if most >= tokens]
                if not long:
                    continue
                seconds = self._there_and_back(long[turn % len(long)], tokens)
                point = Point("host_copy", kind, model, size_bytes=2 * tokens * self.token_bytes, messages=2)
                # The first time allocates.
                found += [Sample(point, seconds)] if turn else []
                tick()
        return found
