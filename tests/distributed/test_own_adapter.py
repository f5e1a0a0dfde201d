"""A data-parallel adapter of another plugin is known by what it says of itself, under a pipeline too."""

from __future__ import annotations

import pytest

from tests.distributed.test_traffic import counted
from tests.harness import layouts
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.testing import ranks

PLUGIN = """
from zoo import hookimpl
from zoo import ParallelAdapterEntry

AXES = ("dp_replicate", "dp_shard")

@hookimpl
def zoo_register_parallel_adapters():
    return [
        ParallelAdapterEntry(name=name, target=f"tests.harness.own_adapter:{kind}", axes=AXES)
        for name, kind in (("own-replicas", "OwnReplicas"), ("own-optimizer", "OwnOptimizer"))
    ]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Layouts may name the adapters of this plugin."""
    file = tmp_path / "own.py"
    file.write_text(PLUGIN)
    registry = Registry(Plugins.load(files=[file]))
    monkeypatch.setattr(layouts, "registry", lambda: registry)
    for name in ("own-replicas", "own-optimizer"):
        monkeypatch.setitem(layouts.WORDS, name, {"layout.data_parallel": name})


@pytest.mark.dist
@pytest.mark.parametrize("name", ["own-replicas", "own-optimizer"])
def test_it_equals_one_process_and_sends_what_zoos_own_sends_under_a_pipeline(own, name):
    chosen = layouts.choose.__wrapped__("llama", f"pp2 dp_shard2 rows8 interleaved {name}")
    assert [adapter.name for adapter in chosen.adapters] == [name, "pipeline"]
    assert chosen.layout.keeps_weights_for_a_step
    for ((found, names),), counts in ranks.run(4, run_and_counted, chosen, layouts.wanted(chosen)):
        assert not found
        assert names
        for key, (_, sent, said) in counts.items():
            assert sent == said, key


def run_and_counted(chosen, wanted):
    """On a rank: what differs from one process, and what was sent beside what the account says."""
    return layouts.compared([(chosen, wanted)]), counted(chosen)
