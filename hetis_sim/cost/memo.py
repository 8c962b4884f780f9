"""Answers repeated questions from memory, for any cost model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from hetis_sim.cost.model import AttentionCost, CostModel, TransferCost
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import require
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

# Entries after which a table is dropped, so that a long sweep cannot fill the memory.
TABLE_LIMIT = 2_000_000


class MemoisedCost(CostModel):
    """Memory in front of the hooks ``_dense_layer_s`` etc. that a subclass computes.

    Keys hold the identity of the spec objects, because hashing a dataclass of twenty fields
    costs more than the look-up; ``_alive`` keeps those objects so that an identity is never
    reused. Arguments are validated once, on a miss.

    Attributes:
        cache_copies: times that an engine whose cache is not paged copies all of it in an iteration.
        cache_copy_bytes_per_s: bytes that a card reads and writes in a second while it copies; 0 for the
            rate at which decode attention reads.
    """

    cache_copies = 0.0
    cache_copy_bytes_per_s = 0.0

    def __init__(self) -> None:
        self._alive: dict[int, object] = {}
        self._dense: dict[tuple[int, int, int, int], float] = {}
        self._head: dict[tuple[int, int, int, int], float] = {}
        self._prefill: dict[tuple[int, int, int, int, int], float] = {}
        self._decode: dict[tuple[int, int], AttentionCost] = {}
        self._transfer: dict[int, TransferCost] = {}
        self._reduce: dict[tuple[int, int, int, int], float] = {}

    def dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        key = (id(gpu), id(model), tokens, tp)
        found = self._dense.get(key)
        if found is None:
            self._admit(gpu, model)
            _require_counts(tokens, tp)
            found = self._dense[key] = self._dense_layer_s(gpu, model, tokens, tp) if tokens else 0.0
        return found

    def head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        key = (id(gpu), id(model), tokens, tp)
        found = self._head.get(key)
        if found is None:
            self._admit(gpu, model)
            _require_counts(tokens, tp)
            found = self._head[key] = self._head_s(gpu, model, tokens, tp) if tokens else 0.0
        return found

    def prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                  new_tokens: int, context_tokens: int) -> float:
        key = (id(gpu), id(model), query_heads, new_tokens, context_tokens)
        found = self._prefill.get(key)
        if found is None:
            self._admit(gpu, model)
            require(query_heads >= 0, "query_heads", query_heads, ">= 0")
            require(context_tokens >= 0, "context_tokens", context_tokens, ">= 0")
            require(new_tokens >= 0, "new_tokens", new_tokens, ">= 0")
            found = 0.0
            if query_heads and new_tokens:
                found = self._prefill_attention_layer_s(gpu, model, query_heads, new_tokens, context_tokens)
            self._prefill[key] = found
        return found

    def decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        key = (id(gpu), id(model))
        found = self._decode.get(key)
        if found is None:
            self._admit(gpu, model)
            found = self._decode_attention(gpu, model)
            if self.cache_copies:
                rate = self.cache_copy_bytes_per_s
                pass_s = 1.0 / rate if rate else found.b_s_per_byte
                found = replace(found, b_s_per_byte=found.b_s_per_byte + 2.0 * self.cache_copies * pass_s,
                                lone=None)
            self._decode[key] = found
        return found

    def transfer(self, link: LinkSpec) -> TransferCost:
        found = self._transfer.get(id(link))
        if found is None:
            self._admit(link)
            found = self._transfer[id(link)] = self._transfer_cost(link)
        return found

    def all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        key = (id(gpu), id(link), size_bytes, ranks)
        found = self._reduce.get(key)
        if found is None:
            self._admit(gpu, link)
            require(ranks >= 1, "ranks", ranks, ">= 1")
            require(size_bytes >= 0, "size_bytes", size_bytes, ">= 0")
            found = 0.0
            if ranks > 1 and size_bytes:
                found = self._all_reduce_s(gpu, link, size_bytes, ranks)
            self._reduce[key] = found
        return found

    def _admit(self, *specs: object) -> None:
        """Keep ``specs`` alive; forget everything when a table has grown past the limit."""
        if max(len(self._dense), len(self._prefill), len(self._reduce), len(self._alive)) > TABLE_LIMIT:
            for table in (self._alive, self._dense, self._head, self._prefill, self._decode,
                          self._transfer, self._reduce):
                table.clear()
        for spec in specs:
            self._alive[id(spec)] = spec

    @abstractmethod
    def _dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float: ...

    @abstractmethod
    def _head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float: ...

    @abstractmethod
    def _prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                   new_tokens: int, context_tokens: int) -> float: ...

    @abstractmethod
    def _decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost: ...

    @abstractmethod
    def _transfer_cost(self, link: LinkSpec) -> TransferCost: ...

    @abstractmethod
    def _all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float: ...


def _require_counts(tokens: int, tp: int) -> None:
    require(tokens >= 0, "tokens", tokens, ">= 0")
    require(tp >= 1, "tp", tp, ">= 1")
