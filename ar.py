"""Autoregressive language modelling: the baseline that every other objective is a diff of.

    loss = sum_i -log p(x_i | x_<i) / n_targets

The hidden state at position i - 1 predicts token i. Position 0 of a document is a separator: given, never scored.

    python train.py config/quickstart.py --objective=ar
"""
from dataclasses import replace

import torch

from kernels import causal_ranges, document_ranges, head_logits, last_queries, linear_cross_entropy, unmask
from model import Objective, scored_rows


class AR(Objective):
    """The model is taken over: it becomes causal."""
    name, estimator = 'ar', 'exact'

    def __init__(self, model, mask_id=None, separator=None, eos_id=None):
        super().__init__(model, mask_id, separator, eos_id)
        model.cfg.causal = True

    def prepare(self, batch, seed):
        """Nothing is random here: only where the loss looks."""
        tokens, rows, n = scored_rows(batch.is_target, self.shift, bucket=max(64, batch.ids.numel() // 16))
        a = torch.zeros(len(tokens))
        a[:n] = 1 / batch.n_targets
        return replace(batch, noise=dict(rows=rows, targets=batch.ids.flatten()[tokens], a=a, n=n))

    def forward(self, batch):
        noise = batch.noise
        h = self.model.hidden(batch.ids, batch.ranges, batch.pos).flatten(0, 1).index_select(0, noise['rows'])  # (N, D)
        loss, ce = linear_cross_entropy(h, self.model.head_weight, noise['targets'], noise['a'], skip_col=self.mask_id)
        return loss, dict(ce=torch.stack([ce.sum(), ce.new_tensor(noise['n'])]))

    @torch.no_grad()
    def row_nll(self, batch, k=1, seed=0):
        """Exact nats and number of scored tokens of each row, (B,) each; k and seed have no meaning here."""
        tokens, rows, n = scored_rows(batch.is_target, self.shift)
        h = self.model.hidden(batch.ids, batch.ranges, batch.pos).flatten(0, 1)[rows]
        targets, used = batch.ids.flatten()[tokens], (torch.arange(len(tokens), device=h.device) < n).float()
        _, ce = linear_cross_entropy(h, self.model.head_weight, targets, used, skip_col=self.mask_id)
        nats = torch.zeros(len(batch.ids), device=h.device).index_add(0, tokens // batch.ids.shape[1], ce)
        return nats, batch.is_target.sum(1)

    @torch.no_grad()
    def sample(self, prompts, max_new_tokens=128, n_steps=0, temperature=1.0, top_k=0, top_p=1.0, commit='', score='',
               remask='', tau=0.0, block_len=0, seed=0, history=None, eta=0.0, time_grid=''):
        """prompts: lists of ids -> (lists of ids, prompt included, cut before EOS), nfe. One token per forward, from
        left to right, with a KV cache; the settings of diffusion (n_steps to block_len, eta, time_grid) do nothing.
        `history`, if given, gets (ids (B, T), confidence (B, T)) after every token, on the CPU."""
        device = self.model.embed_tokens.weight.device
        given = [([] if self.separator is None else [self.separator]) + list(p) for p in prompts]
        if max_new_tokens < 0: raise SystemExit(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not all(given): raise SystemExit("an empty prompt needs a checkpoint with a separator token")
        start, B = max(map(len, given)), len(given)
        x = torch.full((B, start + max_new_tokens), self.eos_id or 0, device=device)
        pad = torch.tensor([start - len(g) for g in given], device=device)              # left padding
        for i, g in enumerate(given): x[i, start - len(g):start] = torch.tensor(g, device=device)
        conf = torch.ones(x.shape, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        cache, done = self.model.new_cache(x.shape[1]), torch.zeros(B, dtype=torch.bool, device=device)
        past, nfe = 0, 0
        for end in range(start, x.shape[1]):
            pos = torch.arange(past, end, device=device)
            h = self.model.hidden(x[:, past:end], _cache_ranges(pad, past, end),
                                  (pos - pad[:, None]).clamp(min=0), cache=cache)
            logits = head_logits(h[:, -1], self.model.head_weight)
            if self.mask_id is not None: logits[:, self.mask_id] = -torch.inf
            past, nfe = end, nfe + 1
            token = unmask(logits, temperature, top_k, top_p, generator)
            if self.eos_id is not None: token = torch.where(done, self.eos_id, token)
            x[:, end], conf[:, end] = token, logits.softmax(-1).gather(1, token[:, None])[:, 0]
            if history is not None: history.append((x[:, :end + 1].clone().cpu(), conf[:, :end + 1].clone().cpu()))
            done |= token == self.eos_id if self.eos_id is not None else False
            if done.all(): break
        out = []
        skip = 0 if self.separator is None else 1
        for i, g in enumerate(given):
            new = x[i, start:past + 1].tolist()
            if self.eos_id in new: new = new[:new.index(self.eos_id)]
            out.append(g[skip:] + new)
        return out, nfe


def _cache_ranges(pad, past, end):
    """Queries past..end-1 of rows with `pad` (B,) positions of left padding, over the keys 0..end-1."""
    doc = (torch.arange(end, device=pad.device) >= pad[:, None]).long() - 1
    return last_queries(causal_ranges(document_ranges(doc)), past)
