"""The numbers of eval.py against brute force."""
import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import eval as ev
from mdm import MDM
from model import ModelConfig, Transformer


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A corpus of a few documents and an untrained model of it."""
    root = tmp_path_factory.mktemp('eval')
    text = [f'def f{i}(x):\n    return x + {i}\n' for i in range(60)]
    (root / 'docs.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in text))
    data.prepare(str(root / 'docs.jsonl'), str(root / 'data'), tokenizer='bytes', val_fraction=0.2)
    tok = data.byte_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=320, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_ff=32, head_dim=8))
    mdm = MDM(model, tok.mask_id, separator=tok.sep_id, eos_id=tok.eos_id)
    checkpoint.save_checkpoint(root / 'run', 'best', mdm, tok, dict(step=1))
    return root, mdm, tok


def test_bigram_is_the_count_table(run):
    root, _, tok = run
    train, val = (data.Corpus(root / 'data', s, 32, 320) for s in ('train', 'val'))
    got = ev.bigram(train, val, 320, unigram_weight=5.0)
    seq = np.asarray(train.tokens).tolist()
    uni = np.array([seq.count(v) + 1 for v in range(320)]) / (len(seq) + 320)
    nats = n = n_bytes = 0
    for batch in val.eval_batches(0, 4):
        for ids, target in zip(batch.ids.tolist(), batch.is_target.tolist()):
            for i in range(1, len(ids)):
                if not target[i]: continue
                a, b = ids[i - 1], ids[i]
                pair = sum(seq[j] == a and seq[j + 1] == b for j in range(len(seq) - 1))
                nats -= math.log((pair + 5 * uni[b]) / (seq[:-1].count(a) + 5))
                n, n_bytes = n + 1, n_bytes + (b != tok.eos_id)
    assert got['n_tokens'] == n and got['nats_per_token'] == pytest.approx(nats / n)
    assert got['bits_per_byte'] == pytest.approx(nats / math.log(2) / n_bytes)


def test_nll_counts_every_byte_once(run):
    root, mdm, _ = run
    val = data.Corpus(root / 'data', 'val', 32, 320)
    got = ev.nll(mdm.eval(), val, 0, 4, 2, 0, 'cpu')
    assert got['n_tokens'] == val.n_targets and got['n_bytes'] == val.meta['splits']['val']['bytes']
    assert got['bits_per_byte'] == pytest.approx(got['nats_per_token'] * got['n_tokens'] / got['n_bytes'] / math.log(2))
    assert got['estimator'].startswith('upper bound')
    assert got == ev.nll(mdm, val, 0, 4, 2, 0, 'cpu') != ev.nll(mdm, val, 0, 4, 2, 1, 'cpu')


@pytest.mark.parametrize('line,ok', [
    ('x = 1', True), ('    return x', True), ('for i in range(3):', True), ('else:', True), ('# a comment', True),
    ('except ValueError as e:', True), ('elif x:', True), ('def f(x, y=1):', True), ('yield 3', True),
    ('x = = 1', False), ('foo(', False), ('"unclosed', False)])
def test_line_parses(line, ok): assert ev.line_parses(line) is ok


def test_every_line_of_a_real_module_that_stands_alone_parses():
    lines = [ast.unparse(node).split('\n')[0] for node in ast.walk(ast.parse(Path(ev.__file__).read_text()))
             if isinstance(node, ast.stmt) and not isinstance(node, ast.Try)]
    assert len(lines) > 50 and all(map(ev.line_parses, lines))


def test_longest_match_and_entropy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (''.join(rng.choice(list('ab'), 30)) for _ in range(2))
        brute = max((a[i:j] for i in range(30) for j in range(i, 31) if a[i:j] in b), key=len)
        assert len(ev.longest_match(a, b)) == len(brute) and ev.longest_match(a, b) in b
    assert ev.token_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4)) and ev.token_entropy([7, 7]) == 0


def test_command_writes_its_origin_and_refuses_unknown_tasks(run):
    root, *_ = run
    script = Path(ev.__file__)
    args = [f'--out_dir={root}/run', f'--data_dir={root}/data', '--seq_len=32', '--n_samples=2',
            '--max_new_tokens=8', '--draws=1']
    subprocess.run([sys.executable, script, *args, '--tasks=nll,bigram,samples', f'--result={root}/r.json'], check=True,
                   capture_output=True)
    r = json.loads((root / 'r.json').read_text())
    assert r['results'].keys() == {'nll', 'bigram', 'samples'} and len(r['results']['samples']['texts']) == 2
    assert r['commit'] and r['hardware'] and r['config']['draws'] == 1 and r['model']['objective'] == 'mdm'
    bad = subprocess.run([sys.executable, script, *args, '--tasks=nl'], capture_output=True, text=True)
    assert bad.returncode == 1 and "unknown task 'nl'" in bad.stderr and 'Traceback' not in bad.stderr
