"""Masked diffusion against exact answers: toy joints whose conditionals are known, and the samplers' invariants."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ar import AR
from data import batch_from_documents
from mdm import MDM, N_BUCKETS, q_sample
from model import ModelConfig, Transformer

V, L = 3, 4
MASK, SEP = V, V + 1


def tiny(vocab=64, causal=True, **kw):
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=vocab, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16,
                      causal=causal, **kw)
    model = Transformer(cfg).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model


class ExactConditionals(nn.Module):
    """In place of a network: p(x_i | the visible tokens) of a known joint over V^L, read off by summing it."""
    def __init__(self, joint):
        super().__init__()
        self.cfg = ModelConfig(vocab_size=V + 2)
        self.joint, self.head_weight = joint, torch.eye(V + 2)
        self.embed_tokens = nn.Embedding(1, 1)

    def hidden(self, ids, ranges=None, pos=None, tap=None):
        out = torch.full((*ids.shape, V + 2), -1e9)                  # hidden = logits, the head is the identity
        for b, row in enumerate(ids.tolist()):
            for i in range(1, L + 1):
                visible = [slice(None) if t == MASK or j == i else t for j, t in enumerate(row)][1:]
                table = self.joint[tuple(visible)]
                axis = sum(isinstance(v, slice) for v in visible[:i - 1])
                p = table.sum([a for a in range(table.ndim) if a != axis]) if table.ndim > 1 else table
                out[b, i, :V] = (p / p.sum()).log()
        return out


@pytest.fixture(scope='module')
def joint():
    p = torch.rand(*[V] * L, generator=torch.Generator().manual_seed(1)).double() ** 4
    return p / p.sum()


def all_sequences(): return [[SEP, *s] for s in itertools.product(range(V), repeat=L)]


# -- oracle 1: with the exact conditionals the bound IS the entropy ---------------------------------------------


def test_bound_with_exact_conditionals_equals_the_entropy_by_enumeration(joint):
    """E_m[ n/m sum_{i masked} CE_i ], enumerated over every sequence and every mask, weighted by the joint."""
    model, total = ExactConditionals(joint), 0.0
    entropy = -(joint * joint.log()).sum().item()
    for seq in all_sequences():
        x0 = torch.tensor([seq])
        for m in range(1, L + 1):
            masks = list(itertools.combinations(range(1, L + 1), m))
            for mask in masks:
                xt = x0.clone(); xt[0, list(mask)] = MASK
                ce = F.cross_entropy(model.hidden(xt)[0, list(mask)], x0[0, list(mask)], reduction='sum').item()
                total += joint[tuple(seq[1:])].item() * (L / m) * ce / len(masks) / L
    assert total == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize('estimator', ['count', 't'])
def test_both_estimators_reach_the_entropy(joint, estimator):
    """row_nll draws masks at random; averaged over the joint and many draws it must find the same number, and so
    must any other pair of seeds (oracle 3)."""
    mdm = MDM(ExactConditionals(joint), MASK, separator=SEP)
    entropy = -(joint * joint.log()).sum().item()
    batch = batch_from_documents(all_sequences())
    p = torch.tensor([joint[tuple(s[1:])] for s in all_sequences()])
    nats, n = mdm.row_nll(batch, k=64, seed=3, estimator=estimator)
    assert n.tolist() == [L] * len(p)
    assert (nats * p).sum().item() == pytest.approx(entropy, rel=0.02)


def test_training_loss_is_the_same_bound(joint):
    """prepare + forward, averaged over steps, estimate the same bound: the loss is an ELBO per target token."""
    mdm = MDM(ExactConditionals(joint), MASK, separator=SEP)
    seqs = [all_sequences()[i] for i in torch.multinomial(joint.flatten().float(), 4000, replacement=True,
                                                          generator=torch.Generator().manual_seed(0))]
    loss, stats = mdm(mdm.prepare(batch_from_documents(seqs), seed=0))
    exact = sum(-joint[tuple(s[1:])].log().item() for s in seqs) / len(seqs) / L
    assert loss.item() == pytest.approx(exact, rel=0.04)             # 1/t has heavy tails: the loose one
    assert stats['ce_by_t'].shape == (2, N_BUCKETS)


# -- oracle 2: a Markov chain with a known entropy rate ------------------------------------------------------------


def test_trained_bound_stays_above_the_entropy_rate_and_approaches_it():
    P = torch.tensor([[.8, .1, .1], [.1, .8, .1], [.1, .1, .8]])
    rate = -(P[0] * P[0].log()).sum().item()                         # .639; the first token costs log 3
    T, g = 24, torch.Generator().manual_seed(0)
    def chains(n):
        x = torch.zeros(n, T, dtype=torch.long); x[:, 0] = SEP
        x[:, 1] = torch.randint(0, 3, (n,), generator=g)
        for i in range(2, T): x[:, i] = torch.multinomial(P[x[:, i - 1]], 1, generator=g).squeeze(1)
        return x.tolist()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=5, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, n_ff=64, head_dim=16))
    mdm = MDM(model, MASK, separator=SEP)
    floor = (math.log(3) + (T - 2) * rate) / (T - 1)
    val = batch_from_documents(chains(256))
    start, _ = mdm.nelbo(val, k=2, seed=0)
    opt = torch.optim.AdamW(mdm.param_groups(0.0), lr=4e-3)
    for step in range(250):
        loss, _ = mdm(mdm.prepare(replace(batch_from_documents(chains(64)), step=step), seed=0))
        opt.zero_grad(); loss.backward(); opt.step()
    mean, stderr = mdm.nelbo(val, k=16, seed=0)
    assert start > 1.0 and mean > floor - 3 * stderr
    assert mean < floor + 0.06


# -- oracle 4: scored left to right, a causal shifted backbone is its own AR model ------------------------------------


def test_left_to_right_scoring_equals_ar_likelihood():
    model = tiny(causal=True)
    ar = AR(model, mask_id=60)
    ids = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = batch_from_documents(ids.tolist())
    exact, _ = ar.row_nll(batch)
    mdm = MDM(model, mask_id=60, shift=True)
    model.cfg.causal = True                                          # MDM made it bidirectional
    nats = torch.zeros(3)
    with torch.no_grad():
        for i in range(1, 9):
            xt = ids.clone(); xt[:, i:] = 60
            nats += F.cross_entropy(mdm.logits(xt)[:, i], ids[:, i], reduction='none')
    torch.testing.assert_close(nats, exact, rtol=1e-5, atol=1e-5)


# -- the objective ---------------------------------------------------------------------------------------------------


def test_weightings_are_what_the_formulas_say():
    """loss = sum (a + b sg p) CE, recomputed with full logits, for each weighting; with and without a shift."""
    docs = torch.randint(0, 60, (4, 20), generator=torch.Generator().manual_seed(0)).tolist()
    for weighting, shift in itertools.product(('elbo', 'flat', 'planner'), (False, True)):
        mdm = MDM(tiny(), 60, shift=shift, weighting=weighting)
        batch = mdm.prepare(batch_from_documents(docs), seed=1)
        loss, _ = mdm(batch)
        xt, n = batch.noise['xt'], batch.n_targets
        is_masked = xt == 60
        u = np.random.default_rng((1, 0)).random()
        t = 1e-3 + (1 - 1e-3) * ((u + 0.618034 * torch.arange(4).double()) % 1)[:, None].expand(4, 20)[is_masked]
        z = mdm.logits(xt)[is_masked]
        ce = F.cross_entropy(z, batch.ids[is_masked], reduction='none')
        p = (-ce).exp().detach()
        want = {'elbo': ce / t, 'flat': 2 * ce, 'planner': 2 * ce + 2 * p * ce / t}[weighting].sum() / n
        assert loss.item() == pytest.approx(want.item(), rel=1e-5), (weighting, shift)
        got = torch.autograd.grad(loss, list(mdm.parameters()))
        for a, b in zip(got, torch.autograd.grad(want, list(mdm.parameters()))):
            torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-5)


def test_gradient_does_not_vanish_when_the_first_token_is_not_masked():
    """The bug this project answers to: a fused loss whose backward scales everything by the first row's factor."""
    mdm = MDM(tiny(), 60)
    batch = mdm.prepare(batch_from_documents(torch.randint(0, 60, (2, 16)).tolist()), seed=0)
    assert batch.noise['xt'][0, 0] != 60                             # position 0 is context, always
    loss, _ = mdm(batch)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in mdm.parameters())


def test_noise_is_a_function_of_seed_step_and_row():
    """Half a batch gets the same noise as the whole one: ranks and micro-batches do not matter."""
    docs = torch.randint(0, 60, (6, 16)).tolist()
    mdm, whole = MDM(tiny(), 60), batch_from_documents(docs)
    half = replace(batch_from_documents(docs[3:]), row_ids=whole.row_ids[3:], n_targets=whole.n_targets)
    xt = mdm.prepare(whole, seed=5).noise['xt']
    assert torch.equal(mdm.prepare(half, seed=5).noise['xt'], xt[3:])
    assert not torch.equal(mdm.prepare(whole, seed=6).noise['xt'], xt)
    assert not torch.equal(mdm.prepare(replace(whole, step=1), seed=5).noise['xt'], xt)


def test_t_is_stratified_and_targets_only():
    docs = [[SEP] + [0] * 63] * 64
    mdm = MDM(tiny(), 60)
    shares = []
    for step in range(20):
        batch = mdm.prepare(replace(batch_from_documents(docs), step=step), seed=0)
        assert not (batch.noise['xt'][:, 0] == 60).any()
        shares.append((batch.noise['xt'] == 60).float().mean().item() * 64 / 63)
    assert np.std(shares) < 0.015 and abs(np.mean(shares) - 0.5) < 0.01     # independent t: std 0.036


def test_q_sample():
    x0 = torch.arange(10000).view(1, -1)
    xt, is_masked = q_sample(x0, torch.tensor([[0.3]]), 60)
    assert ((xt == 60) == (is_masked | (x0 == 60))).all() and torch.equal(xt[~is_masked], x0[~is_masked])
    assert abs(is_masked.float().mean() - 0.3) < 0.02
    assert not q_sample(x0, torch.tensor([[1.0]]), 60, is_target=x0 < 5)[1][:, 5:].any()


# -- samplers ----------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
RULES = [dict(commit='schedule', score=s) for s in ('confidence', 'margin', 'entropy', 'random')] + [
    dict(commit='ancestral', score='random'), dict(commit='threshold', tau=0.1), dict(remask='p2'),
    dict(block_len=4), dict(block_len=4, commit='threshold'), dict(block_len=3, remask='p2')]


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('shift', [False, True])
def test_prompts_stay_and_no_mask_is_left(rule, shift):
    mdm, history = MDM(tiny(), 60, shift=shift, separator=61), []
    out, nfe = mdm.sample(PROMPTS, max_new_tokens=10, n_steps=7, history=history, seed=1, **rule)
    for p, o in zip(PROMPTS, out):
        assert o[:len(p)] == p and len(o) == len(p) + 10 and 60 not in o
    assert len(history) == nfe + 1                                   # no forward without a change, none unrecorded
    assert (history[0][0] == 60).sum() == 30
    assert nfe <= 10 if rule.get('remask') != 'p2' else nfe <= 7 + 1


@pytest.mark.parametrize('rule', [r for r in RULES if r.get('score') != 'random'], ids=str)
def test_greedy_is_deterministic_and_rows_do_not_see_each_other(rule):
    """A batch of one equals a batch of many, padded on either side."""
    mdm = MDM(tiny(), 60, shift=True, separator=61)
    holes = [[p, 10] for p in PROMPTS]
    out, _ = mdm.infill(holes, n_steps=16, temperature=0, seed=1, **rule)
    left, _ = mdm.infill(holes, n_steps=16, temperature=0, seed=2, pad_side='left', **rule)
    alone = [mdm.infill([h], n_steps=16, temperature=0, seed=3, **rule)[0][0] for h in holes]
    assert out == left == alone


def test_infill_fills_holes_only():
    mdm = MDM(tiny(), 60, separator=61)
    (a, b), nfe = mdm.infill([[[1, 2], 3, [4, 5], 2, [6]], [[7], 4]], n_steps=50)
    assert a[:2] == [1, 2] and a[5:7] == [4, 5] and a[9:] == [6] and len(a) == 10
    assert b[:1] == [7] and len(b) == 5 and 60 not in a + b
    assert nfe == 5                                                  # never more forwards than the longest row's holes


def test_threshold_above_one_is_one_token_per_step():
    mdm = MDM(tiny(), 60, separator=61)
    a = mdm.sample([[1, 2]], 12, commit='threshold', tau=1.1, temperature=0)
    b = mdm.sample([[1, 2]], 12, n_steps=12, commit='schedule', temperature=0)
    assert a == b and a[1] == 12
    assert mdm.sample([[1, 2]], 12, commit='threshold', tau=0.0, temperature=0)[1] == 1


def test_nfe_never_wasted():
    mdm = MDM(tiny(), 60, separator=61)
    for n_steps in (1, 5, 7, 8, 9, 100):
        for rule in (dict(), dict(commit='ancestral'), dict(block_len=3)):
            _, nfe = mdm.sample([[1]], 8, n_steps=n_steps, **rule)
            bound = min(max(n_steps, 3 if rule.get('block_len') else 1), 8)
            assert nfe <= bound, (n_steps, rule)
            if not rule: assert nfe == bound


def test_ancestral_unmasks_the_schedules_share():
    """With commit='ancestral' the number of masks left at step j is Binomial(m, 1 - j/S)."""
    mdm, history = MDM(tiny(), 60, separator=61), []
    mdm.sample([[1]] * 200, 20, n_steps=4, commit='ancestral', score='random', history=history)
    for j, (x, _) in enumerate(history):
        assert (x == 60).float().sum(1).mean().item() == pytest.approx(20 * (1 - j / 4), abs=0.6)


def test_exact_conditionals_sample_the_joint(joint):
    """One token per step at random with the exact conditionals draws from the joint itself, in any order."""
    mdm = MDM(ExactConditionals(joint), MASK, separator=SEP)
    n = 6000
    out, nfe = mdm.sample([[]] * n, L, n_steps=L, score='random')
    counts = torch.zeros_like(joint)
    for s in out: counts[tuple(s)] += 1
    assert nfe == L
    tv = 0.5 * (counts / n - joint).abs().sum().item()
    expected = 0.5 * (2 / math.pi * joint * (1 - joint) / n).sqrt().sum().item()
    assert tv < 1.3 * expected


def test_p2_scores_a_filled_position_by_the_token_that_stands_there(joint):
    """A wrong early commitment is taken back: its own probability is low, however likely a fresh draw would be."""
    sure = torch.full((V,) * L, 1e-6).double()
    sure[0, 0, 0, 0] = sure[1, 1, 1, 1] = 0.5
    mdm, history = MDM(ExactConditionals(sure / sure.sum()), MASK, separator=SEP), []
    out, _ = mdm.sample([[]] * 64, L, n_steps=16, remask='p2', history=history)
    assert sum(o in ([0] * 4, [1] * 4) for o in out) >= 62
    one_step, _ = mdm.sample([[]] * 64, L, n_steps=1)
    assert sum(o in ([0] * 4, [1] * 4) for o in one_step) < 40       # all at once cannot know of each other


def test_eos_stops_early_and_is_cut():
    class Eager(ExactConditionals):
        def hidden(self, ids, ranges=None, pos=None):
            z = torch.zeros(*ids.shape, V + 2); z[..., 2] = 9.0; return z
    mdm = MDM(Eager(torch.ones(1)), MASK, separator=SEP, eos_id=2)
    out, nfe = mdm.sample([[0, 1]], 30, n_steps=30, temperature=0, block_len=5)
    assert out == [[0, 1]] and nfe == 1                              # the first token is EOS, the rest follows from it
    assert mdm.sample([[0, 1]], 30, temperature=0, block_len=5, remask='p2', n_steps=30)[1] <= 5
    out, _ = mdm.infill([[[0, 1], 3, [0]]], temperature=0)
    assert out == [[0, 1, 2, 2, 2, 0]]                               # a hole in the middle is filled, not cut


def test_errors_name_the_way_out():
    with pytest.raises(SystemExit, match='mask_id 64 is not a row'): MDM(tiny(), 64)
    with pytest.raises(SystemExit, match='elbo, flat or planner'): MDM(tiny(), 60, weighting='x')
    mdm = MDM(tiny(), 60, shift=True)
    with pytest.raises(SystemExit, match='commit must be one of'): mdm.sample([[1]], 4, commit='x')
    with pytest.raises(SystemExit, match='give a prompt'): mdm.sample([[]], 4)
    with pytest.raises(SystemExit, match="use score='confidence'"): mdm.sample([[1]], 4, remask='p2', score='random')
    with pytest.raises(SystemExit, match='block_len must be'): mdm.sample([[1]], 4, block_len=-1)
    with pytest.raises(SystemExit, match='a hole of -3 tokens'): mdm.sample([[1]], -3)
    with pytest.raises(SystemExit, match='needs a checkpoint with an eos_id'): mdm.infill([[[1], 2]], stop_at_eos=True)


def test_validation_noise_belongs_to_the_row():
    """A row is scored alike whatever stands beside it in the batch: ranks and batch sizes do not matter."""
    mdm = MDM(tiny(), 60)
    batch = batch_from_documents(torch.randint(0, 60, (3, 16)).tolist())
    doc = batch.doc.clone(); doc[1, 5:], doc[1, 9:] = 1, 2                # one row has three documents
    batch = replace(batch, doc=doc)
    whole, _ = mdm.row_nll(batch, k=2, seed=1)
    for i in range(3):
        one = replace(batch, **{k: getattr(batch, k)[i:i + 1] for k in ('ids', 'doc', 'pos', 'is_target', 'row_ids')},
                      ranges=None if batch.ranges is None else type(batch.ranges)(*(r[i:i + 1] for r in batch.ranges)))
        torch.testing.assert_close(mdm.row_nll(one, k=2, seed=1)[0], whole[i:i + 1])
