"""Plugins broken in every way: none stops a job that does not need it, and each is named when it is needed."""

import textwrap
from typing import NamedTuple

import pytest

from tests.harness.pooled_command import command
from tests.harness.small_runs import FIELDS, completions, llama
from zoo.cli.main import main

HEAD = """
import dataclasses, sys
from zoo import *
from zoo.core.errors import DataError, UsageError
"""


class Case(NamedTuple):
    """A plugin that breaks when it is named in a command."""

    name: str
    source: str
    words: str
    says: str
    """Part of the last line."""
    status: int = 4
    ranks: int = 1

    @property
    def module(self):
        return f"zoo_{self.name.replace('-', '_')}"


def offering(kind, name, rest, target=None, more=""):
    """A plugin that registers one entry, whose target is its own class, and what the rest of it says."""
    entry = {
        "attention": "AttentionEntry",
        "context_schemes": "ContextSchemeEntry",
        "parallel_adapters": "ParallelAdapterEntry",
        "memory_policies": "MemoryPolicyEntry",
        "models": "ModelEntry",
        "converters": "ConverterEntry",
        "data_formats": "DataFormatEntry",
        "trackers": "TrackerEntry",
        "commands": "CommandEntry",
    }[kind]
    place = repr(target) if target else "f'{__name__}:Mine'"
    hook = f"@hookimpl\ndef zoo_register_{kind}(): return [{entry}(name={name!r}, target={place}{more})]\n"
    return hook + textwrap.dedent(rest)


def kernel(name, **methods):
    """An attention backend that fails where a method says so."""
    body = {"supports": "return None", "forward": "return self.inner.forward(*a, **k)"} | methods
    body = {"backward": "return self.inner.backward(*a, **k)"} | body
    lines = [f"    def {method}(self, *a, **k): {code}" for method, code in body.items() if method != "__init__"]
    start = f"        {methods.get('__init__', '')}\n        from zoo.plugins.attention.sdpa import Sdpa as Inner"
    rest = f"class Mine:\n    name = {name!r}\n    def __init__(self):\n{start}\n        self.inner = Inner()\n"
    return offering("attention", name, rest + "\n".join(lines))


def scheme(name, method, code="raise ValueError('boo')"):
    """Allgather, but for one method."""
    rest = f"""
    def __getattr__(attribute):
        if attribute != "Mine": raise AttributeError(attribute)
        from zoo.plugins.context.allgather import Allgather
        class Mine(Allgather):
            name = {name!r}
            def {method}(self, *a, **k): {code}
        return Mine
    """
    return offering("context_schemes", name, rest)


def adapter(name, method, code="raise ValueError('boo')"):
    """An adapter of data parallelism that applies on one rank too."""
    bodies = {"check": "return None", "applies": "return True", "apply": "return a[0]", "shard_batch": "return a[0]"}
    lines = [f"    def {m}(self, *a, **k): {c}" for m, c in (bodies | {method: code}).items()]
    rest = (
        f"class Mine(ParallelAdapter):\n    name = {name!r}\n    axes = ('dp_shard',)\n    phase = Phase.WRAP\n"
        + "\n".join(lines)
    )
    return offering("parallel_adapters", name, rest, more=", axes=('dp_shard',)")


def policy(name, method):
    """A memory policy that keeps everything."""
    bodies = {"apply": "return a[0]", "saved_bytes": "return 1 << 50"} | {method: "raise ValueError('boo')"}
    lines = [f"    def {m}(self, *a, **k): {c}" for m, c in bodies.items()]
    return offering("memory_policies", name, f"class Mine:\n    name = {name!r}\n" + "\n".join(lines))


def model(name, change):
    """The llama family, but for one thing."""
    rest = f"""
    def __getattr__(attribute):
        if attribute != "Mine": raise AttributeError(attribute)
        from zoo.models.llama3.model import SPEC
        def build(config):
            built = SPEC.build(config)
            forward = built.forward
            def failing(*a, labels=None, **k):
                raise ValueError("boo")
            built.forward = failing
            return built
        def boo(*a): raise ValueError("boo")
        return dataclasses.replace(SPEC, name={name!r}, {change})
    """
    fields = f", model_type='llama', sizes={{'tiny': {FIELDS!r}}}, default_size='tiny', embedded={{'tiny': 'MODEL'}}"
    return offering("models", name, rest, more=fields)


def tracker(method):
    """A tracker that writes to stdout, and fails in one method."""
    bodies = {"__init__": "pass", "log": "print('out of place')", "close": "pass"} | {method: "sys.exit('boo')"}
    return "class Mine:\n" + "\n".join(f"    def {m}(self, *a): {c}" for m, c in bodies.items())


ATTN = "finetune --attn {name}"
CASES = [
    # At import and at registration.
    Case("import", "import no_such_kernel", ATTN, "import (zoo-import 1.0), which is broken: ModuleNotFoundError"),
    Case("exits", "sys.exit('no licence')", ATTN, "which is broken: SystemExit: no licence"),
    Case("circle", "import zoo_circle\nzoo_circle.later", ATTN, "which is broken: AttributeError"),
    Case("syntax", "def (:", ATTN, "which is broken: SyntaxError"),
    Case("hook", "@hookimpl\ndef zoo_register_model(): pass", ATTN, "unknown hook 'zoo_register_model'"),
    Case("argument", "@hookimpl\ndef zoo_step_end(model): pass", ATTN, "unknown argument 'model'"),
    Case("raises", "@hookimpl\ndef zoo_register_attention(): raise ValueError('boo')", ATTN, "ValueError: boo"),
    Case("garbage", "@hookimpl\ndef zoo_register_attention(): return [3]", ATTN, "an object of type int"),
    Case("old", "ZOO_PLUGIN_API = 0", ATTN, "which is skipped: needs plugin API 0"),
    # Targets.
    Case("module", offering("attention", "module", "", "nowhere:Kernel"), ATTN, "nowhere:Kernel: ModuleNotFoundError"),
    Case("attribute", offering("attention", "attribute", ""), ATTN, "zoo_attribute:Mine: AttributeError"),
    Case(
        "library",
        offering(
            "attention",
            "library",
            "def __getattr__(n):\n    if n != 'Mine': raise AttributeError\n"
            "    __import__('ctypes').CDLL('libnone.so')",
        ),
        ATTN,
        "cannot be imported: zoo_library:Mine: OSError: libnone.so",
    ),
    Case(
        "quits",
        offering(
            "attention", "quits", "def __getattr__(n):\n    if n == 'Mine': sys.exit(3)\n    raise AttributeError"
        ),
        ATTN,
        "SystemExit: 3",
    ),
    Case("number", offering("attention", "number", "Mine = 3"), ATTN, "the target is a int and no class"),
    Case(
        "licence",
        offering(
            "attention",
            "licence",
            "def __getattr__(n):\n    if n == 'Mine': raise DataError('no licence')\n    raise AttributeError",
        ),
        ATTN,
        "no licence (says plugin licence (zoo-licence 1.0))",
        5,
    ),
    Case("wants", offering("attention", "wants", "class Mine:\n    def __init__(self, x): pass"), ATTN, "constructed"),
    Case("refuses", kernel("refuses", __init__="raise OSError('no device')"), ATTN, "OSError: no device"),
    Case("hollow", offering("attention", "hollow", "class Mine: name = 'hollow'"), ATTN, "it has no supports, forward"),
    Case(
        "no-model",
        offering("models", "no-model", "", "nowhere:SPEC", ", model_type='x', sizes={'a': {}}, default_size='a'"),
        "plan:no-model",
        "nowhere:SPEC",
    ),
    Case("no-policy", offering("memory_policies", "no-policy", ""), "plan --memory {name}", "zoo_no_policy:Mine"),
    Case(
        "no-scheme",
        offering("context_schemes", "no-scheme", ""),
        "plan --cp 2 --cp-scheme {name}",
        "cannot be imported",
    ),
    Case(
        "no-adapter",
        offering("parallel_adapters", "no-adapter", "", more=", axes=('dp_shard',)"),
        "plan --data-parallel {name}",
        "parallel adapter 'no-adapter' of plugin no-adapter (zoo-no-adapter 1.0) cannot be imported",
    ),
    Case("no-format", offering("data_formats", "no-format", ""), "plan --data-format {name}", "cannot be imported"),
    Case("no-tracker", offering("trackers", "no-tracker", ""), "plan --track {name}", "cannot be imported"),
    Case("no-command", offering("commands", "no-command", ""), "no-command", "cannot be imported"),
    Case("no-form", offering("converters", "no-form", ""), "export MODEL OUT --to {name}", "cannot be imported"),
    # Methods.
    Case("supports", kernel("supports", supports="raise ValueError('boo')"), ATTN, "failed in Mine.supports ("),
    Case("forward", kernel("forward", forward="raise ValueError('boo')"), ATTN, "failed in Mine.forward ("),
    Case("backward", kernel("backward", backward="raise ValueError('boo')"), ATTN, "failed in Mine.backward ("),
    Case("leaves", kernel("leaves", forward="sys.exit(0)"), ATTN, "SystemExit: 0. Go without it: another --attn ("),
    Case("blames", kernel("blames", forward="raise DataError('dry')"), ATTN, "dry (says plugin blames (zoo-blames", 5),
    Case("applies", adapter("applies", "applies"), "plan --data-parallel {name}", "failed in Mine.applies ("),
    Case("checks", adapter("checks", "check"), "plan --data-parallel {name}", "failed in Mine.check ("),
    Case("apply", adapter("apply", "apply"), "finetune --data-parallel {name}", "failed in Mine.apply ("),
    Case("shard", adapter("shard", "shard_batch"), "finetune --data-parallel {name}", "failed in Mine.shard_batch ("),
    Case("thrift", policy("thrift", "apply"), "finetune --memory {name}", "failed in Mine.apply ("),
    Case("parses", model("parses", "parse=boo"), "plan:parses --from scratch", "boo (zoo_parses.py"),
    Case("builds", model("builds", "build=boo"), "plan:builds --from scratch", "boo (zoo_builds.py"),
    Case("runs", model("runs", "build=build"), "finetune:runs --from scratch", "failing (zoo_runs.py"),
    Case("plans", scheme("plans", "check"), "plan --cp 2 --cp-scheme {name}", "Mine.check (zoo_plans.py"),
    Case(
        "format",
        offering("data_formats", "format", "def Mine(record, tokenizer, *, loss_on): raise ValueError('boo')"),
        "finetune --data-format {name}",
        "data format format of plugin format (zoo-format 1.0) failed on it: ValueError: boo",
        5,
    ),
    Case(
        "command",
        offering("commands", "command", "import click\n@click.command()\ndef Mine(): raise ValueError('boo')"),
        "command",
        "failed in Mine (zoo_command.py",
    ),
    Case(
        "form",
        offering(
            "converters",
            "form",
            "class C:\n    name = 'form'\n    open = None\n    def locate(self, s): return None\n"
            "    def export(self, *a, **k): raise ValueError('boo')\nMine = C()",
        ),
        "export MODEL OUT --to {name}",
        "failed in C.export (zoo_form.py",
    ),
    Case(
        "rope",
        "@hookimpl\ndef zoo_rope_for_length(model): raise ValueError('boo')",
        "plan --seq 256",
        "failed in zoo_rope_for_length: ValueError: boo. Go without it: --no-plugin rope",
    ),
    # Real ranks.
    Case("moves", scheme("moves", "forward"), "finetune --cp 2 --cp-scheme {name}", "Mine.forward (moves.py", 4, 2),
    Case("far", kernel("far", backward="raise ValueError('boo')"), "finetune --cp 2 --attn far", "on rank ", 4, 2),
]
CHOSEN = [case for case in CASES if case.name in ("supports", "refuses", "library", "no-scheme", "plans", "no-policy")]
"""Those that a choice among all comes across, and passes over."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return llama(folder), completions(folder / "data.jsonl")


@pytest.fixture
def install(distributions, files):
    def add(*cases):
        for case in cases:
            distributions.add(f"zoo-{case.name}", HEAD + case.source.replace("MODEL", str(files[0])))

    return add


def words_of(case, files, out):
    """The command of a case; a job of two steps."""
    first, *rest = case.words.format(name=case.name).split()
    verb, _, family = first.partition(":")
    rest = [str(files[0]) if word == "MODEL" else str(out) if word == "OUT" else word for word in rest]
    if verb not in ("plan", "finetune"):
        return [verb, *rest]
    given = ["--data", files[1], *(() if "--seq" in rest else ("--seq", 64)), "--steps", 1]
    given += ["--global-batch", 2] if verb == "plan" else ["--global-batch", 2, "--out", out]
    given += [] if family else ["--from", files[0]]
    return [str(word) for word in [verb, family or "llama3", "--set", "log.peak_tflops=1", *given, *rest]]


@pytest.mark.parametrize("case", [c for c in CASES if c.ranks == 1], ids=lambda case: case.name)
def test_a_broken_plugin_is_named_when_it_is_needed(install, files, tmp_path, capsys, case):
    install(case)
    status = main(words_of(case, files, tmp_path / "out"))
    said = capsys.readouterr().err.splitlines()
    assert (status, case.says in said[-1]) == (case.status, True), said
    assert f"{case.name} (zoo-{case.name} 1.0)" in said[-1]
    assert not [line for line in said if "Traceback" in line]


@pytest.mark.dist
@pytest.mark.parametrize("case", [c for c in CASES if c.ranks > 1], ids=lambda case: case.name)
def test_a_plugin_that_fails_on_a_rank_is_named_by_the_launcher(files, tmp_path, capfd, case):
    # A file: ranks that wait for work do not see what was installed since.
    file = tmp_path / f"{case.name}.py"
    file.write_text(HEAD + case.source)
    command(*words_of(case, files, tmp_path / "out"), "--plugin", file, status=case.status)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"Error: plugin {case.name} ({file}) failed in Mine.")
    assert case.says in last
    assert " on rank " in last
    assert "ValueError: boo. Go without it: another --" in last


def test_no_broken_plugin_stops_what_does_not_need_it(install, files, tmp_path, capsys):
    """All of them at once, in a job that leaves every choice to zoo, and in every command."""
    install(*CASES)
    job = ["--from", files[0], "--data", files[1], "--seq", "64", "--global-batch", "4", "--set", "log.peak_tflops=1"]
    for words in (
        ["--help"],
        ["models"],
        ["plugins"],
        ["plugins", "info", "library"],
        ["doctor"],
        ["data", "check", files[1], "--from", files[0]],
        ["bench", "attention", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--seq", "256", "--cp", "2"],
        ["finetune", "llama3", *job, "--steps", "1", "--out", tmp_path / "run"],
        ["export", tmp_path / "run"],
        ["plan", "llama3", *job, "--cp", "2"],
        ["plan", "llama3", *job, "--layout", "auto"],
    ):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert status == 0, (words, captured.err[-2000:])
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_choice_says_what_it_passes_over(install, files, tmp_path, capsys):
    install(*CHOSEN)
    words = ["--from", files[0], "--data", files[1], "--seq", "64", "--global-batch", "2", "--cp", "2"]
    assert main(["plan", "llama3", *map(str, words)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    for case in CHOSEN:
        assert f"'{case.name}' of plugin {case.name} (zoo-{case.name} 1.0) " in line
    assert "failed when it was asked: ValueError: boo" in line


@pytest.mark.parametrize(("method", "says"), [("__init__", "its construction"), ("log", "log"), ("close", "close")])
def test_a_tracker_cannot_stop_a_run(install, files, tmp_path, capsys, method, says):
    install(Case("csv", offering("trackers", "csv", tracker(method)), "", ""))
    words = words_of(Case("csv", "", "finetune --track csv", ""), files, tmp_path / "out")
    assert main([*words, "--steps", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    (line,) = [line for line in captured.err.splitlines() if line.startswith("warning: tracker")]
    assert f"tracker 'csv' of plugin csv (zoo-csv 1.0) failed in {says} and is disabled" in line
    assert line.endswith("SystemExit: boo. Go without it: leave out --track csv")
    assert (tmp_path / "out" / "checkpoints" / "step-2").is_dir()


def test_a_failure_of_a_builtin_is_no_plugins(files, tmp_path, capsys, monkeypatch):
    from zoo.plugins.attention.dense import Dense

    def forward(self, *arguments, **named):
        raise ValueError("boo")

    monkeypatch.setattr(Dense, "forward", forward)
    case = Case("dense", "", "finetune --attn dense", "")
    assert main(words_of(case, files, tmp_path / "out")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ValueError: boo. This is a fault of zoo")
