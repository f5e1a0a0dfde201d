"""What real writers of conversations leave in their files: read right, said, or refused in a sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

from tests.harness.chat_families import FAMILIES, write_family
from zoo.core.contracts.data import Record
from zoo.core.data.samples import LOSS_ON, Samples
from zoo.core.errors import DataError
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.plugins.data.conversation import inside

USER = {"role": "user", "content": "What is two and two?"}
FOUR = {"role": "assistant", "content": "Four"}
MORE = {"role": "user", "content": "And two?"}
SIX = {"role": "assistant", "content": "Six"}

VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}{% s %}{{ m.content + eos_token }}{% e %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '|' + m.content }}{% else %}:{% s %}{{ m.content }}{% e %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="module")
def registry():
    return Registry(Plugins.load())


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: Tokenizer.from_directory(write_family(root / name, name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def sample(registry, families):
    """The document of a record under a family's template."""

    def made(name, *, loss_on="assistant", **fields):
        return Samples(registry, families[name], loss_on=loss_on)(Record(fields, "a.jsonl:7"))

    return made


@pytest.fixture(scope="module")
def trained(families, sample):
    """What of a record is trained, as text, and the kinds of remarks with their places."""

    def made(name, **fields):
        document = sample(name, **fields)
        text = families[name].decode(document.tokens[document.trained].tolist())
        return text, [(one.kind, one.place) for one in document.remarks]

    return made


def refusal(sample, name="chatml", **fields):
    with pytest.raises(DataError) as caught:
        sample(name, **fields)
    message = str(caught.value)
    assert message.startswith("a.jsonl:7: ")
    assert "\n" not in message
    assert "failed on it" not in message
    return message


# Tokens in which header and answer merge ----------------------------------------------------------


def merging(folder, template, *tokens):
    """A vocabulary of bytes and of these tokens, whatever letters and spaces they hold."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: id for id, letter in enumerate(alphabet)}
    merges = []
    for token in tokens:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)[0][0]
        for end in range(2, len(letters) + 1):
            if letters[:end] not in vocab:
                vocab[letters[:end]] = len(vocab)
                merges.append((letters[: end - 1], letters[end - 1]))
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|eot_id|>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(folder)


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        (VICUNA, (": Four", ": Six"), [": Four", "<|eot_id|>", ": Six", "<|eot_id|>"]),
        (VICUNA, (": Fo", "ur"), [": Fo", "ur", "<|eot_id|>", "S", "i", "x", "<|eot_id|>"]),
        (
            VICUNA.replace("ASSISTANT: ", "ASSISTANT:"),
            (":Fo",),
            [":Fo", "u", "r", "<|eot_id|>", "S", "i", "x", "<|eot_id|>"],
        ),
        # Answers that merge with what follows, and one token that begins in a header and covers two turns.
        (PLAIN, ("Four|", "Six"), ["Four|", "Six"]),
        (PLAIN, (":Four|And two?:S",), [":Four|And two?:S", "i", "x"]),
    ],
)
def test_a_token_that_holds_a_character_of_an_answer_is_trained(registry, tmp_path, template, tokens, expected):
    """As in transformers' own mask, for a template with `{% generation %}` around what the assistant says."""
    tokenizer = merging(tmp_path, template.replace("{% s %}", "").replace("{% e %}", ""), *tokens)
    messages = [USER, FOUR, MORE, SIX]
    document = Samples(registry, tokenizer)(Record({"messages": messages}, "a"))
    marked = template.replace("{% s %}", "{% generation %}").replace("{% e %}", "{% endgeneration %}")
    out = tokenizer.pretrained.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert document.tokens.tolist() == out["input_ids"]
    assert document.trained.tolist() == [bool(one) for one in out["assistant_masks"]]
    said = [tokenizer.decode([id]) for id in document.tokens[document.trained].tolist()]
    assert said == expected


@pytest.mark.parametrize(
    ("offsets", "spans", "expected"),
    [
        ([(0, 3), (3, 5), (5, 8)], [(3, 5)], [0, 1, 0]),
        ([(0, 4), (4, 5), (5, 8)], [(3, 5)], [1, 1, 0]),
        ([(0, 3), (3, 8)], [(3, 5)], [0, 1]),
        ([(0, 8), (8, 9)], [(1, 2), (4, 5)], [1, 0]),
        ([(0, 2), (2, 6), (6, 9)], [(1, 3), (5, 7)], [1, 1, 1]),
        ([(0, 1), (0, 1), (1, 2), (1, 2)], [(1, 2)], [0, 0, 1, 1]),  # bytes of one character
        ([(0, 2), (3, 5)], [(2, 5)], [0, 1]),  # a blank that no token holds
        ([(0, 2), (2, 4)], [], [0, 0]),
        ([(0, 2), (2, 4)], [(2, 2)], [0, 0]),
    ],
)
def test_which_tokens_hold_a_character_of_a_span(offsets, spans, expected):
    assert inside([5] * len(offsets), offsets, spans, special=set()) == [bool(one) for one in expected]


def test_a_special_token_that_swallows_the_beginning_of_an_answer_is_the_headers():
    """As those with `rstrip` do: they are in the prompt that the model is given."""
    assert inside([1, 7, 2], [(0, 2), (2, 9), (9, 12)], [(8, 12)], special={7}) == [False, False, True]


# What a template drops or garbles -----------------------------------------------------------------

LOST = "turns whose {} the chat template leaves out or changes"


def test_reasoning_that_the_template_drops_is_named(trained):
    messages = [USER, {**FOUR, "content": "<think>\ntwo and two\n</think>\n\nFour"}, MORE, SIX]
    assert trained("qwen3", messages=messages)[1] == [(LOST.format("reasoning"), "message 2")]
    assert trained("chatml", messages=messages) == (
        "<think>\ntwo and two\n</think>\n\nFour<|im_end|>Six<|im_end|>",
        [],
    )
    # What is said again in a later turn is not there for the earlier one.
    messages[3] = {**SIX, "content": "<think>\ntwo and two\n</think>\n\nSix"}
    text, remarks = trained("qwen3", messages=messages)
    assert text == "Four<|im_end|><think>\ntwo and two\n</think>\n\nSix<|im_end|>"
    assert remarks == [(LOST.format("reasoning"), "message 2")]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_looked_for(trained, key):
    messages = [USER, {**FOUR, key: "two and two"}]
    assert trained("chatml", messages=messages)[1] == [(LOST.format("reasoning"), "message 2")]
    assert trained("chatml", messages=[USER, {**FOUR, key: " \n"}])[1] == []


def test_content_and_tools_that_the_template_drops_are_named(trained):
    call = {"type": "function", "function": {"name": "add", "arguments": {"numbers": [2, 2.5], "exact": True}}}
    messages = [USER, {**FOUR, "tool_calls": [call]}, {"role": "tool", "content": "4"}, SIX]
    assert trained("chatml", messages=messages)[1] == [(LOST.format("tool calls"), "message 2")]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert trained("llama31", messages=messages, tools=tools)[1] == [(LOST.format("content"), "message 2")]
    assert trained("qwen25", messages=messages, tools=tools)[1] == []
    assert trained("llama3", messages=[USER, FOUR], tools=tools)[1] == [
        ("conversations whose tools the chat template leaves out or changes", "")
    ]
    assert trained("chatml", messages=[USER, FOUR], documents=[{"title": "sums", "text": "of two"}])[1] == [
        ("conversations whose documents the chat template leaves out or changes", "")
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama31", "qwen25", "qwen3", "gemma", "mixtral", "deepseek"])
def test_parts_of_text_are_joined_where_the_template_would_print_the_list(trained, name):
    """Or would drop it, or fail on it."""
    parts = [{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur", "image_url": None}]
    apart = trained(
        name, messages=[{**USER, "content": [{"type": "text", "text": "What?"}]}, {**FOUR, "content": parts}]
    )
    assert apart == trained(name, messages=[{**USER, "content": "What?"}, FOUR])
    assert "Four<" in apart[0]
    assert apart[1] == []


def test_a_template_that_handles_parts_gets_them(registry, families, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    )
    tokenizer = families["chatml"].with_chat_template(tmp_path / "t.jinja")
    parts = [{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur"}]
    document = Samples(registry, tokenizer)(Record({"messages": [USER, {**FOUR, "content": parts}]}, "a"))
    assert tokenizer.decode(document.tokens[document.trained].tolist()).endswith("<Fo><ur><|im_end|>")


@pytest.mark.parametrize("name", ["llama31", "qwen25", "qwen3", "mistral", "deepseek"])
def test_arguments_may_be_an_object_or_json_text(trained, families, name):
    """Each template gets what it wants: objects by transformers' convention, text where it copies what is there."""
    arguments = {"place": "Pfaffenhofen an der Ilm", "days": 2}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

    def messages(given):
        call = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": given}}
        return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]

    as_object = trained(name, messages=messages(arguments), tools=tools)
    as_text = trained(name, messages=messages(json.dumps(arguments)), tools=tools)
    assert as_object == as_text
    assert json.dumps(arguments) in as_text[0]
    assert as_text[1] == []


@pytest.mark.parametrize("name", ["llama31", "qwen25", "qwen3", "mistral", "deepseek"])
def test_a_tool_call_may_have_its_name_one_level_up(sample, name):
    """As exports of Hermes and ShareGPT have it; most templates look below `function`."""
    call = {"id": "abcdefgh1", "name": "weather", "arguments": {"place": "Paris"}}
    nested = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Paris"}}}
    one, other = (
        sample(name, messages=[USER, {"role": "assistant", "content": "", "tool_calls": [form]}])
        for form in (call, nested)
    )
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.trained.tolist() == other.trained.tolist()


def test_arguments_that_are_no_json_are_said(sample, trained, registry, families, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    kind = "tool calls whose arguments are text and no JSON object"
    assert (kind, "message 2") in trained("qwen3", messages=messages)[1]
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}<|im_end|>{% endfor %}"
    )
    tokenizer = families["chatml"].with_chat_template(tmp_path / "t.jinja")
    with pytest.raises(DataError, match=r"^a:1: .*; the arguments of message 2's tool calls are no JSON object$"):
        Samples(registry, tokenizer)(Record({"messages": messages}, "a:1"))


def test_no_content_beside_tool_calls_is_never_the_word_none(trained, registry, families, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    for content in ({"content": None}, {}, {"content": ""}):
        text, _ = trained("qwen25", messages=[USER, {"role": "assistant", **content, "tool_calls": [call]}])
        assert text == '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'
        (tmp_path / "t.jinja").write_text(
            "{% for m in messages %}[{{ m.role }}]{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        tokenizer = families["chatml"].with_chat_template(tmp_path / "t.jinja")
        record = Record({"messages": [USER, {"role": "assistant", **content, "tool_calls": [call]}]}, "a")
        document = Samples(registry, tokenizer)(record)
        assert tokenizer.decode(document.tokens[document.trained].tolist()) == "<|im_end|>"
        assert [one.kind for one in document.remarks] == [LOST.format("tool calls")]


def test_null_among_arguments_is_said(trained):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    (remark,) = trained("qwen25", messages=[USER, {**FOUR, "tool_calls": [call]}])[1]
    assert remark[0].startswith("tool calls with null among the arguments")


# Weights and roles --------------------------------------------------------------------------------


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_a_turn_of_weight_0_is_not_trained(trained, no):
    messages = [USER, {**FOUR, **no}, MORE, {**SIX, "weight": 1, "train": True}]
    assert trained("llama3", messages=messages) == ("Six<|eot_id|>", [])
    assert trained("llama3", messages=messages, loss_on="last")[0] == "Six<|eot_id|>"
    assert trained("llama3", messages=messages[2:] + messages[:2], loss_on="last")[0] == "Six<|eot_id|>"
    everything = trained("llama3", messages=messages, loss_on="all")[0]
    assert "Four" not in everything
    assert "What is two and two?" in everything
    assert trained("llama3", prompt=messages[:1], completion=messages[1:])[0] == "Six<|eot_id|>"
    assert trained("llama3", messages=[USER, {**FOUR, **no}])[0] == ""


def test_a_conversation_that_nobody_wants_trained_says_why(trained):
    _, remarks = trained("chatml", messages=[USER, {**FOUR, "weight": 0}])
    assert remarks == [("conversations whose assistant's turns all have weight 0 or train false", "")]
    assert trained("chatml", messages=[USER, {**FOUR, "weight": 0}], loss_on="all")[1] == []


def test_a_weight_says_yes_or_no(sample, trained):
    for value in ({"weight": 1}, {"weight": True}, {"train": 1}, {"weight": None}, {"train": None}):
        assert trained("llama3", messages=[USER, {**FOUR, **value}])[0] == "Four<|eot_id|>"
    for key, value in (("weight", 0.5), ("weight", 2), ("weight", "0"), ("train", "no"), ("weight", [])):
        message = refusal(sample, messages=[USER, {**FOUR, key: value}])
        assert f"message 2 has {key} {value!r}; it is 0 or 1" in message


def test_roles_that_are_never_trained_are_warned_about_by_name(trained):
    messages = [USER, {**FOUR, "role": "Assistant"}, MORE, SIX, USER, {**SIX, "role": "gpt"}]
    text, remarks = trained("chatml", messages=messages)
    assert text == "Six<|im_end|>"
    assert remarks == [
        ("turns of role 'Assistant', which is never trained; 'assistant' is", "message 2"),
        ("turns of role 'gpt', which is never trained; 'assistant' is", "message 6"),
    ]
    usual = [{**USER, "role": role} for role in ("system", "developer", "user", "tool", "function", "ipython")]
    assert trained("chatml", messages=[*usual, FOUR])[1] == []
    (remark,) = trained("chatml", messages=[{**USER, "train": True}, FOUR])[1]
    assert remark[0].startswith("turns that ask for training and are not of role 'assistant'")


# Files of other tools -----------------------------------------------------------------------------


def test_what_tables_and_exports_leave_in_is_read(trained):
    plain = trained("qwen25", messages=[USER, FOUR])
    empty = {"tool_calls": None, "function_call": None, "name": None, "weight": None, "reasoning_content": None}
    filled = [{**message, **empty} for message in (USER, FOUR)]
    for fields in (
        {"messages": filled},
        {"messages": filled, "text": None, "prompt": None, "completion": None, "tools": None, "documents": None},
        {"messages": json.dumps([USER, FOUR])},
        {"messages": [USER, FOUR], "parallel_tool_calls": False, "tools": []},
        {"messages": [USER, FOUR], "tools": "", "functions": "null", "chat_template_kwargs": None, "system": None},
        {"messages": [USER, {**FOUR, "tool_calls": []}]},
        {"messages": [USER, {**FOUR, "refusal": None, "audio": None, "annotations": []}]},
    ):
        assert trained("qwen25", **fields) == plain


def test_functions_as_they_were_called_before_are_tools(trained):
    function = {"name": "add", "description": "sums", "parameters": {"type": "object"}}
    called = {"name": "add", "arguments": '{"a": 2}'}
    old = {
        "messages": [USER, {"role": "assistant", "content": None, "function_call": called}],
        "functions": [function],
    }
    new = {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": called}]}],
        "tools": [{"type": "function", "function": function}],
    }
    assert trained("qwen25", **old) == trained("qwen25", **new)
    for tools in (json.dumps(new["tools"]), [json.dumps(new["tools"][0])]):
        assert trained("qwen25", messages=new["messages"], tools=tools) == trained("qwen25", **new)
    assert '"arguments": {"a": 2}' in trained("qwen25", **new)[0]


def test_a_system_message_may_have_a_column(sample):
    one = sample("chatml", messages=[USER, FOUR], system="Be short.")
    other = sample("chatml", messages=[{"role": "system", "content": "Be short."}, USER, FOUR])
    assert one.tokens.tolist() == other.tokens.tolist()
    message = refusal(sample, messages=[{"role": "system", "content": "x"}, USER, FOUR], system="Be short.")
    assert "write the one system message as the first" in message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}]}, "rename it messages, and from and value in it"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "rename from and value, human and gpt to role and content"),
        ({"instruction": "a", "input": "", "output": "b"}, "write instruction and input as prompt, and output as"),
        ({"prompt": "a", "response": "b"}, "rename response completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "zoo does not train on preferences"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens are not read"),
        ({"question": "a", "answer": "b"}, "rename them prompt and completion"),
        ({"messages": [USER, {"role": "assistant", "content": {"text": "x"}}]}, "message 2 of column messages needs a"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "message 2 of column messages needs a content"),
        ({"messages": [USER, {"role": None, "content": "x"}]}, "an object with content, role, whose role is null"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, FOUR]},
            "message 1: part 1 of its content is of type 'image_url'; only text is trained on",
        ),
        ({"messages": [{**USER, "content": ["x"]}, FOUR]}, "part 1 of its content is a string; only text"),
        ({"messages": [USER, {**FOUR, "tool_calls": "x"}]}, "message 2: tool_calls is text that is not JSON"),
        ({"messages": [USER, {**FOUR, "tool_calls": [{"id": 1}]}]}, "a tool call must be an object with a function"),
        ({"messages": [USER, {**FOUR, "tool_calls": {"name": "f"}}]}, "tool_calls must be a list"),
        ({"messages": [USER, {**FOUR, "reasoning": ["x"]}]}, "reasoning must be text, not a list"),
        ({"messages": [USER, FOUR], "tools": {"name": "f"}}, "column tools must be a list, not an object"),
        ({"messages": [USER, FOUR], "tools": ["{"]}, "an entry of column tools is text that is not JSON"),
        ({"messages": [USER, FOUR], "tools": [None]}, "entry 1 of column tools must be an object, not null"),
        ({"messages": [USER, FOUR], "functions": [{"name": "f"}, 4]}, "entry 2 of column functions must be an object"),
        ({"messages": None, "meta": 1}, "its columns (meta) fit no data format"),
        ({"text": None}, "all its columns (text) hold null; take it out"),
        ({"text": 4}, "column text must be a string, not a number"),
        ({"prompt": "a", "completion": ["b"]}, "two strings or two lists of messages, not a string and a list"),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}]}, "that is text; it is null"),
        ({"messages": [USER, {"role": "assistant", "content": 0.5}]}, "a content that is text; it is a number"),
        ({"messages": [USER, {**FOUR, "content": [{"type": "text", "text": None}]}]}, "'text' and its text is null;"),
    ],
)
def test_what_is_not_read_is_refused_in_a_sentence(sample, fields, says):
    assert says in refusal(sample, **fields)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "x", "{", "[]", "assistant", "</think>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "type",
                    "text",
                    "weight",
                    "train",
                    "id",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
messages_like = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "bot"]),
            "content": st.just("hi") | json_values,
        },
        optional={
            "tool_calls": json_values,
            "function_call": json_values,
            "weight": json_values,
            "reasoning_content": json_values,
        },
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    messages=messages_like | json_values,
    others=st.dictionaries(
        st.sampled_from(["tools", "documents", "chat_template_kwargs", "system", "prompt"]), json_values
    ),
    loss_on=st.sampled_from(LOSS_ON),
)
def test_whatever_stands_in_a_record_it_is_read_or_refused_in_a_sentence(sample, name, messages, others, loss_on):
    try:
        document, said = sample(name, messages=messages, loss_on=loss_on, **others), None
    except DataError as error:
        document, said = None, str(error)
    if document is None:
        assert said.startswith("a.jsonl:7: ")
        assert "failed on it" not in said
        assert "\n" not in said
    else:
        assert len(document.tokens) == len(document.trained)


# Turns that do not begin with the generation prompt -----------------------------------------------


def test_an_assistant_that_speaks_first_is_trained_without_its_header(trained):
    for name in ("chatml", "llama3", "llama31", "qwen25", "qwen3", "deepseek", "r1distill"):
        text, remarks = trained(name, messages=[SIX, USER, FOUR])
        assert text.startswith("Six<"), name
        assert text.count("Four<") == 1
        assert remarks == []


def test_a_header_that_no_prompt_of_an_empty_conversation_has_is_not_trained(families, registry, tmp_path):
    """As in the templates of Zephyr and OLMo, which write the prompt after the last message."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    )
    tokenizer = families["chatml"].with_chat_template(tmp_path / "t.jinja")
    document = Samples(registry, tokenizer)(Record({"messages": [SIX, USER, FOUR]}, "a:1"))
    text = tokenizer.decode(document.tokens[document.trained].tolist())
    assert text == "Six<|im_end|>Four<|im_end|>"


def test_a_prompt_that_ends_in_a_tag_is_no_part_of_an_answer_without_it(trained):
    """As R1's: generation begins after `<think>`, and the template keeps no reasoning."""
    messages = [USER, {**FOUR, "content": "<think>\nsums\n</think>\n\n<b>Four</b>"}, MORE, SIX]
    text, remarks = trained("r1distill", messages=messages)
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert text == f"\n\n<b>Four</b>{end}Six{end}"
    assert remarks == [(LOST.format("reasoning"), "message 2")]
    kwargs = {"enable_thinking": False}
    assert (
        trained("qwen3", messages=[USER, FOUR, MORE, SIX], chat_template_kwargs=kwargs)[0]
        == "Four<|im_end|>Six<|im_end|>"
    )


ENDED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% s %}{{ m.content }}<|im_end|>{% e %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)


@pytest.mark.parametrize("answer", ["end", "text", "<", "", "Four"])
def test_an_answer_that_the_closing_of_a_conversation_spells_ends_with_its_token(families, registry, tmp_path, answer):
    """Phi-3's template writes a token at the very end, where no answer is to come; transformers' mask is the oracle."""
    (tmp_path / "t.jinja").write_text(ENDED.replace("{% s %}", "").replace("{% e %}", ""))
    messages = [USER, {**FOUR, "content": answer}, MORE, SIX]
    document = Samples(registry, families["chatml"].with_chat_template(tmp_path / "t.jinja"))(
        Record({"messages": messages}, "a:1")
    )
    marked = ENDED.replace("{% s %}", "{% generation %}").replace("{% e %}", "{% endgeneration %}")
    out = families["chatml"].pretrained.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, chat_template=marked
    )
    before = len(out["input_ids"]) - 2  # the new line and `<|endoftext|>`
    assert document.tokens.tolist() == out["input_ids"]
    assert document.trained[:before].tolist() == [bool(one) for one in out["assistant_masks"][:before]]


words = st.sampled_from(
    ["four", "yes", "\n", " ", "</think>", "<think>", ":", "<|im_end|>", "</s>", "1", "[/INST]", "ok."]
)
contents = st.lists(words, min_size=1, max_size=4).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    said=st.lists(st.tuples(contents, contents), min_size=1, max_size=4),
    loss_on=st.sampled_from(["assistant", "last"]),
)
def test_what_others_say_is_never_trained_and_all_that_is_written_of_answers_is(families, sample, name, said, loss_on):
    """Letters that nobody else writes stand at both ends of what each says."""
    messages = []
    for asked, answered in said:
        messages += [{"role": "user", "content": f"Q{asked}Q"}, {"role": "assistant", "content": f"Z{answered}Z"}]
    document = sample(name, messages=messages, loss_on=loss_on)
    tokenizer = families[name]
    q, z = (tokenizer.encode(letter)[-1] for letter in "QZ")
    tokens, trained = document.tokens, document.trained
    assert not trained[tokens == q].any()
    written = tokenizer.decode(tokens.tolist()).count("Z")
    if loss_on == "assistant":
        assert trained[tokens == z].sum() == written
    else:  # of the last answer, which R1's template cuts at `</think>`
        assert trained[tokens == z].sum() in (1, 2)


def test_a_template_that_cannot_be_told_apart_is_refused_with_a_hint(registry, families, tmp_path):
    """It writes every answer before every question."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        "{{ messages | map(attribute='content') | join('') | length }}"
    )
    tokenizer = families["chatml"].with_chat_template(tmp_path / "t.jinja")
    with pytest.raises(DataError, match=r"a:1: the chat template writes .*; type --loss-on last or all"):
        Samples(registry, tokenizer)(Record({"messages": [USER, FOUR, MORE, SIX]}, "a:1"))


# Special tokens that are spelt out, and those the vocabulary lacks --------------------------------


def test_texts_that_spell_out_special_tokens_are_said(trained):
    row = "<|im_start|>user\nhi<|im_end|>\n"
    kind = "texts that spell out special tokens, which stay characters; give conversations as column messages"
    assert trained("chatml", text=row)[1] == [(kind, "<|im_end|> <|im_start|>")]
    assert trained("llama3", text=row)[1] == [(kind, "<|im_end|> <|im_start|>")]
    assert trained("mixtral", prompt="<s>[INST] hi [/INST]", completion="ok")[1] == [(kind, "<s>")]
    assert trained("chatml", text="a < b | c > d, x<|y, <b>")[1] == []
    (remark,) = trained("llama3", messages=[{**USER, "content": row}, FOUR])[1]
    assert remark[0] == "conversations that spell out special tokens, which stay characters"


def test_a_template_whose_markers_the_vocabulary_lacks_is_said(registry, families, trained, tmp_path):
    (tmp_path / "t.jinja").write_text(families["chatml"].templates["default"])
    tokenizer = families["llama3"].with_chat_template(tmp_path / "t.jinja")
    document = Samples(registry, tokenizer)(Record({"messages": [USER, FOUR]}, "a"))
    (remark,) = document.remarks
    assert remark.kind.startswith("conversations in which the chat template writes markers that the vocabulary lacks")
    assert remark.place == "<|im_start|> <|im_end|>"
    for name in FAMILIES:
        assert trained(name, messages=[USER, FOUR])[1] == []
