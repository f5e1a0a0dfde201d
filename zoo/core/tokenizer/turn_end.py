"""The token that ends what an assistant says, as a chat template writes it: where generation has to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.core.errors import DataError
from zoo.core.tokenizer.tokenizer import Tokenizer

_ANSWER = "zoo-answer-7"
"""What the assistant of the probe says. No template writes it, and white space around it is not touched by any."""
_USER, _ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}
# Some templates insist on a system message, some refuse one.
_PROBES: Sequence[Sequence[Mapping[str, str]]] = (
    (_USER, _ASSISTANT),
    ({"role": "system", "content": "x"}, _USER, _ASSISTANT),
)


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What a template writes after an answer. `id` is None if no token of its own is there; then `why` says so."""

    id: int | None
    why: str = ""


def turn_end(tokenizer: Tokenizer) -> TurnEnd | None:
    """Return the end of a turn under the tokenizer's template; None if it has no template for plain conversations."""
    if "default" not in tokenizer.templates:
        return None
    why = ""
    for probe in _PROBES:
        try:
            text = tokenizer.render(probe)
            ids, places = tokenizer.encode_rendered(text)
        except DataError as error:
            why = why or str(error)
            continue
        end = text.rfind(_ANSWER) + len(_ANSWER)
        if end < len(_ANSWER):
            return TurnEnd(None, "the chat template leaves out what the assistant says")
        special = set(tokenizer.special.values())
        # What comes first is the end; a template may write more after it.
        found = next((id for id, (start, _) in zip(ids, places, strict=True) if start >= end and id in special), None)
        written = f"only {text[end:]!r:.60}" if text[end:].strip() else "nothing"
        return TurnEnd(found, "" if found is not None else f"the chat template writes {written} after an answer")
    return TurnEnd(None, why)
