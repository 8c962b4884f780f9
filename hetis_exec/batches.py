"""A step as one rank computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import Spots, Tensor
from hetis_exec.messages import Row
from hetis_exec.shares import Share


class Stored(NamedTuple):
    """Which of a prompt's new tokens a rank keeps.

    Attributes:
        tokens: they.
        at: their places among the new ones, as an index, where these are not all of them.
        spots: where they go.
    """

    tokens: NDArray[np.int64]
    at: tuple[Tensor, ...]
    spots: Spots


@dataclass(slots=True)
class Batch:
    """A step as one rank computes it.

    Attributes:
        prepared: what the weights need to know of the positions.
        local, remote: decode attention computed here and by attention workers.
        prefills: whether there are prompts among the rows.
        divided: places of groups whose tokens are divided, and their number; None where there are none.
        plan, parts_plan: where the cache of the local part is.
        prompts: attention of all of its prompts together; None where they are computed one by one.
        stored: where the new tokens of prompts are then stored, by request.
        worker_busy_s: seconds that attention workers have computed.
    """

    seq: int
    rows: tuple[Row, ...]
    prepared: Any
    prefills: bool
    local: Share
    remote: dict[int, Share]
    divided: tuple[Tensor, ...] | None
    number: int
    plan: Any = None
    parts_plan: Any = None
    prompts: Any = None
    stored: dict[int, Stored] = field(default_factory=dict)
    worker_busy_s: dict[int, float] = field(default_factory=dict)

    @property
    def is_divided(self) -> bool:
        """Whether heads of some rows are elsewhere, so that picking and putting back are work."""
        return bool(self.remote)
