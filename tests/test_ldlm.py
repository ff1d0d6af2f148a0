"""Latent diffusion against exact answers: the schedules, what each gradient reaches, timesteps that make a known loss
linear, a sampler that recovers a known Gaussian, sizes of the published tables, a tiny model that learns its text."""
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import kernels as K
from ar import AR
from data import Corpus, batch_from_documents, lay_out, prepare
from encoder import Encoder
from kernels import row_noise
from ldlm import (
    LDLM,
    AdaptiveTimesteps,
    Attention,
    LatentConfig,
    LatentModel,
    Sampler,
    cubic_alpha_sigma,
    encoder_grad_scale,
    tangent_alpha_sigma,
)
from model import ModelConfig, Transformer
from tokenizer import byte_tokenizer

SMALL = dict(vocab_size=64, feature_dim=24, max_seq_len=13, n_embd=32, n_head=2, n_ff=64, n_layer=2, perceiver_layers=1,
             decoder_layers=1)


def tiny(encoder='random:24:64', settings=None, **kw):
    torch.manual_seed(0)
    encoder = Encoder(encoder).load()
    model = LatentModel(LatentConfig(**SMALL | dict(vocab_size=encoder.vocab_size, feature_dim=encoder.width) | kw))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)              # nothing is zero: every path counts
    return LDLM(encoder, model, separator=0, eos_id=0, **dict(stats_rows=2) | (settings or {}))


def rows(n, T=13, vocab=64, seed=0):
    """n rows of random tokens, the last four of them EOS, all of it modelled."""
    ids = torch.randint(1, vocab, (n, T), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -4:] = 0, 0
    batch = batch_from_documents(ids.tolist())
    return batch


def part(batch, lo, hi):
    cut = lambda x: x[lo:hi] if torch.is_tensor(x) else x
    return replace(batch, ids=batch.ids[lo:hi], pos=batch.pos[lo:hi], doc=batch.doc[lo:hi], ranges=None,
                   is_target=batch.is_target[lo:hi], row_ids=cut(batch.row_ids))


# ---- schedules ---------------------------------------------------------------------------------------------
def test_tangent_schedule():
    t = torch.tensor([0.1, 0.2, 0.5, 0.9, 0.0, 1.0], dtype=torch.float64)
    alpha, sigma = tangent_alpha_sigma(t)
    want = torch.tensor([.816, .513, .100, .0028, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(alpha ** 2, want, atol=5e-4, rtol=0)
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones_like(t))
    logsnr = (alpha ** 2 / sigma ** 2).log()[:4]
    torch.testing.assert_close(logsnr, -2 * (3 * (math.pi * t[:4] / 2).tan()).log())


def test_cubic_schedule():
    """What the tangent schedule is compared with; the sampler's steps follow whichever the model was trained on."""
    t = torch.tensor([0.1, 0.2, 0.5, 0.9, 0.0, 1.0], dtype=torch.float64)
    alpha, sigma = cubic_alpha_sigma(t)
    torch.testing.assert_close(alpha ** 2, torch.tensor([.999, .992, .875, .271, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones_like(t))
    o = tiny(settings=dict(schedule='cubic'))
    (a, b, _), a0 = o.grid(10)[1][4], tiny().grid(10)[1][4, 0]
    alpha, sigma = cubic_alpha_sigma(torch.tensor([0.6, 0.5], dtype=torch.float64))
    assert a == pytest.approx(sigma[1] / sigma[0]) and b == pytest.approx(alpha[1] - a * alpha[0])
    assert abs(a - a0) > 0.01 and o(o.prepare(rows(4), 0))[0] != tiny()(o.prepare(rows(4), 0))[0]
    with pytest.raises(SystemExit, match='tangent or cubic'): tiny(settings=dict(schedule='cosine'))


def test_warm_up_values():
    for share, value in ((0.5, .054), (0.8, .568), (0.9, .830)):
        assert encoder_grad_scale(share * 50_000, 50_000) == pytest.approx(value, abs=1e-3)
    assert encoder_grad_scale(0, 100) == pytest.approx(1e-3)
    assert encoder_grad_scale(100, 100) == encoder_grad_scale(500, 100) == encoder_grad_scale(0, 0) == 1


def test_shares_out_of_range():
    for wrong in (dict(encoder_warmup=-1), dict(encoder_grad=-0.1), dict(encoder_grad=2.0)):
        with pytest.raises(SystemExit, match='encoder_grad from 0 to 1'): tiny(settings=wrong)


def gradients(o, batch):
    o.zero_grad()
    o(batch)[0].backward()
    return {n: p.grad.clone() for n, p in o.model.named_parameters()}


def test_warm_up_scales_the_encoders_gradient_and_nothing_else():
    """Gradients at three values of g: the denoiser's is the same, the encoder's is G_h + g G_diff."""
    found = {}
    for g_step in (0, 80, 100):                                                 # g = .001, .568, 1
        o = tiny(settings=dict(encoder_warmup=100))
        batch = o.prepare(rows(4), 0)                                           # the same noise
        found[encoder_grad_scale(g_step, 100)] = gradients(o, replace(batch, step=g_step))
    (g0, a), (g1, b), (g2, c) = sorted(found.items())
    for name in a:
        if name.startswith('dit') or name.startswith(('decoder', 'token', 'head')):
            torch.testing.assert_close(a[name], c[name])
        else:
            torch.testing.assert_close((b[name] - a[name]) * (g2 - g0), (c[name] - a[name]) * (g1 - g0),
                                       atol=1e-6, rtol=1e-3)
            assert (c[name] - a[name]).norm() > 1e-3 * c[name].norm(), name


def test_token_loss_stops_at_the_features():
    """With the loss of tokens alone, encoder, decoder and denoiser get nothing."""
    o = tiny()
    batch = o.prepare(rows(4), 0)
    ids, h, _ = o._window(batch)
    h_hat = o.model.decode(o.model.encode(h))
    whole = gradients(o, batch)
    o.model.head.weight.data *= 3                       # another token loss, the same features
    other = gradients(o, batch)
    for name in whole:
        same = torch.equal(whole[name], other[name])
        assert same != name.startswith(('token_decoder', 'head')), name
    assert h_hat.requires_grad                          # it is the loss that detaches


def test_without_the_feature_loss_the_token_loss_goes_through():
    """feature_loss=False: cross-entropy reaches decoder and encoder, and |h_hat - h|^2 is in no gradient."""
    o = tiny(settings=dict(feature_loss=False))
    batch = o.prepare(rows(4), 0)
    whole, loss = gradients(o, batch), o(batch)[0].item()
    o.model.head.weight.data.zero_()                    # a token loss without a gradient, and ln 64
    silent = gradients(o, batch)
    for name, g in silent.items():
        if name.startswith('decoder'): assert not g.any() and whole[name].any(), name
        elif name.startswith('dit'): torch.testing.assert_close(g, whole[name])
        elif name.startswith('encoder'): assert g.any() and not torch.allclose(g, whole[name]), name
    stats = o(batch)[1]
    assert o(batch)[0].item() == pytest.approx(stats['denoise'][0].item() / 4 + math.log(64), rel=1e-4) != loss


def test_never_is_the_gradient_of_the_features_alone():
    """encoder_grad=0: what the encoder gets is what it got at g -> 0."""
    never, late = (tiny(settings=s) for s in (dict(encoder_grad=0.0), dict(encoder_warmup=10 ** 9)))
    batch = never.prepare(rows(4), 0)
    a, b = gradients(never, batch), gradients(late, batch)
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0.05, atol=1e-3)
    assert a['dit.0.mlp.down_proj.weight'].any()


def test_matrices_that_the_optimizer_takes_apart():
    """Muon works on the maps that were one matrix for speed: none of them is larger than d x d or d x n_ff."""
    m = tiny().model
    for name, p in m.layers.named_parameters():
        rows_of = m.fused_rows().get(name.split('.')[-2], [len(p)])
        assert sum(rows_of) == len(p) and max(rows_of) <= 64, name


def test_what_validation_says_of_the_latents():
    """One text for all rows: no variance between latents. Noise on the decoder's input costs accuracy. The effective
    rank is that of the latents' second moments; the curve is R^2 over xi, with as many terms as rows fill bins."""
    o, batch = tiny(settings=dict(sigma_dec=30.0)), rows(64)
    val = o.validate([part(batch, 0, 32), part(batch, 32, 64)], 0)
    assert o.validate([batch], 0) == pytest.approx(val, rel=1e-4)
    raw = o.model.encode(o._window(o.prepare(batch, 0))[1]).detach()
    assert val['latent_variance'] == pytest.approx(raw.var(0, correction=0).mean().item(), rel=1e-4)
    with torch.no_grad(): z = o.model.normalise(raw).flatten(0, 1)
    p = torch.linalg.svdvals(z.double()) ** 2
    p = p / p.sum()
    assert val['effective_rank'] == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)
    assert 1 < val['effective_rank'] < 32 and 0 <= val['linearity'] <= 1
    early = o.prepare(batch, 0).noise['xi'] < 0.25
    assert 0 < early.sum() < 64
    took = o.validate([replace(batch, row_ids=batch.row_ids[early], ids=batch.ids[early], doc=batch.doc[early],
                               pos=batch.pos[early], is_target=batch.is_target[early])], 0)
    assert took['accuracy_t'] == pytest.approx(val['accuracy_quarter'], abs=1e-6)
    same = replace(batch, ids=batch.ids[:1].expand_as(batch.ids).contiguous())
    assert o.validate([same], 0)['latent_variance'] < 1e-9
    noise = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    seen, real = [], o._denoise
    o._denoise = lambda z, t, seed, guess, prefix: seen.append(guess) or real(z, t, seed, guess, prefix)
    o.validate([batch], 0)
    assert all(guess.tolist() == list(range(64)) for guess in seen) and len(seen) == 2      # all with self-conditioning
    o._denoise = lambda z, t, *_: z + t[:, None, None].sqrt() * (1 + 0.01 * noise[:len(z), :, None])
    assert o.validate([batch], 0)['linearity'] > 0.99
    o._denoise = lambda z, t, *_: z + t[:, None, None] ** 3
    assert o.validate([batch], 0)['linearity'] < 0.8
    o.model.timesteps.cdf.copy_(torch.linspace(0, 1, 65) ** 6)                  # drawn so that t^6 is linear
    assert o.validate([batch], 0)['linearity'] > 0.99


def test_a_xi_that_rounds_to_one():
    """fp32 rounds the last 2^-25 below 1 up: that row belongs to the last bin."""
    o = tiny()
    batch = o.prepare(rows(4), 0)
    batch.noise['xi'][2] = 1
    o.prepare = lambda b, seed: b
    assert o.validate([batch], 0)['n_rows'] == 4


@pytest.mark.parametrize('n_latents', [3, 8, 12, 20])
def test_the_skip_is_the_mean_of_what_lies_there(n_latents):
    """Without the pooling's own backward, which GPUs have no deterministic one of: deterministic=true fails."""
    m = tiny(n_latents=n_latents).model
    inputs = torch.randn(2, 12, 32, requires_grad=True)
    x = m._start(m.encoder_queries, inputs)
    pooled = torch.nn.functional.adaptive_avg_pool1d(inputs.transpose(1, 2), n_latents).transpose(1, 2)
    torch.testing.assert_close(x, m.encoder_queries + pooled)
    nodes, seen = [x.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is None or node in seen: continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
    assert not any('Pool' in node.name() for node in seen)


def test_decoder_noise_is_for_training_only():
    batch = rows(4)
    losses = lambda o, seed: o(o.prepare(batch, seed))[1]['features'][0].item()
    quiet, noisy = (tiny(settings=dict(sigma_dec=s)) for s in (0.0, 3.0))
    assert losses(quiet, 0) == losses(quiet, 1) and losses(noisy, 0) != losses(noisy, 1)
    assert noisy.validate([batch], 0)['features'] == noisy.validate([batch], 1)['features']


def test_the_noise_of_a_row_has_its_own_level():
    """vary_sigma: uniform from 0 to sigma_dec, a function of the row; else sigma_dec. The decoder's input has RMS 1,
    whatever the noise."""
    batch = rows(64)
    vary, fixed = (tiny(settings=dict(vary_sigma=v)).prepare(batch, 0).noise['sigma'] for v in (True, False))
    assert (fixed == 3).all() and 0 <= vary.min() < 0.3 and 2.7 < vary.max() <= 3 and 1.2 < vary.mean() < 1.8
    assert torch.equal(tiny().prepare(part(batch, 5, 9), 0).noise['sigma'], vary[5:9])
    o, z = tiny(settings=dict(vary_sigma=False)), row_noise(torch.arange(4), (12, 32))
    torch.testing.assert_close(o.model.decode(z), o.model.decode(7 * z))


def test_rank_tells_of_a_collapse():
    """12 latents of 32 dimensions: noise has a participation ratio of some 12 x 32 / (12 + 32), two directions 2."""
    o, found = tiny(), {}
    for k in (2, 32):
        o.model.encode = lambda h, k=k: torch.randn(16, 12, k) @ torch.eye(k, 32)
        total, n = o(o.prepare(rows(16), 0))[1]['rank']
        found[k] = total / n
    assert n == 16 and found[2] < 2.01 and 7 < found[32] < 10


def test_forward_changes_no_state_and_after_step_does():
    o = tiny()
    before = {k: v.clone() for k, v in o.state_dict().items()}
    _, stats = o(o.prepare(rows(4), 0))
    assert all(torch.equal(v, before[k]) for k, v in o.state_dict().items())
    o.after_step(stats)
    changed = {k for k, v in o.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'model.latent_sums', 'model.timesteps.bins', 'model.timesteps.n_updates'}
    z = o.model.normalise(o.model.encode(o._window(o.prepare(rows(4), 0))[1])).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)


def test_the_gradient_can_neither_shift_nor_scale_the_latents():
    """The values are the running statistics', but no loss gains by moving the mean of a latent's dimension or the
    deviation of a dimension: what collapsed otherwise (LOG.md)."""
    o, g = tiny(), torch.Generator().manual_seed(0)
    z = torch.randn(6, 12, 32, generator=g, requires_grad=True)
    one = torch.ones(12, 32)
    o.model.latent_sums.copy_(torch.stack([torch.randn(12, 32, generator=g), 3 * one, one]))
    out = o.model.normalise(z)
    with torch.no_grad(): torch.testing.assert_close(o.model.normalise(z), out)
    (out * torch.randn(out.shape, generator=g)).sum().backward()
    x = z.detach() - z.detach().mean(0)
    assert z.grad.sum(0).abs().max() < 1e-4 and (z.grad * x).sum((0, 1)).abs().max() < 1e-3 < z.grad.abs().mean()
    assert torch.isfinite(o.model.normalise(z[:1])).all()


def test_micro_batches_add_up_to_the_batch():
    """Loss, stats and gradients of 4 rows = those of rows 0-1 plus rows 2-3: noise belongs to the row, statistics to
    groups of stats_rows. With all 4 rows as one group, the gradients would differ."""
    def grads(o):
        found = {n: p.grad.clone() for n, p in o.model.named_parameters()}
        o.zero_grad()
        return found
    o, whole = tiny(prefix_len=4), rows(4)
    loss, stats = o(o.prepare(whole, 3))
    loss.backward()
    want, halves = grads(o), [o(o.prepare(part(whole, lo, lo + 2), 3)) for lo in (0, 2)]
    torch.testing.assert_close(loss, halves[0][0] + halves[1][0])
    for k in stats: torch.testing.assert_close(stats[k], halves[0][1][k] + halves[1][1][k])
    for half, _ in halves: half.backward()
    for name, g in grads(o).items(): torch.testing.assert_close(g, want[name], rtol=1e-3, atol=1e-5, msg=name)
    o.settings['stats_rows'] = 4
    o(o.prepare(whole, 3))[0].backward()
    g, name = grads(o), 'encoder.0.mlp.down_proj.weight'
    assert (g[name] - want[name]).norm() > 0.01 * want[name].norm()
    with pytest.raises(SystemExit, match='multiple of stats_rows = 4'): o(o.prepare(part(whole, 0, 2), 3))


def test_rows_of_padding_count_nothing():
    o, batch = tiny(), rows(4)
    want = o.validate([batch], 0)
    fake = replace(batch, ids=batch.ids.clone(), is_target=batch.is_target.clone(), n_targets=batch.n_targets * 3 // 4)
    fake.is_target[3] = False
    got = o.validate([fake], 0)
    assert got['n_rows'] == 3 and want['n_rows'] == 4
    assert o.validate([part(batch, 0, 3)], 0) == pytest.approx(got, rel=1e-5)


# ---- noise and timesteps -----------------------------------------------------------------------------------
def test_row_noise_is_normal_and_belongs_to_its_row():
    seeds = torch.from_numpy(np.random.default_rng(0).integers(2 ** 62, size=300))
    x = row_noise(seeds, (11, 61))
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.01 and abs((x ** 4).mean() - 3) < 0.06
    for a, b in ((x[:, 0], x[:, 1]), (x[:-1], x[1:]), (x, row_noise(seeds, (11, 61), stream=1)),
                 (x, row_noise(seeds + 1, (11, 61))), (x, row_noise(seeds + 2 ** 40, (11, 61)))):
        assert abs((a * b).mean()) < 0.02
    assert torch.equal(x[7:9], row_noise(seeds[7:9], (11, 61)))
    big = row_noise(seeds[:1], (400_000,))                                      # Kolmogorov-Smirnov
    cdf = torch.special.ndtr(big.sort(1).values[0].double())
    assert (cdf - torch.linspace(0, 1, len(cdf), dtype=torch.float64)).abs().max() < 0.004


def synthetic(t, d=3.0):
    """The denoising loss of data N(0, 1/4) under the tangent schedule: the posterior's variance."""
    alpha, sigma = tangent_alpha_sigma(t, d)
    return 0.25 * sigma ** 2 / (0.25 * alpha ** 2 + sigma ** 2)


def train_timesteps(steps, batch, noise=0.1):
    ts, g = AdaptiveTimesteps(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        t = ts.sample(batch, float(torch.rand((), generator=g)))
        ts.update(t, synthetic(t) * (1 + noise * torch.randn(batch, generator=g)))
    return ts


@pytest.mark.parametrize('steps, batch', [(300, 128), (12_000, 1)])
def test_adaptive_timesteps_make_the_loss_linear(steps, batch):
    """R^2 of loss against xi above 0.99 (uniform t: below 0.9), at batch 1, too; and no noise level starves."""
    ts = train_timesteps(steps, batch)
    xi = (torch.arange(2000) + 0.5) / 2000
    r2 = lambda t: np.corrcoef(xi.numpy(), synthetic(t).numpy())[0, 1] ** 2
    assert r2(ts.quantile(xi)) > 0.99 > 0.9 > r2(xi)
    assert torch.histc(ts.quantile(xi), 64, 0, 1).min() > 0
    assert torch.all(ts.cdf.diff() > 0) and ts.cdf[0] == 0 and ts.cdf[-1] == 1


def bent(o, power=3):
    """Timesteps that are not uniform: F(t) = t^power at the edges of the bins."""
    o.model.timesteps.cdf.copy_(torch.linspace(0, 1, 65) ** power)
    return o


def test_the_adaptive_grid_is_uniform_in_xi():
    """Times at F(t) = 1, 3/4, 1/2, 1/4; the steps' factors are those of the schedule at these times."""
    o = bent(tiny(settings=dict(self_cond=False)))
    xi = torch.tensor([1, 0.75, 0.5, 0.25])
    t, f = o.grid(4, 'adaptive')
    torch.testing.assert_close(t, xi ** (1 / 3), atol=2e-4, rtol=0)
    assert torch.equal(t, o.grid(4)[0]) and torch.equal(o.grid(4, 'uniform')[0], xi)
    a, s = o.alpha_sigma(torch.tensor([*t.double(), 0]))
    torch.testing.assert_close(f[:, 0], s[1:] / s[:-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(f[:, 1], a[1:] - s[1:] / s[:-1] * a[:-1], atol=1e-6, rtol=0)
    seeds, told = torch.tensor([5, 9]), []
    o.model.modulations = lambda t, real=o.model.modulations: told.append(t.item()) or real(t)
    adaptive, uniform = (Sampler(o, 2, 4, time_grid=g).latents(seeds) for g in ('adaptive', 'uniform'))
    assert told == pytest.approx([*t.tolist(), *xi.tolist()]) and not torch.allclose(adaptive, uniform)
    told.clear()
    for kw in ({}, dict(time_grid='uniform')): o.sample([[]], 12, n_steps=4, **kw)
    assert told == pytest.approx([*t.tolist(), *xi.tolist()])
    assert o.grid(1)[0].tolist() == [1]
    for wrong in (dict(time_grid='linear'), dict(eta=2), dict(n_steps=0), dict(temperature=-1)):
        with pytest.raises(SystemExit): o.check_sampler(**dict(n_steps=4, eta=0, time_grid='uniform') | wrong)


def test_training_draws_uniform_in_xi_only_if_adaptive():
    """The denoiser is asked at t = F^-1(xi), or at xi; and only then do the losses change F."""
    for adaptive in (True, False):
        o, batch = bent(tiny(settings=dict(adaptive=adaptive, self_cond=False))), rows(4)
        told, real = [], o.model.modulations
        o.model.modulations = lambda t, told=told, real=real: told.append(t) or real(t)
        b = o.prepare(batch, 0)
        _, stats = o(b)
        want = b.noise['xi'] ** (1 / 3) if adaptive else b.noise['xi']
        torch.testing.assert_close(told[0], want, atol=0.02, rtol=0)
        o.after_step(stats)
        assert bool(o.model.timesteps.bins.any()) == adaptive


def test_running_statistics_forget():
    o = tiny()
    _, stats = o(o.prepare(rows(4), 0))
    for _ in range(2): o.after_step(stats)
    torch.testing.assert_close(o.model.latent_sums, 1.9 * stats['_latents'])


def test_outliers_are_cut_at_ten_deviations():
    o = tiny()
    o.model.feature_stats.copy_(torch.stack([torch.full((24,), 3.0), torch.full((24,), 2.0)]))
    h = torch.tensor([3.0, 5.0, 103.0, -97.0])[:, None].expand(4, 24)
    assert o._normed(h)[:, 0].tolist() == [0, 1, 10, -10]


def test_adaptive_timesteps_start_uniform_and_stay_stratified():
    ts, xi = AdaptiveTimesteps(every=1), torch.rand(100)
    torch.testing.assert_close(ts.quantile(xi), xi)
    ts.update(torch.tensor([0.3]), torch.tensor([5.0]))                         # one bin must not take it all
    torch.testing.assert_close(ts.quantile(xi), xi)
    seen = torch.linspace(0, 0.9, 500)
    ts.update(seen, synthetic(seen))                                            # the last bins were never seen
    torch.testing.assert_close(ts.quantile(xi), xi)
    t = ts.sample(64, u=0.2).sort().values
    assert t.diff().max() < 2.7 / 64
    assert ts.quantile(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_adaptive_timesteps_agree_across_ranks_and_resume():
    """Two ranks' bins summed = one rank with all samples; a copy of the state goes on alike."""
    one, two = AdaptiveTimesteps(every=2), AdaptiveTimesteps(every=2)
    t = torch.rand(512)
    for _ in range(3):
        one.update(t, synthetic(t))
        two.update_bins(two.bin(t[:256], synthetic(t[:256])) + two.bin(t[256:], synthetic(t[256:])))
    torch.testing.assert_close(one.cdf, two.cdf)
    assert not torch.equal(one.cdf, torch.linspace(0, 1, 65))
    copy = AdaptiveTimesteps(every=2)
    copy.load_state_dict(one.state_dict())
    for ts in (one, copy): ts.update(t, synthetic(t) * 2)
    assert torch.equal(one.cdf, copy.cdf) and torch.equal(one.bins, copy.bins)


# ---- sampler -----------------------------------------------------------------------------------------------
class ExactDenoiser(LatentModel):
    """E[z0 | zt] of z0 ~ N(mean, std^2), independent dimensions: what a perfect network would say."""
    mean, std = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.tensor([0.5, 1.0, 0.3, 0.8])

    def modulations(self, t): return t

    def denoise(self, zt, t, z_sc, context=None, seen=None):
        alpha, sigma = (x[:, None, None] for x in tangent_alpha_sigma(t.double()))
        gain = alpha * self.std ** 2 / (alpha ** 2 * self.std ** 2 + sigma ** 2)
        return (self.mean + gain * (zt - alpha * self.mean)).float()


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('grid, temperature', [('uniform', 1), ('adaptive', 1), ('adaptive', 0.8), ('uniform', 0)])
def test_exact_denoiser_recovers_the_gaussian(eta, grid, temperature):
    """For every eta and grid, the marginal at t = 0 is the data's (up to the grid's discretisation), and a temperature
    scales its standard deviation."""
    model = ExactDenoiser(LatentConfig(**SMALL | dict(n_embd=4, n_head=1)))
    model.timesteps.cdf.copy_(torch.linspace(0, 1, 65) * 0.7 + torch.linspace(0, 1, 65) ** 2 * 0.3)
    o = LDLM(Encoder('random:24:64'), model, 0, 0)
    z = Sampler(o, 2000, 512, eta, grid, temperature).latents(torch.arange(2000) * 7919).flatten(0, 1)  # (24000, 4)
    torch.testing.assert_close(z.mean(0), model.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), model.std * temperature, atol=0.01, rtol=0.05)
    assert not temperature or abs(torch.corrcoef(z.T) - torch.eye(4)).max() < 0.03


def test_a_step_of_the_grid_is_the_exact_posterior():
    """eta = 1: mean and variance of q(z_s | zt, z0) in closed form. eta = 0: the noise level is kept."""
    o = tiny()
    t, f = o.grid(10, eta=1.0)
    assert t[0] == 1 and len(f) == 10 and f[-1].tolist() == pytest.approx([0, 1, 0], abs=1e-12)
    a, s = tangent_alpha_sigma(1 - torch.arange(11, dtype=torch.float64) / 10)
    i = 4
    r = a[i] / a[i + 1]
    var = s[i + 1] ** 2 * (s[i] ** 2 - r ** 2 * s[i + 1] ** 2) / s[i] ** 2
    want = [r * s[i + 1] ** 2 / s[i] ** 2, a[i + 1] * (s[i] ** 2 - r ** 2 * s[i + 1] ** 2) / s[i] ** 2, var.sqrt()]
    torch.testing.assert_close(f[i], torch.stack(want))
    _, f = o.grid(10)
    torch.testing.assert_close(f[i], torch.stack([s[i + 1] / s[i], a[i + 1] - s[i + 1] / s[i] * a[i], 0 * a[i]]))


def test_sampling_is_a_function_of_the_seed_and_the_denoiser_matters():
    o = tiny()
    many, nfe = o.sample([[]] * 3, 12, n_steps=4, seed=5)
    again, other = (o.sample([[]] * 3, 12, n_steps=4, seed=s)[0] for s in (5, 6))
    assert nfe == 4 and many == again != other
    assert o.sample([[]], 12, n_steps=4, seed=5)[0] == many[:1]                 # whatever the neighbours
    assert all(len(r) <= 12 and 0 not in r for r in many) and len(o.sample([[]], 5, n_steps=2)[0][0]) <= 5
    assert o.sample([[]], 0) == ([[]], 0)
    cold, _ = o.sample([[]] * 3, 12, n_steps=4, seed=5, temperature=0)
    assert cold != many and cold[0] == cold[1] == cold[2]                       # no noise, one text
    for p in o.model.dit_out.parameters(): p.data.neg_()
    assert o.sample([[]] * 3, 12, n_steps=4, seed=5)[0] != many
    with pytest.raises(SystemExit, match='prefix_len=0'): o.sample([[1]], 12)
    with pytest.raises(SystemExit, match='eta must be from 0'): o.sample([[]], 12, eta=1.5)


SHAPES = [dict(), dict(perceiver_block='split', perceiver_skip=False, dit_adaln=False, perceiver_layers=2),
          dict(perceiver_block='split', perceiver_skip=False, prefix_len=4), dict(dit_adaln=False, prefix_len=4),
          dict(n_latents=5, latent_dim=8), dict(n_latents=20, dit_adaln=False, feature_dim=32, latent_dim=16)]


def some_prefix(o, B):
    c = o.model.cfg
    if not c.prefix_len: return {}
    g = torch.Generator().manual_seed(3)
    seen = torch.arange(c.prefix_len) >= torch.tensor([c.prefix_len, *range(B - 1)])[:, None]       # none, all, ...
    return dict(context=torch.randn(B, c.prefix_len, c.feature_dim, generator=g), seen=seen)


@torch.no_grad()
def plain_sampler(o, seeds, n_steps, eta, prefix):
    """The sampler as one would write it first: everything anew at every step. -> z, logits"""
    m, (times, factors) = o.model, o.grid(n_steps, 'uniform', eta)
    z = row_noise(seeds, (m.cfg.n_latents, m.cfg.latent_dim))
    z_hat = torch.zeros_like(z)
    for i, (t, (a, b, c)) in enumerate(zip(times, factors)):
        z_hat = m.denoise(z, m.modulations(t.expand(len(z))), z_hat, **prefix)
        z = (a * z + b * z_hat + c * row_noise(seeds, z.shape[1:], stream=i + 1)).float()
    return z, m.head(m.token_states(m.decode(z)))


@pytest.mark.parametrize('kw', SHAPES, ids=str)
def test_sampler_is_the_plain_sampler(kw):
    """What it computes once, ahead of the steps, changes nothing."""
    o, seeds = tiny(**kw), torch.tensor([5, 2 ** 50, 9])
    torch.nn.init.normal_(o.model.decoder_queries)                              # it says more than one token
    for eta, prefix in ((0.0, some_prefix(o, 3)), (0.7, some_prefix(o, 3))):
        sampler = Sampler(o, 3, 4, eta)
        assert (sampler.start is None) == (o.model.cfg.perceiver_skip or o.model.cfg.perceiver_block == 'joint')
        z, logits = plain_sampler(o, seeds, 4, eta, prefix)
        torch.testing.assert_close(sampler.latents(seeds, **prefix), z, atol=1e-5, rtol=1e-4)
        assert torch.equal(sampler(seeds, **prefix), logits.argmax(-1))
        sampler = Sampler(o.eval(), 3, 4, eta)                                  # with the kernel of sampling
        torch.testing.assert_close(sampler.latents(seeds, **prefix), z, atol=1e-5, rtol=1e-4)
        o.train()
        assert len(logits.argmax(-1).unique()) > 1


@pytest.mark.parametrize('own, other', [(True, False), (True, True), (False, True)])
def test_attention_is_the_same_with_and_without_gradients(own, other):
    """Where no gradient is wanted, another path computes it: raw or cached keys, a mask or none."""
    torch.manual_seed(0)
    attn = Attention(LatentConfig(**SMALL), own, other).eval()
    x, y = torch.randn(2, 5, attn.o_proj.in_features), torch.randn(2, 7, attn.o_proj.in_features)
    rot, y_rot = (K.rope_tables(torch.arange(n).repeat(2, 1), attn.head_dim, 1e2) for n in (5, 7))
    mask = torch.ones(2, 1, 1, 7 * other + 5 * own, dtype=torch.bool)
    mask[0, ..., :3], mask[1, ..., :7] = not other, not (other and own)
    for seen in (None, mask):
        args = (y, y_rot, seen) if other else (None, None, seen)
        want = attn(x, rot, *args)
        with torch.no_grad():
            torch.testing.assert_close(attn(x, rot, *args), want)
            if own and other: torch.testing.assert_close(attn(x, rot, attn.keys(y, y_rot), None, seen), want)


@pytest.mark.parametrize('kw', SHAPES, ids=str)
def test_every_weight_matters(kw):
    """Each tensor but the encoder's, moved a little, moves the logits, and more than rounding does: the published
    loop multiplies the last z_hat by 0, and no weight of its denoiser does."""
    o, seeds = tiny(**kw), torch.tensor([5, 6])
    prefix = some_prefix(o, 2)

    def logits():
        s = Sampler(o, 2, 3)
        return s.states(s.latents(seeds, **prefix)) @ o.model.head.weight.T
    want, moved = logits(), {}
    assert torch.equal(want, logits())
    for name, p in o.model.named_parameters():
        old = p.detach().clone()
        with torch.no_grad(): p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        moved[name] = ((logits() - want).norm() / want.norm()).item()
        with torch.no_grad(): p.copy_(old)
    assert {n for n, x in moved.items() if x == 0} == {n for n in moved if n.startswith('encoder')}
    assert min(x for n, x in moved.items() if not n.startswith('encoder')) > 1e-5, moved


def test_sampler_is_kept_while_the_weights_stay():
    o = tiny()
    assert o.sampler(2, 3) is not o.sampler(2, 3)                               # training
    o.eval()
    assert o.sampler(2, 3) is o.sampler(2, 3) is not o.sampler(2, 4)
    assert o.sampler(2, 3, temperature=0.5) is not o.sampler(2, 3)
    old = o.sampler(2, 3)
    assert o.train().eval().sampler(2, 3) is not old
    plain, o.compiled = o.sampler(2, 3), 'default'
    assert plain.step == plain._step and o.sampler(2, 3).step != plain.step


def test_in_dtype_shares_or_casts():
    m = tiny().model
    low, same = m.in_dtype(torch.bfloat16), m.in_dtype(torch.float32)
    assert low.head.weight.dtype == low.dit[0].adaln.bias.dtype == torch.bfloat16 != m.head.weight.dtype
    assert low.token_decoder_norm.weight.dtype == low.timesteps.cdf.dtype == torch.float32
    for (n, a), b in zip(m.state_dict().items(), same.state_dict().values(), strict=True):
        assert a.data_ptr() == b.data_ptr(), n


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('compiled', ['', 'default'])
@pytest.mark.parametrize('kw', SHAPES, ids=str)
def test_graph_gives_what_the_eager_sampler_gives(kw, compiled):
    o, seen = tiny(**SMALL | dict(n_embd=64) | kw).to('cuda').eval(), set()
    for p in o.model.parameters():
        if p.ndim < 2: p.data *= 0.3                                            # else biases decide on the token
    prefix = {k: x.cuda() for k, x in some_prefix(o, 3).items()}
    sampler = Sampler(o, 3, 4, eta=0.5, compiled=compiled)
    for seed in range(8):
        seeds = torch.tensor([seed, 70 + seed, 2 ** 40 + seed], device='cuda')
        want = sampler.tokens(seeds, *prefix.values())
        got = sampler(seeds, **prefix)
        assert torch.equal(got, want) and (sampler.graph is not None) == (seed > 0)
        if seed: seen.add(tuple(got.flatten().tolist()))
    assert len(seen) > 1                                                        # replays, not one answer again


def test_history_shows_every_step():
    o, history = tiny(prefix_len=4, max_seq_len=17), []
    ids, nfe = o.sample([[1, 2], [3]], 20, n_steps=3, seed=0, history=history)
    assert nfe in (3, 6) and len(history) == nfe
    last_ids, conf = history[-1]
    assert last_ids.shape == conf.shape and last_ids.shape[1] <= 1 + 2 + 20 and 0 < conf.min() <= conf.max() <= 1
    assert last_ids[0, :3].tolist() == [0, 1, 2] and last_ids[1, 1:3].tolist() == [0, 3]
    assert last_ids[0, 3:3 + len(ids[0]) - 2].tolist() == ids[0][2:]


def test_self_conditioning_sees_the_guess_in_half_of_the_rows():
    o, calls = tiny(), []
    batch = o.prepare(rows(6), 0)
    assert batch.noise['guess'].tolist() == [1, 3, 5]
    plain = o.model.denoise
    def spy(zt, mods, z_sc, **kw):
        calls.append((torch.is_grad_enabled(), z_sc))
        return plain(zt, mods, z_sc, **kw)
    o.model.denoise = spy
    o(batch)
    (grad0, first), (grad1, second) = calls
    assert (grad0, grad1) == (False, True) and first.shape[0] == 3 and not first.any()
    assert not second[::2].any() and second[1::2].flatten(1).any(1).all() and not second.requires_grad
    calls.clear()
    Sampler(o, 1, 3).latents(torch.tensor([1]))
    assert not calls[0][1].any() and calls[1][1].any()                          # the previous z_hat
    off = tiny(settings=dict(self_cond=False))
    assert off.prepare(rows(6), 0).noise['guess'].numel() == 0


# ---- prefix ------------------------------------------------------------------------------------------------
def test_prefix_windows():
    """Chunk and prefix are cut from the row where they say; nothing behind the chunk's start is shown."""
    o = tiny(prefix_len=4, max_seq_len=13)
    batch = rows(64)
    b = o.prepare(batch, 0)
    start = b.noise['start']
    assert start.min() == 0 and start.max() == 4 and (start == 0).float().mean() > 0.2
    ids, h, prefix = o._window(b)
    all_h = o._normed(o.encoder.features(b.ids))
    for i in range(8):
        p = int(start[i])
        assert ids[i].tolist() == b.ids[i, 1 + p:1 + p + 8].tolist()
        assert torch.equal(h[i], all_h[i, 1 + p:1 + p + 8])
        assert prefix['seen'][i].tolist() == [False] * (4 - p) + [True] * p
        assert torch.equal(prefix['context'][i, 4 - p:], all_h[i, 1:1 + p])
    shown = o._prefix([b.ids[i, 1:1 + int(start[i])].tolist() for i in range(8)])       # what the sampler builds
    assert torch.equal(shown['seen'], prefix['seen'][:8])
    torch.testing.assert_close(shown['context'][shown['seen']], prefix['context'][:8][shown['seen']])
    short = o.prepare(replace(batch, ids=torch.cat([batch.ids[:, :3], 0 * batch.ids[:, 3:]], 1)), 0)
    assert short.noise['start'].max() <= 2                                      # not behind the end of the text


def test_a_long_text_is_read_as_in_training(tmp_path):
    """A row of training begins one token before its prefix: what lies further back must not reach the sampler either,
    nor shift the positions."""
    torch.manual_seed(0)
    Transformer(ModelConfig(vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=24, n_ff=48, head_dim=12)
                ).save_pretrained(tmp_path)
    o, ids = tiny(str(tmp_path), prefix_len=4), torch.randint(1, 64, (13,)).tolist()
    shown = o._prefix([ids[:9]])
    row = batch_from_documents([ids[4:13] + [0] * 4])
    want = o._window(replace(row, noise=dict(start=torch.tensor([4]))))[2]
    assert shown['seen'].all() and want['seen'].all()
    torch.testing.assert_close(shown['context'], want['context'])


def test_later_chunks_continue_and_have_noise_of_their_own():
    """A chunk sees the last prefix_len tokens of what is there; its noise is not that of the chunk before."""
    o, calls = tiny(prefix_len=4), []
    o.eos_id = None

    def spy(seeds, see=None, **prefix):
        calls.append((seeds, prefix))
        return torch.arange(1, 9)[None] + 8 * len(calls)
    o.sampler = lambda *a: spy
    (text,), nfe = o.sample([[7, 8]], 20, n_steps=3)
    assert text == [7, 8, *range(9, 29)]
    assert nfe == 9 and len({seeds.item() for seeds, _ in calls}) == 3
    for (_, prefix), before in zip(calls, ([7, 8], text[:10], text[:18])):
        for k, x in o._prefix([before]).items(): assert torch.equal(prefix[k], x)


def test_where_the_prefix_lies():
    """Left of the chunk, whose tokens and latents share one axis: attention of a key sees differences of positions."""
    m = tiny(prefix_len=4, n_latents=4).model                                   # a latent per two tokens of eight
    got = {what: m._rot(what, 1) for what in ('prefix', 'tokens', 'latents')}
    where = dict(prefix=[-4, -3, -2, -1], tokens=list(range(8)), latents=[0.5, 2.5, 4.5, 6.5])
    for what, pos in where.items():                                             # the first pair turns by 1 rad a token
        cos, sin = (x[0, :, 0].tolist() for x in got[what])
        assert cos == pytest.approx([math.cos(p) for p in pos], abs=1e-5), what
        assert sin == pytest.approx([math.sin(p) for p in pos], abs=1e-5), what


def test_checkpointing_runs_blocks_again():
    """Every block of all networks once more in the backward pass, and the gradients are the same."""
    def run(checkpointing):
        o, calls = tiny(prefix_len=4, settings=dict(self_cond=False)), []
        o.model.activation_checkpointing = checkpointing
        for net in o.networks():
            for block in net.layers: block.register_forward_pre_hook(lambda block, args: calls.append(block))
        loss, _ = o.train()(o.prepare(rows(4), 0))
        forward = len(calls)
        loss.backward()
        return forward, len(calls), [p.grad for p in o.model.parameters()]
    (n, all_plain, want), (_, all_again, got) = run(False), run(True)
    assert all_plain == n and all_again == 2 * n
    for a, b in zip(got, want): torch.testing.assert_close(a, b)


def test_flops_are_those_of_the_counter():
    """PyTorch's count of a training step, less what the docstring leaves out."""
    from torch.utils.flop_counter import FlopCounterMode
    for kw in ({}, dict(perceiver_block='split', perceiver_skip=False)):
        o = tiny(**kw)
        batch = o.prepare(rows(4), 0)
        with FlopCounterMode(display=False) as counter: o(batch)[0].backward()
        assert 0.9 < o.flops_per_token(13) * batch.ids.numel() / counter.get_total_flops() < 0.95


def test_unseen_prefix_does_not_matter():
    o = tiny(prefix_len=4)
    z, mods = torch.randn(2, 8, 32), o.model.modulations(torch.tensor([0.3, 0.6]))
    seen = torch.tensor([[False, False, True, True]] * 2)
    context = torch.randn(2, 4, 24)
    changed = context.clone(); changed[:, :2] = 9
    out = [o.model.denoise(z, mods, z * 0, c, seen) for c in (context, changed, context.flip(1))]
    torch.testing.assert_close(out[0], out[1])
    assert (out[0] - out[2]).abs().max() > 1e-4


# ---- sizes -------------------------------------------------------------------------------------------------
def sizes(**kw):
    with torch.device('meta'): model = LatentModel(LatentConfig(**kw))
    return model


def test_parameters_of_the_papers_table():
    """6 Perceiver layers of 14 d^2 (49.5M), a token decoder of 3 x 16 d^2 and its head (66.9M), 12 DiT layers of 18 d^2
    and 7 d^2 around them (131.5M), positions and queries aside: to 0.1%; what is more are norms and biases."""
    m, d = sizes(vocab_size=50257, feature_dim=768, max_seq_len=129), 768
    for part, squares in (('encoder', 6 * 14), ('decoder', 6 * 14), ('dit', 12 * 18 + 7)):
        assert m.n_params(False, part) == pytest.approx(squares * d * d, rel=1e-3), part
    assert m.n_params(part='token_decoder') + m.n_params(part='head') == pytest.approx(
        3 * 16 * d * d + 50257 * d, rel=1e-3)


@pytest.mark.parametrize('d, n_ff, table', [
    (2048, 5464, dict(encoder=268.7, decoder=268.7, token_decoder=134.3, head=508.8, dit=205.6, total=1386)),
    (5120, 13656, dict(encoder=1678.3, decoder=1678.3, token_decoder=839.1, head=1271.6, dit=1284.7, total=6752))])
def test_parameters_of_the_readmes_table(d, n_ff, table):
    m = sizes(vocab_size=248320, feature_dim=d, max_seq_len=65, n_embd=d, n_head=d // 128, n_ff=n_ff, n_layer=4,
              perceiver_layers=4, decoder_layers=2, perceiver_block='split', dit_adaln=False)
    for part, millions in table.items():
        assert m.n_params(part='' if part == 'total' else part) / 1e6 == pytest.approx(millions, rel=1e-3), part


def test_ablations():
    """sigma from the capacity of a latent: 512 dimensions at sigma 3 hold 39 bits; arms name settings of train.py."""
    root = Path(__file__).parent.parent
    script, train = runpy.run_path(root / 'experiments/ldlm_ablations.py'), (root / 'train.py').read_text()
    assert script['capacity_sigma'](512, 39) == pytest.approx(3, abs=0.01)
    sigma = script['ARMS']['I'][1]['sigma_dec']
    assert 128 / 2 * math.log2(1 + sigma ** -2) == pytest.approx(39, abs=0.1)
    for _, settings in script['ARMS'].values():
        for key in settings: assert f'\n{key} = ' in train, key


def test_an_encoder_is_found_from_another_directory(tmp_path, monkeypatch):
    """A checkpoint holds the path as it was given in training, most often from the repository: like sample.py's
    out_dir it is looked up there, too."""
    Transformer(ModelConfig(64, n_layer=3, n_head=2, n_kv_head=2, n_embd=24, n_ff=48, causal=True)).save_pretrained(
        tmp_path / 'repo/out/ar')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.setattr('model.__file__', str(tmp_path / 'repo/model.py'))
    monkeypatch.chdir(tmp_path / 'elsewhere')
    e = Encoder('out/ar', -2).load()
    assert e.path == 'out/ar' and e.features(torch.ones(1, 4).long()).shape == (1, 4, 24)
    with pytest.raises(SystemExit, match='no such'): Encoder('out/or', -2).load()


def test_ablations_are_of_equal_length_and_not_mixed(tmp_path, monkeypatch):
    """Every arm takes the steps that were asked for, in a folder of its own; a result holds one set of settings."""
    runs, real = [], subprocess.Popen

    def fake(command, **kw):
        if command[0] == 'git': return real(command, **kw)
        words = dict(str(word).removeprefix('--').split('=', 1) for word in command if '=' in str(word))
        runs.append(words)
        facts = dict.fromkeys(('validation', 'parameters', 'steps', 'tokens', 'train_minutes', 'tokens_per_s'), 1)
        Path(words['out_dir']).mkdir(parents=True)
        Path(words['out_dir'], 'result.json').write_text(json.dumps(facts))
        return SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(subprocess, 'Popen', fake)

    def ablations(*words):
        monkeypatch.setattr(sys, 'argv', ['x', f'--out_dir={tmp_path}/out', f'--result={tmp_path}/r.json', *words])
        runpy.run_path(str(Path(__file__).parent.parent / 'experiments/ldlm_ablations.py'), run_name='__main__')
    ablations('--arms=A,C', '--max_iters=20')
    ablations('--arms=D', '--max_iters=20')                                     # A and C are there
    assert [f"{r['seed']} {r['encoder_warmup']}" for r in runs] == ['1337 8', '1338 8', '1337 0', '1337 8']
    assert all(r['max_minutes'] == '0' and r['out_dir'].endswith('-20') for r in runs)
    assert len(json.loads((tmp_path / 'r.json').read_text())['results']) == 4
    with pytest.raises(SystemExit, match="got 'Z'"): ablations('--arms=Z', '--max_iters=30')
    for words, what in ((['--max_iters=30'], 'max_iters 20'), (['--max_iters=20', '--nfe=4'], 'nfe'),
                        (['--max_iters=20', '--global_batch_size=32'], 'global_batch_size 512 -> 32')):
        with pytest.raises(SystemExit, match=f'other settings .{what}'): ablations('--arms=E', *words)
    assert len(runs) == 4
    r = json.loads((tmp_path / 'r.json').read_text())
    r['results'][0]['settings']['encoder_warmup'] = 9
    (tmp_path / 'r.json').write_text(json.dumps(r))
    (tmp_path / 'r_2.json').write_text(json.dumps(dict(results=[dict(arm='B', seed=1337, settings=dict(
        feature_loss=False, encoder_warmup=8))])))
    ablations('--arms=B', '--max_iters=20')                                     # the part of another GPU
    assert len(runs) == 4
    with pytest.raises(SystemExit, match='another arm A'): ablations('--arms=A', '--max_iters=20')


# ---- encoder and data --------------------------------------------------------------------------------------
def test_encoder_is_hidden_states_of_transformers(tmp_path):
    """Of our own checkpoint and of GPT-2 by transformers, at any layer; later blocks are gone; not a submodule."""
    from transformers import AutoModel, GPT2Config, GPT2Model
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 9))
    own = Transformer(ModelConfig(vocab_size=64, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16))
    gpt2 = GPT2Model(GPT2Config(n_layer=4, n_head=2, n_embd=32, vocab_size=64, bos_token_id=0, eos_token_id=0))
    for norm in (own.norm, gpt2.ln_f): torch.nn.init.normal_(norm.weight)
    own.save_pretrained(tmp_path / 'own')
    gpt2.bfloat16().save_pretrained(tmp_path / 'gpt2')                          # read as fp32 all the same
    for kind in ('own', 'gpt2'):
        model = AutoModel.from_pretrained(tmp_path / kind, dtype=torch.float32)
        with torch.no_grad(): states = model.eval()(ids, output_hidden_states=True).hidden_states
        for layer in (-1, -2, -3, 1, 4):
            encoder = Encoder(tmp_path / kind, layer)
            torch.testing.assert_close(encoder.features(ids), states[layer], atol=1e-5, rtol=1e-4)
        with torch.autocast('cpu', torch.bfloat16): again = encoder.features(ids)
        assert torch.equal(again, encoder.features(ids))
        assert (encoder.width, encoder.vocab_size) == (32, 64)
        with pytest.raises(SystemExit, match='has 4 blocks'): Encoder(tmp_path / kind, -5).load()
    assert len(Encoder(tmp_path / 'own', -3).load().model.layers) == 2
    with pytest.raises(SystemExit, match='not the one'): Encoder(tmp_path / 'own', -3, hash='1234').load()
    o = tiny(str(tmp_path / 'own'))
    assert not any('norm.weight' == n or 'embed' in n for n in o.state_dict())
    assert sum(p.numel() for p in o.parameters()) == o.model.n_params()


def test_a_bidirectional_encoder_gives_no_prefix(tmp_path):
    """Of transformers' models it is seen in their features which ones look ahead; without a prefix they will do."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=32, intermediate_size=48,
                         vocab_size=64)).save_pretrained(tmp_path / 'bert')
    GPT2Model(GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=64, bos_token_id=0, eos_token_id=0)
              ).save_pretrained(tmp_path / 'gpt2')
    tiny(str(tmp_path / 'gpt2'), prefix_len=4), tiny(str(tmp_path / 'bert'))
    with pytest.raises(SystemExit, match='not causal'): tiny(str(tmp_path / 'bert'), prefix_len=4)


def test_whose_features_they_are(tmp_path):
    """A scorer must be another model than the encoder, whatever its folder is called."""
    for seed, name in enumerate(('own', 'other')):
        torch.manual_seed(seed)
        Transformer(ModelConfig(vocab_size=64, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16)
                    ).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / 'own', tmp_path / 'copy')
    e = Encoder(tmp_path / 'own', -4).load()
    assert [e.is_of(str(tmp_path / name)) for name in ('own', 'copy', 'other')] == [True, True, False]
    Transformer(ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16)
                ).save_pretrained(tmp_path / 'short')
    assert not e.is_of(str(tmp_path / 'short'))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_encoder_on_another_gpu(tmp_path):
    """Its Triton kernels run where its weights are, not on the current device."""
    torch.manual_seed(0)
    Transformer(ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16)
                ).save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9), device='cuda:0')
    here, there = (Encoder(tmp_path, -1, device=d).features(ids) for d in ('', 'cuda:1'))
    assert here.device == there.device == ids.device and torch.equal(here, there)
    torch.testing.assert_close(there.cpu(), Encoder(tmp_path, -1, device='cpu').features(ids).cpu(), atol=.05, rtol=.05)


def test_cache_encodes_a_row_once(tmp_path):
    """Also for the next process, and after a crash in the middle of a row; what is not in the cache is added."""
    def encoder():
        e = Encoder('random:24:64', cache=str(tmp_path))
        e.calls, plain = [], e.features
        e.features = lambda ids: e.calls.append(len(ids)) or plain(ids)
        return e
    ids, first = rows(6).ids, encoder()
    want = first.features(ids).bfloat16().float()
    assert torch.equal(first.cached(ids[:4]), want[:4]) and torch.equal(first.cached(ids[1:]), want[1:])
    assert first.calls == [6, 4, 2]
    keys = next(tmp_path.rglob('*.keys'))
    keys.write_bytes(keys.read_bytes()[:-7])                                    # the last key was cut off
    second = encoder()
    assert torch.equal(second.cached(ids.flip(0)), want.flip(0)) and second.calls == [1]
    os.truncate(keys.with_suffix('.rows'), 100)                                 # so were the rows
    third = encoder()
    assert torch.equal(third.cached(ids), want) and third.calls == [5]


def test_cache_is_of_one_encoder(tmp_path):
    """Other weights, another layer, or the same weights read otherwise (here: bidirectional) share nothing."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 9))
    model = Transformer(ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16))
    for name in ('a', 'bidirectional', 'trained'):
        model.cfg.causal = name != 'bidirectional'
        if name == 'trained': model.layers[0].mlp.down_proj.weight.data.mul_(2)
        model.save_pretrained(tmp_path / name)
    for name, layer in (('a', -1), ('a', -2), ('bidirectional', -1), ('trained', -1), ('a', -1)):
        encoder = Encoder(tmp_path / name, layer, cache=tmp_path / 'cache')
        assert torch.equal(encoder.cached(ids), encoder.features(ids).bfloat16().float()), (name, layer)
    assert len(list((tmp_path / 'cache').iterdir())) == 4


def test_feature_statistics_are_per_dimension_and_skip_the_sink():
    o, batch = tiny(), rows(64)
    raw = o.encoder.features(batch.ids)
    o.start([part(batch, 0, 32), part(batch, 32, 64)])
    h = raw[:, 1:].flatten(0, 1)
    want = torch.stack([h.mean(0), h.std(0, correction=0)])
    torch.testing.assert_close(o.model.feature_stats, want, atol=1e-4, rtol=1e-3)


def test_one_chunk_per_row_filled_with_eos(tmp_path):
    doc, offset, length, slot = lay_out(np.array([5, 12, 3]), 6, alone=True)
    assert (slot % 6).tolist() == [0] * 5 and doc.tolist() == [0, 1, 1, 1, 2] and length.tolist() == [5, 6, 6, 2, 3]
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps(dict(text='ab' * n)) + '\n' for n in range(1, 20)))
    prepare(str(tmp_path / 'x.jsonl'), str(tmp_path / 'd'), tokenizer='bytes', val_fraction=0.2)
    corpus, eos = Corpus(tmp_path / 'd', 'train', 12, alone=True), byte_tokenizer().eos_id
    batch = corpus.batch(0, 0, 8, 8, 0)
    assert batch.n_targets == 8 * 11 and batch.is_target[:, 1:].all() and not batch.is_target[:, 0].any()
    assert (batch.doc == 0).all() and (batch.pos == torch.arange(12)).all()
    for row in batch.ids:
        text = row[1:]
        end = (text == eos).nonzero()
        assert len(end) == 0 or (text[end[0, 0]:] == eos).all()                 # nothing after the end
    assert Corpus(tmp_path / 'd', 'train', 12).n_targets < corpus.n_targets


def test_prompts_are_refused(tmp_path):
    """Every token of a chunk is learnt: data with given prompts would lose them silently."""
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps(dict(p='a' * n, r='b' * n)) + '\n' for n in range(1, 20)))
    prepare(str(tmp_path / 'x.jsonl'), str(tmp_path / 'd'), tokenizer='bytes', key='p,r', val_fraction=0.2)
    with pytest.raises(SystemExit, match='has prompts, which are'): Corpus(tmp_path / 'd', 'train', 12, alone=True)


def test_likelihood_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match='no likelihood'): tiny().nelbo(rows(2))


# ---- checkpoints -------------------------------------------------------------------------------------------
def test_checkpoint_round_trip(tmp_path):
    tok = byte_tokenizer()
    o = tiny(f'random:24:{tok.vocab_size}', prefix_len=4, settings=dict(sigma_dec=1.5, encoder_warmup=7))
    o.eos_id = o.separator = tok.eos_id
    for _ in range(3): o.after_step(o(o.prepare(rows(4), 0))[1])
    path = checkpoint.save_checkpoint(tmp_path, 'step', o, tok, dict(step=3))
    again, tok2 = checkpoint.load_checkpoint(str(tmp_path))
    assert again.dlm == o.dlm and again.settings['sigma_dec'] == 1.5 and again.encoder.model is None
    for (n, a), b in zip(o.state_dict().items(), again.state_dict().values(), strict=True): assert torch.equal(a, b), n
    assert again.sample([[5]], 8, n_steps=2)[0] == o.sample([[5]], 8, n_steps=2)[0]
    assert tok2.encode('a') == tok.encode('a') and (path / 'config.json').exists()
    with pytest.raises(SystemExit, match='--encoder'): checkpoint.load_checkpoint(str(tmp_path), 'mdm')


def test_ema():
    model = Transformer(ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16))
    o = AR(model, separator=0, eos_id=0)
    w = model.norm.weight
    ema, want = checkpoint.EMA(o, 0.9), 1.0
    for step in range(30):
        w.data.fill_(float(step))
        ema.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        want = d * want + (1 - d) * step
    with ema.applied():
        assert w[0].item() == pytest.approx(want, rel=1e-5)
        assert ema.raw()['model.norm.weight/raw'][0] == 29
    assert w[0] == 29
    none = checkpoint.EMA(o, 0.0)
    none.update(3)
    with none.applied(): assert w[0] == 29


# ---- it learns ---------------------------------------------------------------------------------------------
SENTENCES = ["the cat sat on a mat", "a dog ran in the park", "we saw two red birds", "rain fell all night",
             "she sold sea shells", "time flies like an arrow", "he read an old book", "it was a dark night"]


def train_on(docs, T, steps, n_rows=32, lr=4e-3, settings=None, **kw):
    """An LDLM on random draws of `docs`, EOS-filled, with Adam and an EMA."""
    torch.manual_seed(0)
    encoder = Encoder('random:32:64').load()
    size = dict(n_embd=64, n_head=2, n_ff=128, n_layer=2, perceiver_layers=1, decoder_layers=1)
    model = LatentModel(LatentConfig(vocab_size=64, feature_dim=32, max_seq_len=T, **size, **kw))
    o = LDLM(encoder, model, 0, 0, **dict(sigma_dec=3.0, encoder_warmup=100) | (settings or {}))
    opt = torch.optim.AdamW(o.param_groups(0.0), lr=lr, betas=(0.9, 0.98))
    ema = checkpoint.EMA(o, 0.97)
    ids = torch.tensor([d + [0] * (T - len(d)) for d in docs])
    batch = lambda step: batch_from_documents(
        ids[torch.randint(len(ids), (n_rows,), generator=torch.Generator().manual_seed(step))].tolist(), step=step)
    o.start([batch(0)])
    for step in range(steps):
        for group in opt.param_groups: group['lr'] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss, stats = o(o.prepare(batch(step), 0))
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(o.parameters(), 1.0)
        opt.step(); ema.update(step); o.after_step(stats)
    ema._swap()
    return o, batch


def test_overfits_eight_sentences_through_the_whole_sampler():
    """From noise, 32 steps of DDIM and the decoders give back the eight sentences: > 99% of the tokens are those of the
    nearest one, and at most one sentence is missing (a collapsed latent
    space writes one or two)."""
    words = ['', *sorted({w for s in SENTENCES for w in s.split()})]
    docs = [[0, *map(words.index, s.split())] for s in SENTENCES]
    o, batch = train_on(docs, 9, 450, perceiver_skip=False, settings=dict(encoder_grad=0.1))
    padded = [d[1:] + [0] * (9 - len(d)) for d in docs]
    val = o.validate([batch(0)], 0)
    assert val['accuracy'] > 0.99
    out, nfe = o.sample([[]] * 64, 8, n_steps=32, seed=1)
    rows = [row + [0] * (8 - len(row)) for row in out]
    right = [max((sum(a == b for a, b in zip(row, d)), i) for i, d in enumerate(padded)) for row in rows]
    assert sum(n for n, _ in right) / (64 * 8) > 0.99 and nfe == 32
    assert len({i for _, i in right}) >= 7


def test_the_true_prefix_helps():
    """Rows that repeat a word: with its own prefix the next chunk is easier to denoise than with another row's or with
    none, and the sampler goes on with the word."""
    docs = [[0] + [a] * 10 for a in range(1, 41)]
    o, batch = train_on(docs, 11, 200, prefix_len=4)
    b = o.prepare(batch(9999), 0)
    t = torch.full_like(b.noise['xi'], 0.9)
    b = replace(b, noise=b.noise | dict(start=torch.full_like(b.noise['start'], 4)))
    with torch.no_grad():
        _, h, prefix = o._window(b)
        z0 = o.model.normalise(o.model.encode(h))
        loss = lambda p: (o._denoise(z0, t, b.noise['seed'], b.noise['guess'], p) - z0).square().mean().item()
        true, other = loss(prefix), loss(dict(prefix, context=prefix['context'].roll(1, 0)))
        none = loss(dict(prefix, seen=torch.zeros_like(prefix['seen'])))
    assert true < 0.7 * other and true < 0.8 * none, (true, none, other)
    out, _ = o.sample([[7] * 4, [23] * 4], 6, n_steps=16)
    assert sum(a == b for row, b in zip(out, (7, 23)) for a in row[4:]) >= 8, out


def test_first_steps_sees_what_stands_still():
    moved = runpy.run_path(str(Path(__file__).parent.parent / 'experiments/first_steps.py'))['moved']
    names = 'dit.0.x', 'encoder.x', 'decoder.x', 'token_decoder.x', 'token_decoder.y', 'head.x'
    before = {n: torch.ones(2) for n in names}
    after = {n: x if n == 'token_decoder.y' else x * 1.5 for n, x in before.items()}
    found = moved(before, after)
    assert found['head'] == dict(change=0.5, tensors=1, still=0)
    assert found['token_decoder']['still'] == 1 and found['decoder'] == dict(change=0.5, tensors=1, still=0)
