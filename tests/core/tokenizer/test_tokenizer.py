"""The tokenizer of a checkpoint: text stays text, templates render as the hub does, broken files fail in one line."""

from __future__ import annotations

import json
import os
import random

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend, models

from tools.made_tokenizer import SPECIAL, write_tokenizer
from zoo.core.errors import DataError
from zoo.core.tokenizer.files import tokenizer_files
from zoo.core.tokenizer.tokenizer import Tokenizer

FAMILIES = ("llama3", "chatml", "mistral")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: Tokenizer.from_directory(write_tokenizer(root / family, family)) for family in FAMILIES}


def refused(function, *args, **kwargs):
    """The message of the one-line error that a call must end in."""
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_text_stay_text(made, family):
    tokenizer = made[family]
    text = f"a {' '.join(SPECIAL[family])} b"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text
    assert set(tokenizer.aware.encode(text).ids) & set(tokenizer.special.values())


def test_ids_come_from_the_files(made):
    llama, chatml = made["llama3"], made["chatml"]
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.begin_ids) == (0, 1, 1, (0,))
    assert (chatml.bos_id, chatml.eos_id, chatml.pad_id, chatml.begin_ids) == (None, 1, 1, ())
    assert llama.vocab_size == 320
    assert llama.encode("hi", add_special=True) == [0, *llama.encode("hi")]


def test_ids_of_config_json_stand_in_for_names_that_are_missing(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    (path / "tokenizer_config.json").unlink()
    (path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [7, 8]}')
    tokenizer = Tokenizer.from_directory(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 7)


def test_tokenizer_json_says_whether_texts_begin_with_bos_whatever_the_config_says(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.begin_ids == (tokenizer.bos_id,)


def test_truncation_in_the_file_cuts_nothing(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(path / "tokenizer.json"))
    assert len(Tokenizer.from_directory(path).encode("x" * 50)) == 50


def test_a_token_that_cannot_be_read_as_text_is_an_error(tmp_path):
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("<", -9.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("aa") == [2, 2]
    assert "'</s>'" in refused(tokenizer.encode, "a</s>a")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_its_two_texts_without_a_token_across(made, family):
    tokenizer = made[family]
    first, second = tokenizer.encode_pair("the capital of Fra", "nce is \u00e9")
    assert tokenizer.decode(first + second).strip() == "the capital of France is \u00e9"
    assert tokenizer.decode(first).strip() == "the capital of Fra"
    assert first == tokenizer.encode("the capital of Fra")


@settings(max_examples=80, deadline=None)
@given(first=st.text(max_size=12), second=st.text(max_size=12))
def test_a_pair_loses_nothing(made, first, second):
    if "\U0010fff0" in first + second:
        return
    one, two = made["llama3"].encode_pair(first, second)
    assert made["llama3"].decode(one) == first
    assert made["llama3"].decode(two) == second


# Templates ----------------------------------------------------------------------------------------

WORDS = ["hi", " Paris\n", "what is it?", "", "  two  spaces ", "\u00e9\u00e8 \u2603", "x = 1\n\n", "[INST]"]


def conversations(count):
    rng = random.Random(0)
    for _ in range(count):
        turns = rng.randint(1, 3) * 2 - rng.randint(0, 1)
        yield [{"role": ("user", "assistant")[i % 2], "content": rng.choice(WORDS)} for i in range(turns)]


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_the_tokens_that_transformers_makes(made, family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(made[family].path)
    for messages in conversations(25):
        for prompt in (False, True):
            text = made[family].apply_chat_template(messages, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert made[family].encode_rendered(text)[0] == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_messages_stay_text(made, family):
    tokenizer = made[family]
    plain = [{"role": "user", "content": "say X"}, {"role": "assistant", "content": "X done"}]
    for token in SPECIAL[family]:
        hostile = [{**message, "content": message["content"].replace("X", token)} for message in plain]
        ids, starts = tokenizer.encode_rendered(tokenizer.render(hostile))
        expected, _ = tokenizer.encode_rendered(tokenizer.render(plain))
        special = set(tokenizer.special.values())
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        assert tokenizer.decode(ids) == tokenizer.decode(expected).replace("X", token)
        assert starts == sorted(starts)


def test_special_tokens_in_keys_and_tools_stay_text(made, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ tools | tojson }}{{ messages[0].call | tojson }}")
    tokenizer = made["llama3"].with_chat_template(tmp_path / "t.jinja")
    message = {"role": "user", "call": {"<|eot_id|>": ["<|eot_id|>"]}}
    ids, _ = tokenizer.encode_rendered(tokenizer.render([message], tools=[{"name": "<|eot_id|>"}]))
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == '[{"name": "<|eot_id|>"}]{"<|eot_id|>": ["<|eot_id|>"]}'


def test_a_variable_cannot_pose_as_a_special_token(made):
    messages = [{"role": "user", "content": "x"}]
    rendered = made["llama3"].render(messages, bos_token="other")
    assert rendered.startswith("<|begin_of_text|>")


@pytest.fixture
def render(made, tmp_path):
    """What a template of one's own makes of one message."""

    def rendered(source, **variables):
        (tmp_path / "t.jinja").write_text(source)
        tokenizer = made["llama3"].with_chat_template(tmp_path / "t.jinja")
        return tokenizer.apply_chat_template([{"role": "user", "content": "a"}], **variables)

    return rendered


def test_templates_have_what_the_hubs_have(render):
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c") == "abac"
    assert render("  {% if true %}\n  x\n  {% endif %}\n") == "  x\n"
    assert render("{{ {'a': '<&\u00e9'} | tojson }}") == '{"a": "<&\u00e9"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no\nsystem role') }}", "no"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.join(messages) }}", "TypeError"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_hostile_templates_end_in_one_line(render, source, says):
    message = refused(render, source)
    assert says in message
    assert len(message) < 500


def test_a_template_that_does_not_parse_names_file_and_line(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    (tmp_path / "bad.jinja").write_text("one\n{% if %}")
    message = refused(Tokenizer.from_directory, path, chat_template=tmp_path / "bad.jinja")
    assert "bad.jinja: the chat template does not parse at line 2" in message


def test_the_jinja_file_wins_over_the_config_and_the_flag_over_both(tmp_path):
    path = write_tokenizer(tmp_path / "t", "llama3", template="config")
    assert Tokenizer.from_directory(path).apply_chat_template([]) == "config"
    (path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(path).apply_chat_template([]) == "file"
    (tmp_path / "flag.jinja").write_text("flag")
    flagged = Tokenizer.from_directory(path, chat_template=tmp_path / "flag.jinja")
    assert flagged.apply_chat_template([]) == "flag"
    assert flagged.fingerprint != Tokenizer.from_directory(path).fingerprint
    assert "--chat-template FILE" in refused(Tokenizer.from_directory, path, chat_template=tmp_path / "none.jinja")


def test_templates_by_name(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, "llama3", template=named))
    assert tokenizer.apply_chat_template([]) == "d"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "t"


# Files --------------------------------------------------------------------------------------------


def test_files_lists_what_belongs_to_a_tokenizer(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    (path / "chat_template.jinja").write_text("x")
    (path / "model.safetensors").write_text("x")
    assert tokenizer_files(path) == ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_a_directory_without_a_tokenizer_says_what_to_do(tmp_path):
    assert f"{tmp_path} has no tokenizer.json; copy" in refused(Tokenizer.from_directory, tmp_path)
    assert "--from DIR" in refused(Tokenizer.from_directory, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"{", "is not a tokenizer"),
        ("tokenizer.json", b'{"model": 1}', "is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("special_tokens_map.json", b"nope", "is not JSON"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, name, content, says):
    path = write_tokenizer(tmp_path, "llama3")
    (path / name).write_bytes(content)
    message = refused(Tokenizer.from_directory, path)
    assert str(path / name) in message
    assert says in message


def test_no_template_and_half_characters_are_errors(made, tmp_path):
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, "llama3", template=None))
    assert "--chat-template FILE" in refused(tokenizer.apply_chat_template, [])
    assert "surrogate" in refused(tokenizer.encode, "a\ud800")
    assert "U+10FFF0" in refused(made["llama3"].render, [{"role": "user", "content": "\U0010fff0"}])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    (path / "tokenizer.json").chmod(0)
    assert "Permission denied" in refused(Tokenizer.from_directory, path)
