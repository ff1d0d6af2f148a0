"""lm-eval's requests against brute force: the harness must report what the model says, however it is asked."""
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip('lm_eval')
from lm_eval.api.instance import Instance

import data
import eval as ev
import harness
from ar import AR
from data import batch_from_documents
from mdm import MDM
from model import ModelConfig, Transformer

TOK = data.byte_tokenizer()
TEXTS = [('the cat', ' sat'), ('', 'no context'), ('a b ', 'c'), ('x', 'y'), ('long ' * 9, 'context'), ('q:', ' a' * 9)]


def make(kind, shift=False, V=320, max_seq_len=96, separator=TOK.sep_id):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_ff=32, head_dim=8,
                                    max_seq_len=max_seq_len))
    for p in model.parameters(): p.data *= 4                            # far from uniform
    ids = dict(separator=separator, eos_id=TOK.eos_id)
    return (AR(model, TOK.mask_id, **ids) if kind == 'ar' else MDM(model, TOK.mask_id, shift=shift, **ids)).eval()


def alphabet(kind):
    """A bigram model that knows one thing: after each letter comes the next one of the alphabet."""
    D = 258
    model = Transformer(ModelConfig(vocab_size=D, n_layer=1, n_head=2, n_kv_head=2, n_embd=D, n_ff=8, head_dim=8,
                                    tied=False, max_seq_len=96))
    for p in model.layers.parameters(): p.data.zero_()
    model.embed_tokens.weight.data, model.lm_head.weight.data = torch.eye(D), torch.zeros(D, D)
    for a, b in itertools.pairwise('abcdefghijklmnopqrstuvwxyz'):
        model.lm_head.weight.data[TOK.encode(b)[0], TOK.encode(a)[0]] = 1.0     # times sqrt(D) after the norm
    model.lm_head.weight.data[TOK.mask_id] = 2.0                        # it would rather write a mask, if it could
    ids = dict(separator=TOK.sep_id, eos_id=TOK.eos_id)
    return AR(model, TOK.mask_id, **ids) if kind == 'ar' else MDM(model, TOK.mask_id, shift=True, **ids)


def ask(kind, *pairs, docs=None):
    """lm-eval's own request objects; document i has number i, or docs[i]."""
    return [Instance(kind, {}, args, 0, ('task', docs[i] if docs else i, 1)) for i, args in enumerate(pairs)]


def log_p(lm, *pairs, docs=None): return lm.loglikelihood(ask('loglikelihood', *pairs, docs=docs))


def test_ar_is_the_sum_of_log_softmax():
    obj = make('ar')
    for (context, continuation), (got, greedy) in zip(TEXTS, log_p(harness.Adapter(obj, TOK), *TEXTS)):
        n = len(continuation) + len(context) - len(context.rstrip())  # blanks move to the continuation
        ids = [TOK.sep_id, *TOK.encode(context + continuation)]
        with torch.no_grad(): z = obj.model(torch.tensor([ids]))[0, :-1].float()
        z[:, TOK.mask_id] = -math.inf  # never a target, never a competitor
        lp, target = z.log_softmax(-1)[-n:], torch.tensor(ids[-n:])
        assert got == pytest.approx(lp.gather(1, target[:, None]).sum().item(), rel=1e-5)
        assert greedy == (lp.argmax(1) == target).all()


@pytest.mark.parametrize('shift', [False, True])
def test_mdm_is_an_unbiased_estimate_of_the_bound(shift):
    """The bound by enumeration: m masked of n with probability 1/n, each set of m alike, weight n/m."""
    obj = make('mdm', shift)
    ids = torch.tensor([[TOK.sep_id, *TOK.encode('ab'), *TOK.encode('cde')]])
    bound = 0.0
    for m in (1, 2, 3):
        for masked in itertools.combinations((3, 4, 5), m):
            xt = ids.clone()
            xt[0, list(masked)] = TOK.mask_id
            with torch.no_grad(): lp = obj.logits(xt).log_softmax(-1)[0]
            bound += sum(lp[i, ids[0, i]].item() for i in masked) / (m * math.comb(3, m))  # 1/n n/m 1/C(n, m)
    lm = harness.Adapter(obj, TOK, draws=1, greedy=False, batch_size=400)
    x = torch.tensor([v for v, _ in log_p(lm, *[('ab', 'cde')] * 800)]).double()
    assert abs(x.mean() - bound) < 4 * x.std() / len(x) ** 0.5 and x.std() < abs(bound) / 2
    three = harness.Adapter(obj, TOK, draws=48, greedy=False)       # stratified draws: much less noise
    y = torch.tensor([v for v, _ in log_p(three, *[('ab', 'cde')] * 16)]).double()
    assert abs(y.mean() - bound) < 4 * y.std() / 4 and y.std() < x.std() / 4


@pytest.mark.parametrize('kind', ['ar', 'mdm'])
def test_the_same_rows_give_the_same_number_as_nll(kind):
    obj = make(kind, max_seq_len=32)
    lm = harness.Adapter(obj, TOK, draws=3, seed=5, batch_size=4)
    texts = ['abc', 'some more words', 'and yet another text']
    rolling = lm.loglikelihood_rolling(ask('loglikelihood_rolling', *[(t,) for t in texts]))
    batch = batch_from_documents([[TOK.sep_id, *TOK.encode(t)] for t in texts], 32, pad_id=TOK.eos_id)
    assert [-x for x in rolling] == obj.row_nll(batch, 3, 5)[0].tolist()
    val = obj.validate([batch], seed=5, k=3)
    assert -sum(rolling) == pytest.approx(val['nats_per_token'] * val['n_tokens'], rel=1e-9)
    assert rolling == [v for v, _ in log_p(lm, *[('', t) for t in texts])]
    given = torch.arange(32) < 4  # SEP and 'abc', then the continuation
    part = replace(batch, is_target=batch.is_target & ~given)
    split = [(t[:3], t[3:]) for t in texts]
    assert [-v for v, _ in log_p(lm, *split)] == obj.row_nll(part, 3, 5)[0].tolist()
    assert log_p(lm, *split)[0] == (0, True)                                    # nothing to score: certain


@pytest.mark.parametrize('kind', ['ar', 'mdm'])
def test_long_texts_are_cut_as_a_corpus_cuts_them(kind, tmp_path):
    """Against eval.nll on a corpus of one document. Its last target is EOS: the rows are the same but for it."""
    text = ''.join(chr(97 + i * i % 26) for i in range(100))
    (tmp_path / 'x.jsonl').write_text(f'{json.dumps(dict(text=text))}\n{json.dumps(dict(text=text[::-1]))}\n')
    data.prepare(str(tmp_path / 'x.jsonl'), str(tmp_path / 'data'), tokenizer='bytes', val_fraction=0.5)
    corpus = data.Corpus(tmp_path / 'data', 'val', 32, 320)
    whole = next(corpus.eval_batches(0, 16))
    assert whole.ids.shape == (4, 32)
    obj = make(kind, max_seq_len=32)
    lm = harness.Adapter(obj, TOK, draws=2)
    [rolling] = lm.loglikelihood_rolling(ask('loglikelihood_rolling', (TOK.decode(corpus.tokens),)))

    class WithoutEos:                                                   # the corpus, its EOS made padding
        target_bytes = corpus.target_bytes
        def __len__(self): return 4
        def eval_batches(self, *_):
            docs = [ids[:1] + [i for i in ids[1:] if i != TOK.eos_id] for ids in whole.ids.tolist()]
            yield replace(batch_from_documents(docs, 32, TOK.eos_id), row_ids=torch.arange(4) << 32)
    got = ev.nll(obj, WithoutEos(), 0, 16, 2, 0, 'cpu')
    assert got['n_tokens'] == got['n_bytes'] == 100
    assert -rolling == pytest.approx(got['nats_per_token'] * 100, rel=1e-6)
    if kind == 'ar':  # what follows a token cannot matter
        seen = replace(whole, is_target=whole.is_target & (whole.ids != TOK.eos_id))
        assert -rolling == pytest.approx(obj.row_nll(seen)[0].sum().item(), rel=1e-5)


@pytest.mark.parametrize('kind', ['ar', 'mdm'])
def test_neither_batch_size_nor_order_nor_company_matters(kind):
    obj = make(kind)
    alone = [log_p(harness.Adapter(obj, TOK, draws=3), pair, docs=[i])[0] for i, pair in enumerate(TEXTS)]
    for size in (1, 4, 100):
        lm = harness.Adapter(obj, TOK, draws=3, batch_size=size)
        got = log_p(lm, *TEXTS[::-1], docs=list(range(len(TEXTS)))[::-1])[::-1]
        assert [v for v, _ in got] == pytest.approx([v for v, _ in alone], rel=1e-5)
        assert [g for _, g in got] == [g for _, g in alone]


def test_options_of_a_document_share_their_noise():
    lm = harness.Adapter(make('mdm'), TOK, draws=2)
    a, b, c = log_p(lm, *[('ab', 'cdefg')] * 3, docs=[0, 0, 1])
    assert a == b != c
    other = harness.Adapter(lm.obj, TOK, draws=2, seed=1)
    assert log_p(other, ('ab', 'cdefg'))[0] != a


@pytest.mark.parametrize('shift', [False, True])
def test_greedy_is_infilling_at_temperature_0(shift):
    obj = make('mdm', shift)
    context = TOK.encode('the cat')
    [[*_, a, b, c]], nfe = obj.infill([[context, 3]], n_steps=3, temperature=0)
    assert nfe == 3
    rows = [[TOK.sep_id, *context, *x] for x in ([a, b, c], [a, b, (c + 1) % 256], [(a + 1) % 256, b, c], [a, b])]
    batch = batch_from_documents(rows)
    batch = replace(batch, is_target=batch.is_target & (torch.arange(11) > 7))
    [[*_, d, e]], _ = obj.infill([[context, 2]], n_steps=2, temperature=0)      # another length, another text
    assert harness.writes_targets(obj, batch).tolist() == [True, False, False, (a, b) == (d, e)]


class Pairs:
    """A tokenizer with the token '()' = 300: the border of two texts is not always one between tokens."""
    eos_id = 257
    def encode(self, text):
        out = []
        for piece in text.replace('()', '\0'): out += [300] if piece == '\0' else TOK.encode(piece)
        return out


def test_what_is_continuation_and_what_goes_in_front():
    e = lambda s: TOK.encode(s)
    with_sep, bare = (harness.Adapter(make('ar', separator=s), Pairs()) for s in (TOK.sep_id, None))
    assert with_sep._document('ab', 'c') == ([TOK.sep_id, *e('abc')], 3)
    assert with_sep._document('ab \n', 'c') == ([TOK.sep_id, *e('ab \nc')], 3)
    assert with_sep._document('', 'c') == ([TOK.sep_id, *e('c')], 1)
    assert with_sep._document('f(', ')') == ([TOK.sep_id, *e('f'), 300], 2)  # scored: the token that has the ')'
    assert bare._document('ab', 'c') == (e('abc'), 2)
    assert bare._document('', 'c') == ([257, *e('c')], 1)
    assert bare._document('(', ')') == ([257, 300], 1)


def test_windows():
    lm = harness.Adapter(make('ar'), TOK, seq_len=8)
    ids = list(range(20))
    assert lm._windows(ids[:8], 3) == [(ids[:8], 3)]
    assert lm._windows(ids, 15) == [(ids[12:], 3)]                              # loses its left
    assert lm._windows(ids, 13) == [(ids[12:], 1)]
    for given in range(1, 13):                                                  # too long for one row
        scored = [i for row, g in lm._windows(ids, given) for i in row[g:]]
        assert scored == ids[given:] and all(len(row) <= 8 for row, _ in lm._windows(ids, given))
    assert lm._windows(ids, 20) == lm._windows([7], 1) == []


@pytest.mark.parametrize('kind', ['ar', 'mdm'])
def test_generation(kind, capsys):
    lm = harness.Adapter(alphabet(kind), TOK, batch_size=2, sampler=dict(n_steps=8, temperature=0.0))
    ask_for = lambda *prompts, **kw: lm.generate_until(ask('generate_until', *[(p, kw) for p in prompts]))
    assert ask_for('a', 'xa', 'b', until=['f'], max_gen_toks=8) == ['bcde', 'bcde', 'cde']
    assert ask_for('a', until='q', max_gen_toks=3) == ['bcd']
    assert [g for _, g in log_p(lm, ('xa', 'bc'), ('xa', 'bd'), ('x ', 'abc'))] == [True, False, False]
    assert ask_for('a', until=['e', 'c', ''], max_gen_toks=8, do_sample=False, temperature=9.0) == ['b']
    assert ask_for('z ' * 200 + 'a', max_gen_toks=3) == ['bcd']                 # the prompt loses its left
    assert len(ask_for('a', max_gen_toks=400, num_beams=2)[0]) == 48            # half of max_seq_len
    said = capsys.readouterr().out
    assert 'num_beams' in said and '400' in said
    hot = dict(max_gen_toks=8, do_sample=True, temperature=3.0)
    a, b = ask_for('a', 'a', **hot)
    assert a != b and [a, b] == ask_for('a', 'a', **hot)                        # repeats differ, runs do not
    lm.seed = 1
    assert [a, b] != ask_for('a', 'a', **hot)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Tasks on the alphabet, as files, one per kind of request. lm-eval's own 14,000 take seconds to list."""
    monkeypatch.setattr(harness, 'TaskManager', functools.partial(harness.TaskManager, include_defaults=False))
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    docs = [dict(q=f'after {a}'[:6] + a, good=b + c, options=[b + c, a + c, c + b], gold=0)
            for a, b, c in ('abc', 'fgh', 'rst')]
    (tmp_path / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in docs))
    common = dict(dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(tmp_path / 'docs.jsonl'))),
                  test_split='test', target_delimiter='', metadata=dict(version=1.0))
    own = dict(
        choice=dict(output_type='multiple_choice', doc_to_text='{{q}}', doc_to_choice='{{options}}',
                    doc_to_target='gold', metric_list=[dict(metric='acc')]),
        cloze=dict(output_type='loglikelihood', doc_to_text='{{q}}', doc_to_target='{{good}}',
                   metric_list=[dict(metric='acc'), dict(metric='perplexity')]),
        whole=dict(output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{good}}',
                   metric_list=[dict(metric='word_perplexity'), dict(metric='bits_per_byte')]),
        write=dict(output_type='generate_until', doc_to_text='{{q}}', doc_to_target='{{good}}',
                   generation_kwargs=dict(until=['i'], max_gen_toks=2, do_sample=False),
                   metric_list=[dict(metric='exact_match')]))
    for name, task in own.items():                                              # YAML reads JSON
        (tmp_path / f'{name}.yaml').write_text(json.dumps(dict(task=f'dlm_{name}') | common | task))
    return tmp_path


@pytest.mark.parametrize('kind', ['ar', 'mdm'])
def test_lm_eval_runs_our_models(kind, tasks):
    obj = alphabet(kind)
    out = harness.evaluate(obj, TOK, ['dlm_*'], draws=4, include_path=str(tasks), batch_size=3)
    assert json.loads(json.dumps(out, allow_nan=False)) == out
    r = out['results']
    assert r['dlm_choice']['acc,none'] == 1 and r['dlm_cloze']['acc,none'] == 1
    assert out['versions']['dlm_choice'] == 1 and out['n-shot']['dlm_choice'] == 0
    assert r['dlm_write']['exact_match,none'] == 1 and r['dlm_choice']['acc_stderr,none'] == 0
    lm = harness.Adapter(obj, TOK, draws=4)
    nats = -sum(lm.loglikelihood_rolling(ask('loglikelihood_rolling', ('bc',), ('gh',), ('st',))))
    assert r['dlm_whole']['bits_per_byte,none'] == pytest.approx(nats / 6 / math.log(2))
    assert r['dlm_whole']['word_perplexity,none'] == pytest.approx(math.exp(nats / 3))
    assert out['estimator'].startswith('exact' if kind == 'ar' else 'bound') and out['lm_eval']
    one = harness.evaluate(obj, TOK, ['dlm_choice'], draws=1, include_path=str(tasks), limit=2, greedy=False)
    assert one['n-samples']['dlm_choice']['effective'] == 2
    with pytest.raises(SystemExit, match='no task nope'):
        harness.evaluate(obj, TOK, ['nope'], include_path=str(tasks))


def test_without_lm_eval_the_error_names_it():
    code = "import sys; sys.modules['lm_eval'] = None; import harness"
    r = subprocess.run([sys.executable, '-c', code], cwd=Path(harness.__file__).parent, capture_output=True, text=True)
    assert r.returncode == 1 and 'pip install lm_eval' in r.stderr and 'Traceback' not in r.stderr


def test_processes_share_the_work(tmp_path):
    """Two of them, under torchrun, give the same numbers as one."""
    code = """
import json, torch.distributed as dist, test_harness as t
dist.init_process_group('gloo')
lm = t.harness.Adapter(t.make('mdm'), t.TOK, draws=2, batch_size=1)
texts = lm.generate_until(t.ask('generate_until', ('a', dict(max_gen_toks=4)), ('b', dict(max_gen_toks=4))))
if dist.get_rank() == 1: print(json.dumps([t.log_p(lm, *t.TEXTS), texts]))
else: t.log_p(lm, *t.TEXTS)
dist.destroy_process_group()
"""
    (tmp_path / 'run.py').write_text(code)
    here = Path(__file__).parent
    env = dict(os.environ, PYTHONPATH=f'{here}:{here.parent}', OMP_NUM_THREADS='1')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    r = subprocess.run([*torchrun, tmp_path / 'run.py'], env=env, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    lm = harness.Adapter(make('mdm'), TOK, draws=2, batch_size=1)
    here = [list(x) for x in log_p(lm, *TEXTS)]
    texts = lm.generate_until(ask('generate_until', ('a', dict(max_gen_toks=4)), ('b', dict(max_gen_toks=4))))
    assert json.loads(r.stdout.splitlines()[-1]) == [here, texts]
