"""The arithmetic that decides the speed, in plain PyTorch so far: each section has its mathematics and one public
function, with a separate reference `foo_ref` where that is not the function itself. Nothing here knows models.

    ranges        which keys a query sees: documents, padding, causal order, two ranges for block diffusion
    attention     scaled dot-product attention over those ranges
    rms_norm, rope, swiglu
    linear_cross_entropy   the loss at the masked rows, logits never larger than a chunk
    unmask        from logits to candidate tokens, for the samplers
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------
# ranges: query i of row b sees the keys j with start <= j < end for (start, end) in by_query[b, i]; by_key is
# the transpose (which queries see key j), for the backward of a kernel. R = 1 range serves documents, padding,
# causal order and caches; R = 2 serves block diffusion, where xt sees its own block and the clean prefix.


class Ranges(NamedTuple):
    """Attention ranges, int32, half open. by_query (B, Tq, R, 2) in key positions, by_key (B, Tk, R, 2) in
    query positions. An empty range is (0, 0)."""
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


def ranges_to_mask(ranges: Ranges) -> Tensor:
    """The dense boolean mask (B, 1, Tq, Tk) that the ranges describe, True = visible."""
    q = ranges.by_query
    j = torch.arange(ranges.by_key.shape[1], device=q.device)
    return ((j >= q[..., :1]) & (j < q[..., 1:])).any(2).unsqueeze(1)    # (B, Tq, R, Tk) -> (B, 1, Tq, Tk)


# ---------------------------------------------------------------------------------------------------------
# attention: softmax(q k^T / sqrt(hd)) v over the visible keys; grouped queries share a key head.


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Tq, hd), k and v (B, Hkv, Tk, hd) -> (B, H, Tq, hd). mask: (B, 1, Tq, Tk) bool from
    `ranges_to_mask`, or None: every key, or (causal) every key up to the query."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.shape[1] != k.shape[1])


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
