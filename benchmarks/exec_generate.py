"""How fast the engine generates on a processor, beside ``generate`` of transformers on the same cores.

    python benchmarks/exec_generate.py path/to/model [--batch 1 8 32] [--context 64 512] [--output 64]
                                       [--threads 1] [--dtype float32] [--passes 2] [--runs 2]

As many requests as the batch has come at once, with random prompts of one length, and each is to have as many
tokens as all others. The engine serves them with vLLM's policy and one worker process: scheduler, messages,
sampling and detokenizing are part of its time. Transformers gets the same prompts as one batch (greedy, with
its cache, never ending early). Both use one type and as many threads, on as many cores, of which the engine's
driver and worker share one where there is one. They take turns: in each pass every size is measured with one,
then with the other.

Rates are output tokens per second: ``decode`` from the moment at which every request has its first token to
the last token of all, ``whole`` from the moment at which the prompts are handed in. Each is the median of all
runs; ratios are the engine's rate over that of transformers, and in brackets those of single passes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from hetis_exec.language.params import GenerationParams
from hetis_exec.serving.engine import ServingEngine
from hetis_exec.serving.start import start_engine
from hetis_exec.serving.streams import Piece

MEMORY_GIB = 4
WARM_OUTPUT = 4


class Size(NamedTuple):
    """Requests, and tokens of the prompt and the output of each."""

    batch: int
    context: int
    output: int

    def prompts(self, vocab: int) -> list[list[int]]:
        """Random tokens, the same for everyone."""
        generator = np.random.default_rng([self.batch, self.context])
        found: list[list[int]] = generator.integers(vocab, size=(self.batch, self.context)).tolist()
        return found


class Rates(NamedTuple):
    """Output tokens per second."""

    decode: float
    whole: float


@dataclass(slots=True)
class Run:
    """What one run has made: when each request got its tokens, and which."""

    begun_s: float
    times_s: list[list[float]]
    tokens: list[list[int]]

    @property
    def rates(self) -> Rates:
        """Tokens that came after every request had one count as decoded."""
        began_s = max(times[0] for times in self.times_s)
        every = [at_s for times in self.times_s for at_s in times]
        later = [at_s for at_s in every if at_s > began_s]
        return Rates(len(later) / (max(later) - began_s), len(every) / (max(every) - self.begun_s))


# -- the engine ---------------------------------------------------------------------------------------------


@contextmanager
def engine_of(options: argparse.Namespace) -> Iterator[ServingEngine]:
    """An engine with one worker."""
    longest = max(options.context)
    engine = start_engine(
        f"model.path={options.model}", "policy=vllm", "output=none",
        f"cluster.hosts=[{{gpus:{{cpu-core:1}},memory_gib:{2 * MEMORY_GIB}}}]",
        f"cluster.gpu_types.cpu-core.memory_gib={MEMORY_GIB}", f"executor.dtype={options.dtype}",
        f"executor.threads={options.threads}", "executor.devices=cpu", "executor.timeout_s=300",
        f"scheduler.max_batch_requests={max(options.batch)}",
        f"scheduler.max_batch_tokens={max(2048, longest)}")
    try:
        yield engine
    finally:
        engine.close()


def run_engine(engine: ServingEngine, prompts: Sequence[Sequence[int]], output: int) -> Run:
    """All requests at once."""
    run = Run(time.perf_counter(), [[] for _ in prompts], [[] for _ in prompts])
    over, left = Event(), [len(prompts)]

    def take(number: int, piece: Piece) -> None:
        run.times_s[number] += [time.perf_counter()] * len(piece.tokens)
        run.tokens[number] += piece.tokens
        if piece.finish_reason is not None:
            left[0] -= 1
            if left[0] == 0:
                over.set()

    params = GenerationParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.start(prompt, params, lambda piece, number=number: take(number, piece))
    over.wait()
    return run


# -- transformers -------------------------------------------------------------------------------------------


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each iteration is over, and stops nothing."""

    def __init__(self, batch: int) -> None:
        self.times_s: list[float] = []
        self._nothing = torch.zeros(batch, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return self._nothing


def run_transformers(model: Any, prompts: Sequence[Sequence[int]], output: int) -> Run:
    """All requests as one batch."""
    rows, clock = torch.tensor(prompts), Clock(len(prompts))
    begun_s = time.perf_counter()
    found = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=output, do_sample=False,
                           use_cache=True, eos_token_id=None, pad_token_id=0,
                           stopping_criteria=StoppingCriteriaList([clock]))
    return Run(begun_s, [clock.times_s] * len(prompts), found[:, rows.shape[1]:].tolist())


# -- both ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cell:
    """What has been measured of one size: rates of each pass, and how many requests had the same tokens."""

    engine: list[list[Rates]] = field(default_factory=list)
    transformers: list[list[Rates]] = field(default_factory=list)
    same: int = 0

    def line(self, size: Size) -> str:
        """As a row of the table."""
        words = [f"{size.context:7} {size.batch:5}"]
        for name in Rates._fields:
            ours, theirs = ([[getattr(rates, name) for rates in runs] for runs in passes]
                            for passes in (self.engine, self.transformers))
            both = [median(chain(*passes)) for passes in (ours, theirs)]
            single = sorted(median(a) / median(b) for a, b in zip(ours, theirs, strict=True))
            words.append(f"  {both[0]:8.1f} {both[1]:12.1f} {both[0] / both[1]:6.2f}"
                         f" [{single[0]:.2f}, {single[-1]:.2f}]")
        return "".join(words) + f"  {self.same:3}/{size.batch}"


def measure(options: argparse.Namespace, model: Any, cells: dict[Size, Cell]) -> None:
    """One pass: every context with one, then with the other."""
    vocab = model.config.vocab_size
    for context in options.context:
        sizes = [size for size in cells if size.context == context]
        made: dict[Size, list[list[int]]] = {}
        with engine_of(options) as engine:
            for size in sizes:
                prompts = size.prompts(vocab)
                run_engine(engine, prompts, WARM_OUTPUT)
                runs = [run_engine(engine, prompts, size.output) for _ in range(options.runs)]
                cells[size].engine.append([run.rates for run in runs])
                made[size] = runs[-1].tokens
        for size in sizes:
            prompts = size.prompts(vocab)
            run_transformers(model, prompts, WARM_OUTPUT)
            runs = [run_transformers(model, prompts, size.output) for _ in range(options.runs)]
            cells[size].transformers.append([run.rates for run in runs])
            cells[size].same = sum(a == b for a, b in zip(made[size], runs[-1].tokens, strict=True))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[64])
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:options.threads]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    cells = {Size(batch, context, options.output): Cell()
             for context in options.context for batch in options.batch}
    for _ in range(options.passes):
        measure(options, model, cells)
    print(f"{options.dtype}, {options.threads} thread(s) on {len(cores)} core(s), {options.output} output "
          f"tokens, tokens/s\ncontext batch  decode: engine transformers  ratio      passes    whole: engine "
          "transformers  ratio      passes   same tokens")
    for size, cell in cells.items():
        print(cell.line(size))


if __name__ == "__main__":
    main()
