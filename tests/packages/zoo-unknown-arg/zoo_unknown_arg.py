"""A plugin that asks a hook for what it does not offer."""

from zoo import hookimpl


@hookimpl
def zoo_select_attention(problem, model):
    return None
