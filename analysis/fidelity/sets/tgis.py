"""Closed loops against TGIS, IBM's fork of TGI (LLM-Pilot)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from analysis.fidelity.case import Case, DataSet, Row, csv_rows, number, open_text
from analysis.fidelity.sets.names import gpu_name, hosts, model_name
from analysis.fidelity.sets.tgis_engine import FINDINGS, SETTINGS
from analysis.fidelity.sets.tgis_engine import words as engine_words
from hetis_sim.spec.errors import HetisError

FOLDER = "ibm_llm_pilot"
FILE = "aggregate.csv.gz"

FLASH = ("llama-7b", "llama-13b", "EleutherAI__gpt-neox-20b", "bigcode__starcoder")
"""Models that TGIS serves without padding, with the engine that is simulated here."""

REQUESTS = Path(__file__).with_name("tgis_requests.json.gz")
"""What was asked for, in order; the file says where it is from."""

GROUPS = ((1, "1 user"), (4, "2 and 4 users"), (16, "8 and 16 users"), (128, "32 to 128 users"))

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
             "points without errors. The records themselves say how long the engine lets prompts wait, how "
             "often it copies its cache, how long clients take between requests, and what recording a graph "
             "takes; no other duration is from them.")
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
             *engine_words(row["gpu"], gpu, tp, users)]
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
