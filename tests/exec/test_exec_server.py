"""The HTTP server, asked by plain sockets on this machine."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest
from exec_commands import SOON_S, alive, wait_for, workers
from exec_texts import LONG_ON, TEMPLATE, continued, talker, talking, tokenizer
from exec_toys import Fixed, pipeline, threads

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

from hetis_exec.serving.engine import ServingEngine
from hetis_exec.serving.http import Api
from hetis_exec.serving.server import listen, run_server
from hetis_sim.spec.errors import SpecError

PROMPT = "the quick brown"
BODY_BYTES = 20_000
ASK = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "who jumps?"}], "max_completion_tokens": 6,
        "ignore_eos": True, "temperature": 0}


class Served:
    """A running server, and a client of it."""

    def __init__(self, engine: ServingEngine, key: str = "", requests_max: int = 8) -> None:
        self.engine = engine
        self.door = listen("127.0.0.1", 0)
        self.port = self.door.getsockname()[1]
        self.peace: list[bool] = []
        api = Api(engine, "talker", BODY_BYTES, key)
        ready = Event()

        def serve() -> None:
            self.peace.append(run_server(engine, api, self.door, requests_max, ready.set))

        self.thread = Thread(target=serve, daemon=True)
        self.thread.start()
        assert ready.wait(10.0)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20.0)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and body of an answer."""
        connection = self.connection()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, None if body is None else raw, kind)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        as_json = answer.getheader("content-type") == "application/json"
        return answer.status, json.loads(text) if as_json else text

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Events of a streamed answer."""
        status, text = self.ask(path, {**body, "stream": True})
        assert status == 200
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def idle(self) -> bool:
        """Whether the engine comes to have no request."""
        deadline_s = time.monotonic() + 10.0
        while self.engine.in_system and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return not self.engine.in_system

    def close(self) -> None:
        self.engine.close()
        self.thread.join(10.0)
        self.door.close()


def one_worker(**changes: Any) -> ServingEngine:
    """An engine with a worker and an attention worker."""
    return ServingEngine(talking(pipeline([[0]], [4], [1]), Fixed((2, 2))), threads(), tokenizer(), **changes)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server for many tests."""
    made = Served(one_worker())
    yield made
    made.close()
    assert made.peace == [True]


def expected(prompt: list[int], count: int) -> str:
    """What the model says."""
    tokens = continued(prompt, count)
    whole = tokenizer().decode([*prompt, *tokens])
    return whole[len(tokenizer().decode(prompt)):]


def test_a_completion_is_the_text_that_the_model_generates(served: Served) -> None:
    """Whole, with its reason and counts."""
    status, body = served.ask("/v1/completions", ASK)
    ids = tokenizer().encode(PROMPT)
    assert status == 200
    assert body["object"] == "text_completion"
    assert body["model"] == "talker"
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected(ids, 12), "length")
    assert body["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 12,
                             "total_tokens": len(ids) + 12}


def test_a_stream_adds_up_to_the_same(served: Served) -> None:
    """Chunks as they come, the last with the reason, then the counts for whoever wants them."""
    whole = served.ask("/v1/completions", ASK)[1]
    events = served.stream("/v1/completions", {**ASK, "stream_options": {"include_usage": True}})
    *chunks, counts = events
    assert len(chunks) > 3
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert counts["choices"] == []
    assert counts["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1
    counting = served.stream("/v1/completions", {**ASK, "stream_options": {"continuous_usage_stats": True}})
    assert counting[-1]["usage"]["completion_tokens"] == 12


def test_token_ids_are_a_prompt(served: Served) -> None:
    """As they are, without anything around them."""
    ids = tokenizer().encode(PROMPT)
    bodies = [served.ask("/v1/completions", {**ASK, "prompt": prompt})[1]
              for prompt in (ids, [ids], [PROMPT])]
    assert {body["choices"][0]["text"] for body in bodies} == {expected(ids, 12)}


def test_a_chat_goes_through_the_template(served: Served) -> None:
    """The answer is a message of the assistant, whole or in pieces."""
    ids = tokenizer().encode("<s><user>who jumps?</s><assistant>", special=False)
    assert "<{{ message['role'] }}>" in TEMPLATE
    status, body = served.ask("/v1/chat/completions", CHAT)
    assert status == 200
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected(ids, 6)}
    assert body["usage"]["prompt_tokens"] == len(ids)
    first, *others = served.stream("/v1/chat/completions", CHAT)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in others) == message["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "who jumps?"}]}]
    assert served.ask("/v1/chat/completions", {**CHAT, "messages": parts})[1]["choices"] == body["choices"]


def test_texts_stop_where_clients_want(served: Served) -> None:
    """A stop string, and equal seeds for equal texts."""
    whole = served.ask("/v1/completions", ASK)[1]["choices"][0]["text"]
    body = served.ask("/v1/completions", {**ASK, "stop": whole[3:5]})[1]
    assert body["choices"][0]["text"] == whole[:whole.index(whole[3:5])]
    assert body["choices"][0]["finish_reason"] == "stop"
    warm = {**ASK, "temperature": 1.3, "top_p": 0.95, "seed": 11}
    first, again, other = (served.ask("/v1/completions", body)[1]["choices"][0]["text"]
                           for body in (warm, warm, {**warm, "seed": 12}))
    assert first == again != other


def test_many_clients_at_once(served: Served) -> None:
    """Each gets its own text."""
    found: dict[int, str] = {}

    def client(n: int) -> None:
        found[n] = served.ask("/v1/completions", {**ASK, "prompt": f"{n} {PROMPT}"})[1]["choices"][0]["text"]

    clients = [Thread(target=client, args=(n,)) for n in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(20.0)
    assert found == {n: expected(tokenizer().encode(f"{n} {PROMPT}"), 12) for n in range(6)}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(served: Served, stream: bool) -> None:
    """Its request is given up, whether its text was to be streamed or not."""
    before = served.engine.totals.requests["aborted"]
    connection = served.connection()
    connection.request("POST", "/v1/completions", json.dumps({**ASK, "max_tokens": 230, "stream": stream}),
                       {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(20)
    else:
        while not served.engine.in_system:
            time.sleep(0.005)
    connection.close()
    assert served.idle()
    assert served.engine.totals.requests["aborted"] == before + 1


@pytest.mark.parametrize(("path", "body", "status", "message"), [
    ("/v1/completions", b"{", 400, "no JSON"),
    ("/v1/completions", b"[" * 10_000, 400, "no JSON"),
    ("/v1/completions", [1], 400, "JSON object"),
    ("/v1/completions", {}, 400, "prompt='nothing'"),
    ("/v1/completions", {"prompt": {"a": 1}}, 400, "prompt='dict'"),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt='a'"),
    ("/v1/completions", {"prompt": [500]}, 400, "prompt=500"),
    ("/v1/completions", {**ASK, "max_tokens": 0}, 400, "max_tokens=0"),
    ("/v1/completions", {**ASK, "max_tokens": 1000}, 400, "max_tokens=1000"),
    ("/v1/completions", {**ASK, "max_tokens": "many"}, 400, "max_tokens='many'"),
    ("/v1/completions", {**ASK, "temperature": "hot"}, 400, "temperature='hot'"),
    ("/v1/completions", {**ASK, "top_p": 2}, 400, "top_p=2"),
    ("/v1/completions", {**ASK, "seed": "x"}, 400, "seed='x'"),
    ("/v1/completions", {**ASK, "stop": {"a": 1}}, 400, "stop"),
    ("/v1/completions", {**ASK, "stop": [3]}, 400, "stop=3"),
    ("/v1/completions", {**ASK, "n": 2}, 400, "n=2"),
    ("/v1/completions", {**ASK, "stream": "yes"}, 400, "stream='yes'"),
    ("/v1/completions", {**ASK, "model": "gpt"}, 404, "model='gpt'"),
    ("/v1/completions", {**ASK, "prompt": "x" * 3000}, 400, "tokens"),
    ("/v1/completions", {**ASK, "prompt": "x" * BODY_BYTES}, 413, "20000 bytes"),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": ["hi"]}, 400, r"messages[0]"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "content"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "judge", "content": "x"}]}, 400, "who is judge"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
])
def test_what_cannot_be_answered_is_refused(served: Served, path: str, body: Any, status: int,
                                            message: str) -> None:
    """With a status, the field and what is allowed; nothing reaches the engine."""
    got, answer = served.ask(path, body)
    assert got == status
    assert message in answer["error"]["message"]
    assert answer["error"]["code"] == status
    assert served.engine.in_system == 0


def test_forms_are_not_taken(served: Served) -> None:
    """Pages of other sites could send them unasked."""
    assert served.ask("/v1/completions", ASK, {"Content-Type": "text/plain"})[0] == 415


def test_the_model_and_its_health(served: Served) -> None:
    """What clients look at before they ask."""
    status, models = served.ask("/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["talker"])
    assert models["data"][0]["max_model_len"] == 256
    assert served.ask("/health") == (200, {"status": "ok"})


def test_figures_for_a_monitor(served: Served) -> None:
    """Counters grow with what was served; histograms are cumulative."""
    served.ask("/v1/completions", ASK)
    status, text = served.ask("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['hetis_requests_total{reason="length"}']) >= 1
    assert float(values["hetis_generated_tokens_total"]) >= 12
    name = "hetis_time_to_first_token_seconds"
    assert float(values[f'{name}_bucket{{le="+Inf"}}']) == float(values[f"{name}_count"]) >= 1
    assert values['hetis_requests_running'] == "0"
    caches = {key: float(value) for key, value in values.items() if key.startswith("hetis_cache_used_bytes")}
    assert len(caches) == 2
    assert set(caches.values()) == {0.0}


def test_a_full_engine_sends_clients_away_for_now() -> None:
    """Status 429, and when to come again."""
    full = Served(one_worker(requests_max=1))
    stream = full.engine.submit(PROMPT, LONG_ON.__class__(max_tokens=230, ignore_eos=True))
    status, body = full.ask("/v1/completions", ASK)
    assert (status, body["error"]["code"]) == (429, 429)
    stream.abort()
    assert full.idle()
    assert full.ask("/v1/completions", ASK)[0] == 200
    full.close()


def test_a_key_is_asked_for_where_there_is_one() -> None:
    """Health is for everybody."""
    kept = Served(one_worker(), key="open sesame")
    assert kept.ask("/v1/models")[0] == 401
    assert kept.ask("/v1/completions", ASK, {"Authorization": "Bearer open barley"})[0] == 401
    assert kept.ask("/v1/completions", ASK, {"Authorization": "Bearer open sesame"})[0] == 200
    assert kept.ask("/health")[0] == 200
    kept.close()


def test_a_lost_worker_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is served hears why, and whoever started the server too."""
    broken = Served(one_worker())

    def fail(*_: object) -> None:
        raise RuntimeError("card fell off")

    monkeypatch.setattr(broken.engine._executor.crew.workers[0].shard, "mlp", fail)
    status, body = broken.ask("/v1/completions", ASK)
    assert status == 500
    assert "card fell off" in body["error"]["message"]
    broken.thread.join(10.0)
    assert broken.peace == [False]
    broken.door.close()


def test_an_address_that_is_taken_is_named() -> None:
    """Before anything else is started."""
    with listen("127.0.0.1", 0) as door, pytest.raises(SpecError, match=r"serve\.host='127\.0\.0\.1:\d"):
        listen("127.0.0.1", door.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_told_to_end_does_so_in_peace(number: signal.Signals) -> None:
    """Its workers end with it."""
    line = [sys.executable, "-m", "hetis_exec", "serve", f"model.path={talker()}", "serve.port=0",
            "policy=vllm"]
    server = subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdout is not None
    assert "/v1: policy vllm" in server.stdout.readline()
    ended = workers(server.pid)
    assert ended
    server.send_signal(number)
    _, said = server.communicate(timeout=SOON_S)
    assert (server.returncode, said) == (0, "")
    wait_for(lambda: not any(alive(pid) for pid in ended), "workers end")
