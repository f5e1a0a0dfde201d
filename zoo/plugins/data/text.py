"""Plain text as a training sample."""

from __future__ import annotations

from zoo import DataError, Record, Sample, Tokenizer
from zoo.plugins.data.markers import spelt_remarks
from zoo.plugins.data.turns import described


def text_sample(record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
    """bos (where the tokenizer begins texts with it), the text, eos; all trained, whatever `loss_on` says.

    A text of white space gives an empty sample. Raises DataError if the column is not a string.
    """
    text = record.fields.get("text")
    if not isinstance(text, str):
        raise DataError(f"{record.where}: column text must be a string, not {described(text)}")
    if not text.strip():
        return Sample([], [])
    try:
        ids = tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = [*tokenizer.begin_ids, *ids, *end]
    return Sample(tokens, [True] * len(tokens), spelt_remarks((text,), set(ids), tokenizer.special))
