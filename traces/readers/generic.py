"""Tables of lengths with or without arrival times, whatever their columns are called.

The project's own schema is ``arrival_s, prompt_tokens, output_tokens`` and, where known,
``session`` and ``prefix_hashes``; its times are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hetis_sim.spec.errors import SpecError
from traces.readers.convert import shorten
from traces.readers.layout import Layout, check_mapping, normalise

# The first name of every role is the project's own.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": (
        "prompt_tokens", "num_prompt_tokens", "prompt_token_count", "prompt_len", "prompt_length",
        "input_tokens", "num_input_tokens", "input_len", "input_length", "context_tokens",
        "contexttokens", "request_tokens", "prefill_tokens", "num_prefill_tokens", "isl",
    ),
    "output": (
        "output_tokens", "num_output_tokens", "output_token_count", "output_len", "output_length",
        "generated_tokens", "generatedtokens", "completion_tokens", "response_tokens", "decode_tokens",
        "num_decode_tokens", "gen_len", "osl",
    ),
    "arrival": (
        "arrival_s", "arrival_time_s", "arrival_time", "arrival", "arrived_at", "arrival_timestamp",
        "timestamp", "timestamp_s", "time", "time_s", "arrival_ms", "arrival_time_ms", "timestamp_ms",
        "arrival_us", "timestamp_us", "arrival_ns", "timestamp_ns",
    ),
    "session": ("session", "session_id", "conversation_id", "chat_id", "user_id", "user"),
    "prefix": ("prefix_hashes", "hash_ids"),
}


def infer(names: Sequence[str], mapping: Mapping[str, str], kind: str, label: str) -> Layout:
    """The layout of a table from the names of its columns and the caller's mapping.

    Raises:
        SpecError: without a column for prompt or output, or with two for one role.
    """
    check_mapping(mapping, names, label)
    found = {role: mapping.get(role) or _alias(role, names, label) for role in ALIASES}
    for role in ("prompt", "output"):
        if not found[role]:
            raise SpecError(f"{label}: columns", shorten(list(names)),
                            f"a table with a column of {role} tokens, such as "
                            f"{', '.join(ALIASES[role][:6])}, or named by columns.{role}")
    arrival = normalise(found["arrival"])
    suffix = arrival.rsplit("_", 1)[-1]
    unit = suffix if suffix in ("ms", "us", "ns") else "s"
    return Layout.of(kind, found, time_unit=unit, keep_origin=arrival == "arrival_s")


def _alias(role: str, names: Sequence[str], label: str) -> str:
    present = [name for name in names if normalise(name) in ALIASES[role]]
    own = [name for name in present if name == ALIASES[role][0]]
    if len(own or present) > 1:
        raise SpecError(f"{label}: columns", present,
                        f"one column for the {role} role; name it with columns.{role}")
    return (own or present or [""])[0]
