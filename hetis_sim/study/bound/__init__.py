"""An upper bound on the throughput of any policy; ``docs/bound.md`` has the argument.

>>> from hetis_sim import prepare, compose
>>> from hetis_sim.study.bound import bound_of
>>> bound_of(prepare(compose("rate=2", "requests=50"))).requests_per_s > 2
True
"""

from hetis_sim.study.bound.result import Bound, bound_of, upper_bound

__all__ = ["Bound", "bound_of", "upper_bound"]
