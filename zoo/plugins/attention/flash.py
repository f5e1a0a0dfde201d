"""The `flash` backend: flash-attn's variable-length kernels, one launch for all slices of a usual step.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from zoo import AttentionProblem, UsageError
from zoo.core.sequence.ranges import Range, complement
from zoo.plugins.attention.banded import BandedBackend
from zoo.plugins.attention.bands import Band, Launch
from zoo.plugins.attention.flash_versions import Segments, Version, installed


class Flash(BandedBackend):
    """flash-attn 4, 3 or 2: the newest that is installed and suits device and head size.

    `deterministic` chooses the slower backward pass whose sums have a fixed order; None does as
    `torch.use_deterministic_algorithms` says.
    """

    name = "flash"
    device = "cuda"
    dtypes: tuple[str, ...] = ("bfloat16", "float16")

    def __init__(self, deterministic: bool | None = None) -> None:
        self._deterministic = deterministic

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.device != self.device:
            return f"flash-attn runs on {self.device.upper()} only, not on '{problem.device}'"
        if problem.dtype not in self.dtypes:
            return f"flash-attn computes {' and '.join(self.dtypes)}, not {problem.dtype}"
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads cannot share {problem.num_kv_heads} key/value heads evenly"
        if problem.head_dim % 8:
            return f"flash-attn needs a head size that is a multiple of 8, not {problem.head_dim}"
        chosen = _choose(self.capability(), problem.head_dim)
        return chosen if isinstance(chosen, str) else None

    def capability(self) -> int:
        """Major compute capability of the device."""
        return torch.cuda.get_device_capability()[0]

    @staticmethod
    def may_follow(last: Band, band: Band) -> bool:
        """Segments lie end to end in queries and in keys, and one launch has one rule."""
        return last.causal == band.causal and last.q_stop <= band.q_start and last.k_stop <= band.k_start

    def launch_forward(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        layout = _layout(launch, q.shape[2], k.shape[2], q.shape[0], q.device)
        out, lse = self._version(q).forward(_joined(q), _joined(k), _joined(v), layout.segments, scale)
        if layout.lone_queries is not None:
            out.masked_fill_(layout.lone_queries[:, None, None], 0.0)
            lse.masked_fill_(layout.lone_queries, -torch.inf)
        return _parted(out, q.shape[0]), torch.unflatten(lse, 1, (q.shape[0], -1)).transpose(0, 1)

    def launch_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _layout(launch, q.shape[2], k.shape[2], q.shape[0], q.device)
        batch, version = q.shape[0], self._version(q)
        dout, q, k, v, out = (_joined(x) for x in (dout, q, k, v, out))
        # A row that no rank has a key for: -inf would make its weights infinite, +inf makes them zero.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).transpose(0, 1).flatten(1).contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        deterministic = self._deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        grads = dq, dk, dv
        version.backward(dout, q, k, v, out, lse, grads, layout.segments, scale, deterministic=deterministic)
        for grad, lone in ((dq, layout.lone_queries), (dk, layout.lone_keys), (dv, layout.lone_keys)):
            if lone is not None:
                grad.masked_fill_(lone[:, None, None], 0.0)
        return _parted(dq, batch), _parted(dk, batch), _parted(dv, batch)

    def _version(self, q: Tensor) -> Version:
        chosen = _choose(self.capability(), q.shape[3])
        if isinstance(chosen, str):
            raise UsageError(f"--attn flash: {chosen}")
        return chosen


@lru_cache
def _choose(capability: int, head_dim: int) -> Version | str:
    """The newest installed version that suits, or why none does."""
    working, broken = installed()
    suiting = [v for v in working if capability in v.capabilities and head_dim <= v.max_head_dim]
    if suiting:
        return suiting[0]
    if not working:
        return broken[0] if broken else "flash-attn is not installed: pip install 'zoo[flash]'"
    limits = "; ".join(f"{v.name}: {_numbers(v.capabilities)}, head sizes up to {v.max_head_dim}" for v in working)
    return f"no flash-attn here suits compute capability {capability}.x and head size {head_dim} ({limits})"


def _numbers(capabilities: tuple[int, ...]) -> str:
    return "capability " + ", ".join(f"{major}.x" for major in capabilities)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A launch as flash-attn reads it, and the rows that only fill the gaps between its bands."""

    segments: Segments
    lone_queries: Tensor | None
    lone_keys: Tensor | None


@lru_cache(maxsize=256)
def _layout(launch: Launch, tokens: int, keys: int, batch: int, device: torch.device) -> _Layout:
    """Segments for a batch whose rows lie end to end; gaps are segments with queries only or keys only."""
    q_edges, k_edges = [0], [0]
    for row in range(batch):
        for band in (*launch, Band(tokens, tokens, keys, keys, False)):
            _append(q_edges, k_edges, row * tokens + band.q_start, k_edges[-1])
            _append(q_edges, k_edges, q_edges[-1], row * keys + band.k_start)
            _append(q_edges, k_edges, row * tokens + band.q_stop, row * keys + band.k_stop)
    # flash-attn 2 reshapes queries by itself if no segment has two, and cannot then if segments are empty.
    max_q, max_k = max(2, _longest(q_edges)), _longest(k_edges)
    cu_q, cu_k = (torch.tensor(edges, dtype=torch.int32, device=device) for edges in (q_edges, k_edges))
    return _Layout(
        Segments(cu_q, cu_k, max_q, max_k, launch[0].causal),
        _lone(tuple((b.q_start, b.q_stop) for b in launch), tokens, batch, device),
        _lone(tuple((b.k_start, b.k_stop) for b in launch), keys, batch, device),
    )


def _append(q_edges: list[int], k_edges: list[int], q_edge: int, k_edge: int) -> None:
    """End a segment, unless it would be empty."""
    if (q_edge, k_edge) != (q_edges[-1], k_edges[-1]):
        q_edges.append(q_edge)
        k_edges.append(k_edge)


def _longest(edges: list[int]) -> int:
    return max(stop - start for start, stop in pairwise(edges))


def _lone(covered: tuple[Range, ...], length: int, batch: int, device: torch.device) -> Tensor | None:
    """`[batch * length]`, true for rows outside ascending ranges; None if there are none."""
    gaps = complement(covered, length)
    if not gaps:
        return None
    lone = torch.zeros(length, dtype=torch.bool)
    for start, stop in gaps:
        lone[start:stop] = True
    return lone.repeat(batch).to(device)


def _joined(x: Tensor) -> Tensor:
    """`[B, heads, T, H]` to `[B * T, heads, H]`, without a copy for B = 1 or whole rows."""
    return x.transpose(1, 2).flatten(0, 1)


def _parted(x: Tensor, batch: int) -> Tensor:
    """`[B * T, heads, H]` to `[B, heads, T, H]`."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
