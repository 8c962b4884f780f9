"""Texts: tokenizers of folders, text out of tokens, workloads of prompts, and the command that goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from exec_models import folder, given_for
from exec_texts import BOS, EOS, continued, talker, tokenizer
from exec_toys import Handing, given, pipeline, pools, threads

from hetis_exec.cli import main
from hetis_exec.config import compose_execution
from hetis_exec.language.params import GenerationParams
from hetis_exec.language.reading import Decoder, Reader
from hetis_exec.language.tokenizer import Tokenizer
from hetis_exec.run import execute, prepare_execution, write_measured
from hetis_exec.serving import ServingEngine
from hetis_sim.spec.errors import SpecError

WORDS = ("rate=200", "executor.workers=threads", "scheduler.max_batch_tokens=64",
         "scheduler.max_batch_requests=16", "policy=vllm")


# -- tokenizers ------------------------------------------------------------------------------------------


def test_texts_come_back() -> None:
    """Special tokens around a text are the model's, and are not shown."""
    ids = tokenizer().encode("naïve café 😀")
    assert ids[0] == BOS
    assert tokenizer().encode("naïve café 😀", special=False) == ids[1:]
    assert tokenizer().decode([*ids, EOS]) == "naïve café 😀"
    assert tokenizer().eos == {EOS}


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A copy of the folder that may be spoilt."""
    return copytree(talker(), tmp_path / "model")


def test_a_folder_without_a_tokenizer_says_so(spoilt: Path) -> None:
    """With what is looked for."""
    (spoilt / "tokenizer.json").unlink()
    with pytest.raises(SpecError, match=r"model\.path=.*tokenizer\.json"):
        Tokenizer(spoilt)


@pytest.mark.parametrize(("file", "text", "message"), [
    ("tokenizer.json", "{}", "readable tokenizer"),
    ("tokenizer_config.json", "[1]", "JSON object"),
    ("generation_config.json", '{"eos_token_id": "end"}', "eos_token_id"),
    ("generation_config.json", "{", "JSON object"),
])
def test_spoilt_files_are_named(spoilt: Path, file: str, text: str, message: str) -> None:
    """Whichever it is."""
    (spoilt / file).write_text(text)
    with pytest.raises(SpecError, match=message):
        Tokenizer(spoilt)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    """It has tokens that the model does not know."""
    with pytest.raises(SpecError, match="at most the model's 300 tokens, this one has 320"):
        Tokenizer(talker(), vocab=300)


def test_ends_are_those_of_generation_then_of_the_model(spoilt: Path) -> None:
    """One or several."""
    (spoilt / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert Tokenizer(spoilt).eos == {5, 7}
    (spoilt / "generation_config.json").unlink()
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    assert Tokenizer(spoilt).eos == {9}


def test_chat_templates_are_found_and_kept_in_their_box(spoilt: Path) -> None:
    """In a file of their own or by name; code in them reaches nothing."""
    settings = json.loads((spoilt / "tokenizer_config.json").read_text())
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    (spoilt / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    hi = [{"role": "user", "content": "hi"}]
    assert Tokenizer(spoilt).decode(Tokenizer(spoilt).chat(hi)) == "hi!"
    file = spoilt / "chat_template.jinja"
    file.write_text("{{ messages[0]['content'] | tojson }}{{ strftime_now('%Y')[:2] }}")
    assert Tokenizer(spoilt).decode(Tokenizer(spoilt).chat(hi)) == '"hi"20'
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SpecError, match="chat template takes"):
        Tokenizer(spoilt).chat(hi)
    file.write_text("{% for message in messages %}")
    with pytest.raises(SpecError, match="chat template takes"):
        Tokenizer(spoilt).chat(hi)
    file.unlink()
    (spoilt / "tokenizer_config.json").write_text("{}")
    assert not Tokenizer(spoilt).chats
    with pytest.raises(SpecError, match="a folder with a chat template"):
        Tokenizer(spoilt).chat(hi)


# -- text out of tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the quick brown fox", "naïve 😀 日本語 Möwe", " leading", "a\n\nb",
                                  "😀" * 5])
def test_pieces_add_up(text: str) -> None:
    """No piece has half a character, and none is lost."""
    decoder = Decoder(tokenizer().decode)
    pieces = [decoder.add(token) for token in tokenizer().encode(text)]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + decoder.rest() == text


def test_what_is_no_character_is_shown_at_the_end() -> None:
    """Bytes that never become one, in the middle and at the end."""
    smile = tokenizer().encode("😀", special=False)
    whole = tokenizer().encode("ab", special=False)
    assert len(smile) > 1 or smile
    broken = tokenizer().encode("日", special=False)[:1]
    decoder = Decoder(tokenizer().decode)
    text = "".join(decoder.add(token) for token in [*whole, *broken]) + decoder.rest()
    assert text.startswith("ab")


def read(text: str, *stops: str, **params: Any) -> tuple[str, bool, int]:
    """What a reader shows of a text, whether it calls it complete, and how many tokens that took."""
    reader = Reader(GenerationParams(stop=stops, **params), {EOS}, tokenizer().decode)
    shown = ""
    for token in [*tokenizer().encode(text, special=False), EOS]:
        shown += reader.add(token)
        if reader.complete:
            break
    return shown + reader.rest(), reader.complete, reader.tokens


def test_stop_strings() -> None:
    """The first that comes counts; what only begins like one is shown after all."""
    text = "the lazy dog jumps"
    assert read(text)[:2] == (text, True)
    assert read(text, "dog")[:2] == ("the lazy ", True)
    assert read(text, "jumps", "lazy")[:2] == ("the ", True)
    assert read(text, "dogma", "jumpsuit")[:2] == (text, True)
    assert read(text, "dog")[2] < read(text)[2]
    assert read(text, ignore_eos=True)[:2] == (text, False)
    ids = tokenizer().encode(text, special=False)
    assert read(text, stop_token_ids=(ids[3],))[2] == ids.index(ids[3]) + 1


# -- workloads of prompts --------------------------------------------------------------------------------


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    """A file of JSON lines, as a word of the command line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"workload.path={path}"


def test_a_workload_of_prompts_is_served_as_it_asks(tmp_path: Path) -> None:
    """Real prompts, each with its own limits and stops; the simulator repeats all decisions."""
    prompt = "the quick brown"
    ids = tokenizer().encode(prompt)
    tokens = continued(ids, 9)
    stop = tokenizer().decode([*ids, *tokens])[len(prompt):][2:4]
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": 9, "ignore_eos": True},
        {"prompt": prompt, "max_tokens": 9, "ignore_eos": True, "stop": stop},
        {"prompt": prompt, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": [tokens[2]]},
        {"prompt": prompt, "max_tokens": 9, "ignore_eos": True, "temperature": 2.0, "seed": 3},
        {"messages": [{"role": "user", "content": "hm?"}], "max_tokens": 4, "ignore_eos": True},
        {"prompt": "x" * 2000, "max_tokens": 9},
    ]
    words = ("workload=prompts", lines(tmp_path / "p.jsonl", records), *WORDS,
             f"model.path={talker()}")
    execution = prepare_execution(compose_execution(*words))
    assert [r.prompt_tokens for r in execution.given.requests][:2] == [len(ids)] * 2
    done = execute(execution)
    assert done.error is None
    assert done.checked
    made = done.result.tokens
    assert made[0] == tokens
    assert made[1] == tokens[:len(made[1])] != tokens
    assert made[2] == tokens[:tokens.index(tokens[2]) + 1]
    assert made[3] != tokens
    assert len(made[4]) == 4
    assert 5 not in made
    kept = [json.loads(line) for line in
            (write_measured(done, tmp_path / "run") / "texts.jsonl").read_text().splitlines()]
    assert [row["finish_reason"] for row in kept] == [
        "length", "stop", "stop", "length", "length", "context_limit"]
    assert kept[0]["text"] == tokenizer().decode([*ids, *tokens])[len(prompt):]
    assert kept[1]["text"] == kept[0]["text"][:kept[0]["text"].index(stop)]
    assert kept[4]["prompt"].startswith("<user>hm?")
    requests = done.result.recorder.requests().set_index("request_id")
    assert requests.loc[2, "output_tokens"] == len(made[2])
    assert requests.loc[2, "reason"] == "stop"


def test_prompts_may_be_what_a_user_says(tmp_path: Path) -> None:
    """With executor.chat the template is around each; lengths are the executor's default."""
    words = ("workload=prompts", lines(tmp_path / "p.jsonl", [{"prompt": "hm?"}]),
             *WORDS, f"model.path={talker()}", "executor.chat=true", "executor.max_tokens=3",
             "executor.ignore_eos=true")
    execution = prepare_execution(compose_execution(*words))
    [request] = execution.given.requests
    assert tokenizer().decode(execution.given.prompts[0].tokens) == "<user>hm?<assistant>"
    assert (request.prompt_tokens, request.output_tokens) == (len(execution.given.prompts[0].tokens), 3)


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "a", "max_tokens": 5, "top_p": 7}, r"record 1: top_p=7"),
    ({"prompt": "a", "stop": {"x": 1}}, r"record 1: stop="),
    ({"prompt": "a", "ignore_eos": "no"}, r"record 1: ignore_eos='no'"),
    ({"messages": [{"role": "judge", "content": "a"}]}, r"record 1: messages="),
])
def test_bad_records_end_before_work_starts(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    """File, record and field are named."""
    words = ("workload=prompts", lines(tmp_path / "p.jsonl", [record]), *WORDS,
             f"model.path={talker()}")
    with pytest.raises(SpecError, match=message):
        prepare_execution(compose_execution(*words))


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    """A folder without one, or no folder, is an error of the input."""
    words = ("workload=prompts", lines(tmp_path / "p.jsonl", [{"prompt": "a"}]), *WORDS)
    with pytest.raises(SpecError, match=r"model\.path=.*tokenizer\.json"):
        prepare_execution(compose_execution(*words, f"model.path={folder('llama')}"))
    with pytest.raises(SpecError, match=r"model\.path=None.*a folder with a tokenizer"):
        prepare_execution(compose_execution(*words, f"model.config={talker() / 'config.json'}"))


def test_a_workload_of_lengths_may_end_early_too(spoilt: Path) -> None:
    """Lengths are those of the workload, unless executor.ignore_eos=false."""
    words = (*WORDS, "requests=3", "workload.prompt_scale=0.05", "workload.output_scale=0.05",
             f"model.path={spoilt}")
    whole = execute(prepare_execution(compose_execution(*words))).result.tokens
    middle = whole[1][len(whole[1]) // 2]
    (spoilt / "generation_config.json").write_text(json.dumps({"eos_token_id": middle}))
    early = execute(prepare_execution(compose_execution(*words, "executor.ignore_eos=false")))
    assert early.checked
    assert early.result.tokens[1] == whole[1][:whole[1].index(middle) + 1]
    assert execute(prepare_execution(compose_execution(*words))).result.tokens == whole


# -- the command -----------------------------------------------------------------------------------------


def test_generate_prints_a_text(capfd: pytest.CaptureFixture[str]) -> None:
    """The prompt, then how the model goes on."""
    words = (f"model.path={talker()}", *WORDS, "executor.max_tokens=8", "executor.ignore_eos=true")
    assert main(["generate", *words, "the quick brown"]) == 0
    ids = tokenizer().encode("the quick brown")
    assert capfd.readouterr().out == tokenizer().decode([*ids, *continued(ids, 8)]) + "\n"


@pytest.mark.parametrize(("words", "status", "message"), [
    ([], 2, "no prompt"),
    (["executor.max_tokens=8"], 2, "no prompt"),
    (["hello"], 2, "model.path=None"),
    (["model.path=/nowhere", "hello"], 2, "model.path='/nowhere'"),
    (["executor.colour=red", "hello"], 2, "executor.colour"),
    (["policy.colour=red", "hello"], 2, "policy.colour"),
])
def test_what_cannot_be_generated_is_refused(words: list[str], status: int, message: str,
                                             capfd: pytest.CaptureFixture[str]) -> None:
    """With status 2, before any worker starts."""
    try:
        found = main(["generate", *words])
    except SystemExit as end:
        found = end.code  # type: ignore[assignment]
    assert found == status
    assert message in capfd.readouterr().err


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    """The key that the user has set is the one that is named."""
    with pytest.raises(SpecError, match=r"model\.path=.*a folder with config\.json and safetensors"):
        prepare_execution(compose_execution(f"model.path={tmp_path}"))


OWN = os.environ.get("HETIS_MODEL", "")


@pytest.mark.slow
@pytest.mark.skipif(not OWN, reason="HETIS_MODEL names no folder of a model")
def test_a_model_of_yours_knows_its_capitals() -> None:
    """As in ``HETIS_MODEL=path/to/SmolLM2-135M ./test -m slow -k capitals``."""
    more = given_for(OWN)
    spec = more["model"]
    groups, layers = spec.kv_heads, spec.layers
    plan = pools(("prefill", pipeline([[0]], [layers], owned=[[groups]])),
                 ("decode", pipeline([[1, 2]], [layers], owned=[[groups - 1, 1]])))
    what = given(plan, Handing(streams=True), [], units=50_000, timeout_s=120.0, **more)
    with ServingEngine(what, threads(), Tokenizer(OWN)) as engine:
        params = GenerationParams(max_tokens=8)
        assert "Paris" in engine.submit("The capital of France is", params).text()
        both = "Paris is the capital of France. The capital of Germany is"
        assert "Berlin" in engine.submit(both, params).text()
