"""Chat templates: chosen, rendered by transformers in its sandbox, refused in one line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError

from zoo.core.errors import DataError, one_line
from zoo.core.tokenizer.files import CONFIG, TEMPLATES, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells a template: a fixed day, so that the same data gives the same tokens tomorrow."""

_DIRECTIVES = "aAbBcdDeFHIjlmMnpPrRsStTuUVwWxXyYzZ"


@dataclass(frozen=True, eq=False)
class ChatTemplates:
    """The chat templates of a tokenizer's directory, or the one of a file."""

    path: Path
    pretrained: PreTrainedTokenizerFast = field(repr=False)
    file: str = ""
    """A jinja file whose template stands for all of the directory's."""

    @cached_property
    def texts(self) -> Mapping[str, str]:
        """Templates by name; `default` is the usual one. Raises DataError if the file cannot be read."""
        if self.file:
            return {"default": read_text(Path(self.file), hint="give a jinja file with --chat-template FILE")}
        own = self.pretrained.chat_template
        named = own if isinstance(own, Mapping) else {"default": own}
        return {name: text for name, text in named.items() if isinstance(text, str)}

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Names that are options of transformers' call and never reach a template."""
        options = inspect.signature(self.pretrained.apply_chat_template).parameters
        return frozenset(options) - {"tools", "documents", "add_generation_prompt"}

    def render(self, messages: Sequence[Any], *, tools: Any = None, documents: Any = None, **variables: Any) -> str:
        """Return what transformers renders. Raises DataError in one line, whatever the template does."""
        name = self._chosen(tools)
        try:
            # As a batch of one, for a conversation may be empty: what a template writes before all messages.
            (text,) = self.pretrained.apply_chat_template(
                [list(messages)],
                chat_template=self._sources[name],
                tools=tools,
                documents=documents,
                tokenize=False,
                **variables,
            )
            return str(text)
        except Exception as error:  # a template is foreign code: any exception is its own
            reason = one_line(error).removeprefix("TemplateError: ")[:300]
        self.check_syntax(name)
        raise DataError(f"{self._where(name)}: the chat template refuses the messages: {reason}")

    def check_syntax(self, name: str = "default") -> None:
        """Raise DataError with the line if a template does not parse."""
        text = self.texts[name]
        try:
            self.pretrained.apply_chat_template([[]], chat_template=text, tokenize=False)
        except TemplateSyntaxError as error:
            raise DataError(
                f"{self._where(name)}: the chat template does not parse at line {error.lineno}: {error.message}; "
                "give another with --chat-template FILE"
            ) from None
        except Exception:  # whatever it does without messages is no matter of syntax
            return

    @cached_property
    def _sources(self) -> Mapping[str, str]:
        return {name: on_a_fixed_day(text) for name, text in self.texts.items()}

    def _chosen(self, tools: Any) -> str:
        """Return the name of the template that transformers takes."""
        name = "tool_use" if tools is not None and "tool_use" in self.texts else "default"
        if name in self.texts:
            return name
        what = f"no default chat template, only {', '.join(self.texts)}" if self.texts else "no chat template"
        raise DataError(f"the tokenizer in {self.path} has {what}; give one with --chat-template FILE")

    def _where(self, name: str) -> str:
        if self.file:
            return self.file
        file = self.path / "chat_template.jinja" if name == "default" else self.path / TEMPLATES / f"{name}.jinja"
        return str(file if file.is_file() else self.path / CONFIG)


def on_a_fixed_day(source: str) -> str:
    """Return a template in whose text `strftime_now` means TODAY.

    transformers passes no function to a template, so it is a macro on a line before it, which leaves nothing behind.
    """
    if "strftime_now" not in source:
        return source
    flags = ("", "-")
    table = {f"%{flag}{letter}": TODAY.strftime(f"%{flag}{letter}") for letter in _DIRECTIVES for flag in flags}
    replaced = "".join(f" | replace({key!r}, {value!r})" for key, value in table.items())
    # A doubled sign is put out of the way first, so that the letter behind it is no directive.
    day = f"{{{{ format | replace('%%', '\\0'){replaced} | replace('\\0', '%') }}}}"
    return f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}\n{source}"


def literal_text(source: str) -> str:
    """Return what stands in a template as text or as a string constant, apart by zeros; "" if it does not parse."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # never renders
    try:
        tokens = [value for _, kind, value in environment.lex(source) if kind in ("data", "string")]
    except TemplateSyntaxError:
        return ""
    return "\0".join(tokens)
