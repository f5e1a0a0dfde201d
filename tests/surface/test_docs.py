"""docs/hooks.md is complete and true: every hook with its exact signature, and an example that the loader accepts."""

import ast
import re
import types
from pathlib import Path

import pluggy
import pytest

from zoo.core.registry import hookspecs
from zoo.core.registry.checks import HOOKS, gathered_entries, implemented_hooks
from zoo.core.registry.loading import Plugins
from zoo.models.llama3.model import SPEC
from zoo.models.llama3.plugin import zoo_rope_for_length
from zoo.models.llama3.sizes import SIZES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "zoo-pico" / "zoo_pico"
PAGE = (ROOT / "docs" / "hooks.md").read_text()
SECTIONS = {match[1]: match[2] for match in re.finditer(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)}


def signatures():
    """Hook to its signature, as hookspecs.py writes it."""
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}" for node in found}


def blocks(text):
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def manager():
    found = pluggy.PluginManager("zoo")
    found.add_hookspecs(hookspecs)
    return found


def test_the_page_has_a_section_for_each_hook_in_the_same_order():
    assert list(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_section_gives_the_exact_signature(hook):
    assert f"`{signatures()[hook]}`" in " ".join(SECTIONS[hook].split())


@pytest.mark.parametrize("hook", HOOKS)
def test_the_section_has_an_example_that_the_loader_accepts(hook):
    (example,) = blocks(SECTIONS[hook])
    plugin = types.ModuleType("example")
    exec(compile(example, f"docs/hooks.md, {hook}", "exec"), plugin.__dict__)
    hooks = implemented_hooks(manager(), plugin)
    assert hook in hooks
    if hook.startswith("zoo_register_"):
        assert gathered_entries(hooks)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": SIZES["3.1-8b"]["rope_scaling"]},
    ],
)
def test_the_example_of_longer_rope_does_what_the_built_in_families_do(rope):
    (example,) = blocks(SECTIONS["zoo_rope_for_length"])
    plugin = types.ModuleType("example")
    exec(compile(example, "docs/hooks.md, zoo_rope_for_length", "exec"), plugin.__dict__)
    fields = SPEC.hub_config(SPEC.parse({**SIZES["8b"], **rope}))
    found = plugin.zoo_rope_for_length("mine", fields, 32_768)
    assert found["max_position_embeddings"] == 32_768
    assert SPEC.override(fields, found) == SPEC.override(fields, zoo_rope_for_length("llama3", fields, 32_768))
    assert plugin.zoo_rope_for_length("llama3", fields, 32_768) is None


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_exists_only_with_a_plugin_that_uses_it(hook):
    plugins = Plugins.load(only=[], files=[EXAMPLE / "plugin.py"])
    assert plugins.implementations(hook), f"no plugin of this repository implements {hook}"


def test_the_python_of_the_plugin_guide_is_valid():
    found = blocks((ROOT / "docs" / "plugins.md").read_text())
    assert found
    for number, block in enumerate(found):
        compile(block, f"docs/plugins.md, block {number}", "exec")


def test_the_kernel_of_the_plugin_guide_is_the_one_of_the_example():
    kernel = (EXAMPLE / "kernel.py").read_text()
    assert len(kernel.splitlines()) < 60
    assert kernel in blocks((ROOT / "docs" / "plugins.md").read_text())
