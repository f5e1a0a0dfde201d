"""The `flash` backend over stand-ins of flash-attn 2, 3 and 4: the contract, the number of launches, the reasons."""

import sys
import types

import pytest
import torch

from tests.harness.fake_flash import install
from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import AttentionProblem, AttentionSlice, SliceRule
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention import flash, flash_versions, sdpa_plugin
from zoo.plugins.attention.bands import Band, bands
from zoo.plugins.attention.flash import Flash
from zoo.testing.attention import AttentionContract, Example, reference

FULL, CAUSAL = SliceRule.FULL, SliceRule.CAUSAL


@pytest.fixture(autouse=True)
def _forget():
    """What is installed and what suits is looked up once in a process; here, once in a test."""
    yield
    flash_versions.installed.cache_clear()
    flash._choose.cache_clear()


class OnCpu(Flash):
    """The backend with its limits of device and dtype lifted, on a device of a given generation."""

    device = "cpu"
    dtypes = ("float64", "float32", "bfloat16")
    generation = 9

    def capability(self):
        return self.generation


class WithFlash(AttentionContract):
    tolerances = {"float64": 1e-10, "bfloat16": 6e-2}
    version = 2

    @pytest.fixture
    def backend(self, monkeypatch):
        install(monkeypatch, self.version)
        return OnCpu()


class TestFlash2(WithFlash):
    pass


class TestFlash3(WithFlash):
    tolerances = {"float64": 1e-10}
    version = 3


class TestFlash4(WithFlash):
    tolerances = {"float64": 1e-10}
    version = 4


del WithFlash


def _run(x, slices, **options):
    backend = OnCpu(**options)
    out, lse = backend.forward(x.q, x.k, x.v, slices, x.scale)
    return out, lse, *backend.backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)


WINDOW = tuple(
    s
    for i in range(0, 64, 8)
    for s in [AttentionSlice(i, i + 8, max(0, i - 16), i, FULL)] * (i > 0)
    + [AttentionSlice(i, i + 8, i, i + 8, CAUSAL)]
)

STEPS = {
    "documents of a packed row": (local_slices(Mask(64, ((0, 7), (7, 8), (8, 40), (50, 60))), ((0, 64),)), 1),
    "a head-tail rank's own rows": (local_slices(Mask.whole(256), ((0, 32), (224, 256))), 1),
    "keys of another rank": ((AttentionSlice(8, 64, 0, 60, FULL),), 1),
    "one query in all": ((AttentionSlice(5, 6, 0, 30, FULL),), 1),
    "single tokens and a gap": (tuple(AttentionSlice(i, i + 1, i, i + 1, CAUSAL) for i in range(63)), 1),
    "keys before and own keys": ((AttentionSlice(0, 16, 0, 32, FULL), AttentionSlice(0, 16, 32, 48, CAUSAL)), 1),
    "a window in blocks": (WINDOW, 3),
    "two key ranges": ((AttentionSlice(0, 64, 0, 8, FULL), AttentionSlice(0, 64, 40, 64, FULL)), 2),
    "nothing": ((), 0),
}


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(("slices", "wanted"), STEPS.values(), ids=STEPS.keys())
def test_a_step_is_as_few_launches_as_it_can_be(monkeypatch, version, slices, wanted):
    calls = install(monkeypatch, version)
    x = Example.random((2, 4, 2, 8), 64, dtype=torch.float64, device="cpu")
    out, lse, *grads = _run(x, slices)
    assert [call[0] for call in calls] == ["forward"] * wanted + ["backward"] * wanted
    visible = torch.zeros(64, 64, dtype=torch.bool)
    for s in slices:
        part = visible[s.q_start : s.q_stop, s.k_start : s.k_stop]
        part |= torch.ones_like(part).tril() if s.rule is CAUSAL else torch.ones_like(part)
    for got, expected in zip((out, *grads), _by_formula(x, visible), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(lse == -torch.inf, ~visible.any(1).expand(2, 4, 64))


def _by_formula(x, visible):
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    scores = q @ k.repeat_interleave(2, 1).mT * x.scale
    out = (scores.masked_fill(~visible, -1e300).softmax(-1) * visible) @ v.repeat_interleave(2, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout)


def test_several_launches_of_half_precision_merge_in_float32(monkeypatch):
    install(monkeypatch, 2)
    x = Example.random((1, 2, 1, 8), 64, dtype=torch.bfloat16, device="cpu")
    out, lse, *grads = _run(x, STEPS["two key ranges"][0])
    assert {t.dtype for t in (out, lse, *grads)} == {torch.float32}


def test_a_single_row_of_a_batch_is_not_copied(monkeypatch):
    install(monkeypatch, 3)
    seen = []
    module = sys.modules["flash_attn_interface"]
    forward = module._flash_attn_forward
    module._flash_attn_forward = lambda q, k, v, *a: seen.extend((q, k, v)) or forward(q, k, v, *a)
    x = Example.random((1, 4, 2, 8), 64, dtype=torch.float64, device="cpu")
    OnCpu().forward(x.q, x.k, x.v, STEPS["keys of another rank"][0], x.scale)
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in (x.q, x.k, x.v)]


@pytest.mark.parametrize(("asked", "mode", "wanted"), [(None, False, False), (None, True, True), (True, False, True)])
def test_determinism_follows_torch_unless_asked_for(monkeypatch, asked, mode, wanted):
    calls = install(monkeypatch, 2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: mode)
    x = Example.random((1, 2, 1, 8), 64, dtype=torch.float64, device="cpu")
    _run(x, STEPS["keys of another rank"][0], deterministic=asked)
    assert calls[-1] == ("backward", wanted)


def test_keys_that_go_on_where_a_rectangle_ends_join_it():
    slices = [AttentionSlice(0, 4, 6, 10, CAUSAL), AttentionSlice(0, 4, 2, 6, FULL), AttentionSlice(4, 8, 2, 6, FULL)]
    assert bands(slices) == (Band(0, 4, 2, 10, True), Band(4, 8, 2, 6, False))


def _problem(**changes):
    fields = dict(device="cuda", dtype="bfloat16", head_dim=128, num_heads=8, num_kv_heads=2)
    return AttentionProblem(**(fields | changes))


@pytest.mark.parametrize(
    ("versions", "generation", "changes", "reason"),
    [
        ((2,), 8, {}, None),
        ((4, 3, 2), 9, {"head_dim": 256}, None),
        ((), 9, {}, "not installed: pip install 'zoo[flash]'"),
        ((3,), 8, {}, "capability 8.x and head size 128 (flash-attn 3: capability 9.x, head sizes up to 256)"),
        ((2,), 9, {"head_dim": 264}, "head sizes up to 256"),
        ((2,), 9, {"head_dim": 100}, "multiple of 8, not 100"),
        ((2,), 9, {"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ((2,), 9, {"device": "cpu"}, "CUDA only, not on 'cpu'"),
        ((2,), 9, {"num_kv_heads": 3}, "evenly"),
    ],
)
def test_supports_says_why_not(monkeypatch, versions, generation, changes, reason):
    install(monkeypatch, *versions)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))
    answer = Flash().supports(_problem(**changes))
    assert (answer is None) if reason is None else reason in answer


@pytest.mark.parametrize(
    ("versions", "generation", "head_dim", "chosen"),
    [
        ((2, 3, 4), 10, 128, "flash-attn 4"),
        ((2, 3, 4), 9, 128, "flash-attn 4"),
        ((2, 3, 4), 9, 192, "flash-attn 3"),
        ((2, 3), 10, 128, "flash-attn 2"),
        ((2, 3, 4), 8, 128, "flash-attn 2"),
    ],
)
def test_the_newest_that_suits_is_taken(monkeypatch, versions, generation, head_dim, chosen):
    install(monkeypatch, *versions)
    assert flash._choose(generation, head_dim).name == chosen


def test_a_broken_or_old_installation_says_so(monkeypatch):
    install(monkeypatch, 2)
    del sys.modules["flash_attn.flash_attn_interface"]._wrapped_flash_attn_varlen_forward
    assert "older than 2.7: pip install -U flash-attn" in flash._choose(9, 128)

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("undefined symbol: _ZN3c10\nand more")

    flash_versions.installed.cache_clear()
    flash._choose.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", Broken("flash_attn.flash_attn_interface"))
    assert flash._choose(9, 128) == "flash-attn 2 is broken: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(
    ("device", "candidates", "chosen"),
    [
        ("cuda", ["cudnn", "dense", "flash", "flex", "sdpa"], "flash"),
        ("cuda", ["cudnn", "dense", "flex", "sdpa"], "sdpa"),
        ("cuda", ["dense", "flex"], "flex"),
        ("cuda", ["dense"], "dense"),
        ("cpu", ["dense", "flex", "sdpa"], "sdpa"),
        ("cpu", ["dense", "flex"], "flex"),
        ("mps", ["dense"], "dense"),
        ("cpu", ["mine"], None),
    ],
)
def test_auto_takes_the_first_by_device_that_can(device, candidates, chosen):
    assert sdpa_plugin.zoo_select_attention(_problem(device=device), candidates) == chosen


def test_padding_between_documents_costs_no_nan_with_a_formula_to_compare(monkeypatch):
    """Rows in gaps are segments without keys, whatever the kernel leaves in them."""
    install(monkeypatch, 2)
    mask = Mask(96, ((3, 40), (51, 52), (60, 91)))
    x = Example.random((2, 4, 2, 16), 96, dtype=torch.float64, device="cpu")
    out, _, *grads = _run(x, local_slices(mask, ((0, 96),)))
    for got, wanted in zip((out, *grads), reference(x, mask), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
