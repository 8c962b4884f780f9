"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hetis_exec.backend import Asked, Wanted
from hetis_exec.messages import Sample, Tokens
from hetis_sim.spec.errors import require_finite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn from, as few as have this probability together
            (nucleus sampling, Holtzman et al. 2020).
        top_k: and no more than so many of them; 0 for any number.
        seed: each token is drawn by a number that depends on this, its request and its position:
            neither on the batch it is computed in nor on how the model is split. A request with a
            seed of its own draws by that one and the position alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        require_finite("executor.temperature", self.temperature, 0.0, 100.0)
        require_finite("executor.top_p", self.top_p, 0.0, 1.0, open_low=True)

    def greedy(self, asked: Asked) -> bool:
        """Whether the likeliest tokens are all that is wanted."""
        return all((self.temperature if wanted.sample is None else wanted.sample.temperature) == 0.0
                   for wanted in asked)

    def choose(self, logits: torch.Tensor, asked: Asked) -> Tokens:
        """One token for each row of logits, shape (rows, vocab)."""
        hows = [Sample(self.temperature, self.top_p, self.top_k) if wanted.sample is None else wanted.sample
                for wanted in asked]
        likeliest = likeliest_of(logits)[:, None]
        rows = [n for n, how in enumerate(hows) if how.temperature > 0.0]
        if rows:
            where = torch.tensor(rows, device=logits.device)
            drawn = self._drawn(logits[where].double(), [hows[n] for n in rows], [asked[n] for n in rows])
            likeliest[where] = drawn
        chosen: Tokens = likeliest.cpu().numpy()[:, 0]
        return chosen

    def _drawn(self, logits: torch.Tensor, hows: Sequence[Sample], asked: Asked) -> torch.Tensor:
        """Tokens drawn from rows of logits, shape (rows, 1)."""
        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)[:, None].to(logits.device)

        chances, tokens = torch.softmax(logits / column([how.temperature for how in hows]), dim=-1).sort(
            descending=True, stable=True)
        reached = chances.cumsum(dim=-1)
        last = torch.searchsorted(reached, reached[:, -1:].minimum(column([how.top_p for how in hows])))
        most = column([how.top_k or logits.shape[-1] for how in hows]).long() - 1
        last = last.minimum(most).clamp(max=logits.shape[-1] - 1)
        numbers = column([self._number(wanted) for wanted in asked])
        ranks = torch.searchsorted(reached, numbers * reached.gather(1, last), right=True).minimum(last)
        return tokens.gather(1, ranks)

    def _number(self, wanted: Wanted) -> float:
        """What a token is drawn by, between 0 and 1."""
        own = None if wanted.sample is None else wanted.sample.seed
        place = [self.seed, wanted.request_id, wanted.position] if own is None else [own, wanted.position]
        return float(np.random.default_rng(place).random())


def likeliest_of(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits, shape (rows,), the first of several that are as likely."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # Torch takes ten times as long to find the place of a maximum on a processor.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)
