"""A plugin that takes two names: one of a built-in and one of another package."""

from zoo import hookimpl
from zoo.core.contracts.entries import AttentionEntry


@hookimpl
def zoo_register_attention():
    return [AttentionEntry(name=name, target="zoo_clash:Kernel") for name in ("dense", "fp64")]
