"""A run on chats, exported: transformers loads it, renders as it was trained, and stops where its turns end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
import zoo.models.llama3
from zoo.cli.main import main
from zoo.core import api
from zoo.core.registry.loading import Plugins
from zoo.core.storage.checksums import NAME as CHECKSUMS

TINY = Path(zoo.models.llama3.__file__).parent / "tiny"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}<|end_header_id|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|eom_id|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT<|end_header_id|>{% endif %}"
)
CHAT = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four"}]
END = "<|eom_id|>"
LICENCES = {"LICENSE": "terms\r\n", "Notice.txt": "notice", "USE_POLICY.md": "policy"}


def zoo_(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that knows no turns: it stops at the end of a text only, and has a template of another kind."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2033, "repetition_penalty": 1.0}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("other")
    for name, text in LICENCES.items():
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture(scope="module")
def run(base):
    """A run of it on one conversation, until that is known by heart."""
    data, template, out = base.parent / "chat.jsonl", base.parent / "mine.jinja", base.parent / "run"
    data.write_text(json.dumps({"messages": CHAT}) + "\n")
    template.write_text(TEMPLATE)
    how = ("--data", data, "--seq", "64", "--chat-template", template, "--lr", "1e-2", "--steps", "9")
    zoo_("finetune", "llama3", "--from", base, *how, "--out", out)
    zoo_("export", out)
    return out


def rendered(folder, **more):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT[:1], tokenize=False, **more)


def test_generation_stops_at_the_end_of_the_turn_that_was_trained(run):
    tokenizer, model = AutoTokenizer.from_pretrained(run / "hf"), AutoModelForCausalLM.from_pretrained(run / "hf")
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == f"Four{END}"
    end = tokenizer.convert_tokens_to_ids(END)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2033, end]
    without = model.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=2033)
    assert without.shape[1] == prompt["input_ids"].shape[1] + 20, "the base's own end does not stop it"


@pytest.mark.parametrize("where", ["checkpoints/step-9/hub", "hf"])
def test_the_template_that_was_given_is_published(run, where):
    assert (run / where / "chat_template.jinja").read_text() == TEMPLATE
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        assert rendered(run / where, tools=tools) == f"<|begin_of_text|>USER<|end_header_id|>{CHAT[0]['content']}\n"


@pytest.mark.parametrize("where", ["checkpoints/step-9/hub", "hf"])
def test_licences_and_tokenizer_are_published_byte_for_byte(run, base, where):
    files = (*LICENCES, "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
    assert all((run / where / name).read_bytes() == (base / name).read_bytes() for name in files)
    found = {path.name for path in (run / where).iterdir()} - {"model.safetensors", CHECKSUMS}
    assert found == {*files, "config.json", "generation_config.json", "chat_template.jinja"}
    assert json.loads((run / where / "generation_config.json").read_text())["repetition_penalty"] == 1.0


def test_what_was_published_goes_on_through_an_import_another_run_and_its_config(run, tmp_path):
    zoo_("import", run / "hf", tmp_path / "again")
    zoo_("import", "--verify", run / "hf", tmp_path / "again")
    data = ("--data", run.parent / "chat.jsonl", "--seq", "64", "--steps", "1")
    zoo_("finetune", "llama3", "--from", tmp_path / "again", *data, "--out", tmp_path / "next")
    zoo_("finetune", "-c", run / "config.yaml", "--steps", "1", "--out", tmp_path / "same")
    zoo_("finetune", "-c", run / "config.yaml", "--steps", "2", "--out", tmp_path / "same")
    for where in ("again", "next/checkpoints/step-1/hub", "same/checkpoints/step-2/hub"):
        for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "LICENSE"):
            assert (tmp_path / where / name).read_bytes() == (run / "hf" / name).read_bytes(), (where, name)
        config = json.loads((tmp_path / where / "config.json").read_text())
        assert config["eos_token_id"] == [2033, 2038]


def test_zoo_loads_what_transformers_loads(run):
    tokens = torch.arange(50)[None]
    theirs = AutoModelForCausalLM.from_pretrained(run / "hf")
    with torch.no_grad():
        for source in (run, run / "hf"):
            torch.testing.assert_close(zoo.load(source)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_the_start_of_a_run_says_where_its_model_will_stop(base, tmp_path, capsys):
    data = ("--from", base, "--data", __file__, "--seq", "64", "--out", tmp_path / "run")
    zoo_("plan", "llama3", *data)
    assert "stops     at '<|eot_id|>' (2037) too, which ends a turn; the model it comes from stops at 2033" in (
        capsys.readouterr().out
    )
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    zoo_("plan", "llama3", *data, "--chat-template", tmp_path / "endless.jinja", "--json")
    said = json.loads(capsys.readouterr().out)["notes"]["stops"]
    assert said.startswith("warning: at no token after a turn")
    zoo_("plan", "llama3", "--seq", "64", "--out", tmp_path / "run")
    assert "stops" not in capsys.readouterr().out, "the embedded one stops at its own turns already"


def test_longer_rows_make_the_tokenizers_limit_longer(base, tmp_path):
    flags = {"from_": str(base), "data": __file__, "seq": "4k", "out": str(tmp_path / "run")}
    files = api.ready(Plugins.load(), "llama3", flags).hub_files
    limit = json.loads(files["tokenizer_config.json"])["model_max_length"]
    assert limit == json.loads(files["config.json"])["max_position_embeddings"] == 4096


def test_a_source_that_goes_away_during_a_run_costs_no_save(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    plugin = tmp_path / "remove.py"
    plugin.write_text(
        "import shutil\nfrom zoo.core.registry.hookspecs import hookimpl\nZOO_PLUGIN_API = 1\n"
        f"@hookimpl\ndef zoo_run_start(run):\n    shutil.rmtree({str(source)!r})\n"
    )
    how = ("--from", source, "--data", __file__, "--seq", "64", "--steps", "1", "--out", tmp_path / "run")
    zoo_("--plugin", plugin, "finetune", "llama3", *how)
    assert not source.exists()
    saved = tmp_path / "run/checkpoints/step-1/hub"
    assert all((saved / name).read_bytes() == (base / name).read_bytes() for name in (*LICENCES, "tokenizer.json"))
