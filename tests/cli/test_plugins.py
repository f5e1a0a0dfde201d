"""`zoo plugins` and `zoo plugins info`: every state is shown with its reason and what to do about it."""

import json

import pytest

from zoo.cli.main import main

HEAD = "from zoo import *\n"
GOOD = (
    HEAD
    + "ZOO_PLUGIN_API = 1\n@hookimpl\ndef zoo_register_attention():"
    + " return [AttentionEntry(name='warp', target='warp:Kernel', help='Fast.')]\n"
)


@pytest.fixture
def installed(distributions):
    distributions.add("zoo-good", GOOD, version="0.2.1")
    distributions.module("warp", "class Kernel:\n    name = 'warp'\n    supports = forward = backward = None\n")
    distributions.add("zoo-mamba", HEAD + "def deep():\n    import causal_conv1d\ndeep()")
    distributions.add("zoo-old", "ZOO_PLUGIN_API = 0")
    distributions.add("zoo-qwen", GOOD.replace("warp", "qwen"))
    distributions.add("zoo-watch", HEAD + "@hookimpl\ndef zoo_step_end(step): pass")


def test_the_table_shows_every_state(installed, capsys):
    assert main(["--no-plugin", "qwen", "plugins"]) == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert rows["NAME"] == "VERSION API STATUS PROVIDES FROM"
    assert rows["good"] == "0.2.1 1 ok attention:warp zoo-good"
    assert rows["mamba"] == (
        "1.0 - broken ModuleNotFoundError: No module named 'causal_conv1d' zoo-mamba -> zoo plugins info mamba"
    )
    assert rows["old"].startswith("1.0 0 skipped needs plugin API 0, this zoo has 1")
    assert rows["qwen"] == "1.0 - blocked blocked by --no-plugin qwen zoo-qwen"
    assert rows["watch"] == "1.0 - ok step_end zoo-watch"
    assert rows["dense"].endswith("ok attention:dense zoo")


def test_the_table_is_all_that_is_said(installed, capsys):
    main(["plugins"])
    assert capsys.readouterr().err == ""


def test_json_says_the_same(installed, capsys):
    main(["--no-plugin", "qwen", "plugins", "--json"])
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["plugins"]}
    assert found["good"]["provides"] == [
        {"kind": "attention", "name": "warp", "target": "warp:Kernel", "help": "Fast."}
    ]
    assert [found[name]["status"] for name in ("good", "mamba", "old", "qwen")] == [
        "ok",
        "broken",
        "skipped",
        "blocked",
    ]
    assert "in deep" in found["mamba"]["traceback"]


def test_a_clash_is_told_below_the_table_and_in_json(distributions, capsys):
    distributions.add("zoo-one", GOOD)
    distributions.add("zoo-two", GOOD)
    main(["plugins"])
    assert "'warp' is given by one (zoo-one 1.0) and two (zoo-two 1.0)" in capsys.readouterr().out
    main(["plugins", "--json"])
    (clash,) = json.loads(capsys.readouterr().out)["clashes"]
    assert (clash["kind"], clash["name"]) == ("attention", "warp")
    main(["plugins", "info", "two"])
    assert "clash     attention backend 'warp'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["good", "zoo-good", "ZOO_good"])
def test_info_says_everything_about_a_good_one(installed, capsys, name):
    assert main(["plugins", "info", name]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "good: ok",
        "from      zoo-good 0.2.1",
        "module    zoo_good",
        "api       1",
        "hook      zoo_register_attention",
        "provides  attention:warp = warp:Kernel  Fast.",
    ]


def test_info_gives_the_traceback_of_a_broken_one_and_a_way_out(installed, capsys):
    main(["plugins", "info", "mamba"])
    out = capsys.readouterr().out
    assert out.startswith("mamba: broken, ModuleNotFoundError: No module named 'causal_conv1d'\n")
    assert "in deep" in out
    assert "next      go without it: zoo --no-plugin mamba ..." in out


def test_info_on_a_skipped_one_says_how_to_upgrade(installed, capsys):
    main(["plugins", "info", "old"])
    assert "next      pip install --upgrade zoo-old" in capsys.readouterr().out


def test_info_on_a_blocked_one(installed, capsys):
    main(["plugins", "info", "qwen", "--no-plugin", "qwen"])
    assert "qwen: blocked, blocked by --no-plugin qwen" in capsys.readouterr().out


def test_info_on_nobody_is_a_usage_error_with_the_nearest(installed, capsys):
    assert main(["plugins", "info", "mambo"]) == 2
    assert "no plugin 'mambo': did you mean 'mamba'" in capsys.readouterr().err


def test_info_as_json(installed, capsys):
    main(["plugins", "info", "good", "--json"])
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["module"] == "zoo_good"


def test_a_plugin_that_imports_torch_when_loaded_is_told_so(distributions, capsys, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    distributions.module("torch", "")
    distributions.add("zoo-heavy", "import torch\n" + GOOD)
    main(["plugins", "info", "heavy"])
    assert "slow      it imports torch when loaded" in capsys.readouterr().out


def test_a_plugin_whose_target_cannot_be_imported_is_broken(distributions, capsys):
    distributions.add("zoo-lame", GOOD.replace("warp:Kernel", "no_such_module:Kernel"))
    why = "attention backend 'warp' cannot be imported: no_such_module:Kernel: ModuleNotFoundError"
    assert main(["plugins"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lame")]
    assert " broken " in row
    assert why in row
    assert main(["plugins", "info", "lame"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"lame: broken, {why}")
    assert "Traceback" in said
    assert "next      go without it: zoo --no-plugin lame ..." in said
    assert main(["doctor"]) in (0, 1)
    assert f"lame (zoo-lame 1.0) is broken: {why}" in capsys.readouterr().out
