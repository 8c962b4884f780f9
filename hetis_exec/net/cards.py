"""What workers tell each other of their cards, so that all know where NCCL can be used.

NCCL refuses two ranks on one card, and ranks that are given different versions of it do not understand each
other. Only the host of a card knows which one it is, so each rank says so when they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed

from hetis_exec.places import CPU


class Card(NamedTuple):
    """The card of a rank.

    Attributes:
        uuid: which one it is; empty for a rank without one.
        nccl: version of NCCL that this rank has; empty without.
    """

    uuid: str = ""
    nccl: str = ""


NO_CARD = Card()


def card_at(place: str) -> Card:
    """What to say of a torch device."""
    if place == CPU or not torch.distributed.is_nccl_available():
        return NO_CARD
    about: Any = torch.cuda.get_device_properties(place)
    version: Any = torch.cuda.nccl.version
    return Card(str(about.uuid), ".".join(map(str, version())))


def have_own(cards: Sequence[Card]) -> bool:
    """Whether every rank has a card for itself, and all have the same NCCL."""
    return (all(card.uuid and card.nccl for card in cards)
            and len({card.uuid for card in cards}) == len(cards)
            and len({card.nccl for card in cards}) == 1)
