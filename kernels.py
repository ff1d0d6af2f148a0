"""The arithmetic that decides the speed, in plain PyTorch so far: each section has its mathematics and one public
function, with a separate reference `foo_ref` where that is not the function itself. Nothing here knows models.

    ranges        which keys a query sees: documents, padding, causal order, two ranges for block diffusion
    attention     scaled dot-product attention over those ranges
    rms_norm, rope, swiglu
    linear_cross_entropy   the loss at the masked rows, logits never larger than a chunk
    unmask        from logits to candidate tokens, for the samplers
"""
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                                     # not Linux: the references run
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f=None, **kw: f or (lambda g: g)), SimpleNamespace(constexpr=None)

KERNELS = os.environ.get('KERNELS', '')                 # torch | triton, or '': Triton for tensors on a GPU


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run for x. Without a GPU they need TRITON_INTERPRET=1, and patience."""
    return KERNELS == 'triton' or (KERNELS != 'torch' and x.is_cuda)


# ---------------------------------------------------------------------------------------------------------
# ranges: query i of row b sees the keys j with start <= j < end for (start, end) in by_query[b, i]; by_key is
# the transpose (which queries see key j), for the backward of a kernel. R = 1 range serves documents, padding,
# causal order and caches; R = 2 serves block diffusion, where xt sees its own block and the clean prefix. The two
# ranges of one position may touch and overlap. The transpose must be exact: the backward trusts it.


class Ranges(NamedTuple):
    """Attention ranges, int32, half open. by_query (B, Tq, R, 2) in key positions, by_key (B, Tk, R, 2) in
    query positions. A range is empty if its start is not below its end, like (0, 0)."""
    by_query: Tensor
    by_key: Tensor


def document_ranges(doc: Tensor) -> Ranges:
    """Every token sees its own document. doc: (B, T) integers, constant on each document, -1 = padding; equal
    neighbours belong together. A padding position sees only itself, so no softmax is empty."""
    B, T = doc.shape
    idx = torch.arange(T, device=doc.device).expand(B, T)
    starts = torch.ones_like(doc, dtype=torch.bool)
    starts[:, 1:] = (doc[:, 1:] != doc[:, :-1]) | (doc[:, 1:] < 0)
    start = torch.where(starts, idx, 0).cummax(1).values
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    end = torch.where(ends, idx + 1, T).flip(1).cummin(1).values.flip(1)
    span = torch.stack([start, end], -1)[:, :, None].int()              # (B, T, 1, 2)
    return Ranges(span, span)                                            # bidirectional: symmetric


def causal_ranges(ranges: Ranges) -> Ranges:
    """The same ranges, but nobody sees what follows it (query and key positions must be the same axis)."""
    q, k = ranges
    idx = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)[None, :, None]
    by_query = torch.stack([q[..., 0], torch.minimum(q[..., 1], idx + 1)], -1)
    by_key = torch.stack([torch.maximum(k[..., 0], idx), k[..., 1]], -1)
    return Ranges(by_query, by_key)


def last_queries(ranges: Ranges, past: int) -> Ranges:
    """The same keys, seen by the queries from `past` on: the new tokens of a cache."""
    return Ranges(ranges.by_query[:, past:], (ranges.by_key - past).clamp(min=0))


def ranges_to_mask(ranges: Ranges) -> Tensor:
    """The dense boolean mask (B, 1, Tq, Tk) that the ranges describe, True = visible."""
    q = ranges.by_query
    j = torch.arange(ranges.by_key.shape[1], device=q.device)
    return ((j >= q[..., :1]) & (j < q[..., 1:])).any(2).unsqueeze(1)    # (B, Tq, R, Tk) -> (B, 1, Tq, Tk)


# ---------------------------------------------------------------------------------------------------------
# attention: o_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i),  s_ij = q_i . k_j / sqrt(hd), over the keys j that query
# i sees; lse_i = log sum_j exp(s_ij). Grouped queries: G = H / Hkv query heads share one key head.
#
# Flash attention (2205.14135) stores neither s nor p. A program owns a tile of queries and walks over blocks of keys
# with each row's running maximum m and sum l. When m grows to m', what was summed before shrinks by exp(m - m'):
#
#     m' = max(m, max_j s_j)    l' = l exp(m - m') + sum_j exp(s_j - m')    acc' = acc exp(m - m') + exp(s - m') v
#
# Saved: q, k, v, o and lse, fp32 and in base 2, because exp2 is what the hardware has. The backward recomputes p;
# with delta_i = do_i . o_i, which is the sum_j p_ij dp_ij of the softmax's Jacobian,
#
#     dp = do v^T    ds = p (dp - delta)    dq = ds k / sqrt(hd)    dk = ds^T q / sqrt(hd)    dv = p^T do
#
# dq sums over keys: tiles of queries walk over keys, as in the forward. dk and dv sum over queries: tiles of keys
# walk over the queries that see them (by_key), in S of the G heads. S = G needs nothing more; S = 1 leaves G parts to
# be added, but G times as many programs, so that one key tile of a long document does not keep the others waiting.
# No output is shared: no atomics, the same bits always.
#
# A tile visits only blocks that one of its rows needs: those of the rows' first ranges, then those of their second
# ranges that it has not visited yet. Rows past the end of a tensor are copies of its last row, so that loads need no
# mask: as rows of the tile they are not stored, as rows of a block nobody sees them.


def attention_ref(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> Tensor:
    """The specification: a dense mask. A query that sees nothing gets zeros."""
    return attention(q, k, v, ranges_to_mask(ranges))


@triton.jit
def _load_rows(x, stride, b, h, rows, n, HD: tl.constexpr):
    """(len(rows), HD) of head h of x (B, H, n, HD)."""
    rows = tl.minimum(rows, n - 1)
    return tl.load(x + b * stride[0] + h * stride[1] + rows[:, None] * stride[2] + tl.arange(0, HD)[None, :])


@triton.jit
def _store_rows(x, value, stride, b, h, rows, n, HD: tl.constexpr):
    x += b * stride[0] + h * stride[1] + rows[:, None] * stride[2] + tl.arange(0, HD)[None, :]
    tl.store(x, value.to(x.dtype.element_ty), (rows < n)[:, None])


@triton.jit
def _blocks(start, end, BLOCK: tl.constexpr):
    """Blocks first <= i < last hold these ranges. If all are empty, first is huge and last 0."""
    some = start < end
    return tl.min(tl.where(some, start, 1 << 30)) // BLOCK, tl.cdiv(tl.max(tl.where(some, end, 0)), BLOCK)


@triton.jit
def _plan(ranges, b, rows, n, R: tl.constexpr, BLOCK: tl.constexpr):
    """For a tile of rows of ranges (B, n, R, 2): what each sees and what all see, for `_hide`; which blocks they
    need, for `_block`; and how many these are."""
    ranges += (b * n + tl.minimum(rows, n - 1)) * (2 * R)
    start, end = tl.load(ranges), tl.load(ranges + 1)
    start2, end2 = tl.load(ranges + 2 * R - 2), tl.load(ranges + 2 * R - 1)     # if R = 1 the same again
    length, length2 = (tl.maximum(end - start, 0).to(tl.uint32), tl.maximum(end2 - start2, 0).to(tl.uint32))
    seen = (start, length, start2, length2, tl.max(start), tl.min(end), tl.max(start2), tl.min(end2))
    first, last = _blocks(start, end, BLOCK)
    first2, last2 = _blocks(start2, end2, BLOCK)
    swap = first2 < first                                                       # in order, an empty one last
    first, last, first2, last2 = (tl.where(swap, first2, first), tl.where(swap, last2, last),
                                  tl.where(swap, first, first2), tl.where(swap, last, last2))
    first2 = tl.maximum(first2, last)                                           # no block twice
    n_first = tl.maximum(last - first, 0)
    return seen, (first, n_first, first2 - last), n_first + tl.maximum(last2 - first2, 0)


@triton.jit
def _block(plan, i):
    """The i-th block of a plan: there may be a gap after the first interval."""
    first, n_first, gap = plan
    return first + i + tl.where(i < n_first, 0, gap)


@triton.jit
def _hide(s, seen, at, BLOCK: tl.constexpr):
    """Scores s (rows, BLOCK) of the block that begins at `at`, -inf where a row does not see. In long documents the
    whole tile sees most blocks, and there is nothing to do."""
    start, length, start2, length2, all_start, all_end, all_start2, all_end2 = seen
    if not (((at >= all_start) & (at + BLOCK <= all_end)) | ((at >= all_start2) & (at + BLOCK <= all_end2))):
        j = at + tl.arange(0, BLOCK)[None, :]
        s = tl.where(((j - start[:, None]).to(tl.uint32) < length[:, None]) |       # what is negative wraps: large
                     ((j - start2[:, None]).to(tl.uint32) < length2[:, None]), s, -float('inf'))
    return s


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_fwd(q, k, v, o, lse, by_query, q_stride, k_stride, v_stride, o_stride, lse_stride, scale, Tq, Tk,
                   G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    seen, plan, n_blocks = _plan(by_query, b, rows, Tq, R, BN)
    q_tile = _load_rows(q, q_stride, b, h, rows, Tq, HD)
    m = tl.full([BM], -1e30, tl.float32)                        # finite: -inf - -inf would be NaN
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, HD], tl.float32)
    for i in range(n_blocks):
        at = _block(plan, i) * BN
        cols = at + tl.arange(0, BN)
        k_block = _load_rows(k, k_stride, b, h // G, cols, Tk, HD)
        s = _hide(tl.dot(q_tile, k_block.T, input_precision='ieee'), seen, at, BN)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)             # scale = log2(e) / sqrt(hd)
        p = tl.exp2(s * scale - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        m, l = m_new, l * shrink + tl.sum(p, 1)
        v_block = _load_rows(v, v_stride, b, h // G, cols, Tk, HD)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision='ieee')
    l = tl.where(l > 0, l, 1.0)                                 # a row that sees nothing: acc = 0
    tl.store(lse + b * lse_stride[0] + h * lse_stride[1] + rows, m + tl.log2(l))
    _store_rows(o, acc * (1 / l)[:, None], o_stride, b, h, rows, Tq, HD)


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_bwd_dq(q, k, v, o, do, dq, lse, delta, by_query, q_stride, k_stride, v_stride, o_stride, do_stride,
                      dq_stride, lse_stride, scale, Tq, Tk,
                      G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    seen, plan, n_blocks = _plan(by_query, b, rows, Tq, R, BN)
    q_tile = _load_rows(q, q_stride, b, h, rows, Tq, HD)
    o_tile = _load_rows(o, o_stride, b, h, rows, Tq, HD)
    do_tile = _load_rows(do, do_stride, b, h, rows, Tq, HD)
    row_at = b * lse_stride[0] + h * lse_stride[1] + rows
    row_lse = tl.load(lse + row_at)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + row_at, row_delta)                         # for the other kernel
    acc = tl.zeros([BM, HD], tl.float32)
    for i in range(n_blocks):
        at = _block(plan, i) * BN
        cols = at + tl.arange(0, BN)
        k_block = _load_rows(k, k_stride, b, h // G, cols, Tk, HD)
        v_block = _load_rows(v, v_stride, b, h // G, cols, Tk, HD)
        s = _hide(tl.dot(q_tile, k_block.T, input_precision='ieee'), seen, at, BN)
        p = tl.exp2(s * scale - row_lse[:, None])
        ds = p * (tl.dot(do_tile, v_block.T, input_precision='ieee') - row_delta[:, None])
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision='ieee')
    _store_rows(dq, acc * (scale * 0.6931471805599453), dq_stride, b, h, rows, Tq, HD)      # log 2: 1 / sqrt(hd)


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_bwd_dkdv(q, k, v, do, dk, dv, lse, delta, by_key, q_stride, k_stride, v_stride, do_stride, dk_stride,
                        dv_stride, lse_stride, scale, Tq, Tk,
                        G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        S: tl.constexpr):
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)   # of the heads: part * S and the S - 1 after it
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    seen, plan, n_blocks = _plan(by_key, b, cols, Tk, R, BM)
    k_tile = _load_rows(k, k_stride, b, part * S // G, cols, Tk, HD)
    v_tile = _load_rows(v, v_stride, b, part * S // G, cols, Tk, HD)
    dk_acc = tl.zeros([BN, HD], tl.float32)
    dv_acc = tl.zeros([BN, HD], tl.float32)
    for i in range(n_blocks * S):                               # s, p, dp and ds are transposed: (keys, queries)
        at, h = _block(plan, i // S) * BM, part * S + i % S
        rows = at + tl.arange(0, BM)
        row_at = b * lse_stride[0] + h * lse_stride[1] + rows
        q_block = _load_rows(q, q_stride, b, h, rows, Tq, HD)
        do_block = _load_rows(do, do_stride, b, h, rows, Tq, HD)
        s = _hide(tl.dot(k_tile, q_block.T, input_precision='ieee'), seen, at, BM)
        p = tl.exp2(s * scale - tl.load(lse + row_at)[None, :])
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision='ieee')
        ds = p * (tl.dot(v_tile, do_block.T, input_precision='ieee') - tl.load(delta + row_at)[None, :])
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision='ieee')
    _store_rows(dk, dk_acc * (scale * 0.6931471805599453), dk_stride, b, part, cols, Tk, HD)
    _store_rows(dv, dv_acc, dv_stride, b, part, cols, Tk, HD)


# Queries and keys of a tile, num_warps, num_stages, for 16-bit inputs by head_dim: on H100 and B200 (227 KB of shared
# memory, wgmma), and on smaller cards (99 KB). Nothing spills.
ATTENTION_TILES = {
    ('fwd', 64): ((128, 64, 4, 3), (128, 64, 4, 3)), ('fwd', 128): ((128, 64, 8, 3), (128, 32, 8, 2)),
    ('dq', 64): ((128, 64, 8, 3), (128, 32, 4, 2)), ('dq', 128): ((128, 64, 8, 2), (64, 32, 4, 2)),
    ('dkdv', 64): ((64, 128, 8, 2), (32, 64, 4, 2)), ('dkdv', 128): ((64, 128, 8, 2), (32, 64, 8, 2)),
    ('fwd', 256): ((64, 64, 8, 2), (64, 32, 8, 2)), ('dq', 256): ((64, 64, 8, 2), (32, 32, 4, 1)),
    ('dkdv', 256): ((32, 32, 8, 1), (32, 32, 8, 1))}
ATTENTION_SPLIT = True                                                          # S = 1 rather than G


def _launch_attention(op, kernel, ranges, scale, q, k, *more, **constants):
    """A program per tile of queries (dkdv: of keys), head and row. The kernels take the tensors, the ranges, the
    strides of every (B, H, T, hd) and those of lse, and the rest."""
    tensors, (B, H, Tq, HD), (Hkv, Tk) = (q, k, *more), q.shape, k.shape[1:3]
    BM, BN, num_warps, num_stages = 32, 32, 4, 1                                # fp32: exact, slow
    if q.dtype != torch.float32:
        small = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] not in (9, 10)
        BM, BN, num_warps, num_stages = ATTENTION_TILES[op, max(64, HD)][small]
    strides = [x.stride()[:3] for x in tensors if x.ndim == 4]
    grid = (triton.cdiv(Tk, BN), H // constants['S'], B) if op == 'dkdv' else (triton.cdiv(Tq, BM), H, B)
    kernel[grid](*tensors, ranges, *strides, more[-1].stride()[:2], scale, Tq, Tk, H // Hkv, ranges.shape[2], HD,
                 BM, BN, **constants, num_warps=num_warps, num_stages=num_stages)


def _new_attention(x: Tensor, heads: int = 0) -> Tensor:
    """Empty, of x's shape (B, H, T, hd), in memory (B, T, H, hd): transposing and flattening the heads is free."""
    return x.new_empty(x.shape[0], x.shape[2], heads or x.shape[1], x.shape[3]).transpose(1, 2)


def _new_lse(q: Tensor) -> Tensor:
    """(B, H, Tq up to whole tiles): no mask for it either. Zeros, for tiles that no query is in."""
    return q.new_zeros((*q.shape[:2], triton.cdiv(q.shape[2], 128) * 128), dtype=torch.float32)


# Custom operators are opaque to torch.compile, so a compiled block runs the same kernels in the same way.
@torch.library.custom_op('nanodlm::attention', mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor,
               scale: float) -> tuple[Tensor, Tensor]:
    o, lse = _new_attention(q), _new_lse(q)
    _launch_attention('fwd', _attention_fwd, by_query, scale, q, k, v, o, lse)
    return o, lse


@torch.library.custom_op('nanodlm::attention_backward', mutates_args=())
def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor, o: Tensor,
                        lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if do.stride(3) != 1: do = do.contiguous()                                  # of a sum: expanded
    G = q.shape[1] // k.shape[1]
    S = 1 if ATTENTION_SPLIT else G
    dq, delta = _new_attention(q), torch.zeros_like(lse)
    dk, dv = (_new_attention(x, x.shape[1] * G // S) for x in (k, v))
    _launch_attention('dq', _attention_bwd_dq, by_query, scale, q, k, v, o, do, dq, lse, delta)
    _launch_attention('dkdv', _attention_bwd_dkdv, by_key, scale, q, k, v, do, dk, dv, lse, delta, S=S)
    if S < G: dk, dv = (x.transpose(1, 2).unflatten(2, (-1, G)).sum(3).transpose(1, 2) for x in (dk, dv))
    return dq, dk, dv


def _attention_setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


_attention.register_fake(lambda q, k, v, by_query, by_key, scale: (_new_attention(q), _new_lse(q)))
_attention_backward.register_fake(lambda do, q, k, v, *rest: tuple(map(_new_attention, (q, k, v))))
_attention.register_autograd(                                                   # nobody differentiates lse
    lambda ctx, do, dlse: (*_attention_backward(do, *ctx.saved_tensors, ctx.scale), None, None, None),
    setup_context=_attention_setup)


def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges | Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Tq, hd), k and v (B, Hkv, Tk, hd) -> (B, H, Tq, hd), 0 where a query sees nothing. Views
    will do, of a fused qkv or a cache: only hd must be contiguous.

    ranges: who sees whom; or a dense mask (B, 1, Tq, Tk), which layers on the torch path share (`ranges_to_mask`); or
    None: every key, or (causal) every key up to the query. Without ranges there is nothing to skip, cuDNN is hard to
    beat, and the call is PyTorch's. Other head_dims than 16, 32, 64, 128 and 256 are padded, at the price of copies."""
    if not isinstance(ranges, Ranges):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=ranges, is_causal=causal,
                                              enable_gqa=q.shape[1] != k.shape[1])
    (B, H, Tq, hd), (_, Hkv, Tk, _), R = q.shape, k.shape, ranges.by_query.shape[2]
    assert k.shape == v.shape == (B, Hkv, Tk, hd) and H % Hkv == 0 and hd <= 256, f"{q.shape=} {k.shape=} {v.shape=}"
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, f"{q.stride()=} {k.stride()=} {v.stride()=}"
    shapes = [tuple(r.shape) for r in ranges]
    assert shapes == [(B, Tq, R, 2), (B, Tk, R, 2)] and R <= 2, f"{shapes=} {q.shape=} {k.shape=}"
    assert not causal, "with ranges, causal order is in them: causal_ranges"
    if not use_triton(q): return attention_ref(q, k, v, ranges)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    pad = max(16, 1 << (hd - 1).bit_length()) - hd
    if pad: q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
    scale = hd ** -0.5 * math.log2(math.e)
    return _attention(q, k, v, ranges.by_query.contiguous(), ranges.by_key.contiguous(), scale)[0][..., :hd]


# ---------------------------------------------------------------------------------------------------------
# rms_norm: y = w * x / sqrt(mean(x^2) + eps); statistics in fp32, rounded before the weight as Hugging Face does.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * h.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------
# rope: rotate the pairs (x_i, x_{i + hd/2}) by pos * theta^(-2i/hd) (RoFormer 2104.09864, Llama's half layout).


def rope_tables(pos: Tensor, head_dim: int, theta: float, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos, sin (B, T, head_dim / 2) in fp32 for positions pos (B, T); `scale` divides the frequencies."""
    freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)
    angle = pos[..., None].float() * (freq if scale is None else freq / scale.to(freq))
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, hd); cos, sin (B, T, hd/2) -> rotated x in x's dtype."""
    x1, x2 = x.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


# ---------------------------------------------------------------------------------------------------------
# swiglu: silu(gate) * up of the fused projection [gate | up].


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2F) -> (..., F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


# ---------------------------------------------------------------------------------------------------------
# linear_cross_entropy: for rows i with hidden h_i, target y_i and logits z_i = W h_i (column `skip_col` removed)
#
#     L = sum_i (a_i + b_i sg(p_i)) CE_i,   CE_i = logsumexp(z_i) - z_i[y_i],   p_i = exp(-CE_i)
#     dL/dz_i = (a_i + b_i p_i) (softmax(z_i) - onehot(y_i))
#
# The weights go in, so the gradient is known in the forward: a chunk of logits is turned into its gradient at
# once and dropped. Saved: dH (N, D) and dW (V, D), never the (N, V) logits. The backward multiplies both by the
# incoming scalar; a vector of per-row losses would need the rows' own factors (the bug of a popular kernel).


def linear_cross_entropy_ref(h, weight, targets, a, b=None, skip_col=None):
    """The specification: all logits at once, autograd for the gradient. Same arguments and results as below."""
    z = F.linear(h, weight).float()
    if skip_col is not None: z = z.index_fill(1, torch.tensor([skip_col], device=z.device), -torch.inf)
    used = a != 0 if b is None else (a != 0) | (b != 0)
    z = torch.where(used[:, None], z, 0.0)                               # unused rows must not make 0 * inf
    ce = F.cross_entropy(z, targets, reduction='none')
    ce = torch.where(used, ce, 0.0)
    w = a if b is None else a + b * (-ce.detach()).exp()
    return (w * ce).sum(), ce.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, a, b, skip_col, chunk):
        ce = torch.empty(len(h), device=h.device, dtype=torch.float32)
        w = torch.empty_like(ce)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(h.dtype)
        for s in range(0, len(h), chunk):
            rows = slice(s, s + chunk)
            y = targets[rows, None]
            z = (h[rows] @ head.T).float()                               # (n, V)
            if skip_col is not None: z[:, skip_col] = -torch.inf
            lse = z.logsumexp(1)
            nll = lse - z.gather(1, y).squeeze(1)
            used = a[rows] != 0 if b is None else (a[rows] != 0) | (b[rows] != 0)
            ce[rows] = torch.where(used, nll, 0.0)
            w[rows] = a[rows] if b is None else a[rows] + b[rows] * (-ce[rows]).exp()
            if dh is None and dweight is None: continue
            dz = z.sub_(lse[:, None]).exp_()                             # softmax, in place
            dz.scatter_add_(1, y, torch.full_like(dz[:, :1], -1.0))
            dz = dz.mul_(w[rows, None]).to(h.dtype)
            if dh is not None: dh[rows] = dz @ head
            if dweight is not None: dweight += dz.T @ h[rows]
        ctx.save_for_backward(dh, dweight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce)
        return (w * ce).sum(), ce

    @staticmethod
    def backward(ctx, g, _):
        dh, dweight = ctx.saved_tensors
        dh = None if dh is None else dh * g.to(dh.dtype)
        dweight = None if dweight is None else (dweight * g).to(ctx.weight_dtype)
        return dh, dweight, None, None, None, None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, a: Tensor, b: Tensor | None = None,
                         skip_col: int | None = None, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """h (N, D) hidden rows, weight (V, D), targets (N,) int64, a and b (N,) fp32 -> (loss scalar, ce (N,) fp32,
    detached; 0 in rows whose a and b are 0: padding of a static bucket). `skip_col` is left out of the softmax.
    chunk: rows of logits in memory at a time; 0 = 2^27 logits, 512 MiB in fp32."""
    chunk = chunk or max((1 << 27) // len(weight), 1)
    assert h.ndim == 2 and weight.ndim == 2 and h.shape[1] == weight.shape[1], f"{h.shape=} {weight.shape=}"
    assert targets.shape == a.shape == h.shape[:1], f"{h.shape=} {targets.shape=} {a.shape=}"
    if not torch.is_grad_enabled(): h, weight = h.detach(), weight.detach()      # no gradient work in forward
    if torch.is_autocast_enabled(h.device.type): h = h.to(torch.get_autocast_dtype(h.device.type))
    with torch.autocast(h.device.type, enabled=False):
        return _LinearCrossEntropy.apply(h, weight, targets, a, b, skip_col, chunk)


# ---------------------------------------------------------------------------------------------------------
# unmask: candidate tokens for the samplers. argmax(z + G) with Gumbel noise G = -log E draws from softmax(z).
# E = -log1p(-u), u = (r + 1/2) 2^-32 with integer r: fp32 resolves the small E (the large G) to 2^-33, where
# -log(-log u) with fp32 u stops at 16.6 and cuts the tail of a large vocabulary. u = 1 would make E infinite.


def exponential_noise(shape, generator: torch.Generator) -> Tensor:
    """Exponential(1) draws in fp32, on the generator's device."""
    r = torch.randint(0, 2 ** 32, shape, generator=generator, device=generator.device)
    return -torch.log1p(-((r.float() + 0.5) * 2.0 ** -32).clamp(max=1 - 2.0 ** -24))


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf outside the top_k largest (0 = all) and outside the smallest set of mass >= top_p. (N, V) fp32."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        z, order = logits.sort(descending=True)
        p = z.softmax(-1)
        keep = p.cumsum(-1) - p < top_p                                  # mass before the token
        keep[:, 0] = True                                                # the first always stays
        logits = logits.masked_fill(~keep.gather(1, order.argsort(-1)), -torch.inf)
    return logits


def unmask(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """One candidate token per row. logits (N, V) -> (N,) int64. temperature 0 = argmax. Filters act after the
    temperature, as in Hugging Face's generate."""
    z = logits.float()
    if temperature == 0: return z.argmax(-1)
    assert generator is not None, "temperature > 0 needs a generator: randomness has a seed here"
    z = filter_logits(z / temperature, top_k, top_p)
    return (z - exponential_noise(z.shape, generator).log()).argmax(-1)
