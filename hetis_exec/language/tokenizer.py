"""The tokenizer of a model folder, its end-of-text tokens, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hetis_sim.spec.errors import HetisError, SpecError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
CONFIG_FILE = "config.json"
FILE_BYTES_MAX = 1 << 26
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
NEEDED = "real texts need the extra exec (pip install 'hetis-sim[exec]')"

Message = Mapping[str, Any]


class Tokenizer:
    """Texts to token ids and back.

    Attributes:
        folder: of the model.
        eos: tokens that end a text.

    Raises:
        SpecError: the folder has no ``tokenizer.json``, or one that cannot be read.
        HetisError: the package ``tokenizers`` is not installed.
    """

    def __init__(self, folder: str | Path, vocab: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self._encoder = _load(self.folder)
        self._settings = _json_object(self.folder / SETTINGS_FILE)
        self.eos = end_tokens(self.folder)
        self._template = self._find_template()
        size = self._encoder.get_vocab_size()
        if vocab is not None and size > vocab:
            raise SpecError("model.path", str(self.folder / TOKENIZER_FILE),
                            f"a tokenizer of at most the model's {vocab} tokens, this one has {size}")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the model wants around a text, such as its first token."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._encoder.decode(list(tokens), skip_special_tokens=True)
        return text

    # -- chat ------------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether the folder has a chat template."""
        return self._template is not None

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks.

        Raises:
            SpecError: the folder has no chat template, or it refuses the messages.
            HetisError: the package ``jinja2`` is not installed.
        """
        if self._template is None:
            raise SpecError("model.path", str(self.folder),
                            f"a folder with a chat template ({TEMPLATE_FILE}, or in {SETTINGS_FILE})")
        return self.encode(_render(self._template, messages, self._settings), special=False)

    def _find_template(self) -> str | None:
        file = self.folder / TEMPLATE_FILE
        if file.is_file():
            return _read(file)
        found = self._settings.get("chat_template")
        if isinstance(found, list):
            found = next((entry.get("template") for entry in found
                          if isinstance(entry, dict) and entry.get("name") == "default"), None)
        return found if isinstance(found, str) else None


def _load(folder: Path) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise HetisError(f"{error.name} is not installed: {NEEDED}") from None
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise SpecError("model.path", str(folder), f"a folder with {TOKENIZER_FILE}: texts need a tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the package raises plain Exception
        raise SpecError("model.path", str(file), f"a readable tokenizer ({error})") from None


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError("model.path", str(file), f"a readable file ({error})") from None


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise SpecError("model.path", str(file), f"a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise SpecError("model.path", str(file), "a JSON object")
    return found


def end_tokens(folder: Path) -> frozenset[int]:
    """End-of-text tokens: those that generation is configured with, else those of the model.

    Raises:
        SpecError: a file that cannot be read, or tokens that are none.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        found = _json_object(folder / name).get("eos_token_id")
        tokens = found if isinstance(found, list) else [] if found is None else [found]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens):
            raise SpecError(f"{folder / name}:eos_token_id", found, "a token id, or a list of token ids")
        if tokens:
            return frozenset(tokens)
    return frozenset()


def _render(template: str, messages: Sequence[Message], settings: Mapping[str, Any]) -> str:
    """The text of a conversation. Templates are code of the model's folder: they run in Jinja's sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise HetisError(f"{error.name} is not installed: {NEEDED}") from None

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    def plain_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = plain_json
    made.globals.update(raise_exception=refuse, strftime_now=now)
    special = {key: _special(settings.get(key)) for key in SPECIAL}
    try:
        return made.from_string(template).render(messages=[dict(message) for message in messages],
                                                 add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise SpecError("messages", f"{len(messages)} messages",
                        f"ones that the model's chat template takes ({error})") from None


def _special(value: Any) -> str:
    """A special token, which may be written with its properties."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
