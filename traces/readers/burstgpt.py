"""BurstGPT traces.

Columns ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``, times in
seconds; later releases add ``Session ID`` and ``Elapsed time``. Failed requests have 0
response tokens. ``where={"Model": "GPT-4"}`` keeps one model, ``where={"Log Type": ...}``
one kind of log. Source: github.com/HPMLL/BurstGPT, CC-BY-4.0.
"""

from __future__ import annotations

from collections.abc import Sequence

from traces.readers.layout import Layout, match_names

WANTED = {"arrival": "timestamp", "prompt": "request_tokens", "output": "response_tokens"}


def recognise(names: Sequence[str]) -> Layout | None:
    """The layout, when these are the columns of a BurstGPT trace."""
    found = match_names(WANTED, names)
    if found is None:
        return None
    session = match_names({"session": "session_id"}, names) or {}
    return Layout.of("burstgpt", found | session)
