"""What a round trip to an attention worker costs, by what carries the messages.

    python benchmarks/exec_links.py [--rows 2 16 64 256 1024] [--rounds 300]

One process sends the queries, keys and values of some rows of decode attention in one layer (float32, three
query heads of 64 for each KV head, as SmolLM2-135M has them), another one answers at once with an output of
the queries' shape. Rings (of processes that look for messages before they sleep), pipes, frames and gloo take
turns, so that other work on the machine disturbs all alike; printed are the median and the tenth percentile
of the time from sending to having the answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hetis_exec.joining import NetSettings, Seat, meet
from hetis_exec.messages import AttentionRequest, AttentionResult, Stop
from hetis_exec.net.endpoint import NetworkEndpoint
from hetis_exec.net.handshake import new_token
from hetis_exec.net.meeting import Meeting, MeetingPlace, host_meeting, join_meeting
from hetis_exec.net.rings import Region
from hetis_exec.pipes import PipeEndpoint, pair_region
from hetis_exec.processes import SPIN_S
from hetis_exec.transport import Endpoint

HEADS, HEAD_DIM = 3, 64
PATIENCE_S = 60.0
EVERYTHING_BYTES = 1 << 40


def echo(endpoint: Endpoint) -> None:
    """The other end: an attention worker that computes nothing."""
    while not isinstance(message := endpoint.receive(PATIENCE_S), Stop):
        assert isinstance(message, AttentionRequest)
        endpoint.send(0, AttentionResult(message.after, message.layer, 1, message.queries, 0.0))


def network(device: int, place: MeetingPlace, name: str, token: bytes, eager_bytes: int) -> NetworkEndpoint:
    """One end of a connection with wires."""
    seat = Seat(device, ((0, 1),), NetSettings(eager_bytes), PATIENCE_S)
    endpoint = NetworkEndpoint(device, eager_bytes)
    meet(join_meeting(replace(place, prefix=name)), seat, endpoint, token, control=0)
    return endpoint


def echo_pipe(pipe: object, region: Region | None = None, spin_s: float = 0.0) -> None:
    """Life of the other process, on a pipe, and rings if there is memory for them."""
    regions = {0: region} if region is not None else None
    echo(PipeEndpoint(1, {0: pipe}, regions=regions, spin_s=spin_s))  # type: ignore[dict-item]


def echo_network(place: MeetingPlace, name: str, token: bytes, eager_bytes: int) -> None:
    """Life of the other process, on connections."""
    endpoint = network(1, place, name, token, eager_bytes)
    echo(endpoint)
    endpoint.close(1.0)


def ends(meeting: Meeting) -> dict[str, Endpoint]:
    """The end of each kind of link that is here; the others answer in processes of their own."""
    context = multiprocessing.get_context("forkserver")
    made: dict[str, Endpoint] = {}
    for name, region, spin_s in (("rings", pair_region(), SPIN_S), ("pipes", None, 0.0)):
        here, there = context.Pipe()
        context.Process(target=echo_pipe, args=(there, region, spin_s), daemon=True).start()
        regions = {1: region} if region is not None else None
        made[name] = PipeEndpoint(0, {1: here}, regions=regions, spin_s=spin_s)
    for name, eager_bytes in (("frames", EVERYTHING_BYTES), ("gloo", 0)):
        token = new_token()
        process = context.Process(target=echo_network, args=(meeting.place, name, token, eager_bytes),
                                  daemon=True)
        process.start()
        made[name] = network(0, meeting.place, name, token, eager_bytes)
    return made


def round_trip_s(endpoint: Endpoint, rows: int, seq: int) -> float:
    """Seconds from sending a request to having its answer."""
    shapes = (rows, HEADS, HEAD_DIM), (rows, HEAD_DIM), (rows, HEAD_DIM)
    arrays = [np.ones(shape, dtype=np.float32) for shape in shapes]
    begun_s = time.perf_counter()
    endpoint.send(1, AttentionRequest(seq, 0, 1, *arrays))
    answer = endpoint.receive(PATIENCE_S)
    assert isinstance(answer, AttentionResult)
    assert answer.values.shape == (rows, HEADS, HEAD_DIM)
    return time.perf_counter() - begun_s


def main(rows: Sequence[int], rounds: int) -> None:
    """Print a table."""
    # The store is there for as long as anybody may look something up.
    meeting = host_meeting()
    links = ends(meeting)
    print(f"{'rows':>6} {'KiB there':>10} {'KiB back':>9}", *[f"{name + ' (us)':>18}" for name in links])
    for count in rows:
        times: dict[str, list[float]] = {name: [] for name in links}
        for seq in range(rounds):
            for name, endpoint in links.items():
                # Who has just answered still looks for messages, as in the layers of a step.
                round_trip_s(endpoint, count, seq)
                times[name].append(1e6 * round_trip_s(endpoint, count, seq))
        back_kib = count * HEADS * HEAD_DIM * 4 / 1024
        cells = [f"{statistics.median(found):9.0f} [{np.quantile(found, 0.1):6.0f}]"
                 for found in times.values()]
        print(f"{count:6} {back_kib * (HEADS + 2) / HEADS:10.1f} {back_kib:9.1f}", *cells)
    for endpoint in links.values():
        endpoint.send(1, Stop(at_once=True))
        if isinstance(endpoint, NetworkEndpoint):
            endpoint.close(1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    main(given.rows, given.rounds)
