"""What TGIS did in October 2023, as settings of the simulator.

The records carry times of October 2023; the code is that of github.com/IBM/text-generation-inference
at that time (PyTorch 2.0 or 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping

from hetis_sim.spec.gpus import GPUS

PATIENCE = 12
PREFILL_TOKENS = 8192
HOST_BASE_S = 1.5e-3
HOST_PER_SEQUENCE_S = 270e-6
LAUNCH_S = 280e-6
COLLECTIVES_S = 60e-6

PROMPT_STEP_S = 0.6e-3
"""Tokeniser call, and the operations that bring two batches together."""

PER_PROMPT_S = 0.35e-3
"""At the prices of ``SETTINGS``: 0.1 ms of tokenisation (100 tokens; measured with a byte-pair tokeniser of
12,000 words, 0.08 to 0.16 ms), a list sent to the device and padded there (0.08 ms), the sampling object and
the messages (0.1 ms), two more numbers fetched from the device (0.05 ms), and views."""

GRAPH_SHARE, GRAPH_S = 0.044, 65e-3
"""Prompts on one card for which a CUDA graph of the sampling is recorded, and how long that takes."""

CACHE_COPIES: Mapping[int, float] = {1: 0.0, 2: 1.1, 4: 1.4, 8: 1.5, 16: 1.7, 32: 1.9, 64: 2.0, 128: 2.0}
"""Copies in an iteration, by users: one in each of several requests, one after some have ended, one after new
ones have come."""

INTEGER_RATE: Mapping[str, float] = {
    "H100": 132 * 64 * 1.98e9, "A100": 108 * 64 * 1.41e9, "A10": 72 * 64 * 1.695e9, "T4": 40 * 64 * 1.59e9}
"""Integer instructions a second: multiprocessors, integer lanes, boost clock (NVIDIA's whitepapers)."""

INSTRUCTIONS_PER_ELEMENT = 36
"""Of a copy between two strided tensors of two axes: for each axis a division by multiplication, shift and
remainder, and two offsets (12, a high product counting twice), addresses, bounds and loop (12)."""

COPIED_SHARE = 0.8
"""Of the bandwidth of memory, where that is the limit."""

HOST_FACTOR: Mapping[str, float] = {"H100": 1.0, "A100": 1.4, "A10": 1.4, "T4": 1.4}
"""Hosts of older cards, against those of 2023: Intel states 1.18 times the instructions a cycle for the cores
of 2021 over those of 2017 to 2020, and 1.19 for those of 2023 over these. Which hosts there were is not
known."""

CLIENT_S: Mapping[str, float] = {"H100": 5e-3, "A100": 13e-3, "A10": 14e-3, "T4": 15e-3}
"""From asking to being in the queue: time to the first message of a request in the records of one user."""

SETTINGS = (
    ("prompts hold up decoding",
     f"scheduler.chunked_prefill=false, scheduler.max_batch_tokens={PREFILL_TOKENS}",
     "TGIS, router/src/batcher.rs: prefill, then concatenate; batch_types.rs (default_max_prefill_weight)"),
    ("when prompts that wait may do so",
     f"scheduler.prompt_patience={PATIENCE}",
     "the same file; the launcher's default is 24, but in the records 18 of 64 come in after seven "
     "iterations, and nobody waits for more than ten, as with MAX_WAITING_TOKENS=12"),
    ("no pause for decoding after prompts",
     "scheduler.prompt_pause_share=0",
     "it came with commit b0d32ef of January 2024; the records are of October 2023"),
    ("share of memory",
     "scheduler.memory_utilization=0.95",
     "the margin of 20 % (BATCH_SAFETY_MARGIN, the launcher's default) is of what weights leave; nobody is "
     "preempted here"),
    ("the cache is copied in each iteration of several requests, again after requests have ended, and again "
     "after new ones have come",
     "cost.cache_copies, by users: " + ", ".join(f"{u}: {copies:g}" for u, copies in CACHE_COPIES.items()),
     "flash_causal_lm.py (generate_token, prune, concatenate); how often requests end and come is counted "
     "in the records"),
    ("rate of these copies",
     "cost.cache_copy_bytes_per_s: " + ", ".join(f"{rate / 1e12:.2g} TB/s on {card}" for card, rate in (
         ("H100", 4 * INTEGER_RATE["H100"] / INSTRUCTIONS_PER_ELEMENT),
         ("A100", 4 * INTEGER_RATE["A100"] / INSTRUCTIONS_PER_ELEMENT)))
     + f"; {COPIED_SHARE:.0%} of the bandwidth on A10 and T4",
     f"torch.cat takes five axes one tensor at a time, by PyTorch's copy of strided tensors, an element of "
     f"16 bits at a time: about {INSTRUCTIONS_PER_ELEMENT} integer instructions each (two axes divided out, "
     "two addresses), of which a multiprocessor does 64 a cycle"),
    ("kernels are queued one by one",
     f"cost.host_launch_s_per_layer={LAUNCH_S:g}, {COLLECTIVES_S:g} more with several cards",
     "first principles: about 12 kernels, 12 views and 10 modules a layer in flash_llama_modeling.py, at "
     "the 9, 2 and 5 us that PyTorch's dispatch takes on a current core and 5 us for each launch; two "
     "collectives of 30 us"),
    ("host time of an iteration",
     f"{HOST_BASE_S:g} s + {HOST_PER_SEQUENCE_S:g} s a request",
     "first principles, at the same prices: a gRPC round trip and some 40 operations; for each request that "
     "is decoded greedily, one after the other, four numbers fetched from the device at 22 us (the ends of "
     "its slice of the cache, its token twice), four kernels, 12 views and two copies, half of what leaving "
     "out ended requests takes, and its messages: flash_causal_lm.py and tokens.py of October 2023"),
    ("host time of prompts",
     f"{PROMPT_STEP_S:g} s + {PER_PROMPT_S:g} s a prompt",
     "first principles, at the same prices: flash_causal_lm.py (from_pb, concatenate), tokens.py "
     "(NextTokenChooser); tokenisation measured"),
    ("CUDA graphs of sampling, on a single card only",
     f"{GRAPH_SHARE * GRAPH_S:.2g} s a prompt",
     "logits_process.py: the first use of each of the last 16 sets of parameters records a graph, for which "
     f"PyTorch collects garbage and empties its cache. In the records of one user {GRAPH_SHARE:.1%} of the "
     f"prompts take about {GRAPH_S * 1e3:.0f} ms longer on one H100, 0.2 % on two: the one duration here "
     "that is read off the records"),
    ("hosts of A100, A10 and T4",
     f"all host times {HOST_FACTOR['A100']:g} times as long",
     "assumed: cores of the cards' years; Intel states 1.18 times the instructions a cycle for the "
     "generation of 2021 and 1.19 for that of 2023"),
    ("lengths",
     "those of the requests, in their order",
     "records of single requests, github.com/IBM/LLM-performance-prediction: runs with as many users ask "
     "for the same in the same order"),
    ("users",
     "a closed loop for 120 s; workload.think_time_s: " + ", ".join(
         f"{1e3 * s:g} ms ({card})" for card, s in CLIENT_S.items()),
     "LLM-Pilot; the client, the network and the router's checks, before a request is in the queue: the time "
     "to its first message in the records of one user"))

FINDINGS = (
    "What was missing from an earlier version of this page, which had medians of 17 % for both "
    "throughput and TPOT: the engine waited for 12 iterations, not 24, and a pause after prompts, which "
    "it got only in 2024, did not exist; copies of the cache are slower than its reading, since integer "
    "arithmetic limits them; prompts take host time, on a single card also for recording graphs; clients "
    "take time between requests; and older cards have older hosts. All this was looked for after the "
    "errors had been seen. The hosts are an assumption: without it the medians are 16 and 13 %.",
    "What the records say of the parts, by regression over iterations (H100, Llama-7B): decoding 10 ms + "
    "0.33 ms a request on two and four cards (0.27 simulated, for greedy ones; temperatures and penalties, "
    "which the records do not tell, make 0.05 to 0.16 ms more); prefill 1.9 ms a prompt on four cards, 2.8 "
    "on two and 5.1 on one (0.6 simulated, and 3.5 on one card); a copy at 1.2 to 1.4 TB/s (0.93 on an "
    "A100), 1.5 elements a cycle and multiprocessor on both (1.8 simulated). What a prompt waits for besides "
    "is not understood. All of it is too short where many use the engine, which is why throughput with 32 "
    "users and more is too high.",
    "One user of Llama-7B on H100 is simulated 20 to 33 % too slow: its host queues a layer in 0.20 to 0.26 "
    "ms, not 0.28 and 0.34. StarCoder takes 0.29 ms there, with fewer kernels. One price is simulated for "
    "all.",
    "StarCoder's decode attention reads its one KV head again for each of 48 query heads, from the second "
    "cache (FlashAttention 2 with one query a request): 0.4 ms for 1,000 tokens of context on an H100, where "
    "the simulator reads it once. That is most of what its TPOT lacks with many users.",
    "TTFT counts from the first message, which the router sends when a request is in its queue. Of "
    "StarCoder, seven of ten requests of several tokens show no text for their first token, so that their "
    "TTFT has an iteration of decoding in it.")


def words(gpu: str, card: str, tp: int, users: int) -> list[str]:
    """Settings of a run.

    Args:
        gpu: as the records name the card.
        card: of the catalogue.
        tp: cards.
        users: of the closed loop.

    Raises:
        KeyError: another card or number of users than those of the records.
    """
    slower = HOST_FACTOR[gpu]
    several = tp > 1
    per_prompt_s = slower * PER_PROMPT_S + (0.0 if several else GRAPH_SHARE * GRAPH_S)
    return [f"workload.think_time_s={CLIENT_S[gpu]:g}", "workload.think=constant",
            f"scheduler.prompt_patience={PATIENCE}", "scheduler.prompt_pause_share=0",
            f"scheduler.max_batch_tokens={PREFILL_TOKENS}", "scheduler.memory_utilization=0.95",
            f"cost.host_base_s={slower * HOST_BASE_S:g}",
            f"cost.host_per_sequence_s={slower * HOST_PER_SEQUENCE_S:g}",
            f"cost.host_prompt_step_s={slower * PROMPT_STEP_S:g}",
            f"cost.host_per_prompt_s={per_prompt_s:g}",
            f"cost.host_launch_s_per_layer={slower * (LAUNCH_S + (COLLECTIVES_S if several else 0.0)):g}",
            f"cost.cache_copies={CACHE_COPIES[users]:g}",
            f"cost.cache_copy_bytes_per_s={copy_rate(gpu, card):g}"]


def copy_rate(gpu: str, card: str) -> float:
    """Bytes read and written in a second by a copy of strided 16-bit elements, one at a time."""
    elements = INTEGER_RATE[gpu] / INSTRUCTIONS_PER_ELEMENT
    return min(4.0 * elements, COPIED_SHARE * GPUS[card].memory_bandwidth_bytes_per_s)

