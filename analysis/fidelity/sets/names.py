"""Names of cards and models in the data sets, and in the catalogue."""

from __future__ import annotations

from importlib.resources import files

GPUS = {"rtx4090": "rtx4090", "rtxpro6000": "rtx-pro-6000", "rtx3090": "rtx3090", "a6000": "a6000",
        "h100": "h100-sxm", "a100": "a100-40gb", "l4": "l4", "t4": "t4", "v100": "v100-16gb", "a10": "a10",
        "a40": "a40", "l40s": "l40s"}

MODELS = {"eleutherai__gpt-neox-20b": "gpt-neox-20b",
          "bigcode__starcoder": "starcoder", "llama30b": "llama-30b", "llama70b": "llama2-70b",
          "gpt7b": "opt-6.7b", "gpt30b": "opt-30b", "llama7b": "llama-7b"}
"""Where a name is not that of the catalogue. GPT-3 of 6.7 and 30 billion has the shapes of OPT."""


SAME_SHAPE = ("instruct", "chat", "base", "hf", "it", "2507", "v0.1", "v0.2", "v0.3")
"""Ends of names that say nothing about the architecture."""


def gpu_name(name: str) -> str:
    """A card of the catalogue.

    Raises:
        LookupError: the catalogue has none.
    """
    found = GPUS.get(name.lower().replace(" ", "").replace("-", ""))
    if found is None:
        raise LookupError(f"no card {name!r} in the catalogue")
    return found


def model_name(name: str) -> str:
    """A model of the catalogue.

    Raises:
        LookupError: the catalogue has none.
    """
    short = name.rpartition("/")[2].lower()
    found = MODELS.get(short, short.replace("llama-3", "llama3").replace("llama-2", "llama2"))
    while not (files("conf") / "model" / f"{found}.yaml").is_file():
        found, _, last = found.rpartition("-")
        if last not in SAME_SHAPE:
            raise LookupError(f"no model {name!r} in the catalogue")
    return found


def hosts(gpu: str, cards: int, link: str | None) -> tuple[str, ...]:
    """Words for a cluster of one host with so many cards, joined by a link or by their slowest bus."""
    joined = f", link: {link}" if link else ""
    return ("cluster=single-a100", "cluster.name=machine",
            f"cluster.hosts=[{{gpus: {{{gpu}: {cards}}}, memory_gib: 512{joined}}}]")
