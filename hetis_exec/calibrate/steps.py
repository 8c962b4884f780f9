"""Dense modules and attention of a device, from steps of the worker that serves.

Attention is measured between the dense modules of its layer, whose weights have driven the cache of
the layer before out of the processor's caches, as they do when the worker serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hetis_exec.calibrate.bench import PROMPT, BenchSpec, Job, StepBench, Timed, tables_of
from hetis_exec.calibrate.copies import Cached
from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.calibrate.turns import turns
from hetis_sim.control.timing import dense_share
from hetis_sim.spec.model import ModelSpec

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
QUICK_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BETWEEN = (3, 5, 6, 7, 10, 12, 14, 20, 24, 28)
"""Batches whose dense modules alone are measured besides, with short contexts: times there rise and fall with
the blocks of a processor's products."""

PROMPTS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144,
           8192)
QUICK_PROMPTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = ((32, 96), (128, 128), (128, 512), (256, 1024), (512, 2048), (512, 7168), (2048, 6144))
"""(new tokens, tokens before them) of pieces of prompts."""

CONTEXT_MIN = 16
CONTEXT_STEPS = 4
QUICK_CONTEXT_STEPS = 3
LONE_STEPS = 3
"""So many more of a batch of one request, which has a line of its own."""

DRAWS = 10
"""Turns whose contexts differ."""

DECODING = 4
"""Requests that decode before a prompt."""

ENOUGH_S = 2.0
"""A step that has taken so long altogether is not repeated: a long one varies less, being a mean itself."""

DECODE_TURNS = 2
"""Steps that decode are repeated so many times as often as others: they are short, and what is read from
memory varies most where others use it as well."""

STEPS_S = 120.0
"""No further turn begins when all steps have taken so long."""

POOL_SHARE = 2.5
"""Requests of small batches have long tables: all take about so many times the tokens of one batch."""


@dataclass(frozen=True)
class Sizes:
    """What is to be measured.

    Attributes:
        batch_max: requests of a batch.
        tokens_max: tokens of a step.
        context_max: of a request.
        repeats: of each step.
        limit_s: no step is repeated that takes longer.
        context_min: of decoding requests, on average. Kernels of cards take whole tiles of tokens: what is
            shorter takes as long as one, and would only bend a line that batches in service follow.
    """

    batch_max: int
    tokens_max: int
    context_max: int
    repeats: int
    limit_s: float
    quick: bool
    seed: int
    context_min: int = CONTEXT_MIN


def jobs_for(sizes: Sizes, pool_tokens: int, dense_only: bool = False, turn: int = 0) -> list[Job]:
    """Steps to measure, from small to large; where attention is known, short contexts are enough.

    Contexts of batches are drawn anew for each ``turn``.
    """
    batches = [n for n in (QUICK_BATCHES if sizes.quick else BATCHES) if n <= sizes.batch_max]
    if sizes.batch_max not in batches and sizes.batch_max < BATCHES[-1]:
        batches.append(sizes.batch_max)
    jobs: list[Job] = []
    rng = np.random.default_rng((sizes.seed, turn))
    if dense_only:
        jobs += [Job(decode=(CONTEXT_MIN,) * batch) for batch in batches]
        batches = []
    for batch in batches:
        longest = min(sizes.context_max, int(pool_tokens / (POOL_SHARE * batch)))
        steps = QUICK_CONTEXT_STEPS if sizes.quick else CONTEXT_STEPS
        if longest > sizes.context_min:
            contexts = np.geomspace(sizes.context_min, longest,
                                    steps + LONE_STEPS if batch == 1 else steps).astype(int)
            jobs += [Job(decode=spread_contexts(tokens, batch, longest, rng))
                     for tokens in dict.fromkeys(contexts.tolist())]
    limit = min(sizes.tokens_max, sizes.context_max, pool_tokens)
    prompts = [n for n in (QUICK_PROMPTS if sizes.quick else PROMPTS) if n <= limit]
    if limit not in prompts and limit < PROMPTS[-1] and not sizes.quick:
        prompts.append(limit)
    jobs += [Job(prompts=((new, 0),)) for new in prompts]
    if dense_only:
        return jobs
    jobs += [Job(prompts=((new, context),)) for new, context in CONTEXTS
             if new + context <= min(sizes.context_max, pool_tokens) and new <= sizes.tokens_max]
    return jobs


def spread_contexts(tokens: int, batch: int, longest: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Contexts that differ as those of a batch that serves do, the longest first.

    Lengths of chats are spread about as widely as an exponential distribution is: their standard deviation
    is that of their mean. A kernel that brings contexts of like length together makes as many pieces of
    them, on average over draws, as of those of chats; of one draw, and of quantiles, it does not.
    """
    if batch == 1:
        return (tokens,)
    drawn = np.clip(rng.exponential(tokens, batch).round().astype(int), 2, longest)
    ordered: list[int] = np.sort(drawn)[::-1].tolist()
    return tuple(ordered)


def measure_steps(spec: BenchSpec, sizes: Sizes, kind: str, tick: Callable[[], None]) -> Samples:
    """The samples of one device at one degree; ``tick`` is called before and after each step that counts.

    In service a batch that decodes goes on for many steps, of which the first takes up to a fifth longer, and
    a prompt comes between such steps, by which its attention takes up to a fifth longer. So before each
    step that counts one is computed that does not: the same, or before a prompt one that decodes.
    """
    draws = [jobs_for(sizes, spec.pool_tokens, spec.tp > 1, turn)
             for turn in range(min(DRAWS, DECODE_TURNS * sizes.repeats))]
    between = _jobs_between(draws[0], sizes.batch_max)
    before_prompts = Job(decode=(CONTEXT_MIN,) * min(DECODING, sizes.batch_max))
    tables = tables_of([before_prompts, *between, *(job for drawn in draws for job in drawn)])
    bench, jobs = StepBench(spec, tables), [*draws[0], *between]
    bench.step(jobs[0])
    bench.step(jobs[len(jobs) // 2])
    samples: Samples = []
    tick()
    spent = dict.fromkeys(range(len(jobs)), 0.0)
    for turn in turns(DECODE_TURNS * sizes.repeats, STEPS_S, sizes.quick):
        for number, job in enumerate([*draws[turn % len(draws)], *between]):
            if number not in spent or spent[number] > ENOUGH_S or (job.prompts and turn >= sizes.repeats):
                continue
            bench.step(job if job.decode else before_prompts)
            timed = bench.step(job)
            spent[number] += timed.whole_s
            samples += [sample for sample in samples_of(spec, kind, job, timed)
                        if number < len(draws[0]) or sample.point.module in ("dense_layer", "head")]
            if timed.whole_s > sizes.limit_s:
                spent = {other: s for other, s in spent.items() if jobs[other].tokens < job.tokens}
            tick()
    if spec.tp > 1:
        return samples
    decoding = {request: tokens for request, tokens in tables.items() if request < PROMPT}
    cached = Cached(bench.pool, decoding, bench.groups, token_bytes_of(spec.model, bench.groups))
    return samples + cached.samples(kind, spec.model.name, sizes.repeats, tick)


def _jobs_between(jobs: Sequence[Job], batch_max: int) -> list[Job]:
    """Steps that tell of dense modules alone."""
    known = {job.tokens for job in jobs if job.decode}
    return [Job(decode=(CONTEXT_MIN,) * batch) for batch in BETWEEN
            if batch <= batch_max and batch not in known]


def token_bytes_of(model: ModelSpec, groups: int) -> int:
    """Cache of one token in some KV groups of all layers."""
    return model.layers * groups * model.kv_bytes_per_token_per_layer_per_group


def samples_of(spec: BenchSpec, kind: str, job: Job, timed: Timed) -> Samples:
    """What one step says about each module."""
    model, layers = spec.model, spec.model.layers
    owned = spec.owned[0]
    dense_s = (timed.times.dense_s - timed.sample_s) / layers / dense_share(model, owned, spec.tp)
    found = [Sample(Point("dense_layer", kind, model.name, spec.tp, tokens=job.tokens), dense_s)]
    sampled = len(job.decode) + len(job.prompts)
    if spec.tp == 1:
        found.append(Sample(Point("head", kind, model.name, 1, tokens=sampled), timed.sample_s))
    attention_s = timed.times.attention_s / layers
    if job.prompts:
        ((new, context),) = job.prompts
        found.append(Sample(Point(
            "prefill_attention", kind, model.name, spec.tp, new_tokens=new, context_tokens=context,
            heads=owned * model.heads_per_group, kv_heads=owned), attention_s))
    else:
        found.append(Sample(decode_point(kind, model.name, spec.tp, owned, job.decode), attention_s))
    return found if spec.tp == 1 else found[:1]


def decode_point(kind: str, model: str, tp: int, groups: int, decode: Sequence[int]) -> Point:
    """Decode attention of ``groups`` KV groups of each request."""
    return Point("decode_attention", kind, model, tp, tokens=len(decode), rows=groups * len(decode),
                 row_tokens=groups * sum(decode))
