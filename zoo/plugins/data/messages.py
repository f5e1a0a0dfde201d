"""A conversation as a training sample."""

from __future__ import annotations

from zoo import DataError, Record, Sample, Tokenizer
from zoo.plugins.data.conversation import Conversation, template_variables
from zoo.plugins.data.turns import Message, read_messages


def messages_sample(record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
    """The conversation as the chat template writes it, with columns `tools`, `documents` and `chat_template_kwargs`.

    `loss_on`: `assistant` every assistant turn, `last` and `completion` the last of them, `all` every token. A
    conversation without an assistant turn has nothing trained. Raises DataError naming the record.
    """
    messages = read_messages(record.fields.get("messages"), column="messages", where=record.where)
    return Conversation(
        messages=[*_system(record, messages), *messages],
        variables=template_variables(record),
        tokenizer=tokenizer,
        where=record.where,
    ).sample(loss_on)


def _system(record: Record, messages: list[Message]) -> list[Message]:
    """The system message, where it has a column of its own."""
    system = record.fields.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str) or messages[0]["role"] == "system":
        raise DataError(
            f"{record.where}: column system must be text, and no message of role system beside it; "
            "write the one system message as the first of column messages"
        )
    return [{"role": "system", "content": system}]
