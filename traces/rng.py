"""Named, independent streams of random numbers."""

from __future__ import annotations

import hashlib
import operator

import numpy as np

from hetis_sim.spec.errors import SpecError

SEED_MAX = 2**64 - 1


class RngStreams:
    """Random streams keyed by name, each a pure function of ``(seed, name)``.

    A stream does not depend on which other streams exist or how much was drawn from
    them, so that arrivals stay the same when lengths, rates or policies change. The key
    is SHA-256 of the name: Python's ``hash`` differs between processes.

    Args:
        seed: 0 to 2**64 - 1.

    Raises:
        SpecError: for any other seed.
    """

    def __init__(self, seed: int) -> None:
        allowed = f"an integer in [0, {SEED_MAX}]"
        if isinstance(seed, bool):
            raise SpecError("seed", seed, allowed)
        try:
            self.seed = operator.index(seed)
        except TypeError:
            raise SpecError("seed", seed, allowed) from None
        if not 0 <= self.seed <= SEED_MAX:
            raise SpecError("seed", seed, allowed)

    def stream(self, name: str) -> np.random.Generator:
        """A fresh generator at the start of the stream ``name``.

        Asking twice gives two generators that draw the same numbers.
        """
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        key = tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))
