"""A checkpoint's own tokenizer: text to token ids and back, special tokens, and its chat template."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer as Backend

from zoo.core.errors import DataError
from zoo.core.tokenizer.chat_template import ChatTemplates, literal_text
from zoo.core.tokenizer.files import load_pretrained, read_object
from zoo.core.tokenizer.guard import ASSISTANT, GUARD, Marks, check_unguarded, counterpart, without_guards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GUARD", "Tokenizer"]

_SAID = "\U0010fff1"
"""A private character that stands for what a message says."""


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
    named: Mapping[str, str]
    """Special tokens that have a name (`bos_token`, `sep_token`), by it."""
    undefined: frozenset[str]
    """Tokens that the class names and no file defines: nothing writes them."""
    chat: ChatTemplates

    @classmethod
    def from_directory(cls, path: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
        """Load the tokenizer of a directory as transformers' AutoTokenizer does.

        `chat_template` is a jinja file that wins over the directory's own. Raises DataError naming directory and file.
        """
        path = Path(path)
        loaded = load_pretrained(path)
        aware = loaded.pretrained.backend_tokenizer
        plain = Backend.from_str(aware.to_str())
        plain.encode_special_tokens = True
        tokenizer = cls(
            path=path,
            pretrained=loaded.pretrained,
            plain=plain,
            aware=aware,
            named=loaded.named,
            undefined=loaded.undefined,
            chat=ChatTemplates(path, loaded.pretrained),
        )
        return tokenizer if chat_template is None else tokenizer.with_chat_template(chat_template)

    def with_chat_template(self, path: str | Path) -> Tokenizer:
        """Return the same tokenizer with the template of a jinja file. Raises DataError if that does not parse."""
        chat = replace(self.chat, file=str(path))
        chat.check_syntax()  # a broken template is reported now, not at the first sample
        return replace(self, chat=chat)

    # Ids --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return token ids of plain text; `add_special` lets the tokenizer put its own around them (bos, say).

        Raises DataError if the text holds a special token that this tokenizer cannot read as characters.
        """
        readable = self._readable(text)
        if readable != text or self._folded:
            check_unguarded(text)
            return without_guards(_encoding(self.plain, readable, add_special=add_special), readable, self._folded)[0]
        return list(_encoding(self.plain, text, add_special=add_special, offsets=False).ids)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Return token ids of two plain texts in a row, with no token across. Raises DataError as `encode`."""
        check_unguarded(first + second)
        first, second = self._readable(first), self._readable(second)
        text = f"{first}{GUARD}{second}"
        ids, offsets = without_guards(_encoding(self.plain, text), text, self._folded)
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
        encoding = _encoding(self.plain, "a", add_special=True)
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(id for id, _ in takewhile(lambda pair: pair[1], added))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ids = self.aware.get_vocab(with_added_tokens=True)
        return max(id for content, id in ids.items() if content not in self.undefined) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the tokens of any text or conversation may."""
        marks = self._marks
        said = [dict(self.named), self.bos_id, self.eos_id, sorted(marks.special), sorted(marks.markup)]
        parts = (self.aware.to_str(), json.dumps([said, dict(self.templates)], sort_keys=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Tokens that are no text, and their ids: named ones, those flagged special, those the template writes.

        An added token that is not flagged is taken for text unless the template writes it (`<|im_end|>`).
        """
        ids = {content: self.aware.token_to_id(content) for content in sorted(self._marks.special)}
        return {content: id for content, id in ids.items() if id is not None}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What whoever trains with this tokenizer should be told, a sentence each."""
        said = []
        if self.eos_id is None:
            said.append(
                f"the tokenizer in {self.path} names no eos token: texts and completions end without one, so a model "
                "trained on them does not learn to stop; name it in tokenizer_config.json as eos_token"
            )
        if getattr(self.aware, "fix_mistral_regex", None) is False:
            said.append(
                f"the tokenizer in {self.path} splits words by a pattern that Mistral has corrected since; "
                '"fix_mistral_regex": true in tokenizer_config.json takes the corrected one'
            )
        return tuple(said)

    # Conversations ----------------------------------------------------------------------------------

    @property
    def templates(self) -> Mapping[str, str]:
        """Chat templates by name; `default` is the usual one."""
        return self.chat.texts

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
        reserved = sorted(variables.keys() & self.chat.reserved)
        if reserved:
            raise DataError(
                f"a chat template cannot have a variable {reserved[0]!r}, which transformers keeps for itself; "
                "take it out of chat_template_kwargs"
            )
        # No variable may pose as a special token.
        given = {name: self._marks.broken_in(value) for name, value in variables.items() if name not in self.named}
        said = [self._marks.broken_in_message(message) for message in messages]
        return self.chat.render(said, add_generation_prompt=add_generation_prompt, **given)

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids of a rendered conversation, and where in it (in characters) each begins and stops.

        A GUARD in the text is a place that no token crosses; it leaves no token itself. Raises DataError if the
        tokenizer cannot keep it apart.
        """
        _check_characters(text)
        return without_guards(_encoding(self.aware, text), text, self._folded)

    # Inside -----------------------------------------------------------------------------------------

    @cached_property
    def _folded(self) -> Mapping[int, str]:
        """Special tokens that are looked for in the normalized text, where other characters may have become theirs."""
        if self.aware.normalizer is None:
            return {}
        added = self.aware.get_added_tokens_decoder()
        return {id: one.content for id, one in added.items() if one.normalized and one.content in self.special}

    def _id(self, name: str) -> int | None:
        if name in self.named:
            return self.aware.token_to_id(self.named[name])
        value = read_object(self.path / "config.json").get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return None
        return None if self.aware.id_to_token(value) is None else value

    @cached_property
    def _marks(self) -> Marks:
        """Special tokens by flag, by name, and by what the template writes."""
        added = self.aware.get_added_tokens_decoder().values()
        flagged = {token.content for token in added if token.special and token.content}
        named = set(self.named.values())
        frame, header = self._frame()
        # Words and white space that a template writes are text, whatever was added to the vocabulary.
        signs = {token.content for token in added if any(not (c.isalnum() or c.isspace()) for c in token.content)}
        text = "\0".join((*map(literal_text, self.templates.values()), frame, header))
        written = {content for content in signs if content in text}
        special = (flagged | named | written) - self.undefined
        free = {content for content in signs - named if content not in frame} if frame else set()
        # Pairs that a template writes before an answer without reasoning (`<think></think>`) are no header.
        inside = {content for content in written & free if content not in header or counterpart(content) in free}
        return Marks(frozenset(special), frozenset(special - flagged - named), frozenset(inside))

    def _frame(self) -> tuple[str, str]:
        """Return what the template writes around the turns of a chat, and apart what it begins an assistant's with.

        Nothing if it refuses the least chat.
        """
        roles = ("user", ASSISTANT, "user")
        try:
            text = self.chat.render([{"role": role, "content": _SAID} for role in roles])
        except DataError:
            return "", ""
        before, *between = text.split(_SAID)
        if len(between) != len(roles):
            return text, ""
        header, *after = between
        return "\0".join((before, *after)), header

    @cached_property
    def _indivisible(self) -> tuple[str, ...]:
        """Special tokens that the vocabulary itself makes of their characters, so that plain text cannot hold them."""
        return tuple(
            content
            for content, id in self.special.items()
            if content not in self._marks.unflagged and id in self._spelled(content)
        )

    def _spelled(self, content: str) -> Sequence[int]:
        try:
            return _encoding(self.plain, content).ids
        except DataError:
            return ()

    def _readable(self, text: str) -> str:
        """Return the text with special tokens broken that `plain` finds. Raises DataError for what cannot be broken."""
        _check_characters(text)
        for content in self._indivisible:
            if content in text:
                raise DataError(f"the text holds {content!r}, which this tokenizer can only read as a special token")
        return self._marks.broken_in_text(text)


def _encoding(backend: Backend, text: str, *, add_special: bool = False, offsets: bool = True) -> Encoding:
    """Return the tokens of a text. Raises DataError if the vocabulary cannot spell it."""
    # Calls for batches, unlike `encode`, let other threads run.
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode([text], add_special_tokens=add_special)[0]
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the tokenizer cannot read a text: {str(error)[:200]}") from None


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of the text is half of a surrogate pair; take it out") from None
