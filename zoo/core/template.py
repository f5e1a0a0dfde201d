"""Chat templates: jinja2 text from a checkpoint, compiled in a sandbox that behaves as the hub's own renderer does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zoo.core.errors import DataError, one_line

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells a template: a fixed day, so that the same data gives the same tokens tomorrow."""


class GenerationTag(Extension):
    """`{% generation %}` marks what an assistant says. Spans are found by prefix, so the tag only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A compiled chat template.

    Source: "Chat templates" of the transformers documentation (sandbox, trimmed blocks, `raise_exception`,
    `strftime_now`, `tojson` without HTML escapes, loop controls).
    """

    def __init__(self, source: str, *, where: str) -> None:
        """Compile. `where` is the file it comes from. Raises DataError with the line that does not parse."""
        self.where = where
        try:
            self._template: Template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(
                f"{where}: the chat template does not parse at line {error.lineno}: {error.message}; "
                "give another with --chat-template FILE"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation. Raises DataError in one line, whatever the template does."""
        try:
            return self._template.render(messages=messages, **variables)
        except Exception as error:  # a template is foreign code: any exception is its own
            reason = one_line(error).removeprefix("TemplateError: ")[:300]
        raise DataError(f"{self.where}: the chat template refuses the messages: {reason}")


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
