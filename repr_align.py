"""Representation alignment: an autoregressive model becomes a diffusion model and keeps what it knows (2605.06885).

    loss = masked diffusion + align_weight * 2/n_targets * sum_{i masked} mean_{layers l} (1 - cos(s_il, t_il))

s are states of the model in training: noised tokens xt, bidirectional. t are those of its teacher, a frozen copy of
the autoregressive model it starts from: clean tokens, causal. They are compared where they predict the same token i:
the teacher at position i - 1; so does the student if it has a shift, without one it predicts at i.

As a diff of mdm.py: `prepare` says which layers and rows, `forward` compares them while the layers go by. Likelihood
and samplers are inherited. What comes out is an MDM: its checkpoints open as one and know the teacher only by name.

    python train.py config/repr_align_smollm2.py
"""
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernels import cosine_alignment, document_ranges
from mdm import MDM


class ReprAlign(MDM):
    """teacher: a Transformer, frozen here; None only with align_weight 0, which is plain MDM. align_decay: steps in
    which the weight falls to 0, after which the teacher no longer runs (0: never). align_every: every k-th layer,
    counted from the last. align_random: so many of those per step (0: all). align_first: only the first n positions
    of a row, T / n times as heavy, and nothing beyond is read by the teacher (0: all). teacher_cache: directory for
    the teacher's states. An aligned layer is the output of a block, the last one after the final norm; the embedding
    is none."""
    name = 'repr_align'

    def __init__(self, model, teacher=None, mask_id=None, shift=True, weighting='elbo', separator=None, eos_id=None,
                 t_min=1e-3, align_weight=10.0, align_decay=0, align_every=1, align_random=0, align_first=0,
                 teacher_cache='', teacher_path=''):
        super().__init__(model, mask_id, shift, weighting, separator, eos_id, t_min)
        L = model.cfg.n_layer
        self.layers = list(range(L, 0, -align_every))[::-1] if align_every > 0 else []
        if min(align_weight, align_decay, align_random, align_first) < 0 or align_random > len(self.layers) or not \
                0 < align_every <= L:
            raise SystemExit(f"align_weight, align_decay, align_random and align_first must be at least 0, "
                             f"align_every between 1 and {L}, align_random at most the {len(self.layers)} layers "
                             f"left: {align_weight=}, {align_decay=}, {align_every=}, {align_random=}, {align_first=}")
        if teacher is None and align_weight:
            raise SystemExit("representation alignment needs a teacher, an autoregressive model: --teacher=... or "
                             "--init_from=...; to sample or evaluate say --objective=mdm")
        self.align_weight, self.align_decay = align_weight, align_decay
        self.align_random, self.align_first = align_random or len(self.layers), align_first
        self.__dict__['teacher'] = teacher                  # not a submodule: no state_dict, optimizer, DDP, train()
        if teacher is None: return
        if (teacher.cfg.n_layer, teacher.cfg.n_embd) != (L, model.cfg.n_embd):
            raise SystemExit(f"the teacher has {teacher.cfg.n_layer} layers of width {teacher.cfg.n_embd}, the model "
                             f"{L} of {model.cfg.n_embd}: states of equal shape are compared")
        teacher.eval().requires_grad_(False).cfg.causal = True
        weights = hashlib.sha256()
        for p in teacher.parameters(): weights.update(p.float().cpu().numpy())
        self.teacher_path, self.teacher_sha256 = teacher_path, weights.hexdigest()
        self.cache = Path(teacher_cache, f'{self.teacher_sha256[:16]}-{align_every}') if teacher_cache else None
        try: self.cache and self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise SystemExit(f"teacher_cache: {e}") from None

    @property
    def dlm(self):
        """To a checkpoint this is an MDM. train.py compares the teacher's hash when it resumes."""
        about = dict(teacher=self.teacher_path, teacher_sha256=self.teacher_sha256) if self.teacher else {}
        return super().dlm | dict(objective='mdm') | about

    def _apply(self, fn, recurse=True):
        """.to(device) takes the teacher along; on a GPU it needs no more than bf16."""
        super()._apply(fn, recurse)
        device = self.model.embed_tokens.weight.device
        if self.teacher: self.teacher.to(device, torch.bfloat16 if device.type == 'cuda' else None)
        return self

    def networks(self): return [self.model] + [self.teacher] * bool(self.teacher)

    def flops_per_token(self, seq_len):
        """With the teacher's forward, which has no head."""
        if not self.teacher: return super().flops_per_token(seq_len)
        n = min(self.align_first or seq_len, seq_len)
        return super().flops_per_token(seq_len) + n / seq_len * self.teacher.flops_per_token(n, 0, training=False)

    def prepare(self, batch, seed):
        """Also: the weight of the term in this step, its layers (functions of seed and step, the same on all ranks),
        and the rows of the teacher's states."""
        batch = super().prepare(batch, seed)
        weight = self.align_weight * (max(1 - batch.step / self.align_decay, 0) if self.align_decay else 1)
        if not weight: return batch
        noise, T = batch.noise, batch.ids.shape[1]
        n = min(self.align_first or T, T)                   # what a causal model says of them depends on no more
        at = noise['rows'] if self.shift else (noise['rows'] - 1).clamp(min=0)      # of the teacher's states
        row, col = at // T, at % T
        drawn = np.random.default_rng((seed, batch.step, 1 << 40)).permutation(self.layers)[:self.align_random]
        frozen = dict(ids=batch.ids[:, :n], pos=batch.pos[:, :n], layers=tuple(sorted(drawn.tolist())),
                      ranges=batch.ranges if n == T else document_ranges(batch.doc[:, :n]),
                      rows=row * n + col.clamp(max=n - 1))
        if self.cache: frozen |= self._read_cache(frozen, batch.doc[:, :n])
        return replace(batch, noise=noise | dict(
            teacher=frozen, align_scale=weight * 2 / batch.n_targets, align=noise['real'] * (col < n) * (T / n)))

    def forward(self, batch):
        """MDM's loss and the alignment, added up layer by layer. Also logs the mean cosine of each layer."""
        noise = batch.noise
        if 'teacher' not in noise: return super().forward(batch)
        states, weights, apart = self.teacher_states(noise['teacher']), noise['align'], {}

        def compare(i, h):
            if i in states: apart[i] = cosine_alignment(h.flatten(0, 1), states[i], weights, noise['rows'])
        loss, stats = super().forward(batch, tap=compare)
        cos = torch.zeros(2, len(self.layers), device=weights.device)
        n = weights.sum()
        for i, a in apart.items(): cos[:, self.layers.index(i)] = torch.stack([n - a.detach(), n])
        return loss + noise['align_scale'] * torch.stack(list(apart.values())).mean(), stats | dict(cos=cos)

    @torch.no_grad()
    def teacher_states(self, frozen):
        """{layer: (N, D)} at the rows to compare: half of the tokens, which halves the memory. No layer beyond the
        last one that is wanted, no head."""
        if 'states' in frozen: return frozen['states']
        files, states = frozen.get('files'), {}
        wanted = self.layers if files else frozen['layers']
        top = wanted[-1] if wanted[-1] < len(self.teacher.layers) else None

        def keep(i, h):
            if i in wanted: states[i] = h if files else h.flatten(0, 1)[frozen['rows']]
        last = self.teacher.hidden(frozen['ids'], frozen['ranges'], frozen['pos'], upto=top, tap=keep)
        if top: keep(top, last)
        if files:
            for file, h in zip(files, torch.stack([states[i] for i in wanted], 1).cpu()):       # (layers, n, D)
                save_file(dict(states=h.contiguous()), f'{file}.{os.getpid()}')
                os.replace(f'{file}.{os.getpid()}', file)
            states = {i: states[i].flatten(0, 1)[frozen['rows']] for i in frozen['layers']}
        return states

    def _read_cache(self, frozen, doc):
        """A file per row of tokens, under the hash of its content; a row that is missing is computed and written by
        `forward`. It pays on slow machines or for few layers: a GPU computes states faster than a disk reads them."""
        names = [hashlib.sha256(torch.stack(row).numpy()).hexdigest()[:32] for row in zip(frozen['ids'], doc)]
        files = [self.cache / f'{name}.safetensors' for name in names]
        try: h = torch.stack([load_file(f)['states'] for f in files], 1).flatten(1, 2)          # (layers, B n, D)
        except (OSError, SafetensorError): return dict(files=[str(f) for f in files])           # not there, or cut off
        return dict(states={i: h[self.layers.index(i)][frozen['rows']] for i in frozen['layers']})
