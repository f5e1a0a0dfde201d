"""A checkpoint's own tokenizer: text to token ids and back, special tokens, and its chat template."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError
from tokenizers import Encoding, Tokenizer as Backend

from zoo.core.errors import DataError, one_line
from zoo.core.template import literal_text, on_a_fixed_day
from zoo.core.tokenizer_files import CONFIG, TEMPLATES, load_pretrained, read_object, read_text, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GUARD = "\U0010fff0"
"""Breaks a special token that stands in somebody's text. A private character whose bytes (F4 8F ..) no vocabulary
merges with anything, so the tokens made of it can be taken out again without a trace."""

ASSISTANT = "assistant"
"""The role whose messages the model itself would write."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What transformers loads from a directory, behind the questions that training asks.

    Safe to use from several threads. Text is *plain*: whatever is written in it, `encode` gives no special token.
    Special tokens come from the caller (`bos_id`, `eos_id`) or from the chat template, see `render`.
    """

    path: Path
    pretrained: PreTrainedTokenizerFast = field(repr=False)
    """Says what the files mean, and renders. It never encodes: that changes its settings."""
    plain: Backend = field(repr=False)
    """Reads special tokens in a text as the characters they are."""
    aware: Backend = field(repr=False)
    """Reads them as special tokens."""
    template_file: str = ""
    """The file given with `chat_template`."""
    template: str | None = field(default=None, repr=False)
    """Its text."""

    @staticmethod
    def files(path: str | Path) -> tuple[str, ...]:
        """Return names of the tokenizer files in a directory, for byte-for-byte copies."""
        return tokenizer_files(Path(path))

    @classmethod
    def from_directory(cls, path: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
        """Load the tokenizer of a directory as transformers' AutoTokenizer does.

        `chat_template` is a jinja file that wins over the directory's own. Raises DataError naming directory and file.
        """
        path = Path(path)
        pretrained = load_pretrained(path)
        aware = pretrained.backend_tokenizer
        # A file may ask for cuts and padding at some length; documents are cut elsewhere.
        aware.no_truncation()
        aware.no_padding()
        plain = Backend.from_str(aware.to_str())
        plain.encode_special_tokens = True
        tokenizer = cls(path=path, pretrained=pretrained, plain=plain, aware=aware)
        return tokenizer if chat_template is None else tokenizer.with_chat_template(chat_template)

    def with_chat_template(self, path: str | Path) -> Tokenizer:
        """Return the same tokenizer with the template of a jinja file. Raises DataError if that does not parse."""
        text = read_text(Path(path), hint="give a jinja file with --chat-template FILE")
        other = replace(self, template=text, template_file=str(path))
        other._check_syntax("default")  # a broken template is reported now, not at the first sample
        return other

    # Ids --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return token ids of plain text; `add_special` lets the tokenizer put its own around them (bos, say).

        Raises DataError if the text holds a special token that this tokenizer cannot read as characters.
        """
        readable = self._readable(text)
        if readable != text:
            return _apart(self.plain.encode_batch([readable], add_special_tokens=add_special)[0], readable)[0]
        # The batch call, unlike `encode`, keeps no offsets and lets other threads run.
        return list(self.plain.encode_batch_fast([text], add_special_tokens=add_special)[0].ids)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Return token ids of two plain texts in a row, with no token across. Raises DataError as `encode`."""
        _check_unguarded(first + second)
        first, second = self._readable(first), self._readable(second)
        text = f"{first}{GUARD}{second}"
        ids, offsets = _apart(self.plain.encode_batch([text], add_special_tokens=False)[0], text)
        cut = bisect_left(offsets, (len(first),))
        return ids[:cut], ids[cut:]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids."""
        return str(self.aware.decode(list(ids), skip_special_tokens=skip_special))

    @cached_property
    def bos_id(self) -> int | None:
        """What begins a text: the tokenizer's bos token, else config.json's `bos_token_id`."""
        return self._id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """What ends a text: the tokenizer's eos token, else config.json's first `eos_token_id`."""
        return self._id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """What fills the rest of a row: the pad token, else eos, else 0. Nothing ever sees or trains it."""
        return next((id for id in (self._id("pad_token"), self.eos_id) if id is not None), 0)

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text of its own accord: bos, or nothing."""
        alone = self.encode("a")
        ids = self.encode("a", add_special=True)
        starts = (at for at in range(len(ids)) if ids[at : at + len(alone)] == alone)
        return tuple(ids[: next(starts, 0)])

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with bos, as `tokenizer(text)` of transformers does."""
        return self.bos_id is not None and self.bos_id in self.begin_ids

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.aware.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the tokens of any text or conversation may."""
        said = [self.named, self.bos_id, self.eos_id, sorted(self.special), sorted(self._markup)]
        parts = (self.aware.to_str(), json.dumps([said, self.templates], sort_keys=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def named(self) -> Mapping[str, str]:
        """Special tokens that have a name (`bos_token`, `sep_token`), by it."""
        return {name: text for name, text in self.pretrained.special_tokens_map.items() if isinstance(text, str)}

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Tokens that are no text, and their ids: named ones, those flagged special, those the template writes.

        An added token that is not flagged is taken for text unless the template writes it (`<|im_end|>`).
        """
        added = self.aware.get_added_tokens_decoder().values()
        flagged = {token.content for token in added if token.special} | set(self.named.values())
        ids = {content: self.aware.token_to_id(content) for content in flagged | self._written if content}
        return {content: id for content, id in ids.items() if id is not None}

    # Conversations ----------------------------------------------------------------------------------

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """Chat templates by name; `default` is the usual one."""
        own = self.pretrained.chat_template if self.template is None else self.template
        return dict(own) if isinstance(own, Mapping) else {} if own is None else {"default": own}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Return the text of a conversation, as the checkpoint's authors write it. Raises DataError in one line."""
        return self.render(messages, add_generation_prompt=add_generation_prompt, **variables).replace(GUARD, "")

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """As `apply_chat_template`, for `encode_rendered`: special tokens in the caller's strings are broken by GUARD.

        So an `<|eot_id|>` that somebody typed into a message is text, and the template's own is a token. An assistant
        may write the markup that the template itself keeps inside a turn (`<think>`).
        """
        guarded = [self._protect(message, own=_is_assistants(message)) for message in messages]
        given = {name: self._protect(value) for name, value in variables.items() if name not in self.named}
        return self._rendered(guarded, add_generation_prompt=add_generation_prompt, **given)

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids of a rendered conversation, and where in it (in characters) each begins and stops.

        A GUARD in the text is a place that no token crosses; it leaves no token itself. Raises DataError if the
        tokenizer cannot keep it apart.
        """
        _check_characters(text)
        return _apart(self.aware.encode_batch([text], add_special_tokens=False)[0], text)

    # Inside -----------------------------------------------------------------------------------------

    def _id(self, name: str) -> int | None:
        if name in self.named:
            return self.aware.token_to_id(self.named[name])
        value = read_object(self.path / "config.json").get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None

    # Rendering

    def _rendered(self, messages: Sequence[Any], *, tools: Any = None, documents: Any = None, **variables: Any) -> str:
        """Return what transformers renders. Raises DataError in one line, whatever the template does."""
        name = self._chosen(tools)
        _check_variables(self.pretrained, variables)
        try:
            # As a batch of one, for a conversation may be empty: what a template writes before all messages.
            (text,) = self.pretrained.apply_chat_template(
                [list(messages)],
                chat_template=on_a_fixed_day(self.templates[name]),
                tools=tools,
                documents=documents,
                tokenize=False,
                **variables,
            )
            return str(text)
        except Exception as error:  # a template is foreign code: any exception is its own
            reason = one_line(error).removeprefix("TemplateError: ")[:300]
        self._check_syntax(name)
        raise DataError(f"{self._where(name)}: the chat template refuses the messages: {reason}")

    def _chosen(self, tools: Any) -> str:
        """Return the name of the template that transformers takes."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name in self.templates:
            return name
        what = f"no default chat template, only {', '.join(self.templates)}" if self.templates else "no chat template"
        raise DataError(f"the tokenizer in {self.path} has {what}; give one with --chat-template FILE")

    def _check_syntax(self, name: str) -> None:
        """Raise DataError with the line if a template does not parse."""
        try:
            self.pretrained.apply_chat_template([[]], chat_template=self.templates[name], tokenize=False)
        except TemplateSyntaxError as error:
            raise DataError(
                f"{self._where(name)}: the chat template does not parse at line {error.lineno}: {error.message}; "
                "give another with --chat-template FILE"
            ) from None
        except Exception:  # whatever it does without messages is no matter of syntax
            return

    def _where(self, name: str) -> str:
        if self.template_file:
            return self.template_file
        files = [self.path / "chat_template.jinja"] if name == "default" else [self.path / TEMPLATES / f"{name}.jinja"]
        return str(next((file for file in files if file.is_file()), self.path / CONFIG))

    # Special tokens in somebody's text

    @cached_property
    def _written(self) -> frozenset[str]:
        """Added tokens that stand in a template, or between the turns of a conversation.

        Words and white space are not among them: a template writes those as text.
        """
        text = "\0".join((*map(literal_text, self.templates.values()), self._turns))
        added = (token.content for token in self.aware.get_added_tokens_decoder().values())
        return frozenset(content for content in added if _is_mark(content) and content in text)

    @cached_property
    def _turns(self) -> str:
        """A conversation of nearly nothing: what the template writes around and between turns; "" if it refuses it."""
        roles = ("user", ASSISTANT, "user")
        try:
            return self._rendered([{"role": role, "content": "x"} for role in roles])
        except DataError:
            return ""

    @cached_property
    def _markup(self) -> frozenset[str]:
        """Tokens that the template writes or looks for inside a turn only (`<think>`, `<tool_call>`)."""
        kept = {*self.named.values(), *(content for content in self.special if content in self._turns)}
        return frozenset(self._written - kept) if self._turns else frozenset()

    @cached_property
    def _indivisible(self) -> tuple[str, ...]:
        """Special tokens that the vocabulary itself makes of their characters, so that plain text cannot hold them."""
        return tuple(
            content
            for content, id in self.special.items()
            if content not in self._unflagged and id in self.plain.encode(content, add_special_tokens=False).ids
        )

    @cached_property
    def _unflagged(self) -> frozenset[str]:
        """Special tokens that are not flagged so: the `plain` tokenizer still finds them."""
        added = self.aware.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if not token.special and token.content in self.special)

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        """What is broken in whose text: the assistant's, anybody's else in a conversation, a text without roles."""
        return {
            ASSISTANT: _any_of(self.special.keys() - self._markup),
            "others": _any_of(self.special),
            "text": _any_of(self._unflagged - self._markup),
        }

    def _readable(self, text: str) -> str:
        _check_characters(text)
        for content in self._indivisible:
            if content in text:
                raise DataError(f"the text holds {content!r}, which this tokenizer can only read as a special token")
        return self._broken(text, "text") if self._patterns["text"].search(text) else text

    def _protect(self, value: Any, *, own: bool = False) -> Any:
        if isinstance(value, str):
            return self._broken(value, ASSISTANT if own else "others")
        if isinstance(value, Mapping):
            return {self._protect(key, own=own): self._protect(item, own=own) for key, item in value.items()}
        return [self._protect(item, own=own) for item in value] if isinstance(value, list | tuple) else value

    def _broken(self, text: str, whose: str) -> str:
        _check_unguarded(text)
        pattern = self._patterns[whose]
        while pattern.search(text):
            text = pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
        return text


def _is_assistants(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == ASSISTANT


def _is_mark(content: str) -> bool:
    return any(not (char.isalnum() or char.isspace()) for char in content)


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(re.escape(content) for content in longest_first if len(content) > 1) or "(?!)")


def _check_variables(pretrained: PreTrainedTokenizerFast, variables: Mapping[str, Any]) -> None:
    """Raise DataError for a variable that would be an option of the call and never reach the template."""
    options = inspect.signature(pretrained.apply_chat_template).parameters
    taken = sorted(name for name in variables if name in options and name != "add_generation_prompt")
    if taken:
        raise DataError(
            f"a chat template cannot have a variable named {taken[0]!r}, which is an option of transformers' own; "
            "take it out of chat_template_kwargs"
        )


def _check_unguarded(text: str) -> None:
    if GUARD in text:
        raise DataError("a text holds the character U+10FFF0, which zoo keeps for itself; take it out")


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of the text is half of a surrogate pair; take it out") from None


def _apart(encoding: Encoding, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and places of the tokens of a text, those of its GUARDs left out."""
    ids, offsets = list(encoding.ids), encoding.offsets
    if GUARD not in text:
        return ids, offsets
    kept = []
    for id, (start, stop) in zip(ids, offsets, strict=True):
        if GUARD not in text[start:stop]:
            kept.append((id, (start, stop)))
        elif text[start:stop].strip(GUARD):
            raise DataError(f"this tokenizer cannot keep {text[start:stop].replace(GUARD, '')!r} in two parts")
    return [id for id, _ in kept], [place for _, place in kept]
