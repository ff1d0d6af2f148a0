"""The training loop, run for real on a model of 27 thousand parameters: what must not change its result
(micro-batches, processes, interruptions), and what it says when something goes wrong.

`train(...)` runs train.py inside the test's process: the same script, without seconds of imports.
"""
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
from ar import AR
from ldlm import LDLM
from mdm import MDM

TRAIN = Path(__file__).parent.parent / 'train.py'
TINY = dict(tokenizer='bytes', seq_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=64,
            global_batch_size=8, max_iters=6, warmup_iters=2, lr=1e-2, log_interval=1, save_interval=2,
            eval_interval=3, eval_rows=8, final_eval_rows=4, sample_tokens=4, sample_steps=2, device='cpu')


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """200 short documents, prepared once: the settings that say so."""
    root = tmp_path_factory.mktemp('corpus')
    with open(root / 'texts.jsonl', 'w') as f:
        for i in range(200):
            f.write(json.dumps(dict(text=f'{i} times {i % 7} is {i * (i % 7)}. ' * 3)) + '\n')
    settings = dict(dataset=str(root / 'texts.jsonl'), data_dir=str(root / 'data'))
    data.prepare(settings['dataset'], settings['data_dir'], tokenizer='bytes', val_fraction=0.1)
    return settings


def flags(settings): return [f'--{k}={v}' for k, v in settings.items()]


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """train(out_dir, **settings) -> the globals of train.py when it is through."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    hook, threads = sys.excepthook, torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def run(out_dir='run', **settings):
        settings = TINY | corpus | dict(out_dir=out_dir) | settings
        monkeypatch.setattr(sys, 'argv', [str(TRAIN), *flags(settings)])
        try: return runpy.run_path(str(TRAIN), run_name='__main__')
        finally:
            for s, handler in handlers.items(): signal.signal(s, handler)
    yield run
    sys.excepthook = hook
    torch.set_num_threads(threads)


def metrics(out_dir='run'):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ('tokens_per_s', 'minutes')} for line in lines]


def assert_same_weights(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if tolerance: torch.testing.assert_close(p, q, msg=lambda m, name=name: f'{name}: {m}', **tolerance)
        else: assert torch.equal(p, q), name


def assert_same_lines(a, b, rel):
    """Two runs' metrics, whose sums were taken in another order."""
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for x, y in zip(a, b):
        for k in x:
            got, want = ([-1 if i is None else i for i in v] if isinstance(v, list) else v for v in (x[k], y[k]))
            assert got == pytest.approx(want, rel=rel, abs=1e-6), (x['step'], k)


def hook(monkeypatch, owner, name, at, action):
    """Call action() before the at-th call of owner.name."""
    plain, calls = getattr(owner, name), []

    def hooked(*args, **kwargs):
        calls.append(None)
        if len(calls) == at: action()
        return plain(*args, **kwargs)
    monkeypatch.setattr(owner, name, hooked)


def stop(): os.kill(os.getpid(), signal.SIGTERM)


# ---- a run and what it leaves ------------------------------------------------------------------------------
def test_a_run_and_what_it_leaves(train, capsys):
    run = train(save_interval=0)
    said, lines = capsys.readouterr().out, metrics()
    assert 'loss to expect at the start: ln 320 = 5.77' in said and 'run/export' in said
    losses = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[0]['ce'] == pytest.approx(math.log(320), rel=0.03)            # the model knows nothing yet
    assert losses[-1]['loss'] < losses[0]['loss'] - 0.3
    assert len(losses[0]['ce_by_t']) == 8 and losses[2]['tokens'] == 3 * 8 * 32
    assert [line['step'] for line in lines if 'val_nats_per_token' in line] == [0, 3, 6]
    final = lines[-1]
    assert final['final_n_rows'] == 4 and final['step'] == 6
    assert final['final_bits_per_byte'] == pytest.approx(               # one byte per token, none for EOS
        final['final_nats_per_token'] / math.log(2), rel=0.03)

    names = {p.name for p in Path('run').iterdir()}
    assert names == {'step-000006', 'best-000006', 'export', 'metrics.jsonl', 'config.py', 'result.json'}
    result = json.loads(Path('run/result.json').read_text())
    assert result['validation']['nats_per_token'] == final['final_nats_per_token']
    assert result['config']['lr'] == 1e-2 and result['steps'] == 6
    again, tok = checkpoint.load_checkpoint('run')
    assert_same_weights(again, run['obj'])
    assert (again.name, again.separator, again.mask_id) == ('mdm', tok.sep_id, tok.mask_id)
    assert json.loads(Path('run/export/config.json').read_text())['dtype'] == 'bfloat16'


def test_a_signal_before_the_first_compiled_step_ends_at_once(train, monkeypatch):
    """A compilation may wait forever for workers that the same signal has killed, so nobody may wait for it."""
    run = train(max_iters=1, eval_interval=0, sample_tokens=0)
    ask, ended = run['ask_to_stop'], []
    known = ask.__globals__
    monkeypatch.setattr(os, '_exit', lambda code: ended.append(code) or sys.exit(code))
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    for compiled, step, leaves in ((True, 0, True), (True, 1, False), (False, 0, False)):
        for key, value in dict(compiled=compiled, step=step, start_step=0, stop_signals=[]).items():
            monkeypatch.setitem(known, key, value)
        ended.clear()
        if leaves:
            with pytest.raises(SystemExit): ask(signal.SIGTERM, None)
        else: ask(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM] * leaves and known['stop_signals'] == [signal.SIGTERM] * (not leaves)


def test_weight_decay_is_for_matrices_only(train):
    run = train(max_iters=1, eval_interval=0, sample_tokens=0)
    decayed, plain = run['optimizers'][0].param_groups
    assert decayed['weight_decay'] == 0.1 and all(p.ndim == 2 for p in decayed['params'])
    assert plain['weight_decay'] == 0.0 and all(p.ndim == 1 for p in plain['params'])
    assert len(decayed['params']) + len(plain['params']) == len(list(run['obj'].parameters()))


def test_learning_rate_warms_up_and_falls_to_its_floor(train):
    run = train(max_iters=20, warmup_iters=4, eval_interval=0, sample_tokens=0, min_lr_ratio=0.25)
    lrs = [line['lr'] / 1e-2 for line in metrics() if 'lr' in line]
    assert lrs[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lrs[4] == pytest.approx(1) and lrs[4:] == sorted(lrs[4:], reverse=True)
    assert run['learning_rate'](20) == pytest.approx(0.25) and run['learning_rate'](99) == pytest.approx(0.25)


def test_a_share_of_the_training_rows(train, capsys):
    run = train(max_iters=1, data_fraction=0.1, eval_interval=0, sample_tokens=0)
    n = len(run['train_data'])
    assert len(run['train_data'].used) == round(0.1 * n) and len(run['val_data'].used) == len(run['val_data'])
    assert f'on CPU x 1; {round(0.1 * n)} rows of 32 tokens' in capsys.readouterr().out


# ---- what must not change the result -----------------------------------------------------------------------
@pytest.mark.parametrize('objective', ['mdm', 'ar'])
def test_micro_batches_do_not_matter(train, objective):
    whole = train('whole', objective=objective)
    parts = train('parts', objective=objective, micro_batch_size=2)
    assert parts['accumulation'] == 4
    assert_same_weights(whole['obj'], parts['obj'], rtol=1e-3, atol=1e-5)
    assert_same_lines(metrics('whole'), metrics('parts'), rel=1e-4)


def torchrun(out_dir, corpus, **settings):
    """train.py in two processes, over gloo."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               str(TRAIN), *flags(TINY | corpus | dict(out_dir=out_dir) | settings)]
    return subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS='1'), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_processes_equal_one_with_twice_the_micro_steps(train, corpus):
    """Rows, noise and the normaliser belong to the global batch, whoever computes them."""
    both = torchrun('both', corpus, micro_batch_size=2)
    one = train('one', micro_batch_size=2)              # 4 micro-steps; the two processes take 2 each
    said = both.communicate(timeout=120)[0]
    assert both.returncode == 0, said
    two, _ = checkpoint.load_checkpoint('both/step-000006')
    assert 'in 2 micro-step(s)' in said and said.count('validation') == 4
    assert_same_weights(one['obj'], two, rtol=1e-3, atol=1e-5)
    assert_same_lines(metrics('one'), metrics('both'), rel=1e-4)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_resume_is_exact(train, optimizer, monkeypatch):
    """Stopped by SIGTERM in a step, again in an evaluation, then crashed between two saves: weights, moments
    and the lines of metrics.jsonl are, bit for bit, those of a run that nothing disturbed."""
    settings = dict(optimizer=optimizer, max_iters=9, micro_batch_size=4)
    whole, resume = train('whole', **settings), dict(out_dir='parts') | settings
    with monkeypatch.context() as m, pytest.raises(SystemExit) as left:
        hook(m, MDM, 'after_step', 1, stop)
        train(**resume)
    assert left.value.code == 128 + signal.SIGTERM
    assert checkpoint.find('parts').name == 'step-000002'           # the next step saw the signal
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        hook(m, MDM, 'row_nll', 1, stop)                            # the evaluation after step 3 is cut short
        train(**resume)
    assert checkpoint.find('parts').name == 'step-000003'
    assert not any('val_n_rows' in line and line['step'] == 3 for line in metrics('parts'))
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        hook(m, MDM, 'after_step', 5, lambda: 1 / 0)                # in step 8: the last save was of step 6
        train(**resume)
    assert checkpoint.find('parts', 'step').name == 'step-000006'
    with open('parts/metrics.jsonl', 'a') as f: f.write('{"step": 8, "loss": 1.')       # a line cut off
    parts = train(**resume)
    assert_same_weights(whole['obj'], parts['obj'])
    a, b = whole['optimizers'], parts['optimizers']
    for x, y in zip(a, b, strict=True):
        for p, q in zip(x.state.values(), y.state.values(), strict=True):
            assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
    assert metrics('parts') == metrics('whole')
    assert checkpoint.find('parts', 'best').name == checkpoint.find('whole', 'best').name


LATENT = dict(objective='ldlm', encoder='random:16:320', prefix_len=8, perceiver_layers=1, decoder_layers=1,
              ema_decay=0.9, encoder_warmup=4, stats_rows=2)


def test_a_latent_run_resumes_exactly(train, monkeypatch):
    """The same loop trains a latent model: weights, their average, statistics, timesteps and moments all come back. The
    best checkpoint, of a latent model the newest, and the export are the average, the one to resume from has both."""
    whole = train('whole', **LATENT)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        hook(m, LDLM, 'after_step', 3, stop)
        train('parts', **LATENT)
    assert checkpoint.find('parts', 'step').name == 'step-000004'
    parts = train('parts', **LATENT)
    for (name, a), b in zip(whole['obj'].state_dict().items(), parts['obj'].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(whole['ema'].others, parts['ema'].others): assert torch.equal(a, b)
    assert metrics('whole') == metrics('parts')
    average, tok = checkpoint.load_checkpoint('whole/step-000006')
    assert_same_weights(average, checkpoint.load_checkpoint('whole/best-000006')[0])
    assert not torch.equal(average.model.head.weight, whole['obj'].model.head.weight)
    assert average.model.timesteps.n_updates == 6
    losses = [line for line in metrics('whole') if 'loss' in line]
    assert set(losses[0]) == {'step', 'loss', 'grad_norm', 'lr', 'tokens', 'denoise', 'features', 'ce', 'rank'}
    val = json.loads(Path('whole/result.json').read_text())['validation']
    assert val['n_rows'] == 4 and val['estimator'] == 'none: no likelihood'
    exported, _ = checkpoint.load_checkpoint('whole/export')
    assert exported.sample([tok.encode('3 times')], 8, n_steps=2)[1] == 2
    with pytest.raises(SystemExit, match="schedule must be"):
        train('wrong', **LATENT | dict(init_from='whole', schedule='cosine'))
    more = train('more', **LATENT | dict(init_from='whole', sigma_dec=1.25, max_iters=1))
    assert more['obj'].settings['sigma_dec'] == 1.25 and more['obj'].model.timesteps.n_updates == 7


def test_a_latent_run_of_two_processes_equals_one(train, corpus):
    both = torchrun('both', corpus, micro_batch_size=2, **LATENT)
    one = train('one', micro_batch_size=2, **LATENT)
    said = both.communicate(timeout=120)[0]
    assert both.returncode == 0, said
    with one['ema'].applied():
        assert_same_weights(one['obj'], checkpoint.load_checkpoint('both/step-000006')[0], rtol=1e-2, atol=1e-4)
    assert_same_lines(metrics('one'), metrics('both'), rel=1e-3)


def test_torchrun_saves_when_it_is_stopped(corpus, tmp_path, monkeypatch):
    """The signal reaches the ranks at different moments: they agree on the step, one saves, none hangs."""
    monkeypatch.chdir(tmp_path)
    run = torchrun('run', corpus, max_iters=100_000, eval_interval=0, save_interval=0)
    deadline = time.time() + 60
    while not Path('run/metrics.jsonl').exists() and time.time() < deadline: time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)                      # torchrun hands it on
    said = run.communicate(timeout=60)[0]
    assert 'stopped by a signal' in said, said
    saved = checkpoint.find('run')
    assert json.loads((saved / 'state.json').read_text())['step'] == metrics()[-1]['step'] > 0
    assert [p.name for p in Path('run').glob('*-0*')] == [saved.name]


def test_only_the_first_signal_is_polite(train, monkeypatch):
    """While data is prepared there is nothing to save: a signal kills. So does the second one in the loop."""
    seen = []
    hook(monkeypatch, data, 'prepare', 1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    hook(monkeypatch, MDM, 'after_step', 1, stop)
    hook(monkeypatch, checkpoint, 'save_checkpoint', 1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    with pytest.raises(SystemExit): train(eval_interval=0)
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]


# ---- finished, and going on --------------------------------------------------------------------------------
def test_a_finished_run_says_so_and_may_go_on(train, capsys):
    train()
    before = Path('run/result.json').read_text()
    with pytest.raises(SystemExit) as left: train()
    assert left.value.code is None and Path('run/result.json').read_text() == before
    assert 'this run is finished' in capsys.readouterr().out
    run = train(max_iters=8, eval_rows=4)
    assert 'with max_iters 6 -> 8, eval_rows 8 -> 4' in capsys.readouterr().out
    assert run['step'] == 8 and [line['step'] for line in metrics() if 'loss' in line] == list(range(1, 9))
    run = train(init_from='resume', max_iters=9, eval_rows=4)
    assert run['step'] == 9 and run['config']['init_from'] == 'scratch'


def test_stopped_in_the_last_evaluation(train, monkeypatch):
    whole = train('whole', eval_interval=0)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        hook(m, MDM, 'validate', 1, stop)
        train(eval_interval=0, micro_batch_size=1)
    assert checkpoint.find('run').name == 'step-000006' and not Path('run/result.json').exists()
    train(eval_interval=0)
    assert Path('run/export').is_dir() and len(metrics()) == len(metrics('whole')) == whole['step'] + 2


def test_max_minutes_saves_and_evaluates(train, capsys):
    run = train(max_minutes=1e-6)
    assert run['step'] == 1 and checkpoint.find('run').name == 'best-000001'
    with pytest.raises(SystemExit): train(max_minutes=1e-6)         # the time is up for good: no step more
    assert 'finished' in capsys.readouterr().out
    assert train(max_iters=3)['step'] == 3


def test_the_best_stays(train, monkeypatch):
    """Besides the last checkpoint there is the one of the lowest validation loss, also across a resume."""
    losses = iter([6.0, 3.0, 4.0, 3.5, 3.2, 9.0])       # after 0, 2, 4, 5 steps; resumed: after 6, 7
    monkeypatch.setattr(MDM, 'validate', lambda self, batches, seed, k: dict(
        nats_per_token=next(losses), stderr=0.0, n_tokens=9, n_rows=8))
    settings = dict(eval_interval=2, sample_tokens=0, final_eval_rows=8)
    train(max_iters=5, **settings)
    train(max_iters=7, **settings)
    assert sorted(p.name for p in Path('run').glob('*-0*')) == ['best-000002', 'step-000007']


# ---- starting from a model ---------------------------------------------------------------------------------
def test_an_autoregressive_run_becomes_a_diffusion_model(train, corpus, capsys):
    """init_from= an out_dir: its weights, its tokenizer; hidden row i - 1 goes on predicting token i."""
    before = train('ar', objective='ar')
    run = train('mdm', init_from='ar', tokenizer='', max_iters=1, eval_interval=1, t_min=0.01)
    obj = run['obj']
    assert isinstance(before['obj'], AR) and isinstance(obj, MDM)
    assert obj.shift and not obj.model.cfg.causal and obj.separator == run['tok'].sep_id and obj.t_min == 0.01
    assert metrics('mdm')[1]['ce'] < 4.5                            # it knows something already: ln 320 = 5.8
    run = train('mdm', init_from='ar', tokenizer='', max_iters=2, eval_interval=1, t_min=0.01)
    assert run['obj'].shift and run['obj'].t_min == 0.01
    with pytest.raises(SystemExit, match="has the tokens of 'bpe-260', not of ar"):
        data.prepare(corpus['dataset'], 'other', tokenizer='bpe', vocab_size=260)
        train('x', init_from='ar', tokenizer='', data_dir='other')


def test_a_foreign_model_brings_its_tokenizer(train, corpus):
    """init_from= a Hugging Face model that knows nothing of us: its vocabulary, and our separator."""
    train('ar', objective='ar', max_iters=1, tied=False)
    config = json.loads(Path('ar/export/config.json').read_text())
    assert config.pop('dlm')['objective'] == 'ar'
    Path('ar/export/config.json').write_text(json.dumps(config))
    run = train('mdm', init_from='ar/export', tokenizer='', data_dir='', max_iters=1)
    assert run['data_dir'].startswith('data/') and run['data_dir'].endswith('-ar_export')
    assert run['obj'].dlm == dict(objective='mdm', shift=True, mask_id=257, separator=256, eos_id=256)
    assert checkpoint.load_checkpoint('mdm')[0].dlm == run['obj'].dlm


# ---- instruction tuning ------------------------------------------------------------------------------------
@pytest.mark.parametrize('objective, key', [('mdm', 'prompt,response'), ('ar', 'prompt,response'),
                                            ('repr_align', 'messages')])
def test_sft_learns_to_answer(train, tmp_path, objective, key):
    """The prompt is never masked and never scored; the loss of held-out answers falls."""
    with open('sft.jsonl', 'w') as f:
        for i in range(300):
            row = dict(prompt=f'{i * 7919 % 10007:05d}?', response='yes.' if i % 2 else 'no.')
            turns = zip(('user', 'assistant'), row.values())
            f.write(json.dumps(row | dict(messages=[dict(role=r, content=c) for r, c in turns])) + '\n')
    data.prepare('sft.jsonl', 'sft', tokenizer='bytes', key=key, val_fraction=0.2)
    shared = dict(dataset='sft.jsonl', data_dir='sft', key=key, sample_tokens=0, save_interval=0, final_eval_rows=0)
    if objective == 'repr_align':
        train(objective='ar', out_dir='ar', max_iters=1, **shared)
        shared |= dict(init_from='ar', align_weight=1)
    run = train(objective=objective, max_iters=40, eval_interval=40, eval_rows=0, weighting='flat', **shared)
    before, after = (line['val_nats_per_token'] for line in metrics() if 'val_nats_per_token' in line)
    assert before > 5 and after < 1.2, (before, after)      # which answer it is cannot be known: ln 2 per answer
    flags = run['val_data'].meta['splits']['val']
    assert metrics()[-1]['val_n_tokens'] == run['val_data'].n_targets < flags['tokens'] / 2
    obj, answers = run['obj'], {*run['tok'].encode('yesno.' + '\n' * (key == 'messages')), run['tok'].eos_id}
    for step in range(3):
        batch = run['train_data'].batch(step, 0, 8, 8, 0)
        noise = obj.prepare(batch, 0).noise
        n = noise['n'] if objective == 'ar' else int(noise['real'].sum())
        assert set(noise['targets'][:n].tolist()) <= answers and n
        if objective != 'ar': assert torch.equal(noise['xt'][~batch.is_target], batch.ids[~batch.is_target])


# ---- what goes wrong ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('file', [p.name for p in sorted((TRAIN.parent / 'config').glob('[!be]*.py'))])
def test_every_config_is_one(monkeypatch, file):
    """Of train.py: its keys exist, its batch can be divided: what stops it is the device."""
    monkeypatch.setattr(sys, 'argv', [str(TRAIN), f'config/{file}', '--device=tpu'])
    with pytest.raises(SystemExit, match="device must be cuda or cpu, got 'tpu'"):
        runpy.run_path(str(TRAIN), run_name='__main__')
    text = (TRAIN.parent / 'config' / file).read_text()
    assert text.startswith('# ') and 'out_dir' in text


@pytest.mark.parametrize('settings, message', [
    (dict(global_batch_size=6, micro_batch_size=4), 'a multiple of processes x micro_batch_size = 1 x 4'),
    (dict(global_batch_size=0), 'global_batch_size 0 must be a multiple'),
    (dict(objective='mdm', teacher='x'), "teacher and teacher_cache are for objective=repr_align, not mdm"),
    (dict(optimizer='sgd'), "optimizer must be adamw or muon, got 'sgd'"),
    (dict(objective='xyz'), "objective must be one of ar, mdm, repr_align, ldlm, got 'xyz'"),
    (dict(weighting='x'), "weighting must be elbo, flat or planner, got 'x'"),
    (dict(n_head=3), 'n_embd 32 must be a multiple of n_head 3'),
    (dict(data_fraction=0), 'data_fraction must be above 0 and at most 1, got 0.0'),
    (dict(freeze_layers='layer.0'), "freeze_layers: no parameter's name contains 'layer.0'"),
    (dict(n_kv_head=4), 'and that of n_kv_head 4'),
    (dict(log='mlflow'), "log must be wandb or tensorboard, got 'mlflow'"),
    (dict(log_interval=0), 'log_interval, eval_draws and tasks_every must be'),
    (dict(device='gpu'), "device must be cuda or cpu, got 'gpu'"),
    (dict(export_dtype='int8'), "export_dtype must be bfloat16, float16 or float32, got 'int8'"),
    (dict(push_to_hub='me'), "push_to_hub must be user/name, got 'me'"),
    (dict(init_from='resume'), 'init_from=resume: there is no checkpoint in run'),
    (dict(init_from='no/such/model', tokenizer='bytes'), 'no/such/model: no such model directory'),
    (dict(init_from='out/chat'), 'out/chat is not there: first run config/chat.py, if there is such a file, or'),
    (dict(val_split='dev'), "has no split 'dev', only train, val"),
    (dict(seq_len=10 ** 6), 'too few for a row of'),
    (dict(sample_score='best'), "score must be one of"),
    (LATENT | dict(freeze_layers='mlp'), 'freeze_layers is for objectives that train a Transformer'),
    (LATENT | dict(perceiver_layers=0), 'perceiver_layers and decoder_layers must be at least 1'),
    (LATENT | dict(latent_dim=-1), 'other sizes at least 0'),
    (LATENT | dict(sigma_dec=-1.0), 'sigma_dec must be at least 0'),
    (LATENT | dict(tangent_d=0.0), 'tangent_d above 0'),
    (LATENT | dict(encoder='out/nope'), 'out/nope is not there: first train the model that is to be the encoder'),
    (LATENT | dict(stats_rows=3), 'micro-batches must be a multiple of stats_rows = 3'),
    (dict(max_docs=7), 'was prepared with other settings (max_docs = 0, now 7)'),
])
def test_a_mistake_is_one_line(train, settings, message):
    with pytest.raises(SystemExit) as left: train(**settings)
    assert message in left.value.code and '\n' not in left.value.code
    assert not Path('run/result.json').exists()


@pytest.mark.parametrize('log', ['wandb', 'tensorboard'])
def test_a_missing_tracker_names_the_pip_command(train, log, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=f'pip install {log}'): train(log=log)


def test_nothing_is_overwritten(train, corpus):
    """An out_dir that holds something else, or something one cannot resume from, is left alone."""
    train(max_iters=2)
    with pytest.raises(SystemExit, match=r'with other settings \(n_layer 2 -> 1, lr 0.01 -> 0.02\)'):
        train(n_layer=1, lr=0.02)
    data.prepare(corpus['dataset'], 'other', tokenizer='bytes', val_fraction=0.2)
    with pytest.raises(SystemExit, match='other: run was trained on other data'):
        train(data_dir='other', max_iters=3)
    Path('run/step-000002').rename('elsewhere')
    with pytest.raises(SystemExit, match='holds run/best-000002, but nothing to resume from'): train()
    Path('run/best-000002').rename('elsewhere2')
    with pytest.raises(SystemExit, match='holds run/result.json, but nothing to resume from'): train()


def test_a_non_finite_step_is_skipped(train, monkeypatch, capsys):
    """One poisoned gradient costs one step: the weights stay as they were."""
    plain, weights = MDM.forward, []

    def forward(self, batch):
        weights.append(self.model.norm.weight.detach().clone())
        loss, stats = plain(self, batch)
        return loss * (math.nan if batch.step == 2 else 1), stats
    monkeypatch.setattr(MDM, 'forward', forward)
    run = train(eval_interval=0)
    assert 'step 2: loss nan, gradient norm nan: step skipped (1 in a row)' in capsys.readouterr().out
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert changed == [True, True, False, True, True] and run['step'] == 6
    assert all(p.isfinite().all() for p in run['obj'].parameters())


def test_divergence_stops_with_advice(train):
    with pytest.raises(SystemExit, match='five non-finite steps in a row: lower --lr'):
        train(lr=1e30, max_iters=50, eval_interval=0, save_interval=1)
    assert checkpoint.find('run') is not None


def test_an_error_while_rows_are_prepared_surfaces(train, monkeypatch):
    hook(monkeypatch, data.Corpus, 'batch', 3, lambda: 1 / 0)       # in the thread
    with pytest.raises(ZeroDivisionError): train(eval_interval=0)


@pytest.mark.parametrize('where', ['forward', 'validate', 'to'])
def test_out_of_memory_names_the_keys(train, monkeypatch, capsys, where):
    def fail(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate ...')
    monkeypatch.setattr(MDM, where, fail)
    with pytest.raises(torch.OutOfMemoryError) as left: train(micro_batch_size=4)
    sys.excepthook(left.type, left.value, left.tb)                  # what Python does with it
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'lower --micro_batch_size (now 4; the result stays the same), --seq_len' in said


def test_a_full_disk_leaves_the_last_checkpoint(train, monkeypatch, capsys):
    plain = checkpoint.save_file

    def save_file(tensors, path):
        if 'step-000004' in str(path): raise OSError(28, 'No space left on device')
        plain(tensors, path)
    with monkeypatch.context() as m, pytest.raises(OSError) as left:
        m.setattr(checkpoint, 'save_file', save_file)
        train()
    sys.excepthook(left.type, left.value, left.tb)
    assert 'the disk is full' in (said := capsys.readouterr().err) and 'resumes from run/step-000002' in said
    assert not list(Path('run').glob('.tmp*'))
    assert train()['step'] == 6


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.safetensors', 'state.json', 'tokenizer.json'])
@pytest.mark.parametrize('cut', [True, False])
def test_half_a_checkpoint_ends_in_one_line(train, file, cut):
    train(max_iters=2)
    file = Path('run/step-000002', file)
    if cut: os.truncate(file, file.stat().st_size // 2)
    else: file.unlink()
    with pytest.raises(SystemExit, match='run/step-000002'): train()


def test_a_validation_split_shorter_than_a_row(train, tmp_path, capsys):
    (tmp_path / 'few.jsonl').write_text(''.join(f'{{"text": "number {i}"}}\n' for i in range(9)))
    train(dataset='few.jsonl', data_dir='few')
    assert 'nats/token' in (said := capsys.readouterr().out) and 'nan' not in said


def test_push_to_hub(train, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, **kw): calls.append(kw)
        def upload_folder(self, folder_path, **kw): calls.append(kw | dict(files=os.listdir(folder_path)))
    monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
    train(max_iters=1, push_to_hub='me/model')
    assert [c['repo_id'] for c in calls] == ['me/model'] * 2
    assert {'README.md', 'config.json', 'model.safetensors', 'tokenizer.json'} <= set(calls[1]['files'])
    card = Path('run/export/README.md').read_text()
    assert '| shift | False |' in card and '| validation nats_per_token |' in card and 'texts.jsonl' in card
