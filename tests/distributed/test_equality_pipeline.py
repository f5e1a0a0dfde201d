"""A pipeline is the same function: every number of two steps equals the single process, in fp64, and a real run too."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests import pipeline_model
from tests.command import train, zoo
from tests.distributed import ranks
from zoo.core import checkpoint
from zoo.core.checkpoint import Checkpoints

pytestmark = pytest.mark.dist

PP2, PP4 = {"pp": 2}, {"pp": 4}
CASES = [
    # 2 ranks
    ("llama", PP2, {}),
    ("llama-tied", PP2, {"number": 2}),
    ("llama-tied", PP2, {"number": 3, "memory": "full"}),
    ("llama", PP2, {"schedule": "gpipe", "number": 1}),
    ("llama-tied", PP2, {"schedule": "interleaved", "number": 4}),
    ("llama", PP2, {"schedule": "zero-bubble"}),
    ("llama-tied", PP2, {"schedule": "zero-bubble", "virtual": 2, "number": 4}),
    ("llama-tied", PP2, {"schedule": "zbv", "number": 2}),
    ("llama", PP2, {"schedule": "zbv", "memory": "full"}),
    ("nemotron", PP2, {"number": 4}),
    ("nemotron", PP2, {"schedule": "interleaved"}),
    ("nemotron-nas", PP2, {"number": 4}),
    ("mixtral", PP2, {"schedule": "zero-bubble"}),
    ("mixtral-aux", PP2, {"schedule": "zbv", "number": 4}),
    # 4 ranks
    ("llama-tied", PP4, {"number": 4}),
    ("llama", PP4, {"schedule": "gpipe", "number": 2}),
    ("llama", PP4, {"schedule": "zero-bubble", "number": 4}),
    ("llama-tied", {"pp": 2, "cp": 2}, {"number": 4}),
    ("llama", {"pp": 2, "cp": 2}, {"schedule": "interleaved", "memory": "full"}),
    ("llama-tied", {"pp": 2, "dp_shard": 2}, {}),
    ("llama", {"pp": 2, "dp_shard": 2}, {"schedule": "interleaved", "memory": "full"}),
    ("llama-tied", {"pp": 2, "dp_shard": 2}, {"schedule": "zero-bubble", "virtual": 2}),
    ("llama", {"pp": 2, "cp": 2}, {"schedule": "zbv", "memory": "full"}),
    ("nemotron", {"pp": 2, "cp": 2}, {}),
    ("mixtral-aux", {"pp": 2, "cp": 2, "ep": 2}, {"schedule": "interleaved", "number": 4}),
    ("mixtral-aux", {"pp": 2, "dp_shard": 2, "ep": 2}, {"memory": "full"}),
    # 8 ranks
    ("llama-tied", {"pp": 2, "dp_shard": 2, "cp": 2}, {"schedule": "interleaved"}),
]


@cache
def single(model, number):
    return pipeline_model.two_steps(model, number=number)


@pytest.mark.parametrize(("model", "degrees", "options"), CASES, ids=str)
def test_any_pipeline_equals_one_process(model, degrees, options):
    world = torch.tensor([size for axis, size in degrees.items() if axis != "ep"]).prod().item()
    wanted = single(model, options.get("number", pipeline_model.ROWS))
    found = {}
    for result in ranks.run(world, pipeline_model.two_steps_of, model, degrees, options):
        assert_same(result, wanted)
        found |= result
    assert found.keys() == wanted.keys()


def assert_same(result, wanted):
    for name, value in result.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def mixed(schedule):
    """On a rank: numbers of a step whose arithmetic is bfloat16, and the types of weights and optimizer state."""
    options = {} if schedule is None else {"degrees": {"pp": 2}, "schedule": schedule}
    run = pipeline_model.Run("llama-tied", dtype="bfloat16", **options)
    numbers = {name: value.float() for name, value in run.step().items()}
    state = [value for slots in run.state.optimizer.state.values() for value in slots.values()]
    return numbers, {tensor.dtype for tensor in (*run.model.parameters(), *state)}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_mixed_precision_is_the_same_but_for_rounding(schedule):
    wanted, _ = ranks.run(1, mixed, None)[0]
    for numbers, kinds in ranks.run(2, mixed, schedule):
        assert kinds == {torch.float32}
        for name, value in numbers.items():
            torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=2e-2)


def saved(folder, model, degrees, options):
    """On a rank: one step under a layout, then a save."""
    run = pipeline_model.Run(model, degrees, **options)
    run.step()
    Checkpoints(folder, keep=1).save(run.state, {"step": run.state.step}, {})


def resumed(folder, model, degrees, options):
    """On a rank: the second step under another layout, from other weights."""
    run = pipeline_model.Run(model, degrees, **options)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    checkpoint.load(run.state, folder / "checkpoints" / "step-1")
    numbers = {f"2.{name}": value for name, value in run.step().items()}
    return numbers | {f"parameter.{name}": value for name, value in run.parameters().items()}


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (({"pp": 4}, {}), ({"pp": 2, "dp_shard": 2}, {"schedule": "interleaved"})),
        (({"pp": 2, "dp_shard": 2}, {}), ({"dp_shard": 2, "cp": 2}, {})),
        (({"dp_shard": 4}, {}), ({"pp": 2, "cp": 2}, {})),
    ],
    ids=str,
)
def test_a_run_saved_under_one_pp_goes_on_under_another(model, before, after, tmp_path):
    ranks.run(4, saved, tmp_path, model, *before)
    found = ranks.run(4, resumed, tmp_path, model, *after)
    for result in found:
        assert_same(result, single(model, pipeline_model.ROWS))


JOB = (
    "llama3",
    "--data",
    "stdlib",
    "--seq",
    256,
    "--dtype",
    "float64",
    "--steps",
    2,
    "--global-batch",
    4,
    "--lr",
    1e-3,
)


def test_the_command_trains_the_same_and_exports_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = train(one, *JOB)
    run = train(two, *JOB, "--pp", 2, "--pp-schedule", "zero-bubble")
    for row, reference in zip(run, wanted, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(reference[key], rel=1e-9), (row["step"], key)
    exports = [exported(path) for path in (one, two)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[1].items():
        torch.testing.assert_close(tensor, exports[0][name], rtol=1e-9, atol=1e-9, msg=name)


def exported(run):
    zoo("export", run, "--dtype", "stored")
    return {name: t for file in (run / "hf").glob("*.safetensors") for name, t in load_file(file).items()}
