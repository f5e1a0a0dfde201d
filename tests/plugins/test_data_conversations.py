"""What real writers of conversations leave in their files: read right, said, or refused in a sentence."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

from tests.plugins.chat_families import FAMILIES, write_family
from zoo.core.contracts import Record
from zoo.core.errors import DataError
from zoo.core.plugins import Plugins
from zoo.core.registry import Registry
from zoo.core.samples import Samples
from zoo.core.tokenizer import Tokenizer
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
