"""A benchmark is worth what its gate is worth: peers that compute the same pass, peers that do not are caught."""
import dataclasses
import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bench
from model import Transformer

ROOT = Path(__file__).parent.parent
TINY = dict(vocab_size=512, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=128, batch=4, seq_len=64, doc_len=12.0)
CONFIG = dict(TINY, what='train', device='cpu', seed=0, residual='fp32', warmup=1, steps=2, packed=False)


@pytest.fixture(scope='module', params=[False, True], ids=['dense', 'packed'])
def task(request, tmp_path_factory):
    """config, weights and the reference's loss and gradient."""
    config = dict(CONFIG, packed=request.param)
    path = tmp_path_factory.mktemp('bench')
    torch.manual_seed(0)
    Transformer(bench.model_config(SimpleNamespace(**config))).save_pretrained(path)
    reference = bench.Peer('reference', config, path)
    reference.reference(4, path / 'reference')
    reference.reference(4, f"{path / 'reference'}-align", align=True)
    return config, path


@pytest.mark.parametrize('name', ['hf_eager', 'hf_eager_compact', 'hf_compile_compact', 'ours_eager', 'ours',
                                  'ours_align', 'ours_freeze', 'ours_align_freeze', 'ours_stacked', 'hf_stacked'])
def test_peers_take_the_same_step(task, name, monkeypatch):
    config, path = task
    backend = 'eager' if config['packed'] else 'aot_eager'              # quick to compile
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    peer = bench.Peer(name, config, path)
    got = peer.gate(4, path / 'reference')
    assert got['agrees'] and abs(got['loss_rel']) < 1e-6 and got['cosine'] > 1 - 1e-9 and abs(got['norm_rel']) < 1e-5
    assert got['worst_cosine'][0] > 0.9999
    before = peer.loss().item()
    assert len(peer.run(1, 2)['ms']) == 2 and peer.loss().item() < before
    peer.park()
    assert peer.opt is None and all(p.grad is None for p in peer.params)
    frozen = [n for n, p in peer.model.named_parameters() if not p.requires_grad]
    assert len(frozen) == (4 if 'freeze' in name else 0) and all('mlp' in n for n in frozen)


def test_the_gate_catches_a_wrong_alignment(task):
    config, path = task
    peer = bench.Peer('ours_align', config, path)
    for block in (*peer.model.layers, *peer.teacher.layers): block.compile = lambda **_: None
    assert peer.gate(4, path / 'reference')['agrees']
    peer.obj.align_weight = 9.9
    assert not peer.gate(4, path / 'reference')['agrees']
    peer.obj.align_weight, peer.teacher.cfg.causal = 10.0, False
    assert not peer.gate(4, path / 'reference')['agrees']


def test_the_gate_catches_a_forgotten_weight(task, monkeypatch):
    """1/t dropped: the loss of many a public repository."""
    def flat(c, B, make=bench.make_batch):
        batch = make(c, B)
        return dataclasses.replace(batch, noise=batch.noise | dict(a=2 * batch.noise['real'] / batch.n_targets))
    config, path = task
    for name in ('hf_eager', 'ours_eager'):
        peer = bench.Peer(name, config, path)
        with monkeypatch.context() as patch:
            patch.setattr(bench, 'make_batch', flat)
            got = peer.gate(4, path / 'reference')
        assert not got['agrees']


def test_the_gate_catches_causal_attention_and_wrong_gradients(task):
    config, path = task
    if not config['packed']:
        peer = bench.Peer('hf_eager', config, path)
        peer.model.config.is_causal = True
        assert not peer.gate(4, path / 'reference')['agrees']
    peer = bench.Peer('ours_eager', config, path)
    peer.setup(4)
    loss = peer.loss()
    loss.backward()
    grads = peer.gradients()
    assert bench.compare(loss.item(), grads, path / 'reference')['agrees']
    for wrong in (lambda g: 1.02 * g, lambda g: g + 0.1 * g.norm() / g.numel() ** 0.5, torch.zeros_like):
        assert not bench.compare(loss.item(), {n: wrong(g) for n, g in grads.items()}, path / 'reference')['agrees']


def test_documents_in_flex_and_varlen(task, monkeypatch):
    """Their forward equals the dense mask's; varlen_attn, which needs a GPU, is played by a loop over its starts."""
    def loop(q, k, v, starts, starts_k, longest, longest_k, enable_gqa):
        assert longest == longest_k == starts.diff().max() and torch.equal(starts, starts_k)
        parts = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=True)
                 for a, b in zip(starts, starts[1:])]
        return torch.cat([y[0].transpose(0, 1) for y in parts])
    monkeypatch.setattr('torch.nn.attention.varlen.varlen_attn', loop)
    config, path = task
    losses = []
    for name in ('hf_eager', 'flex', 'varlen'):
        monkeypatch.setitem(bench.PEERS, name, {k: v for k, v in bench.PEERS[name].items() if k != 'compiled'})
        peer = bench.Peer(name, config, path)
        peer.setup(4)
        with torch.no_grad(): losses.append(peer.loss().item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_packed_rows():
    c = SimpleNamespace(**dict(CONFIG, packed=True, seq_len=4096, doc_len=300.0))
    batch = bench.make_batch(c, 8)
    lengths = torch.cat([row.bincount() for row in batch.doc]).float()
    assert 200 < lengths.mean() < 400 and lengths.std() > 150
    assert (batch.pos.diff(dim=1)[batch.doc.diff(dim=1) == 0] == 1).all() and not batch.pos[:, 0].any()
    assert torch.equal(batch.noise['xt'], bench.make_batch(c, 8).noise['xt'])


def test_flops_are_those_of_training():
    c = SimpleNamespace(**CONFIG)
    batch, model = bench.make_batch(c, 4), Transformer(bench.model_config(c))
    scored = batch.noise['real'].sum().item() / 256
    assert bench.step_flops(c, batch) == pytest.approx(256 * model.flops_per_token(64, scored))
    packed = bench.make_batch(SimpleNamespace(**CONFIG | dict(packed=True)), 4)
    assert bench.step_flops(c, packed) < bench.step_flops(c, batch)


@pytest.mark.parametrize('off', [0.8, 1.0, 1.1])
@pytest.mark.parametrize('fits', [0, 1, 2, 3, 16, 23, 57, 500])
def test_search_ends_near_the_largest(fits, off):
    for start, double in ((1, False), (16, False), (1, True)):
        tried = bench.search(lambda B: 8 + B / 2 if B <= fits else None, start, 512, 8 + off * fits / 2, 8.0, double)
        best = max((B for B, peak in tried.items() if peak is not None), default=0)
        assert best <= fits and len(tried) < 15
        assert min(off, 1) * fits - 1 <= best + max(1, best // 8)
        if double: assert {2 ** i for i in range(9) if 2 ** i <= off * fits} <= set(tried)


def test_out_of_memory_is_an_answer(task, monkeypatch):
    peer = bench.Peer('ours_eager', *task)
    def run(warmup, steps): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr(peer, 'run', run)
    assert peer.memory(2) is None and peer.loss is None
    monkeypatch.setattr(peer, 'run', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): peer.memory(2)


def test_tables():
    row = dict(peer='ours', batch=16, ms=[1.0], median_ms=100.0, p10_ms=99.0, p90_ms=101.0, peak_gib=20.0, mfu=0.5,
               first_step_s=30.0, loss_rel=1e-5, norm_rel=0.001, cosine=0.9999, agrees=True, tokens_per_s=160e3,
               attention=['void cudnn_sdpa'])
    slow = row | dict(peer='hf_eager', tokens_per_s=80e3, peak_gib=None, attention=[])
    failed = dict(peer='liger', ms=[], error='No module named liger_kernel')
    text = bench.train_table([row, slow, slow | dict(peer='wrong', agrees=False), failed, dict(peer='next', ms=[])])
    lines = text.splitlines()
    assert '160,000' in lines[1] and '1.00 x' in lines[1] and '50.0%' in lines[1] and 'cudnn' in lines[1]
    assert '2.00 x' in lines[2] and ' - ' in lines[2]
    assert 'DISAGREES' in lines[3] and '80,000' not in lines[3] and ' x ' not in lines[3]
    assert lines[4:] == ['liger: FAILED, No module named liger_kernel']
    text = bench.align_table([row, slow | dict(peer='ours_align', median_ms=140.0), slow | dict(agrees=False)])
    first, second, wrong = text.splitlines()[1:]
    assert '1.00' in first.split() and '1.40' in second.split() and '80,000' not in wrong and 'False' in wrong
    peaks = {1: 1.0, 2: 2.0, 3: None}
    text = bench.memory_table([dict(peer='ours', batch=2, peaks=peaks), dict(peer='x', error='why')])
    assert text.splitlines()[1].split() == ['ours', '1.0', '2.0', '-', '2'] and text.endswith('x: FAILED, why')
    spent = [('void cutlass::gemm', 3.0, 24), ('triton_poi_fused__sdpa_0', 0.75, 2), ('flash_fwd', 0.25, 1)]
    text = bench.profile_table(spent)
    assert [bench.kind(k) for k, _, _ in spent] == ['matmul', 'fused', 'attention'] and '75.0%' in text


def test_kernels_against_references(monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    *_, (_, rows) = bench.run_kernels(SimpleNamespace(**CONFIG))
    assert [r['way'] for r in rows[:2]] == ['matmul', 'copy'] and len(rows) > 2
    for r in rows[2:]:
        if r['way'] in ('reference', 'compiled', 'ours', 'SDPA, mask'):
            assert 'error' not in r and r['forward_ms'] > 0 and (r['rel_error'] or 0) < 1e-4, r
    assert len(bench.kernel_table(rows).splitlines()) == len(rows) + 1


@pytest.fixture
def ldlm_config(tmp_path):
    """The README's kind of blocks, small, in a file."""
    text = (ROOT / 'config/ldlm_qwen3_6_35b_a3b.py').read_text()
    for old, new in (('random:2048:248320', 'random:32:300'), ('n_embd = 2048', 'n_embd = 32'),
                     ('n_head = 16', 'n_head = 2'), ('n_ff = 5464', 'n_ff = 48'), ('layers = 4', 'layers = 2'),
                     ('n_layer = 4', 'n_layer = 2')):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / 'ldlm_toy.py').write_text(text)
    return SimpleNamespace(shapes=str(tmp_path / 'ldlm_toy.py'), latents='8,16', batches='1,2', n_steps='3,2', seed=0,
                           device='cpu', mode='default', ways='graph,eager,compiled_kernels,compiled')


def test_ldlm(ldlm_config, monkeypatch):
    """All ways give the plain loop's states; the weights matter; every row has its limit."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    *_, (_, rows) = bench.run_ldlm(ldlm_config)
    assert not [r for r in rows if 'error' in r]
    timed, proofs = [r for r in rows if 'ms' in r], [r for r in rows if r['way'] == 'weights']
    assert len(proofs) == 2 and all(not p['without_effect'] and p['encoder_moves'] == 0 < p['least'][0] for p in proofs)
    assert all(r['rel_error'] < 1e-5 and r['same'] == 1 for r in timed if r['tokens'] == 8 and r['way'] != 'eager')
    assert all(r['limit_tokens_per_s'] > 0 and 0 < r['of_limit'] for r in timed)
    plain = {(r['way'], r['tokens'], r['batch'], r['steps']) for r in timed if 'adaLN' not in r['shape']}
    assert plain == {(w, 8, 1, n) for w in ('graph', 'eager', 'compiled', 'compiled_kernels') for n in (3, 2)} | {
        (w, 8, 2, n) for w in ('graph', 'eager') for n in (3, 2)} | {('graph', 16, B, 3) for B in (1, 2)}
    assert len(bench.ldlm_table(rows).splitlines()) == 1 + len(rows)


def test_ldlm_proof_finds_a_denoiser_that_is_not_used(ldlm_config, monkeypatch):
    """The published loop: the last prediction counts 0."""
    o = bench.latent_objective(ldlm_config, ldlm_config.shapes, 8, True)
    assert o.grid(4)[0].tolist() == [1, 0.75, 0.5, 0.25]                        # steps that move, then
    monkeypatch.setattr(bench.LDLM, 'grid', lambda self, n, *_: (torch.ones(n), torch.tensor([[1.0, 0, 0]] * n)))
    found = bench.weights_that_matter(o)['without_effect']
    assert found and all(name.startswith('dit') for name in found) and any('qkv_proj' in name for name in found)


def test_ldlm_bytes_are_those_of_the_weights(ldlm_config):
    """By hand, d = 32, f = 48, V = 300, fp32: per step two plain blocks; once the decoders, less one self-attention."""
    o = bench.latent_objective(ldlm_config, ldlm_config.shapes, 8, False)
    n_bytes, flop = bench.latent_cost(bench.Sampler(o, 5, 3), 5)
    mlp, d2 = 3 * 32 * 48, 32 * 32
    step = 2 * (4 * d2 + mlp) + d2
    once = 2 * (8 * d2 + mlp) - 4 * d2 + 2 * (8 * d2 + mlp) + 300 * 32
    assert flop == 2 * 5 * 8 * (3 * step + once)
    assert 4 * (3 * step + once) < n_bytes < 4 * (3 * step + once) * 1.05                   # norms, positions, times


def test_the_command(tmp_path):
    """One peer runs, one cannot be imported: a line of the report, not its end."""
    (tmp_path / 'liger_kernel.py').write_text('raise ImportError("no Liger here")')
    command = [sys.executable, ROOT / 'bench.py', 'train', '--peers=liger,ours_eager', '--device=cpu', '--rounds=2',
               f'--out_dir={tmp_path}/out', '--warmup=1', '--steps=2', *(f'--{k}={v}' for k, v in TINY.items())]
    env = {'PATH': '', 'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0 and 'liger: FAILED' in done.stdout, done.stdout + done.stderr
    result = json.loads((tmp_path / 'out/train.json').read_text())
    for key in ('command', 'commit', 'hardware', 'date', 'wall_minutes', 'config', 'results'): assert key in result
    liger, ours = result['results']
    assert 'no Liger here' in liger['error']
    assert ours['agrees'] and len(ours['ms']) == 4 and len(ours['round_ms']) == 2 and ours['tokens_per_s'] > 0


@pytest.mark.parametrize('words, message', [
    (['fly'], 'train, align, memory, kernels, sandbox, ldlm'), (['train', '--peers=nope'], 'unknown peer'),
    (['--peers=flex'], 'packed'), (['ldlm', '--latents=0'], 'comma list'), (['ldlm', '--shapes=x.py'], 'no such file'),
    (['ldlm', '--device=cpu'], 'shapes of billions of parameters'),
    (['memory', '--device=cpu'], 'GPUs only'), (['train', '--peers=ours_align'], 'bench.py align'),
    (['train', '--n_embd=897'], 'multiple'), (['--steps=0'], 'at least 1')])
def test_mistakes_are_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *words])
    with pytest.raises(SystemExit, match=message): runpy.run_path(str(ROOT / 'bench.py'), run_name='__main__')
