"""A plugin whose registration returns something else than entries."""

from zoo import hookimpl


@hookimpl
def zoo_register_attention():
    return ["fast"]
