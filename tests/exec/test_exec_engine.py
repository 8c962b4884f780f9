"""The engine for requests that come at any time: texts, streams, ends and failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Thread

import pytest
from exec_texts import EOS, LONG_ON, continued, talking, tokenizer
from exec_toys import Fixed, pipeline, threads

from hetis_exec.errors import ExecutorError
from hetis_exec.language.params import GenerationParams
from hetis_exec.serving.engine import BusyError, ServingEngine
from hetis_exec.serving.streams import Piece
from hetis_sim.spec.errors import SpecError

PROMPT = "the quick brown"
ONE = pipeline([[0]], [4], [1])


def engine_of(**changes: object) -> ServingEngine:
    """An engine on threads."""
    most = changes.pop("requests_max", 64)
    return ServingEngine(talking(**changes), threads(), tokenizer(), most)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> Iterator[ServingEngine]:
    """One for many tests: prompts and decoding on instances of their own."""
    with engine_of() as made:
        yield made


def generated(pieces: list[Piece]) -> list[int]:
    """Their tokens."""
    return [token for piece in pieces for token in piece.tokens]


def test_tokens_are_those_of_transformers(engine: ServingEngine) -> None:
    """They come one by one, and their texts add up."""
    pieces = list(engine.submit(PROMPT, LONG_ON))
    tokens = generated(pieces)
    ids = tokenizer().encode(PROMPT)
    assert tokens == continued(ids, 12)
    assert [len(piece.tokens) for piece in pieces] == [1] * 12 + [0]
    assert [piece.finish_reason for piece in pieces] == [None] * 12 + ["length"]
    assert "".join(piece.text for piece in pieces) == tokenizer().decode([*ids, *tokens])[len(PROMPT):]


def test_many_at_once_get_what_one_alone_gets(engine: ServingEngine) -> None:
    """Clients in threads of their own; whoever comes while others are served joins them."""
    prompts = [f"{PROMPT} {n}" for n in range(8)]
    found: dict[str, str] = {}

    def client(n: int) -> None:
        time.sleep(0.01 * n)
        found[prompts[n]] = engine.submit(prompts[n], LONG_ON).text()

    clients = [Thread(target=client, args=(n,)) for n in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(30.0)
    alone = {prompt: engine.submit(prompt, LONG_ON).text() for prompt in prompts}
    assert found == alone
    assert engine.in_system == 0


def test_a_stop_string_ends_a_text_before_it(engine: ServingEngine) -> None:
    """What belongs to it is never shown, even if it comes in pieces."""
    whole = engine.submit(PROMPT, LONG_ON).text()
    stop = whole[4:7]
    pieces = list(engine.submit(PROMPT, GenerationParams(max_tokens=12, ignore_eos=True, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole[:whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert len(generated(pieces)) < 12


def test_an_end_token_ends_a_text(engine: ServingEngine) -> None:
    """It counts as a token, and has no text."""
    tokens = generated(list(engine.submit(PROMPT, LONG_ON)))
    at = tokens.index(tokens[5])
    pieces = list(engine.submit(PROMPT, GenerationParams(max_tokens=12, ignore_eos=True,
                                                         stop_token_ids=(tokens[5],))))
    assert generated(pieces) == tokens[:at + 1]
    assert pieces[-1].finish_reason == "stop"


def test_the_end_of_text_is_the_folders(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is to be ignored."""
    tokens = generated(list(engine.submit(PROMPT, LONG_ON)))
    assert tokenizer().eos == {EOS}
    monkeypatch.setattr(tokenizer(), "eos", frozenset({tokens[0]}))
    first = list(engine.submit(PROMPT, GenerationParams(max_tokens=12)))
    assert generated(first) == tokens[:1]
    assert first[-1].finish_reason == "stop"
    assert len(generated(list(engine.submit(PROMPT, LONG_ON)))) == 12


def test_whoever_has_gone_is_not_served_on(engine: ServingEngine) -> None:
    """An aborted request ends soon, and says so."""
    stream = engine.submit(PROMPT, GenerationParams(max_tokens=200, ignore_eos=True))
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            stream.abort()
    assert pieces[-1].finish_reason == "abort"
    assert len(generated(pieces)) < 200
    assert engine.in_system == 0


def test_a_client_whose_callback_fails_is_gone(engine: ServingEngine) -> None:
    """The run goes on for all others."""
    calls = []

    def fail(piece: Piece) -> None:
        calls.append(piece)
        raise RuntimeError("nobody there")

    engine.start(tokenizer().encode(PROMPT), GenerationParams(max_tokens=200, ignore_eos=True), fail)
    assert engine.submit(PROMPT, LONG_ON).text()
    deadline_s = time.monotonic() + 10.0
    while engine.in_system and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert engine.in_system == 0
    assert len(calls) == 1


def test_sampling_is_each_requests_own(engine: ServingEngine) -> None:
    """Equal seeds give equal texts, whatever runs beside them; other requests stay greedy."""
    warm = GenerationParams(max_tokens=12, temperature=1.5, top_p=0.95, seed=5, ignore_eos=True)
    streams = [engine.submit(PROMPT, params) for params in (warm, LONG_ON, warm)]
    first, greedy, again = (generated(list(stream)) for stream in streams)
    assert first == again != greedy
    assert greedy == continued(tokenizer().encode(PROMPT), 12)
    narrow = GenerationParams(max_tokens=12, temperature=1.5, top_k=1, ignore_eos=True)
    assert generated(list(engine.submit(PROMPT, narrow))) == greedy


@pytest.mark.parametrize(("prompt", "params", "message"), [
    ("", LONG_ON, r"prompt"),
    ([], LONG_ON, r"prompt=.nothing"),
    ([320], LONG_ON, r"prompt=320"),
    ([1.5], LONG_ON, r"prompt=1\.5"),
    ([5] * 300, LONG_ON, r"prompt=.300 tokens. .* at most 255"),
    ("x" * 100_000, LONG_ON, r"prompt=.100000 characters"),
    (PROMPT, GenerationParams(max_tokens=1000), r"max_tokens=1000 .* at most"),
])
def test_what_cannot_be_served_is_refused(engine: ServingEngine, prompt: object, params: GenerationParams,
                                          message: str) -> None:
    """At once, with what is allowed."""
    if prompt == "":
        # The tokenizer adds the first token of a text: an empty prompt is one.
        assert engine.submit("", LONG_ON).text() is not None
        return
    with pytest.raises(SpecError, match=message):
        engine.submit(prompt, params)  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [
    ("max_tokens", 0), ("max_tokens", True), ("temperature", -1.0), ("temperature", float("nan")),
    ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("seed", -1), ("stop", ("",)), ("stop", ("x" * 300,)),
    ("stop", ("x",) * 17), ("stop_token_ids", (-1,)),
])
def test_parameters_are_checked(field: str, value: object) -> None:
    """Each error names its field."""
    with pytest.raises(SpecError, match=field):
        GenerationParams(**{field: value})  # type: ignore[arg-type]


def test_no_more_requests_than_there_may_be() -> None:
    """Further ones are refused until one has ended."""
    with engine_of(plan=ONE, policy=Fixed(), requests_max=2) as small:
        long_on = GenerationParams(max_tokens=100, ignore_eos=True)
        first, second = small.submit(PROMPT, long_on), small.submit(PROMPT, long_on)
        with pytest.raises(BusyError, match="at most 2"):
            small.submit(PROMPT, LONG_ON)
        first.abort()
        assert list(first)[-1].finish_reason == "abort"
        assert small.submit(PROMPT, LONG_ON).text()
        second.abort()


def test_nothing_is_kept_of_what_is_over() -> None:
    """A run without end does not grow."""
    with engine_of(plan=ONE, policy=Fixed((2, 2))) as made:
        for _ in range(3):
            assert made.submit(PROMPT, LONG_ON).text()
        executor = made._executor
        assert executor.controller.states == {}
        assert executor._texts == {}
        assert executor.record.steps == executor.record.requests == []
        totals = made.totals
        assert totals.requests == {"length": 3}
        assert totals.generated_tokens == 36
        assert sum(totals.gap.counts) == 33
        assert totals.sent_bytes["push"] > 0


def test_a_lost_worker_ends_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients hear of it; later ones are refused."""
    made = engine_of(plan=ONE, policy=Fixed())
    stream = made.submit(PROMPT, GenerationParams(max_tokens=200, ignore_eos=True))
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 2:
            def broken(*_: object) -> None:
                raise RuntimeError("card fell off")
            monkeypatch.setattr(made._executor.crew.workers[0].shard, "mlp", broken)
    assert pieces[-1].finish_reason == "error"
    assert "card fell off" in pieces[-1].error
    with pytest.raises(ExecutorError, match="the engine has ended"):
        made.submit(PROMPT, LONG_ON)
    assert not made.alive


def test_closing_gives_up_what_is_left() -> None:
    """Every stream has an end."""
    made = engine_of(plan=ONE, policy=Fixed())
    stream = made.submit(PROMPT, GenerationParams(max_tokens=200, ignore_eos=True))
    made.close()
    assert list(stream)[-1].finish_reason == "abort"
    with pytest.raises(ExecutorError, match="it was closed"):
        made.submit(PROMPT, LONG_ON)
