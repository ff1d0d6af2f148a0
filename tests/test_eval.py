"""The numbers of eval.py against brute force."""
import ast
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import eval as ev
import tokenizer
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
    ('@property', True), ('@', False),
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


def test_perplexity_of_samples_is_that_of_the_scorer(run):
    from ar import AR
    _, mdm, tok = run
    scorer = AR(copy.deepcopy(mdm.model), tok.mask_id, separator=tok.sep_id, eos_id=tok.eos_id)
    texts = ['x = 1\n', 'def f(): pass', '']
    got = ev.perplexity(scorer, tok, texts, [''] * 3, 2, 'cpu')
    nats = n = 0
    for text in filter(None, texts):
        ids = torch.tensor([[tok.sep_id, *tok.encode(text)]])
        z = scorer.model(ids).index_fill(2, torch.tensor([tok.mask_id]), -torch.inf)[0, :-1].log_softmax(-1)
        nats, n = nats - z.gather(1, ids[0, 1:, None]).sum().item(), n + ids.shape[1] - 1
    assert got['n_tokens'] == n and got['gen_ppl'] == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert got['bits_per_byte'] == pytest.approx(nats / math.log(2) / len(''.join(texts)))
    assert ev.distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    given = ev.perplexity(scorer, tok, texts, ['import a\n', '# b\n', 'c'], 2, 'cpu')     # nats of what follows only
    before = ev.perplexity(scorer, tok, ['import a\n', '# b\n'], [''] * 2, 2, 'cpu')
    docs = [tok.encode(p) + tok.encode(t) for p, t in zip(['import a\n', '# b\n'], texts)]
    whole, _ = scorer.row_nll(ev.batch_from_documents([[tok.sep_id, *doc] for doc in docs]))
    nats = [x['n_tokens'] * math.log(x['gen_ppl']) for x in (before, given)]
    assert given['n_tokens'] == n and sum(nats) == pytest.approx(whole.sum().item(), rel=1e-5)


def test_prompts_and_what_really_follows(run):
    root, *_ = run
    corpus = data.Corpus(root / 'data', 'val', 32)
    prompts, rows = ev.excerpts(corpus, 2, 5, 7)
    starts = np.load(root / 'data/val.docs.npy')
    firsts = [corpus.tokens[s + 1:s + 13].tolist() for s in starts[:-1]]
    assert all(p + r in firsts and (len(p), len(r)) == (5, 7) for p, r in zip(prompts, rows))
    assert prompts[0] + rows[0] != prompts[1] + rows[1]
    with pytest.raises(SystemExit, match='lower n_samples'): ev.excerpts(corpus, 10 ** 6, 5, 7)
    said = ev.describe([[1, 2], [3]], ['x\ny = 1\n= =\nz', ''], ['a = ', 'b'])
    assert (said['lines'], said['lines_that_parse'], said['empty'], said['texts_that_parse']) == (2, 0.5, 1, 0)


def test_grid_and_its_errors():
    config = dict(temperature=0.8, n_steps=64, remask='p2')
    assert ev.grid('', config) == [{}]
    assert ev.grid('temperature=0.2,1;n_steps=8', config) == [dict(temperature=t, n_steps=8) for t in (0.2, 1.0)]
    for bad, says in {'temp=1': "unknown key 'temp'", 'n_steps=a': 'must be int', 'n_steps': 'key=value'}.items():
        with pytest.raises(SystemExit, match=says): ev.grid(bad, config)


def command(*args, processes=1, **more):
    start = [sys.executable] if processes == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | dict(OMP_NUM_THREADS='1')
    return subprocess.run([*start, *map(str, args)], capture_output=True, text=True, env=env, **more)


def without_times(file):
    rows = map(json.loads, Path(file).read_text().splitlines()[1:])
    return [{k: v for k, v in r.items() if 'seconds' not in k} for r in rows]


def test_two_processes_equal_one_and_a_sweep_is_one_file(run, tmp_path):
    root, script = run[0], Path(ev.__file__)
    args = [f'--out_dir={root}/run', f'--data_dir={root}/data', '--seq_len=32', '--draws=1', '--limit=3', '--n_steps=2',
            '--max_new_tokens=4', '--batch_size=2', '--tasks=infill_single', '--sweep=temperature=0.5,1.0']
    for n in (1, 2):
        done = command(script, *args, f'--result={tmp_path}/{n}.json', processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f'{n}.json').read_text())['results'] for n in (1, 2))
    assert one.keys() == {f'infill_single,temperature={t}' for t in (0.5, 1.0)}
    for name in one:
        assert one[name]['exact_match'] == two[name]['exact_match'] and one[name]['nfe'] == two[name]['nfe']
    for t in (0.5, 1.0):
        files = [tmp_path / f'{n}.infill_single,temperature={t}.jsonl' for n in (1, 2)]
        assert without_times(files[0]) == without_times(files[1])
    assert without_times(files[0]) != without_times(tmp_path / '1.infill_single,temperature=0.5.jsonl')


def test_from_text_to_a_solved_problem(tmp_path):
    """data -> train -> export -> sample -> eval from the export, with a task inside the training loop."""
    here, export = Path(ev.__file__).parent, tmp_path / 'run/export'
    (tmp_path / 'docs.jsonl').write_text(''.join(json.dumps(dict(text=f'x = {i}\n' * 9)) + '\n' for i in range(60)))
    done = command(here / 'train.py', f'--dataset={tmp_path}/docs.jsonl', f'--data_dir={tmp_path}/data',
                   '--tokenizer=bytes',
                   '--n_layer=1', '--n_head=2', '--n_embd=16', '--n_ff=32', '--seq_len=64', '--global_batch_size=4',
                   '--max_iters=4', '--eval_interval=2', '--eval_rows=2', '--tasks=infill_single', '--tasks_limit=2',
                   '--tasks_every=2', '--execute_code=true', '--sample_tokens=4', '--sample_steps=2',
                   '--log_interval=1', '--device=cpu', f'--out_dir={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    solved = [json.loads(line) for line in lines if 'pass@1' in line]
    assert [s['step'] for s in solved] == [0, 4] and solved[0]['infill_single_pass@1'] == 0
    drawn = command(here / 'sample.py', f'--out_dir={export}', '--n=1', '--max_new_tokens=4', '--n_steps=2')
    assert drawn.returncode == 0, drawn.stderr
    done = command(here / 'eval.py', f'--out_dir={export}', '--tasks=humaneval,infill_single', '--limit=2',
                   '--n_steps=2', '--max_new_tokens=4', '--execute_code=true', f'--result={tmp_path}/r.json')
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / 'r.json').read_text())
    assert r['results']['humaneval']['pass@1'] == 0 and r['results']['infill_single']['n_problems'] == 2


def test_a_checkpoint_like_open_dcoder_opens_with_the_readme_s_command(tmp_path):
    """fredzzp/open-dcoder-0.5B: Qwen2, tied, more embedding rows than tokens, `<M>` as the tokenizer's mask token."""
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    ours = tokenizer.byte_tokenizer()
    bpe = tokenizers.Tokenizer.from_str(ours.json.replace(tokenizer.MASK, '<M>'))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<|endoftext|>', mask_token='<M>',
                                              pad_token='<|endoftext|>')
    hf.save_pretrained(tmp_path)
    config = transformers.Qwen2Config(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    obj, tok = checkpoint.load_checkpoint(str(tmp_path), objective='mdm')
    assert (obj.name, obj.shift, obj.mask_id, obj.separator) == ('mdm', True, hf.mask_token_id, None)
    assert not obj.model.cfg.causal and tok.decode([hf.mask_token_id]) == ''
    done = command(Path(ev.__file__), 'config/eval_infill.py', f'--out_dir={tmp_path}', '--objective=mdm', '--limit=2',
                   '--tasks=infill_single', '--n_steps=2', '--execute_code=true', f'--result={tmp_path}/r.json')
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / 'r.json').read_text())
    assert r['model']['shift'] and r['results']['infill_single']['average']['pass@1'] == 0
    assert list(r['results']['infill_single']['by_length']) == ['4', '8', '16', '32', '64', 'oracle']


WEIGHTS = f'--out_dir={Path(ev.__file__).parent}/weights'


@pytest.mark.parametrize('args,says', [
    (['--tasks=gen_ppl', '--n_samples=4'], 'needs --scorer'), (['--tasks=samples'], '--n_samples'),
    (['--lengths=4,x'], 'lengths is a comma list'),
    (['--sweep=batch_size=1,2'], 'sweep can vary'), (['--tasks=humaneval', '--data=nowhere.jsonl'], 'no such file'),
    (['--tasks=humaneval,mbpp', '--data=x.jsonl'], 'one by one'), (['--canonical=true'], 'problems only'),
    (['--canonical=true', '--tasks=humaneval'], 'execute_code'),
    ([WEIGHTS, '--tasks=humaneval', '--remask=p3'], 'remask'),
    ([WEIGHTS, '--tasks=humaneval', '--result=/proc/x.json'], 'cannot write'),
    ([WEIGHTS, '--tasks=humaneval', '--compiled=default'], 'for the sampler of an ldlm'),
    (['--device=gpu'], 'device must be'),
    (['--out_dir=nowhere', '--tasks=humaneval'], 'nowhere')], ids=str)
def test_a_wrong_input_ends_in_one_line(args, says):
    done = command(Path(ev.__file__), *args)
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
