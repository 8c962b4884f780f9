"""From logits to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hetis_exec.backend import Asked
from hetis_exec.messages import Tokens
from hetis_sim.spec.errors import require_finite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn from, as few as have this probability together
            (nucleus sampling, Holtzman et al. 2020).
        seed: each token is drawn by a number that depends on this, its request and its position:
            neither on the batch it is computed in nor on how the model is split.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite("executor.temperature", self.temperature, 0.0, 100.0)
        require_finite("executor.top_p", self.top_p, 0.0, 1.0, open_low=True)

    def choose(self, logits: torch.Tensor, asked: Asked) -> Tokens:
        """One token for each row of logits, shape (rows, vocab)."""
        if self.temperature == 0.0:
            likeliest: Tokens = logits.argmax(dim=-1).cpu().numpy()
            return likeliest
        chances, tokens = torch.softmax(logits.double() / self.temperature, dim=-1).sort(descending=True,
                                                                                        stable=True)
        drawn: Tokens = tokens.gather(1, self._ranks(chances.cumsum(dim=-1), asked)).cpu().numpy()[:, 0]
        return drawn

    def _ranks(self, reached: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Rank of the token that is drawn in each row, shape (rows, 1), by the cumulated probabilities."""
        numbers = torch.tensor([[np.random.default_rng([self.seed, *place]).random()] for place in asked],
                               dtype=torch.float64).to(reached.device)
        last = torch.searchsorted(reached, reached[:, -1:].clamp(max=self.top_p))
        return torch.searchsorted(reached, numbers * reached.gather(1, last), right=True).minimum(last)
