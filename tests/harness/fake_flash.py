"""Stands in for flash-attn on a CPU: the real functions' signatures and habits, the formula for a kernel.

Habits kept: segments aligned at the bottom right; lse `[N, rows]` in fp32 or better; rows without keys have lse +inf
(2) or -inf (3, 4); gradients are written into tensors that held anything; rows beyond `max_seqlen_q` are not computed;
2 cannot reshape its queries if no segment has two and some have none.
"""

import sys
import types

import torch


class Calls(list):
    """What was called, with what mattered of it."""


def _wide(x):
    return x.double() if x.dtype == torch.float64 else x.float()


def _segments(cu_q, cu_k):
    return zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)


def _scores(q, k, scale, causal):
    """`[N, rows, keys]`."""
    k = _wide(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qnh,knh->nqk", _wide(q), k) * scale
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[1:], dtype=torch.bool).tril(s.shape[2] - s.shape[1]), -torch.inf)
    return s


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, *, nothing):
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k)), "rows beyond the last segment are never written"
    assert max_k >= int(cu_k.diff().max())
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=_wide(q[:0]).dtype)
    for a, b, c, d in _segments(cu_q, cu_k):
        assert b - a <= max_q
        if c == d:
            out[a:b], lse[:, a:b] = 0, nothing
            continue
        s = _scores(q[a:b], k[c:d], scale, causal)
        wide_v = _wide(v[c:d]).repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[a:b] = torch.einsum("nqk,knh->qnh", s.softmax(-1), wide_v).to(q.dtype)
        lse[:, a:b] = s.logsumexp(-1)
    return out, lse


def _backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, scale, causal):
    assert dout.dtype == q.dtype == out.dtype
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], len(q))
    for grad in (dq, dk, dv):
        grad.fill_(torch.nan)
    r = q.shape[1] // k.shape[1]
    for a, b, c, d in _segments(cu_q, cu_k):
        p = (_scores(q[a:b], k[c:d], scale, causal) - lse[:, a:b, None]).exp()
        up, wide_k, wide_v = _wide(dout[a:b]), *(_wide(x[c:d]).repeat_interleave(r, 1) for x in (k, v))
        dp = torch.einsum("qnh,knh->nqk", up, wide_v)
        ds = p * (dp - (up * _wide(out[a:b])).sum(-1).T[:, :, None]) * scale
        dq[a:b] = torch.einsum("nqk,knh->qnh", ds, wide_k)
        dk[c:d] = torch.einsum("nqk,qnh->knh", ds, _wide(q[a:b])).unflatten(1, (-1, r)).sum(2)
        dv[c:d] = torch.einsum("nqk,qnh->knh", p, up).unflatten(1, (-1, r)).sum(2)


def flash2(calls):
    """`flash_attn.flash_attn_interface` of 2.8."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(("forward", len(cu_seqlens_q) - 1))
        assert dropout_p == 0
        assert max_seqlen_q > 1 or bool((cu_seqlens_q.diff() == 1).all()), "shape is invalid for input"
        out, lse = _forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, nothing=torch.inf
        )
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(("backward", deterministic))
        assert (window_size_left, window_size_right, softcap) == (-1, -1, 0)
        _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return torch.empty(0)

    return {
        "_flash_attn_varlen_forward": _flash_attn_varlen_forward,
        "_flash_attn_varlen_backward": _flash_attn_varlen_backward,
        "_wrapped_flash_attn_varlen_forward": _flash_attn_varlen_forward,
    }


def flash3(calls):
    """`flash_attn_interface` of 3."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        calls.append(("forward", len(cu_seqlens_q) - 1))
        out, lse = _forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, nothing=-torch.inf
        )
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        calls.append(("backward", deterministic))
        assert max_seqlen_q > 0
        assert max_seqlen_k >= 0
        _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal)
        return torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash4(calls):
    """`flash_attn.cute.interface` of 4.0.0b36, as far as it is called."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        calls.append(("forward", len(cu_seqlens_q) - 1))
        result = _forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, nothing=-torch.inf
        )
        return (result[0], result[1] if return_lse else None, None, None, None)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        calls.append(("backward", deterministic))
        _backward(dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return dq, dk, dv

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


MODULES = {
    2: ("flash_attn.flash_attn_interface", flash2),
    3: ("flash_attn_interface", flash3),
    4: ("flash_attn.cute.interface", flash4),
}


def install(monkeypatch, *versions):
    """Put fakes of some versions into `sys.modules`, and nothing of the others; returns the list of calls."""
    calls = Calls()
    for name in ("flash_attn", "flash_attn.cute", *(name for name, _ in MODULES.values())):
        monkeypatch.setitem(sys.modules, name, None)
    for version in versions:
        name, functions = MODULES[version]
        for parent in ("flash_attn", "flash_attn.cute"):
            if name.startswith(parent):
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(functions(calls))
        monkeypatch.setitem(sys.modules, name, module)
    return calls
