"""A checkpoint's own tokenizer: text to token ids and back, special tokens, and its chat template."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer as Backend

from zoo.core.errors import DataError, one_line
from zoo.core.template import ChatTemplate

GUARD = "\U0010fff0"
"""Breaks a special token that stands in somebody's text. A private character whose bytes (F4 8F ..) no vocabulary
merges with anything, so the tokens made of it can be taken out again without a trace."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Names a tokenizer's files have in a Hugging Face directory."""


@dataclass(frozen=True)
class Tokenizer:
    """The `tokenizers` library behind the questions that training asks.

    Safe to use from several threads. Text is *plain*: whatever is written in it, `encode` gives no special token.
    Special tokens come from the caller (`bos_id`, `eos_id`) or from the chat template, see `render`.
    """

    path: Path
    plain: Backend
    """Reads special tokens in a text as the characters they are."""
    aware: Backend
    """Reads them as special tokens."""
    special: Mapping[str, int]
    """Content of each special token and its id."""
    config: Mapping[str, Any]
    """tokenizer_config.json's fields, with those of special_tokens_map.json and config.json below them."""
    templates: Mapping[str, str]
    """Chat templates by name; `default` is the usual one."""
    template_file: str = ""

    @staticmethod
    def files(path: str | Path) -> tuple[str, ...]:
        """Names of the tokenizer files in a directory, for byte-for-byte copies."""
        return tuple(name for name in FILES if (Path(path) / name).is_file())

    @classmethod
    def from_directory(cls, path: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
        """Open tokenizer.json, tokenizer_config.json and chat_template.jinja (which wins over the config's).

        `chat_template` is a jinja file that wins over both. Raises DataError naming the directory and the file.
        """
        path = Path(path)
        text = _tokenizer_json(path)
        plain, aware = _backend(text, path), _backend(text, path)
        plain.encode_special_tokens = True
        config = _merged_config(path)
        templates, template_file = _templates(path, config)
        tokenizer = cls(
            path=path,
            plain=plain,
            aware=aware,
            special=_special_tokens(aware),
            config=config,
            templates=templates,
            template_file=template_file,
        )
        return tokenizer if chat_template is None else tokenizer.with_chat_template(chat_template)

    def with_chat_template(self, path: str | Path) -> Tokenizer:
        """The same tokenizer with the template of a jinja file. Raises DataError if it cannot be read or parsed."""
        text = _read_text(Path(path), hint="give a jinja file with --chat-template FILE")
        other = replace(self, templates={"default": text}, template_file=str(path))
        other.compiled_templates  # noqa: B018 - a broken template is reported now, not at the first sample
        return other

    # Ids --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of plain text; `add_special` lets the tokenizer put its own around them (bos, say).

        Raises DataError if the text holds a special token that this tokenizer cannot read as characters.
        """
        # The batch call, unlike `encode`, keeps no offsets and lets other threads run.
        return list(self.plain.encode_batch_fast([self._readable(text)], add_special_tokens=add_special)[0].ids)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two plain texts that follow each other, with no token across. Raises DataError as `encode`."""
        text = f"{self._readable(first)}{GUARD}{self._readable(second)}"
        ids, starts = _apart(self.plain.encode_batch([text], add_special_tokens=False)[0], text)
        cut = bisect_left(starts, len(first))
        return ids[:cut], ids[cut:]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return str(self.aware.decode(list(ids), skip_special_tokens=skip_special))

    @cached_property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """What fills the rest of a row: the pad token, else eos, else 0. Nothing ever sees or trains it."""
        return next((id for id in (self._id("pad_token"), self.eos_id) if id is not None), 0)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text begins with bos: tokenizer_config.json's word, else what tokenizer.json does."""
        said = self.config.get("add_bos_token")
        if self.bos_id is None or isinstance(said, bool):
            return bool(said) and self.bos_id is not None
        return self.encode("a", add_special=True)[:1] == [self.bos_id]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.aware.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the tokens of any text or conversation may."""
        said = {key: self.config.get(key) for key in ("bos_token", "eos_token", "add_bos_token")}
        parts = (self.aware.to_str(), json.dumps([said, dict(self.templates)], sort_keys=True, default=str))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    # Conversations ----------------------------------------------------------------------------------

    @cached_property
    def compiled_templates(self) -> dict[str, ChatTemplate]:
        return {name: ChatTemplate(text, where=self.template_file) for name, text in self.templates.items()}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation, as the checkpoint's authors write it. Raises DataError in one line."""
        return self.render(messages, add_generation_prompt=add_generation_prompt, **variables).replace(GUARD, "")

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """As `apply_chat_template`, for `encode_rendered`: special tokens in the caller's strings are broken by GUARD.

        So an `<|eot_id|>` that somebody typed into a message is text, and the template's own is a token.
        """
        template = self._template(has_tools=bool(variables.get("tools")))
        tokens = {name: self._content(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        named = {name: content for name, content in tokens.items() if content is not None}
        protected = {name: self._protect(value) for name, value in variables.items()}
        return template.render(
            self._protect(list(messages)), **{**protected, **named}, add_generation_prompt=add_generation_prompt
        )

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a rendered conversation, and where in it (in characters) each token begins.

        A GUARD in the text is a place that no token crosses; it leaves no token itself. Raises DataError if the
        tokenizer cannot keep it apart.
        """
        _check_characters(text)
        return _apart(self.aware.encode_batch([text], add_special_tokens=False)[0], text)

    # Inside -----------------------------------------------------------------------------------------

    def _content(self, name: str) -> str | None:
        value = self.config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None

    def _id(self, name: str) -> int | None:
        content = self._content(name)
        if content is not None:
            return self.aware.token_to_id(content)
        value = self.config.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None

    def _template(self, *, has_tools: bool) -> ChatTemplate:
        compiled = self.compiled_templates
        name = "tool_use" if has_tools and "tool_use" in compiled else "default"
        if name not in compiled:
            raise DataError(f"the tokenizer in {self.path} has no chat template; give one with --chat-template FILE")
        return compiled[name]

    @cached_property
    def _indivisible(self) -> tuple[str, ...]:
        """Special tokens that the vocabulary itself makes of their characters, so that plain text cannot hold them."""
        return tuple(
            content
            for content, id in self.special.items()
            if id in self.plain.encode(content, add_special_tokens=False).ids
        )

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(re.escape(content) for content in longest_first if len(content) > 1) or "(?!)")

    def _readable(self, text: str) -> str:
        _check_characters(text)
        for content in self._indivisible:
            if content in text:
                raise DataError(f"the text holds {content!r}, which this tokenizer can only read as a special token")
        return text

    def _protect(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self._protect(key): self._protect(item) for key, item in value.items()}
        return [self._protect(item) for item in value] if isinstance(value, list | tuple) else value

    def _protect_text(self, text: str) -> str:
        if GUARD in text:
            raise DataError("a message holds the character U+10FFF0, which zoo keeps for itself; take it out")
        while self._special_pattern.search(text):
            text = self._special_pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
        return text


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of the text is half of a surrogate pair; take it out") from None


def _apart(encoding: Encoding, text: str) -> tuple[list[int], list[int]]:
    """Ids and first characters of the tokens of a text, those of its GUARDs left out."""
    ids, offsets = list(encoding.ids), encoding.offsets
    if GUARD not in text:
        return ids, [start for start, _ in offsets]
    kept = []
    for id, (start, stop) in zip(ids, offsets, strict=True):
        if GUARD not in text[start:stop]:
            kept.append((id, start))
        elif text[start:stop].strip(GUARD):
            raise DataError(f"this tokenizer cannot keep {text[start:stop].replace(GUARD, '')!r} in two parts")
    return [id for id, _ in kept], [start for _, start in kept]


# Reading the files --------------------------------------------------------------------------------


def _tokenizer_json(path: Path) -> str:
    if (path / "tokenizer.json").is_file():
        return _read_text(path / "tokenizer.json", hint="copy it again from the checkpoint it belongs to")
    if not path.is_dir():
        raise DataError(f"{path} is not a directory with a tokenizer; give a Hugging Face directory with --from DIR")
    found = [name for name in ("tokenizer.model", "vocab.json") if (path / name).is_file()]
    instead = f" (only {found[0]}: save it once with transformers' AutoTokenizer)" if found else ""
    raise DataError(
        f"{path} has no tokenizer.json{instead}; copy the one of the checkpoint there, "
        "or give a directory that has it with --from DIR"
    )


def _backend(text: str, path: Path) -> Backend:
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path / 'tokenizer.json'} is not a tokenizer: {one_line(error)}") from None
    # A file may ask for cuts and padding at some length; documents are cut here and nowhere else.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(backend: Backend) -> dict[str, int]:
    added: Mapping[int, AddedToken] = backend.get_added_tokens_decoder()
    return {token.content: id for id, token in added.items() if token.special and token.content}


def _merged_config(path: Path) -> dict[str, Any]:
    ids = _read_json(path / "config.json")
    kept: dict[str, Any] = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in ids}
    named = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
    return {**kept, **named}


def _templates(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    file = path / "chat_template.jinja"
    if file.is_file():
        return {"default": _read_text(file, hint="give another with --chat-template FILE")}, str(file)
    said = config.get("chat_template")
    where = str(path / "tokenizer_config.json")
    if isinstance(said, str):
        return {"default": said}, where
    if not isinstance(said, list):
        return {}, where
    entries = [entry for entry in said if isinstance(entry, Mapping)]
    return {str(entry.get("name")): str(entry.get("template")) for entry in entries}, where


def _read_text(path: Path, *, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path} cannot be read: {reason}; {hint}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path, hint="copy it again from the checkpoint it belongs to")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
