"""What a plugin returns is looked at in the commands that receive it: `zoo plan` before a rank starts, or the run."""

import pytest

from zoo.cli.main import main

HEAD = "from zoo import *\n"

FAMILY = """
from zoo.models.llama3.sizes import EMBEDDED, SIZES

@hookimpl
def zoo_register_models():
    entry = ModelEntry(name="odd", target="odd_parts:SPEC", model_type="llama", sizes=SIZES, default_size="tiny",
                       embedded=EMBEDDED)
    return [entry]

@hookimpl
def zoo_match_checkpoint(config):
    return "odd"
"""

PARTS = """
from dataclasses import replace
import torch
from zoo import Mask
from zoo import *
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.plugins.attention.dense import Dense
from zoo.plugins.context.ring import Ring
from zoo.plugins.memory.policies import KeepAll
PLAN, WIDE = LLAMA.plan(None), torch.float32
"""


def entry(kind, type_, name="mine", more=""):
    return f"@hookimpl\ndef zoo_register_{kind}(): return [{type_}(name='{name}', target='odd_parts:Mine'{more})]\n"


ATTENTION = entry("attention", "AttentionEntry")
SCHEME = entry("context_schemes", "ContextSchemeEntry")
ADAPTER = entry("parallel_adapters", "ParallelAdapterEntry", more=", axes=('dp_shard',)")
POLICY = entry("memory_policies", "MemoryPolicyEntry")
FORMAT = entry("data_formats", "DataFormatEntry")
TRACKER = entry("trackers", "TrackerEntry")
CONVERTER = entry("converters", "ConverterEntry")


def spec(**said):
    changes = ", ".join(f"{name}={answer}" for name, answer in said.items())
    return f"SPEC = replace(LLAMA, name='odd', {changes})\n"


def hook(line):
    return f"@hookimpl\ndef {line}\n"


def adapter(line):
    return (
        f"class Mine(ParallelAdapter):\n    name, axes, phase = 'mine', ('dp_shard',), Phase.WRAP\n{USUAL}    {line}\n"
    )


USUAL = "    def applies(self, layout): return True\n"

PLANNED = {
    "a field of RoPE": (
        (hook("zoo_rope_for_length(): return {'rope_thetas': 5e5}"), "", "--seq 2048"),
        ("odd (zoo-odd 1.0)", "zoo_rope_for_length", "'rope_thetas'", "did you mean 'rope_theta'"),
    ),
    "a value of RoPE": (
        (hook("zoo_rope_for_length(): return {'rope_theta': 'much'}"), "", "--seq 2048"),
        ("odd (zoo-odd 1.0)", "zoo_rope_for_length", "much"),
    ),
    "a corpus": ((hook("zoo_open_data(uri): return uri"), "", ""), ("odd (zoo-odd 1.0)", "zoo_open_data", "shards")),
    "a seam": (
        (FAMILY, spec(plan="lambda c: replace(PLAN, seams={**PLAN.seams, 'mpl': 'loss'})"), ""),
        ("model 'odd'", "plan", "'mpl'", "did you mean 'mlp'"),
    ),
    "a style": (
        (FAMILY, spec(plan="lambda c: replace(PLAN, tensor={'lm_head': 'vocabulary'})"), ""),
        ("model 'odd'", "plan", "'vocabulary'", "'vocab'"),
    ),
    "windows": ((FAMILY, spec(windows="lambda c: [None]"), ""), ("model 'odd'", "windows", "1 entries")),
    "fields": ((FAMILY, spec(hub_config="lambda c: None"), ""), ("model 'odd'", "hub_config", "None")),
    "a config": ((FAMILY, spec(parse="lambda fields: None"), ""), ("model 'odd'", "parse", "vocab_size")),
    "a model": ((FAMILY, spec(build="lambda c: None"), ""), ("model 'odd'", "build", "an nn.Module")),
    "rules": ((FAMILY, spec(rules="lambda c: None"), ""), ("model 'odd'", "rules", "None")),
    "whether a kernel can": (
        (ATTENTION, "class Mine(Dense):\n    name = 'mine'\n    def supports(self, problem): return True\n", ""),
        ("attention backend 'mine'", "supports", "True", "None if it can"),
    ),
    "the name of a kernel": (
        (ATTENTION, "Mine = Dense\n", "--attn mine"),
        ("attention backend 'mine'", "its name is 'dense'"),
    ),
    "whether a scheme can": (
        (SCHEME, "class Mine(Ring):\n    name = 'mine'\n    def check(self, *_): return False\n", "--cp 2"),
        ("context scheme 'mine'", "check", "False"),
    ),
    "a plan that sees keys of another mask": (
        (
            SCHEME,
            "class Mine(Ring):\n    name = 'mine'\n    def plan(self, mask, *rest):\n"
            "        return super().plan(Mask(mask.length, ((0, 16), (16, mask.length))), *rest)\n",
            "--cp 2 --cp-scheme mine",
        ),
        ("context scheme 'mine'", "plan", "every visible pair once"),
    ),
    "bytes": (
        (POLICY, "class Mine(KeepAll):\n    name = 'mine'\n    def saved_bytes(self, *_): return -1\n", ""),
        ("memory policy 'mine'", "saved_bytes", "-1"),
    ),
    "whether an adapter applies": (
        (ADAPTER, adapter("def applies(self, layout): pass"), "--data-parallel mine"),
        ("parallel adapter 'mine'", "applies", "None"),
    ),
    "why an adapter cannot": (
        (ADAPTER, adapter("def check(self, layout): return False"), "--data-parallel mine"),
        ("parallel adapter 'mine'", "check", "False"),
    ),
    "what stays whole": (
        (ADAPTER, adapter("def whole(self, layout): return ['moments']"), "--data-parallel mine"),
        ("parallel adapter 'mine'", "whole", "moments"),
    ),
    "where a checkpoint is": (
        (
            CONVERTER,
            "class Form:\n    name = 'mine'\n    open = export = None\n    def locate(self, source): return source\n"
            "    def open(self, path): pass\n    def export(self, *_, **__): pass\nMine = Form()\n",
            "--from nowhere",
        ),
        ("checkpoint format 'mine'", "locate", "'nowhere'", "a Path"),
    ),
    "a token": (
        (
            FORMAT,
            "def Mine(record, tokenizer, *, loss_on): return Sample([1, 70000], [True, True])\n",
            "--data-format mine",
        ),
        ("data format 'mine'", "token id 70000", "a.jsonl:1", "0 to"),
    ),
}

TRAINED = {
    "a kernel's lse": (
        (
            ATTENTION,
            "class Mine(Dense):\n    name = 'mine'\n    def rectangle_forward(self, *x, **how):\n"
            "        out, lse = super().rectangle_forward(*x, **how)\n        return out, lse.bfloat16()\n",
            "--attn mine",
        ),
        ("attention backend 'mine'", "rectangle_forward", "lse bfloat16", "float32 or wider"),
    ),
    "a changed model": (
        (ADAPTER, adapter("def apply(self, *_): pass"), "--data-parallel mine"),
        ("parallel adapter 'mine'", "apply", "None", "the model"),
    ),
    "a policy's model": (
        (POLICY, "class Mine(KeepAll):\n    name = 'mine'\n    def apply(self, *_): pass\n", "--memory mine"),
        ("memory policy 'mine'", "apply", "None", "the model"),
    ),
    "a batch": (
        (ADAPTER, adapter("def shard_batch(self, *_): pass"), "--data-parallel mine"),
        ("parallel adapter 'mine'", "shard_batch", "None", "a Batch"),
    ),
    "a loss": (
        (
            FAMILY,
            "def build(config):\n    model = LLAMA.build(config)\n"
            "    model.loss.register_forward_hook(lambda *x: x[2][None])\n    return model\n" + spec(build="build"),
            "",
        ),
        ("model 'odd'", "forward with labels", "[1]", "0-dim"),
    ),
}


@pytest.fixture
def said(distributions, tmp_path, monkeypatch, capsys):
    """A function from a plugin, its parts, and words of a command to the line that the command ends with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "some words to learn from"}\n' * 4)

    def run(command, plugin, parts, words):
        distributions.add("zoo-odd", HEAD + plugin)
        distributions.module("odd_parts", PARTS + parts)
        model = "odd" if plugin == FAMILY else "llama3"
        usual = ["--data", "a.jsonl", *(["--seq", "64"] if "--seq" not in words else [])]
        status = main([command, model, *usual, *words.split()])
        error = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith(("Error:", "warning: tracker"))
        ]
        return status, error

    return run


@pytest.mark.parametrize(("command", "case"), [("plan", PLANNED[name]) for name in PLANNED], ids=list(PLANNED))
def test_a_wrong_answer_ends_the_plan_of_one_rank(said, command, case):
    _refused(said, command, case)


@pytest.mark.parametrize(("command", "case"), [("finetune", TRAINED[name]) for name in TRAINED], ids=list(TRAINED))
def test_a_wrong_answer_ends_a_run(said, command, case):
    _refused(said, command, case)


def _refused(said, command, case):
    (plugin, parts, words), expected = case
    more = "" if command == "plan" else " --steps 1 --set log.peak_tflops=1"
    status, error = said(command, plugin, parts, words + more)
    assert status == 4
    (line,) = error
    for word in (*expected, "the contract says"):
        assert word in line


def test_right_answers_are_taken(said):
    plugin = FAMILY
    status, error = said("finetune", plugin, spec(), "--steps 1 --set log.peak_tflops=1")
    assert (status, error) == (0, [])


def test_a_tracker_that_is_none_is_disabled_and_the_run_goes_on(said):
    words = "--track mine --steps 1 --set log.peak_tflops=1"
    status, (line,) = said("finetune", TRACKER, "def Mine(path): return None\n", words)
    assert status == 0
    for word in ("tracker 'mine'", "returned None", "log and close", "disabled"):
        assert word in line
