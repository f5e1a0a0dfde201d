"""A conversation as a training sample."""

from __future__ import annotations

from zoo.core.formats import Record, Sample
from zoo.core.tokenizer import Tokenizer
from zoo.plugins.data.conversation import Conversation, checked_messages, template_variables


def messages_sample(record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
    """The conversation as the chat template writes it, with columns `tools`, `documents` and `chat_template_kwargs`.

    `loss_on`: `assistant` every assistant turn, `last` and `completion` the last of them, `all` every token. A
    conversation without an assistant turn has nothing trained. Raises DataError naming the record.
    """
    messages = checked_messages(record.fields.get("messages"), column="messages", where=record.where)
    conversation = Conversation(
        messages=messages,
        variables=template_variables(record),
        tokenizer=tokenizer,
        where=record.where,
    )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on == "all":
        return conversation.sample(None)
    return conversation.sample(turns if loss_on == "assistant" else turns[-1:])
