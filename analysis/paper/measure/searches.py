"""How long searches for plans take: processor time of this machine, not simulated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hetis_sim.config import compose
from hetis_sim.run import prepare
from hetis_sim.spec.parse import ClusterConfig, HostConfig

FIVE_TYPES = ("a100-80gb", "l40s", "rtx3090", "t4", "p100-12gb")
"""Kinds of GPU of the large clusters (ours; the paper says five kinds of 32)."""
GPUS_PER_HOST = 4


def search(words: Sequence[str], policy: Mapping[str, Any], hosts: int | None = None) -> dict[str, Any]:
    """Seconds of one search for a plan.

    Args:
        hosts: of four GPUs, for each of five kinds; None for the cluster of the words.
    """
    config = compose(*words, f"policy={policy['name']}")
    config = replace(config, policy={**config.policy, **policy})
    if hosts is not None:
        config = replace(config, cluster=ClusterConfig(
            name=f"five kinds of {GPUS_PER_HOST * hosts}", network="ethernet-100g", hosts=[
                HostConfig({name: GPUS_PER_HOST}, count=hosts) for name in FIVE_TYPES]))
    # Imports are not part of the search; the curves of the cost model are.
    prepare(replace(config, policy={"name": "vllm"}))
    started = time.process_time()
    prepared = prepare(config)
    seconds = time.process_time() - started
    return {"seconds": seconds, "gpus": len(prepared.cluster.devices), "search": {
        key: value for key, value in prepared.plan.search.items() if isinstance(value, int | float)}}
