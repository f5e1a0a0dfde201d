"""What a tokenizer's directory means is what transformers says: its AutoTokenizer and its own calls are the oracle."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tools.drawn_tokenizers import BOS, END, EOS, PAD, SEP, differences, draw, write
from zoo.core.errors import DataError
from zoo.core.tokenizer.files import has_vocabulary, tokenizer_files
from zoo.core.tokenizer.tokenizer import Tokenizer


def theirs(path):
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def change(path, name="tokenizer_config.json", **fields):
    """Set fields of one of the JSON files; None takes one out."""
    file = path / name
    content = {**(json.loads(file.read_text()) if file.exists() else {}), **fields}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(path):
    with pytest.raises(DataError) as caught:
        Tokenizer.from_directory(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("seed", range(64))
def test_drawn_directories_mean_what_they_mean_to_transformers(seed, tmp_path):
    """Ids, bos and eos, stop tokens, conversations; refused is what transformers cannot load or gives invented ids."""
    drawn = draw(seed, tmp_path / "tokenizer")
    assert list(differences(drawn, lambda: theirs(drawn.path))) == [], drawn.choices


# Special tokens by name ---------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["text", "objects", "map"])
def test_names_are_found_in_whichever_file_has_them(tmp_path, names):
    path = write(tmp_path, names=names).path
    ours, their = Tokenizer.from_directory(path), theirs(path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (their.bos_token_id, their.eos_token_id, their.pad_token_id)
    assert ours.named == their.special_tokens_map == dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, sep_token=SEP)


def test_a_token_that_only_the_config_defines_has_the_id_that_the_config_gives(tmp_path):
    path = write(tmp_path, names="text", decoder="beyond").path
    change(path, eos_token="<|tool|>")
    assert Tokenizer.from_directory(path).eos_id == theirs(path).eos_token_id == len(theirs(path)) - 1


def test_a_token_of_added_tokens_json_is_defined(tmp_path):
    path = write(tmp_path, names="text").path
    id = len(theirs(path))
    (path / "added_tokens.json").write_text(json.dumps({"<|stop|>": id}))
    change(path, eos_token="<|stop|>")
    assert Tokenizer.from_directory(path).eos_id == theirs(path).eos_token_id == id


def test_a_class_brings_names_of_its_own(tmp_path):
    path = write(tmp_path, names="none", vocabulary="prepend", **{"class": "LlamaTokenizer"}).path
    ours, their = Tokenizer.from_directory(path), theirs(path)
    assert (ours.bos_id, ours.eos_id) == (their.bos_token_id, their.eos_token_id) == (1, 2)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "cls_token"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_name_without_an_id_is_an_error_that_names_file_and_token(tmp_path, file, name):
    path = write(tmp_path, names="none").path
    change(path, file, **{name: "<|endoftxt|>"})
    assert theirs(path).convert_tokens_to_ids("<|endoftxt|>") == len(theirs(path)) - 1  # one more than it had
    message = refused(path)
    assert f"{path / file} names {name} '<|endoftxt|>'" in message


def test_a_misspelt_name_is_told_what_the_id_in_config_json_is(tmp_path):
    path = write(tmp_path, names="misspelt", model="llama").path
    assert f"config.json says {theirs(path).convert_tokens_to_ids(EOS)}, which is '{EOS}'" in refused(path)


def test_a_name_of_the_class_that_the_vocabulary_lacks_is_an_error_for_eos_and_nothing_for_unk(tmp_path):
    path = write(tmp_path, names="none", **{"class": "GPT2TokenizerFast"}).path
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert "the class GPT2Tokenizer names bos_token '<|endoftext|>'" in refused(path)
    change(path, bos_token=BOS, eos_token=EOS)
    ours = Tokenizer.from_directory(path)
    assert theirs(path).unk_token_id == len(theirs(path)) - 1  # invented
    assert ours.vocab_size == len(theirs(path)) - 1
    assert "unk_token" not in ours.named
    assert "<|endoftext|>" not in ours.special


def test_a_name_of_the_class_that_nothing_defines_and_every_text_begins_with_is_an_error(tmp_path):
    path = write(tmp_path, names="text", **{"class": "BertTokenizerFast"}).path
    assert theirs(path)("a").input_ids[0] >= theirs(path).vocab_size + 14  # [CLS], behind all that the file has
    assert "the class BertTokenizer names cls_token '[CLS]', which no file of the directory gives an id" in refused(
        path
    )


@pytest.mark.parametrize("id", [-1, True, 99999, "302", [], None])
def test_an_id_of_config_json_that_is_no_token_is_none(tmp_path, id):
    path = write(tmp_path, names="none", **{"class": "PreTrainedTokenizerFast"}).path
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": id}))
    ours = Tokenizer.from_directory(path)
    assert (ours.eos_id, len(ours.notes)) == (None, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token": ["</s>"]},
        {"eos_token": 5},
        {"chat_template": [{"name": "default"}]},
        {"added_tokens_decoder": [1]},
        {"additional_special_tokens": "abc"},
        {"tokenizer_object": "x"},
        {"tokenizer_class": 5},
        {"tokenizer_class": "T5TokenizerFast"},
        {"fast_tokenizer_files": ["tokenizer.../../../x.json"]},
    ],
)
def test_what_transformers_cannot_load_is_refused_with_its_reason(tmp_path, fields):
    path = write(tmp_path).path
    change(path, **fields)
    with pytest.raises(Exception) as caught:
        theirs(path)
    reason = f"{type(caught.value).__name__}: {' '.join(str(caught.value).split())}"[:60].rstrip(": ")
    assert f"{path}: transformers cannot load this tokenizer: {reason}" in refused(path)


def test_a_vocabulary_that_cannot_spell_a_text_is_an_error_of_the_data(tmp_path):
    """CodeLlama's class reads unknown characters as `<unk>`, which this vocabulary does not have."""
    path = write(tmp_path, **{"class": "CodeLlamaTokenizerFast"}).path
    with pytest.raises(Exception, match="Unk token"):
        theirs(path)("a\u4e2d")
    with pytest.raises(DataError, match="cannot read a text: Unk token"):
        Tokenizer.from_directory(path).encode("a\u4e2d")


def test_no_eos_at_all_is_said(tmp_path):
    ours = Tokenizer.from_directory(write(tmp_path / "none", names="none").path)
    assert ours.eos_id is None
    (note,) = ours.notes
    assert "names no eos token" in note
    assert Tokenizer.from_directory(write(tmp_path / "named", names="text").path).notes == ()
    assert Tokenizer.from_directory(write(tmp_path / "ids", names="none", model="llama").path).notes == ()


# What begins a text -------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("post", [None, "bos", "bos and eos", "byte level and bos", "sep"])
def test_a_text_begins_as_transformers_begins_it_whatever_add_bos_token_says(tmp_path, post, said):
    path = write(tmp_path, post=post, add_bos_token=said).path
    ours, (*begin, a) = Tokenizer.from_directory(path), theirs(path)("a").input_ids[: 1 + (post is not None)]
    assert ours.begin_ids == tuple(begin)
    assert ours.encode("a") == [a]


# Files and machine --------------------------------------------------------------------------------


def test_a_tokenizer_of_other_files_is_loaded_as_transformers_loads_it(tmp_path):
    """GPT-2's two files, without a tokenizer.json."""
    path = write(tmp_path, **{"class": "GPT2TokenizerFast"}).path
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(
        json.dumps(model["vocab"] | {t: 400 + i for i, t in enumerate((BOS, EOS, PAD, SEP))})
    )
    (path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    change(path, "added_tokens.json", **{END: 404, "<|endoftext|>": 405})
    ours = Tokenizer.from_directory(path)
    assert has_vocabulary(path)
    assert ours.encode("The capital of") == theirs(path)("The capital of").input_ids
    assert ours.eos_id == theirs(path).eos_token_id == 401


@pytest.mark.parametrize("content", [b"\x0a\x0e\x0a\x05<unk>", b"IQ== 0\nIg== 1\n"])
def test_a_vocabulary_that_needs_a_package_names_it(tmp_path, content):
    is_tiktoken = content.startswith(b"I")
    packages = {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece", "protobuf": "google"}
    missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if not missing:
        pytest.skip(f"{' and '.join(packages)} are installed")
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refused(tmp_path).endswith(f"not installed here: pip install {' '.join(missing)}")


def test_a_sentencepiece_vocabulary_alone_is_loaded_as_transformers_loads_it(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "corpus.txt").write_text("The capital of France is Paris.\nHello there, how are you today?\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "corpus.txt",
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        change(tmp_path, tokenizer_class=name, add_bos_token=True)
        ours, their = Tokenizer.from_directory(tmp_path), theirs(tmp_path)
        for text in ("Hello there", " \u00e9\n", "x" * 9):
            assert ours.encode(text, add_special=True) == their(text).input_ids
        assert (ours.bos_id, ours.eos_id) == (their.bos_token_id, their.eos_token_id)


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    """ByT5's is written in Python and needs no vocabulary file."""
    (tmp_path / "vocab.txt").write_text("x")
    change(tmp_path, tokenizer_class="ByT5Tokenizer")
    assert not theirs(tmp_path).is_fast
    assert "the tokenizer is a ByT5Tokenizer, written in Python" in refused(tmp_path)


def test_code_of_a_checkpoint_is_refused_and_never_runs(tmp_path):
    path = write(tmp_path, model="strange", **{"class": "StrangeTokenizer"}).path
    for name in ("configuration_strange.py", "tokenization_strange.py"):
        (path / name).write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    change(path, auto_map={"AutoTokenizer": ["tokenization_strange.Strange", None]})
    assert "custom code" in refused(path)
    change(path, auto_map=None)
    assert Tokenizer.from_directory(path).eos_id is not None
    assert not (path / "ran").exists()


def test_nothing_leaves_the_machine(tmp_path):
    """Python itself reports each look-up of a host and each connection. Of a model of Mistral's most is asked."""
    path = write(tmp_path / "a", model="mistral", place="additional").path
    code = (
        "import sys\n"
        "asked = []\n"
        "sys.addaudithook(lambda event, args: asked.append(event) if event.startswith('socket.') else None)\n"
        "from zoo.core.tokenizer.tokenizer import Tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        f"tokenizer = Tokenizer.from_directory({str(path)!r})\n"
        "tokenizer.render([{'role': 'user', 'content': 'x'}])\n"
        "assert 'transformers' in sys.modules\n"
        "print([event for event in asked if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto')])\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert said.stdout == "[]\n"
    assert said.stderr == ""


def test_files_lists_templates_in_their_folder(tmp_path):
    path = write(tmp_path, place="additional").path
    assert tokenizer_files(path)[-1] == "additional_chat_templates/tool_use.jinja"
