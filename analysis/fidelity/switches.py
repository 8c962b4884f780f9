"""Mechanisms of an engine that are taken away, one at a time, from the runs that are farthest off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from analysis.fidelity.case import Case
from analysis.fidelity.errors import errors

RUNS = 3
"""Runs of a data set that are simulated again without each mechanism."""

DEFAULT_HOST = "cost.host_per_sequence_s=2e-5"
OWN_COLLECTIVES = "collectives"

SWITCHES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "vllm": {"joint attention": ["scheduler.joint_attention=false"],
             "host beside devices": ["cost.host_overlap=false", "scheduler.async_scheduling=false"],
             "host time": ["cost.host_base_s=0", "cost.host_per_sequence_s=0"]},
    "helix": {"messages": ["scheduler.mesh_message_s=0"], "polling": ["scheduler.mesh_poll_s=0"],
              "host time": ["cost.host_base_s=0", "cost.host_per_sequence_s=0"]},
    "tgis": {"copies of the cache": ["cost.cache_copies=0"], "host time of requests": [DEFAULT_HOST],
             "host time of prompts": ["cost.host_prompt_step_s=0", "cost.host_per_prompt_s=0"],
             "queueing of kernels": ["cost.host_launch_s_per_layer=0"],
             "patience": ["scheduler.prompt_patience=0"]},
    "curves": {"collectives through the host": [OWN_COLLECTIVES], "host time of requests": [DEFAULT_HOST],
               "host time of four cards": ["cost.host_base_s=5e-3"]}}
"""By data set: what is taken away, and the words that do it; they come after those of the run."""


def farthest(pairs: Sequence[Mapping[str, tuple[float, float]]], most: int) -> list[str]:
    """Names of the runs farthest off in any of the metrics, given by (measured, simulated) of each run."""
    found: dict[str, float] = {}
    for each in pairs:
        error = errors(each, most)
        for name, value in error.worst if error else ():
            found[name] = max(found.get(name, 0.0), abs(value))
    return sorted(found, key=lambda name: -found[name])[:most]


def without(case: Case, words: Sequence[str]) -> Case:
    """The run with one mechanism less."""
    own = OWN_COLLECTIVES in words
    return replace(case, words=[*case.words, *(word for word in words if word != OWN_COLLECTIVES)],
                   collectives={} if own else case.collectives)
