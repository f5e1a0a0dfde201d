"""Conversations under the field's chat templates: tokens, what is trained and what is dropped, against transformers."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest

from tests.harness.chat_families import FAMILIES, template_of, write_family
from zoo.core.contracts.data import Record
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.plugins.data.messages import messages_sample

transformers = pytest.importorskip("transformers")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def said(role, number, **more):
    """A message whose content is like no other's."""
    return {"role": role, "content": f"{role} says {number} apples.", **more}


def call(number, id="abcdefgh1"):
    arguments = {"place": f"town {number}", "days": number}
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


ASKED = [said("user", 11), said("assistant", 12)]
SEVERAL = [*ASKED, said("user", 13), said("assistant", 14), said("user", 15), said("assistant", 16)]
THOUGHT = [
    said("user", 21),
    {"role": "assistant", "content": "<think>\nearly thoughts 22\n</think>\n\nassistant says 23"},
    said("user", 24),
    {"role": "assistant", "content": "<think>\nlate thoughts 25\n</think>\n\nassistant says 26"},
]
APART = [
    said("user", 31),
    said("assistant", 32, reasoning_content="early thoughts 33"),
    said("user", 34),
    said("assistant", 35, reasoning_content="late thoughts 36"),
]
CALLED = [
    said("user", 41),
    {"role": "assistant", "content": None, "tool_calls": [call(42)]},
    said("tool", 43, tool_call_id="abcdefgh1"),
    said("assistant", 44),
]
TALKED = [
    said("user", 51),
    said("assistant", 52, reasoning_content="why 53", tool_calls=[call(54)]),
    said("tool", 55, tool_call_id="abcdefgh1"),
    said("assistant", 56, reasoning_content="so 57"),
    said("user", 58),
    said("assistant", 59),
]
BOTH = [
    said("user", 61),
    {"role": "assistant", "content": None, "tool_calls": [call(62), call(63, "abcdefgh2")]},
    said("tool", 64, tool_call_id="abcdefgh1"),
    said("tool", 65, tool_call_id="abcdefgh2"),
    said("assistant", 66),
]

CONVERSATIONS = {
    "one turn": (ASKED, None, set()),
    "several turns": (SEVERAL, None, set()),
    "system": ([said("system", 71), *SEVERAL], None, {"system"}),
    "assistant first": ([said("assistant", 81), *SEVERAL], None, {"free"}),
    "reasoning in content": (THOUGHT, None, set()),
    "reasoning apart": (APART, None, set()),
    "tools": (CALLED, TOOLS, {"tools"}),
    "tools and reasoning": ([said("system", 72), *TALKED], TOOLS, {"tools", "system"}),
    "tool calls together": (BOTH, TOOLS, {"tools", "parallel"}),
}
CASES = [
    (name, title)
    for name, family in FAMILIES.items()
    for title, (_, _, needed) in CONVERSATIONS.items()
    if needed <= family.features
]

KINDS = {
    "content": "turns whose content the chat template leaves out or changes",
    "reasoning": "turns whose reasoning the chat template leaves out or changes",
    "tool calls": "turns whose tool calls the chat template leaves out or changes",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each family's tokenizer as zoo and as transformers loads it."""
    root = tmp_path_factory.mktemp("families")
    folders = {name: write_family(root / name, name) for name in FAMILIES}
    return {
        name: (Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder))
        for name, folder in folders.items()
    }


def oracle(theirs, name, messages, tools):
    """Text, tokens and `{% generation %}` mask of transformers."""
    messages = [
        {**message, "content": "" if message["content"] is None and name not in ("mistral",) else message["content"]}
        for message in copy.deepcopy(messages)
    ]
    if name in ("deepseek", "r1distill"):  # which copy arguments as the text they are
        for one in (one for message in messages for one in message.get("tool_calls", ())):
            one["function"]["arguments"] = str(one["function"]["arguments"]).replace("'", '"')
    # zoo's fixed day.
    options = {"chat_template": template_of(name, marked=True), "tools": tools, "date_string": "26 Jul 2024"}
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    return text, out["input_ids"], [bool(one) for one in out["assistant_masks"]]


def dropped(messages, text):
    """Which turns' content, reasoning and tool calls are not in a text; each has words and numbers of its own."""
    found = set()
    for number, message in enumerate(messages, start=1):
        words = re.split("</?think>", message["content"] or "")
        thoughts = [*words[:-1], message.get("reasoning_content", "")]
        calls = [one["function"]["arguments"]["place"] for one in message.get("tool_calls", ())]
        for what, parts in (("content", words[-1:]), ("reasoning", thoughts), ("tool calls", calls)):
            found |= {(KINDS[what], f"message {number}") for part in parts if part.strip() not in text}
    return found


@pytest.mark.parametrize(("name", "title"), CASES)
def test_a_conversation_is_what_transformers_makes_of_it(loaded, name, title):
    messages, tools, _ = CONVERSATIONS[title]
    ours, theirs = loaded[name]
    text, ids, mask = oracle(theirs, name, messages, tools)
    sample = messages_sample(Record({"messages": messages, "tools": tools}, "a:1"), ours, loss_on="assistant")
    assert list(sample.tokens) == ids
    assert list(sample.trained) == mask
    assert {(one.kind, one.place) for one in sample.remarks if one.kind in KINDS.values()} == dropped(messages, text)


@pytest.mark.parametrize("name", ["chatml", "qwen25", "qwen3", "gemma"])
@pytest.mark.parametrize("eos", ["of the turn", "of the text"])
def test_the_newline_after_a_turn_is_not_trained_whatever_the_tokens_are_flagged(tmp_path, name, eos):
    """Markers that no file flags as special, and an end of turn that is not eos."""
    family = FAMILIES[name]
    others = {"gemma": "<eos>"}.get(name, "<|endoftext|>")
    ends = {"gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    flags = tuple(token for token in family.flagged if token in (family.bos, others))
    markers = tuple(token for token in family.flagged if token not in flags)
    folder = write_family(
        tmp_path,
        name,
        replace(
            family, eos=ends if eos == "of the turn" else others, flagged=flags, unflagged=(*markers, *family.unflagged)
        ),
    )
    ours, theirs = Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder)
    _, ids, mask = oracle(theirs, name, SEVERAL, None)
    sample = messages_sample(Record({"messages": SEVERAL}, "a:1"), ours, loss_on="assistant")
    assert (list(sample.tokens), list(sample.trained)) == (ids, mask)
    after = [ids[i + 1] for i in range(len(ids) - 1) if mask[i] and not mask[i + 1]]
    assert ours.decode(after).strip() == ""
    assert ours.decode([id for id, one in zip(ids, mask, strict=True) if one]).count(ends) == 3
