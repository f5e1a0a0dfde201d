"""The token that ends a turn, for templates of many forms; what transformers renders and encodes is the oracle."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tools.made_tokenizer import CHATML, LLAMA3, MISTRAL, write_tokenizer
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.core.tokenizer.turn_end import turn_end

EOS = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
VICUNA = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}" + EOS + "{% endfor %}"
LAST_ONLY = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
MARKED = "{% for m in messages %}{{ m.content }}</answer>\n" + EOS + "\n{% endfor %}"
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + LLAMA3
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + LLAMA3
STRIPPED = LLAMA3.replace("m.content", "(m.content.split('</think>')[-1])")


@pytest.mark.parametrize(
    ("family", "template", "end"),
    [
        ("llama3", LLAMA3, "<|eot_id|>"),
        ("llama3", STRICT, "<|eot_id|>"),
        ("llama3", NO_SYSTEM, "<|eot_id|>"),
        ("llama3", STRIPPED, "<|eot_id|>"),
        ("llama3", MARKED, "<|eot_id|>"),
        ("llama3", VICUNA, "<|eot_id|>"),
        ("chatml", CHATML, "<|im_end|>"),
        ("chatml", LAST_ONLY, "<|im_end|>"),
        ("mistral", MISTRAL, "</s>"),
    ],
)
def test_the_end_of_a_turn_is_the_special_token_after_the_answer(tmp_path, family, template, end):
    folder = write_tokenizer(tmp_path, family, template=template)
    theirs = AutoTokenizer.from_pretrained(folder)
    found = turn_end(Tokenizer.from_directory(folder))
    assert found.id == theirs.convert_tokens_to_ids(end)
    roles = ("system", "user", "assistant") if template is STRICT else ("user", "assistant")
    text = theirs.apply_chat_template([{"role": role, "content": "yes"} for role in roles], tokenize=False)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert found.id in ids[-3:]


def test_an_end_that_no_file_flags_as_special(tmp_path):
    folder = write_tokenizer(tmp_path, "chatml")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert turn_end(Tokenizer.from_directory(folder)).id == theirs.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}", "writes nothing after an answer"),
        ("{% for m in messages %}<a>{{ m.content }}</a>{% endfor %}", "writes only '</a>' after an answer"),
        ("{% for m in messages %}{{ m.role }}<|eot_id|>{% endfor %}", "leaves out what the assistant says"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_ends_turns_with_no_token_says_why(tmp_path, template, why):
    found = turn_end(Tokenizer.from_directory(write_tokenizer(tmp_path, "llama3", template=template)))
    assert found.id is None
    assert why in found.why
    assert "\n" not in found.why


def test_without_a_template_there_are_no_turns(tmp_path):
    assert turn_end(Tokenizer.from_directory(write_tokenizer(tmp_path, "llama3", template=None))) is None
