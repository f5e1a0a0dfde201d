"""A pipeline in mixed precision, and by the command: the same function, and the same export."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import layouts
from tests.harness.command import train, zoo
from zoo.testing import ranks

pytestmark = pytest.mark.dist


def mixed(chosen):
    """On a rank: numbers of a step whose arithmetic is bfloat16, and the types of weights and optimizer state."""
    run = layouts.Run(chosen)
    numbers = {name: value.float() for name, value in run.step().items()}
    state = [value for slots in run.state.optimizer.state.values() for value in slots.values()]
    return numbers, {tensor.dtype for tensor in (*run.model.parameters(), *state)}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_mixed_precision_is_the_same_but_for_rounding(schedule):
    wanted, _ = ranks.run(1, mixed, layouts.choose("llama-tied", "layers4 bf16"))[0]
    for numbers, kinds in ranks.run(2, mixed, layouts.choose("llama-tied", f"pp2 bf16 {schedule}")):
        assert kinds == {torch.float32}
        for name, value in numbers.items():
            torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=2e-2)


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
