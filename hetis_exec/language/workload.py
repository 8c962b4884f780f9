"""Workloads whose prompts are texts, and the texts that come of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hetis_exec.language.params import GenerationParams
from hetis_exec.language.reading import Reader
from hetis_exec.language.tokenizer import Tokenizer, end_tokens
from hetis_exec.texts import Prompt
from hetis_sim.control.state import RequestState, Status
from hetis_sim.spec.errors import SpecError, require
from hetis_sim.spec.request import Request
from traces import OpenWorkload

FILE = "texts.jsonl"


@dataclass(frozen=True, slots=True)
class TextSettings:
    """What holds for prompts that do not say otherwise.

    Attributes:
        max_tokens: of the text that is generated.
        ignore_eos: None ends texts at an end-of-text token where the workload has texts, and gives them
            the workload's lengths where it has not.
        chat: prompts are what a user says, and the model's chat template is applied to them.
    """

    max_tokens: int = 128
    ignore_eos: bool | None = None
    chat: bool = False


@dataclass(slots=True)
class Written:
    """What has been generated for a request."""

    reader: Reader
    parts: list[str] = field(default_factory=list)
    finish_reason: str = ""
    tokens: int = 0


class Texts:
    """Reads the texts of a workload as they are generated, and says when they are complete."""

    def __init__(self, readers: Mapping[int, Reader], prompts: Mapping[int, str]) -> None:
        self._written = {request_id: Written(reader) for request_id, reader in readers.items()}
        self._prompts = prompts

    def began(self) -> None:
        """All workers are there."""

    def token(self, request_id: int, token: int) -> bool:
        """A request has a token; True if its text is complete with it."""
        written = self._written[request_id]
        written.parts.append(written.reader.add(token))
        return written.reader.complete

    def ended(self, state: RequestState) -> None:
        """A request has ended."""
        written = self._written[state.request_id]
        if not written.reader.complete:
            written.parts.append(written.reader.rest())
        written.tokens = written.reader.tokens
        whole = state.status == Status.FINISHED and not state.reason
        written.finish_reason = "length" if whole else state.reason

    def text(self, request_id: int) -> str:
        """What has been generated for a request so far."""
        return "".join(self._written[request_id].parts)

    def write(self, folder: Path) -> None:
        """Keep prompts and texts, one JSON object a line; nothing if the workload has no texts."""
        if not self._prompts:
            return
        with (folder / FILE).open("w", encoding="utf-8") as file:
            for request_id, prompt in self._prompts.items():
                written = self._written[request_id]
                row = {"request_id": request_id, "prompt": prompt, "text": self.text(request_id),
                       "output_tokens": written.tokens, "finish_reason": written.finish_reason}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def texts_of(workload: OpenWorkload, folder: Path | None, settings: TextSettings,
             vocab: int) -> tuple[list[Request], dict[int, Prompt], Texts | None]:
    """The requests of a workload; where it has texts, with their prompts and lengths as the model counts.

    Raises:
        SpecError: texts without a tokenizer, or a record that asks for what cannot be.
    """
    requests = workload.requests()
    texts = None if workload.trace is None else workload.trace.texts
    if texts is None or workload.lengths.rows is None:
        if settings.ignore_eos is not False:
            return requests, {}, None
        if folder is None:
            raise SpecError("executor.ignore_eos", False, "true or null without model.path: a folder says "
                            "which tokens end a text")
        eos = end_tokens(folder)
        return requests, {}, Texts({r.request_id: Reader(GenerationParams(), eos) for r in requests}, {})
    if folder is None:
        raise SpecError("model.path", None, "a folder with a tokenizer: the workload has texts "
                        f"({workload.source})")
    tokenizer = Tokenizer(folder, vocab)
    found: list[Request] = []
    prompts: dict[int, Prompt] = {}
    readers: dict[int, Reader] = {}
    shown: dict[int, str] = {}
    for request, row in zip(requests, workload.lengths.rows.tolist(), strict=True):
        record = texts[row]
        try:
            params = params_of(record, settings)
            tokens = _tokens(record, tokenizer, settings.chat)
        except SpecError as error:
            raise SpecError(f"{workload.source}: record {row + 1}: {error.key}", error.value,
                            error.allowed) from None
        assert params.max_tokens is not None
        number = request.request_id
        found.append(replace(request, prompt_tokens=len(tokens), output_tokens=params.max_tokens))
        prompts[number] = Prompt(tokens, params.sample)
        readers[number] = Reader(params, tokenizer.eos, tokenizer.decode, tokens)
        shown[number] = tokenizer.decode(tokens)
    return found, prompts, Texts(readers, shown)


def params_of(record: Mapping[str, Any], settings: TextSettings) -> GenerationParams:
    """What a record asks for.

    Raises:
        SpecError: a field with a value that is not allowed.
    """
    most = next((record[key] for key in ("max_tokens", "max_completion_tokens", "output_tokens")
                 if record.get(key) is not None), settings.max_tokens)
    ignore = record.get("ignore_eos", settings.ignore_eos or False)
    require(isinstance(ignore, bool), "ignore_eos", ignore, "true or false")
    sampling = {key: record[key] for key in ("temperature", "top_p", "top_k", "seed") if key in record}
    if sampling and "temperature" not in sampling:
        sampling["temperature"] = 1.0
    return GenerationParams(max_tokens=most, stop=listed("stop", record.get("stop")),
                            stop_token_ids=listed("stop_token_ids", record.get("stop_token_ids")),
                            ignore_eos=ignore, **sampling)


def listed(key: str, value: Any) -> tuple[Any, ...]:
    """A value that may be one or several, as a tuple.

    Raises:
        SpecError: neither a list, nor a text or a number.
    """
    if value is None:
        return ()
    if isinstance(value, str | int):
        return (value,)
    if not isinstance(value, Sequence):
        raise SpecError(key, value, "one value, or a list of them")
    return tuple(value)


def _tokens(record: Mapping[str, Any], tokenizer: Tokenizer, chat: bool) -> list[int]:
    if "messages" in record:
        tokens = tokenizer.chat(record["messages"])
    elif chat:
        tokens = tokenizer.chat([{"role": "user", "content": record["prompt"]}])
    else:
        tokens = tokenizer.encode(record["prompt"])
    require(len(tokens) > 0, "prompt", record.get("prompt"), "a text of at least one token")
    return tokens
