"""Pull and push over HTTP, against a hub on 127.0.0.1; nothing leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import socket

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file

from tests.conversion.conftest import save_model
from tests.conversion.test_commands import refused
from tests.harness.stub_hub import TOKEN, Repo, serve
from zoo.cli.main import main

NAME = "owner/name"


@pytest.fixture
def zoo(capsys):
    """Status, what was printed, and what was said."""

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def served():
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    """An empty hub that huggingface_hub takes for the real one, with a cache and a home of its own."""
    for found in (served.repos, served.asked, served.failing, served.cut, served.uploads, served.ranges):
        found.clear()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    asked, look_up = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **kw: asked.append(host) or look_up(host, *more, **kw)
    )
    huggingface_hub.close_session()
    disable_progress_bars()
    yield served
    enable_progress_bars()
    huggingface_hub.close_session()
    assert set(asked) <= {"127.0.0.1"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model", shard_size="40KB")


@pytest.fixture
def source(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "source")


@pytest.fixture
def published(hub, saved):
    """The checkpoint as a repository, among things that no import needs."""
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    extra = ["pytorch_model.bin", "modeling.py", "original/consolidated.pth", "consolidated.safetensors"]
    extra += ["README.md", "onnx/model.safetensors", "training_args.pt", "adapter_model.safetensors"]
    hub.repos[NAME] = Repo(files | dict.fromkeys(extra, b"not to be fetched"))
    return hub.repos[NAME]


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def fetched(hub) -> set[str]:
    return {line.split("/", 5)[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}


def test_pull_fetches_what_a_checkpoint_needs_and_nothing_else(zoo, hub, published, saved, tmp_path):
    status, out, err = zoo("import", NAME, tmp_path / "out")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n"), err
    assert fetched(hub) == {path.name for path in saved.iterdir()}
    weights = [load_file(file) for file in saved.glob("*.safetensors")]
    written = load_file(tmp_path / "out/model.safetensors")
    assert len(written) == 21
    assert all(torch.equal(tensor, written[name]) for shard in weights for name, tensor in shard.items())
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_is_in_the_cache_needs_no_network(zoo, hub, published, tmp_path, monkeypatch):
    assert zoo("import", NAME, tmp_path / "one")[0] == 0
    hub.asked.clear()
    assert zoo("import", NAME, tmp_path / "two")[0] == 0
    assert fetched(hub) == set()
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert zoo("import", NAME, tmp_path / "three")[0] == 0
    assert hub.asked == []
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()
    refused(zoo("import", "owner/other", tmp_path / "four"), "owner/other", "HF_HUB_OFFLINE is set", "hf download")


def test_a_snapshot_made_by_hand_needs_no_network(zoo, hub, saved, tmp_path, monkeypatch):
    """huggingface_hub's own layout: refs, snapshots of links, blobs."""
    repo, commit = tmp_path / "cache/models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(saved.iterdir()):
        shutil.copy(file, repo / f"blobs/{number}")
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{number}")
    (repo / "blobs/template").write_text("{{ messages }}")
    (repo / "snapshots" / commit / "additional_chat_templates").mkdir()
    (repo / "snapshots" / commit / "additional_chat_templates/x.jinja").symlink_to("../../../blobs/template")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert zoo("import", NAME, tmp_path / "out")[0] == 0
    assert zoo("import", f"{NAME}@{commit}", tmp_path / "again")[0] == 0
    assert (tmp_path / "again/additional_chat_templates/x.jinja").read_text() == "{{ messages }}"
    assert hub.asked == []


def test_a_download_that_broke_off_is_resumed(zoo, hub, published, tmp_path):
    name = sorted(n for n in published.files if n.endswith(".safetensors"))[2]
    hub.failing[f"(GET|HEAD) .*/resolve/.*/{name}$"] = 404
    refused(zoo("import", NAME, tmp_path / "out"), NAME)
    hub.failing.clear()
    done = fetched(hub) - {name}
    hub.asked.clear()
    assert zoo("import", NAME, tmp_path / "out")[0] == 0
    assert done
    assert not done & fetched(hub)
    assert name in fetched(hub)
    assert len(load_file(tmp_path / "out/model.safetensors")) == 21


def test_a_file_that_broke_off_goes_on_where_it_was(zoo, hub, published, tmp_path, monkeypatch):
    name = sorted(n for n in published.files if n.startswith("model-"))[1]
    hub.cut[name] = 9000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    assert zoo("import", NAME, tmp_path / "out")[0] == 0
    assert hub.ranges == ["bytes=9000-"]
    assert len(load_file(tmp_path / "out/model.safetensors")) == 21


def test_a_revision(zoo, hub, published, tmp_path):
    assert zoo("import", f"{NAME}@{'0' * 40}", tmp_path / "out")[0] == 0
    refused(zoo("import", f"{NAME}@nowhere", tmp_path / "two"), f"{NAME}@nowhere", "no such branch, tag or commit")


def test_what_the_hub_refuses_is_one_line(zoo, hub, published, tmp_path, monkeypatch):
    out = tmp_path / "out"
    refused(zoo("import", "owner/other", out), "owner/other", "no such repository", "hf auth login", "directory here")
    published.gated = True
    refused(zoo("import", NAME, out), NAME, "licence", "hf auth login")
    published.gated, published.private = False, True
    refused(zoo("import", NAME, out), NAME, "private", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong" + "x" * 20)
    result = zoo("import", NAME, out)
    refused(result, NAME, "401", "hf auth login")
    assert "hf_wrong" not in result[2]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert zoo("import", NAME, out)[0] == 0


def test_a_hub_that_is_not_there(zoo, hub, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    refused(zoo("import", NAME, tmp_path / "out"), NAME, "cannot be reached from here", "hf download")


def test_a_token_that_cannot_be_sent_is_not_shown(zoo, hub, published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x01secret")
    for words in (("import", NAME, tmp_path / "out"), ("export", tmp_path, tmp_path / "out", "--push", NAME)):
        status, out, err = zoo(*words)
        assert status in (0, 2, 5)
        assert "secret" not in out + err.replace(str(tmp_path), "")


def test_push_makes_a_repository(zoo, hub, token, source, tmp_path):
    out = tmp_path / "out"
    status, said, err = zoo("export", source, out, "--push", NAME, "--private", "--dtype", "bfloat16")
    assert status == 0, err
    assert said == f"{out}\n{hub.url}/{NAME}/commit/{'1'.rjust(40, '0')}\n"
    repo = hub.repos[NAME]
    assert repo.private
    assert {name: content for name, content in repo.files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in out.iterdir() if path.name != "zoo-checksums.txt"
    }
    assert TOKEN not in said + err
    assert sum("/commit/" in line for line in hub.asked) == 1


def test_what_was_pushed_can_be_pulled(zoo, hub, token, source, tmp_path):
    assert zoo("export", source, tmp_path / "out", "--push", NAME)[0] == 0
    assert not hub.repos[NAME].private
    assert zoo("import", NAME, tmp_path / "back")[0] == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_push_keeps_what_the_repository_has(zoo, hub, token, source, tmp_path):
    kept = {"README.md": b"card", "pytorch_model.bin": b"old", "sub/model.safetensors": b"other"}
    hub.repos[NAME] = Repo(kept | {"config.json": b"{}", "model.safetensors": b"old"})
    assert zoo("export", source, tmp_path / "out", "--push", NAME)[0] == 0
    files = hub.repos[NAME].files
    assert {name: files[name] for name in kept} == kept
    assert files["config.json"] == (tmp_path / "out/config.json").read_bytes()
    assert files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()


def failed_push(result, out, *words) -> None:
    """The export stays, and the line says how to push it."""
    status, said, err = result
    assert status == 5
    assert said == f"{out}\n"
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err
    assert TOKEN not in err
    assert f"hf upload {NAME} {out}" in err.splitlines()[-1]
    assert all(word in err.splitlines()[-1] for word in words), err
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert len(load_file(out / "model.safetensors")) == 21


@pytest.mark.parametrize(
    ("pattern", "status", "word"),
    [
        ("POST /api/repos/create", 403, "403"),
        ("POST /api/repos/create", 401, "401"),
        ("/preupload/", 403, "403"),
        ("PUT /lfs/", 403, "403"),
        ("POST .*/commit/", 500, "500"),
        ("POST .*/commit/", 412, "changed meanwhile"),
    ],
)
def test_a_push_that_fails_leaves_the_export_and_the_repository(
    zoo,
    hub,
    token,
    source,
    tmp_path,
    pattern,
    status,
    word,
):
    hub.failing[pattern] = status
    result = zoo("export", source, tmp_path / "out", "--push", NAME, "--private")
    failed_push(result, tmp_path / "out", word, "is whole", "--private")
    assert hub.repos.get(NAME, Repo()).files.keys() <= {".gitattributes"}


OWN = {
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "LICENSE": b"terms",
    "Notice.txt": b"notice",
    "sentencepiece.bpe.model": b"pieces",
    "vocab.txt": b"words",
}


def test_templates_with_a_name_licences_and_every_vocabulary_come_over_and_go_back(
    zoo, hub, published, token, tmp_path
):
    others = dict.fromkeys(["additional_chat_templates/deeper/x.jinja", "other/x.jinja", "LICENSE.py"], b"not fetched")
    published.files |= OWN | others
    assert zoo("import", NAME, tmp_path / "out")[0] == 0
    assert OWN.keys() <= fetched(hub)
    assert not others.keys() & fetched(hub)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in OWN.items())
    assert zoo("export", tmp_path / "out", tmp_path / "back", "--push", "owner/back")[0] == 0
    assert {name: hub.repos["owner/back"].files[name] for name in OWN} == OWN


@pytest.mark.parametrize(
    "name",
    ["additional_chat_templates/tool_use.jinja", "chat_template.json", "added_tokens.json", "adapter_config.json"],
)
def test_a_push_does_not_go_beside_what_loaders_prefer(zoo, hub, token, source, tmp_path, name):
    hub.repos[NAME] = Repo({name: b"{}", "LICENSE": b"terms"})
    result = zoo("export", source, tmp_path / "out", "--push", NAME)
    failed_push(result, tmp_path / "out", f"already has {name}", "delete it there first")
    assert hub.repos[NAME].files == {name: b"{}", "LICENSE": b"terms"}


def test_an_adapter_of_the_hub_is_named_as_one(zoo, hub, tmp_path):
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}).encode()
    hub.repos[NAME] = Repo({"adapter_config.json": config, "adapter_model.safetensors": b"not to be fetched"})
    refused(zoo("import", NAME, tmp_path / "out"), "is an adapter of owner/base", "merge_and_unload")
    assert fetched(hub) == {"adapter_config.json"}


def test_a_push_does_not_go_on_top_of_what_it_has_not_seen(zoo, hub, token, source, tmp_path, monkeypatch):
    create = HfApi.create_commit

    def after_another(api, repo, *operations, **more):
        hub.repos[repo].commits.append("f" * 40)
        return create(api, repo, *operations, **more)

    monkeypatch.setattr(HfApi, "create_commit", after_another)
    failed_push(zoo("export", source, tmp_path / "out", "--push", NAME), tmp_path / "out", "changed meanwhile")


def test_a_push_says_what_would_not_fit_together(zoo, hub, token, source, tmp_path):
    hub.repos[NAME] = Repo({"model.safetensors.index.json": b"{}"})
    failed_push(zoo("export", source, tmp_path / "a", "--push", NAME), tmp_path / "a", "model.safetensors.index.json")
    hub.repos[NAME] = Repo()
    failed_push(zoo("export", source, tmp_path / "b", "--push", NAME, "--private"), tmp_path / "b", "public")
    assert hub.repos[NAME].files == {}
    hub.repos[NAME] = Repo(ignored=("model.safetensors",))
    failed_push(
        zoo("export", source, tmp_path / "c", "--push", NAME), tmp_path / "c", "model.safetensors", ".gitignore"
    )


def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    zoo,
    hub,
    source,
    tmp_path,
    monkeypatch,
):
    out = tmp_path / "out"
    refused(zoo("export", source, out, "--push", NAME), "there is none", "hf auth login")
    refused(zoo("export", source, out, "--private"), "--push OWNER/NAME")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("name", "a/b/c", "../x", f"{NAME}@main", "a b/c"):
        refused(zoo("export", source, out, "--push", name), "owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(zoo("export", source, out, "--push", NAME), "HF_HUB_OFFLINE")
    assert hub.asked == []
    assert not os.path.exists(out)


def test_an_export_that_fails_is_not_pushed(zoo, hub, token, source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(zoo("export", source, tmp_path / "out", "--push", NAME), shard)
    assert hub.asked == []
