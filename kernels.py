"""The arithmetic that decides the speed: Triton kernels, each beside its reference. Nothing here knows models.

    ranges        which keys a query sees: documents, padding, causal order, two ranges for block diffusion
    attention     scaled dot-product attention over those ranges
    rms_norm      with the residual add fused in
    rope_qkv      rotary positions (and Qwen3's QK-norm) on the fused q|k|v
    rope_attention         QK-norm, RoPE and attention in one, for sampling
    swiglu        on the fused gate|up
    linear_cross_entropy   the loss at the masked rows, logits never larger than a chunk
    cosine_alignment       student against teacher, at selected rows
    modulate      adaLN of a diffusion transformer, with the gated residual add fused in
    unmask        from logits to candidate tokens, for the samplers
    head_argmax   from states to their likeliest tokens, without logits in memory
    row_noise     normal noise that is a function of the row's seed alone

A section reads: the mathematics and what is saved; `foo_ref`, plain PyTorch and the specification; the Triton
kernels; the glue to autograd; the public `foo`. All but linear algebra is bound by memory: count the bytes.

    KERNELS=torch|triton    default: Triton on CUDA, the references elsewhere. TRITON_INTERPRET=1 KERNELS=triton
                            runs the kernels on a CPU, thousands of times slower: only for tests.
"""
import functools
import hashlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

try:
    import triton
    import triton.language as tl
except ImportError:                     # macOS, Windows: only the references
    class tl: constexpr = None
    class triton: jit, __version__ = staticmethod(lambda fn=None, **kw: fn or (lambda fn: fn)), None

KERNELS, INTERPRET = os.environ.get('KERNELS', ''), os.environ.get('TRITON_INTERPRET') == '1'
if KERNELS not in ('', 'torch', 'triton'): raise SystemExit(f"KERNELS must be torch or triton, got {KERNELS!r}")


REAL = Tensor, torch.nn.Parameter                           # a tracer's tensors are of other types
# Compiled code holds these kernels and tiles. PyTorch keeps it on disk under the operators' names alone: without this,
# code from before an edit of this file would run.
torch.compiler.config.cache_key_tag += hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def active(device) -> str:
    """In words, which path the functions below take on this device."""
    if use_triton(torch.empty(0, device=device)): return f'Triton {triton.__version__} (KERNELS=torch: without)'
    return 'torch (KERNELS=torch)' if KERNELS == 'torch' else f'torch (no Triton on {torch.device(device).type})'


def use_triton(x: Tensor) -> bool:
    """Never a silent fallback on a GPU: what Triton cannot do there is an error."""
    if KERNELS == 'torch' or x.device.type != 'cuda' and KERNELS != 'triton': return False
    if triton.__version__ is None: raise SystemExit("Triton is not installed: pip install triton, or KERNELS=torch")
    if x.device.type != 'cuda' and not INTERPRET:
        raise SystemExit(f"KERNELS=triton on {x.device.type} needs TRITON_INTERPRET=1, which is for tests")
    if x.is_floating_point() and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SystemExit(f"the kernels compute in fp32, not {x.dtype}: KERNELS=torch does")
    return True


def _fp32(x: Tensor) -> Tensor:
    """The references compute in fp32, and in fp64 when they are the oracle."""
    return x if x.dtype == torch.float64 else x.float()


def _launch(kernel, grid, *args, **how):
    """kernel[grid](*args, **how), on the current device. Where AOTAutograd makes a graph, a node of it: Inductor's code
    launches the kernel, for a fraction of the host time; it takes no tuples among the arguments, and floats only as
    constants. Nothing where a tracer asks with fake tensors for shapes."""
    if type(args[0]) in REAL: kernel[grid](*args, **how)
    elif type(args[0]) is FunctionalTensor: torch.library.wrap_triton(kernel)[grid](*args, **how)


def _op(body, contiguous=True):
    """Makes an operator of a function that launches kernels: one node for autograd and Dynamo, for Inductor the kernels
    and PyTorch operations inside. It costs 15 us of Python per call more than an autograd.Function; without gradients
    and outside of compiled code, where sampling waits for launches, the body itself is called. What runs outside
    compiled blocks (the losses) is an autograd.Function.

    Under torch.compile: Dynamo runs `checked` on fakes for the shapes; AOTAutograd replays its graph with functional
    tensors, and the rule `inside` runs `checked` on those, so that the graph shows what is in it. That is what
    torch.library.triton_op does, but with it `import kernels` takes 2 s instead of 0.1 and every call some us more."""
    @functools.wraps(body)
    def checked(*args):
        for i, x in enumerate(args if contiguous else ()):
            assert not isinstance(x, Tensor) or x.is_contiguous(), f"{body.__name__}: argument {i} has {x.stride()=}"
        return body(*args)

    def inside(mode, func, types, args, kwargs):
        with mode: return checked(*args)
    op = torch.library.custom_op('dlm::' + body.__name__.strip('_'), checked, mutates_args=())
    op.register_fake(checked)
    if not INTERPRET: op.register_torch_dispatch(FunctionalTensorMode, inside)

    def call(*args):
        tracing = torch.compiler.is_compiling() or type(args[0]) not in REAL    # of Dynamo, of AOTAutograd
        return (op if torch.is_grad_enabled() or tracing else checked)(*args)
    call.op, call.register_autograd = op, op.register_autograd
    return call


def _row_block(D: int) -> dict:
    """A row of D columns in one program: 8 numbers per thread are a load of 16 bytes in bf16."""
    if D > 16384: raise SystemExit(f"rows of {D} numbers do not fit in the registers (16384 do): KERNELS=torch")
    block = max(triton.next_power_of_2(D), 32)
    return dict(D=D, BLOCK=block, num_warps=min(max(block // 256, 1), 16))


# Kernels that sum over rows (a gradient of a weight) run so many programs at most; each sums its rows in registers
# and writes one partial sum. No atomics: the same bits every time, and on cards of any size.
PROGRAMS = 1024

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
# walk over the queries that see them (by_key), in all heads of the group. No output is shared: no atomics, the same
# bits always.
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


@triton.jit
def _softmax(s, m, l, scale: tl.constexpr):
    """One block of scores more -> the running maximum and sum, p, and by how much what was summed before shrinks."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)                 # scale = log2(e) / sqrt(hd)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return m_new, l * shrink + tl.sum(p, 1), p, shrink


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_fwd(q, k, v, o, lse, by_query, qb, qh, qt, kb, kh, kt, vb, vh, vt, Tq, Tk, scale: tl.constexpr,
                   G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    seen, plan, n_blocks = _plan(by_query, b, rows, Tq, R, BN)
    q_tile = _load_rows(q, (qb, qh, qt), b, h, rows, Tq, HD)
    m = tl.full([BM], -1e30, tl.float32)                        # finite: -inf - -inf would be NaN
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, HD], tl.float32)
    for i in range(n_blocks):
        at = _block(plan, i) * BN
        cols = at + tl.arange(0, BN)
        k_block = _load_rows(k, (kb, kh, kt), b, h // G, cols, Tk, HD)
        s = _hide(tl.dot(q_tile, k_block.T, input_precision='ieee'), seen, at, BN)
        m, l, p, shrink = _softmax(s, m, l, scale)
        v_block = _load_rows(v, (vb, vh, vt), b, h // G, cols, Tk, HD)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision='ieee')
    l = tl.where(l > 0, l, 1.0)                                 # a row that sees nothing: acc = 0
    tl.store(lse + (b * H + h) * tl.cdiv(Tq, 128) * 128 + rows, m + tl.log2(l))
    _store_rows(o, acc * (1 / l)[:, None], (Tq * H * HD, HD, H * HD), b, h, rows, Tq, HD)


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_bwd_dq(q, k, v, o, do, dq, lse, delta, by_query, qb, qh, qt, kb, kh, kt, vb, vh, vt, Tq, Tk,
                      scale: tl.constexpr, G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr):
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    packed = (Tq * H * HD, HD, H * HD)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    seen, plan, n_blocks = _plan(by_query, b, rows, Tq, R, BN)
    q_tile = _load_rows(q, (qb, qh, qt), b, h, rows, Tq, HD)
    o_tile = _load_rows(o, packed, b, h, rows, Tq, HD)
    do_tile = _load_rows(do, packed, b, h, rows, Tq, HD)
    row_at = (b * H + h) * tl.cdiv(Tq, 128) * 128 + rows
    row_lse = tl.load(lse + row_at)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + row_at, row_delta)                         # for the other kernel
    acc = tl.zeros([BM, HD], tl.float32)
    for i in range(n_blocks):
        at = _block(plan, i) * BN
        cols = at + tl.arange(0, BN)
        k_block = _load_rows(k, (kb, kh, kt), b, h // G, cols, Tk, HD)
        v_block = _load_rows(v, (vb, vh, vt), b, h // G, cols, Tk, HD)
        s = _hide(tl.dot(q_tile, k_block.T, input_precision='ieee'), seen, at, BN)
        p = tl.exp2(s * scale - row_lse[:, None])
        ds = p * (tl.dot(do_tile, v_block.T, input_precision='ieee') - row_delta[:, None])
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision='ieee')
    _store_rows(dq, acc * (scale * 0.6931471805599453), packed, b, h, rows, Tq, HD)         # log 2: 1 / sqrt(hd)


@triton.jit(do_not_specialize=['Tq', 'Tk'])
def _attention_bwd_dkdv(q, k, v, do, dk, dv, lse, delta, by_key, qb, qh, qt, kb, kh, kt, vb, vh, vt, Tq, Tk,
                        scale: tl.constexpr, G: tl.constexpr, R: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr,
                        BN: tl.constexpr):
    h_kv, b, Hkv = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    H, packed = Hkv * G, (Tk * Hkv * HD, HD, Hkv * HD)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    seen, plan, n_blocks = _plan(by_key, b, cols, Tk, R, BM)
    k_tile = _load_rows(k, (kb, kh, kt), b, h_kv, cols, Tk, HD)
    v_tile = _load_rows(v, (vb, vh, vt), b, h_kv, cols, Tk, HD)
    dk_acc = tl.zeros([BN, HD], tl.float32)
    dv_acc = tl.zeros([BN, HD], tl.float32)
    for i in range(n_blocks * G):                               # s, p, dp and ds are transposed: (keys, queries)
        at, h = _block(plan, i // G) * BM, h_kv * G + i % G
        rows = at + tl.arange(0, BM)
        row_at = (b * H + h) * tl.cdiv(Tq, 128) * 128 + rows
        q_block = _load_rows(q, (qb, qh, qt), b, h, rows, Tq, HD)
        do_block = _load_rows(do, (Tq * H * HD, HD, H * HD), b, h, rows, Tq, HD)
        s = _hide(tl.dot(k_tile, q_block.T, input_precision='ieee'), seen, at, BM)
        p = tl.exp2(s * scale - tl.load(lse + row_at)[None, :])
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision='ieee')
        ds = p * (tl.dot(v_tile, do_block.T, input_precision='ieee') - tl.load(delta + row_at)[None, :])
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision='ieee')
    _store_rows(dk, dk_acc * (scale * 0.6931471805599453), packed, b, h_kv, cols, Tk, HD)
    _store_rows(dv, dv_acc, packed, b, h_kv, cols, Tk, HD)


# Queries and keys of a tile, num_warps, num_stages, for 16-bit inputs by head_dim: on H100 and B200 (227 KB of shared
# memory, wgmma), and on smaller cards (99 KB). Nothing spills. Those of 64 on H100 are the best of a sweep; a program
# per head of the group, with a sum afterwards, was no faster in dkdv. A tile of fwd has as many queries as one of dq
# or more, and that as one of dkdv: what the later kernels read of lse and delta, the earlier ones have written.
ATTENTION_TILES = {
    ('fwd', 64): ((64, 128, 4, 2), (128, 64, 4, 3)), ('fwd', 128): ((128, 64, 8, 3), (128, 32, 8, 2)),
    ('dq', 64): ((64, 64, 4, 3), (128, 32, 4, 2)), ('dq', 128): ((128, 64, 8, 2), (64, 32, 4, 2)),
    ('dkdv', 64): ((64, 64, 4, 3), (32, 64, 4, 2)), ('dkdv', 128): ((64, 128, 8, 2), (32, 64, 8, 2)),
    ('fwd', 256): ((64, 64, 8, 2), (64, 32, 8, 2)), ('dq', 256): ((64, 64, 8, 2), (32, 32, 4, 1)),
    ('dkdv', 256): ((32, 32, 8, 1), (32, 32, 8, 1))}


def _launch_attention(op, kernel, ranges, scale, q, k, v, *more):
    """A program per tile of queries (dkdv: of keys), head and row. The kernels take the tensors, the ranges, the
    strides of q, k and v (all others lie as (B, T, H, hd)), and the rest."""
    (B, H, Tq, HD), (Hkv, Tk) = q.shape, k.shape[1:3]
    BM, BN, num_warps, num_stages = 32, 32, 4, 1                                # fp32: exact, slow
    if q.dtype != torch.float32:
        small = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] not in (9, 10)
        BM, BN, num_warps, num_stages = ATTENTION_TILES[op, max(64, HD)][small]
    grid = (triton.cdiv(Tk, BN), Hkv, B) if op == 'dkdv' else (triton.cdiv(Tq, BM), H, B)
    _launch(kernel, grid, q, k, v, *more, ranges, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Tq, Tk, scale,
            H // Hkv, ranges.shape[2], HD, BM, BN, num_warps=num_warps, num_stages=num_stages)


@functools.partial(_op, contiguous=False)
def _attention(q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor,
               scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, hd = q.shape
    o = q.new_empty(B, T, H, hd)
    lse = q.new_empty(B, H, triton.cdiv(T, 128) * 128, dtype=torch.float32)     # whole tiles: no mask for it either
    _launch_attention('fwd', _attention_fwd, by_query, scale, q, k, v, o, lse)
    return o, lse


@functools.partial(_op, contiguous=False)
def _attention_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor, o: Tensor,
                    lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    delta = lse.new_empty(lse.shape)
    _launch_attention('dq', _attention_bwd_dq, by_query, scale, q, k, v, o, do, dq, lse, delta)
    _launch_attention('dkdv', _attention_bwd_dkdv, by_key, scale, q, k, v, do, dk, dv, lse, delta)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _attention_setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])                                      # lse
    ctx.save_for_backward(*tensors, *output)


_attention.register_autograd(
    lambda ctx, do, dlse: (*_attention_grad(do.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None),
    setup_context=_attention_setup)


def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges | Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Tq, hd), k and v (B, Hkv, Tk, hd) -> (B, H, Tq, hd), 0 where a query sees nothing. Views
    will do, of a fused qkv or a cache: only hd must be contiguous. What comes out lies as (B, Tq, H, hd): transposing
    and flattening the heads is free.

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
    o, _ = _attention(q, k, v, ranges.by_query.contiguous(), ranges.by_key.contiguous(), scale)
    return o.transpose(1, 2)[..., :hd]


# ---------------------------------------------------------------------------------------------------------
# rms_norm: s = x + residual (or x);  n = s / sqrt(mean(s^2) + eps);  y = w n
#
# Saved: s, which the residual stream needs anyway, and rstd = 1 / sqrt(...), one fp32 per row. With dn = w dy and ds,
# the gradient that reaches s from where the stream goes on:
#
#     dx = dresidual = ds + rstd (dn - n mean(dn n)),   dw = sum over rows of dy n
#
# Fused, add and norm move 4 numbers per element each way (forward: x, residual -> s, y), alone 5 and 6. Statistics in
# fp32; s and n are rounded to x's dtype before they are used on, as Hugging Face does.


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = _fp32(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * h.to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x + residual
    return rms_norm_ref(s, weight, eps), s


@triton.jit
def _rms_norm_fwd(x, residual, weight, y, s, rstd, eps: tl.constexpr, ADD: tl.constexpr,
                  D: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = cols < D, row * D + cols
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + at, inside, 0.0).to(tl.float32)
        v = v.to(s.dtype.element_ty).to(tl.float32)
        tl.store(s + at, v, inside)
    r = 1 / tl.sqrt(tl.sum(v * v) / D + eps)
    tl.store(rstd + row, r)
    n = (v * r).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + cols, inside, 0.0).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, n * w, inside)


@triton.jit
def _rms_norm_bwd(dy, ds, s, weight, rstd, dx, dw, n_rows, ADD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    first, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = cols < D
    w = tl.load(weight + cols, inside, 0.0).to(dy.dtype.element_ty).to(tl.float32)
    dw_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, n_rows, tl.num_programs(0)):
        at = row * D + cols
        g = tl.load(dy + at, inside, 0.0).to(tl.float32)
        r = tl.load(rstd + row)
        n = tl.load(s + at, inside, 0.0).to(tl.float32) * r
        dn = g * w
        d = (dn - n * (tl.sum(dn * n) / D)) * r
        if ADD: d += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, d, inside)
        dw_sum += g * n.to(dy.dtype.element_ty).to(tl.float32)
    tl.store(dw + first * D + cols, dw_sum, inside)


@_op
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)         # x (N, D)
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    if len(x): _launch(_rms_norm_fwd, (len(x),), x, residual, weight, y, s, rstd, eps, residual is not None,
                       **_row_block(x.shape[1]))
    return y, s, rstd


@_op
def _rms_norm_grad(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    n_rows, D = s.shape
    dx, dw = torch.empty_like(s), s.new_empty(min(n_rows, PROGRAMS), D, dtype=torch.float32)
    if n_rows: _launch(_rms_norm_bwd, (len(dw),), dy, ds, s, weight, rstd, dx, dw, n_rows, ds is not None,
                       **_row_block(D))
    return dx, dw.sum(0).to(weight.dtype)


def _rms_norm_save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.fused = residual is not None
    ctx.mark_non_differentiable(output[2])                                      # rstd, here and below
    ctx.save_for_backward(output[1] if ctx.fused else x, weight, output[2])


def _rms_norm_backward(ctx, dy, ds, _):
    dx, dw = _rms_norm_grad(dy.contiguous(), ds.contiguous() if ctx.fused else None, *ctx.saved_tensors)
    return dx, dx if ctx.fused else None, dw, None


_rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype."""
    assert weight.shape == x.shape[-1:], f"{x.shape=} {weight.shape=}"
    if not use_triton(x): return rms_norm_ref(x, weight, eps)
    return _rms_norm(x.reshape(-1, x.shape[-1]).contiguous(), None, weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual: (rms_norm(s), s). x and residual (..., D) of one dtype."""
    assert weight.shape == x.shape[-1:], f"{x.shape=} {weight.shape=}"
    assert (residual.shape, residual.dtype) == (x.shape, x.dtype), f"{x.shape=} {residual.shape=} {residual.dtype=}"
    if not use_triton(x): return add_rms_norm_ref(x, residual, weight, eps)
    rows = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, residual))
    y, s, _ = _rms_norm(*rows, weight, eps)
    return y.view(x.shape), s.view(x.shape)


# ---------------------------------------------------------------------------------------------------------
# rope: rotate the pairs (x_i, x_{i + hd/2}) of every query and key head by pos * theta^(-2i/hd) (RoFormer 2104.09864,
# Llama's half layout), after Qwen3's RMSNorm per head where there is one.
#
# One launch reads the projection's output q|k|v and writes q, k and v apart. Out of place: v is copied (a tenth of
# the bytes with grouped queries), but attention keeps q, k, v and the projection's output is free at once. In place,
# one buffer would serve both, and whoever else held it would see it change. A rotation's backward is the rotation
# by -pos: saved are cos and sin, which all layers share. With norms also the input and an rstd per head: x cannot be
# had back from w n when w is near 0. All of it in fp32, rounded once.


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


def rope_qkv_ref(qkv, cos, sin, n_head, n_kv_head, q_weight=None, k_weight=None, eps=1e-6):
    q, k, v = qkv.split([n_head, n_kv_head, n_kv_head], 2)
    q, k = (x if w is None else rms_norm_ref(x, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    return rope(q, cos, sin), rope(k, cos, sin), v


@triton.jit
def _rope_fwd(qkv, cos, sin, q_weight, k_weight, q, k, v, rstd, n_tokens, eps: tl.constexpr, NORM: tl.constexpr,
              H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(0) % (H + 2 * HKV)                             # neighbours: other heads of the same tokens
    t = (tl.program_id(0) // (H + 2 * HKV)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    inside = (t < n_tokens)[:, None] & (i < HD // 2)[None, :]
    at = (t[:, None] * (H + 2 * HKV) + head) * HD + i[None, :]
    x1 = tl.load(qkv + at, inside, 0.0).to(tl.float32)                  # (BLOCK, HALF)
    x2 = tl.load(qkv + at + HD // 2, inside, 0.0).to(tl.float32)
    if head < H + HKV:
        if NORM:
            r = 1 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / HD + eps)
            tl.store(rstd + t * (H + HKV) + head, r, t < n_tokens)
            w = q_weight if head < H else k_weight
            x1 *= r[:, None] * tl.load(w + i, i < HD // 2, 0.0).to(tl.float32)[None, :]
            x2 *= r[:, None] * tl.load(w + HD // 2 + i, i < HD // 2, 0.0).to(tl.float32)[None, :]
        angle = t[:, None] * (HD // 2) + i[None, :]
        c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
        x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s
    if head < H: to = q + (t[:, None] * H + head) * HD + i[None, :]
    elif head < H + HKV: to = k + (t[:, None] * HKV + head - H) * HD + i[None, :]
    else: to = v + (t[:, None] * HKV + head - H - HKV) * HD + i[None, :]
    tl.store(to, x1, inside)
    tl.store(to + HD // 2, x2, inside)


@triton.jit
def _rope_bwd(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, rstd, dqkv, dw, n_tokens, NORM: tl.constexpr,
              H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    head, block = tl.program_id(0) % (H + 2 * HKV), tl.program_id(0) // (H + 2 * HKV)
    t, i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    half = i < HD // 2
    inside = (t < n_tokens)[:, None] & half[None, :]
    if head < H: frm = dq + (t[:, None] * H + head) * HD + i[None, :]
    elif head < H + HKV: frm = dk + (t[:, None] * HKV + head - H) * HD + i[None, :]
    else: frm = dv + (t[:, None] * HKV + head - H - HKV) * HD + i[None, :]
    g1 = tl.load(frm, inside, 0.0).to(tl.float32)
    g2 = tl.load(frm + HD // 2, inside, 0.0).to(tl.float32)
    at = (t[:, None] * (H + 2 * HKV) + head) * HD + i[None, :]
    if head < H + HKV:
        angle = t[:, None] * (HD // 2) + i[None, :]
        c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
        g1, g2 = g1 * c + g2 * s, g2 * c - g1 * s                       # back by the same angle
        if NORM:                                                        # as in _rms_norm_bwd, in two halves
            r = tl.load(rstd + t * (H + HKV) + head, t < n_tokens, 0.0)[:, None]
            n1 = tl.load(qkv + at, inside, 0.0).to(tl.float32) * r
            n2 = tl.load(qkv + at + HD // 2, inside, 0.0).to(tl.float32) * r
            part = dw + (block.to(tl.int64) * (H + HKV) + head) * HD + i
            tl.store(part, tl.sum(g1 * n1, 0), half)
            tl.store(part + HD // 2, tl.sum(g2 * n2, 0), half)
            w = q_weight if head < H else k_weight
            g1 *= tl.load(w + i, half, 0.0).to(tl.float32)[None, :]
            g2 *= tl.load(w + HD // 2 + i, half, 0.0).to(tl.float32)[None, :]
            mean = ((tl.sum(g1 * n1, 1) + tl.sum(g2 * n2, 1)) / HD)[:, None]
            g1, g2 = (g1 - n1 * mean) * r, (g2 - n2 * mean) * r
    tl.store(dqkv + at, g1, inside)
    tl.store(dqkv + at + HD // 2, g2, inside)


def _rope_grid(B, T, H, HKV, hd):
    """BLOCK tokens of one head per program, 1024 pairs."""
    half = triton.next_power_of_2(hd // 2)
    block = max(1024 // half, 1)
    return triton.cdiv(B * T, block), dict(H=H, HKV=HKV, HD=hd, HALF=half, BLOCK=block, num_warps=4)


@_op
def _rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
              H: int, HKV: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, _, hd = qkv.shape
    q, k, v = (qkv.new_empty(B, T, n, hd) for n in (H, HKV, HKV))
    rstd = qkv.new_empty((0,) if q_weight is None else (B, T, H + HKV), dtype=torch.float32)
    n_blocks, shape = _rope_grid(B, T, H, HKV, hd)
    if n_blocks: _launch(_rope_fwd, (n_blocks * (H + 2 * HKV),), qkv, cos, sin, q_weight, k_weight, q, k, v, rstd,
                         B * T, eps, q_weight is not None, **shape)
    return q, k, v, rstd


@_op
def _rope_qkv_grad(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor | None,
                   q_weight: Tensor | None, k_weight: Tensor | None,
                   rstd: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, hd), HKV = dq.shape, dk.shape[2]
    n_blocks, shape = _rope_grid(B, T, H, HKV, hd)
    dqkv = dq.new_empty(B, T, H + 2 * HKV, hd)
    dw = cos.new_empty(n_blocks, H + HKV, hd if qkv is not None else 0)             # a partial sum per program
    if n_blocks: _launch(_rope_bwd, (n_blocks * (H + 2 * HKV),), dq, dk, dv, qkv, cos, sin, q_weight, k_weight, rstd,
                         dqkv, dw, B * T, qkv is not None, **shape)
    return dqkv, dw[:, :H].sum((0, 1)), dw[:, H:].sum((0, 1))


def _rope_qkv_save(ctx, inputs, output):
    qkv, cos, sin, q_weight, k_weight, *_ = inputs
    normed = q_weight is not None
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(cos, sin, *((qkv, q_weight, k_weight, output[3]) if normed else ()))


def _rope_qkv_backward(ctx, dq, dk, dv, _):
    cos, sin, *normed = ctx.saved_tensors
    dqkv, dqw, dkw = _rope_qkv_grad(dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin,
                                    *(normed or [None] * 4))
    dqw, dkw = (dqw.to(normed[1].dtype), dkw.to(normed[2].dtype)) if normed else (None, None)
    return dqkv, None, None, dqw, dkw, None, None, None


_rope_qkv.register_autograd(_rope_qkv_backward, setup_context=_rope_qkv_save)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, q_weight: Tensor | None = None,
             k_weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, H + 2 Hkv, hd), the heads of q, k, v one after the other; cos, sin (B, T, hd/2) fp32; q_weight and
    k_weight (hd,): norms before the rotation, both or none. Returns q (B, T, H, hd), k and v (B, T, Hkv, hd).
    Hkv = 0: queries alone; H = 0: keys and values alone."""
    B, T, heads, hd = qkv.shape
    assert heads == n_head + 2 * n_kv_head and hd % 2 == 0, f"{qkv.shape=} {n_head=} {n_kv_head=}"
    assert cos.shape == sin.shape == (B, T, hd // 2), f"{qkv.shape=} {cos.shape=} {sin.shape=}"
    assert (q_weight is None) == (k_weight is None), "norms on both q and k, or on neither"
    if not use_triton(qkv): return rope_qkv_ref(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight, eps)
    return _rope_qkv(qkv.contiguous(), cos.float().contiguous(), sin.float().contiguous(), q_weight, k_weight,
                     n_head, n_kv_head, eps)[:3]


# ---------------------------------------------------------------------------------------------------------
# rope_attention: QK-norm, RoPE and attention in one kernel, straight from the outputs of the projections, for sampling
# in rows of a few hundred tokens. There rope_qkv and attention are bound by launches, and by what they write for each
# other; joined, q is read once, k and v once per tile of queries, and only o is written. A program owns a tile of
# queries of one head, walks over the keys, and rotates those that are not cached: every tile does so anew. The two
# halves of a rotated head meet in two products: s = q1 k1^T + q2 k2^T.


def rope_attention_ref(q, kv, rot, kv_rot, q_weight, k_weight, eps, other=None, mask=None):
    q, _, _ = rope_qkv_ref(q, *rot, q.shape[2], 0, q_weight, k_weight, eps)
    _, k, v = rope_qkv_ref(kv, *kv_rot, 0, q.shape[2], q_weight, k_weight, eps)
    if other is not None: k, v = (torch.cat(pair, 1) for pair in zip(other, (k, v)))
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


@triton.jit
def _rotated(x, stride, rows, n, weight, cos, sin, eps: tl.constexpr, HD: tl.constexpr, HALF: tl.constexpr):
    """The halves (len(rows), HALF) of one head, x, normed and rotated."""
    i = tl.arange(0, HALF)
    inside, at = (rows < n)[:, None] & (i < HD // 2)[None, :], rows[:, None] * stride + i[None, :]
    x1, x2 = tl.load(x + at, inside, 0.0).to(tl.float32), tl.load(x + at + HD // 2, inside, 0.0).to(tl.float32)
    r = 1 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / HD + eps)
    x1 *= r[:, None] * tl.load(weight + i, i < HD // 2, 0.0).to(tl.float32)[None, :]
    x2 *= r[:, None] * tl.load(weight + HD // 2 + i, i < HD // 2, 0.0).to(tl.float32)[None, :]
    angle = rows[:, None] * (HD // 2) + i[None, :]
    c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
    return (x1 * c - x2 * s).to(x.dtype.element_ty), (x2 * c + x1 * s).to(x.dtype.element_ty)


@triton.jit
def _attend(q1, q2, k1, k2, v, seen, m, l, acc, scale: tl.constexpr):
    """One block of keys more -> m, l, acc, as in _attention_fwd."""
    s = tl.dot(q1, k1.T, input_precision='ieee')
    s = tl.where(seen[None, :], tl.dot(q2, k2.T, s, input_precision='ieee'), -float('inf'))
    m, l, p, shrink = _softmax(s, m, l, scale)
    return m, l, tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision='ieee')


@triton.jit
def _rope_attention_fwd(q, kv, k2, v2, mask, o, cos, sin, kv_cos, kv_sin, q_weight, k_weight, q_batch, q_row, kv_batch,
                        kv_row, mask_batch, N, M, M2, scale: tl.constexpr, eps: tl.constexpr, OTHER: tl.constexpr,
                        H: tl.constexpr, HD: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, cols, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, HALF)
    d = tl.arange(0, 2 * HALF)                                  # of v: all of a head
    angles = b * (HD // 2)
    q1, q2 = _rotated(q + b * q_batch + h * HD, q_row, rows, N, q_weight, cos + angles * N, sin + angles * N, eps, HD,
                      HALF)
    m, l = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, 2 * HALF], tl.float32)
    if OTHER:
        for start in range(0, M2, BN):
            j = start + cols
            at = ((b * M2 + j[:, None]) * H + h) * HD
            half = (j < M2)[:, None] & (i < HD // 2)[None, :]
            a1, a2 = tl.load(k2 + at + i[None, :], half, 0.0), tl.load(k2 + at + HD // 2 + i[None, :], half, 0.0)
            v = tl.load(v2 + at + d[None, :], (j < M2)[:, None] & (d < HD)[None, :], 0.0)
            seen = tl.load(mask + b * mask_batch + j, j < M2, 0) != 0
            m, l, acc = _attend(q1, q2, a1, a2, v, seen, m, l, acc, scale)
    kv += b * kv_batch + h * HD
    for start in range(0, M, BN):
        j = start + cols
        a1, a2 = _rotated(kv, kv_row, j, M, k_weight, kv_cos + angles * M, kv_sin + angles * M, eps, HD, HALF)
        v = tl.load(kv + H * HD + j[:, None] * kv_row + d[None, :], (j < M)[:, None] & (d < HD)[None, :], 0.0)
        m, l, acc = _attend(q1, q2, a1, a2, v, j < M, m, l, acc, scale)
    to = ((b * N + rows[:, None]) * H + h) * HD + d[None, :]
    tl.store(o + to, (acc / l[:, None]).to(o.dtype.element_ty), (rows < N)[:, None] & (d < HD)[None, :])


ROPE_ATTENTION_FEW = 1 << 13                                    # rows of heads: small tiles make more programs of them


def _rope_attention_tiles(B, N, H):
    few = B * N * H < ROPE_ATTENTION_FEW
    BM = (16 if N <= 128 else 32) if few else 64 if N <= 64 else 128
    return dict(BM=BM, BN=64, num_warps=8 if BM == 128 else 4, num_stages=1)


def rope_attention_pays(B: int, N: int, H: int, hd: int) -> bool:
    """Measured on an H100: faster with few rows, or where a tile or two hold all queries; beyond that each tile rotates
    the keys again. Heads wider than 128 do not fit in the registers."""
    return hd <= 128 and (B * N * H < ROPE_ATTENTION_FEW or N * hd <= 8192)


@functools.partial(_op, contiguous=False)
def _rope_attention(q: Tensor, kv: Tensor, k2: Tensor | None, v2: Tensor | None, mask: Tensor | None, cos: Tensor,
                    sin: Tensor, kv_cos: Tensor, kv_sin: Tensor, q_weight: Tensor, k_weight: Tensor,
                    eps: float) -> Tensor:
    (B, N, H, hd), M = q.shape, kv.shape[1]
    o, half = q.new_empty(B, N, H, hd), max(triton.next_power_of_2(hd // 2), 16)
    tiles = _rope_attention_tiles(B, N, H)
    if o.numel(): _launch(
        _rope_attention_fwd, (triton.cdiv(N, tiles['BM']), H, B), q, kv, k2, v2, mask, o, cos, sin, kv_cos, kv_sin,
        q_weight, k_weight, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), 0 if mask is None else mask.stride(0),
        N, M, 0 if k2 is None else k2.shape[1], hd ** -0.5 * math.log2(math.e), eps, k2 is not None, H, hd, half,
        **tiles)
    return o


def rope_attention(q: Tensor, kv: Tensor, rot, kv_rot, q_weight: Tensor, k_weight: Tensor, eps: float, other=None,
                   mask: Tensor | None = None) -> Tensor:
    """q (B, N, H, hd) sees kv (B, M, 2H, hd), keys and values one after the other, both before norm and rotation by
    the rotary tables rot and kv_rot, (cos, sin) of (B, N or M, hd/2) in fp32; views of one projection will do. other:
    cached keys and values (B, M2, H, hd), rotated already; mask (B, 1, 1, M2 + M) bool: which of these exist, all of kv
    do. -> (B, N, H, hd). Forward only."""
    (B, N, H, hd), M, M2 = q.shape, kv.shape[1], 0 if other is None else other[0].shape[1]
    assert kv.shape == (B, M, 2 * H, hd) and hd % 2 == 0 and M, f"{q.shape=} {kv.shape=}"
    assert all(t.shape == (B, n, hd // 2) and t.is_contiguous() for n, r in ((N, rot), (M, kv_rot)) for t in r), \
        f"{q.shape=} {kv.shape=} {[t.shape for t in (*rot, *kv_rot)]}"
    assert q.stride()[2:] == kv.stride()[2:] == (hd, 1), f"{q.stride()=} {kv.stride()=}"
    assert q.dtype == kv.dtype and all((t.shape, t.dtype) == ((B, M2, H, hd), q.dtype) for t in other or ()), \
        f"{q.shape=} {q.dtype=} {kv.dtype=} {[(t.shape, t.dtype) for t in other or ()]}"
    assert mask is None or (mask.shape, mask.dtype, mask.stride(3)) == ((B, 1, 1, M2 + M), torch.bool, 1), \
        f"{mask.shape=} {mask.dtype=} {mask.stride()=}"
    if not use_triton(q): return rope_attention_ref(q, kv, rot, kv_rot, q_weight, k_weight, eps, other, mask)
    k2, v2 = (None, None) if other is None else (t.contiguous() for t in other)
    if other is not None and mask is None: mask = q.new_ones(B, 1, 1, M2 + M, dtype=torch.bool)
    return _rope_attention(q, kv, k2, v2, mask, *rot, *kv_rot, q_weight.contiguous(), k_weight.contiguous(), eps)


# ---------------------------------------------------------------------------------------------------------
# swiglu: y = silu(g) u of the fused projection [g | u], silu(g) = g sigma(g)
#
#     du = dy silu(g),   dg = dy u sigma(g) (1 + g (1 - sigma(g)))
#
# Saved: the projection alone; sigma and silu are recomputed. A program takes a piece of a row: widths such as
# 4864 = 19 x 256 would waste 41% of a block of 8192.


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_fwd(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr):
    pieces: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row, col = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_up + row * 2 * F + col, col < F, 0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * F + F + col, col < F, 0.0).to(tl.float32)
    tl.store(y + row * F + col, g * tl.sigmoid(g) * u, col < F)


@triton.jit
def _swiglu_bwd(dy, gate_up, dgate_up, F: tl.constexpr, BLOCK: tl.constexpr):
    pieces: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row, col = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dy + row * F + col, col < F, 0.0).to(tl.float32)
    g = tl.load(gate_up + row * 2 * F + col, col < F, 0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * F + F + col, col < F, 0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(dgate_up + row * 2 * F + col, d * u * sigma * (1 + g * (1 - sigma)), col < F)
    tl.store(dgate_up + row * 2 * F + F + col, d * g * sigma, col < F)


SWIGLU = dict(BLOCK=1024, num_warps=4)


@_op
def _swiglu(gate_up: Tensor) -> Tensor:
    n_rows, width = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(n_rows, width)
    if n_rows: _launch(_swiglu_fwd, (n_rows * triton.cdiv(width, SWIGLU['BLOCK']),), gate_up, y, width, **SWIGLU)
    return y


@_op
def _swiglu_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    n_rows, width = dy.shape
    out = torch.empty_like(gate_up)
    if n_rows: _launch(_swiglu_bwd, (n_rows * triton.cdiv(width, SWIGLU['BLOCK']),), dy, gate_up, out, width, **SWIGLU)
    return out


_swiglu.register_autograd(lambda ctx, dy: _swiglu_grad(dy.contiguous(), *ctx.saved_tensors),
                          setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2F), gate first -> (..., F)."""
    assert gate_up.shape[-1] % 2 == 0, f"{gate_up.shape=}"
    if not use_triton(gate_up): return swiglu_ref(gate_up)
    y = _swiglu(gate_up.reshape(-1, gate_up.shape[-1]).contiguous())
    return y.view(*gate_up.shape[:-1], y.shape[1])


# ---------------------------------------------------------------------------------------------------------
# linear_cross_entropy: for rows i with hidden h_i, target y_i and logits z_i = W h_i (column `skip_col` removed)
#
#     L = sum_i (a_i + b_i sg(p_i)) CE_i,   CE_i = logsumexp(z_i) - z_i[y_i],   p_i = exp(-CE_i)
#     dL/dz_i = (a_i + b_i p_i) (softmax(z_i) - onehot(y_i))
#
# The weights go in, so the gradient is known in the forward: a chunk of logits is turned into its gradient at
# once and dropped. Saved: dH (N, D) and dW (V, D), never the (N, V) logits. The backward multiplies both by the
# incoming scalar; a vector of per-row losses would need the rows' own factors (the bug of a popular kernel).
# Per chunk: cuBLAS logits, a kernel that reads them twice (the first time for max and sum in one sweep: the sum is
# rescaled when the maximum grows) and writes the gradient over them, cuBLAS for dH and, in fp32, for dW.


def linear_cross_entropy_ref(h, weight, targets, a, b=None, skip_col=None):
    """The specification: all logits at once, autograd for the gradient. Same arguments and results as below."""
    z = _fp32(F.linear(h, weight))
    if skip_col is not None: z = z.index_fill(1, torch.tensor([skip_col], device=z.device), -torch.inf)
    used = a != 0 if b is None else (a != 0) | (b != 0)
    z = torch.where(used[:, None], z, 0.0)                               # unused rows must not make 0 * inf
    ce = F.cross_entropy(z, targets, reduction='none')
    ce = torch.where(used, ce, 0.0)
    w = a if b is None else a + b * (-ce.detach()).exp()
    return (w * ce).sum(), ce.detach()


@triton.jit
def _ce_load(z, c, skip_col, V):
    """`skip_col` in the load's mask would cut it to 4 bytes per thread, from 16."""
    return tl.where(c == skip_col, -float('inf'), tl.load(z + c, c < V, -float('inf')).to(tl.float32))


@triton.jit
def _ce_rows(z, targets, a, b, ce, w, skip_col, V, HAS_B: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
             GROUP: tl.constexpr):
    """One row per program; each group of GROUP neighbours, which one thread holds, has its own running maximum and
    sum, so that threads wait for each other only once. Never autotune it: a second run would read gradients for
    logits. A constant V would let the compiler unroll the loops until registers spill."""
    row = tl.program_id(0).to(tl.int64)                                 # row * V exceeds 2^31
    z += row * V
    cols = tl.arange(0, BLOCK)
    weight = tl.load(a + row)
    scale = tl.load(b + row) if HAS_B else 0.0
    if (weight != 0) | (scale != 0):
        y = tl.load(targets + row)
        z_y = tl.load(z + y, y != skip_col, -float('inf')).to(tl.float32)
        m = tl.full((BLOCK // GROUP,), -1e30, tl.float32)               # finite: -inf - -inf would be NaN
        total = tl.zeros((BLOCK // GROUP,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.reshape(_ce_load(z, start + cols, skip_col, V), (BLOCK // GROUP, GROUP))
            new = tl.maximum(m, tl.max(x, 1))
            total = total * tl.exp(m - new) + tl.sum(tl.exp(x - new[:, None]), 1)
            m = new
        best = tl.max(m)
        lse = best + tl.log(tl.sum(total * tl.exp(m - best)))
        weight += scale * tl.exp(z_y - lse)
        tl.store(ce + row, lse - z_y)
        tl.store(w + row, weight)
        if GRAD:
            for start in range(0, V, BLOCK):
                c = start + cols
                x = _ce_load(z, c, skip_col, V)
                tl.store(z + c, weight * (tl.exp(x - lse) - tl.where(c == y, 1.0, 0.0)), c < V)
    else:                                                               # padding: its logits may be anything
        tl.store(ce + row, 0.0)
        tl.store(w + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                tl.store(z + start + cols, tl.zeros((BLOCK,), tl.float32), start + cols < V)


CE_ROWS = dict(BLOCK=8192, GROUP=16, num_warps=16)


def _ce_rows_torch(z, y, a, b, skip_col, grad):
    """What _ce_rows does: logits (n, V) -> ce, weights (n,) and the gradient in z's dtype."""
    dtype, z = z.dtype, z.float()
    if skip_col is not None: z[:, skip_col] = -torch.inf
    lse = z.logsumexp(1)
    used = a != 0 if b is None else (a != 0) | (b != 0)
    ce = torch.where(used, lse - z.gather(1, y[:, None]).squeeze(1), 0.0)
    w = a if b is None else a + b * (-ce).exp()
    if not grad: return ce, w, None
    dz = z.sub_(lse[:, None]).exp_()                                     # softmax, in place
    dz.scatter_add_(1, y[:, None], torch.full_like(dz[:, :1], -1.0))
    return ce, w, dz.mul_(w[:, None]).masked_fill_(~used[:, None], 0.0).to(dtype)


def _ce_rows_triton(z, y, a, b, skip_col, grad):
    ce, w = torch.empty_like(a), torch.empty_like(a)
    block = CE_ROWS | dict(BLOCK=min(CE_ROWS['BLOCK'], max(triton.next_power_of_2(z.shape[1]), CE_ROWS['GROUP'])))
    _ce_rows[(len(z),)](z, y, a, b, ce, w, -1 if skip_col is None else skip_col, z.shape[1],
                        b is not None, grad, **block)
    return ce, w, z


def _add_outer(total, dz, h):
    """total + dz^T h in fp32; total None = 0."""
    if not dz.is_cuda or dz.dtype == torch.float32:
        return (dz.T @ h).float() if total is None else total.add_(dz.T @ h)
    if total is None: return torch.mm(dz.T, h, out_dtype=torch.float32)
    return torch.addmm(total, dz.T, h, out_dtype=torch.float32, out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, a, b, skip_col, chunk):
        rows_kernel = _ce_rows_triton if use_triton(h) else _ce_rows_torch
        ce, w = torch.empty_like(a), torch.empty_like(a)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight, grad = None, any(ctx.needs_input_grad[:2])
        head = weight.to(h.dtype)
        for s in range(0, len(h), chunk):
            rows = slice(s, s + chunk)
            ce[rows], w[rows], dz = rows_kernel(h[rows] @ head.T, targets[rows], a[rows],
                                                None if b is None else b[rows], skip_col, grad)     # (n, V)
            if dh is not None: torch.mm(dz, head, out=dh[rows])
            if ctx.needs_input_grad[1]: dweight = _add_outer(dweight, dz, h[rows])
            del dz                                                      # or two chunks of logits would be alive
        if ctx.needs_input_grad[1] and dweight is None: dweight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(dh, dweight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce)
        return (w * ce).sum(), ce

    @staticmethod
    def backward(ctx, g, _):
        """Out of place: a graph that is kept may be asked again. It costs 0.4 ms for a head of 152k x 896."""
        dh, dweight = ctx.saved_tensors
        dh = None if dh is None else dh * g.to(dh.dtype)
        dweight = None if dweight is None else (dweight * g).to(ctx.weight_dtype)
        return dh, dweight, None, None, None, None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, a: Tensor, b: Tensor | None = None,
                         skip_col: int | None = None, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """h (N, D) hidden rows, weight (V, D), targets (N,) int64, a and b (N,) fp32 -> (loss scalar, ce (N,) fp32,
    detached; 0 in rows whose a and b are 0: padding of a static bucket). `skip_col` is left out of the softmax.
    chunk: rows of logits in memory at a time; 0 = up to 2.5 GiB of them with Triton, 2^27 logits without."""
    assert h.ndim == 2 and weight.ndim == 2 and h.shape[1] == weight.shape[1], f"{h.shape=} {weight.shape=}"
    assert targets.shape == a.shape == h.shape[:1], f"{h.shape=} {targets.shape=} {a.shape=}"
    assert a.dtype == torch.float32 and (b is None or (b.dtype, b.shape) == (a.dtype, a.shape)), f"{a.dtype=}"
    if not torch.is_grad_enabled(): h, weight = h.detach(), weight.detach()      # no gradient work in forward
    if torch.is_autocast_enabled(h.device.type): h = h.to(torch.get_autocast_dtype(h.device.type))
    logits = (5 << 29) // h.element_size() if use_triton(h) else 1 << 27
    n_chunks = -(-len(h) // max(logits // len(weight), 1))
    chunk = chunk or max(-(-len(h) // max(n_chunks, 1)), 1)                     # of equal size
    with torch.autocast(h.device.type, enabled=False):
        b = None if b is None else b.contiguous()
        return _LinearCrossEntropy.apply(h.contiguous(), weight, targets.contiguous(), a.contiguous(), b, skip_col,
                                         chunk)


# ---------------------------------------------------------------------------------------------------------
# cosine_alignment: L = sum_i w_i (1 - c_i),  c_i = <s_i, t_i> / (S_i T_i) at selected rows, S = max(|s|, eps), T alike
#
#     dL/ds_i = -w_i (t_i / T_i - c_i s_i / S_i) / S_i        (without the second term where |s| < eps)
#
# Rows are read where they lie, no gathered copies. Saved: <s, t>, S, T, three numbers per row (and the states, which
# live anyway). The gradient is dense: zeros, and the selected rows. A row of weight 0 writes nothing, so padding
# that repeats a row is harmless; rows with a weight must be distinct.


def cosine_alignment_ref(student, teacher, weights, rows=None, teacher_rows=None, eps=1e-6):
    s = _fp32(student if rows is None else student[rows])
    t = _fp32(teacher if teacher_rows is None else teacher[teacher_rows])
    c = (s * t).sum(-1) / (s.norm(dim=-1).clamp(min=eps) * t.norm(dim=-1).clamp(min=eps))
    return (weights * (1 - c)).sum()


@triton.jit
def _cosine_fwd(student, teacher, weights, rows, teacher_rows, saved, loss, n, eps: tl.constexpr,
                D: tl.constexpr, BLOCK: tl.constexpr):
    i, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    s = tl.load(student + tl.load(rows + i) * D + cols, cols < D, 0.0).to(tl.float32)
    t = tl.load(teacher + tl.load(teacher_rows + i) * D + cols, cols < D, 0.0).to(tl.float32)
    dot, S, T = tl.sum(s * t), tl.maximum(tl.sqrt(tl.sum(s * s)), eps), tl.maximum(tl.sqrt(tl.sum(t * t)), eps)
    tl.store(saved + i, dot)
    tl.store(saved + n + i, S)
    tl.store(saved + 2 * n + i, T)
    tl.store(loss + i, tl.load(weights + i) * (1 - dot / (S * T)))


@triton.jit
def _cosine_bwd(g, student, teacher, weights, rows, teacher_rows, saved, grad, n, eps: tl.constexpr,
                D: tl.constexpr, BLOCK: tl.constexpr):
    i, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    w = tl.load(weights + i)
    if w != 0:
        at = tl.load(rows + i) * D + cols
        s = tl.load(student + at, cols < D, 0.0).to(tl.float32)
        t = tl.load(teacher + tl.load(teacher_rows + i) * D + cols, cols < D, 0.0).to(tl.float32)
        dot, S, T = tl.load(saved + i), tl.load(saved + n + i), tl.load(saved + 2 * n + i)
        c = tl.where(S > eps, dot / (S * T), 0.0)
        tl.store(grad + at, -tl.load(g) * w * (t / T - c * s / S) / S, cols < D)


class _CosineAlignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, weights, rows, teacher_rows, eps):
        n, ctx.eps = len(weights), eps
        saved, loss = weights.new_empty(3, n), torch.empty_like(weights)
        if n: _cosine_fwd[(n,)](student, teacher, weights, rows, teacher_rows, saved, loss, n, eps,
                                **_row_block(student.shape[1]))
        ctx.save_for_backward(student, teacher, weights, rows, teacher_rows, saved)
        return loss.sum()

    @staticmethod
    def backward(ctx, g):
        student, _, weights, *_ = ctx.saved_tensors
        grad, n = torch.zeros_like(student), len(weights)
        *read, saved = ctx.saved_tensors
        if n: _cosine_bwd[(n,)](g.float().contiguous(), *read, saved, grad, n, ctx.eps, **_row_block(student.shape[1]))
        return grad, None, None, None, None, None


def cosine_alignment(student: Tensor, teacher: Tensor, weights: Tensor, rows: Tensor | None = None,
                     teacher_rows: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """student (N, D), teacher (M, D), weights (n,) fp32 -> scalar fp32 sum_i w_i (1 - cos(student[rows[i]],
    teacher[teacher_rows[i]])). rows, teacher_rows (n,) int64, None = all in order; rows whose weight is not 0 must be
    distinct. The teacher gets no gradient."""
    assert student.ndim == teacher.ndim == 2, f"{student.shape=} {teacher.shape=}"
    assert student.shape[1] == teacher.shape[1], f"{student.shape=} {teacher.shape=}"
    assert weights.dtype == torch.float32 and weights.ndim == 1, f"{weights.dtype=} {weights.shape=}"
    for at, x in ((rows, student), (teacher_rows, teacher)):
        assert len(weights) == len(x if at is None else at), f"{weights.shape=} {x.shape=}"
    teacher = teacher.detach()
    if not use_triton(student): return cosine_alignment_ref(student, teacher, weights, rows, teacher_rows, eps)
    every = torch.arange(len(weights), device=weights.device) if rows is None or teacher_rows is None else None
    return _CosineAlignment.apply(student.contiguous(), teacher.contiguous(), weights.contiguous(),
                                  every if rows is None else rows, every if teacher_rows is None else teacher_rows, eps)


# ---------------------------------------------------------------------------------------------------------
# modulate: adaLN (DiT 2212.09748) with RMSNorm, per batch row b, after the gated sum of the branch before it
#
#     s = x + gate_b h (or x),   n = s / sqrt(mean(s^2) + eps),   y = n (1 + scale_b) + shift_b
#
# Saved: s, rstd = 1 / sqrt(...), and h. With dn = dy (1 + scale_b) and ds, the gradient from where s goes on:
#
#     dx = ds + rstd (dn - n mean(dn n)),   dh = gate_b dx,   dgate_b = sum_t dx h
#     dscale_b = sum_t dy n,   dshift_b = sum_t dy
#
# The sums over t are partial sums of programs, added up afterwards: deterministic.


def modulate_ref(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    h = _fp32(x)
    n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (n * (1 + _fp32(scale)[:, None]) + shift[:, None]).to(x.dtype)


def add_modulate_ref(x, h, gate, scale, shift, eps=1e-6):
    s = (_fp32(x) + gate[:, None] * _fp32(h)).to(x.dtype)
    return modulate_ref(s, scale, shift, eps), s


@triton.jit
def _modulate_fwd(x, h, gate, scale, shift, y, s, rstd, T, eps: tl.constexpr, ADD: tl.constexpr,
                  D: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at, per_batch = cols < D, row * D + cols, row // T * D + cols
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        g = tl.load(gate + per_batch, inside, 0.0).to(tl.float32)
        v += g * tl.load(h + at, inside, 0.0).to(tl.float32)
        v = v.to(s.dtype.element_ty).to(tl.float32)
        tl.store(s + at, v, inside)
    r = 1 / tl.sqrt(tl.sum(v * v) / D + eps)
    tl.store(rstd + row, r)
    up = 1 + tl.load(scale + per_batch, inside, 0.0).to(tl.float32)
    tl.store(y + at, v * r * up + tl.load(shift + per_batch, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _modulate_bwd(dy, ds, s, h, gate, scale, rstd, dx, dh, dgate, dscale, dshift, T, ADD: tl.constexpr,
                  D: tl.constexpr, BLOCK: tl.constexpr):
    first, b, cols = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside, part = cols < D, (b * tl.num_programs(0) + first) * D + cols
    scale_sum, shift_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if ADD: gate_sum = tl.zeros((BLOCK,), tl.float32)
    for t in range(first, T, tl.num_programs(0)):
        at = (b * T + t) * D                        # one number; vectors cost registers
        g, r = tl.load(dy + at + cols, inside, 0.0).to(tl.float32), tl.load(rstd + b * T + t)
        n = tl.load(s + at + cols, inside, 0.0).to(tl.float32) * r
        scale_sum += g * n
        shift_sum += g
        dn = g * (1 + tl.load(scale + b * D + cols, inside, 0.0).to(tl.float32))    # not kept: registers are scarce
        d = (dn - n * (tl.sum(dn * n) / D)) * r
        if ADD:
            d += tl.load(ds + at + cols, inside, 0.0).to(tl.float32)
            tl.store(dh + at + cols, d * tl.load(gate + b * D + cols, inside, 0.0).to(tl.float32), inside)
            gate_sum += d * tl.load(h + at + cols, inside, 0.0).to(tl.float32)
        tl.store(dx + at + cols, d, inside)
    tl.store(dscale + part, scale_sum, inside)
    tl.store(dshift + part, shift_sum, inside)
    if ADD: tl.store(dgate + part, gate_sum, inside)


@_op
def _modulate(x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, D), y, rstd = x.shape, torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)
    s = x.new_empty(0) if h is None else torch.empty_like(x)
    if B * T: _launch(_modulate_fwd, (B * T,), x, h, gate, scale, shift, y, s, rstd, T, eps, h is not None,
                      **_row_block(D))
    return y, s, rstd


@_op
def _modulate_grad(dy: Tensor, ds: Tensor | None, s: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor,
                   rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, D), add = s.shape, h is not None
    dx, dh = torch.empty_like(s), torch.empty_like(s) if add else s.new_empty(0)
    programs = min(T, max(PROGRAMS // max(B, 1), 1))
    sums = [s.new_empty(B, n, D, dtype=torch.float32) for n in (programs if add else 0, programs, programs)]
    if B * T: _launch(_modulate_bwd, (programs, B), dy, ds, s, h, gate, scale, rstd, dx, dh, *sums, T, add,
                      **_row_block(D))
    dgate, dscale, dshift = (x.sum(1).to(scale.dtype) for x in sums)
    return dx, dh, dgate if add else s.new_empty(0), dscale, dshift


def _modulate_save(ctx, inputs, output):
    x, h, gate, scale, _, _ = inputs
    ctx.fused = h is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1] if ctx.fused else x, h, gate, scale, output[2])


def _modulate_backward(ctx, dy, ds, _):
    dx, dh, dgate, dscale, dshift = _modulate_grad(dy.contiguous(), ds.contiguous() if ctx.fused else None,
                                                   *ctx.saved_tensors)
    return dx, dh if ctx.fused else None, dgate if ctx.fused else None, dscale, dshift, None


_modulate.register_autograd(_modulate_backward, setup_context=_modulate_save)


def _modulate_rows(x, h, gate, scale, shift, eps):
    """-> y, s in x's shape; with one modulation for all, the batch is one long row."""
    B, T, D = x.shape
    assert scale.shape == shift.shape and scale.shape in ((B, D), (1, D)), f"{x.shape=} {scale.shape=} {shift.shape=}"
    assert scale.dtype == shift.dtype, f"{scale.dtype=} {shift.dtype=}"
    rows = [None if t is None else t.reshape(len(scale), B // max(len(scale), 1) * T, D).contiguous() for t in (x, h)]
    y, s, _ = _modulate(*rows, None if gate is None else gate.contiguous(), scale.contiguous(), shift.contiguous(), eps)
    return y.view(x.shape), s if h is None else s.view(x.shape)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """x (B, T, D), scale and shift (B, D) of one dtype, or (1, D) for all -> rms(x) (1 + scale) + shift (B, T, D) in
    x's dtype."""
    if not use_triton(x): return modulate_ref(x, scale, shift, eps)
    return _modulate_rows(x, None, None, scale, shift, eps)[0]


def add_modulate(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
                 eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """s = x + gate h: (modulate(s, scale, shift), s). x and h (B, T, D) of one dtype; gate, scale, shift alike."""
    assert (h.shape, h.dtype) == (x.shape, x.dtype), f"{x.shape=} {h.shape=} {x.dtype=} {h.dtype=}"
    assert (gate.shape, gate.dtype) == (scale.shape, scale.dtype), f"{gate.shape=} {scale.shape=} {gate.dtype=}"
    if not use_triton(x): return add_modulate_ref(x, h, gate, scale, shift, eps)
    return _modulate_rows(x, h, gate, scale, shift, eps)


# ---------------------------------------------------------------------------------------------------------
# head_argmax: the likeliest token of each row, argmax_v h . weight_v, without the logits in memory.
#
# For few rows the head is one pass over its weight, 1 GB for V = 248,320 and D = 2048 in bf16; 64 rows of fp32 logits
# would be written and read again, 64 MB each. A program multiplies 64 rows by 128 columns and keeps the best of each
# row and its place; PyTorch finds the best of V / 128 of them. Many rows are a matter of compute: cuBLAS's, in chunks.
HEAD_ARGMAX = dict(ROWS=64, COLS=128, DEPTH=64, num_warps=4, num_stages=4)
HEAD_ARGMAX_ROWS = 128                                                  # at most, with the kernel


def _head_argmax_tiles(itemsize):
    """fp32 needs twice the shared memory per number: half the depth."""
    return HEAD_ARGMAX | dict(DEPTH=HEAD_ARGMAX['DEPTH'] * 2 // itemsize)


def head_argmax_ref(h: Tensor, weight: Tensor, chunk: int = 1 << 27) -> Tensor:
    return torch.cat([head_logits(rows, weight).argmax(-1) for rows in h.split(max(chunk // len(weight), 1))])


@triton.jit
def _head_argmax(h, weight, best, place, N, V, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                 DEPTH: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    row, col, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tile * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
    z = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, D, DEPTH):
        at = start + k
        a = tl.load(h + row[:, None] * D + at[None, :], (row < N)[:, None] & (at < D)[None, :], 0.0)
        b = tl.load(weight + col[None, :] * D + at[:, None], (col < V)[None, :] & (at < D)[:, None], 0.0)
        z = tl.dot(a, b, z, input_precision='ieee')
    z = tl.where((col < V)[None, :], z, -float('inf'))
    value, index = tl.max(z, 1, return_indices=True)
    to = row * tl.num_programs(0) + tile
    tl.store(best + to, value, row < N)
    tl.store(place + to, tile * COLS + index, row < N)


@torch.no_grad()
def head_argmax(h: Tensor, weight: Tensor) -> Tensor:
    """h (N, D), weight (V, D) -> (N,) int64. The products of bf16 are summed, and compared, in fp32."""
    (N, D), V = h.shape, len(weight)
    assert weight.shape == (V, D), f"{h.shape=} {weight.shape=}"
    h, weight = h.contiguous(), weight.to(h.dtype).contiguous()
    if not use_triton(h) or not 0 < N <= HEAD_ARGMAX_ROWS: return head_argmax_ref(h, weight)
    tiles = triton.cdiv(V, HEAD_ARGMAX['COLS'])
    best, place = h.new_empty(N, tiles, dtype=torch.float32), h.new_empty(N, tiles, dtype=torch.int64)
    _head_argmax[(tiles, triton.cdiv(N, HEAD_ARGMAX['ROWS']))](
        h, weight, best, place, N, V, D, **_head_argmax_tiles(h.element_size()))
    return place.gather(1, best.argmax(1, keepdim=True)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------
# row_noise: a counter-based generator of standard normal numbers, a function of (seed of the row, stream, place in the
# row) alone, whatever the batch and the device: a sample does not depend on its neighbours. 32-bit hashes of the place
# (lowbias32), keyed by the row, then Box-Muller: place j has the cosine of pair j, the second half of a row the sines.
# In PyTorch that is some thirty passes over int64.


def row_noise_ref(seeds: Tensor, shape, stream: int = 0) -> Tensor:
    n, low = math.prod(shape), 0xFFFFFFFF

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7feb352d) & low
        x = ((x ^ (x >> 15)) * 0x846ca68b) & low
        return x ^ (x >> 16)
    key = mix(mix(seeds & low) ^ ((seeds >> 32) & low)) ^ mix(torch.full_like(seeds, stream + 1) * 0x9e3779b1 & low)
    i = torch.arange(2 * -(-n // 2), device=seeds.device)
    u = (mix(mix(i ^ key[:, None]) + key[:, None] & low).float() + 0.5) * 2.0 ** -32
    radius, angle = (-2 * u[:, ::2].clamp(min=2.0 ** -33).log()).clamp(min=0).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n].view(-1, *shape)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7feb352d                            # uint32: products wrap
    x = (x ^ (x >> 15)) * 0x846ca68b
    return x ^ (x >> 16)


@triton.jit
def _uniform(i, key):
    return (_mix(_mix(i ^ key) + key).to(tl.float32) + 0.5) * 2.3283064365386963e-10        # 2^-32


@triton.jit(do_not_specialize=['stream'])
def _row_noise(seeds, out, n, stream, BLOCK: tl.constexpr):
    row, half = tl.program_id(0).to(tl.int64), (n + 1) // 2
    seed = tl.load(seeds + row)
    key = _mix(_mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) ^ _mix((stream + 1).to(tl.uint32) * 0x9e3779b1)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = tl.maximum(_uniform((2 * pair).to(tl.uint32), key), 1.1641532182693481e-10)         # 2^-33
    radius = tl.sqrt(tl.maximum(-2 * tl.log(u), 0))
    angle = 6.283185307179586 * _uniform((2 * pair + 1).to(tl.uint32), key)
    out += row * n + pair
    tl.store(out, radius * tl.cos(angle), pair < half)
    tl.store(out + half, radius * tl.sin(angle), half + pair < n)


def row_noise(seeds: Tensor, shape, stream: int = 0) -> Tensor:
    """seeds (B,) int64 -> (B, *shape) fp32."""
    assert seeds.dtype == torch.int64, f"{seeds.dtype=}"
    if not use_triton(seeds): return row_noise_ref(seeds, shape, stream)
    n, seeds = math.prod(shape), seeds.contiguous()
    out = torch.empty(len(seeds), n, device=seeds.device)
    if out.numel(): _row_noise[(len(seeds), triton.cdiv(n, 1024))](seeds, out, n, stream, BLOCK=512)
    return out.view(-1, *shape)


# ---------------------------------------------------------------------------------------------------------
# unmask: candidate tokens for the samplers. argmax(z + G) with Gumbel noise G = -log E draws from softmax(z).
# E = -log1p(-u), u = (r + 1/2) 2^-32 with integer r: fp32 resolves the small E (the large G) to 2^-33, where
# -log(-log u) with fp32 u stops at 16.6 and cuts the tail of a large vocabulary. u = 1 would make E infinite.


def head_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h (..., D), weight (V, D) -> fp32 logits (..., V). The product of bf16 states is kept in fp32: in bf16, logits
    near 20 are 0.125 apart, and the largest one is often a tie."""
    weight = weight.to(h.dtype)
    if not h.is_cuda or h.dtype == torch.float32: return (h @ weight.T).float()
    with torch.autocast('cuda', enabled=False):
        return torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32).view(*h.shape[:-1], -1)


def exponential_noise(shape, generator: torch.Generator) -> Tensor:
    """Exponential(1) draws in fp32, on the generator's device."""
    r = torch.randint(0, 2 ** 32, shape, generator=generator, device=generator.device)
    return -torch.log1p(-((r.float() + 0.5) * 2.0 ** -32).clamp(max=1 - 2.0 ** -24))


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf outside the top_k largest (0 = all) and outside the smallest set of mass >= top_p. (N, V) fp32."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        z = logits.sort(descending=True).values
        p = z.softmax(-1)
        n = (p.cumsum(-1) - p < top_p).sum(1, keepdim=True).clamp(min=1) # by the mass before the token; the first stays
        logits = logits.masked_fill(logits < z.gather(1, n - 1), -torch.inf)
    return logits


def unmask(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """One candidate token per row. logits (N, V) -> (N,) int64. temperature 0 = argmax. Filters act after the
    temperature, as in Hugging Face's generate."""
    z = logits.float()
    if temperature == 0: return z.argmax(-1)
    assert generator is not None, "temperature > 0 needs a generator: randomness has a seed here"
    token = None
    if 0 < top_k < z.shape[1]: z, token = z.topk(top_k)                  # noise for the candidates only
    z = filter_logits(z / temperature, top_p=top_p)
    best = (z - exponential_noise(z.shape, generator).log()).argmax(-1)
    return best if token is None else token.gather(1, best[:, None]).squeeze(1)
