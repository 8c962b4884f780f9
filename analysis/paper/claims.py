"""What the paper states, quantity by quantity."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Hetis: Serving LLMs in Heterogeneous GPU Clusters with Fine-grained and Dynamic Parallelism (SC '25)"


@dataclass(frozen=True)
class Claim:
    """One quantity.

    Attributes:
        key: for the rows that answer it.
        quantity: in words.
        value: as the paper states it; empty where it states none, and the row is ours.
        number: the same as a number; None where there is none to compare with.
        section: of this evaluation, that measures it.
    """

    key: str
    quantity: str
    value: str
    number: float | None
    section: str


CLAIMS = (
    Claim("throughput-splitwise", "Throughput, Hetis over Splitwise", "up to 2.25x", 2.25, "serving"),
    Claim("throughput-hexgen", "Throughput, Hetis over HexGen", "up to 1.33x", 1.33, "serving"),
    Claim("throughput-others", "Throughput at the SLO, Hetis over other systems", "", None, "serving"),
    Claim("ttft-splitwise", "P95 TTFT, Splitwise over Hetis", "up to 1.47x", 1.47, "latency"),
    Claim("ttft-hexgen", "P95 TTFT, HexGen over Hetis", "up to 1.22x", 1.22, "latency"),
    Claim("tpot", "P95 TPOT, a baseline over Hetis (which one is not known to us)", "up to 1.39x", 1.39,
          "latency"),
    Claim("dense", "Latency of dense modules, a baseline over Hetis", "up to 1.29x", 1.29, "latency"),
    Claim("attention", "Latency of decode attention, a baseline over Hetis", "up to 1.49x", 1.49, "latency"),
    Claim("cache", "Usable KV cache, Hetis over a baseline", "up to 1.87x", 1.87, "serving"),
    Claim("offload", "One attention worker: cost of offloading, by sequence over by head", "2.68x", 2.68,
          "devices"),
    Claim("workers", "Attention latency, one over four attention workers", "3.55x", 3.55, "devices"),
    Claim("gap-mlp", "P100 over A100: prefill MLP", "24.5x", 24.5, "devices"),
    Claim("gap-decode", "P100 over A100: decode", "7.93x", 7.93, "devices"),
    Claim("gap-dense", "P100 over A100: a dense operation of Llama-70B", "40.4x", 40.4, "devices"),
    Claim("gap-memory", "A100 over P100: memory", "6.67x", 6.67, "devices"),
    Claim("accuracy-attention", "Accuracy of the linear attention model", "up to 93.8 %", 93.8, "devices"),
    Claim("accuracy-transfer", "Accuracy of the linear transfer model", "92.4 to 96.1 %", 96.1, "devices"),
    Claim("search-testbed", "Search for a plan, testbed", "about 4 s", 4.0, "search"),
    Claim("search-large", "Search for a plan, 5 kinds x 32 GPUs", "about 15 s", 15.0, "search"),
    Claim("roles", "Primary workers for Llama-70B", "A100 and RTX 3090", None, "delta"),
    Claim("delta", "Delta: least improvement for which a kind of card does dense work", "5 %", 0.05, "delta"),
    Claim("theta", "Theta: deviation from the ideal at which heads move", "50 %", 0.5, "theta"),
    Claim("errors", "Coefficients wrong by up to 20 %: latency lost", "at most 6.9 %", 6.9, "errors"),
    Claim("eviction", "Eviction by benefit or LIFO, ShareGPT at 5 requests/s", "", None, "eviction"),
    Claim("redispatch", "Redispatch on or off", "", None, "eviction"),
    Claim("storage", "Head-wise cache blocks: storing, fetching", "+13 %, -26 %", None, ""),
)
