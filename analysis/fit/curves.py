"""Fits monotone curves of seconds by size: elementwise kernels and collectives."""

from __future__ import annotations

import numpy as np

from analysis.fit.errors import Floats
from analysis.fit.gemm import fit_surface
from hetis_sim.cost.curve import Curve

# A rate of streaming kernels whose small sizes were timed with the launch: launches are left out there.
GRAPH_KERNEL_S = 2e-6


def fit_curve(sizes: Floats, seconds: Floats, knots: tuple[float, ...]) -> Curve:
    """Least-absolute-error curve in log-log coordinates with knots at log2 sizes, made non-falling."""
    used = tuple(knot for knot in knots if np.log2(sizes.min()) - 2 <= knot <= np.log2(sizes.max()) + 2)
    # A line per axis: the surface fit works for one axis as well.
    grid = fit_surface((np.log2(sizes),), np.log(seconds), (used,), stiffness=0.1)
    values = np.maximum.accumulate(np.exp(np.asarray(grid.values)))
    return Curve(tuple(float(2.0**knot) for knot in used), tuple(float(x) for x in values))


def proportional(bytes_per_s: float) -> Curve:
    """A kernel of fixed cost plus bytes over a rate, as a curve from 4 KiB to 4 GiB."""
    sizes = tuple(float(2**n) for n in range(12, 33, 2))
    return Curve(sizes, tuple(GRAPH_KERNEL_S + size / bytes_per_s for size in sizes))


def predict(curve: Curve, sizes: Floats) -> Floats:
    """Seconds for each size."""
    return np.array([curve.at(float(size)) for size in sizes])
