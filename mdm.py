"""Masked diffusion: hide a random share t of the tokens, learn to fill them in, generate by filling in from nothing.

Convention of the whole code base: t = 0 is clean, t = 1 is noise; s < t is the sampler's next, cleaner time.

    q(xt | x0): every target token becomes mask_id independently with probability 1 - alpha_t = t
    -log p(x0) <= E_{t ~ U(0, 1)} [ 1/t * sum_{i masked} -log p_theta(x0_i | xt) ]          (MDLM 2406.07524)

As a diff of ar.py: `prepare` draws t and the mask, `forward` scores the masked tokens with weight 1/t, `row_nll` is a
bound instead of a value, and `sample` may fill any position, so `infill` comes for free.

    python train.py config/quickstart.py
"""
import itertools
from dataclasses import replace

import numpy as np
import torch

from kernels import document_ranges, head_logits, linear_cross_entropy, unmask
from model import Objective, scored_rows

N_BUCKETS = 8           # of t, for the logged loss per noise level
MAX_LOGITS = 1 << 28    # of a sampler in memory at a time: 1 GiB in fp32, of which there are a few copies


def q_sample(x0, t, mask_id, is_target=None, u=None):
    """Draw xt ~ q(xt | x0) under the linear schedule. x0 (B, T) ids, t (B, 1) or (B, T) in [0, 1], is_target (B, T)
    bool: what may be masked (default all), u (B, T): the uniforms to use. Returns xt (B, T), is_masked (B, T) bool."""
    u = torch.rand(x0.shape, device=x0.device) if u is None else u
    is_masked = u < t
    if is_target is not None: is_masked = is_masked & is_target
    return torch.where(is_masked, mask_id, x0), is_masked


class MDM(Objective):
    """weighting: 'elbo' (1/t, the bound), 'flat' (plain cross-entropy over masked tokens) or 'planner' (flat plus a
    confidence-weighted path term, what Open-dLLM trains). shift: hidden row i - 1 predicts token i, the habit of a
    backbone that was autoregressive. The model is taken over: it becomes bidirectional."""
    name, estimator = 'mdm', 'upper bound, count'

    def __init__(self, model, mask_id, shift=False, weighting='elbo', separator=None, eos_id=None, t_min=1e-3):
        if mask_id is None: raise SystemExit("masked diffusion needs a mask_id")
        if weighting not in ('elbo', 'flat', 'planner'):
            raise SystemExit(f"weighting must be elbo, flat or planner, got {weighting!r}")
        super().__init__(model, mask_id, separator, eos_id)
        model.cfg.causal = False
        self.shift, self.weighting, self.t_min = shift, weighting, t_min

    def flops_per_token(self, seq_len): return self.model.flops_per_token(seq_len, scored=0.5)

    # -- training ----------------------------------------------------------------------------------------

    def draw_t(self, batch, seed):
        """(B, T), one t per document, stratified over rows and documents by golden-ratio steps, so about half of all
        tokens are masked in every batch."""
        u_step = np.random.default_rng((seed, batch.step)).random()     # is row 0's u[0], too: never a target
        i, doc = batch.row_ids[:, None].double(), batch.doc.clamp(min=0).double()
        return self.t_min + (1 - self.t_min) * ((u_step + 0.618034 * i + 0.569840 * doc) % 1)

    def prepare(self, batch, seed):
        """Draw t per document and the mask, a function of (seed, step, row of the global batch) only."""
        t, T = self.draw_t(batch, seed), batch.ids.shape[1]
        u = np.stack([np.random.default_rng((seed, batch.step, int(r))).random(T) for r in batch.row_ids])
        xt, is_masked = q_sample(batch.ids, t, self.mask_id, batch.is_target, torch.from_numpy(u))
        tokens, rows, n = scored_rows(is_masked, self.shift, bucket=max(64, batch.ids.numel() // 16))
        t = t.flatten()[tokens]
        a, b = {'elbo': (1 / t, 0 * t), 'flat': (2 + 0 * t, 0 * t), 'planner': (2 + 0 * t, 2 / t)}[self.weighting]
        real = torch.arange(len(t)) < n                                 # the rest fills the static bucket
        a, b = ((w / batch.n_targets * real).float() for w in (a, b))
        return replace(batch, noise=dict(
            xt=xt, rows=rows, targets=batch.ids.flatten()[tokens], a=a, b=b if self.weighting == 'planner' else None,
            t_bucket=(t * N_BUCKETS).long().clamp(max=N_BUCKETS - 1), real=real.float()))

    def forward(self, batch, tap=None):
        """sum_i (a_i + b_i sg(p_i)) CE_i over the masked tokens, divided by the targets of the global batch."""
        noise = batch.noise
        h = self.model.hidden(noise['xt'], batch.ranges, batch.pos, tap=tap)
        h = h.flatten(0, 1).index_select(0, noise['rows'])      # (N, D); the backward of h[rows] sorts
        loss, ce = linear_cross_entropy(h, self.model.head_weight, noise['targets'], noise['a'], noise['b'],
                                        skip_col=self.mask_id)
        by_t = torch.zeros(2, N_BUCKETS, device=ce.device)
        by_t.index_add_(1, noise['t_bucket'], torch.stack([ce, noise['real']]))
        return loss, dict(ce=by_t.sum(1), ce_by_t=by_t)

    # -- likelihood --------------------------------------------------------------------------------------

    @torch.no_grad()
    def row_nll(self, batch, k=1, seed=0, estimator='count'):
        """Monte-Carlo upper bound on the nats of each row, and its number of scored tokens: (B,), (B,). k stratified
        draws per document. estimator 'count': the number m of masked tokens uniform in 1..n, weight n/m (LLaDA
        2502.09992; no t_min); 't': t ~ U(t_min, 1), weight 1/t. Noise depends on (seed, row, T), not on
        what else is in the batch."""
        B, T = batch.ids.shape
        target, doc = batch.is_target.cpu().numpy(), batch.doc.cpu().numpy()
        nats = torch.zeros(B, device=batch.ids.device)
        rngs = [np.random.default_rng((seed, int(r))) for r in batch.row_ids.cpu()]
        phase = [rng.random(row.max() + 1) for rng, row in zip(rngs, doc)]      # of this row alone
        for j in range(k):
            weight = np.zeros((B, T))                                   # n/m or 1/t at the masked tokens, else 0
            for i, rng in enumerate(rngs):
                order = rng.random(T)
                for d in range(doc[i].max() + 1):
                    idx = np.flatnonzero(target[i] & (doc[i] == d))
                    if len(idx) == 0: continue
                    v = (phase[i][d] + j / k) % 1
                    if estimator == 'count':
                        m = 1 + int(v * len(idx))
                        weight[i, idx[order[idx].argsort()[:m]]] = len(idx) / m
                    else:
                        t = self.t_min + (1 - self.t_min) * v
                        weight[i, idx[order[idx] < t]] = 1 / t
            w = torch.from_numpy(weight).float().to(batch.ids.device)
            tokens, rows, n = scored_rows(w > 0, self.shift)
            xt = torch.where(w > 0, self.mask_id, batch.ids)
            h = self.model.hidden(xt, batch.ranges, batch.pos).flatten(0, 1)[rows]
            w = w.flatten()[tokens]
            targets = batch.ids.flatten()[tokens]
            _, ce = linear_cross_entropy(h, self.model.head_weight, targets, w, skip_col=self.mask_id)
            nats.index_add_(0, (tokens // T)[:n], (ce * w)[:n] / k)
        return nats, batch.is_target.sum(1)

    # -- sampling ----------------------------------------------------------------------------------------

    def logits(self, xt, rows=None, ranges=None, pos=None):
        """fp32 logits that predict token i at position i, whatever `shift` is; -inf at mask_id. xt (B, T); rows (N,):
        flat indices of the tokens wanted -> (N, V); None -> (B, T, V). With a shift, position 0 has no predictor and
        gets its own row's logits."""
        return self._head(self._states(xt, rows, ranges, pos))

    def _states(self, xt, rows, ranges, pos):
        h = self.model.hidden(xt, ranges, pos)                          # (B, T, D)
        if self.shift: h = torch.cat([h[:, :1], h[:, :-1]], 1)
        return h if rows is None else h.flatten(0, 1)[rows]

    def _head(self, h):
        z = head_logits(h, self.model.head_weight)
        z[..., self.mask_id] = -torch.inf
        return z

    def sample(self, prompts, max_new_tokens=128, n_steps=128, temperature=1.0, top_k=0, top_p=1.0, commit='schedule',
               score='confidence', remask='none', tau=0.9, block_len=0, seed=0, history=None, eta=0.0, time_grid=''):
        """Continue prompts (lists of ids, of any lengths) by max_new_tokens each, cut before EOS. Returns (lists of
        ids, prompt included), nfe. The settings are those of `infill`; eta and time_grid are ldlm's."""
        holes = [[list(p), max_new_tokens] for p in prompts]
        return self.infill(holes, n_steps, temperature, top_k, top_p, commit, score, remask, tau, block_len, seed,
                           history, stop_at_eos=self.eos_id is not None)

    @torch.no_grad()
    def infill(self, templates, n_steps=128, temperature=1.0, top_k=0, top_p=1.0, commit='schedule', score='confidence',
               remask='none', tau=0.9, block_len=0, seed=0, history=None, stop_at_eos=False, pad_side='right', eta=0.0,
               time_grid=''):
        """Fill holes. A template is a list of id lists (given) and ints (holes of that many tokens), e.g.
        [prefix, 16, suffix]. Returns (lists of ids), nfe: nfe counts forwards of the batch.

        commit: 'schedule' (as many tokens per step as the linear schedule has); 'ancestral' (each masked token with
          probability (t - s)/t; with score='random' the exact reverse process); or 'threshold' (all argmax tokens
          with confidence >= tau, at least one; Fast-dLLM 2505.22618 Alg. 1; of the other settings only block_len
          matters).
        score: which masked tokens go first: 'confidence' p(chosen), 'margin' p1 - p2, 'entropy' -H, 'random'; from the
          model's distribution at temperature 1, without filters.
        remask: 'none' or 'p2' (path planning 2502.03540): every generated token is scored again at each step, a
          filled one by the probability of the token that stands there, and only the best share is kept.
        n_steps: in total, split over a row's blocks in proportion to their masks, at least one each. Without
          remasking no forward is run that cannot commit a token; for one row nfe <= min(n_steps, holes) if there are
          no more blocks than steps. The rows of a batch share forwards.
        stop_at_eos: a generated EOS with no mask before it ends its row, and what follows it is dropped.
        pad_side: where shorter rows are padded; it does not change the result.
        block_len: semi-autoregressive blocks of so many generated tokens, left to right; 0 = one block.
        history: a list (anything with append) that gets (ids (B, T), confidence (B, T)) on the CPU after every step."""
        self.check_sampler(commit, score, remask, block_len, n_steps)
        if stop_at_eos and self.eos_id is None: raise SystemExit("stop_at_eos needs a checkpoint with an eos_id")
        x, hole, real = self._layout(templates, pad_side)
        ranges, pos = None, (real.long().cumsum(1) - 1).clamp(min=0)
        if not real.all(): ranges = document_ranges(real.long() - 1)
        generator = torch.Generator(x.device).manual_seed(seed)
        conf, nfe = torch.where(hole, 0.0, 1.0), 0
        if history is not None: history.append((x.cpu(), conf.cpu()))
        greedy = commit == 'threshold'
        for active, total, steps in _blocks(hole, block_len, n_steps):
            active = active & (x == self.mask_id)                               # an early EOS has filled the rest
            for step in itertools.count():
                masked = active & (x == self.mask_id)                           # (B, T)
                scored = active & (step < steps)[:, None] if remask == 'p2' else masked
                if not scored.any(): break
                n = _n_keep(commit, remask, step, steps, total, masked, generator)      # (B,)
                if not (n > 0).any(): continue                                  # nothing to commit: no forward
                rows = scored.flatten().nonzero().squeeze(1)
                h, old = self._states(x, rows, ranges, pos), x.flatten()[rows]  # (N, D), (N,)
                nfe += 1
                n_rows = max(MAX_LOGITS // self.model.cfg.vocab_size, 1)        # at a time, to bound the memory
                parts = [self._candidates(*part, greedy, temperature, top_k, top_p, score, generator)
                         for part in zip(h.split(n_rows), old.split(n_rows))]
                new, c, ranking = map(torch.cat, zip(*parts))
                ranked = torch.full(x.shape, -torch.inf, device=x.device)
                ranked.view(-1)[rows] = ranking
                if greedy: n = (ranked >= tau).sum(1).clamp(min=1)
                rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)      # 0 = best
                keep = (rank < n[:, None]) & scored
                token, token_conf = x.flatten().clone(), conf.flatten().clone()
                token[rows], token_conf[rows] = new, c
                x = torch.where(keep, token.view_as(x), torch.where(scored, self.mask_id, x))
                conf = torch.where(keep, token_conf.view_as(x), torch.where(scored, 0.0, conf))
                if stop_at_eos and remask == 'none': x = self._close(x, hole)
                if history is not None: history.append((x.cpu(), conf.cpu()))
            if stop_at_eos: x = self._close(x, hole)
        return self._trim(x, hole, real, stop_at_eos), nfe

    @staticmethod
    def check_sampler(commit, score, remask, block_len, n_steps, **_):
        """Refuse settings that `infill` has no rule for."""
        for name, value, known in (('commit', commit, ('schedule', 'ancestral', 'threshold')),
                                   ('score', score, ('confidence', 'margin', 'entropy', 'random')),
                                   ('remask', remask, ('none', 'p2'))):
            if value not in known: raise SystemExit(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if remask == 'p2' and commit != 'schedule':
            raise SystemExit("remask='p2' has its own commit rule: use commit='schedule'")
        if remask == 'p2' and score != 'confidence':
            raise SystemExit("remask='p2' ranks by the current token's probability: use score='confidence'")
        if block_len < 0: raise SystemExit(f"block_len must be at least 0, got {block_len}")
        if n_steps < 1: raise SystemExit(f"n_steps must be at least 1, got {n_steps}")

    def _candidates(self, h, old, greedy, temperature, top_k, top_p, score, generator):
        """Hidden rows h (N, D) of positions that hold old (N,) -> token, confidence in it and rank, larger first, (N,)
        each. A filled position keeps its token."""
        logits = self._head(h)                                                  # (N, V)
        new, to_fill = old.clone(), old == self.mask_id
        new[to_fill] = unmask(logits if to_fill.all() else logits[to_fill], 0 if greedy else temperature, top_k, top_p,
                              generator)
        c = (logits.gather(1, new[:, None]).squeeze(1) - logits.logsumexp(1)).exp()
        return new, c, c if greedy else _score(score, logits, c, generator)

    def _layout(self, templates, pad_side):
        """Templates -> x (B, T) with masks in the holes, hole (B, T) bool, real (B, T) bool: not padding."""
        sep = [] if self.separator is None else [self.separator]
        rows = []
        for template in templates:
            ids, is_hole = list(sep), [False] * len(sep)
            for part in template:
                n = part if isinstance(part, int) else len(part)
                if n < 0: raise SystemExit(f"a hole of {n} tokens: lengths must be at least 0")
                ids += [self.mask_id] * n if isinstance(part, int) else list(part)
                is_hole += [isinstance(part, int)] * n
            if self.shift and is_hole[:1] == [True]:
                raise SystemExit("a shifted model needs a token before the first hole: give a prompt")
            rows.append((ids, is_hole))
        B, T = len(rows), max(len(ids) for ids, _ in rows)
        x = torch.full((B, T), self.eos_id or 0)
        hole, real = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
        for i, (ids, is_hole) in enumerate(rows):
            where = slice(0, len(ids)) if pad_side == 'right' else slice(T - len(ids), T)
            x[i, where], hole[i, where], real[i, where] = torch.tensor(ids), torch.tensor(is_hole), True
        device = self.model.embed_tokens.weight.device
        return x.to(device), hole.to(device), real.to(device)

    def _close(self, x, hole):
        """Once a generated EOS has no mask to its left, the rest of the hole is EOS too: nothing left to compute."""
        clear = (hole & (x == self.mask_id)).cumsum(1) == 0
        ended = (hole & clear & (x == self.eos_id)).cumsum(1) > 0
        return torch.where(ended & hole, self.eos_id, x)

    def _trim(self, x, hole, real, stop_at_eos):
        """Rows as lists, without padding, separator and (stop_at_eos) what follows the first generated EOS."""
        out = []
        for ids, generated, where in zip(x.cpu(), hole.cpu(), real.cpu()):
            ids, generated = ids[where], generated[where]
            if stop_at_eos:
                end = (generated & (ids == self.eos_id)).nonzero()
                if len(end): ids = ids[:end[0, 0]]
            out.append(ids.tolist()[self.separator is not None:])
        return out


def _blocks(hole, block_len, n_steps):
    """Semi-autoregressive blocks: yields (active (B, T) bool, masks per row (B,), steps per row (B,)). A row's steps
    depend on that row alone, so its result does not depend on its neighbours in the batch."""
    m = hole.sum(1)
    ordinal = torch.where(hole, hole.cumsum(1) - 1, -1)
    block_len = block_len or max(int(m.max()), 1)
    for start in range(0, int(m.max()), block_len):
        active = (ordinal >= start) & (ordinal < start + block_len)
        before, after = m.clamp(max=start), m.clamp(max=start + block_len)
        steps = n_steps * after // m.clamp(min=1) - n_steps * before // m.clamp(min=1)
        yield active, after - before, torch.where(after > before, steps.clamp(min=1), 0)


def _n_keep(commit, remask, step, steps, total, masked, generator):
    """How many of the scored positions each row keeps after this step, (B,): without remasking, of the masked ones.
    Integer arithmetic: in floats the floor idles even when there are as many steps as tokens."""
    if commit == 'threshold': return masked.any(1).long()               # at least one; the confidences decide
    if commit == 'ancestral':
        u = torch.rand(masked.shape, generator=generator, device=masked.device)
        p = 1 / (steps - step).clamp(min=1)                             # (t - s)/t on the grid t = 1 - step/steps
        return ((u < p[:, None]) & masked).sum(1)
    if remask == 'p2': return total * (step + 1) // steps.clamp(min=1)
    steps = torch.minimum(steps, total).clamp(min=1)                    # more steps than tokens: one token per step
    return total * steps.clamp(max=step + 1) // steps - (total - masked.sum(1))


def _score(score, logits, c, generator):
    """logits (N, V), c (N,) the candidate's probability -> (N,), larger commits first."""
    if score == 'confidence': return c
    if score == 'random': return torch.rand(c.shape, generator=generator, device=c.device)
    p = logits.softmax(-1)
    if score == 'margin': return p.topk(2).values.diff(dim=-1).squeeze(1).neg()
    return torch.special.entr(p).sum(-1).neg()
