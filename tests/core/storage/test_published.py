"""Files beside the weights of a run, as transformers reads them: what was trained is what they say."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tools.made_tokenizer import write_tokenizer
from zoo.core.storage.companions import companion_names
from zoo.core.storage.published import Trained, hub_files

CONFIG = {"model_type": "llama", "max_position_embeddings": 128, "eos_token_id": 1}
OLD = "{% for m in messages %}old {{ m.content }}{% endfor %}"
NEW = "{% for m in messages %}new {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


def trained(**changed):
    known = {"config": CONFIG, "length": 128, "longest": 128, "native": 128, "ends": (), "template": None}
    return Trained(**known | changed)


def edit(file, **fields):
    said = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**said, **fields}))


def written(files, out):
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


@pytest.fixture
def source(tmp_path):
    return write_tokenizer(tmp_path / "source", "llama3", template=None)


def as_text(folder):
    edit(folder / "tokenizer_config.json", chat_template=OLD)


def as_list(folder):
    names = ("default", "tool_use")
    edit(folder / "tokenizer_config.json", chat_template=[{"name": name, "template": OLD} for name in names])


def as_object(folder):
    edit(folder / "tokenizer_config.json", chat_template={"default": OLD, "tool_use": OLD})


def as_file(folder):
    (folder / "chat_template.jinja").write_text(OLD)


def as_a_processors_file(folder):
    edit(folder / "chat_template.json", chat_template=OLD)


def as_files_in_a_folder(folder):
    (folder / "additional_chat_templates").mkdir()
    for name in ("default", "tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(OLD)


STALE = [as_text, as_list, as_object, as_file, as_a_processors_file, as_files_in_a_folder]


@pytest.mark.parametrize("stale", [STALE[:0], *([form] for form in STALE), STALE])
def test_a_given_template_is_the_one_that_transformers_takes(source, tmp_path, stale):
    for form in stale:
        form(source)
    (tmp_path / "new.jinja").write_text(NEW)
    files = hub_files(source, trained(template=str(tmp_path / "new.jinja")))
    tokenizer = AutoTokenizer.from_pretrained(written(files, tmp_path / "out"))
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        said = tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert said == f"new hi{tokenizer.eos_token}"
    assert files["chat_template.jinja"] == NEW.encode()
    assert [name for name in files if "template" in name] == ["chat_template.jinja"]
    assert b"old" not in b"".join(files.values())


@pytest.mark.parametrize("form", STALE)
def test_without_a_given_template_every_form_of_the_sources_own_is_kept_byte_for_byte(source, form):
    form(source)
    files = hub_files(source, trained())
    assert files.keys() == {*companion_names(source), "config.json"}
    assert all(files[name] == (source / name).read_bytes() for name in companion_names(source))


def test_all_that_belongs_to_a_checkpoint_is_there_and_nothing_else(source):
    kept = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"}
    kept |= {"tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model", "merges.txt", "vocab.json"}
    kept |= {"LICENSE", "LICENSE.txt", "LICENCE.md", "license-llama.pdf", "Notice", "NOTICE.txt", "USE_POLICY.md"}
    kept |= {"COPYING", "additional_chat_templates/rag.jinja"}
    others = {"README.md", "modeling.py", "LICENSE.py", "notice.bin", "adapter_config.json", "optimizer.pt", "a.json"}
    others |= {"additional_chat_templates/x.py", "additional_chat_templates/.hidden.jinja", "original/tokenizer.model"}
    for folder in ("additional_chat_templates", "original"):
        (source / folder).mkdir()
    for name in (kept | others) - {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}:
        (source / name).write_text(name)
    edit(source / "special_tokens_map.json")
    files = hub_files(source, trained())
    assert files.keys() == kept | {"config.json"}
    assert all(files[name] == (source / name).read_bytes() for name in kept)


@pytest.mark.parametrize(
    ("said", "native", "longest", "length", "expected"),
    [
        (128, 128, 128, 64, 128),  # trained on shorter rows, which the model is not limited to
        (128, 128, 512, 512, 512),  # made longer
        (128, 128, 512, 256, 512),  # model.max_position_embeddings was set above the rows
        (128, 128, 64, 64, 64),  # and below the source's
        (64, 128, 128, 96, 96),  # a limit of its own, below the rows
        (64, 128, 128, 32, 64),
        (4096, 128, 512, 512, 4096),  # no limit of this model
        (128, None, 8192, 512, 8192),  # random weights with another model's tokenizer
        (int(1e30), 128, 512, 512, int(1e30)),  # transformers' word for none
        (1e30, 128, 512, 512, 1e30),
        (None, 128, 512, 512, None),
    ],
)
def test_the_longest_text_of_a_tokenizer_follows_the_model(source, tmp_path, said, native, longest, length, expected):
    if said is not None:
        edit(source / "tokenizer_config.json", model_max_length=said)
    before = (source / "tokenizer_config.json").read_bytes()
    files = hub_files(source, trained(native=native, longest=longest, length=length))
    assert json.loads(files["tokenizer_config.json"]).get("model_max_length") == expected
    assert (files["tokenizer_config.json"] == before) == (said == expected)
    loaded = AutoTokenizer.from_pretrained(written(files, tmp_path / "out"))
    assert loaded.model_max_length == (expected or int(1e30))


@pytest.mark.parametrize(
    ("config_eos", "generation", "ends", "config_after", "generation_after"),
    [
        (1, {"eos_token_id": 1}, (1,), 1, 1),
        (1, {"eos_token_id": 1}, (1, 9), [1, 9], [1, 9]),
        (1, {"eos_token_id": [1, 9], "top_p": 0.9}, (1, 9), [1, 9], [1, 9]),
        ([1, 5], {"eos_token_id": 5}, (9,), [1, 5, 9], [5, 9]),
        (1, {"top_p": 0.9}, (9,), [1, 9], [1, 9]),  # no end at all for generate()
        (1, {}, (1,), 1, 1),
        (None, {"eos_token_id": None}, (9,), 9, 9),
        (-1, {"eos_token_id": -1}, (9,), 9, 9),
        (1, None, (1, 9), [1, 9], None),
        (1, {"eos_token_id": 1}, (), 1, 1),
    ],
)
def test_the_ends_that_were_trained_are_among_those_of_generation(
    source, tmp_path, config_eos, generation, ends, config_after, generation_after
):
    config = {**CONFIG, "eos_token_id": config_eos}
    if generation is not None:
        edit(source / "generation_config.json", **generation)
    files = hub_files(source, trained(config=config, ends=ends))
    assert json.loads(files["config.json"]) == {**config, "eos_token_id": config_after}
    if generation is None:
        assert "generation_config.json" not in files
        return
    loaded = GenerationConfig.from_pretrained(written(files, tmp_path / "out"))
    assert loaded.eos_token_id == generation_after
    assert json.loads(files["generation_config.json"]) == {**generation, "eos_token_id": generation_after}
    if generation.get("eos_token_id") == generation_after:
        assert files["generation_config.json"] == (source / "generation_config.json").read_bytes()
