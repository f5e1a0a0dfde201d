"""Chat templates around the one that transformers renders: a fixed day before it, the text that stands in it."""

from __future__ import annotations

from datetime import datetime

from jinja2 import Environment, TemplateSyntaxError

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells a template: a fixed day, so that the same data gives the same tokens tomorrow."""

_DIRECTIVES = "aAbBcdDeFHIjlmMnpPrRsStTuUVwWxXyYzZ"


def on_a_fixed_day(source: str) -> str:
    """Return a template in whose text `strftime_now` means TODAY.

    transformers passes no function to a template, so it is a macro on a line before it, which leaves nothing behind.
    """
    if "strftime_now" not in source:
        return source
    flags = ("", "-")
    table = {f"%{flag}{letter}": TODAY.strftime(f"%{flag}{letter}") for letter in _DIRECTIVES for flag in flags}
    said = "".join(f" | replace({key!r}, {value!r})" for key, value in table.items())
    # A doubled sign is put out of the way first, so that the letter behind it is no directive.
    day = f"{{{{ format | replace('%%', '\\0'){said} | replace('\\0', '%') }}}}"
    return f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}\n{source}"


def literal_text(source: str) -> str:
    """Return what stands in a template as text or as a string constant, apart by zeros; "" if it does not parse."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # never renders
    try:
        tokens = [value for _, kind, value in environment.lex(source) if kind in ("data", "string")]
    except TemplateSyntaxError:
        return ""
    return "\0".join(tokens)
