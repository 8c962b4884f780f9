"""Closed loops against TGIS, IBM's fork of TGI (LLM-Pilot)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from analysis.fidelity.case import Case, DataSet, Row, csv_rows, number, open_text
from analysis.fidelity.sets.names import gpu_name, hosts, model_name
from hetis_sim.spec.errors import HetisError

FOLDER = "ibm_llm_pilot"
FILE = "aggregate.csv.gz"

FLASH = ("llama-7b", "llama-13b", "EleutherAI__gpt-neox-20b", "bigcode__starcoder")
"""Models that TGIS serves without padding, with the engine that is simulated here."""

REQUESTS = Path(__file__).with_name("tgis_requests.json.gz")
"""What was asked for, in order; the file says where it is from."""

GROUPS = ((1, "1 user"), (4, "2 and 4 users"), (16, "8 and 16 users"), (128, "32 to 128 users"))

PATIENCE = 24
HOST_BASE_S = 1.5e-3
HOST_PER_SEQUENCE_S = 270e-6
LAUNCH_S = 280e-6
COLLECTIVES_S = 60e-6
CACHE_COPIES = 1.5

SETTINGS = (
    ("prompts hold up decoding",
     "scheduler.chunked_prefill=false",
     "TGIS, router/src/batcher.rs: prefill, then concatenate"),
    ("when prompts that wait may do so",
     f"scheduler.prompt_patience={PATIENCE}",
     "the same file, and MAX_WAITING_TOKENS=24, the launcher's default"),
    ("share of memory",
     "scheduler.memory_utilization=0.95",
     "the margin of 20 % (BATCH_SAFETY_MARGIN, the launcher's default) is of what weights leave; nobody is "
     "preempted here"),
    ("the cache is copied in each iteration, and again after one in which a request ends",
     f"cost.cache_copies={CACHE_COPIES}",
     "flash_causal_lm.py (generate_token, prune); requests end in a third (16 users) to 60 % (64) of the "
     "iterations of the records"),
    ("kernels are queued one by one",
     f"cost.host_launch_s_per_layer={LAUNCH_S:g}, {COLLECTIVES_S:g} more with several cards",
     "first principles: about 12 kernels, 12 views and 10 modules a layer in flash_llama_modeling.py, at "
     "the 9, 2 and 5 us that PyTorch's dispatch takes on a current core and 5 us for each launch; two "
     "collectives of 30 us"),
    ("host time of an iteration",
     f"{HOST_BASE_S:g} s + {HOST_PER_SEQUENCE_S:g} s a request",
     "first principles, at the same prices: a gRPC round trip and some 40 operations; for each request that "
     "is decoded greedily, one after the other, four numbers fetched from the device at 22 us (the ends of "
     "its slice of the cache, its token twice), four kernels, 12 views and two copies (torch.cat takes five "
     "axes one tensor at a time), half of what leaving out ended requests takes, and its messages: "
     "flash_causal_lm.py and tokens.py of October 2023"),
    ("lengths",
     "those of the requests, in their order",
     "records of single requests, github.com/IBM/LLM-performance-prediction: runs with as many users ask "
     "for the same in the same order"),
    ("users", "a closed loop without think time for 120 s", "LLM-Pilot"))

FINDINGS = (
    "An earlier version of this page took a user's request for several sequences. That was wrong: the "
    "records of single requests have a time for every token, so they were streams, and a stream is of one "
    "request (generation.proto). What was missing is host time of each request in each iteration: "
    "StarCoder, whose cache is too small to matter, takes 15 ms for one request and 35 ms for 51 on an "
    "H100, 0.4 ms each. Operations counted in the code make 0.27 ms where tokens are chosen greedily, "
    "three times as much as this page said before; temperatures and penalties, which the records do not "
    "tell, make 0.05 to 0.16 ms more. The count was made after the records had been seen, but not fitted "
    "to them.",
    "What is left at 16 users and more, by the times of tokens in the records: copies of the cache run at "
    "about 1.9 TB/s on an H100 (an iteration of 51 requests takes 36 ms, and 45 ms after one has ended, "
    "which copies 6.7 GB once more; 31 and 36 ms on two cards, 28 and 31 ms on four), where the simulator "
    "has them at the rate of reading; and prompts take 1 to 3 ms of host time each, where the simulator "
    "has 0.27 ms. On a single card the code also records a CUDA graph for each new set of sampling "
    "parameters, keeps the last 16 of them, and empties the cache of the allocator every time; how often "
    "that happened is not known. It fits that one H100 with 64 users is furthest off.",
    "A100 hosts take about 1.5 times as long to queue kernels as H100 hosts do (15 against 10 ms for "
    "Llama-7B on two and four cards with one user); one figure for all is simulated, so that errors with "
    "one user have both signs.",
    "TTFT with one user is 6 to 36 ms too short: the client, the network and tokenisation are not in it.")


def read(folder: Path) -> DataSet:
    """All points without errors.

    Raises:
        HetisError: the file is missing or faulty.
    """
    path = folder / FOLDER / FILE
    rows = [row for row in csv_rows(path, "model_key", "gpu", "tp", "users", "n_all",
                                    "itl_mean_ms", "ttft_p50_ms", "lat_p50_ms", "error_rate", "out_tok_per_s")
            if number(row, "error_rate", path) == 0.0]
    asked = Asked.read(REQUESTS)
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for row in rows:
        why = _left_out(row)
        if why:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        cases.append(_case(row, path, asked))
    about = ("Closed loops of 1 to 128 users for two minutes each, measured by IBM for LLM-Pilot; only "
             "points without errors.")
    return DataSet("tgis", "TGIS of 2023/24", about, SETTINGS, cases,
                   [f"{why}: {count} points" for why, count in left_out.items()], FINDINGS)


def _left_out(row: dict[str, str]) -> str:
    model, tp = row["model_key"], int(row["tp"])
    if model not in FLASH:
        return ("encoder-decoder models, which the simulator does not have" if "t5" in model or "ul2" in model
                or "mt0" in model else "models that TGIS serves in padded batches by another engine (MPT, "
                                       "CodeGen)")
    if model == "bigcode__starcoder" and tp > 1:
        return "StarCoder on several cards, each with a copy of its one KV head, which no layout here has"
    return ""


def _case(row: dict[str, str], path: Path, asked: Asked) -> Case:
    tp, users = int(row["tp"]), int(row["users"])
    gpu, nvlink = _card(row["gpu"])
    # More than were served: the run ends by its time.
    requests = asked.requests(users, max(4 * users, int(2.5 * number(row, "n_all", path))))
    words = [f"model={model_name(row['model_key'])}", *hosts(gpu, tp, nvlink if tp > 1 else None),
             "policy=vllm", f"policy.tp={tp}", "policy.pp=1", "workload.arrivals=closed",
             f"workload.users={users}",
             "workload.common_queue=true", "workload.duration_s=120", "workload.requests=null",
             f"scheduler.prompt_patience={PATIENCE}", "scheduler.memory_utilization=0.95",
             f"cost.host_base_s={HOST_BASE_S}", f"cost.host_per_sequence_s={HOST_PER_SEQUENCE_S}",
             f"cost.host_launch_s_per_layer={LAUNCH_S + (COLLECTIVES_S if tp > 1 else 0.0):g}",
             f"cost.cache_copies={CACHE_COPIES}"]
    measured = {"output_throughput": number(row, "out_tok_per_s", path)}
    for metric, column in (("mean_tpot_s", "itl_mean_ms"), ("p50_ttft_s", "ttft_p50_ms"),
                           ("p95_ttft_s", "ttft_p95_ms"), ("mean_e2el_s", "lat_mean_ms"),
                           ("p50_e2el_s", "lat_p50_ms"), ("p95_e2el_s", "lat_p95_ms")):
        measured[metric] = number(row, column, path) / 1e3
    name = f"{row['model_key'].rpartition('__')[2]} {tp} x {row['gpu']}, {users} users"
    group = next(text for most, text in GROUPS if users <= most)
    return Case(name, words, requests, measured, token_weighted=True, group=group)


def _card(name: str) -> tuple[str, str | None]:
    """The card as ``gpu_features.csv`` has it: A100 of 40 GB on PCIe, H100 with NVLink."""
    if name == "A100":
        return "a100-pcie-40gb", None
    return gpu_name(name), "nvlink4" if name == "H100" else None


@dataclass(frozen=True)
class Asked:
    """What users asked for.

    Attributes:
        samples: prompt and output tokens of the requests that all runs draw from.
        order: by the number of users, which of them came one after the other.
    """

    samples: Sequence[Sequence[int]]
    order: Mapping[str, Sequence[int]]

    @classmethod
    def read(cls, path: Path) -> Asked:
        """From the file beside this one."""
        with open_text(path) as file:
            raw = json.load(file)
        return cls(raw["samples"], raw["order"])

    def requests(self, users: int, number: int) -> list[Row]:
        """The first so many; from the beginning again where the records have fewer.

        Raises:
            HetisError: there is no record with so many users.
        """
        if str(users) not in self.order:
            known = ", ".join(sorted(self.order, key=int))
            raise HetisError(f"users={users} is not allowed: one of {known}, which the records have")
        chosen = islice(cycle(self.order[str(users)]), number)
        return [(0.0, self.samples[n][0], self.samples[n][1]) for n in chosen]
