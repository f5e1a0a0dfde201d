"""What a block of a Nemotron-NAS is made of: `block_configs` of a config.json, read, checked and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo import DataError
from zoo.models.common import MAX_WIDTH, Fields

_ROUND = 256
_NOT_IMPLEMENTED = (
    "window_length",
    "num_sink_tokens",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """One block. A part that is neither there nor linear is a no-op: it has no weights and no norm."""

    n_heads_in_group: int | None
    """Query heads that share a K/V head; None: no attention."""
    linear_attention: bool
    """A matrix in place of attention."""
    ffn_mult: float | None
    """The MLP's width as DeciLM writes it; None where `intermediate_size` says it, or there is no MLP."""
    intermediate_size: int | None
    """The MLP's width; None: no MLP."""
    linear_mlp: bool
    """A matrix in place of the MLP."""


def read_blocks(fields: Fields, *, num_layers: int, num_heads: int, hidden_size: int) -> tuple[BlockConfig, ...]:
    """The blocks of a config.json. Raises DataError."""
    found = fields.values.get("block_configs")
    if not isinstance(found, list) or len(found) != num_layers:
        length = f"a list of {len(found)}" if isinstance(found, list) else f"{found!r:.40}"
        raise DataError(f"config.json: block_configs is {length}: it must list the {num_layers} num_hidden_layers")
    blocks = tuple(
        _block(block, f"config.json: block_configs[{i}]", num_heads, hidden_size) for i, block in enumerate(found)
    )
    if all(block.n_heads_in_group is None for block in blocks):
        raise DataError("config.json: block_configs has no block with attention: no token would see another")
    return blocks


def _block(block: Any, where: str, num_heads: int, hidden_size: int) -> BlockConfig:
    parts = Fields(block if isinstance(block, dict) else {}, where=where)
    for part in ("attention", "ffn"):
        if not parts.mapping(part):
            raise DataError(f"{where}.{part} is missing: a block says what it has in place of each")
    attention = Fields(parts.mapping("attention"), where=f"{where}.attention")
    ffn = Fields(parts.mapping("ffn"), where=f"{where}.ffn")
    for name in _NOT_IMPLEMENTED:
        attention.fixed(name, False)
        ffn.fixed(name, False)
    has_attention, linear_attention = _kind(attention)
    has_mlp, linear_mlp = _kind(ffn)
    mult, width = _width(ffn, hidden_size) if has_mlp else (None, None)
    return BlockConfig(
        n_heads_in_group=_group(attention, num_heads) if has_attention else None,
        linear_attention=linear_attention,
        ffn_mult=mult,
        intermediate_size=width,
        linear_mlp=linear_mlp,
    )


def _kind(part: Fields) -> tuple[bool, bool]:
    """Whether a part is there, and whether a matrix stands for it."""
    no_op, linear = part.boolean("no_op", False), part.boolean("replace_with_linear", False)
    if no_op and linear:
        raise part.wrong("no_op", "replace_with_linear is true too, and a part is one of them")
    return not no_op and not linear, linear


def _group(attention: Fields, num_heads: int) -> int:
    group = attention.integer("n_heads_in_group", 0, high=num_heads)
    if num_heads % group:
        raise attention.wrong("n_heads_in_group", f"it must divide num_attention_heads ({num_heads})")
    return group


def _width(ffn: Fields, hidden_size: int) -> tuple[float | None, int]:
    """DeciLM rounds two thirds of `ffn_mult` widths up to a multiple of 256."""
    if not ffn.has("ffn_mult"):
        return None, ffn.integer("intermediate_size", 0, high=MAX_WIDTH)
    mult = ffn.number("ffn_mult", 0.0, high=1024.0)
    width = -(-int(2 * mult * hidden_size / 3) // _ROUND) * _ROUND
    if not 0 < width <= MAX_WIDTH:
        raise ffn.wrong("ffn_mult", f"it makes a width of {width}, which must be from 1 to {MAX_WIDTH}")
    return mult, width


def hub_block(block: BlockConfig) -> Mapping[str, Any]:
    """The block as `read_blocks` takes it."""
    no_attention = block.n_heads_in_group is None and not block.linear_attention
    no_mlp = block.intermediate_size is None and not block.linear_mlp
    given = block.ffn_mult is None and block.intermediate_size is not None
    return {
        "attention": {
            "n_heads_in_group": block.n_heads_in_group,
            "no_op": no_attention,
            "replace_with_linear": block.linear_attention,
        },
        "ffn": {
            "ffn_mult": block.ffn_mult,
            **({"intermediate_size": block.intermediate_size} if given else {}),
            "no_op": no_mlp,
            "replace_with_linear": block.linear_mlp,
        },
    }
