"""Azure LLM inference traces of 2023 and 2024.

Columns ``TIMESTAMP,ContextTokens,GeneratedTokens``: a date with up to 7 fractional digits
(2023) or microseconds and a UTC offset (2024), then token counts. Source:
github.com/Azure/AzurePublicDataset, CC-BY-4.0 (Splitwise, ISCA 2024; DynamoLLM, HPCA 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

from traces.readers.layout import Layout, match_names

WANTED = {"arrival": "timestamp", "prompt": "contexttokens", "output": "generatedtokens"}


def recognise(names: Sequence[str]) -> Layout | None:
    """The layout, when these are the columns of an Azure trace."""
    found = match_names(WANTED, names)
    return None if found is None else Layout.of("azure", found)
