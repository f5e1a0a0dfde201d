"""Degrees: what is filled in, and what cannot be the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from zoo.core.errors import UsageError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.plan.resolve_degrees import resolve_degrees


def test_unset_data_parallel_degree_fills_the_accelerators():
    degrees = resolve_degrees(LayoutSection(cp=2), world_size=None, available=8)
    assert (degrees.dp_shard, degrees.world_size) == (4, 8)


def test_on_a_cpu_only_what_was_asked_for_is_started():
    assert resolve_degrees(LayoutSection(cp=8), world_size=None, available=None).world_size == 8


def test_ranks_of_an_outer_launcher_may_be_on_more_machines_than_this_one():
    assert resolve_degrees(LayoutSection(cp=16), world_size=16, available=8).world_size == 16


@pytest.mark.parametrize(
    ("layout", "world_size", "available", "words"),
    [
        (LayoutSection(cp=8), 4, None, ["--cp 8", "8", "4"]),
        (LayoutSection(cp=3), 4, None, ["--cp 3", "3 ranks"]),
        (LayoutSection(cp=8), None, 4, ["--cp 8", "4 accelerators"]),
        (LayoutSection(cp=0), None, None, ["--cp 0", "at least 1"]),
        (LayoutSection(cp=2, dp_shard=3), 4, None, ["--dp-shard 3", "--cp 2"]),
        (LayoutSection(cp=2, dp_shard=2, ep=3), None, None, ["--ep 3", "--cp 2 = 4 ranks", "--ep 2 or --ep 4"]),
        (LayoutSection(cp=2, ep=8), 4, None, ["--ep 8", "--dp-shard 2", "nearest: --ep 2 or --ep 4"]),
        (LayoutSection(ep=0), None, None, ["--ep 0", "at least 1"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(layout, world_size, available, words):
    with pytest.raises(UsageError) as caught:
        resolve_degrees(layout, world_size=world_size, available=available)
    for word in words:
        assert word in str(caught.value)


@given(cp=st.integers(1, 8), tp=st.integers(1, 4), replicate=st.integers(1, 4), shards=st.integers(1, 4))
def test_a_launcher_with_the_right_number_of_ranks_is_always_accepted(cp, tp, replicate, shards):
    layout = LayoutSection(cp=cp, tp=tp, dp_replicate=replicate)
    degrees = resolve_degrees(layout, world_size=cp * tp * replicate * shards, available=None)
    assert degrees.dp_shard == shards
    assert degrees.dp == replicate * shards


@pytest.mark.parametrize(("cp", "ep", "dp_shard"), [(2, 4, 2), (1, 4, 4), (4, 2, 1), (6, 4, 2)])
def test_on_a_cpu_ep_brings_the_ranks_it_folds_over(cp, ep, dp_shard):
    assert resolve_degrees(LayoutSection(cp=cp, ep=ep), world_size=None, available=None).dp_shard == dp_shard


def test_ep_adds_no_ranks_and_the_description_says_so():
    degrees = Degrees(dp_shard=2, cp=4, ep=8)
    assert degrees.world_size == 8
    assert degrees.describe() == "dp_shard 2 x cp 4, ep 8 over them"
    assert Degrees().describe() == "single process"
