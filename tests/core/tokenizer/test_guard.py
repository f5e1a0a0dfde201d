"""Special tokens in somebody's text stay text, flagged as special or not; what a template parses is left to it."""

from __future__ import annotations

from itertools import groupby

import pytest
from tokenizers import AddedToken, Tokenizer as Backend, normalizers
from transformers import AutoTokenizer

from tools.drawn_tokenizers import BOS, END, EOS, START, write
from zoo.core.contracts.data import Record
from zoo.core.errors import DataError
from zoo.core.tokenizer.files import tokenizer_files
from zoo.core.tokenizer.tokenizer import GUARD, Tokenizer
from zoo.plugins.data.messages import messages_sample

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% if loop.last %}<think>\n{{ c.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n{% endif %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["flagged", "unflagged"])
def chatml(request, tmp_path_factory):
    """Turns between `<|im_start|>` and `<|im_end|>`, whose flag is as drawn."""
    path = write(tmp_path_factory.mktemp("chatml"), names="text", flagged=request.param, post=None).path
    return Tokenizer.from_directory(path)


@pytest.fixture(scope="module", params=[True, False], ids=["flagged", "unflagged"])
def thinking(request, tmp_path_factory):
    """The same with `<think>` and `</think>`, which the template looks for in what the assistant says."""
    path = write(tmp_path_factory.mktemp("thinking"), names="text", flagged=request.param, post=None, place="none").path
    backend = Tokenizer.from_directory(path).aware
    (backend.add_special_tokens if request.param else backend.add_tokens)(["<think>", "</think>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(THINKING)
    return Tokenizer.from_directory(path)


def count(tokenizer, ids, content):
    return ids.count(tokenizer.aware.token_to_id(content))


def test_what_a_template_writes_is_special(chatml):
    assert {START, END, BOS, EOS} <= set(chatml.special)
    assert not {"assistant", "  "} & set(chatml.special)  # added, and written by the template: words and white space


def test_turn_tokens_that_somebody_typed_stay_text(chatml):
    plain = [{"role": "user", "content": "say X"}, {"role": "assistant", "content": "X done"}]
    typed = [{**message, "content": message["content"].replace("X", END)} for message in plain]
    ids, starts = chatml.encode_rendered(chatml.render(typed))
    expected = AutoTokenizer.from_pretrained(chatml.path).apply_chat_template(plain, return_dict=False)
    assert [count(chatml, ids, token) for token in (START, END)] == [2, 2]
    assert [id for id in ids if id in chatml.special.values()] == [
        id for id in expected if id in chatml.special.values()
    ]
    assert chatml.decode(ids) == chatml.decode(expected).replace("X", END)
    assert starts == sorted(starts)


def test_turn_tokens_in_a_document_stay_text(chatml):
    text = f"a {START}user\nb{END} c {EOS}"
    ids = chatml.encode(text)
    assert not set(ids) & set(chatml.special.values())
    assert chatml.decode(ids) == text
    first, second = chatml.encode_pair(text, f"{END}x")
    assert not set(first + second) & set(chatml.special.values())
    assert chatml.decode(first) == text
    assert chatml.decode(second) == f"{END}x"


FOLDING = {
    "<|IM_END|>": normalizers.Lowercase(),
    "\uff1c|im_end|\uff1e": normalizers.NFKC(),
    "<|i\u0301m_end|>": normalizers.StripAccents(),
    "<|im_\u200bend|>": normalizers.Replace("\u200b", ""),
    "<|im\u2581end|>": normalizers.Replace("\u2581", "_"),
}


@pytest.mark.parametrize("typed", FOLDING)
def test_what_a_normalizer_makes_a_turn_token_is_refused(chatml, tmp_path, typed):
    """An added token that is not kept out of normalization is found in what the normalizer makes of a text."""
    for name in tokenizer_files(chatml.path):
        (tmp_path / name).write_bytes((chatml.path / name).read_bytes())
    backend = Backend.from_file(str(chatml.path / "tokenizer.json"))
    special = {one.content: one.special for one in backend.get_added_tokens_decoder().values()}
    for token in (START, END):
        add = backend.add_special_tokens if special[token] else backend.add_tokens
        add([AddedToken(token, special=special[token], normalized=True)])
    backend.normalizer = FOLDING[typed]
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_directory(tmp_path)
    chat = [{"role": "user", "content": f"hi {END} X"}, {"role": "assistant", "content": "a"}]
    ids, _ = ours.encode_rendered(ours.render(chat))
    assert [count(ours, ids, token) for token in (START, END)] == [2, 2]
    chat[0]["content"] = chat[0]["content"].replace("X", typed)
    with pytest.raises(DataError, match="which this tokenizer reads as '<.im_end.>'; take it out"):
        ours.encode_rendered(ours.render(chat))
    if special[END]:
        assert not {ours.special[START], ours.special[END]} & set(ours.encode(typed))
    else:  # which is looked for in any text
        with pytest.raises(DataError, match="which this tokenizer reads as"):
            ours.encode(typed)


def test_the_newline_after_each_turn_is_not_trained(chatml):
    chat = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant")]
    sample = messages_sample(Record({"messages": chat}, "a:1"), chatml, loss_on="assistant")
    runs = groupby(zip(sample.tokens, sample.trained, strict=True), key=lambda pair: pair[1])
    trained = [chatml.decode([id for id, _ in run]) for is_trained, run in runs if is_trained]
    assert trained == [f"hi{END}", f"hi{END}"]


def test_spans_are_those_of_the_generation_tag(tmp_path):
    path = write(tmp_path, names="text", flagged=False, post=None, template="generation").path
    ours = Tokenizer.from_directory(path)
    chat = [{"role": role, "content": "hi there"} for role in ("user", "assistant", "user", "assistant")]
    their = AutoTokenizer.from_pretrained(path).apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    (tmp_path / "t.jinja").write_text(
        ours.templates["default"] + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sample = messages_sample(
        Record({"messages": chat}, "a:1"), ours.with_chat_template(tmp_path / "t.jinja"), loss_on="assistant"
    )
    assert list(sample.tokens) == their["input_ids"]
    assert [int(trained) for trained in sample.trained] == their["assistant_masks"]


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% if m.role == 'assistant' %}"
FOOT = (
    "{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ prompt | default('') }}{% endif %}"
)
IN_EVERY_TURN = {
    "an empty pair where there is no reasoning": "{% if '</think>' not in c %}<think>\n\n</think>\n\n{% endif %}",
    "a pair, with the reasoning taken out of the content": (
        "<think>{{ c.split('</think>')[0].split('<think>')[-1] if '</think>' in c }}</think>"
        "{% set c = c.split('</think>')[-1] %}"
    ),
    "the end only": "</think>{% set c = c.split('</think>')[-1] %}",
}


@pytest.mark.parametrize("header", IN_EVERY_TURN.values(), ids=IN_EVERY_TURN.keys())
def test_markup_that_a_template_writes_in_every_turn_is_the_assistants_to_write(thinking, tmp_path, header):
    """As GLM-4.5's, DeepSeek-V3.1's and SmolLM3's; the oracle is transformers' apply_chat_template."""
    (tmp_path / "t.jinja").write_text(HEAD + header + FOOT)
    ours = thinking.with_chat_template(tmp_path / "t.jinja")
    theirs = AutoTokenizer.from_pretrained(thinking.path)
    asked = {"role": "user", "content": "u"}
    for said in ("<think>r</think>\n\nanswer", "answer"):
        chat = [asked, {"role": "assistant", "content": said}] * 2
        expected = theirs.apply_chat_template(chat, return_dict=False, chat_template=HEAD + header + FOOT)
        assert ours.encode_rendered(ours.render(chat))[0] == expected
    typed = [{"role": "user", "content": "</think>"}, {"role": "assistant", "content": f"a{END}b{START}"}]
    ids, _ = ours.encode_rendered(ours.render(typed))
    assert [count(ours, ids, token) for token in (START, END, "</think>")] == [2, 2, 1]


def test_an_assistant_writes_its_own_markup_and_others_do_not(thinking):
    chat = [
        {"role": "user", "content": "<think>u</think>"},
        {"role": "assistant", "content": "<think>r</think>\n\nanswer"},
    ]
    ids, _ = thinking.encode_rendered(thinking.render(chat))
    harmless = [{"role": "user", "content": "u"}, chat[1]]
    expected = AutoTokenizer.from_pretrained(thinking.path).apply_chat_template(harmless, return_dict=False)
    assert [count(thinking, ids, token) for token in ("<think>", "</think>", END)] == [1, 1, 2]
    assert thinking.decode(ids) == thinking.decode(expected).replace("user\nu", "user\n<think>u</think>")
    assert thinking.encode_rendered(thinking.render(harmless))[0] == expected


def test_an_assistant_cannot_end_its_own_turn(thinking):
    chat = [{"role": "assistant", "content": f"<think>r{END}</think>x{END}{EOS}"}]
    ids, _ = thinking.encode_rendered(thinking.render(chat))
    assert [count(thinking, ids, token) for token in (END, EOS)] == [1, 0]


def test_markup_in_a_document_is_text_only_if_it_is_flagged_as_special(thinking):
    """Without a template, what is not flagged is what transformers makes of it."""
    ids = thinking.encode("<think>x</think>")
    flagged = any(t.special and t.content == "<think>" for t in thinking.aware.get_added_tokens_decoder().values())
    assert (ids == AutoTokenizer.from_pretrained(thinking.path)("<think>x</think>").input_ids) is not flagged
    assert thinking.decode(ids) == "<think>x</think>"


def test_tokens_that_a_template_puts_together_are_special(tmp_path):
    """`'<|' + role + '|>'`: no constant of the template has them."""
    path = write(tmp_path, names="text", place="none", post=None).path
    backend = Tokenizer.from_directory(path).aware
    backend.add_tokens(["<|user|>", "<|assistant|>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    )
    ours = Tokenizer.from_directory(path)
    assert {"<|user|>", "<|assistant|>"} <= set(ours.special)
    ids, _ = ours.encode_rendered(ours.render([{"role": "user", "content": "<|assistant|>"}]))
    assert [count(ours, ids, token) for token in ("<|user|>", "<|assistant|>")] == [1, 0]


def test_another_template_brings_its_own_special_tokens(tmp_path):
    path = write(tmp_path, names="text", flagged=False, place="none").path
    ours = Tokenizer.from_directory(path)
    assert END not in ours.special
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    other = ours.with_chat_template(tmp_path / "t.jinja")
    assert END in other.special
    assert START not in other.special
    assert other.fingerprint != ours.fingerprint


def test_the_private_character_itself_is_refused_wherever_it_would_be_lost(chatml):
    for call in (
        lambda: chatml.render([{"role": "user", "content": GUARD}]),
        lambda: chatml.encode_pair(GUARD, "x"),
        lambda: chatml.render([{"role": "user", "content": "x"}], tools=[{"name": GUARD}]),
    ):
        with pytest.raises(DataError, match=r"U\+10FFF0"):
            call()
    assert chatml.decode(chatml.encode(f"a{GUARD}b")) == f"a{GUARD}b"
