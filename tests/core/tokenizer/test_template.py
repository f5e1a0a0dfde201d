"""What a chat template sees is what transformers gives it: its own rendering is the oracle."""

from __future__ import annotations

from datetime import datetime

import pytest
from transformers import AutoTokenizer

from tools.drawn_tokenizers import write
from zoo.core.errors import DataError
from zoo.core.tokenizer.chat_template import TODAY, literal_text, on_a_fixed_day
from zoo.core.tokenizer.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<&\u00e9>"}}}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("template"), vocabulary="byte", names="text").path


@pytest.fixture
def both(folder, tmp_path):
    """Render a template in zoo and in transformers."""
    their = AutoTokenizer.from_pretrained(folder)

    def rendered(source, messages=CHAT, **given):
        (tmp_path / "t.jinja").write_text(source)
        ours = Tokenizer.from_directory(folder, chat_template=tmp_path / "t.jinja")
        own = ours.apply_chat_template(messages, **given)
        return own, their.apply_chat_template(messages, chat_template=source, tokenize=False, **given)

    return rendered


@pytest.mark.parametrize("given", [{}, {"tools": TOOLS}, {"documents": [{"title": "t"}], "style": "brief"}])
@pytest.mark.parametrize(
    "source",
    [
        "{% if tools is not none %}tools{% else %}no tools{% endif %}",
        "{% if documents is none %}no documents{% endif %}{{ documents is defined }}",
        "{{ bos_token }}{{ eos_token }}{{ sep_token }}{{ pad_token }}|{{ cls_token }}|{{ unk_token is defined }}",
        "{{ tools | tojson(indent=2) }}{{ style }}{{ style is defined }}",
        "{{ messages[1].tool_calls | tojson }}{{ messages[0].reasoning is defined }}{{ add_generation_prompt }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}"
        "{% endif %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{{ ns.x }}{{ dict(a=1) }}{{ range(3) | list }}",
        "  {% if true %}\n  x\n  {% endif %}\n\n",
    ],
)
def test_a_template_sees_what_transformers_gives_it(both, source, given):
    ours, their = both(source, **given)
    assert ours == their


def test_null_and_reasoning_are_what_transformers_makes_of_them(both):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "reasoning": "r", "name": None}]
    source = "{% for m in messages %}{{ m.keys() | list }}{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
    ours, their = both(source, chat)
    assert ours == their


@pytest.mark.parametrize("place", ["text", "list", "dict", "file", "file over text", "additional"])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_the_template_is_the_one_that_transformers_takes(tmp_path, place, tools):
    path = write(tmp_path, place=place).path
    their = AutoTokenizer.from_pretrained(path).apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert Tokenizer.from_directory(path).apply_chat_template(CHAT, tools=tools) == their


def test_templates_without_a_default_are_named(tmp_path):
    path = write(tmp_path, place="additional").path
    (path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no default chat template, only tool_use; give one with --chat-template FILE"):
        Tokenizer.from_directory(path).apply_chat_template(CHAT)
    assert Tokenizer.from_directory(path).apply_chat_template(CHAT, tools=TOOLS).startswith("with 1 ")


def test_broken_additional_templates_are_named_with_their_line(tmp_path):
    path = write(tmp_path, place="additional").path
    (path / "additional_chat_templates/tool_use.jinja").write_text("one\n{% if %}")
    with pytest.raises(DataError) as caught:
        Tokenizer.from_directory(path).apply_chat_template(CHAT, tools=TOOLS)
    assert "tool_use.jinja: the chat template does not parse at line 2" in str(caught.value)


@pytest.mark.parametrize("name", ["padding", "max_length", "chat_template", "tokenize", "continue_final_message"])
def test_a_variable_that_would_be_an_option_of_the_call_is_refused(folder, name):
    with pytest.raises(DataError, match=f"cannot have a variable '{name}'"):
        Tokenizer.from_directory(folder).render(CHAT, **{name: True})


# The day ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format",
    [
        "%d %b %Y",
        "%Y-%m-%d",
        "%A, %-d %B %Y",
        "%d/%m/%y %H:%M:%S",
        "%j %U %w %p %I",
        "100%% of %%d %d%%",
        "no day",
        "%x %c",
    ],
)
def test_the_day_is_always_the_same(both, format):
    source = f"{{%- if strftime_now is defined %}}\n  {{{{- strftime_now({format!r}) }}}}{{% endif %}}!"
    ours, their = both(source)
    assert ours == TODAY.strftime(format) + "!"
    if "%" not in format or "%%" in format:
        return
    assert their != ours or datetime.now().date() == TODAY.date()


@pytest.mark.parametrize("source", ["  {% if true %}\n x{% endif %}", "{#- c #}\n\nx", "\n{{- 'x' }}\n", "x\n"])
def test_the_day_leaves_the_rest_of_a_template_alone(both, source):
    never = "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    ours, their = both(source + never)
    assert ours == their
    ours, their = both(source + "{# strftime_now #}")
    assert ours == their


def test_the_day_is_there_in_macros_and_loops(both):
    source = "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{% for m in messages %}{{ day() }}{% endfor %}"
    assert both(source)[0] == "2626"


def test_lines_of_a_template_that_asks_for_the_day_are_counted_from_its_own_first(folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d') }}\n{% if %}")
    with pytest.raises(DataError, match="does not parse at line 2"):
        Tokenizer.from_directory(folder, chat_template=tmp_path / "t.jinja")


def test_a_template_that_does_not_ask_for_the_day_is_left_alone():
    assert on_a_fixed_day("{{ messages }}") == "{{ messages }}"


def test_literal_text_is_text_and_strings():
    text = literal_text("a{# no #}{{ '<|x|>' + m }}{% if m == \"b\" %}c{% generation %}d{% endgeneration %}{% endif %}")
    assert [part in text for part in ("a", "<|x|>", "b", "c", "d", "no", "m ")] == [True] * 5 + [False] * 2
    assert literal_text("{{ unclosed") == ""
