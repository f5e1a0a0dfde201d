"""A prompt and its completion as a training sample."""

from __future__ import annotations

from zoo import DataError, Record, Sample, Tokenizer
from zoo.plugins.data.conversation import Conversation, template_variables
from zoo.plugins.data.markers import spelt_remarks
from zoo.plugins.data.turns import described, read_messages


def completion_sample(record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
    """Columns `prompt` and `completion`, both strings or both lists of messages; the completion is trained.

    `loss_on` `all` trains the prompt too; the other values mean the completion. Raises DataError naming the record.
    """
    prompt, completion = record.fields.get("prompt"), record.fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _of_texts(record, prompt, completion, tokenizer, everything=loss_on == "all")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(
            f"{record.where}: columns prompt and completion must be two strings or two lists of messages, "
            f"not {described(prompt)} and {described(completion)}"
        )
    return _of_messages(record, tokenizer, loss_on=loss_on)


def _of_texts(record: Record, prompt: str, completion: str, tokenizer: Tokenizer, *, everything: bool) -> Sample:
    try:
        # A prompt is tokens of its own when the model is asked, so no token may cross into the completion here.
        first, second = tokenizer.encode_pair(prompt, completion)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    remarks = spelt_remarks((prompt, completion), {*first, *second}, tokenizer.special)
    first[:0] = tokenizer.begin_ids
    if tokenizer.eos_id is not None:
        second.append(tokenizer.eos_id)
    return Sample(first + second, [everything] * len(first) + [True] * len(second), remarks)


def _of_messages(record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
    prompt = read_messages(record.fields["prompt"], column="prompt", where=record.where)
    completion = read_messages(record.fields["completion"], column="completion", where=record.where)
    return Conversation(
        messages=[*prompt, *completion],
        variables=template_variables(record),
        tokenizer=tokenizer,
        where=record.where,
        answers_from=len(prompt),
    ).sample(loss_on if loss_on == "all" else "assistant")
