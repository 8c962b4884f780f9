"""The text of a request as whoever asked for it gets it: piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from hetis_exec.errors import ExecutorError
from hetis_exec.language.reading import FinishReason


class Aborts(Protocol):
    """Whoever serves a request can give it up."""

    def abort(self, request_id: int) -> None:
        """Nobody waits for a request any more."""


class Piece(NamedTuple):
    """What a token adds to a text.

    Attributes:
        text: may be empty: a character may take several tokens, and stop strings are held back.
        tokens: its ids; the last piece of a text has none.
        finish_reason: of the last piece.
        error: why there is no more, where that is no end of the text.
    """

    text: str
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""


OnPiece = Callable[[Piece], None]


class Stream:
    """The text of one request, to be iterated over once: pieces as they come, the last one with its reason.

    Attributes:
        request_id: its number.
        prompt_tokens: of its prompt.
    """

    def __init__(self, engine: Aborts, request_id: int, prompt_tokens: int) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self._engine = engine
        self._pieces: SimpleQueue[Piece] = SimpleQueue()

    def put(self, piece: Piece) -> None:
        """Take a piece in."""
        self._pieces.put(piece)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.finish_reason is not None:
                return

    def abort(self) -> None:
        """Nobody wants the rest: the request ends soon, and its last piece says so."""
        self._engine.abort(self.request_id)

    def text(self) -> str:
        """All of it, once it has ended.

        Raises:
            ExecutorError: it has ended by an error.
        """
        parts = []
        for piece in self:
            parts.append(piece.text)
            if piece.finish_reason == "error":
                raise ExecutorError(piece.error)
        return "".join(parts)
