"""The families of `head_norms` as a plugin file."""

from zoo import hookimpl
from zoo.core.contracts.entries import ModelEntry

NAMES = {"dense-head-norms": "DENSE", "sparse-head-norms": "SPARSE"}


@hookimpl
def zoo_register_models():
    return [
        ModelEntry(
            name=name, target=f"tests.harness.head_norms:{spec}", model_type=name, sizes={"any": {}}, default_size="any"
        )
        for name, spec in NAMES.items()
    ]


@hookimpl
def zoo_match_checkpoint(config):
    return config.get("model_type") if config.get("model_type") in NAMES else None
