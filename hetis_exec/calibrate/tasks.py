"""What there is to measure, and how each piece of it runs."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from hetis_exec.calibrate.bench import BenchSpec
from hetis_exec.calibrate.crews import CrewSpec, measure_hops, measure_star, measure_sums
from hetis_exec.calibrate.host import measure_host
from hetis_exec.calibrate.launch import LaunchSpec, measure_launch
from hetis_exec.calibrate.loops import LoopSpec, measure_loops
from hetis_exec.calibrate.reference import ReferenceSpec, reference_samples
from hetis_exec.calibrate.samples import Samples
from hetis_exec.calibrate.steps import CONTEXT_MIN, Sizes, measure_steps
from hetis_exec.config import ExecutionConfig
from hetis_exec.crews import crew_maker
from hetis_exec.devices import free_bytes
from hetis_exec.errors import ExecutorError
from hetis_exec.models.architecture import ELEMENT_TYPES
from hetis_exec.places import CPU
from hetis_exec.run import Execution
from hetis_exec.throttle import NONE, cores
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.errors import require
from hetis_sim.spec.gpu import MIB
from hetis_sim.spec.lookup import find
from hetis_sim.spec.model import ModelSpec

DEGREES = (1, 2, 4, 8)
TOKENS_MAX, QUICK_TOKENS_MAX = 2048, 256
CONTEXT_MAX, QUICK_CONTEXT_MAX = 2048, 512
SHAPE_TOKENS_MAX, SHAPE_BATCH_MAX = 8192, 256
CHILD_S = 1800.0
CARD_CONTEXT_MIN = 64
"""Tokens of a tile of the decode kernel."""

POOL_MIB, CARD_POOL_MIB = 512.0, 8192.0
POOL_SHARE = 0.25
"""Of the free memory of a card, at most so much is taken for cache."""


@dataclass(frozen=True)
class Work:
    """One piece of a calibration, measured as a whole.

    Attributes:
        name: the same in every run of the same settings.
        measure: gives its samples; told a function to call now and then.
        apart: runs in a process of its own, as a worker does.
        core: that this process may use; None for any.
        devices: whose pace its samples are held against.
    """

    name: str
    measure: Callable[[Callable[[], None]], Samples]
    apart: bool = False
    core: int | None = None
    devices: tuple[int, ...] = ()

    def run(self, apart: bool, tick: Callable[[], None]) -> Samples:
        """Measure; nothing is under way while ``tick`` is called.

        Raises:
            ExecutorError: the process that measures has failed.
        """
        return _in_child(self, tick) if apart and self.apart else self.measure(tick)


def _in_child(work: Work, tick: Callable[[], None]) -> Samples:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hetis_exec.processes", "hetis_exec.torch_backend"])
    ours, theirs = context.Pipe()
    child = context.Process(target=_measure, args=(work, theirs), name=work.name, daemon=True)
    child.start()
    theirs.close()
    deadline_s = time.monotonic() + CHILD_S
    try:
        while time.monotonic() < deadline_s:
            if not ours.poll(1.0):
                continue
            kind, content = ours.recv()
            if kind == "done":
                samples: Samples = content
                return samples
            if kind == "failed":
                raise ExecutorError(f"{work.name} has failed: {content}")
            begun_s = time.monotonic()
            tick()
            deadline_s += time.monotonic() - begun_s
            ours.send(None)
        raise ExecutorError(f"{work.name} has taken longer than {CHILD_S:g} s")
    except (EOFError, BrokenPipeError) as error:
        raise ExecutorError(f"{work.name}: its process has ended without a word") from error
    finally:
        child.kill()
        child.join()


def _measure(work: Work, pipe: Connection) -> None:
    if work.core is not None:
        os.sched_setaffinity(0, {work.core})

    def tick() -> None:
        pipe.send(("tick", None))
        pipe.recv()

    try:
        samples = work.measure(tick)
    except Exception:  # noqa: BLE001 - the parent is told, and raises
        pipe.send(("failed", traceback.format_exc(limit=-3)))
    else:
        pipe.send(("done", samples))


@dataclass(frozen=True)
class Plan:
    """All that is to be measured.

    Attributes:
        work: in order.
        shapes: the models whose shapes occur, by name.
    """

    work: list[Work]
    shapes: dict[str, ModelSpec]


def plan_of(execution: Execution) -> Plan:
    """The pieces of a calibration.

    Raises:
        SpecError: an unknown model, or one that is not dense.
    """
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    config, model = execution.config, execution.prepared.model
    shapes = {name: _shape(name, backend.dtype) for name in config.calibrate.models}
    # The host's time is measured in one run, which something else may disturb: so there are two, far apart.
    work = [Work("host/before", partial(_host, execution)), *_device_work(execution, backend, shapes),
            *_crew_work(execution, backend), Work("host/after", partial(_host, execution))]
    only = [f"{wish}/" for wish in config.calibrate.only or []]
    return Plan([piece for piece in work
                 if not only or any(f"{piece.name}/".startswith(wish) for wish in only)],
                {**shapes, model.name: model} if model.name not in shapes else shapes)


def _host(execution: Execution, _tick: Callable[[], None]) -> Samples:
    config = execution.config
    return measure_host(execution.given, crew_maker(config, execution.given),
                        config.scheduler.max_batch_requests, config.calibrate.quick)


def _shape(name: str, dtype: str) -> ModelSpec:
    size = ELEMENT_TYPES[dtype]
    found = replace(find("calibrate.models", name, MODELS), weight_bytes=size, kv_bytes=size)
    require(found.experts == 1, "calibrate.models", name, "a dense model")
    return found


def sizes_of(config: ExecutionConfig, model: ModelSpec, throttle: float, shape_only: bool) -> Sizes:
    """The sizes that are measured of a model."""
    given, limits = config.calibrate, config.scheduler
    tokens = given.tokens_max or (QUICK_TOKENS_MAX if given.quick else TOKENS_MAX)
    context = given.context_max or (QUICK_CONTEXT_MAX if given.quick else CONTEXT_MAX)
    batch_max = limits.max_batch_requests
    if shape_only:
        batch_max = SHAPE_BATCH_MAX
        tokens, context = given.tokens_max or SHAPE_TOKENS_MAX, given.context_max or SHAPE_TOKENS_MAX
    else:
        tokens = min(tokens, limits.max_batch_tokens)
    return Sizes(batch_max, tokens, min(context, model.context_limit_tokens), given.repetitions,
                 given.step_limit_s * throttle, given.quick, given.seed)


def degrees_of(config: ExecutionConfig, model: ModelSpec, devices: int) -> list[int]:
    """Tensor-parallel degrees of a model on so many devices of a kind."""
    wanted = config.calibrate.tp or [degree for degree in DEGREES if degree <= devices]
    return [degree for degree in wanted if degree <= model.kv_heads]


def _device_work(execution: Execution, backend: TorchBackend, shapes: dict[str, ModelSpec]) -> Iterator[Work]:
    config, cluster, model = execution.config, execution.prepared.cluster, execution.prepared.model
    block_tokens, given = config.scheduler.block_tokens, config.calibrate
    for kind, count in cluster.gpu_counts.items():
        device = next(d.device_id for d in cluster.devices if d.gpu.name == kind)
        throttle = execution.given.throttles.get(device, NONE)
        place = backend.place(device)
        pool_bytes = _pool_bytes(given.pool_mib, place)
        slow = max(throttle.dense, throttle.attention)
        least = CONTEXT_MIN if place == CPU else CARD_CONTEXT_MIN
        own = replace(sizes_of(config, model, slow, shape_only=False), context_min=least)
        degrees = degrees_of(config, model, count) if model.name not in shapes else []
        if place != CPU and degrees:
            loop = LoopSpec(device, kind, model, place, backend.dtype, block_tokens, given.seed, False,
                            backend.cuda_graphs, pool_bytes)
            name = f"device/{kind}/{model.name}/tp{'-'.join(map(str, degrees))}"
            yield Work(name, partial(_loops, loop, degrees, own, True), apart=True)
        if place != CPU:
            loop = LoopSpec(device, kind, model, place, backend.dtype, block_tokens, given.seed, False, False,
                            pool_bytes)
            yield Work(f"host/launch/{kind}", partial(_launch, LaunchSpec(loop, backend.cuda_graphs),
                                                      given.repetitions), apart=True)
        for tp in degrees if place == CPU else []:
            name = f"device/{kind}/{model.name}/tp{tp}"
            pool = int(pool_bytes / (model.layers * model.kv_heads
                                     * model.kv_bytes_per_token_per_layer_per_group))
            spec = BenchSpec(device, model, backend, throttle, backend.dtype, block_tokens, tp,
                             max(64, pool))
            yield Work(name, partial(measure_steps, spec, own, kind), apart=True,
                       core=core_of(execution, device), devices=(device,))
        for shape in shapes.values():
            loop = LoopSpec(device, kind, shape, place, backend.dtype, block_tokens, given.seed, True, True,
                            pool_bytes)
            degrees = degrees_of(config, shape, DEGREES[-1])
            sizes = replace(sizes_of(config, shape, slow, shape_only=True), context_min=least)
            name = f"shape/{kind}/{shape.name}/tp{'-'.join(map(str, degrees))}"
            paced = place != CPU and shape.name == model.name
            yield Work(name, partial(_loops, loop, degrees, sizes, paced), apart=True,
                       devices=(device,) if place == CPU else ())


def _pool_bytes(wish_mib: float | None, place: str) -> float:
    """Cache to measure decode attention on: several times what a processor or card keeps of it."""
    if place == CPU:
        return (wish_mib or POOL_MIB) * MIB
    return min((wish_mib or CARD_POOL_MIB) * MIB, POOL_SHARE * free_bytes(place))


def _launch(spec: LaunchSpec, repeats: int, tick: Callable[[], None]) -> Samples:
    return measure_launch(spec, repeats, tick)


def _loops(spec: LoopSpec, degrees: Sequence[int], sizes: Sizes, paced: bool,
           tick: Callable[[], None]) -> Samples:
    """Samples at some degrees; if ``paced``, with those that tell the pace of the device."""
    measure = ReferenceSpec(spec.kind, replace(spec, split_head=False)).made() if paced else None

    def pace() -> Samples:
        # Too seldom to hold samples against it: so it is of no moment.
        return [] if measure is None else reference_samples({spec.kind: measure.long()}, spec.model.name, 0.0)

    samples: Samples = []
    for tp in degrees:
        samples += pace()
        samples += measure_loops(spec, tp, sizes, tick, dense_only=tp not in (degrees[0], degrees[-1]))
    return samples + pace()


def reference_of(execution: Execution, device: int, layers: int) -> ReferenceSpec:
    """The work that tells the pace of a device, on as many layers as its calibration has taken."""
    backend, model = execution.given.backend, execution.prepared.model
    assert isinstance(backend, TorchBackend)
    kind = execution.prepared.cluster.devices[device].gpu.name
    block_tokens = execution.config.scheduler.block_tokens
    place = backend.place(device)
    if place == CPU:
        bench = BenchSpec(device, model, backend, NONE, backend.dtype, block_tokens, 1, 0)
        return ReferenceSpec(kind, bench, layers)
    return ReferenceSpec(kind, LoopSpec(device, kind, model, place, backend.dtype, block_tokens, 0, False,
                                        backend.cuda_graphs, 0.0))


def core_of(execution: Execution, number: int) -> int | None:
    """The core of a worker, where workers are pinned."""
    devices = [device.device_id for device in execution.prepared.cluster.devices]
    return cores(execution.config.executor.pin, devices, sorted(os.sched_getaffinity(0))).get(number)


# -- several workers -------------------------------------------------------------------------------------


def _crew_work(execution: Execution, backend: TorchBackend) -> Iterator[Work]:
    config, cluster, model = execution.config, execution.prepared.cluster, execution.prepared.model
    kinds = [device.gpu.name for device in cluster.devices]

    def links(a: int, b: int) -> str:
        return cluster.link(a, b).name

    spec = CrewSpec(model, backend, backend.dtype, config.scheduler.block_tokens, kinds, links,
                    execution.given.throttles, config.executor.pin, crew_maker(config, execution.given))
    repeats, quick = config.calibrate.repetitions, config.calibrate.quick
    pairs = _pairs(kinds, links)
    batch_max = config.scheduler.max_batch_requests
    tokens_max = sizes_of(config, model, 1.0, shape_only=False).tokens_max
    for rank, worker in pairs:
        yield Work(f"heads/{kinds[rank]}/{kinds[worker]}/{links(rank, worker)}", partial(
            measure_star, spec, rank, worker, repeats, quick, batch_max), devices=(worker,))
    for rank, worker in _by_link(pairs, links):
        name = f"{kinds[rank]}/{kinds[worker]}/{links(rank, worker)}"
        yield Work(f"hops/{name}", partial(measure_hops, spec, rank, worker, repeats, quick, tokens_max))
        if model.kv_heads > 1:
            yield Work(f"sums/{name}", partial(measure_sums, spec, (rank, worker), repeats, quick,
                                               tokens_max))


def _pairs(kinds: Sequence[str], links: Callable[[int, int], str]) -> list[tuple[int, int]]:
    """Pairs of devices such that every kind is a rank, every kind a worker, and every link crossed."""
    chosen: list[tuple[int, int]] = []
    missing: set[tuple[str, str]] = set()
    everything = [(a, b) for a in range(len(kinds)) for b in range(len(kinds)) if a != b]
    for a, b in everything:
        missing |= _traits(kinds, links, a, b)
    # Different kinds first: they are what attention workers are for.
    for a, b in sorted(everything, key=lambda pair: (kinds[pair[0]] == kinds[pair[1]], pair)):
        here = _traits(kinds, links, a, b)
        if here & missing:
            missing -= here
            chosen.append((a, b))
    return chosen


def _traits(kinds: Sequence[str], links: Callable[[int, int], str], a: int, b: int) -> set[tuple[str, str]]:
    return {("rank", kinds[a]), ("worker", kinds[b]), ("link", links(a, b))}


def _by_link(pairs: Sequence[tuple[int, int]],
             links: Callable[[int, int], str]) -> list[tuple[int, int]]:
    """The first pair of each link."""
    first: dict[str, Any] = {}
    for pair in pairs:
        first.setdefault(links(*pair), pair)
    return list(first.values())
