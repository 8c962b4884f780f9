"""Whole steps of prompts, replayed from CUDA graphs; see :mod:`hetis_exec.whole_steps`.

Launching the kernels of a short prompt takes a host longer than computing them takes a device. A graph is for
so many tokens, of any number of prompts up to PROMPTS_MAX: attention reads on the device where each begins,
and the tokens that are left over belong to none.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetis_exec.backend import Asked
from hetis_exec.kernels.cuda import PROMPT_TOKENS_MAX, PromptPlan, Units
from hetis_exec.messages import Tokens
from hetis_exec.models.decoder import DecoderShard
from hetis_exec.recording import Outputs, Recorder, Step

TOKENS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896,
          PROMPT_TOKENS_MAX)
"""Tokens of the recorded steps. Longer ones keep a device busy for longer than their launching takes."""

PROMPTS_MAX = 16
NOTHING = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what is in the inputs of a step of some size.

    They are tokens, positions, places of the tokens after which one is sampled, prompts, spans and blocks as
    attention wants them.
    """

    tokens: int
    prompts: int
    groups: int
    blocks: int

    def parts(self, numbers: Any) -> list[Any]:
        """Tokens, positions, ends, prompts, spans and blocks, each as it is."""
        sizes = (self.tokens, self.tokens, self.prompts, 3 * self.prompts, 2 * self.prompts * self.groups,
                 2 * self.blocks)
        ends = np.cumsum(sizes).tolist()
        return [numbers[end - size:end] for size, end in zip(sizes, ends, strict=True)]

    @property
    def size(self) -> int:
        """Of the inputs."""
        return 2 * self.tokens + (4 + 2 * self.groups) * self.prompts + 2 * self.blocks


class PromptSteps:
    """Computes steps of prompts whose cache is all on this worker."""

    def __init__(self, shard: DecoderShard, recorder: Recorder) -> None:
        self._shard = shard
        self._recorder = recorder
        self._kernels = recorder.kernels
        self._launch = recorder.kernels.prompt_launch(shard.heads_per_group)
        self._steps: dict[Layout, Step] = {}

    def takes(self, news: Sequence[int]) -> bool:
        """Whether prompts with so many new tokens can be computed here."""
        return self._launch is not None and len(news) <= PROMPTS_MAX and sum(news) <= TOKENS[-1]

    def forget(self) -> None:
        """Forget all that was recorded."""
        self._steps.clear()

    def run(self, spans: Units, positions: Sequence[int], news: Sequence[int], tokens: Tokens,
            sampled: Sequence[int], asked: Asked) -> Tokens:
        """The next token of the prompts that are sampled from."""
        layout = self._layout(sum(news), len(news))
        step = self._steps.get(layout) or self._make(layout)
        self._fill(layout, step.host.numpy(), spans, positions, news, tokens, sampled)
        return self._recorder.run(step, lambda: self._compute(layout, step.inputs), len(sampled),
                                  self._shard.sampling, asked)

    def warm_up(self, tokens_max: int, until_s: float) -> None:
        """Record steps with up to so many tokens, the largest first, while there is time."""
        if self._launch is None or tokens_max < 1:
            return
        largest = bisect_left(TOKENS, min(tokens_max, TOKENS[-1]))
        for tokens in reversed(TOKENS[:largest + 1]):
            layout = self._layout(tokens, 1)
            if layout not in self._steps and time.monotonic() < until_s:
                self._make(layout)

    def _layout(self, tokens: int, prompts: int) -> Layout:
        graphs = self._recorder.graphs
        size = TOKENS[bisect_left(TOKENS, tokens)] if graphs else tokens
        number = PROMPTS_MAX if graphs else prompts
        # Every prompt may end within a block.
        return Layout(size, number, len(self._shard.groups), -(-size // self._launch.tokens) + number)

    def _fill(self, layout: Layout, host: Units, spans: Units, positions: Sequence[int],
              news: Sequence[int], tokens: Tokens, sampled: Sequence[int]) -> None:
        """Write down what a step is to compute."""
        host[:] = 0
        here, places, ends, prompts, tables, blocks = layout.parts(host)
        begins = np.cumsum([0, *news])
        here[:len(tokens)] = tokens
        places[:len(tokens)] = np.concatenate([np.arange(at, at + new)
                                               for at, new in zip(positions, news, strict=True)])
        ends[:len(sampled)] = begins[1:][list(sampled)] - 1
        prompts[:3 * len(news)] = np.stack((begins[:-1], news, positions), axis=1).ravel()
        tables[:] = NOTHING
        tables[:spans.size] = spans.ravel()
        blocks[:] = NOTHING
        cut = self._kernels.blocks_of(self._launch, news)
        blocks[:cut.size] = cut.ravel()

    def _make(self, layout: Layout) -> Step:
        inputs = torch.zeros(layout.size, dtype=torch.int64, device=self._kernels.device)
        layout.parts(inputs)[-1].fill_(NOTHING)
        step = self._recorder.step(inputs, layout.prompts, lambda: self._compute(layout, inputs))
        if self._recorder.graphs:
            self._steps[layout] = step
        return step

    def _compute(self, layout: Layout, inputs: torch.Tensor) -> Outputs:
        """Start a step on what the inputs hold: logits and likeliest tokens."""
        kernels = self._kernels
        tokens, positions, ends, prompts, spans, blocks = layout.parts(inputs)
        plan = PromptPlan(self._launch, spans.view(-1, 2), prompts.view(-1, 3), blocks.view(-1, 2))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return kernels.attend_prompts(plan, layer, q, k, v)

        logits = self._shard.whole_step(tokens, positions, attend, ends)
        return logits, logits.argmax(dim=-1)
