"""Let a model solve the problems of benchmarks.py: generate, run, count.

    samples -> out.jsonl -> verdicts of sandbox.py -> pass@k, exact match, by length of the hole

The file is the state: its first line says what made it, then come samples, then verdicts. A killed run finds there what
is done, under any number of processes; a file of another checkpoint, or of other settings, is refused.

Batches are fixed and numbered, and noise is a function of (seed, batch): the same seed gives the same samples whatever
the number of processes. All points of a sweep share it, so that they differ by their settings alone.
"""
import hashlib
import json
import os
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import benchmarks
import sandbox

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
SAMPLER = 'n_steps temperature top_k top_p commit score remask tau block_len eta time_grid'.split()
VERDICT = 'program passed status detail run_seconds'.split()


def is_infill(problem): return benchmarks.TASKS[problem.task].kind in ('lines', 'line', 'span')


def fingerprint(obj):
    """A number that other weights do not have."""
    return f'{sum(p.detach().double().abs().sum().item() for p in obj.parameters()):.12g}'


def batch_seed(seed, b): return seed * 1_000_003 + b


def make_jobs(obj, tok, problems, n_samples, lengths, max_new_tokens):
    """One job per (problem, sample, length of the hole): prefix, n tokens to write, suffix (None: go on after the
    prefix). Long ones first, and neighbours of similar length. An autoregressive model sees the prefix alone.

    GPT-2's kind of tokenizer joins a line break and the blanks that follow in one token, so that after a prompt that
    ends in a line break no indented line ever comes. There, what blanks the prompt ends in are left to the model, and
    the line break that ends a hole of whole lines is given, as its token belongs to the suffix."""
    jobs, joins = [], tok.joins_blanks()
    for p in problems:
        blanks = p.prompt[len(p.prompt.rstrip()):] if joins else ''
        ends = '\n' if joins and benchmarks.TASKS[p.task].kind == 'lines' else ''
        prefix, suffix = tok.encode(p.prompt.removesuffix(blanks)), tok.encode(ends + p.suffix)
        if not is_infill(p): holes = [('', max_new_tokens, None)]
        elif not hasattr(obj, 'infill'): holes = [('prefix', max_new_tokens, None)]
        else:
            oracle = max(len(tok.encode((blanks + p.answer).removesuffix(ends))), 1)
            holes = [(length, oracle if length == 'oracle' else int(length), suffix) for length in lengths]
        jobs += [dict(task_id=p.task_id, sample=i, length=length, prefix=prefix, n=n, suffix=suffix, blanks=blanks,
                      ends='' if suffix is None else ends) for length, n, suffix in holes for i in range(n_samples)]
    return sorted(jobs, key=size, reverse=True)                     # stable: the order is a function of the settings


def size(job): return len(job['prefix']) + job['n'] + len(job['suffix'] or [])


def generate(obj, tok, jobs, sampler, seed):
    """One batch of jobs -> records for the log, one per job."""
    started = time.time()
    prefixes, to_fill = [j['prefix'] for j in jobs], [[j['prefix'], j['n'], j['suffix']] for j in jobs]
    if jobs[0]['suffix'] is None: rows, nfe = obj.sample(prefixes, jobs[0]['n'], **sampler, seed=seed)
    else: rows, nfe = obj.infill(to_fill, **sampler, seed=seed)
    seconds = (time.time() - started) / len(jobs)
    records = []
    for job, row in zip(jobs, rows):
        new = row[len(job['prefix']):][:job['n']]
        records.append({k: job[k] for k in ('task_id', 'sample', 'length', 'blanks')} | dict(
            raw=tok.decode(new) + job['ends'], n_new=len(new), nfe=nfe, seconds=round(seconds, 4)))
    return records


class Log:
    """The file. Every process appends to a part of its own, one write per batch; join() makes them one and forgets the
    half line of a kill."""

    def __init__(self, path, settings):
        self.path, self.part = Path(path), Path(f'{path}.{RANK}')
        self.head = dict(settings=json.loads(json.dumps(settings)))
        self.join()

    def join(self):
        if WORLD > 1: dist.barrier()
        if RANK == 0:
            parts = sorted(self.path.parent.glob(f'{self.path.name}.[0-9]*'))
            files = [self.path, *parts] if self.path.exists() else []       # parts alone are of a deleted file
            lines = [line for f in files for line in f.read_text().splitlines(True)]
            try: head, *records = [json.loads(line) for line in lines if line.endswith('\n')] or [self.head]
            except ValueError as e: raise SystemExit(f"{self.path} is broken, delete it ({e})") from None
            there = head.get('settings', {})
            differ = [f"{k} {there.get(k)!r} -> {v!r}" for k, v in self.head['settings'].items() if there.get(k) != v]
            if differ:
                raise SystemExit(f"{self.path} holds samples of another run ({'; '.join(differ)}): delete it, or "
                                 "choose another --result or --out_dir")
            self.rewrite(records)
            for part in parts: part.unlink()
        if WORLD > 1: dist.barrier()
        self.records = [json.loads(line) for line in self.path.read_text().splitlines()[1:]]

    def append(self, records):
        self.records += records
        with open(self.part, 'a') as f: f.write(''.join(json.dumps(r) + '\n' for r in records))

    def rewrite(self, records):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.path.with_name(self.path.name + '.tmp')
        tmp.write_text(''.join(json.dumps(r) + '\n' for r in [self.head, *records]))
        tmp.replace(self.path)

    def samples(self):
        """{(task_id, sample, length): record without its verdict}"""
        return {(r['task_id'], r['sample'], r['length']): {k: v for k, v in r.items() if k not in VERDICT}
                for r in self.records if 'batch' in r}

    def verdicts(self):
        """{program: its verdict}, but for those that were lost."""
        return {r['program']: {k: r[k] for k in VERDICT} for r in self.records
                if 'program' in r and 'sandbox was lost' not in r['detail']}


def generate_all(obj, tok, problems, log):
    """Generate what the log does not have yet. The ranks take the batches in turn."""
    s = log.head['settings']
    jobs = make_jobs(obj, tok, problems.values(), s['n_samples'], s['lengths'], s['max_new_tokens'])
    batches = [jobs[i:i + s['batch_size']] for i in range(0, len(jobs), s['batch_size'])]
    n_done = Counter(r['batch'] for r in log.samples().values())
    todo = [b for b, batch in enumerate(batches) if n_done[b] != len(batch)]
    with tqdm(total=len(jobs), initial=len(jobs) - sum(len(batches[b]) for b in todo), unit='sample', desc=s['task'],
              disable=None if RANK == 0 else True) as bar:
        for b in todo[RANK::WORLD]:
            records = generate(obj, tok, batches[b], s['sampler'], batch_seed(s['seed'], b))
            log.append([dict(r, batch=b) for r in records])
            bar.update(len(records) * WORLD)
    log.join()
    return sum(size(job) > obj.model.cfg.max_seq_len for job in jobs)


def complete(problem, sample):
    """The program's problem and completion. Where blanks were left to the model and it wrote others, the program is
    what the model saw and wrote, not what it was supposed to. But before a hole of whole lines the prompt's blank lines
    stand, however many it wrote."""
    raw, blanks = sample['raw'], sample['blanks']
    lines = benchmarks.TASKS[problem.task].kind == 'lines' and blanks.endswith('\n')
    if lines and (own := re.match(r'\s*\n', raw)): raw = raw[own.end():]
    elif raw.startswith(blanks): raw = raw.removeprefix(blanks)
    else: problem = replace(problem, prompt=problem.prompt.removesuffix(blanks), answer=blanks + problem.answer)
    return problem, benchmarks.extract(problem, raw, sample['length'] == 'prefix')


def judge(samples, programs, log):
    """Run every different program once, unless the log has its verdict; write the verdicts into the samples."""
    known, todo = log.verdicts(), {}
    for s, (solution, p) in zip(samples, programs):
        s['program'] = hashlib.sha256('\0'.join((solution, p.setup, p.test)).encode()).hexdigest()[:16]
        if s['program'] not in known: todo[s['program']] = (solution, p.test, p.setup, p.timeout)
    started, keys = time.time(), list(todo)
    with tqdm(total=len(todo), desc='execute', unit='program', disable=None) as bar:
        for i, verdict in sandbox.execute_many(list(todo.values())):
            found = keys[i], verdict.passed, verdict.status, verdict.detail, round(verdict.seconds, 3)
            known[keys[i]] = dict(zip(VERDICT, found))
            log.append([known[keys[i]]])
            bar.update()
    for s in samples: s |= known[s['program']]
    wall = time.time() - started                                    # of the programs that were new to the log
    return dict(programs=len({s['program'] for s in samples}), executed=len(todo), execution_seconds=round(wall, 1),
                programs_per_s=len(todo) / wall if todo else None)


def mean_and_error(x):
    """Over problems; no standard error of one."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None


def summarise(samples, ks=(1, 10)):
    """pass@k and exact match with their standard errors over problems, and how programs ended. With several lengths of
    the hole a problem's share is its average over them, and k is 1."""
    by_problem, out, one_length = {}, dict(n_samples=len(samples)), len({s['length'] for s in samples}) == 1
    for s in samples: by_problem.setdefault(s['task_id'], []).append(s)
    if 'passed' in samples[0]:
        counts = [(len(group), sum(s['passed'] for s in group)) for group in by_problem.values()]
        least = min(n for n, _ in counts) if one_length else 1
        for k in [k for k in ks if k <= least]:
            values = [benchmarks.pass_at_k(n, c, k) for n, c in counts]
            out[f'pass@{k}'], out[f'pass@{k}_stderr'] = mean_and_error(values)
        if least > 1: out['n_passed'] = [c for _, c in counts]      # for the curve over k
        out['statuses'] = dict(Counter(s['status'] for s in samples))
    if 'exact' in samples[0]:
        exact = [np.mean([s['exact'] for s in group]) for group in by_problem.values()]
        out['exact_match'], out['exact_match_stderr'] = mean_and_error(exact)
    return out


def benchmark(task, obj, tok, log_file, *, sampler=None, n_samples=1, lengths=('oracle',), max_new_tokens=128,
              batch_size=32, seed=0, data='', limit=0, execute_code=False):
    """One task of benchmarks.py -> its numbers (rank 0; None elsewhere). obj=None: the reference solutions take the
    model's place, and everything must pass. nfe, seconds and tokens/s are of one process."""
    problems = {p.task_id: p for p in benchmarks.load(task, data, limit, whole=obj is None)}
    which = hashlib.sha256(repr(list(problems.values())).encode()).hexdigest()[:16]
    settings = dict(n_samples=n_samples, lengths=list(lengths), max_new_tokens=max_new_tokens, batch_size=batch_size,
                    seed=seed, sampler=sampler, model=dict(obj.dlm, weights=fingerprint(obj))) if obj else {}
    log = Log(log_file, dict(task=task, problems=which, **settings))
    out = dict(n_problems=len(problems))
    if obj:
        out['longer_than_trained'] = generate_all(obj, tok, problems, log)
        samples = [s for _, s in sorted(log.samples().items())]
        pairs = [complete(problems[s['task_id']], s) for s in samples]
        seconds = sum(s['seconds'] for s in samples)
        out |= dict(generation_seconds=round(seconds, 1), nfe=float(np.mean([s['nfe'] for s in samples])),
                    new_tokens_per_s=sum(s['n_new'] for s in samples) / max(seconds, 1e-9), samples=log.path.name)
    else:
        samples = [dict(task_id=p.task_id, sample=0, length='') for p in problems.values()]
        pairs = [(p, p.answer) for p in problems.values()]
    if RANK: return None
    for s, (p, completion) in zip(samples, pairs):
        s['completion'] = completion
        if is_infill(p): s['exact'] = benchmarks.exact_match(p, completion)
    if execute_code and benchmarks.TASKS[task].metric == 'pass@k':
        out |= judge(samples, [(benchmarks.program(*pair), pair[0]) for pair in pairs], log)
    log.rewrite(samples)
    log.part.unlink(missing_ok=True)
    out |= dict(n_samples=len(samples), notes=benchmarks.TASKS[task].notes)
    there = {s['length'] for s in samples}
    by_length = {length: summarise([s for s in samples if s['length'] == length])
                 for length in (*lengths, 'prefix', '') if length in there}
    if len(by_length) == 1: return out | by_length.popitem()[1]
    fixed = summarise([s for s in samples if s['length'] != 'oracle'])
    return out | dict(average={k: v for k, v in fixed.items() if k != 'statuses'}, by_length=by_length)
