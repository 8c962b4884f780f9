"""A tiny model whose folder has a tokenizer, end-of-text tokens and a chat template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from exec_models import folder, reference, torch
from exec_toys import Handing, given, pipeline, pools

from hetis_exec.driver import ExecutorInput
from hetis_exec.language.params import GenerationParams
from hetis_exec.language.tokenizer import Tokenizer
from hetis_exec.models.architecture import read_architecture
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import Plan

tokenizers = pytest.importorskip("tokenizers", reason="texts need the extra exec")

TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message['role'] not in ('user', 'assistant', "
            "'system') %}{{ raise_exception('who is ' + message['role'] + '?') }}{% endif %}"
            "<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
SENTENCES = ["the quick brown fox jumps over the lazy dog", "die Füße der Möwe", "naïve café 😀 日本語",
             "a text is a text is a text"] * 3
SPECIAL = ["<s>", "</s>", "<pad>"]
BOS, EOS, _ = range(3)


@cache
def talker() -> Path:
    """The folder: bytes in pairs, 320 tokens, ``</s>`` ends a text."""
    path = folder("talker")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A",
                                                                   special_tokens=[("<s>", BOS)])
    made.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return path


@cache
def tokenizer() -> Tokenizer:
    """That of the folder."""
    return Tokenizer(talker())


def talking(plan: Plan | None = None, policy: Policy | None = None, **changes: Any) -> ExecutorInput:
    """The input of an engine: prompts on two ranks, decoding on two stages, unless told otherwise."""
    path = talker()
    backend = TorchBackend(read_architecture(path), path)
    plan = plan or pools(("prefill", pipeline([[0, 1]], [4], owned=[[3, 1]])),
                         ("decode", pipeline([[2], [3]], [1, 3])))
    return given(plan, policy or Handing(streams=True), [], model=backend.architecture.spec, backend=backend,
                 **changes)


def continued(prompt: list[int], count: int) -> list[int]:
    """What transformers generates, without regard to the end of the text."""
    text = torch.tensor([prompt])
    model = reference("talker")
    model.generation_config.eos_token_id = None
    made = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=count, do_sample=False,
                          pad_token_id=0)
    found: list[int] = made[0, len(prompt):].tolist()
    return found


LONG_ON = GenerationParams(max_tokens=12, ignore_eos=True)
