"""Representation alignment: which states are compared, what the teacher may know, and that nothing else has changed.

The oracle for the teacher is transformers' own Llama, run on each document alone; for the formula, loops.
"""
import importlib
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_train import assert_same_lines, assert_same_weights, corpus, hook, metrics, stop, torchrun, train  # noqa: F401

import checkpoint
import data
from ar import AR
from data import batch_from_documents
from kernels import document_ranges, ranges_to_mask
from mdm import MDM
from model import ModelConfig, Transformer
from repr_align import ReprAlign

MASK, L = 60, 3


def backbone(seed=0, causal=True, **kw):
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, n_layer=L, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16) | kw
    model = Transformer(ModelConfig(**shape, causal=causal)).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model


def aligned(student=0, **kw):
    return ReprAlign(backbone(student), backbone(), MASK, **dict(align_weight=3.0) | kw)


def packed():
    """Two rows: documents of 9 and 11 tokens, then of 12 tokens and 8 positions of padding."""
    lengths = [(9, 11), (12,)]
    ids = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    doc, pos = torch.full((2, 20), -1), torch.zeros(2, 20, dtype=torch.long)
    for b, row in enumerate(lengths):
        for d, n in enumerate(row):
            at = slice(sum(row[:d]), sum(row[:d]) + n)
            doc[b, at], pos[b, at] = d, torch.arange(n)
    batch = replace(batch_from_documents(ids.tolist()), doc=doc, pos=pos, ranges=document_ranges(doc),
                    is_target=(doc >= 0) & (pos > 0))
    return replace(batch, n_targets=int(batch.is_target.sum()))


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    """llama(ids (T,)) -> the teacher's states of one document alone: [layer 0..L] of (T, D)."""
    from transformers import AutoModelForCausalLM
    path = tmp_path_factory.mktemp('llama')
    backbone().save_pretrained(path)
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    return lambda ids: [h[0].detach() for h in theirs(ids[None], output_hidden_states=True).hidden_states]


def expected(obj, batch, llama, layers, first=0):
    """The alignment term by loops: 2/n_targets * sum over masked tokens of the layers' mean of 1 - cos."""
    states = {}
    obj.model.hidden(batch.noise['xt'], batch.ranges, batch.pos, tap=lambda i, h: states.update({i: h}))
    total, n_rows = 0.0, 0
    for b in range(len(batch.ids)):
        for d in range(int(batch.doc[b].max()) + 1):
            cols = (batch.doc[b] == d).nonzero().squeeze(1)
            teacher = llama(batch.ids[b, cols])
            for j, c in enumerate(cols.tolist()):
                if batch.noise['xt'][b, c] != MASK or (first and c - 1 >= first): continue
                n_rows += 1
                s = c - 1 if obj.shift else c
                cos = [F.cosine_similarity(states[i][b, s], teacher[i][j - 1], 0) for i in layers]
                total += 1 - sum(cos) / len(layers)
    assert n_rows
    return 2 / batch.n_targets * total * (batch.ids.shape[1] / first if first else 1)


# ---- what is compared --------------------------------------------------------------------------------------
@pytest.mark.parametrize('options, layers', [({}, (1, 2, 3)), (dict(align_every=2), (1, 3)),
                                             (dict(align_every=3), (3,)), (dict(align_first=7), (1, 2, 3))], ids=str)
@pytest.mark.parametrize('shift', [True, False])
def test_the_term_by_loops(llama, shift, options, layers):
    """Packed documents, padding, padded buckets: loss and gradient are those of the formula."""
    obj, batch = aligned(1, shift=shift, **options), packed()
    batch = obj.prepare(batch, seed=2)
    loss, stats = obj(batch)
    plain, _ = MDM.forward(obj, batch)
    want = expected(obj, batch, llama, layers, options.get('align_first', 0))
    assert (loss - plain).item() == pytest.approx(3 * want.item(), rel=1e-4)
    n, d = stats['cos']                                             # sums over rows, per layer
    assert len(d) == len(layers) and (d - n).mean().item() * 2 / batch.n_targets == pytest.approx(want.item(), rel=1e-4)
    parameters = list(obj.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain + 3 * want, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('shift', [True, False])
def test_the_teacher_never_sees_the_token_it_helps_to_predict(shift):
    """Another clean token at j changes the states for the tokens after j, in its document: not for j itself."""
    obj, batch = aligned(1, shift=shift), packed()
    batch = obj.prepare(batch, seed=2)
    frozen, n = batch.noise['teacher'], int(batch.noise['real'].sum())
    tokens = (batch.noise['xt'] == MASK).flatten().nonzero().squeeze(1).tolist()
    before = obj.teacher_states(frozen)
    for j in tokens + [4]:
        ids = batch.ids.clone()
        ids.view(-1)[j] = (ids.view(-1)[j] + 1) % 60
        after = obj.teacher_states(frozen | dict(ids=ids))
        same_doc = batch.doc.flatten() == batch.doc.flatten()[j]
        for i in range(1, L + 1):
            changed = (before[i] != after[i]).any(1)[:n]
            want = [t > j and t // 20 == j // 20 and bool(same_doc[t]) for t in tokens]
            assert changed.tolist() == want, (i, j)


def test_an_identical_causal_student_on_clean_input_has_nothing_to_learn():
    """Both at position i - 1: every cosine is 1. Without a shift the same student is compared one position off."""
    for shift in (True, False):
        obj, batch = aligned(0, shift=shift), packed()
        obj.model.cfg.causal = True                                 # MDM made it bidirectional
        batch = obj.prepare(batch, seed=2)
        noise = batch.noise | dict(xt=batch.ids)
        n, d = obj(replace(batch, noise=noise))[1]['cos']
        if shift: torch.testing.assert_close(n / d, torch.ones(L), rtol=1e-5, atol=1e-5)
        else: assert (n / d < 0.9).all()


def test_with_align_first_the_teacher_reads_no_further():
    obj, batch = aligned(1, align_first=7), packed()
    batch = obj.prepare(batch, seed=2)
    assert batch.noise['teacher']['ids'].shape == (2, 7)
    assert aligned(1, align_first=99).prepare(packed(), seed=2).noise['teacher']['ids'].shape == (2, 20)


def test_a_random_subset_of_layers():
    """The same for every row of a step, whoever computes it; in the mean over steps it is all layers."""
    obj, seen = aligned(1, align_random=2), []
    for step in range(30):
        batch = replace(packed(), step=step)
        layers = obj.prepare(batch, seed=2).noise['teacher']['layers']
        one = replace(batch, **{k: getattr(batch, k)[1:] for k in ('ids', 'doc', 'pos', 'is_target', 'row_ids')},
                      ranges=document_ranges(batch.doc[1:]))
        assert obj.prepare(one, seed=2).noise['teacher']['layers'] == layers and len(set(layers)) == 2
        seen += layers
    assert all(12 <= seen.count(i) <= 28 for i in (1, 2, 3))
    batch = obj.prepare(packed(), seed=2)
    layers = batch.noise['teacher']['layers']
    loss, stats = obj(batch)
    n, d = stats['cos']
    assert [i for i in (1, 2, 3) if d[i - 1] > 0] == list(layers) and not n[d == 0].any()
    apart = [(1 - n / d)[i - 1] for i in layers]
    want = 3 * 2 / batch.n_targets * d.max() * sum(apart) / 2
    assert (loss - MDM.forward(obj, batch)[0]).item() == pytest.approx(want.item(), rel=1e-3)


def test_the_teacher_stops_at_the_last_layer_that_is_aligned():
    obj, ran = aligned(1, align_random=1), []
    for i, block in enumerate(obj.teacher.layers, 1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for step in range(6):
        ran.clear()
        batch = obj.prepare(replace(packed(), step=step), seed=2)
        obj(batch)
        assert ran == list(range(1, batch.noise['teacher']['layers'][0] + 1))


def test_the_weight_falls_to_nothing():
    """align_decay: the weight falls linearly; then the loss is MDM's and no teacher runs."""
    obj, full = aligned(1, align_decay=10), aligned(1)
    def term(obj, step):
        batch = obj.prepare(replace(packed(), step=step), seed=2)
        return (obj(batch)[0] - MDM.forward(obj, batch)[0]).item()
    for step, share in ((0, 1), (4, 0.6), (9, 0.1)):
        assert term(obj, step) == pytest.approx(share * term(full, step), rel=1e-3)
    obj.teacher.hidden = None
    assert term(obj, 10) == term(obj, 11) == 0


# ---- the teacher -------------------------------------------------------------------------------------------
def test_the_teacher_is_frozen_and_belongs_to_no_one(tmp_path):
    obj = ReprAlign(backbone(0), backbone(0, causal=False).train(), MASK).train()
    teacher = {k: v.clone() for k, v in obj.teacher.state_dict().items()}
    assert {k.removeprefix('model.') for k in obj.state_dict()} == teacher.keys()
    assert [m for m in obj.modules() if m is not obj] == list(obj.model.modules())
    assert not obj.teacher.training and obj.train().model.training and not obj.teacher.training
    assert obj.teacher.cfg.causal and not obj.model.cfg.causal
    opt = torch.optim.AdamW(obj.param_groups(0.1), lr=1e-2)
    for step in range(3):
        obj(obj.prepare(replace(packed(), step=step), seed=2))[0].backward()
        opt.step()
    assert all(torch.equal(v, teacher[k]) for k, v in obj.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in obj.teacher.parameters())
    assert not torch.equal(obj.model.embed_tokens.weight, teacher['embed_tokens.weight'])
    moved = obj.to('meta')                                          # .to(device) takes it along
    assert moved.teacher.embed_tokens.weight.is_meta and moved.teacher.embed_tokens.weight.dtype == torch.float32


def test_likelihood_and_samples_need_no_teacher():
    obj = aligned(1)
    obj.teacher.hidden = None
    plain = MDM(obj.model, MASK, shift=True)
    assert obj.nelbo(packed(), k=2, seed=1) == plain.nelbo(packed(), k=2, seed=1)
    assert obj.sample([[1, 2]], 5, n_steps=3) == plain.sample([[1, 2]], 5, n_steps=3)


def test_flops_count_the_teachers_forward():
    """2 per weight, 4 T (H hd) / 2 per layer for its causal attention; only over what it reads."""
    weights, T = sum(p.numel() for p in backbone().layers.parameters()), 16
    forward = 2 * weights + 4 * L * 32 * T / 2
    plain = MDM(backbone(), MASK).flops_per_token(T)
    assert aligned().flops_per_token(T) == pytest.approx(plain + forward)
    assert aligned(align_first=99).flops_per_token(T) == pytest.approx(plain + forward)
    assert aligned(align_first=4).flops_per_token(T) == pytest.approx(plain + (2 * weights + 4 * L * 32 * 4 / 2) / 4)


def test_activation_checkpointing_changes_nothing():
    a, b = aligned(1), aligned(1)
    b.model.activation_checkpointing = True
    for obj in (a, b): obj(obj.prepare(packed(), seed=2))[0].backward()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('options', [{}, dict(align_every=2), dict(align_random=2), dict(align_first=7)], ids=str)
@pytest.mark.parametrize('shift', [True, False])
def test_a_cached_teacher_equals_a_live_one(tmp_path, options, shift):
    live = aligned(1, shift=shift, **options)
    for step in (0, 1):                                             # new masks, and perhaps other layers
        cached = aligned(1, shift=shift, teacher_cache=str(tmp_path), **options)
        if step: cached.teacher.hidden = None                       # the files have it all
        batch = replace(packed(), step=step)
        want, got = (obj(obj.prepare(batch, seed=2)) for obj in (live, cached))
        assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
        torch.testing.assert_close(got[1]['cos'], want[1]['cos'])
    folder, = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 2 and all(f.suffix == '.safetensors' for f in folder.iterdir())
    changed = replace(packed(), ids=packed().ids + 1)               # other tokens: nothing of the kind is there
    assert 'states' not in aligned(1, teacher_cache=str(tmp_path), **options).prepare(changed, 2).noise['teacher']
    other = (torch.arange(20) >= 4).long().expand(2, -1)            # the same tokens as other documents, another
    cut = replace(packed(), doc=other, ranges=document_ranges(other))                       # teacher, other layers
    cache = str(tmp_path)
    stranger = ReprAlign(backbone(1), backbone(1), MASK, align_weight=3.0, teacher_cache=cache, **options)
    fewer = aligned(1, teacher_cache=cache, align_every=1 if 'align_every' in options else 2)
    for obj, batch in ((cached, cut), (stranger, packed()), *[(fewer, packed())] * ('align_first' not in options)):
        assert 'states' not in obj.prepare(batch, 2).noise['teacher']
    for file in folder.iterdir(): os.truncate(file, 100)            # cut off: computed again
    assert 'states' not in aligned(1, teacher_cache=str(tmp_path), **options).prepare(packed(), 2).noise['teacher']


def test_mistakes():
    for options in (dict(align_every=0), dict(align_every=4), dict(align_random=4), dict(align_weight=-1.0),
                    dict(align_first=-1)):
        with pytest.raises(SystemExit, match='align_every between 1 and 3'): aligned(**options)
    with pytest.raises(SystemExit, match='needs a teacher'): ReprAlign(backbone(), None, MASK)
    with pytest.raises(AssertionError, match="no objective knows {'wieghting'}"):
        checkpoint.make_objective('mdm', backbone(), wieghting='flat')
    with pytest.raises(SystemExit, match='the teacher has 2 layers of width 32, the model 3 of 32'):
        ReprAlign(backbone(), backbone(n_layer=2), MASK)


# ---- runs --------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def ar(corpus, tmp_path_factory):  # noqa: F811
    """The out_dir of an autoregressive model that knows its corpus a little."""
    out = tmp_path_factory.mktemp('ar') / 'model'
    torch.manual_seed(0)
    tok = data.load_tokenizer('bytes')
    model = Transformer(ModelConfig(320, 2, 2, 1, 32, 64, 16, qk_norm=True))
    obj, opt = AR(model, separator=tok.sep_id, eos_id=tok.eos_id), torch.optim.AdamW(model.parameters(), 1e-2)
    rows = data.Corpus(corpus['data_dir'], 'train', 32)
    for step in range(30):
        loss, _ = obj(obj.prepare(rows.batch(step, 0, 8, 8, 0), 0))
        opt.zero_grad(); loss.backward(); opt.step()
    checkpoint.save_checkpoint(out, 'step', obj, tok, dict(step=30))
    return str(out)


@pytest.fixture
def align(train, ar):  # noqa: F811
    return lambda out_dir='run', **settings: train(
        out_dir, **dict(objective='repr_align', init_from=ar, tokenizer='', sample_tokens=0) | settings)


def test_a_run_and_its_export(align, ar, train, corpus, capsys):  # noqa: F811
    """One model comes out, a diffusion model to everybody else; it remembers its teacher."""
    run = align(max_iters=8, weighting='flat')
    lines = [line for line in metrics() if 'loss' in line]
    cos = [line['cos'] for line in lines]
    assert len(cos[0]) == 2 and sum(cos[-1]) > sum(cos[0]) and lines[-1]['loss'] < lines[0]['loss']
    assert 'repr_align: 0.03M parameters' in capsys.readouterr().out
    for path in ('run', 'run/export'):
        obj, _ = checkpoint.load_checkpoint(path)
        assert type(obj) is MDM and obj.shift and not obj.model.cfg.causal
        dlm = json.loads(((checkpoint.find(path) or Path(path)) / 'config.json').read_text())['dlm']
        assert dlm['objective'] == 'mdm' and dlm['teacher'] == ar and len(dlm['teacher_sha256']) == 64
    from transformers import AutoModelForCausalLM
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained('run/export').parameters()) == \
        sum(p.numel() for p in run['obj'].parameters())
    result = json.loads(Path('run/result.json').read_text())
    assert result['validation']['estimator'] == 'upper bound, count'
    with pytest.raises(SystemExit, match='the teacher run is not autoregressive: name one by --teacher'):
        align('more', init_from='run')
    again = align('more', init_from='run', teacher=ar, max_iters=1)
    assert_same_weights(again['obj'].teacher, Transformer.from_pretrained(f'{ar}/step-000030'))


def test_weight_0_is_mdm_bit_for_bit(align):
    a, b = align('a', objective='mdm'), align('b', align_weight=0, align_every=2)
    assert_same_weights(a['obj'], b['obj'])
    assert metrics('a') == metrics('b') and a['obj'].dlm == b['obj'].dlm and b['obj'].networks() == [b['model']]


def test_micro_batches_and_processes_do_not_matter(align, ar, corpus):  # noqa: F811
    options = dict(objective='repr_align', init_from=ar, tokenizer='', sample_tokens=0, freeze_layers='mlp',
                   align_random=1, align_first=24, max_iters=4, save_interval=0)
    both = torchrun('both', corpus, micro_batch_size=2, **options)
    whole, parts = align('whole', **options), align('parts', micro_batch_size=2, **options)
    said = both.communicate(timeout=120)[0]
    assert both.returncode == 0, said
    assert_same_weights(whole['obj'], parts['obj'], rtol=1e-3, atol=1e-5)
    assert_same_weights(whole['obj'], checkpoint.load_checkpoint('both/step-000004')[0], rtol=1e-3, atol=1e-5)
    assert_same_lines(metrics('whole'), metrics('parts'), rel=1e-4)
    assert_same_lines(metrics('whole'), metrics('both'), rel=1e-4)


def test_resume_is_exact_and_asks_for_the_same_teacher(align, ar, tmp_path, monkeypatch):
    own = str(tmp_path / 'teacher')
    shutil.copytree(ar, own)
    options = dict(init_from=own, align_random=1, align_decay=5, freeze_layers='embed_tokens', save_interval=0)
    whole = align('whole', **options)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as left:
        hook(m, MDM, 'after_step', 2, stop)
        align('parts', **options)
    assert left.value.code == 128 + signal.SIGTERM
    shutil.copytree('parts', 'spoiled')
    parts = align('parts', **options)
    assert_same_weights(whole['obj'], parts['obj'])
    assert metrics('parts') == metrics('whole')
    checkpoint.save_checkpoint(own, 'step', AR(backbone(1, vocab_size=320, n_layer=2)), parts['tok'],
                               dict(step=31))
    with pytest.raises(SystemExit, match='spoiled was trained with something else: teacher_sha256 is'):
        align('spoiled', **options)


def test_frozen_parameters_stay_and_cost_nothing(align, ar):
    """mlp: neither changed nor known to the optimizers, also when muon has the matrices."""
    before = Transformer.from_pretrained(f'{ar}/step-000030')
    for optimizer in ('adamw', 'muon'):
        run = align(optimizer, freeze_layers='mlp', optimizer=optimizer, max_iters=2, weight_decay=0.5)
        for (name, p), q in zip(run['model'].named_parameters(), before.parameters(), strict=True):
            known = any(p is x for opt in run['optimizers'] for group in opt.param_groups for x in group['params'])
            assert torch.equal(p, q) == ('mlp' in name) and known == ('mlp' not in name), name
    run = align('all', freeze_layers='self_attn,mlp', optimizer='muon', max_iters=1)       # muon is left without any
    assert len(run['optimizers']) == 1
    with pytest.raises(SystemExit, match='freeze_layers leaves nothing to train'):
        align('nothing', freeze_layers='model.')
    with pytest.raises(SystemExit, match="no parameter's name contains 'mpl'"): align('typo', freeze_layers='mpl')


def test_a_teacher_of_ones_own_choice(align, ar, train, tmp_path):  # noqa: F811
    """From scratch with a teacher of the same shape; a teacher is needed, and must read the same tokens."""
    scratch = dict(init_from='scratch', tokenizer='bytes', shift=True, max_iters=2, eval_interval=0)
    run = align('scratch', teacher=ar, **scratch)
    assert run['obj'].teacher_path == ar and 'cos' in metrics('scratch')[0]
    with pytest.raises(SystemExit, match='needs a teacher'): align('none', **scratch)
    data.prepare(run['config']['dataset'], 'bpe', tokenizer='bpe', vocab_size=300, val_fraction=0.1)
    with pytest.raises(SystemExit, match='has another tokenizer than the model'):
        align('bpe-run', teacher=ar, **scratch | dict(tokenizer='bpe', vocab_size=300, data_dir='bpe'))


def test_the_minutes_are_in_the_metrics(align):
    align(max_iters=3, eval_interval=1)
    lines = [json.loads(line) for line in Path('run/metrics.jsonl').read_text().splitlines()]
    times = [line['minutes'] for line in lines]
    assert times == sorted(times) and 0 < times[-1] < 5 and len(times) == 8


# ---- the baseline it was compared with ---------------------------------------------------------------------
def test_the_broken_gradient_is_what_the_formula_says():
    """Open-dLLM's baseline: the right loss; a gradient scaled by the first label's weight, nothing without a mask."""
    sys.path.insert(0, str(Path(__file__).parent.parent / 'experiments'))
    try: broken = importlib.import_module('broken_gradient')
    finally:
        sys.path.pop(0)
        for name in ('mdm_broken', 'align_broken'): checkpoint.OBJECTIVES.pop(name, None)
    BrokenMDM, zero = broken.BrokenMDM, 0
    for step in range(12):
        obj = BrokenMDM(backbone(1), MASK, shift=True, weighting='planner')
        batch = obj.prepare(replace(packed(), step=step), seed=2)
        is_masked, xt = batch.noise['xt'] == MASK, batch.noise['xt']
        loss, stats = obj(batch)
        assert loss.item() == pytest.approx(MDM.forward(obj, batch)[0].item(), rel=1e-6)
        ce = F.cross_entropy(obj.logits(xt, is_masked.flatten().nonzero().squeeze(1), batch.ranges, batch.pos),
                             batch.ids[is_masked], reduction='none')
        first = is_masked[0, 1]                             # then it is the first of the masked ones
        w = batch.noise['a'][0] + batch.noise['b'][0] * (-ce[0]).exp().detach() if first else 0.0
        parameters = list(obj.parameters())
        got = torch.autograd.grad(loss, parameters)
        for a, b in zip(got, torch.autograd.grad(w * ce.sum(), parameters)):
            torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-5)
        zero += not first
        both = broken.BrokenAlign(obj.model, backbone(2), MASK, shift=True, weighting='planner', align_weight=3.0)
        right = ReprAlign(obj.model, both.teacher, MASK, shift=True, weighting='planner', align_weight=3.0)
        (b_loss, _), (r_loss, _) = (o(o.prepare(replace(packed(), step=step), seed=2)) for o in (both, right))
        assert b_loss.item() == pytest.approx(r_loss.item(), rel=1e-5)
        alignment = torch.autograd.grad(r_loss - MDM.forward(right, batch)[0], parameters)      # its gradient is right
        for a, b, c in zip(torch.autograd.grad(b_loss, parameters), got, alignment):
            torch.testing.assert_close(a, b + c, rtol=1e-3, atol=1e-5)
    assert 2 <= zero <= 10


def test_annealing_opens_the_mask_and_raises_the_noise(monkeypatch):
    """opening: at first causal, later a band; keys know exactly the queries that see them; the teacher stays causal.
    warming: t grows from t_min. After STEPS steps both are ReprAlign. visible: no weight where x[i-1] is masked."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / 'experiments')
    try: annealing = importlib.import_module('annealing')
    finally: [checkpoint.OBJECTIVES.pop(name, None) for name in ('opening', 'warming', 'visible')]
    batch, kw = packed(), dict(align_weight=3.0)
    seen = ranges_to_mask(batch.ranges)[:, 0]
    for step, ahead in ((0, 0), (60, 3), (120, 20)):                    # round(20 ** 0.5) - 1
        got = annealing.Opening(backbone(), backbone(), MASK, **kw).prepare(replace(batch, step=step), seed=0)
        q, k = got.ranges
        mask = ranges_to_mask(got.ranges)[:, 0]
        assert torch.equal(mask, seen & torch.ones(20, 20).tril(ahead).bool()), step
        assert torch.equal(mask, ranges_to_mask(type(got.ranges)(k, q))[:, 0].mT)
        assert got.noise['teacher']['ranges'] is batch.ranges
    same = aligned().prepare(replace(batch, step=150), seed=0)
    for kind in (annealing.Opening, annealing.Warming):
        obj = kind(backbone(), backbone(), MASK, **kw)
        assert torch.equal(obj.prepare(replace(batch, step=150), seed=0).noise['xt'], same.noise['xt'])
    noise = annealing.Visible(backbone(), backbone(), MASK, **kw).prepare(replace(batch, step=150), seed=0).noise
    masked = noise['xt'].flatten()[noise['rows']] == MASK
    assert masked.any() and not noise['align'][masked].any()
    assert torch.equal(noise['align'][~masked], same.noise['align'][~masked]) and noise['align'].any()
    t = [annealing.Warming(backbone(), backbone(), MASK, **kw).draw_t(replace(batch, step=s), 0) for s in (0, 59, 119)]
    assert t[0].max() < 0.01 and 0.25 < t[1].max() <= 0.5 < t[2].max() and t[0].min() >= 1e-3
