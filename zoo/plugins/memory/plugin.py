"""The built-in memory policies and the default choice between them."""

from collections.abc import Mapping, Sequence

from zoo import MemoryPolicyEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_memory_policies() -> list[MemoryPolicyEntry]:
    """Offer `none` and `full`."""
    return [
        MemoryPolicyEntry(
            name="none", target="zoo.plugins.memory.policies:KeepAll", help="keep every activation for backward"
        ),
        MemoryPolicyEntry(
            name="full",
            target="zoo.plugins.memory.policies:RecomputeBlocks",
            help="keep only the input of each block and run the block again in backward",
        ),
    ]


@hookimpl(trylast=True)
def zoo_select_memory_policy(
    saved_bytes: Mapping[str, int], budget_bytes: int, candidates: Sequence[str]
) -> str | None:
    """Keep everything if that takes at most half of the budget, otherwise recompute."""
    for name in ("none", "full"):
        if name in candidates and (name == "full" or saved_bytes[name] <= budget_bytes // 2):
            return name
    return None
