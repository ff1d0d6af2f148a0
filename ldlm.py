"""Latent diffusion: denoise the features of a frozen language model in a latent space that is learned on the way.

    h  = features of a chunk of text, from a frozen autoregressive model       z0 = encoder(h)
    zt = alpha_t z0 + sigma_t eps        (t = 0 clean, t = 1 noise)            z_hat = denoiser(zt, t, z_sc)
    L  = |z_hat - z0|^2  +  |decoder(z0 + s eps') - h|^2  +  CE(token_decoder(sg[h_hat]))

After LDLM (arXiv 2605.07933, "[P]") as read by the Open-dLLM README ("[R]"); "[S]" marks our own suggestions.
Four components make joint training work [R]: the decoder is trained by MSE, and the token loss stops at its output;
a share of the denoiser's gradient [P: all] reaches the encoder through a warm-up, and is scaled nowhere else;
timesteps are drawn so that the loss is linear in a uniform number; the decoder's input is noisy.

A row of data is [separator | prefix | chunk], one chunk of a document per row, filled up with EOS, which is modelled.

    python train.py config/ldlm_quickstart.py
"""
import dataclasses
import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import kernels as K
from encoder import Encoder
from model import MLP, Objective, RMSNorm

GOLDEN = 0.618034


# ---- schedules -----------------------------------------------------------------------------------------------


def tangent_alpha_sigma(t, d=3.0):
    """alpha_t^2 = 1 / (1 + d^2 tan^2(pi t / 2)) [R]: the logSNR is -2 ln(d tan(pi t / 2)). t: a tensor in [0, 1]."""
    angle = t * (math.pi / 2)
    cos, sin = angle.cos(), d * angle.sin()
    norm = (cos * cos + sin * sin).sqrt()
    return cos / norm, sin / norm


def cubic_alpha_sigma(t):
    """alpha_t^2 = 1 - t^3: what the Open-dLLM code has in the tangent's place; for comparison only."""
    return (1 - t ** 3).clamp(min=0).sqrt(), (t ** 3).sqrt()


def encoder_grad_scale(step, warmup_steps, k=10.0, c=0.8, g_min=1e-3):
    """g(step): by how much the encoder feels the denoiser, from g_min to 1 along a sigmoid (Eq. 29-30) [R]."""
    if step >= warmup_steps: return 1.0
    S = lambda x: 1 / (1 + math.exp(-k * (x - c)))
    return g_min + (1 - g_min) * (S(step / warmup_steps) - S(0)) / (S(1) - S(0))


class AdaptiveTimesteps(nn.Module):
    """t = F^-1(xi) with F(t) = (L(t) - L(0)) / (L(1) - L(0)): the loss becomes linear in xi (Eq. 5) [R].

    The design is ours [S]: decayed sums and counts of the loss per bin of t (the ratio has no start-up bias), made
    monotone (isotonic fit); F is linear between the edges, and a share `uniform` of the draws stays uniform, so no bin
    can starve. Until every bin was seen, t = xi. `memory`: how many samples the averages look back on."""

    def __init__(self, n_bins=64, memory=2048, uniform=0.1, every=20):
        super().__init__()
        self.n_bins, self.memory, self.uniform, self.every = n_bins, memory, uniform, every
        self.register_buffer('bins', torch.zeros(2, n_bins))                    # decayed sums of the loss, counts
        self.register_buffer('cdf', torch.linspace(0, 1, n_bins + 1))           # F at the edges
        self.register_buffer('n_updates', torch.zeros((), dtype=torch.int64))

    def quantile(self, xi):
        """F^-1: xi (n,) in [0, 1] -> t (n,)."""
        xi = xi.to(self.cdf)
        at = torch.searchsorted(self.cdf, xi, right=True).clamp(1, self.n_bins)
        lo, hi = self.cdf[at - 1], self.cdf[at]
        return ((at - 1 + (xi - lo) / (hi - lo)) / self.n_bins).clamp(0, 1)

    def sample(self, n, u=None):
        """n stratified draws: xi_i = frac(u + i golden ratio); u: a number in [0, 1), drawn here if None."""
        u = torch.rand(()).item() if u is None else u
        return self.quantile(((u + GOLDEN * torch.arange(n, dtype=torch.float64)) % 1).to(self.cdf))

    def bin(self, t, loss, weight=None):
        """t and loss (n,) -> (2, n_bins), sums of the loss and counts: additive over micro-steps and ranks."""
        weight = torch.ones_like(loss) if weight is None else weight
        at = (t * self.n_bins).long().clamp(max=self.n_bins - 1)
        return loss.new_zeros(2, self.n_bins).index_add_(1, at, torch.stack([loss * weight, weight]))

    def update(self, t, loss): self.update_bins(self.bin(t, loss.float()))

    def update_bins(self, new):
        new = new.to(self.bins)
        self.bins.mul_((-new[1].sum() / self.memory).exp()).add_(new)
        self.n_updates += 1
        if self.n_updates % self.every or not (self.bins[1] > 0.01).all(): return
        mean = isotonic(*self.bins.double().cpu())                              # at the centres
        inner, first, last = (mean[1:] + mean[:-1]) / 2, mean[1] - mean[0], mean[-1] - mean[-2]
        edges = torch.cat([(mean[:1] - first / 2).clamp(min=0), inner, mean[-1:] + last / 2])
        if not edges[-1] > edges[0]: return
        F_ = (edges - edges[0]) / (edges[-1] - edges[0])
        self.cdf.copy_((1 - self.uniform) * F_ + self.uniform * torch.linspace(0, 1, len(F_)))


def isotonic(sums, counts):
    """The non-decreasing fit to the means sums / counts, weighted by counts (pool adjacent violators)."""
    pools = []                                                                  # sum, count, number of bins
    for pool in zip(sums.tolist(), counts.tolist(), [1] * len(sums)):
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            pool = tuple(map(sum, zip(pools.pop(), pool)))
        pools.append(pool)
    return torch.cat([torch.full((n,), s / c, dtype=torch.float64) for s, c, n in pools])


# ---- what is trained -----------------------------------------------------------------------------------------


@dataclass
class LatentConfig:
    """[R] paper: n_embd 768, 12 DiT layers, 6 Perceiver layers of kind 'joint', 3 layers of token decoder, adaLN.
    [R] README: n_embd 2048 or 5120, 4 DiT layers without adaLN, 4 Perceiver layers of kind 'split', 2 of token decoder.
    n_ff is 8/3 n_embd there, rounded."""
    vocab_size: int               # the encoder's
    feature_dim: int              # its width
    max_seq_len: int              # tokens of a row: 1 separator, at most prefix_len of prefix, the chunk
    prefix_len: int = 0           # tokens of context that the denoiser looks back to; 0 = it writes from nothing only
    n_latents: int = 0            # 0 = one per token of the chunk
    latent_dim: int = 0           # smaller than n_embd: a bottleneck; 0 = n_embd
    n_embd: int = 768
    n_head: int = 12
    n_ff: int = 2048
    n_layer: int = 12             # of the denoiser
    perceiver_layers: int = 6     # of encoder and decoder, each
    decoder_layers: int = 3       # of the token decoder
    perceiver_block: str = 'joint'      # attention over [latents; inputs] (14 d^2); 'split': self, then cross (16 d^2)
    perceiver_skip: bool = True   # queries start with the input at their place: no alignment to find first [S]
    dit_adaln: bool = True        # False: plain blocks, the time is added to the latents (12 d^2 instead of 18 d^2)
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.chunk_len = self.max_seq_len - 1 - self.prefix_len
        self.n_latents, self.latent_dim = self.n_latents or self.chunk_len, self.latent_dim or self.n_embd
        for wrong, why in (
                (self.chunk_len < 1,
                 f"seq_len must exceed 1 + prefix_len, got {self.max_seq_len} and {self.prefix_len}"),
                (min(self.n_layer, self.perceiver_layers, self.decoder_layers) < 1 or min(
                    self.prefix_len, self.n_latents, self.latent_dim) < 0,
                 "n_layer, perceiver_layers and decoder_layers must be at least 1, other sizes at least 0"),
                (self.perceiver_block not in ('joint', 'split'),
                 f"perceiver_block must be joint or split, got {self.perceiver_block!r}"),
                (self.n_embd % self.n_head or self.n_embd // self.n_head % 2,
                 f"n_embd / n_head must be even, got {self.n_embd} / {self.n_head}")):
            if wrong: raise SystemExit(why)


class Attention(nn.Module):
    """x (B, N, d) looks at itself (`own`), at another sequence (`other`), or at both at once, each with keys and
    values of its own projection. QK-norm, then RoPE. mask (B, 1, 1, keys): which keys exist, those of `other` first."""

    def __init__(self, cfg, own, other):
        super().__init__()
        d = cfg.n_embd
        self.n_head, self.head_dim, self.own = cfg.n_head, d // cfg.n_head, own
        if own: self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        else: self.q_proj = nn.Linear(d, d, bias=False)
        if other: self.kv_proj = nn.Linear(d, 2 * d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, cfg.norm_eps) for _ in range(2))

    def _split(self, y): return y.unflatten(2, (-1, self.head_dim))

    def _heads(self, y, rot, n_head, n_kv_head):
        return K.rope_qkv(y, *rot, n_head, n_kv_head, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def keys(self, other, rot):
        """Keys and values (B, M, heads, hd) of another sequence (B, M, d)."""
        return self._heads(self._split(self.kv_proj(other)), rot, 0, self.n_head)[1:]

    def forward(self, x, rot, other=None, other_rot=None, mask=None):
        """other: (B, M, d); with `own`, also its keys(...)."""
        H, y = self.n_head, self._split(self.qkv_proj(x) if self.own else self.q_proj(x))
        if self.own and torch.is_tensor(other): other = self.keys(other, other_rot)
        fused = not (self.training or torch.is_grad_enabled()) and (self.own or mask is None)
        if fused and K.rope_attention_pays(*x.shape[:2], H, self.head_dim):
            kv, kv_rot = (y[:, :, H:], rot) if self.own else (self._split(self.kv_proj(other)), other_rot)
            y = K.rope_attention(y[:, :, :H], kv, rot, kv_rot, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps,
                                 other if self.own else None, mask)
            return self.o_proj(y.flatten(2))
        if self.own: q, k, v = self._heads(y, rot, H, H)
        else: q, k, v = self._heads(y, rot, H, 0)[0], *self.keys(other, other_rot)
        if self.own and other is not None: k, v = (torch.cat(pair, 1) for pair in zip(other, (k, v)))
        y = K.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def add_norm(norm, x, delta):
    """-> norm(x + delta), x + delta: the sum is formed inside the norm. delta None: nothing to add."""
    return (norm(x), x) if delta is None else norm(delta, x)


def add_modulate(x, delta, scale, shift, eps):
    """The same for adaLN; delta: a branch and its gate."""
    return (K.modulate(x, scale, shift, eps), x) if delta is None else K.add_modulate(x, *delta, scale, shift, eps)


class PerceiverBlock(nn.Module):
    """The residual stream is x + delta, as in model.Block: every sum is left to the norm that follows it."""

    def __init__(self, cfg, kind):
        super().__init__()
        norm = lambda: RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_norm, self.self_attn = norm(), Attention(cfg, own=True, other=kind == 'joint')
        if kind == 'split': self.cross_norm, self.cross_attn = norm(), Attention(cfg, own=False, other=True)
        self.mlp_norm, self.mlp, self.joint = norm(), MLP(cfg), kind == 'joint'

    def forward(self, x, delta, rot, inputs, inputs_rot, has_looked=False):
        """has_looked: x is behind the self-attention already."""
        if not has_looked:
            y, x = add_norm(self.self_norm, x, delta)
            delta = self.self_attn(y, rot, *((inputs, inputs_rot) if self.joint else ()))
        if not self.joint:
            y, x = add_norm(self.cross_norm, x, delta)
            delta = self.cross_attn(y, rot, inputs, inputs_rot)
        y, x = add_norm(self.mlp_norm, x, delta)
        return x, self.mlp(y)


class DiTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.adaln = nn.Linear(cfg.n_embd, 6 * cfg.n_embd) if cfg.dit_adaln else None
        if not cfg.dit_adaln: self.attn_norm, self.mlp_norm = (RMSNorm(cfg.n_embd, cfg.norm_eps) for _ in range(2))
        self.attn, self.mlp, self.eps = Attention(cfg, own=True, other=cfg.prefix_len > 0), MLP(cfg), cfg.norm_eps

    def forward(self, x, delta, mod, rot, context=None, context_rot=None, mask=None):
        """mod: the six modulations (B or 1, d) that self.adaln makes of the time, or None. delta with them: what is
        to be added, and its gate."""
        if mod is None:
            y, x = add_norm(self.attn_norm, x, delta)
            y, x = self.mlp_norm(self.attn(y, rot, context, context_rot, mask), x)
            return x, self.mlp(y)
        scale1, shift1, gate1, scale2, shift2, gate2 = mod
        y, x = add_modulate(x, delta, scale1, shift1, self.eps)
        y, x = add_modulate(x, (self.attn(y, rot, context, context_rot, mask), gate1), scale2, shift2, self.eps)
        return x, (self.mlp(y), gate2)


class LatentModel(nn.Module):
    """Encoder, decoder, token decoder and denoiser. A position of a chunk is 0 to L - 1, of a latent spread evenly over
    that, of the prefix negative: RoPE (all attention here has it) aligns the three."""

    def __init__(self, cfg: LatentConfig):
        super().__init__()
        self.cfg, self.activation_checkpointing, self.rots = cfg, False, {}
        d, dl, kind = cfg.n_embd, cfg.latent_dim, cfg.perceiver_block
        project = lambda n_in, n_out: nn.Identity() if n_in == n_out else nn.Linear(n_in, n_out, bias=False)
        blocks = lambda n, block, *args: nn.ModuleList(block(cfg, *args) for _ in range(n))
        table = lambda n: nn.Parameter(torch.empty(n, d))
        self.encoder_queries, self.encoder_pos = table(cfg.n_latents), table(cfg.chunk_len)
        self.encoder_in, self.encoder_out = project(cfg.feature_dim, d), project(d, dl)
        self.encoder = blocks(cfg.perceiver_layers, PerceiverBlock, kind)
        self.decoder_queries, self.decoder_pos = table(cfg.chunk_len), table(cfg.n_latents)
        self.decoder_in, self.decoder_out = project(dl, d), project(d, cfg.feature_dim)
        self.decoder = blocks(cfg.perceiver_layers, PerceiverBlock, kind)
        self.token_decoder_in, self.token_decoder_norm = project(cfg.feature_dim, d), RMSNorm(d, cfg.norm_eps)
        self.token_decoder = blocks(cfg.decoder_layers, PerceiverBlock, 'split')
        self.head = nn.Linear(d, cfg.vocab_size, bias=False)
        if cfg.dit_adaln:
            self.dit_in, self.dit_mod = nn.Linear(2 * dl, d), nn.Linear(d, 2 * d)
            self.dit_time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        else:
            self.dit_in, self.dit_norm = project(dl, d), RMSNorm(d, cfg.norm_eps)
            self.dit_self_cond = nn.Parameter(torch.empty(dl))
        self.dit_context = nn.Linear(cfg.feature_dim, d, bias=False) if cfg.prefix_len else None
        self.dit, self.dit_out = blocks(cfg.n_layer, DiTBlock), nn.Linear(d, dl)
        self.register_buffer('feature_stats', torch.tensor([[0.], [1.]]).repeat(1, cfg.feature_dim))    # mean, std
        self.register_buffer('latent_sums', torch.zeros(3, cfg.n_latents, dl))          # decayed sums of z, z^2, counts
        self.timesteps = AdaptiveTimesteps()
        if self.head.weight.device.type != 'meta': self.init_weights()

    def init_weights(self):
        """Matrices N(0, 1 / inputs), into a residual stream smaller (GPT-2), adaLN and the denoiser's output zero;
        queries, positions and the head 0.02, so that latents differ by what they see, not by where they are [S]."""
        zero = ('adaln.weight', 'dit_mod.weight', 'dit_out.weight', 'dit_self_cond', 'bias')
        for name, p in self.named_parameters():
            if name.endswith(zero): nn.init.zeros_(p)
            elif p.ndim < 2: nn.init.ones_(p)
            elif name.endswith(('_queries', '_pos', 'head.weight')): nn.init.normal_(p, std=0.02)
            else:
                last = name.endswith(('o_proj.weight', 'down_proj.weight'))
                depth = len(getattr(self, name.split('.')[0])) if last else 0.5
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1] * 2 * depth))

    # -- what train.py wants to know of any model
    @property
    def layers(self): return nn.ModuleList([*self.encoder, *self.decoder, *self.token_decoder, *self.dit])

    def freeze(self, names): raise SystemExit("freeze_layers is for objectives that train a Transformer, not for ldlm")

    def fused_rows(self):
        d = self.cfg.n_embd
        return dict(qkv_proj=[d] * 3, kv_proj=[d] * 2, gate_up_proj=[self.cfg.n_ff] * 2, adaln=[d] * 6)

    def n_params(self, embedding=True, part=''):
        """embedding=False: without learned queries and positions, and the head. part: of those that start so."""
        tables = ('head', '_queries', '_pos')
        return sum(p.numel() for n, p in self.named_parameters()
                   if n.startswith(part) and (embedding or not any(table in n for table in tables)))

    def flops_per_token(self, seq_len):
        """6 per weight and position, and the self-conditioning pass of half the rows; the frozen encoder, the prefix,
        attention scores and what is done once per row (time, adaLN) are left out."""
        dit = self.n_params(part='dit')
        every = sum(p.numel() for n, p in self.named_parameters() if n.startswith('dit') and not any(
            part in n for part in ('dit_time', 'dit_mod', 'adaln', 'dit_context', 'kv_proj')))
        return 6 * (self.n_params() - dit) * self.cfg.chunk_len / seq_len + 7 * every * self.cfg.n_latents / seq_len

    # -- the four networks
    def _run(self, blocks, x, delta, *args):
        """-> x, delta behind the blocks."""
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, *args, use_reentrant=False, preserve_rng_state=False)
            else: x, delta = block(x, delta, *args)
        return x, delta

    def _rot(self, what, B):
        """cos, sin (B, N, hd/2) of chunk tokens, latents or the prefix, made once."""
        c, device = self.cfg, self.head.weight.device
        if (what, B, device) not in self.rots:
            if what == 'prefix': pos = torch.arange(-c.prefix_len, 0, device=device)
            elif what == 'tokens': pos = torch.arange(c.chunk_len, device=device)
            else: pos = (torch.arange(c.n_latents, device=device) + 0.5) * (c.chunk_len / c.n_latents) - 0.5
            self.rots[what, B, device] = K.rope_tables(pos.repeat(B, 1), c.n_embd // c.n_head, 1e4)
        return self.rots[what, B, device]

    def _cast(self, x):
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _start(self, queries, inputs):
        """Learned queries (N, d), and with the skip the mean of the inputs (B, M, d) that lie at each query's place."""
        x = self._cast(queries.expand(len(inputs), -1, -1))
        if not self.cfg.perceiver_skip: return x
        N, M = len(queries), inputs.shape[1]
        if N == M: return x + inputs
        pool = F.adaptive_avg_pool1d(torch.eye(M, device=x.device, dtype=x.dtype), N)      # (M, N)
        return x + pool.T @ inputs                          # the pooling's own backward is not deterministic on GPUs

    def encode(self, h):
        """Normalised features (B, L, F) -> latents (B, n_latents, latent_dim), each of RMS 1, without statistics."""
        B = len(h)
        inputs = self._cast(self.encoder_in(h) + self.encoder_pos)
        x = self._start(self.encoder_queries, inputs)
        x, delta = self._run(self.encoder, x, None, self._rot('latents', B), inputs, self._rot('tokens', B))
        return F.rms_norm(self.encoder_out(x + delta).float(), (self.cfg.latent_dim,), eps=1e-10)

    def normalise(self, z, rows=0):
        """Subtract the running mean of each latent and dimension, divide by the running deviation of each dimension.
        The values use the running statistics, the gradient those of each `rows` of z (0: of all; 1: the running mean):
        batch renormalisation, 1702.03275 [S], in groups that do not depend on how a batch is cut.
        Were they constants to it, the denoiser would be paid for shrinking z towards a constant as fast as they follow;
        with one mean for all latents, for a constant of each latent. Both happened: see LOG.md."""
        s, square, n = self.latent_sums                                                 # (K, latent_dim) each
        mean, square = (torch.where(n > 0, x / n.clamp(min=1e-8), start) for x, start in ((s, 0.0), (square, 1.0)))
        rstd = (square - mean * mean).mean(0).clamp(min=1e-6).rsqrt()
        if not torch.is_grad_enabled(): return (z - mean) * rstd
        z = z.unflatten(0, (-1, rows or len(z)))                                        # (groups, rows, K, latent_dim)
        group_mean = z.mean(1, keepdim=True) if z.shape[1] > 1 else mean
        x = z - group_mean
        std = (x.square().mean((1, 2), keepdim=True) + 1e-6).sqrt()
        return (x / std * (std * rstd).detach() + ((group_mean - mean) * rstd).detach()).flatten(0, 1)

    def decoder_start(self, B):
        """The decoder's queries (B, L, d) behind the first self-attention, where nothing of the latents is in them yet:
        blocks of kind 'split' without skip. Else None."""
        if self.cfg.perceiver_skip or self.cfg.perceiver_block == 'joint': return None
        x, block = self._cast(self.decoder_queries.expand(B, -1, -1)).contiguous(), self.decoder[0]
        return x + block.self_attn(block.self_norm(x), self._rot('tokens', B))

    def decode(self, z, start=None):
        """Latents -> features (B, L, F), normalised ones. Each latent is brought to RMS 1, be it noisy as in training,
        clean or denoised [S]. The last block ends in a linear layer: it can shrink. start: decoder_start(B), if it is
        known already."""
        B, z = len(z), F.rms_norm(z, z.shape[2:], eps=1e-10)
        inputs, blocks = self._cast(self.decoder_in(z) + self.decoder_pos), self.decoder
        args = self._rot('tokens', B), inputs, self._rot('latents', B)
        if start is None: x, delta = self._start(self.decoder_queries, inputs), None
        else: (x, delta), blocks = blocks[0](start, None, *args, True), blocks[1:]
        x, delta = self._run(blocks, x, delta, *args)
        return self.decoder_out(x + delta).float()

    def token_states(self, h):
        """Features -> (B, L, d), what the head turns into logits."""
        x, rot = self._cast(self.token_decoder_in(h)), self._rot('tokens', len(h))
        return add_norm(self.token_decoder_norm, *self._run(self.token_decoder, x, None, rot, x, rot))[0]

    def modulations(self, t):
        """All that depends on t (B,) alone, for a fixed grid computable once: per block, and for the output."""
        d = self.cfg.n_embd
        freq = torch.exp(-math.log(1e4) / (d // 2) * torch.arange(d // 2, device=t.device))
        angle = 1000 * t[:, None].float() * freq
        emb = torch.cat([angle.cos(), angle.sin()], 1)
        if not self.cfg.dit_adaln: return [None] * len(self.dit), emb
        c = F.silu(self.dit_time(emb))
        return [block.adaln(c).chunk(6, 1) for block in self.dit], self.dit_mod(c).chunk(2, 1)

    def prefix_keys(self, context):
        """The prefix's features (B, P, F) -> keys and values for each block of the denoiser, the same at every step."""
        x, rot = self._cast(self.dit_context(context)), self._rot('prefix', len(context))
        return [block.attn.keys(x, rot) for block in self.dit]

    def denoise(self, zt, mods, z_sc, context=None, seen=None):
        """z_hat (B, n_latents, latent_dim) in fp32. mods: modulations(t), t (B,) or (1,) for all. context (B, P, F):
        the prefix's features, right-aligned, or their prefix_keys; seen (B, P) bool: which of its positions exist."""
        (per_block, last), B, P = mods, len(zt), self.cfg.prefix_len
        if self.cfg.dit_adaln: x = self.dit_in(torch.cat([zt, z_sc], -1))
        else: x = self._cast(self.dit_in(torch.addcmul(zt, z_sc, self.dit_self_cond.to(zt))) + last[:, None])
        rot, contexts, mask = self._rot('latents', B), [None] * len(self.dit), None
        if P:
            mask = torch.cat([seen, seen.new_ones(B, x.shape[1])], 1)[:, None, None]
            is_raw = torch.is_tensor(context)
            contexts = [self._cast(self.dit_context(context))] * len(self.dit) if is_raw else context
        delta = None
        for block, mod, other in zip(self.dit, per_block, contexts):
            x, delta = self._run([block], x, delta, mod, rot, other, self._rot('prefix', B) if P else None, mask)
        if self.cfg.dit_adaln: x, _ = add_modulate(x, delta, *last, self.cfg.norm_eps)
        else: x, _ = add_norm(self.dit_norm, x, delta)
        return self.dit_out(x).float()

    # -- files
    def in_dtype(self, dtype):
        """The same network with matrices and biases in `dtype`, and shared with this one where they have it already."""
        cast = {n for n, p in self.named_parameters() if p.ndim > 1 or n.endswith('bias')}
        with torch.device('meta'): twin = LatentModel(self.cfg)
        twin.load_state_dict({n: x.to(dtype) if n in cast else x for n, x in self.state_dict().items()}, assign=True)
        return twin.train(self.training)

    def save_pretrained(self, path, tokenizer=None, dlm=None, dtype=None, max_shard_bytes=0):
        """config.json + one model.safetensors of weights (in `dtype`) and statistics (fp32) + the tokenizer."""
        path = Path(path); path.mkdir(parents=True, exist_ok=True)
        params = {n for n, _ in self.named_parameters()}
        save_file({n: x.detach().to('cpu', dtype if n in params else None).contiguous().clone()
                   for n, x in self.state_dict().items()}, path / 'model.safetensors', metadata={'format': 'pt'})
        if tokenizer is not None: tokenizer.save(path)
        (path / 'config.json').write_text(json.dumps(dict(model_type='ldlm', dlm=dlm), indent=1))


# ---- the objective -------------------------------------------------------------------------------------------


class LDLM(Objective):
    """encoder: an Encoder, frozen; model: a LatentModel, trained. sigma_dec: noise on the decoder's input; 3 [P] is too
    much where latents are few or narrow: at that level one holds at most latent_dim / 2 log2(1 + 1 / sigma_dec^2) bits
    [D]. vary_sigma: each row has a level of its own, uniform from 0 to sigma_dec, so that the decoder knows clean
    latents [S]; False: all have sigma_dec [R]. encoder_grad: the share of the denoiser's gradient that reaches the
    encoder after encoder_warmup steps; with all of it [P] latents fell into a few directions, which are easy to
    denoise, and kept the text in others, too small to survive noise (LOG.md). adaptive: AdaptiveTimesteps, else t is
    uniform. self_cond: the rows of odd number see the model's own first guess [R: one half]. stats_rows: how many rows
    share the statistics of LatentModel.normalise's gradient. For comparison only: schedule cubic, and feature_loss
    False, where the token loss trains decoder and encoder, too, in place of |h_hat - h|^2."""
    name, estimator, judge = 'ldlm', 'none: no likelihood', ''
    one_chunk_per_row = True
    compiled = ''                                                       # of its samplers, see Sampler

    def __init__(self, encoder, model, separator=None, eos_id=None, sigma_dec=3.0, tangent_d=3.0, encoder_warmup=0,
                 encoder_grad=0.1, vary_sigma=True, adaptive=True, self_cond=True, stats_rows=16, schedule='tangent',
                 feature_loss=True):
        super().__init__(model, None, separator, eos_id)
        if model.cfg.prefix_len and not getattr(encoder, 'causal', True):
            raise SystemExit(f"{encoder.path} is not causal: its features of the prefix would tell what follows")
        if schedule not in ('tangent', 'cubic'):
            raise SystemExit(f"schedule must be tangent or cubic, got {schedule!r}")
        if stats_rows < 1: raise SystemExit(f"stats_rows must be at least 1, got {stats_rows}")
        if sigma_dec < 0 or tangent_d <= 0:
            raise SystemExit(f"sigma_dec must be at least 0, tangent_d above 0: {sigma_dec=}, {tangent_d=}")
        if encoder_warmup < 0 or not 0 <= encoder_grad <= 1:
            raise SystemExit(f"encoder_warmup must be at least 0, encoder_grad from 0 to 1: {encoder_warmup=}, "
                             f"{encoder_grad=}")
        self.encoder = encoder
        self.settings = dict(sigma_dec=sigma_dec, tangent_d=tangent_d, encoder_warmup=encoder_warmup,
                             encoder_grad=encoder_grad, vary_sigma=vary_sigma, adaptive=adaptive, self_cond=self_cond,
                             stats_rows=stats_rows, schedule=schedule, feature_loss=feature_loss)

    @property
    def dlm(self):
        e = self.encoder
        return super().dlm | dict(settings=self.settings, latent=dataclasses.asdict(self.model.cfg),
                                  encoder=dict(path=e.path, layer=e.layer, hash=e.hash))

    @classmethod
    def from_pretrained(cls, path, encoder_device='', encoder_cache=''):
        """A directory that LatentModel.save_pretrained wrote. The encoder is opened when it is needed: to train, to
        validate and to continue a prompt, not to write from nothing."""
        dlm = json.loads((Path(path) / 'config.json').read_text())['dlm']
        with torch.device('meta'): model = LatentModel(LatentConfig(**dlm['latent']))
        weights = {k: x.float() if x.is_floating_point() else x
                   for k, x in load_file(Path(path) / 'model.safetensors').items()}
        model.load_state_dict(weights, assign=True)
        encoder = Encoder(**dlm['encoder'], device=encoder_device, cache=encoder_cache)
        return cls(encoder, model, dlm['separator'], dlm['eos_id'], **dlm['settings'])

    def loss_at_start(self):
        V = self.model.cfg.vocab_size
        return f"1 (latents) + at most 2 (features) + ln {V} = {math.log(V):.2f} (tokens)"

    # -- training
    @torch.no_grad()
    def start(self, batches):
        """Once, before the first step: mean and standard deviation of each feature. Position 0, the attention sink,
        is not modelled and left out [S]: with one mean and deviation for all, a few outliers own the MSE."""
        sums = 0
        for batch in batches:
            self._check_rows(batch.ids)
            h = self.encoder.cached(batch.ids)[:, 1:].flatten(0, 1).double()
            sums = sums + torch.stack([h.sum(0), (h * h).sum(0), torch.full_like(h[0], len(h))])
        mean = sums[0] / sums[2]
        self.model.feature_stats.copy_(torch.stack([mean, (sums[1] / sums[2] - mean ** 2).clamp(min=1e-8).sqrt()]))

    def _check_rows(self, ids):
        if len(ids) % self.settings['stats_rows']:
            raise SystemExit(f"micro-batches must be a multiple of stats_rows = {self.settings['stats_rows']} rows, "
                             f"got {len(ids)}")

    def prepare(self, batch, seed):
        """Draw xi (its t depends on the state, so forward looks it up), a seed of the noise per row, how noisy the
        decoder's input is, and how long the prefix is: nothing in a quarter of the rows, in the others uniform from
        nothing to prefix_len, but it ends before the text does."""
        T, row_ids, ids = batch.ids.shape[1], batch.row_ids.cpu(), batch.ids.cpu()
        rngs = [np.random.default_rng((seed, batch.step, int(r))) for r in row_ids]
        xi = (np.random.default_rng((seed, batch.step)).random() + GOLDEN * row_ids.double()) % 1
        longest = self._is_text(ids[:, 1:]).sum(1).sub(1).clamp(0, self.model.cfg.prefix_len).tolist()
        start = [int(max(rng.random() - 0.25, 0) / 0.75 * (n + 1)) for rng, n in zip(rngs, longest)]
        level = [rng.random() if self.settings['vary_sigma'] else 1.0 for rng in rngs]
        noise = dict(xi=xi.float(), seed=torch.tensor([int(rng.integers(2 ** 62)) for rng in rngs]),
                     start=torch.tensor(start), sigma=self.settings['sigma_dec'] * torch.tensor(level),
                     weight=batch.is_target.cpu().any(1) * (T - 1) / batch.n_targets,
                     guess=(row_ids % 2 * self.settings['self_cond']).nonzero().squeeze(1))
        return replace(batch, noise={k: x.to(batch.ids.device) for k, x in noise.items()})

    def _is_text(self, ids):
        """(B, L) bool: all but the fill, that is EOS after EOS."""
        eos = ids == (-1 if self.eos_id is None else self.eos_id)
        return ~(eos & F.pad(eos, (1, 0))[:, :-1])

    def _normed(self, h):
        """Features in standard deviations, at most 10 of them [S]: a few outliers would own the MSE."""
        mean, std = self.model.feature_stats
        return ((h - mean) / std).clamp(-10, 10)

    def _window(self, batch):
        """The chunk after the prefix: ids (B, L), features (B, L, F); and for `denoise` the prefix's features."""
        c, h = self.model.cfg, self._normed(self.encoder.cached(batch.ids))
        take = lambda at: h.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, h.shape[2]))
        first = 1 + batch.noise['start'][:, None]                                       # (B, 1)
        at = first + torch.arange(c.chunk_len, device=first.device)
        before = first + torch.arange(-c.prefix_len, 0, device=first.device)
        return batch.ids.gather(1, at), take(at), dict(context=take(before), seen=before > 0) if c.prefix_len else {}

    def alpha_sigma(self, t):
        if self.settings['schedule'] == 'cubic': return cubic_alpha_sigma(t)
        return tangent_alpha_sigma(t, self.settings['tangent_d'])

    def _denoise(self, z, t, seed, guess, prefix):
        """z_hat (B, K, d) of z noised to the level t (B,); the rows `guess` get the model's first guess."""
        m = self.model
        alpha, sigma = (x[:, None, None] for x in self.alpha_sigma(t))
        zt, mods = alpha * z + sigma * K.row_noise(seed, z.shape[1:]), m.modulations(t)
        z_sc = torch.zeros_like(z)
        if len(guess):
            with torch.no_grad():
                z_sc[guess] = m.denoise(zt[guess], m.modulations(t[guess]), z_sc[guess],
                                        **{k: x[guess] for k, x in prefix.items()})
        return m.denoise(zt, mods, z_sc, **prefix)

    def forward(self, batch):
        """L_diff + L_h + L_w, means over positions and dimensions, averaged over the rows of the global batch. Also
        logs rank, the participation ratio (sum p)^2 / sum p^2 of the eigenvalues p of z0 z0^T of a row: the first to
        fall when the latents collapse."""
        m, s, noise = self.model, self.settings, batch.noise
        ids, h, prefix = self._window(batch)
        self._check_rows(ids)
        raw = m.encode(h)
        z0 = m.normalise(raw, s['stats_rows'])
        g = s['encoder_grad'] * encoder_grad_scale(batch.step, s['encoder_warmup'])
        z = z0.detach() + g * (z0 - z0.detach())
        t = m.timesteps.quantile(noise['xi']) if s['adaptive'] else noise['xi']
        diff = (self._denoise(z, t, noise['seed'], noise['guess'], prefix) - z).square().mean((1, 2))       # (B,)
        h_hat = m.decode(z0 + noise['sigma'][:, None, None] * K.row_noise(noise['seed'], z0.shape[1:], stream=1))
        feat = (h_hat - h).square().mean((1, 2))
        seen = h_hat.detach() if s['feature_loss'] else h_hat                           # the token loss ends here
        states = m.token_states(seen).flatten(0, 1)
        w = noise['weight']
        ce_loss, ce = K.linear_cross_entropy(states, m.head.weight, ids.flatten(),
                                             (w / ids.shape[1]).float().repeat_interleave(ids.shape[1]))
        loss = (w * (diff + feat * s['feature_loss'])).sum() + ce_loss
        n_rows = w.count_nonzero()
        total = lambda x: torch.stack([(x.detach() * (w > 0)).sum(), n_rows.to(x)])
        used = raw.detach() * (w > 0)[:, None, None]                                    # (B, K, latent_dim)
        sums = torch.stack([used.sum(0), used.square().sum(0), n_rows.to(used).expand(used.shape[1:])])
        gram = z0.detach() @ z0.detach().mT                                             # (B, K, K)
        rank = z0.detach().square().sum((1, 2)) ** 2 / gram.float().square().sum((1, 2))
        return loss, dict(denoise=total(diff), features=total(feat), ce=total(ce.view_as(ids).mean(1)),
                          rank=total(rank), _bins=m.timesteps.bin(t, diff.detach(), (w > 0).to(diff)), _latents=sums)

    def after_step(self, stats):
        m = self.model
        m.latent_sums.mul_(0.9).add_(stats['_latents'].to(m.latent_sums))
        if self.settings['adaptive']: m.timesteps.update_bins(stats['_bins'])

    # -- measuring
    def row_nll(self, batch, k=1, seed=0):
        raise NotImplementedError("LDLM has no likelihood: tokens are decoded from latents by argmax, and what the "
                                  "denoiser bounds is the density of latents that the encoder is free to rescale")

    def nelbo(self, batch, k=1, seed=0): self.row_nll(batch, k, seed)

    @torch.no_grad()
    def validate(self, batches, seed, k=1):
        """denoise: its loss at uniform t, with self-conditioning. features: MSE from clean latents. accuracy: share of
        tokens decoded right from clean latents, _noisy: with noise sigma_dec, _t: from z_hat at uniform t, _quarter:
        of those with t below 1/4 (alpha^2 above 0.39, at d = 3), where the text can be told.
        linearity: R^2 of the denoising loss against xi, in 16 bins (what AdaptiveTimesteps is for). latent_variance:
        between rows, of the encoder's latents of RMS 1, so 0 if all texts look alike, at most 1. effective_rank: exp of
        the entropy of the eigenvalues of E[z0 z0^T] (Roy & Vetterli 2007), of at most latent_dim.
        None of them tells which checkpoint writes best (denoise is lowest after a collapse, accuracy_t ends flat), so
        the newest counts."""
        m, s, sums = self.model, self.settings, {}
        for batch in batches:
            batch = self.prepare(batch, seed)
            noise, used = batch.noise, (batch.noise['weight'] > 0).double()
            ids, h, prefix = self._window(batch)
            raw = m.encode(h)
            z0, xi = m.normalise(raw), noise['xi']
            rest = noise['seed'], torch.arange(len(ids) * s['self_cond'], device=ids.device), prefix
            z_hat, h_hat = self._denoise(z0, xi, *rest), m.decode(z0)
            noisy = m.decode(z0 + s['sigma_dec'] * K.row_noise(noise['seed'], z0.shape[1:], stream=1))
            at_xi = self._denoise(z0, m.timesteps.quantile(xi), *rest) if s['adaptive'] else z_hat
            text = self._is_text(ids) * used[:, None]
            right = [((self._tokens(x) == ids) * text).sum(1) for x in (h_hat, noisy, m.decode(z_hat))]
            early = xi < 0.25
            counts = *(x.sum() for x in right), (right[2] * early).sum(), (text.sum(1) * early).sum(), text.sum()
            mse = lambda a, b, used=used: used * (a - b).square().mean((1, 2))
            z, raw = (x.double() * used[:, None, None] for x in (z0, raw))
            new = dict(all=torch.stack([mse(z_hat, z0).sum(), mse(h_hat, h).sum(), *counts, used.sum()]),
                       curve=used.new_zeros(2, 16).index_add_(
                           1, (xi * 16).long().clamp(max=15), torch.stack([mse(at_xi, z0), used])),
                       outer=z.flatten(0, 1).T @ z.flatten(0, 1), raw=torch.stack([raw.sum(0), raw.square().sum(0)]))
            sums = {name: sums.get(name, 0) + x for name, x in new.items()}
        if dist.is_initialized():
            for x in sums.values(): dist.all_reduce(x)
        diff, feat, *right, early, n_early, n_tokens, n_rows = sums['all'].tolist()
        accuracy, noisy, at_t = (n / n_tokens for n in right)
        mean, square = sums['raw'] / n_rows
        loss = sums['curve'][0] / sums['curve'][1]                                      # per bin of xi, nan: no row
        points = torch.stack([loss, torch.arange(16.0, device=loss.device)])[:, loss.isfinite()]
        p = torch.linalg.eigvalsh(sums['outer']).clamp(min=1e-30)
        p = p / p.sum()
        return dict(denoise=diff / n_rows, features=feat / n_rows,
                    accuracy=accuracy, accuracy_noisy=noisy, accuracy_t=at_t,
                    **({'accuracy_quarter': early / n_early} if n_early else {}),
                    linearity=points.corrcoef()[0, 1].item() ** 2 if points.shape[1] > 2 else 0.0,
                    latent_variance=(square - mean ** 2).mean().item(),
                    effective_rank=(-(p * p.log()).sum()).exp().item(), n_tokens=int(n_tokens), n_rows=int(n_rows))

    def _tokens(self, h):
        """Features (B, L, F) -> tokens (B, L)."""
        states = self.model.token_states(h).flatten(0, 1)
        return K.head_argmax(states, self.model.head.weight).view(h.shape[:2])

    # -- sampling
    def grid(self, n_steps, time_grid='adaptive', eta=0.0):
        """-> times (n_steps,) and, per step, the (n_steps, 3) factors of zt, z_hat and fresh noise in
        z_s = alpha_s z_hat + sqrt(sigma_s^2 - eta^2 v) eps_hat + eta sqrt(v) noise, v the variance of q(z_s | zt, z0).
        eta = 0 is DDIM, 1 ancestral. time_grid: uniform in t, or 'adaptive', uniform in xi. In fp64, on the CPU."""
        if n_steps < 1: raise SystemExit(f"n_steps must be at least 1, got {n_steps}")
        if time_grid not in ('uniform', 'adaptive'):
            raise SystemExit(f"time_grid must be uniform or adaptive, got {time_grid!r}")
        if not 0 <= eta <= 1: raise SystemExit(f"eta must be from 0 (DDIM) to 1 (ancestral), got {eta}")
        t = 1 - torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
        if time_grid == 'adaptive': t[1:-1] = self.model.timesteps.quantile(t[1:-1]).double().cpu()
        alpha, sigma = self.alpha_sigma(t)
        (a_t, a_s), (s_t, s_s) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
        v = (s_s / s_t) ** 2 * (1 - (a_t / a_s) ** 2).clamp(min=0)
        keep = (s_s ** 2 - eta ** 2 * v).clamp(min=0).sqrt() / s_t
        return t[:-1].float(), torch.stack([keep, a_s - keep * a_t, eta * v.sqrt()], 1)

    def check_sampler(self, n_steps, eta, time_grid, temperature=1.0, **_):
        if not temperature >= 0: raise SystemExit(f"temperature must be at least 0, got {temperature}")
        self.grid(n_steps, time_grid, eta)

    @property
    def longest(self):
        """The most tokens of a sample: a chunk, if there is no prefix for the next one."""
        return math.inf if self.model.cfg.prefix_len else self.model.cfg.chunk_len

    def sampler(self, B, n_steps, eta=0.0, time_grid='adaptive', temperature=1.0):
        """A Sampler; in eval mode the last one is kept, until eval() or train() are called."""
        key = B, n_steps, eta, time_grid, temperature, self.compiled, self.model.head.weight.device
        if self.training: return Sampler(self, *key[:6])
        if self.kept[0] != key: self.kept = key, Sampler(self, *key[:6])
        return self.kept[1]

    def train(self, mode=True):
        self.kept = None, None                                          # its constants are made of the weights
        return super().train(mode)

    def _prefix(self, texts):
        """The last prefix_len tokens of the texts, read as in training: behind one more token, none before that."""
        P, device = self.model.cfg.prefix_len, self.model.head.weight.device
        if not P: return {}
        rows = [([self.separator] * (self.separator is not None) + text)[-P - 1:] for text in texts]
        T = max(map(len, rows))
        ids = torch.tensor([row + [self.eos_id or 0] * (T - len(row)) for row in rows], device=device)
        at = torch.tensor([len(row) for row in rows], device=device)[:, None] + torch.arange(-P, 0, device=device)
        seen, F_ = at > 0, self.model.cfg.feature_dim                   # position 0 is not shown
        if not seen.any(): return dict(context=torch.zeros(len(rows), P, F_, device=device), seen=seen)
        h = self._normed(self.encoder.features(ids))
        return dict(context=h.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, F_)), seen=seen)

    @torch.no_grad()
    def sample(self, prompts, max_new_tokens=128, n_steps=64, temperature=1.0, top_k=0, top_p=1.0, commit='', score='',
               remask='', tau=0.0, block_len=0, seed=0, history=None, eta=0.0, time_grid='adaptive'):
        """prompts: lists of ids -> (lists of ids, prompt included, cut before EOS), nfe. A chunk at a time: n_steps
        denoiser calls, then the decoder's argmax; with a prefix_len, further chunks continue what is there, without
        one it ends with the first. top_k to block_len are for other objectives."""
        L, P, device = self.model.cfg.chunk_len, self.model.cfg.prefix_len, self.model.head.weight.device
        if any(prompts) and not P: raise SystemExit("this model was trained with prefix_len=0: it takes no prompt")
        texts, done, nfe = [list(p) for p in prompts], [False] * len(prompts), 0
        sampler = self.sampler(len(texts), n_steps, eta, time_grid, temperature)
        for _ in range(-(-max_new_tokens // L) if P else min(max_new_tokens, 1)):
            if all(done): break
            seeds = [int(np.random.default_rng((seed, i, nfe)).integers(2 ** 62)) for i in range(len(texts))]
            see = None
            if history is not None:
                def see(z_hat): history.append(self._show(prompts, texts, sampler.states(z_hat), max_new_tokens))
            new_tokens = sampler(torch.tensor(seeds, device=device), **self._prefix(texts), see=see)
            nfe += n_steps
            for i, new in enumerate(new_tokens.tolist()):
                if done[i]: new = [self.eos_id] * L                     # rows stay of equal length until the end
                done[i] |= self.eos_id in new
                texts[i] = texts[i] + new
        new = [text[len(p):][:max_new_tokens] for text, p in zip(texts, prompts)]
        return [list(p) + (n[:n.index(self.eos_id)] if self.eos_id in n else n) for p, n in zip(prompts, new)], nfe

    def _show(self, prompts, texts, states, max_new_tokens):
        """What token_states decode to, after all that is there: ids and confidence (B, T) on the CPU, left-padded."""
        rows, widest = [], max(map(len, prompts))
        sep, V = [] if self.separator is None else [self.separator], self.model.cfg.vocab_size
        parts = [K.head_logits(part, self.model.head.weight).softmax(-1).max(-1)
                 for part in states.flatten(0, 1).split(max((1 << 27) // V, 1))]
        conf, ids = (torch.cat(x).view(states.shape[:2]).tolist() for x in zip(*parts))
        for p, text, new, c in zip(prompts, texts, ids, conf):
            pad, keep = widest - len(p), len(sep) + widest + max_new_tokens
            rows.append(([self.eos_id or 0] * pad + sep + text + new, [1.0] * (pad + len(sep) + len(text)) + c))
            rows[-1] = (rows[-1][0][:keep], rows[-1][1][:keep])
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([conf for _, conf in rows])


class Sampler:
    """From seeds to tokens, for one batch size and time grid, while the weights stay as they are.

    What no latent enters is computed here, once: modulations and factors of every step, the decoder's queries behind
    their first self-attention. On a GPU the network is in bf16, the sampler's state in fp32, and all steps, both
    decoders and the argmax are one CUDA graph: the first call runs as it is, the second is captured, others replay it.
    temperature: a factor on the initial noise and, with eta, on that of each step; 1 = as trained [S].
    compiled: '' or a mode of torch.compile without CUDA graphs, for a step and for the decoders.
    persistent: all steps of a single text as one kernel (persistent.py), where it can do that; not if somebody wants
    to see every step."""

    def __init__(self, objective, B, n_steps, eta=0.0, time_grid='adaptive', temperature=1.0, compiled='',
                 persistent=True):
        o, device = objective, objective.model.head.weight.device
        on_gpu = device.type == 'cuda'
        self.m = m = o.model.in_dtype(torch.bfloat16) if on_gpu else o.model
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False)
        self.self_cond, self.temperature = o.settings['self_cond'], temperature
        times, factors = o.grid(n_steps, time_grid, eta)
        with torch.no_grad(), self.autocast:
            self.steps = [(m.modulations(t), *ab.float().to(device), eta_part.item()) for t, ab, eta_part in zip(
                times.to(device).split(1), factors[:, :2], temperature * factors[:, 2])]
            self.start = m.decoder_start(B)
            for what in ('latents', 'tokens', 'prefix'): m._rot(what, B)        # not inside of a graph
        wrap = lambda f: torch.compile(f, dynamic=False, mode=compiled) if compiled else f
        self.step, self.decode = wrap(self._step), wrap(lambda z: m.token_states(m.decode(z, self.start)))
        self.n_calls, self.graph = 0, None
        self.persistent = persistent and on_gpu and B == 1 and not compiled and K.use_triton(m.head.weight)

    @functools.cached_property
    def all_steps(self):
        """Made when it is needed: it has a copy of the denoiser."""
        if not self.persistent: return None
        import persistent as P
        fits = P.pays(self.m.cfg, self.m.head.weight.device) and len(self.steps) <= 1024        # offsets are of 32 bits
        return P.Steps(self.m, self.steps, self.self_cond) if fits else None

    def _step(self, z, z_hat, mods, a, b, prefix):
        """-> z at the next time (without the noise of eta), z_hat."""
        z_hat = self.m.denoise(z, mods, z_hat if self.self_cond else torch.zeros_like(z), **prefix)
        return torch.addcmul(a * z, b, z_hat), z_hat

    @torch.no_grad()
    def latents(self, seeds, context=None, seen=None, see=None):
        """seeds (B,) int64 -> z (B, K, latent_dim). see(z_hat) is called after every step."""
        shape = self.m.cfg.n_latents, self.m.cfg.latent_dim
        in_one = None if see or context is not None else self.all_steps
        with self.autocast:
            z = self.temperature * K.row_noise(seeds, shape)
            if in_one:
                noise = [K.row_noise(seeds, shape, stream=i + 1) for i in range(in_one.noisy * len(self.steps))]
                return in_one(z, torch.cat(noise) if noise else None)
            z_hat = torch.zeros_like(z)
            prefix = {} if context is None else dict(context=self.m.prefix_keys(context), seen=seen)
            for i, (*step, c) in enumerate(self.steps):
                z, z_hat = self.step(z, z_hat, *step, prefix)
                if c: z = z + c * K.row_noise(seeds, shape, stream=i + 1)
                if see: see(z_hat)
        return z

    @torch.no_grad()
    def states(self, z):
        """-> token_states (B, L, d)."""
        with self.autocast: return self.decode(z)

    def tokens(self, *args):
        """(B, L) int64, without a graph."""
        states = self.states(self.latents(*args))
        return K.head_argmax(states.flatten(0, 1), self.m.head.weight).view(states.shape[:2])

    def __call__(self, seeds, context=None, seen=None, see=None):
        inputs, self.n_calls = [seeds, context, seen], self.n_calls + (see is None)
        if see or seeds.device.type != 'cuda' or self.n_calls == 1: return self.tokens(*inputs, see)
        if self.graph is None:
            self.inputs, graph = [x if x is None else x.clone() for x in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode='thread_local'): self.out = self.tokens(*self.inputs)
            self.graph = graph
        for old, new in zip(self.inputs, inputs):
            if new is not None: old.copy_(new)
        self.graph.replay()
        return self.out.clone()
