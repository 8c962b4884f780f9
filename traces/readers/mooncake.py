"""Mooncake traces.

One JSON object a line: ``timestamp`` in ms, ``input_length``, ``output_length``, and
``hash_ids``, one id for every started block of 512 prompt tokens. Source:
github.com/kvcache-ai/Mooncake, Apache-2.0 (Mooncake, FAST 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

from traces.readers.layout import Layout, match_names

WANTED = {"arrival": "timestamp", "prompt": "input_length", "output": "output_length", "prefix": "hash_ids"}
BLOCK_TOKENS = 512


def recognise(names: Sequence[str], *, exact: bool = True) -> Layout | None:
    """The layout, when these are the fields of a Mooncake trace.

    ``exact`` refuses further fields: other traces borrow these names with times in seconds.
    """
    found = match_names(WANTED, names)
    if found is None or (exact and len(names) > len(WANTED)):
        return None
    return Layout.of("mooncake", found, time_unit="ms", block_tokens=BLOCK_TOKENS)
