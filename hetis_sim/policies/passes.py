"""Mean time between two passes of a pipeline when some of them take longer than the others.

A pipeline of S stages carries S micro-batches that keep their order (control and simulator hold to
that, as engines with one micro-batch per stage do). A *pass* is a way of one micro-batch through all
stages. Passes of plain decoding, with d_s seconds at stage s and the way w = sum_s (d_s + hop_s), follow
each other every ``B = max(max_s d_s, w / S)`` seconds.

A share q of the passes takes longer: p_s seconds, way v. Completion times are longest paths over the grid
of passes and stages, where a path steps to the next pass at a stage, to the next stage of a pass, or from
the last stage of a pass to the first stage of the S-th pass after it. So a long pass delays all that
follows it in one of two ways. It keeps a stage busy for longer; by that alone passes follow each other
every ``max_s ((1 - q) d_s + q p_s)`` seconds. Or its own micro-batch returns later, and the others queue
up behind it: with t the slowest stage for decoding, the longest path through a lone long pass is longer
than the undisturbed one by

    G = max(v + w - 2SB,
            sum_{s>=t} p_s + sum_{s<t} d_s + hops - SB,
            sum_{s<=t} p_s + sum_{s>t} d_s + hops - SB)

A path that follows one long pass through the stages jumps over the S - 1 passes behind it. If long passes
come at random and every one is followed that is not jumped over, the mean time is

    B + q E[G] / (1 + q (S - 1))

which is a lower bound, since a path may also wait for a better one to follow; longer passes alone may count,
so the largest such value holds. On the other hand, no pass can add more than the longest of the S passes
up to it, so that E[max G] / S over S passes is an upper bound of what is added. Half-way between the two
bounds lies what a simulation of random passes shows to within some 3 %. The larger of this and of the time
that stages are busy is taken; for one stage that is exact (all of this is ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def mean_pass_s(decode_s: Sequence[float], decode_hops_s: float, long_s: Sequence[Array],
                long_hops_s: Array | float, shares: Array) -> float:
    """Mean seconds from one pass to the next.

    Args:
        decode_s: of each stage, for a pass that only decodes.
        decode_hops_s: from stage to stage, together, for such a pass.
        long_s: of each stage, for each kind of longer pass.
        long_hops_s: from stage to stage, together, for each kind.
        shares: of the passes that are of each kind; 1 together at most.
    """
    stages, rest = len(decode_s), 1.0 - float(shares.sum())
    busy = max(rest * d + float(shares @ p) for d, p in zip(decode_s, long_s, strict=True))
    if stages == 1:
        return busy
    slowest, total = max(decode_s), sum(decode_s)
    base = max(slowest, (total + decode_hops_s) / stages)
    t, turn = list(decode_s).index(slowest), stages * base
    later: Array = sum(long_s[t:], np.zeros_like(long_s[0]))
    earlier: Array = sum(long_s[:t], np.zeros_like(long_s[0]))
    gain = earlier + later + long_hops_s + total + decode_hops_s - 2.0 * turn
    gain = np.maximum(gain, later + sum(decode_s[:t]) + decode_hops_s - turn)
    gain = np.maximum(gain, earlier + long_s[t] + sum(decode_s[t + 1:]) + decode_hops_s - turn)
    order = np.argsort(-gain)
    gain, share = np.maximum(gain[order], 0.0), np.cumsum(shares[order])
    least = float((np.cumsum(shares[order] * gain) / (1.0 + (stages - 1) * share)).max())
    none = np.maximum(0.0, 1.0 - share) ** stages
    most = float(-np.diff(none, prepend=1.0) @ gain) / stages
    return max(busy, base + (least + most) / 2.0)


def arrivals_per_pass(per_decode: float) -> float:
    """Requests a that arrive from one pass to the next where all that wait are prefilled together.

    A pass prefills if somebody waits, which is so with probability ``1 - exp(-a)`` for arrivals at random,
    and decodes otherwise; ``per_decode`` requests end with a pass that decodes. So ``a exp(a) = per_decode``.
    """
    a = math.log1p(per_decode)
    for _ in range(6):
        e = math.exp(a)
        a -= (a * e - per_decode) / (e * (a + 1.0))
    return a
