"""An engine for requests that come at any time: submit a prompt, read its text as it grows.

The driver runs in a thread of its own. Whoever submits talks to it through a queue, and hears of every
token from that thread, through a stream or a callback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Self

from hetis_exec.crew import Crew, WorkerSpec
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import ExecutorError
from hetis_exec.language.params import GenerationParams
from hetis_exec.language.reading import Reader
from hetis_exec.language.tokenizer import Message, Tokenizer
from hetis_exec.serving.streams import OnPiece, Piece, Stream
from hetis_exec.sources import Asked, Counter, Ended
from hetis_exec.texts import Prompt
from hetis_exec.totals import Totals
from hetis_sim.control.state import RequestState, Status
from hetis_sim.spec.errors import HetisError, SpecError, require
from hetis_sim.spec.lookup import require_int

JOIN_S = 30.0
REQUESTS_MAX = 512


class BusyError(HetisError):
    """The engine has as many requests as it may have."""


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    reader: Reader
    on_piece: OnPiece


class ServingEngine:
    """Serves requests as they come.

    Args:
        given: model, cluster, policy and plan; its requests are not looked at.
        make_crew: how workers come to life.
        tokenizer: without one, prompts are token ids, and pieces have no text.
        requests_max: requests in the system at most.

    Attributes:
        tokenizer: as given.
        longest_context: tokens that prompt and output of a request may have together.
        error: what has ended the engine.

    Raises:
        HetisError: the combination cannot run, or a worker does not start.
    """

    def __init__(self, given: ExecutorInput, make_crew: Callable[[Sequence[WorkerSpec]], Crew],
                 tokenizer: Tokenizer | None = None, requests_max: int = REQUESTS_MAX) -> None:
        self.tokenizer = tokenizer
        self.error: Exception | None = None
        self._vocab = given.model.vocab
        self._requests_max = requests_max
        self._counter = Counter()
        self._ids = itertools.count()
        self._open: dict[int, _Open] = {}
        self._ready = Event()
        self._closed = False
        self._executor = Executor(replace(given, requests=(), endless=True, log_decisions=False), make_crew,
                                  listener=self, source=self._counter)
        self.longest_context = self._executor.controller.longest_context
        self._thread = Thread(target=self._serve, name="hetis-driver", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error

    @property
    def totals(self) -> Totals:
        """Figures of the run so far."""
        found = self._executor.measurements
        assert isinstance(found, Totals)
        return found

    @property
    def alive(self) -> bool:
        """Whether requests are taken in."""
        return self._thread.is_alive() and not self._closed

    def wait(self) -> None:
        """Return once the engine has ended."""
        self._thread.join()

    def running_and_waiting(self) -> tuple[int, int]:
        """Requests that hold cache, and such that wait for it."""
        running, waiting = self._executor.controller.in_system()
        return running, waiting + self._counter.due(0.0)

    @property
    def in_system(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    # -- what clients do -------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            SpecError: it is empty or too long, has tokens that the model does not know, or is a text and
                there is no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise SpecError("prompt", "a text", "token ids: there is no tokenizer (set model.path)")
            # No token stands for less than a byte, and few for more than this many characters.
            longest = CHARACTERS_PER_TOKEN_MAX * self.longest_context
            require(len(prompt) <= longest, "prompt", f"{len(prompt)} characters", f"at most {longest}")
            prompt = self.tokenizer.encode(prompt)
        return self._checked(prompt)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises:
            SpecError: as :meth:`encode`, or the template does not take the messages.
        """
        if self.tokenizer is None:
            raise SpecError("messages", "a chat", "a prompt of token ids: there is no tokenizer")
        return self._checked(self.tokenizer.chat(messages))

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        most = self.longest_context - 1
        require(len(tokens) > 0, "prompt", "nothing", "at least one token")
        require(len(tokens) <= most, "prompt", f"{len(tokens)} tokens",
                f"at most {most}, and one to generate: no instance has room for more")
        for token in tokens:
            require_int("prompt", token, 0, self._vocab - 1)
        return list(tokens)

    def submit(self, prompt: str | Sequence[int], params: GenerationParams | None = None) -> Stream:
        """Hand a request in, and read its text from the stream.

        Raises:
            SpecError: a prompt or a number of tokens that cannot be served.
            BusyError: there are as many requests as there may be.
            ExecutorError: the engine has ended.
        """
        tokens = self.encode(prompt)
        stream = Stream(self, next(self._ids), len(tokens))
        self._ask(stream.request_id, tokens, params or GenerationParams(), stream.put)
        return stream

    def start(self, tokens: Sequence[int], params: GenerationParams, on_piece: OnPiece) -> int:
        """The same for token ids; pieces go to a callback, in the thread of the driver.

        Returns:
            The request's number. One whose callback raises is given up.
        """
        request_id = next(self._ids)
        self._ask(request_id, self._checked(tokens), params, on_piece)
        return request_id

    def _ask(self, request_id: int, tokens: list[int], params: GenerationParams, on_piece: OnPiece) -> None:
        if not self.alive:
            raise ExecutorError(f"the engine has ended: {self.error or 'it was closed'}")
        if len(self._open) >= self._requests_max:
            raise BusyError(f"{len(self._open)} requests are in the system, at most {self._requests_max} may")
        if params.stop and self.tokenizer is None:
            raise SpecError("stop", list(params.stop), "no strings: there is no tokenizer")
        left = self.longest_context - len(tokens)
        most = left if params.max_tokens is None else params.max_tokens
        require(most <= left, "max_tokens", most,
                f"at most {left} after a prompt of {len(tokens)} tokens (context: {self.longest_context})")
        known = self.tokenizer
        reader = Reader(params) if known is None else Reader(params, known.eos, known.decode, tokens)
        self._open[request_id] = _Open(reader, on_piece)
        self._counter.ask(Asked(request_id, Prompt(tokens, params.sample), most))
        if not self._thread.is_alive():
            self._fail(request_id)

    def abort(self, request_id: int) -> None:
        """Nobody waits for a request any more."""
        self._counter.end(Ended(request_id, "aborted"))

    def close(self) -> None:
        """Give up what is left, and end the workers."""
        self._closed = True
        for request_id in list(self._open):
            self.abort(request_id)
        self._counter.close()
        self._thread.join(JOIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the driver's thread ---------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._executor.run()
        except Exception as error:  # noqa: BLE001 - all clients are told
            self.error = error
        finally:
            for request_id in list(self._open):
                self._fail(request_id)
            self._ready.set()

    def _fail(self, request_id: int) -> None:
        self._deliver(request_id, Piece("", (), "error", f"the engine has ended: {self.error}"))
        self._open.pop(request_id, None)

    def began(self) -> None:
        """All workers are there."""
        self._ready.set()

    def token(self, request_id: int, token: int) -> bool:
        """A request has a token; True if its text is complete with it."""
        known = self._open.get(request_id)
        if known is None:
            return False
        text = known.reader.add(token)
        self._deliver(request_id, Piece(text, (token,)))
        return known.reader.complete

    def ended(self, state: RequestState) -> None:
        """A request has ended: its last piece."""
        known = self._open.get(state.request_id)
        if known is None:
            return
        text = "" if known.reader.complete else known.reader.rest()
        if state.status == Status.FINISHED:
            piece = Piece(text, (), "stop" if state.reason == "stop" else "length")
        elif state.reason == "aborted":
            piece = Piece(text, (), "abort")
        else:
            piece = Piece(text, (), "error", f"the request was turned away: {state.reason}")
        self._deliver(state.request_id, piece)
        self._open.pop(state.request_id, None)

    def _deliver(self, request_id: int, piece: Piece) -> None:
        known = self._open.get(request_id)
        if known is None:
            return
        try:
            known.on_piece(piece)
        except Exception:  # noqa: BLE001 - a client that cannot be reached is gone
            known.on_piece = _nobody
            self.abort(request_id)


CHARACTERS_PER_TOKEN_MAX = 256


def _nobody(piece: Piece) -> None:
    """Takes in what nobody wants."""
