"""Did you mean: the near names and only those."""

import pytest

from zoo.core.errors import did_you_mean, near

HOOKS = ["zoo_register_models", "zoo_register_commands", "zoo_register_converters", "zoo_step_end"]


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("zoo_register_model", HOOKS, ["zoo_register_models"]),
        ("finetun", ["finetune", "plan", "plugins"], ["finetune"]),
        ("Llama-3", ["llama3", "mixtral"], ["llama3"]),
        ("3.1-8", ["3.1-8b", "3.1-70b", "8b"], ["3.1-8b"]),
        ("rate", ["learning_rate_at_start", "steps"], ["learning_rate_at_start"]),
        ("zzz", HOOKS, []),
        ("x", [], []),
    ],
)
def test_near_names(name, known, found):
    assert near(name, known) == found


def test_names_equally_near_are_all_offered():
    assert (
        did_you_mean("all-gathr", ["all_gather", "all-gather", "ring"]) == "did you mean 'all-gather' or 'all_gather'?"
    )


def test_nothing_is_said_when_nothing_is_near():
    assert did_you_mean("zzz", HOOKS) == ""
