"""A plugin with a hook that does not exist."""

from zoo import hookimpl


@hookimpl
def zoo_register_model():
    return []
