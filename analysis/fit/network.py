"""Fits links: messages (gamma, beta) by kind of link, all-reduce curves by card, link and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import curves
from analysis.fit.data import HALF, MS, US, Store
from analysis.fit.errors import Floats, held_out, score
from analysis.fit.modules import Module, body
from analysis.fit.recipes import Fitted
from hetis_sim.spec.links import LINKS

KIB = 1024
AICONFIGURATOR = "network/aiconfigurator/"
RTX_PRO_NCCL = AICONFIGURATOR + "rtx_pro_6000_server/comm/nccl/2.29.2/nccl_perf.parquet"
VIDUR_2023 = "network/vidur_2023/"
REDUCE_KNOTS = tuple(float(n) for n in range(8, 34, 2))
SMALL_MESSAGE_BYTES = 64 * KIB
LARGE_MESSAGE_BYTES = 16e6
# Launch of a message in software where it was not measured: what NCCL adds to the latency of the
# links of the catalogue, see hetis_sim/spec/links.py.
SOFTWARE_S = 6e-6


@dataclass(frozen=True)
class Messages:
    """Point-to-point timings of one link: columns bytes and seconds."""

    link: str
    file: str
    read: Callable[[Store, str], pd.DataFrame]
    large_only: bool = False  # small ones were timed with Python's launch


def _apex_messages(nodes: int) -> Callable[[Store, str], pd.DataFrame]:
    def read(store: Store, file: str) -> pd.DataFrame:
        rows = pd.read_csv(store.path(file))
        rows = rows[rows["num_nodes"] == nodes]
        return pd.DataFrame({"bytes": rows["size(kb)"] * KIB, "seconds": rows["time(us)"] * US})
    return read


def _vidur_messages(per_node: int) -> Callable[[Store, str], pd.DataFrame]:
    def read(store: Store, file: str) -> pd.DataFrame:
        rows = pd.read_csv(store.path(file))
        rows = rows[(rows["devices_per_node"] == per_node) & (rows["rank"] == 0)]
        return pd.DataFrame({"bytes": rows["size"], "seconds": rows["time_stats.send_recv.median"] * MS})
    return read


def _vidur_2023_messages(store: Store, file: str) -> pd.DataFrame:
    rows = pd.read_csv(store.path(file))
    size = HALF * rows["n_embd"] * rows["num_tokens"] / rows["num_tensor_parallel_workers"]
    return pd.DataFrame({"bytes": size, "seconds": rows["time_stats.send_recv.median"] * MS})


def _pair_exchange(store: Store, file: str) -> pd.DataFrame:
    """All-reduce of two cards: each sends its message once over the link."""
    rows = _nccl_rows(store, file)
    return rows[rows["ranks"] == 2][["bytes", "seconds"]]


MEASURED = (
    Messages("nvlink3", "network/vidur/a100_dgx_send_recv.csv.gz", _vidur_messages(2)),
    Messages("nvlink4", "network/vidur/h100_dgx_send_recv.csv.gz", _vidur_messages(2)),
    Messages("nvlink-bridge", "network/vidur/a100_pairwise_nvlink_send_recv.csv.gz", _vidur_messages(2)),
    Messages("nvlink2", VIDUR_2023 + "v100_p2p_intra_node.csv.gz", _vidur_2023_messages, large_only=True),
    Messages("nvlink-bridge-ga102", VIDUR_2023 + "a40_p2p_intra_node.csv.gz", _vidur_2023_messages,
             large_only=True),
    Messages("infiniband-hdr", VIDUR_2023 + "a100_p2p_inter_node.csv.gz", _vidur_2023_messages,
             large_only=True),
    Messages("infiniband-ndr", "network/vidur/h100_dgx_send_recv.csv.gz", _vidur_messages(1)),
    Messages("ethernet-10g", "network/apex/V100-PCIE-16GB_sendrecv.csv", _apex_messages(2)),
    Messages("pcie4x16", AICONFIGURATOR + "l40s/comm/nccl/2.27.3/nccl_perf.parquet", _pair_exchange),
    Messages("pcie5x16", RTX_PRO_NCCL, _pair_exchange),
)


def _line(rows: pd.DataFrame, beta_s: float | None) -> tuple[float, float]:
    """(gamma, beta): beta from the smallest messages unless given, gamma from the largest.

    Caches, prompts and migrations are megabytes and more, so gamma is the median over messages of at
    least 16 MB; between the two regimes real links are faster than the line through both.
    """
    if beta_s is None:
        beta_s = float(rows.loc[rows["bytes"] <= SMALL_MESSAGE_BYTES, "seconds"].median())
    large = rows[rows["bytes"] >= LARGE_MESSAGE_BYTES]
    return float(((large["seconds"] - beta_s) / large["bytes"]).median()), beta_s


def transfer_module(store: Store) -> Module:
    """Messages of every link of the catalogue that was measured, and of its relatives."""
    coefficients: dict[str, Any] = {}
    predicted, measured, sizes_of, files = [], [], [], []
    for source in MEASURED:
        rows = source.read(store, source.file)
        rows = rows[(rows["bytes"] > 0) & (rows["seconds"] > 0)]
        if source.large_only:
            rows = rows[rows["bytes"] >= LARGE_MESSAGE_BYTES]
        rows = rows.groupby("bytes")["seconds"].median().reset_index()
        held = held_out(rows, ["bytes"])
        known = LINKS[source.link].latency_s + SOFTWARE_S if source.large_only else None
        gamma, beta = _line(rows[~held], known)
        gamma = max(gamma, 1.0 / LINKS[source.link].bandwidth_bytes_per_s)
        predicted.append(gamma * rows[held]["bytes"].to_numpy() + beta)
        measured.append(rows[held]["seconds"].to_numpy())
        sizes_of.append(rows[held]["bytes"].to_numpy())
        coefficients[source.link] = {"gamma_s_per_byte": gamma, "beta_s": beta}
        files.append(source.file)
    _add_relatives(coefficients)
    sizes = np.concatenate(sizes_of)
    error = score(np.concatenate(predicted), np.concatenate(measured), sizes >= LARGE_MESSAGE_BYTES,
                  "a quarter of the sizes of each measured link; messages of at least 16 MB")
    return body("links", "measured", {link: _rounded(entry) for link, entry in sorted(coefficients.items())},
                error=error, sources=store.sources(sorted(set(files))),
                note="gamma of large messages; where small ones were timed with Python's launch, beta is the "
                     "link's latency plus 6 us")


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in entry.items()}


def _add_relatives(coefficients: dict[str, Any]) -> None:
    """Links without timings: the share of the line rate that a measured relative reaches."""
    def share(link: str) -> float:
        return float(1.0 / coefficients[link]["gamma_s_per_byte"] / LINKS[link].bandwidth_bytes_per_s)

    pcie = (share("pcie4x16") + share("pcie5x16")) / 2.0
    slow, fast = share("ethernet-10g"), share("infiniband-hdr")
    of_rate = "share of the line rate"
    wanted = [("pcie3x16", pcie, f"mean {of_rate} on PCIe 4 and 5; without peer access V100 cards of a cloud "
                                 "host reached 4.4 GB/s (network/apex)"),
              ("infiniband-edr", fast, f"{of_rate} measured on a 200 Gb/s fabric"),
              ("nvlink5", share("nvlink4"), f"{of_rate} measured on NVLink 4"),
              ("nvlink-bridge-a30", share("nvlink-bridge-ga102"), f"{of_rate} measured on the A40's bridge")]
    wanted += [(f"ethernet-{rate}g", slow, f"{of_rate} measured at 10 Gb/s") for rate in (1, 25, 50)]
    wanted += [(f"ethernet-{rate}g", fast, f"{of_rate} measured on a 200 Gb/s fabric")
               for rate in (100, 200, 400)]
    for link, reached, note in wanted:
        facts = LINKS[link]
        coefficients[link] = {"gamma_s_per_byte": 1.0 / (reached * facts.bandwidth_bytes_per_s),
                              "beta_s": facts.latency_s + SOFTWARE_S, "status": "derived", "note": note}


# -- all-reduce --------------------------------------------------------------------------------


def _nccl_rows(store: Store, file: str) -> pd.DataFrame:
    """All-reduce of half precision; message sizes there are in elements."""
    rows = pd.read_parquet(store.path(file))
    if "nccl_dtype" in rows:
        rows = rows[(rows["nccl_dtype"] == "half") & (rows["op_name"] == "all_reduce")]
    else:
        rows = rows[rows["backend"] == "vllm_graph"]
    return pd.DataFrame({"ranks": rows["num_gpus"], "bytes": rows["message_size"] * HALF,
                         "seconds": rows["latency"] * MS})


def _apex_reduce(store: Store, file: str) -> pd.DataFrame:
    rows = pd.read_csv(store.path(file))
    rows = rows[(rows["num_nodes"] == 1) & (rows["size(kb)"] > 0)]
    return pd.DataFrame({"ranks": rows["num_gpus_per_node"], "bytes": rows["size(kb)"] * KIB,
                         "seconds": rows["time(us)"] * US})


def _vidur_reduce(store: Store, file: str) -> pd.DataFrame:
    rows = pd.read_csv(store.path(file))
    four = (rows["num_workers"] == 4) & (rows["devices_per_node"] == 4)
    rows = rows[four & (rows["rank"] == 0) & (rows["size"] > 0)]
    return pd.DataFrame({"ranks": 4, "bytes": rows["size"],
                         "seconds": rows["time_stats.all_reduce.median"] * MS})


@dataclass(frozen=True)
class Reduces:
    """All-reduce timings of one card on one link."""

    card: str
    link: str
    file: str
    read: Callable[[Store, str], pd.DataFrame]


VLLM_REDUCE = AICONFIGURATOR + "{card}/comm/vllm/{version}/custom_allreduce_perf.parquet"
REDUCES = (
    Reduces("a100-80gb", "nvlink3", VLLM_REDUCE.format(card="a100_sxm", version="0.14.0"), _nccl_rows),
    Reduces("h100-sxm", "nvlink4", VLLM_REDUCE.format(card="h100_sxm", version="0.24.0"), _nccl_rows),
    Reduces("h200", "nvlink4", VLLM_REDUCE.format(card="h200_sxm", version="0.24.0"), _nccl_rows),
    Reduces("l40s", "pcie4x16", VLLM_REDUCE.format(card="l40s", version="0.22.0"), _nccl_rows),
    Reduces("rtx-pro-6000", "pcie5x16", RTX_PRO_NCCL, _nccl_rows),
    Reduces("v100-16gb", "pcie3x16", "network/apex/V100-PCIE-16GB_all_reduce.csv", _apex_reduce),
)
# Tables for cards without their own: link -> (card whose curve it is, numbers of ranks taken).
SHARED = {"nvlink3": ("a100-80gb", (2, 4, 8)), "nvlink4": ("h100-sxm", (2, 4, 8)), "pcie4x16": ("l40s", (2,)),
          "pcie5x16": ("rtx-pro-6000", (2, 4, 8))}
PCIE_RING = "network/vidur/a100_pairwise_nvlink_all_reduce.csv.gz"


def _reduce_curves(rows: pd.DataFrame) -> tuple[dict[str, Any], Floats, Floats]:
    """(curves by ranks, predictions, measurements of held-out sizes)."""
    found, predicted, measured = {}, [], []
    for ranks, part in rows.groupby("ranks"):
        part = part.groupby("bytes")["seconds"].median().reset_index()
        held = held_out(part, ["bytes"], salt=str(ranks))
        seen = part[~held]
        curve = curves.fit_curve(seen["bytes"].to_numpy(float), seen["seconds"].to_numpy(), REDUCE_KNOTS)
        found[str(ranks)] = curve.dump()
        predicted.append(curves.predict(curve, part[held]["bytes"].to_numpy(float)))
        measured.append(part[held]["seconds"].to_numpy())
    return found, np.concatenate(predicted), np.concatenate(measured)


def all_reduce_modules(store: Store, found: dict[str, Fitted]) -> Module:
    """Put measured curves into the profiles of the cards; return the module of links shared by others."""
    by_card = {}
    for source in REDUCES:
        table, predicted, measured = _reduce_curves(source.read(store, source.file))
        by_card[source.card] = table
        error = score(predicted, measured, measured >= 20e-6,
                      "a quarter of the message sizes for each number of ranks; at least 20 us")
        found[source.card].modules["all_reduce"] = body(
            "links", "measured", {source.link: table}, error=error, sources=store.sources([source.file]))
    shared: dict[str, Any] = {link: {str(n): by_card[card][str(n)] for n in ranks}
                              for link, (card, ranks) in SHARED.items()}
    ring, predicted, measured = _reduce_curves(_vidur_reduce(store, PCIE_RING))
    shared["pcie4x16"].update(ring)
    error = score(predicted, measured, measured >= 20e-6,
                  "a quarter of the message sizes of the PCIe ring of four A100")
    givers = {card for card, _ in SHARED.values()}
    files = [PCIE_RING, *(source.file for source in REDUCES if source.card in givers)]
    return body("links", "measured", shared, error=error, sources=store.sources(files),
                note="for cards without timings of their own: A100 (NVLink 3), H100 (NVLink 4), two L40S and "
                     "a ring of four A100 over PCIe 4, RTX PRO 6000 (PCIe 5)")
