"""Workloads: readers of traces, generators of arrivals and lengths, and what they build.

>>> from traces import build_workload
>>> workload = build_workload({"table": "sharegpt", "rate": 2.0, "requests": 3, "seed": 1})
>>> [request.request_id for request in workload.requests()]
[0, 1, 2]
"""

from traces.arrivals import ArrivalProcess, Constant, Gamma, OnOff, Poisson
from traces.build import build_workload
from traces.closed import ClosedLoopRun, ClosedLoopWorkload
from traces.config import ARRIVALS, WorkloadConfig
from traces.lengths import LengthFacts, LengthTable, length_facts, load_table, table_names
from traces.readers import FORMATS, ReadOptions, read_trace
from traces.rng import RngStreams
from traces.table import PrefixBlocks, TraceTable
from traces.workload import OpenWorkload, Workload
from traces.write import write_trace

__all__ = [
    "ARRIVALS", "FORMATS", "ArrivalProcess", "ClosedLoopRun", "ClosedLoopWorkload", "Constant", "Gamma",
    "LengthFacts", "LengthTable", "OnOff", "OpenWorkload", "Poisson", "PrefixBlocks", "ReadOptions",
    "RngStreams", "TraceTable", "Workload", "WorkloadConfig", "build_workload", "length_facts", "load_table",
    "read_trace", "table_names", "write_trace",
]
