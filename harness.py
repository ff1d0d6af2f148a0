"""EleutherAI's lm-evaluation-harness (`pip install lm_eval`) on any checkpoint, autoregressive or diffusion.

    python eval.py --out_dir=out/x --lm_eval=arc_easy,lambada_openai --draws=32

A request is one row, SEP + context + continuation, of which only the continuation is scored, by the `row_nll`
that also makes `nll`: exact for AR, a Monte-Carlo bound (log p >=) for diffusion. Unlike `nll`, nothing here
scores EOS: lm-eval asks for the text, not for its end.

Noise is a function of (seed, number of the document in its task, position in the row), so the options of a
question share it: their estimates err together, and their difference decides. It does not depend on batch
size, order, limit or number of processes: rows are padded to a multiple of 32, not to the batch's longest.
"""
import inspect
import json
import os
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as e: raise SystemExit(f"lm-eval's tasks need: pip install lm_eval ({e})") from None

from checkpoint import plain
from data import batch_from_documents
from kernels import head_logits
from model import scored_rows


def evaluate(obj, tok, tasks, *, draws=8, seed=0, batch_size=16, limit=0, n_shot=-1, include_path='',
             greedy=True, seq_len=0, sampler=()):
    """lm-eval's tasks (a list of names or globs) on obj -> a JSON-able dict: results (metrics and standard errors
    by task), groups, versions, n-shot, n-samples, higher_is_better, and how they were made. Under torchrun the
    processes share the work, and rank 0 gets the results.

    draws: of noise per row (diffusion); limit: documents per task, 0 = all; n_shot: -1 = the task's own;
    include_path: a directory with YAMLs of tasks; greedy=False leaves out `is_greedy`, which the acc of
    lambada needs and multiple choice does not; seq_len: of a row, 0 = max_seq_len; sampler: dict of settings
    of obj.sample, max_new_tokens (256) among them, where the task says nothing."""
    if min(draws, batch_size) < 1 or limit < 0:
        raise SystemExit("draws and batch_size must be at least 1, limit at least 0")
    manager = TaskManager(include_path=include_path or None)
    unknown = [t for t in tasks if not manager.match_tasks([t])]
    if unknown: raise SystemExit(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    lm = Adapter(obj, tok, draws, seed, batch_size, greedy, seq_len, sampler)
    os.environ.setdefault('DISABLE_MULTIPROC', '1')             # no fork of a process that holds a GPU
    try:
        out = simple_evaluate(lm, tasks=manager.match_tasks(tasks), task_manager=manager, log_samples=False,
                              limit=limit or None, num_fewshot=n_shot if n_shot >= 0 else None, bootstrap_iters=1000)
    except ConnectionError as e: raise SystemExit(f"lm_eval cannot load the data of these tasks: {e}") from None
    kept = ('results', 'groups', 'versions', 'n-shot', 'n-samples', 'higher_is_better')
    found = {k: out[k] for k in kept if k in out} if out else {}                # None but on the first process
    return plain(found) | dict(
        lm_eval=lm_eval.__version__, seed=seed, limit=limit, greedy=greedy, seq_len=lm.seq_len, sampler=lm.sampler,
        estimator='exact' if obj.name == 'ar' else f'bound, count, {draws} draw(s) per row')


def _batches(x, size): return [x[i:i + size] for i in range(0, len(x), size)]


def cut(text, until):
    """The text before the first of the stop strings."""
    for stop in until: text = text.split(stop)[0]
    return text


class Adapter(LM):
    """What lm-eval calls a model. Rows have at most seq_len tokens; too long a context loses its left end."""

    def __init__(self, obj, tok, draws=8, seed=0, batch_size=16, greedy=True, seq_len=0, sampler=()):
        super().__init__()
        self.obj, self.tok, self.draws, self.seed, self.batch_size = obj, tok, draws, seed, batch_size
        self.greedy, self.sampler = greedy, dict(max_new_tokens=256) | dict(sampler)
        self.seq_len, self.on = seq_len or obj.model.cfg.max_seq_len, obj.model.embed_tokens.weight.device

    @torch.no_grad()
    def _run(self, work, batches, what):
        """work(batch) -> {key: result} of all batches; processes take turns and share the results."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        done = {}
        for batch in tqdm(batches[rank::world], desc=f'lm_eval: {what}', disable=None if rank == 0 else True):
            with torch.autocast('cuda', torch.bfloat16, enabled=self.on.type == 'cuda'): done |= work(batch)
        parts = [done] * world
        if world > 1: dist.all_gather_object(parts, done)
        return {k: v for part in parts for k, v in part.items()}

    # -- likelihood --------------------------------------------------------------------------------------

    def loglikelihood(self, requests):
        """-> [(log p of the continuation in nats, is it what greedy decoding writes)]."""
        return self._score([(*self._document(*r.args), r.doc_id) for r in requests], self.greedy)

    def loglikelihood_rolling(self, requests):
        """-> [log p of the whole text]. Minus their sum is what `nll` gives to the same rows without EOS."""
        documents = [(*self._document('', *r.args), r.doc_id) for r in requests]
        return [log_p for log_p, _ in self._score(documents, greedy=False)]

    def _document(self, context, continuation):
        """-> ids, how many of them are given. Blanks between the two belong to the continuation, and so does
        a token that straddles them. In front is SEP; without one EOS, if nothing else is given (as lm-eval)."""
        alone, ids = self.tok.encode(context.rstrip()), self.tok.encode(context + continuation)
        given = next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
        front = [self.obj.separator] if self.obj.separator is not None else [] if given else [self.tok.eos_id]
        return front + ids, len(front) + given

    def _windows(self, ids, given):
        """-> [(ids, given)] that score ids[given:] once each: one row with as much context as fits. A longer
        continuation takes several that overlap by one token, as in a corpus (lm-eval fills up the last)."""
        start = max(0, min(len(ids) - self.seq_len, given - 1))
        starts = range(start, len(ids) - 1, self.seq_len - 1) if given < len(ids) else ()
        return [(ids[s:s + self.seq_len], max(given - s, 1)) for s in starts]

    def _score(self, documents, greedy):
        """[(ids, given, doc_id)] -> [(log p of ids[given:], is it greedy)]."""
        width = lambda row: min(-(-len(row[0]) // 32) * 32, self.seq_len)

        def work(part):
            ids, given, row_ids, keys = zip(*part)
            batch = batch_from_documents(ids, width(part[0]), pad_id=self.tok.eos_id)
            is_target = batch.is_target & (torch.arange(width(part[0])) >= torch.tensor(given)[:, None])
            batch = replace(batch, is_target=is_target, n_targets=int(is_target.sum()),
                            row_ids=torch.tensor(row_ids)).to(self.on)
            nats, _ = self.obj.row_nll(batch, self.draws, self.seed)
            written = writes_targets(self.obj, batch).tolist() if greedy else [False] * len(part)
            return dict(zip(keys, zip(nats.tolist(), written)))
        rows = [(ids, given, doc_id + (w << 32), (i, w)) for i, (*document, doc_id) in enumerate(documents)
                for w, (ids, given) in enumerate(self._windows(*document))]
        batches = [part for _, same in groupby(sorted(rows, key=width, reverse=True), width)
                   for part in _batches(list(same), self.batch_size)]
        log_p, is_greedy = [0.0] * len(documents), [greedy] * len(documents)
        for (i, _), (nats, written) in sorted(self._run(work, batches, 'likelihood').items()):
            log_p[i], is_greedy[i] = log_p[i] - nats, is_greedy[i] and written
        return list(zip(log_p, is_greedy))

    # -- generation --------------------------------------------------------------------------------------

    def generate_until(self, requests):
        """-> [text before the first stop string]. Requests with equal settings go by length into fixed batches,
        each with a seed: samples are reproducible, but others with another batch_size (greedy ones are not)."""
        groups, batches = {}, []
        for i, r in enumerate(requests):
            groups.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(i)
        for key, members in groups.items():
            until, settings = self._settings(json.loads(key))
            prompts = [(i, self._prompt(requests[i].args[0], settings['max_new_tokens'])) for i in members]
            prompts.sort(key=lambda x: -len(x[1]))
            batches += [(part, until, settings) for part in _batches(prompts, self.batch_size)]

        def work(batch):
            part, until, settings = batch
            seed = int(np.random.SeedSequence((self.seed, part[0][0])).generate_state(1)[0])
            rows, _ = self.obj.sample([prompt for _, prompt in part], **settings, seed=seed)
            return {i: cut(self.tok.decode(row[len(prompt):]), until) for (i, prompt), row in zip(part, rows)}
        texts = self._run(work, batches, 'samples')
        return [texts[i] for i in range(len(requests))]

    def _prompt(self, context, n):
        """Ids of the context's end that leaves room for SEP and n tokens."""
        has_sep = self.obj.separator is not None
        ids = self.tok.encode(context) or ([] if has_sep else [self.tok.eos_id])
        return ids[max(len(ids) - (self.seq_len - n - has_sep), 0):]

    def _settings(self, task):
        """A task's generation_kwargs -> stop strings, settings of obj.sample: the task's, else ours."""
        until, lengths = task.get('until') or [], ('max_gen_toks', 'max_new_tokens', 'max_tokens')
        known = inspect.signature(self.obj.sample).parameters.keys() - {'prompts', 'seed', 'history'}
        settings = self.sampler | {k: v for k, v in task.items() if k in known and v is not None}
        if task.get('do_sample') is False: settings['temperature'] = 0.0
        n = next((task[k] for k in lengths if task.get(k)), settings['max_new_tokens'])
        settings['max_new_tokens'] = min(int(n), self.seq_len // 2)
        if settings['max_new_tokens'] < n:
            print(f"lm_eval: {n} new tokens asked for, {self.seq_len // 2} made: half a row is the prompt's")
        if ignored := sorted(task.keys() - known - {'until', 'do_sample', *lengths}):
            print(f"lm_eval: our samplers have no {', '.join(ignored)}: ignored")
        return [s for s in ([until] if isinstance(until, str) else until) if s], settings


@torch.no_grad()
def writes_targets(obj, batch):
    """(B,) bool: are a row's targets what greedy decoding writes there? AR: the argmax at each of them, one
    forward. Diffusion: `infill` at temperature 0, the most confident token first, one per forward; a row is
    out at its first wrong token, so most cost a forward or two."""
    B, T = batch.ids.shape
    right = torch.ones(B, dtype=torch.bool, device=batch.ids.device)
    if obj.name == 'ar':
        tokens, rows, n = scored_rows(batch.is_target, obj.shift)
        h = obj.model.hidden(batch.ids, batch.ranges, batch.pos).flatten(0, 1)[rows[:n]]        # (N, D)
        for part, where in zip(h.split(1024), tokens[:n].split(1024)):
            z = head_logits(part, obj.model.head_weight)
            if obj.mask_id is not None: z[:, obj.mask_id] = -torch.inf
            right[where[z.argmax(1) != batch.ids.flatten()[where]] // T] = False
        return right
    left = batch.is_target                                                                      # still masked
    while (todo := left & right[:, None]).any():
        rows = todo.flatten().nonzero().squeeze(1)
        xt = torch.where(left, obj.mask_id, batch.ids)
        p, token = obj.logits(xt, rows, batch.ranges, batch.pos).softmax(-1).max(-1)
        sure = torch.full((B, T), -torch.inf, device=p.device)
        sure.view(-1)[rows] = p
        first = torch.zeros_like(left).scatter_(1, sure.argmax(1, keepdim=True), True) & todo   # one per row
        wrong = first.flatten()[rows] & (token != batch.ids.flatten()[rows])
        right[rows[wrong] // T] = False
        left = left & ~first
    return right
