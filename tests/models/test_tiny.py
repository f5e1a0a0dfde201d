"""The embedded tiny checkpoints are what their READMEs say: language models of the standard library, and finders."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import zoo
from tools import tiny_card, tiny_text
from tools.reference import check_logits
from zoo.core.errors import DataError
from zoo.testing.recall import MARKER, NeedleTokens, found, needle_row, recall

FOLDERS = {family: Path(zoo.__file__).parent / "models" / family / "tiny" for family in tiny_card.CARDS}
TINY = FOLDERS["llama3"]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    """The directory of each embedded checkpoint in turn."""
    return FOLDERS[request.param]


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    """They all have the same."""
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(folder):
    return zoo.load(folder)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    """Encoded training files, and about 40,000 tokens of held-out ones."""
    documents = tiny_text.stdlib_documents()
    train = tiny_text.encode(tokenizer, [d for d in documents if not d.held_out])
    held_out = tiny_text.encode(tokenizer, [d for d in documents if d.held_out and "encodings/" not in d.name])
    enough = np.searchsorted(np.cumsum([len(each) for each in held_out]), 40_000) + 1
    return train, held_out[:enough]


def rows(tokenizer, text, length, *, count, needles=33, even=True):
    rng = np.random.default_rng(0)
    vocabulary = NeedleTokens.of(tokenizer)
    for i in range(count):
        piece = text[i * length : (i + 1) * length]
        yield needle_row(piece, length=length, num_needles=needles, vocabulary=vocabulary, rng=rng, even=even)


def test_held_out_loss_beats_unigram_and_bigram_clearly(model, corpus):
    train, held_out = corpus
    counts = tiny_text.baselines(train, held_out)
    loss = tiny_text.held_out_loss(model, held_out, window=512)
    assert 3.0 < counts.bigram < counts.unigram - 1
    assert loss < counts.bigram - 0.5


@pytest.mark.parametrize("length", [512, 1024])
def test_needles_are_found_up_to_the_window(model, tokenizer, corpus, config, length):
    assert length <= config["max_position_embeddings"]
    text = np.concatenate(corpus[1])
    assert recall(model, rows(tokenizer, text, length, count=12)) >= 0.95


def test_recall_counts_what_is_found_and_nothing_else(tokenizer, corpus):
    """A stand-in that knows every token scores 1, one that errs at the second answer of one question less."""
    (row,) = rows(tokenizer, np.concatenate(corpus[1]), 512, count=1)

    def oracle(tokens, wrong=None):
        following = torch.roll(tokens, -1, dims=1)
        if wrong is not None:
            following[0, wrong] = 0
        return torch.nn.functional.one_hot(following, 2048).float()

    assert found(oracle, row).all()
    missed = found(lambda tokens: oracle(tokens, wrong=row.answers[3]), row)
    assert missed.tolist() == [i != 3 for i in range(33)]


def test_needle_rows_have_one_answer_each_at_even_depths(tokenizer, corpus):
    """Even in text that holds most of the numbers there are."""
    text = np.concatenate(corpus[1])
    text[10:760] = NeedleTokens.of(tokenizer).numbers[:750]
    (row,) = rows(tokenizer, text, 1024, count=1)
    assert len(row.tokens) == 1024
    for answer, depth in zip(row.answers, row.depths, strict=True):
        marker, key, *values = row.tokens[depth : depth + 4]
        assert tokenizer.id_to_token(int(marker)) == MARKER
        assert row.tokens[answer - 2 : answer].tolist() == [marker, key]
        assert row.tokens[answer : answer + 2].tolist() == values
        assert [int((row.tokens == each).sum()) for each in (key, *values)] == [2, 2, 2]
    gaps = np.diff(np.sort(row.depths))
    assert gaps.max() - gaps.min() <= 1


def test_needles_that_do_not_fit_are_refused(tokenizer, corpus):
    text = np.concatenate(corpus[1])
    with pytest.raises(DataError, match="33 needles in 256 tokens do not fit"):
        list(rows(tokenizer, text, 256, count=1))
    with pytest.raises(DataError, match="take 1200 unused numbers"):
        list(rows(tokenizer, text, 8192, count=1, needles=400))


def test_a_tokenizer_without_the_marker_is_refused():
    class Other:
        def token_to_id(self, token):
            return None if token == "007" else 1

    with pytest.raises(DataError, match="no token '007'"):
        NeedleTokens.of(Other())


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n\treturn x ** 2  # 1234567\r\n", "na\u00efve \u4f60\u597d \U0001f600\x00", "  \n\n   x\n", "007 42 9"],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_numbers_and_markers_are_one_token(tokenizer, config):
    assert tokenizer.encode(f"{MARKER}007456789", add_special_tokens=False).tokens == [MARKER, "007", "456", "789"]
    assert tokenizer.encode("x").tokens == ["<|begin_of_text|>", "x"]
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|end_of_text|>") == config["eos_token_id"]


def test_chat_template_renders_headers():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "user", "content": " hi "}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_they_share_one_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()


def test_shape_allows_the_parallel_layouts(config):
    assert config["num_hidden_layers"] >= 2
    assert 2 <= config["num_key_value_heads"] < config["num_attention_heads"]


def test_files_are_small_and_a_tied_head_is_stored_once(folder, config):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 << 20
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) != config["tie_word_embeddings"]  # noqa: SIM118


def test_transformers_loads_it_and_agrees(model, corpus, folder):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.from_numpy(corpus[1][0][None, :256])
    with torch.no_grad():
        check_logits(copy.deepcopy(model), theirs(tokens).logits, tokens)
