"""What zoo refuses of schemes, masks and kernels, and why, as a table in the docs; all the rest it computes.

The table is made from the refusals themselves. `ZOO_WRITE_DOCS=1 pytest tests/plugins/test_context_refusals.py`
writes it into docs/context-schemes.md; without that the test compares.
"""

import importlib.util
import os
from contextlib import contextmanager
from functools import cache
from itertools import groupby, product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.core.attention import threads
from zoo.core.contracts.attention import AttentionProblem, HeadShape
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.errors import DataError, UsageError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.plan.schemes import choose_schemes, load_scheme
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention import flash
from zoo.plugins.attention.flash_versions import VERSIONS
from zoo.plugins.parallel.context.adapter import ContextParallel
from zoo.testing.attention import Example, reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "context-schemes.md"
BEGIN, END = "<!-- refusals: written by tests/plugins/test_context_refusals.py -->", "<!-- end of refusals -->"
KERNEL = ROOT / "examples" / "zoo-pico" / "zoo_pico" / "kernel.py"
"""A third party's kernel: a class of two functions."""
REGISTRY = Registry(Plugins.load(only=[]))
LENGTH = 48

DOCUMENTS = ((0, 5), (5, 23), (26, 48))
MASKS = {
    "causal": {},
    "packed documents": {"documents": DOCUMENTS},
    "window": {"window": 16},
    "window x documents": {"documents": DOCUMENTS, "window": 11},
    "full": {"causal": False},
    "full x documents": {"documents": DOCUMENTS, "causal": False},
    "prefix": {"prefixes": (11,)},
    "prefix x documents": {"documents": DOCUMENTS, "prefixes": (2, 18, 0)},
    "window x full": {"window": 16, "causal": False},
    "window x prefix": {"window": 16, "prefixes": (11,)},
    "prefix x full": {"prefixes": (11,), "causal": False},
}
SCHEMES = (*REGISTRY.context_schemes.names(), "hybrid:4")
BACKENDS = (*REGISTRY.attention.names(), "fp64")
DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float64", "float32", "bfloat16", "float16")
HEADS = {"32/8 heads of 128": (32, 8, 128), "32/8 heads of 264": (32, 8, 264), "6/1 heads of 100": (6, 1, 100)}
RANKS = (2, 6, 8, 64)


@contextmanager
def _machine(monkeypatch, *, versions=VERSIONS, triton=True, torch_version="2.13.0"):
    """A machine with an H100 and with all that kernels need, or without some of it."""
    find = importlib.util.find_spec
    told = [SimpleNamespace(name=v.name, capabilities=v.capabilities, max_head_dim=v.max_head_dim) for v in versions]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch, "__version__", torch_version)
        patch.setattr(flash, "installed", lambda: (tuple(told), ()))
        patch.setattr(importlib.util, "find_spec", lambda name: triton or None if name == "triton" else find(name))
        flash._choose.cache_clear()
        yield
    flash._choose.cache_clear()


@cache
def _backend(name):
    if name != "fp64":
        return REGISTRY.attention.load(name)()
    spec = importlib.util.spec_from_file_location("zoo_pico_kernel", KERNEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Fp64()


def _mask(kind):
    changes = dict(MASKS[kind])
    return Mask(LENGTH, changes.pop("documents", ((0, LENGTH),)), **changes)


def _problem(device, dtype, heads):
    num_heads, num_kv_heads, size = HEADS[heads]
    return AttentionProblem(device=device, dtype=dtype, head_dim=size, num_heads=num_heads, num_kv_heads=num_kv_heads)


def _of_mask(kind):
    try:
        _mask(kind)
    except DataError as error:
        return str(error)
    return None


def _of_backend(name, device, dtype, heads):
    return _backend(name).supports(_problem(device, dtype, heads))


def _of_scheme(name, heads, ranks):
    return load_scheme(REGISTRY, name).check(_problem("cpu", "float32", heads), 1 << 16, ranks)


def _refused(ask, *axes):
    """Combinations that are refused, by reason; those that differ in one axis only stand together."""
    reasons = {values: ask(*values) for values in product(*axes)}
    rows = [(tuple((value,) for value in values), why) for values, why in reasons.items() if why is not None]
    for axis in reversed(range(len(axes))):
        rest = lambda row, axis=axis: (row[0][:axis] + row[0][axis + 1 :], row[1])  # noqa: E731
        order = sorted(rows, key=lambda row: (str(rest(row)), axes[axis].index(row[0][axis][0])))
        rows = []
        for _, alike in groupby(order, key=rest):
            found = list(alike)
            merged = tuple(value for row in found for value in row[0][axis])
            values = (*found[0][0][:axis], merged, *found[0][0][axis + 1 :])
            rows.append((values, found[0][1]))
    first = [tuple(axis.index(part[0]) for axis, part in zip(axes, values)) for values, _ in rows]
    words = [[_words(axis, part) for axis, part in zip(axes, values)] for values, _ in rows]
    return [(word, why) for _, word, (_, why) in sorted(zip(first, words, rows), key=lambda row: row[0])]


def _words(axis, values):
    if len(axis) > 1 and len(values) == len(axis):
        return "any"
    return ", ".join(map(str, values))


def _table(title, header, rows):
    body = [f"| {' | '.join(words)} | {why.replace('|', '/')} |" for words, why in rows]
    return [title, "", f"| {' | '.join(header)} | why |", f"|{'---|' * (len(header) + 1)}", *body, ""]


COMMANDS = (
    ("ring:3", 8),
    ("ulysses", 64),
    ("hybrid:x", 8),
    ("hybrid:3", 8),
    ("hybrid:64", 64),
    ("ring,halo,ring", 8),
    ("rign", 8),
)


FACTS = ModelFacts(layer_heads=[HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)], layer_windows=[None])


def _of_command(scheme, cp):
    layout = Layout(degrees=Degrees(cp=cp), seq=1 << 16, settings=LayoutSection(cp_scheme=scheme), model=FACTS)
    try:
        choose_schemes(REGISTRY, layout)
    except UsageError as error:
        return str(error)
    return None


def _of_layout(seq, cp):
    schemes = {None: load_scheme(REGISTRY, "ring")}
    return ContextParallel().check(Layout(degrees=Degrees(cp=cp), seq=seq, schemes=schemes, model=FACTS))


LACKING = {
    "no flash-attn": ("flash", {"versions": ()}),
    "flash-attn 4 alone": ("flash", {"versions": VERSIONS[:1]}),
    "no Triton": ("flex", {"triton": False}),
    "torch 2.11": ("flex", {"torch_version": "2.11.0"}),
}


def _of_machine(monkeypatch, lack):
    backend, changes = LACKING[lack]
    heads = "32/8 heads of 264" if "alone" in lack else "32/8 heads of 128"
    with _machine(monkeypatch, **changes):
        return _of_backend(backend, "cuda", "bfloat16", heads)


def refusals(monkeypatch):
    """The tables, as lines of Markdown."""
    lines = _table("Masks that contradict themselves:", ["mask"], _refused(_of_mask, tuple(MASKS)))
    with _machine(monkeypatch):
        kernels = _refused(_of_backend, BACKENDS, DEVICES, DTYPES, tuple(HEADS))
        count = _count()
    rows = [([f"`{name}`", *rest], why) for (name, *rest), why in kernels]
    lines += _table("Kernels, on a machine that has all they need:", ["kernel", "device", "type", "heads"], rows)
    machines = [([f"`{LACKING[lack][0]}`", lack], _of_machine(monkeypatch, lack)) for lack in LACKING]
    lines += _table("Kernels, on a machine that lacks something:", ["kernel", "machine"], machines)
    schemes = _refused(_of_scheme, SCHEMES, tuple(HEADS), RANKS)
    rows = [([f"`{name}`", *rest], why) for (name, *rest), why in schemes]
    lines += _table("Schemes (N/G: query heads over key/value heads):", ["scheme", "heads", "ranks"], rows)
    asked = [([f"`--cp-scheme {scheme} --cp {cp}`"], _of_command(scheme, cp)) for scheme, cp in COMMANDS]
    asked += [([f"`--seq {seq} --cp {cp}`"], _of_layout(seq, cp)) for seq, cp in ((5, 8),)]
    lines += _table("Commands, for 32/8 heads of 128:", ["command"], asked)
    return [*lines, count]


def _count():
    """How many of all combinations are refused: those with a part that is."""
    masks, computed = _able(_of_mask, MASKS), 0
    for heads in HEADS:
        kernels = _able(lambda *values, heads=heads: _of_backend(*values, heads), BACKENDS, DEVICES, DTYPES)
        schemes = _able(lambda name, ranks, heads=heads: _of_scheme(name, heads, ranks), SCHEMES, RANKS)
        computed += masks * kernels * schemes
    sizes = {
        "masks": MASKS, "schemes": SCHEMES, "kernels": BACKENDS, "devices": DEVICES, "types": DTYPES,
        "shapes of heads": HEADS, "numbers of ranks": RANKS,
    }  # fmt: skip
    total = prod(map(len, sizes.values()))
    axes = ", ".join(f"{len(axis)} {name}" for name, axis in sizes.items())
    return (
        f"Of {total:,} combinations ({axes}) {computed:,} are computed; {total - computed:,} have a part that one of "
        "the first four tables refuses."
    )


def _able(ask, *axes):
    return sum(ask(*values) is None for values in product(*axes))


def test_every_refusal_is_in_the_docs_with_its_reason(monkeypatch):
    wanted = "\n".join([BEGIN, "", *refusals(monkeypatch), "", END])
    print(wanted)
    page = PAGE.read_text()
    if os.environ.get("ZOO_WRITE_DOCS"):
        start, _, rest = page.partition(BEGIN)
        page = start + wanted + rest.partition(END)[2]
        PAGE.write_text(page)
    assert wanted in page, "ZOO_WRITE_DOCS=1 pytest tests/plugins/test_context_refusals.py writes the table anew"


CPU_HEADS = HeadShape(num_heads=8, num_kv_heads=2, head_dim=8)
RANKS_HERE = 4
TOLERANCES = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 6e-2, "float16": 1e-2}
"""For inputs of size 1; flex sums bfloat16 in bfloat16 on a CPU."""
POSSIBLE = [kind for kind in MASKS if _of_mask(kind) is None]


def _here(dtype):
    return AttentionProblem(device="cpu", dtype=dtype, head_dim=8, num_heads=8, num_kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if _backend(name).supports(_here("float64")) is None])
def test_whatever_is_not_refused_is_computed(monkeypatch, name, dtype):
    """Every scheme and mask with every kernel that runs here, over four ranks, dealt unevenly; fewer in other types."""
    assert _backend(name).supports(_here(dtype)) is None
    layout = SequenceLayout(LENGTH, (((0, 7), (30, 36)), ((7, 20),), ((20, 30),), ((36, 48),)))
    kinds = POSSIBLE if dtype == "float64" else ["window x documents", "prefix x documents"]
    for kind, scheme in product(kinds, SCHEMES):
        mask, way = _mask(kind), load_scheme(REGISTRY, scheme)
        assert way.check(_here(dtype), LENGTH, RANKS_HERE) is None
        x = Example.random((1, 8, 2, 8), LENGTH, dtype=getattr(torch, dtype), device="cpu")
        results = threads.attention(monkeypatch, way, _backend(name), x, mask, layout, CPU_HEADS)
        for got, wanted in zip(results, reference(x, mask), strict=True):
            message = f"{name}, {scheme}, {kind}, {dtype}"
            torch.testing.assert_close(
                got.double(), wanted, rtol=0, atol=TOLERANCES[dtype], msg=lambda text, m=message: f"{m}: {text}"
            )


def test_kernels_that_do_not_run_here_say_so(monkeypatch):
    idle = [name for name in BACKENDS if _backend(name).supports(_here("float64")) is not None]
    assert all("on 'cpu'" in _backend(name).supports(_here("bfloat16")) for name in idle)
    with _machine(monkeypatch):
        for name in idle:
            assert _of_backend(name, "cuda", "bfloat16", "32/8 heads of 128") is None
