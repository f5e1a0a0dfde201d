"""transformers' models in fp64 to the last operation: its own sources with every fp32 in them widened.

As they are they compute norms, RoPE, softmax and the balance loss in fp32 whatever the model's dtype is, which rounds
an oracle to seven digits. RoPE's frequencies stay fp32, for they are so in every model of the hub.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

_WIDER = (
    ("self.inv_freq.to(device=x.device, dtype=torch.float)", "self.inv_freq.to(device=x.device, dtype=torch.float64)"),
    (".float()", ".double()"),
    ("torch.float32", "torch.float64"),
)


@cache
def modeling(name: str) -> ModuleType:
    """`transformers.models.NAME.modeling_NAME`, widened, as a module of its own."""
    original = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text()
    for narrow, wide in _WIDER:
        source = source.replace(narrow, wide)
    module = ModuleType(f"{original.__name__}_fp64")
    module.__package__, module.__file__ = original.__package__, original.__file__
    sys.modules[module.__name__] = module
    exec(compile(source, original.__file__, "exec", dont_inherit=True), module.__dict__)
    return module
