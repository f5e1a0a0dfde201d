"""RoPE: the hub's frequencies bit for bit, in fp32 whatever happens, and the rotation."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, NemotronConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding, apply_rotary_pos_emb

from tools.reference import FAMILIES
from zoo.models.common.rope import RotaryEmbedding, rotate
from zoo.models.common.rope_parameters import parse_rope
from zoo.models.llama3 import sizes as llama
from zoo.models.nemotron import sizes as nemotron

YARN = {"rope_type": "yarn", "factor": 4.0}
VARIANTS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "linear", "factor": 3},
    {"rope_type": "dynamic", "factor": 4.0},
    *(
        {"rope_type": "llama3", "factor": f, "low_freq_factor": 1.0, "high_freq_factor": h} | original
        for f, h in ((8.0, 4.0), (32.0, 4.0), (2.0, 16.0))
        for original in ({}, {"original_max_position_embeddings": 8192}, {"original_max_position_embeddings": 64})
    ),
    YARN,
    YARN | {"original_max_position_embeddings": 512},
    YARN | {"original_max_position_embeddings": 512, "truncate": False},
    YARN | {"original_max_position_embeddings": 512, "beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"original_max_position_embeddings": 512, "attention_factor": 0.7},
    YARN | {"original_max_position_embeddings": 512, "mscale": 0.707, "mscale_all_dim": 1.1},
    YARN | {"original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 1.0},
]


def both(variant: dict, *, head_dim: int = 64, theta: float = 5e5, length: int = 2048, partial: float | None = None):
    """Ours and transformers': Nemotron's where a part of each head is rotated."""
    fields = {"hidden_size": head_dim, "num_attention_heads": 1, "max_position_embeddings": length}
    fields |= {"rope_parameters": variant | {"rope_theta": theta}}
    if partial is not None:
        fields["partial_rotary_factor"] = partial
    rope = parse_rope(fields, default_theta=1e4, max_position_embeddings=length, default_partial=partial)
    ours = RotaryEmbedding(rope, head_dim=head_dim, max_position_embeddings=length)
    if partial is None:
        return ours, LlamaRotaryEmbedding(LlamaConfig(**fields))
    return ours, NemotronRotaryEmbedding(NemotronConfig(**fields))


@pytest.mark.parametrize("partial", [None, 0.5, 0.25])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_frequencies_are_transformers_bit_for_bit(variant, partial):
    for head_dim, theta, length in itertools.product((16, 64, 80, 192), (1e4, 5e5, 1e6), (2048, 131072)):
        ours, theirs = both(variant, head_dim=head_dim, theta=theta, length=length, partial=partial)
        assert torch.equal(ours.inv_freq, theirs.inv_freq), (head_dim, theta, length)
        assert ours.attention_factor == theirs.attention_scaling


@pytest.mark.parametrize(
    ("family", "size", "theirs"),
    [("llama3", size, LlamaRotaryEmbedding) for size in llama.SIZES]
    + [("nemotron", size, NemotronRotaryEmbedding) for size in nemotron.SIZES],
)
def test_frequencies_of_published_sizes(family, size, theirs):
    known = FAMILIES[family]
    fields = dict({"llama3": llama, "nemotron": nemotron}[family].SIZES[size])
    config = known.spec.parse(fields)
    ours = RotaryEmbedding(
        config.rope_parameters, head_dim=config.head_dim, max_position_embeddings=config.max_position_embeddings
    )
    assert torch.equal(ours.inv_freq, theirs(known.config.from_dict(fields)).inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_and_sines_are_transformers(dtype):
    ours, theirs = both(YARN | {"original_max_position_embeddings": 512})
    positions = torch.tensor([[0, 1, 2, 5000, 65_535, 1_000_000]])
    cos, sin = ours(positions, dtype)
    expected = theirs(torch.empty(0, dtype=dtype), positions)
    assert cos.dtype is dtype
    assert torch.equal(cos, expected[0][..., :32])
    assert torch.equal(sin, expected[1][..., :32])


def test_frequencies_stay_in_fp32_when_the_module_is_cast():
    ours, _ = both({"rope_type": "default"})
    exact = ours.inv_freq.clone()
    for cast in (torch.bfloat16, torch.float64):
        assert ours.to(cast).inv_freq.dtype is torch.float32
        assert torch.equal(ours.inv_freq, exact)


def test_fp64_angles_are_fp64():
    ours, _ = both({"rope_type": "default"})
    positions = torch.tensor([[65_535]])
    cos, _ = ours(positions, torch.float64)
    assert torch.equal(cos, (positions[..., None].double() * ours.inv_freq.double()).cos())


@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
def test_rotation_is_transformers_and_its_gradient_is_right(partial):
    """Nemotron's rotation of whole heads is everybody's."""
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    ours, theirs = both({"rope_type": "default"}, head_dim=16, partial=partial)
    positions = torch.arange(9).expand(2, -1)
    cos, sin = ours(positions, torch.float32)
    # Two products and their sum, each rounded once, of numbers no larger than the largest.
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, *theirs(q, positions)), strict=True):
        most = 2 * 3 * torch.finfo(torch.float32).eps / 2 * x.abs().max().item()
        torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=0, atol=most)

    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 5, int(4 * partial), dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)


def test_rotation_takes_a_transposed_view():
    x = torch.randn(1, 5, 2, 8).transpose(1, 2)
    angles = torch.rand(1, 5, 4)
    assert torch.equal(rotate(x, angles.cos(), angles.sin()), rotate(x.contiguous(), angles.cos(), angles.sin()))
