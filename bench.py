"""Speed and memory, side by side with other people's code on the same machine in the same call.

    python bench.py train                   # one MDM training step of a 0.5B model: ours, transformers, Liger
    python bench.py train --packed=true     # rows of several documents; FlexAttention and varlen attention join in
    python bench.py train --largest=true    # each peer at the largest micro-batch that fits
    python bench.py train --profile=true    # where the milliseconds of our step go; a chrome trace in out_dir
    python bench.py memory                  # peak memory over micro-batches of 1, 2, 4, ... rows up to the largest
    python bench.py align config/bench_smollm2.py      # what alignment and frozen layers cost or save
    python bench.py kernels                 # each kernel against its reference, torch.compile of that, and Liger
    python bench.py sandbox                 # programs per second, and what the isolation costs
    python bench.py ldlm                    # text per second from latent diffusion, at the sizes of two configs
    python bench.py train --device=cpu --vocab_size=512 --n_layer=2 --n_embd=64 --n_head=4 --n_ff=128 --batch=4 \\
        --seq_len=64 --warmup=1 --steps=2 --peers=hf_eager,ours_eager               # a rehearsal

Every peer is a process. All start together, then take turns on the device, A B ... B A; who waits keeps its weights
on the CPU. Same weights, ids, masks and t for all; fp32 masters, bf16 autocast; a step is forward, backward, clipping
to 1.0, fused AdamW, zero_grad. Noise and attention masks are made before the clock starts. A time counts only if loss
and gradient agree with an fp32 reference computed row by row. MFU counts what has to be computed, the same for all:
the head at masked rows, attention inside documents.
"""
import dataclasses
import functools
import gc
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._pytree import tree_leaves

import kernels as K
from checkpoint import find, provenance, write_json
from data import Batch
from encoder import Encoder
from ldlm import LDLM, AdaptiveTimesteps, LatentConfig, LatentModel, Sampler
from mdm import MDM
from model import ModelConfig, Transformer
from repr_align import ReprAlign

PEERS = dict(                                   # compact: only masked rows reach the head
    hf_eager=dict(),
    hf_eager_compact=dict(compact=True),
    hf_compile=dict(compiled=True),
    hf_compile_compact=dict(compiled=True, compact=True),
    liger=dict(liger='as shipped'),
    liger_compact=dict(liger='as shipped', compact=True),
    liger_tuned=dict(liger='tuned', compact=True),
    flex=dict(attn='flex', compiled=True, compact=True),        # these two for packed rows only
    varlen=dict(attn='varlen', compiled=True, compact=True),
    ours_eager=dict(),
    ours=dict(compiled=True),
    # from here on for `align`: all layers, weight 10
    ours_align=dict(compiled=True, align=True),
    ours_freeze=dict(compiled=True, freeze='mlp'),
    ours_align_freeze=dict(compiled=True, align=True, freeze='mlp'),
    ours_stacked=dict(compiled=True, align='stacked'),          # the alignment as Open-dLLM computes it, else as ours
    hf_stacked=dict(compiled=True, compact=True, align='stacked'))

# ---- the common task ---------------------------------------------------------------------------------------


def model_config(c):
    return ModelConfig(c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.n_ff, c.n_embd // c.n_head,
                       rope_theta=1e6, qkv_bias=True, tied=True, causal=False, max_seq_len=32768)


def make_batch(c, B):
    """Random ids with MDM's noise, a function of the seed alone. The mask token is the last id. A row is one document,
    or (packed) several, of lognormal lengths with mean doc_len."""
    rng, T = np.random.default_rng(c.seed), c.seq_len
    doc, pos = np.zeros((B, T), np.int64), np.tile(np.arange(T), (B, 1))
    for b in range(B if c.packed else 0):
        ends = np.cumsum(rng.lognormal(math.log(c.doc_len) - 0.5, 1.0, T).astype(int) + 2)
        doc[b] = np.searchsorted(ends, np.arange(T), side='right')
        pos[b] -= np.concatenate([[0], ends])[doc[b]]
    ids, doc, pos = map(torch.from_numpy, (rng.integers(0, c.vocab_size - 1, (B, T)), doc, pos))
    target = pos > 0
    ranges = K.document_ranges(doc) if c.packed else None
    batch = Batch(ids, ranges, pos, doc, target, torch.arange(B), int(target.sum()))
    with torch.device('meta'): objective = MDM(Transformer(model_config(c)), c.vocab_size - 1)
    return objective.prepare(batch, c.seed)


def visible_pairs(doc):
    """(query, key) pairs inside the documents."""
    return sum(int(n) ** 2 for row in doc.cpu() for n in row.bincount())


def step_flops(c, batch):
    """6 per weight and token, the head at masked rows only, 12 H hd per layer and visible pair."""
    with torch.device('meta'): weights = Transformer(model_config(c)).n_params(embedding=False)
    head = float(batch.noise['real'].sum()) * c.vocab_size * c.n_embd
    return 6 * (weights * batch.ids.numel() + head) + 12 * c.n_layer * c.n_embd * visible_pairs(batch.doc)


# ---- what the peers are made of ----------------------------------------------------------------------------


class LigerCE(torch.autograd.Function):
    """sum_i w_i CE_i by Liger's fused kernel, the weights folded into the gradient that its forward computes. Its
    public reduction='none' computes the logits again in the backward (0.8) or is wrong (0.7). As shipped, it casts the
    fp32 head in every one of about 128 chunks of rows; tuned: a bf16 head, fp32 sums, 8 chunks."""
    @staticmethod
    def forward(ctx, h, head, targets, w, tuned):
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
        more = dict(accum_dtype=torch.float32, chunk_mem_const=16) if tuned else {}
        ce, _, _, _, *grads, _ = fused_linear_cross_entropy_forward(
            h, head, targets, reduction='none', token_grad_output=w, compute_gradients=True,
            weight_requires_grad=True, **more)
        ctx.save_for_backward(*grads)
        return (ce * w).sum()

    @staticmethod
    def backward(ctx, g):
        return *(grad * g.to(grad.dtype) for grad in ctx.saved_tensors), None, None, None


def attention_of(kind, doc, causal=False):
    """What goes to transformers as the attention mask. doc (B, T): the document of each token. SDPA: a dense mask, or
    None for rows of one document; else the attention itself, (B, H, T, hd) -> (B, T, H, hd). causal: SDPA only."""
    B, T = doc.shape
    if kind == 'flex':
        blocks = create_block_mask(lambda b, h, i, j: doc[b, i] == doc[b, j], B, None, T, T, device=doc.device)
        return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)
    if kind == 'varlen':
        from torch.nn.attention.varlen import varlen_attn
        first = F.pad(doc.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().squeeze(1)
        starts = F.pad(first, (0, 1), value=doc.numel()).int()
        longest, gqa = int(starts.diff().max()), 'enable_gqa' in inspect.signature(varlen_attn).parameters
        more, flat = dict(enable_gqa=True) if gqa else {}, lambda x: x.transpose(1, 2).flatten(0, 1)
        return lambda q, k, v: varlen_attn(flat(q), flat(k), flat(v), starts, starts, longest, longest, **more
                                           ).unflatten(0, (B, T))
    if not doc.any(): return None
    mask = (doc[:, :, None] == doc[:, None])[:, None]                                   # (B, 1, T, T)
    return mask.tril() if causal else mask


def stacked_alignment(mine, its, rows, n_targets):
    """Open-dLLM's way: every layer's states of both models at every position, stacked in fp32; 10 is its weight.
    The teacher's state for token i is at i - 1."""
    s, t = (torch.stack([h.float() for h in states]) for states in (mine, its))         # (L, B, T, D)
    apart = 1 - F.cosine_similarity(s[:, :, 1:], t[:, :, :-1], dim=-1)                  # (L, B, T - 1)
    masked = torch.zeros(s.shape[1] * s.shape[2], device=s.device).index_fill_(0, rows, 1).view(s.shape[1:3])
    return 10 * 2 / n_targets * (apart.mean(0) * masked[:, 1:]).sum()


class Stacked(ReprAlign):
    def forward(self, batch):
        noise, mine, its = batch.noise, [], []
        with torch.no_grad():           # with its head, whose logits nobody reads
            self.teacher(batch.ids, ranges=batch.ranges, pos=batch.pos, tap=lambda i, h: its.append(h))
        loss, stats = MDM.forward(self, batch, tap=lambda i, h: mine.append(h))
        return loss + stacked_alignment(mine, its, noise['rows'][noise['real'] > 0], batch.n_targets), stats


def attend(module, q, k, v, attention, **unused):
    """transformers' interface; autocast leaves q and k in fp32 after the rotation."""
    return attention(q.to(v.dtype), k.to(v.dtype), v), None


def load_hf(weights, spec, causal=False):
    if spec.get('liger'):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
        apply_liger_kernel_to_qwen2(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    from transformers import AttentionInterface, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar
    AttentionInterface.register('documents', attend)
    attn = 'documents' if 'attn' in spec else 'sdpa'
    disable_progress_bar()
    model = Qwen2ForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation=attn)
    for layer in model.model.layers: layer.self_attn.is_causal = causal # newer versions read config.json's is_causal
    model.config.is_causal = causal
    return model


def hf_loss(model, batch, spec, residual='fp32', first=0, last=None, teacher=None):
    """-> loss(): sum of w CE over the masked tokens of rows first..last, from the usual building blocks. Compact rows
    are padded to a multiple of 64, which matrix units want. teacher: stacked_alignment with it joins in."""
    noise, T, last = batch.noise, batch.ids.shape[1], last or len(batch.ids)
    xt, pos, targets = noise['xt'][first:last], batch.pos[first:last], batch.ids[first:last].flatten()
    mask = {'full_attention': attention_of(spec.get('attn'), batch.doc[first:last])}    # a dict is taken as it is
    mine = (noise['real'] > 0) & (noise['rows'] // T >= first) & (noise['rows'] // T < last)
    rows, w = noise['rows'][mine] - first * T, noise['a'][mine]
    ids, masked, n_targets = batch.ids[first:last], rows, batch.n_targets
    its_mask = {'full_attention': attention_of('', batch.doc[first:last], causal=True)}
    if spec.get('compact'):
        rows, w = (F.pad(x, (0, -len(x) % 64)) for x in (rows, w))
        targets = targets[rows]
    else: rows, w = slice(None), torch.zeros(targets.shape, device=w.device).index_add_(0, rows, w)
    liger, tuned, mask_id = spec.get('liger'), spec.get('liger') == 'tuned', model.config.vocab_size - 1
    if liger: targets = torch.where(w > 0, targets, -100)

    def loss():
        x = model.model.embed_tokens(xt)
        if residual == 'bf16': x = x.bfloat16()
        more = dict(output_hidden_states=True) if teacher else {}
        out = model.model(inputs_embeds=x, position_ids=pos, attention_mask=mask, use_cache=False, **more)
        h, head, apart = out.last_hidden_state.flatten(0, 1)[rows], model.lm_head.weight, 0
        if teacher:
            with torch.no_grad(): its = teacher(ids, position_ids=pos, attention_mask=its_mask, use_cache=False, **more)
            apart = stacked_alignment(out.hidden_states[1:], its.hidden_states[1:], masked, n_targets)
        if tuned: h, head = h.bfloat16(), head.bfloat16()
        if liger: return LigerCE.apply(h, head, targets, w, tuned)      # with the mask column: one of V
        z = model.lm_head(h).float()
        z.detach()[:, mask_id] = -torch.inf         # never predicted, as in ours; free: the softmax there is 0
        return (F.cross_entropy(z, targets, reduction='none') * w).sum() + apart
    return torch.compile(loss, dynamic=False) if spec.get('compiled') else loss


# ---- a peer and its process --------------------------------------------------------------------------------


class Peer:
    """One way to take the step. Lives in its own process, where `serve` calls its methods."""

    def __init__(self, name, config, weights):
        self.c, self.spec, self.ours = SimpleNamespace(**config), PEERS.get(name, {}), name.startswith('ours')
        self.on_gpu, self.opt, self.loss = self.c.device == 'cuda', None, None
        self.autocast = torch.autocast('cuda', torch.bfloat16) if self.on_gpu else nullcontext()
        load = (lambda causal: Transformer.from_pretrained(weights, causal)) if self.ours else functools.partial(
            load_hf, weights, self.spec)
        self.weights, self.align = weights, self.spec.get('align')
        self.model, self.teacher = load(False), load(True) if self.align else None
        if self.ours:
            kind = {None: MDM, True: ReprAlign, 'stacked': Stacked}[self.align]
            self.obj = kind(self.model, mask_id=self.c.vocab_size - 1, shift=False,
                            **dict(teacher=self.teacher) if self.align else {})
        self.model.train()
        if 'freeze' in self.spec: self.model.freeze(self.spec['freeze'])
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if self.on_gpu: torch.set_num_threads(1)                        # as train.py

    def move(self, device):
        """The weights. A teacher has bf16 on a GPU, ours moves with its objective."""
        (self.obj if self.ours else self.model).to(device)
        if self.teacher and not self.ours: self.teacher.to(device, torch.bfloat16 if self.on_gpu else None)

    def setup(self, B):
        """The device is ours: bring the weights, make the batch and the loss function of that size."""
        self.loss = None
        torch.compiler.reset()
        self.move(self.c.device)
        batch = make_batch(self.c, B)
        if self.align and self.ours: batch = self.obj.prepare(batch, self.c.seed)       # the same noise
        batch = batch.to(self.c.device)
        if not self.ours: self.loss = hf_loss(self.model, batch, self.spec, self.c.residual, teacher=self.teacher)
        else: self.loss = lambda: self.obj(batch)[0]
        if self.ours and self.spec.get('compiled'):                     # as train.py
            for block in (block for net in self.obj.networks() for block in net.layers): block.compile(dynamic=False)

    def park(self):
        """Give the device back."""
        self.opt = None
        for p in self.params: p.grad = None
        self.move('cpu')
        gc.collect()
        if self.on_gpu: torch.cuda.empty_cache()

    def reference(self, B, file, align=False):
        """Loss and gradient in fp32 by transformers, row by row, into `file`."""
        self.move(self.c.device)
        batch, total = make_batch(self.c, B).to(self.c.device), 0.0
        teacher = load_hf(self.weights, {}, causal=True).to(self.c.device) if align else None
        for i in range(B):
            loss = hf_loss(self.model, batch, dict(compact=True), first=i, last=i + 1, teacher=teacher)()
            loss.backward()
            total += loss.item()
        save_file({n: p.grad.contiguous() for n, p in self.model.named_parameters()}, file, dict(loss=repr(total)))
        self.park()

    def gradients(self):
        """Under Hugging Face's names. Ours: the views of a twin whose parameters are the gradients."""
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.model.named_parameters()}
        if not self.ours: return grads
        with torch.device('meta'): twin = Transformer(self.model.cfg)
        twin.load_state_dict(grads, assign=True)
        return twin._hf_views()

    def gate(self, B, file):
        """Loss and gradient of the first step against the reference, and how long that step took (compilation)."""
        self.setup(B)
        started = time.time()
        with self.autocast: loss = self.loss()
        loss.backward()
        facts = compare(loss.item(), self.gradients(), f'{file}-align' if self.align else file, self.spec.get('freeze'))
        facts |= dict(first_step_s=time.time() - started)
        for p in self.params: p.grad = None
        return facts

    def step(self):
        with self.autocast: loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)

    def run(self, warmup, steps):
        """-> milliseconds of each step, between events on the device, and the peak of its memory meanwhile."""
        self.move(self.c.device)
        if self.opt is None:
            groups = [dict(params=[p for p in self.params if p.ndim >= 2], weight_decay=0.1),
                      dict(params=[p for p in self.params if p.ndim < 2], weight_decay=0.0)]
            self.opt = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=self.on_gpu)
        for _ in range(warmup): self.step()
        if not self.on_gpu:
            marks = [time.perf_counter()]
            for _ in range(steps): self.step(); marks.append(time.perf_counter())
            return dict(ms=(np.diff(marks) * 1e3).tolist(), peak_gib=None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]: self.step(); mark.record()
        torch.cuda.synchronize()
        return dict(ms=[a.elapsed_time(b) for a, b in zip(marks, marks[1:])],
                    peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)

    def room(self):
        """GiB that are free while the weights are parked, less 3% for fragments; what weights, gradients and AdamW's
        state take of them."""
        return 0.97 * torch.cuda.mem_get_info()[0] / 2 ** 30, 16 * sum(p.numel() for p in self.params) / 2 ** 30

    def memory(self, B):
        """Peak GiB of a step, None if it does not fit."""
        try:
            self.setup(B)
            return self.run(2, 1)['peak_gib']
        except RuntimeError as e:                                       # torch.OutOfMemoryError, cuBLAS's own
            if not re.search('out of memory|ALLOC_FAILED', str(e)): raise
        finally:
            self.loss = None
            self.park()
        return None

    def profile(self, steps, trace=''):
        """[(kernel, ms per step, calls per step)], longest first; `trace`: a chrome trace of these steps."""
        self.run(1, 1)
        with torch.profiler.profile() as prof: self.run(0, steps)
        if trace: prof.export_chrome_trace(trace)
        spent = [(e.key, (e.self_device_time_total if self.on_gpu else e.self_cpu_time_total) / 1e3 / steps,
                  e.count / steps) for e in prof.key_averages()
                 if ('CUDA' in str(e.device_type)) == self.on_gpu and not getattr(e, 'is_user_annotation', False)]
        return sorted(spent, key=lambda k: -k[1])


def compare(loss, grads, file, frozen=None):
    """Against the reference in `file`: relative differences of loss and gradient norm, cosine of the whole gradient,
    the worst cosine of a tensor (for information: some gradients are almost zero). frozen: names to leave out."""
    sums, worst = np.zeros(3), (1.0, '')
    with safe_open(file, 'pt') as f:
        loss_rel = loss / float(f.metadata()['loss']) - 1
        if set(f.keys()) != set(grads): raise RuntimeError(f"other parameters: {set(f.keys()) ^ set(grads)}")
        for name, g in grads.items():
            if frozen and frozen in name: continue
            g, r = g.flatten().double(), f.get_tensor(name).to(g.device).flatten().double()
            gr, gg, rr = ((x @ y).item() for x, y in ((g, r), (g, g), (r, r)))
            sums += gr, gg, rr
            worst = min(worst, (gr / math.sqrt(max(gg * rr, 1e-300)), name))
    norm_rel, cosine = math.sqrt(sums[1] / sums[2]) - 1, float(sums[0] / math.sqrt(max(sums[1] * sums[2], 1e-300)))
    return dict(loss=loss, loss_rel=loss_rel, norm_rel=norm_rel, cosine=cosine, worst_cosine=list(worst),
                agrees=abs(loss_rel) < 2e-4 and abs(norm_rel) < 0.01 and cosine > 0.999)


def serve(conn, *args):
    """The process of a peer: answer (method, arguments) until None comes. Errors are answers: the others go on."""
    torch.set_num_threads(2)                                            # while all of them load
    peer = failure = None
    try: peer = Peer(*args)
    except (Exception, SystemExit) as e: failure = f'{type(e).__name__}: {e}'
    for method, values in iter(conn.recv, None):
        try:
            if failure: raise RuntimeError(failure)
            conn.send((True, getattr(peer, method)(*values)))
        except (Exception, SystemExit) as e: conn.send((False, f'{type(e).__name__}: {e}'))


class Remote:
    """A Peer in a process of its own: its methods, by name."""
    def __init__(self, *args):
        spawn = multiprocessing.get_context('spawn')
        self.conn, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, *args))
        self.process.start()
        theirs.close()

    def ask(self, method, *values):
        try:
            self.conn.send((method, values))
            ok, answer = self.conn.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"the process died, exit code {self.process.exitcode}") from None
        if not ok: raise RuntimeError(' '.join(answer.split())[:300])
        return answer

    def close(self):
        try: self.conn.send(None)
        except OSError: pass                                            # it is gone
        self.process.join(10)
        if self.process.is_alive(): self.process.kill()


# ---- train and memory --------------------------------------------------------------------------------------


def run_peers(c):
    """Let the peers take turns; after every turn yield its name and all rows so far."""
    names, train = c.peers.split(','), c.what != 'memory'
    rounds = c.rounds if train and not c.largest else 1                 # who looks for a size is alone on the device
    rows = {name: dict(peer=name, ms=[], round_ms=[]) for name in names}
    with TemporaryDirectory() as tmp:
        torch.manual_seed(c.seed)
        Transformer(model_config(c)).save_pretrained(tmp)
        file = f'{tmp}/reference.safetensors'
        peers = {name: Remote(name, vars(c), tmp) for name in [*['reference'] * train, *names]}
        try:
            if train:
                peers['reference'].ask('reference', c.batch, file)
                if c.what == 'align': peers['reference'].ask('reference', c.batch, f'{file}-align', True)
                peers['reference'].close()
            for i in range(rounds):
                for name in names[::-1] if i % 2 else names:
                    if 'error' in rows[name]: continue
                    try: take_turn(c, peers[name].ask, rows[name], i == 0, file)
                    except RuntimeError as e:                           # the others go on
                        rows[name]['error'] = str(e)
                    if i + 1 == rounds or 'error' in rows[name]: peers[name].close()    # frees what it holds
                    yield name, list(rows.values())
        finally:
            for peer in peers.values(): peer.close()


def take_turn(c, ask, row, is_first, file):
    """The gate and the search for a size in a peer's first turn, then the clock."""
    train = c.what != 'memory'
    if is_first and train: row.update(ask('gate', c.batch, file), batch=c.batch)
    if is_first and (c.largest or not train):
        if train: ask('park')
        row['peaks'] = search(lambda B: ask('memory', B), c.batch if train else c.min_batch, c.max_batch,
                              *ask('room'), not train)
        row['batch'] = max((B for B, peak in row['peaks'].items() if peak is not None), default=0)
        if not row['batch']: raise RuntimeError("no micro-batch fits")
        if train: ask('setup', row['batch'])
    if not train: return
    got = ask('run', c.warmup, c.steps)
    row['ms'] += got['ms']
    row['round_ms'].append(statistics.median(got['ms']))
    row['peak_gib'] = got['peak_gib'] and max(got['peak_gib'], row.get('peak_gib', 0))
    row.update(zip(('p10_ms', 'median_ms', 'p90_ms'), np.percentile(row['ms'], [10, 50, 90]).tolist()))
    per_s, batch = 1e3 / row['median_ms'], make_batch(c, row['batch'])
    row.update(tokens_per_s=batch.ids.numel() * per_s, mfu=step_flops(c, batch) * per_s / c.peak_tflops / 1e12)
    if is_first:
        trace = f"{c.out_dir}/{row['peer']}.trace.json.gz" if c.profile else ''
        spent = ask('profile', 3 if trace else 1, trace)
        row['attention'] = [k for k, ms, _ in spent if kind(k) == 'attention' and ms > 0.01]
        if trace:
            row['profile_ms'] = {k: sum(ms for name, ms, _ in spent if kind(name) == k) for k in KINDS}
            print(profile_table(spent), f'trace: {trace}', sep='\n')
    ask('park')


def search(peak_of, start, most, room, fixed, double):
    """{rows: peak GiB, or None where they do not fit}. Peaks lie close to a straight line that begins at `fixed`: what
    fills `room` GiB can be guessed. Guesses go on until one more would win less than 1/16. `double`: in powers of 2
    on the way, for the curve."""
    tried, B = {}, start
    while True:
        tried[B] = peak_of(B)
        fits = max((b for b in tried if tried[b] is not None), default=0)
        bad = min((b for b in tried if tried[b] is None), default=most + 1)
        B = int((room - fixed) / (tried[fits] - fixed) * fits) if fits else bad // 2
        if double and fits: B = min(B, 2 * fits)
        if B >= bad: B = bad - max(bad // 16, 1)
        if B <= fits + fits // 16: return tried


KINDS = dict(fused='triton_(poi|per|red)', attention='flash|fmha|sdpa|attention|attn|flex',
             matmul='gemm|nvjet|cutlass|xmma|cublas|::mm|addmm|::bmm', optimizer='adam|multi_tensor|lpnorm',
             copies='memcpy|memset|copy_', triton='triton|^_', other='')


def kind(kernel):
    return next(k for k, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def profile_table(spent, n=15):
    kinds = [(f'all {k}', sum(ms for name, ms, _ in spent if kind(name) == k), None) for k in KINDS]
    total = sum(ms for _, ms, _ in spent)
    rows = [dict(name=name[:100], ms=ms, share=ms / total, calls=calls)
            for name, ms, calls in [*spent[:n], *kinds, ('everything', total, None)] if ms]
    return table(rows, {'kernel': '{name}', 'ms/step': '{ms:.2f}', 'share': '{share:.1%}', 'calls': '{calls:.0f}'})


def table(rows, columns):
    """columns: {head: format of a row's keys}. '-' where a row has no such number; errors below. Rows that have
    nothing but an error are only there."""
    def cell(row, form):
        try: return form.format(**row)
        except (LookupError, TypeError): return '-'
    name, *rest = columns.values()
    grid = [[cell(row, form) for form in (name, *rest)] for row in rows]
    grid = [list(columns), *(line for line in grid if set(line[1:]) != {'-'})]
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = ['  '.join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths))) for line in grid]
    return '\n'.join(lines + [f"{cell(row, name)}: FAILED, {row['error']}" for row in rows if 'error' in row])


def train_table(rows):
    """A peer that disagrees has no speed; one that failed later keeps what it had."""
    speed = {r['peer']: r['tokens_per_s'] for r in rows if r.get('agrees') and 'tokens_per_s' in r}
    shown = [r | dict(speed=f'{speed[name]:,.0f}', ratio=speed['ours'] / speed[name] if 'ours' in speed else None)
             if (name := r['peer']) in speed else r | dict(speed='DISAGREES') if 'agrees' in r else r for r in rows]
    return table(shown, {
        'peer': '{peer}', 'rows': '{batch}', 'tok/s': '{speed}', 'ours is': '{ratio:.2f} x', 'ms': '{median_ms:.1f}',
        'p10': '{p10_ms:.1f}', 'p90': '{p90_ms:.1f}', 'peak GiB': '{peak_gib:.1f}', 'MFU': '{mfu:.1%}',
        'first step s': '{first_step_s:.0f}', 'loss': '{loss_rel:+.0e}', 'norm': '{norm_rel:+.2%}',
        'cosine': '{cosine:.5f}', 'attention': '{attention[0]:.40}'})


def align_table(rows):
    """Times as multiples of the plain step. No MFU: not all of them have the same to compute."""
    plain = next((r['median_ms'] for r in rows if r['peer'] == 'ours' and r.get('agrees') and 'median_ms' in r), None)
    shown = [r | dict(cost=r['median_ms'] / plain if plain else None) if r.get('agrees') and 'median_ms' in r else
             {k: v for k, v in r.items() if k not in ('tokens_per_s', 'median_ms')} for r in rows]
    return table(shown, {
        'peer': '{peer}', 'rows': '{batch}', 'tok/s': '{tokens_per_s:,.0f}', 'plain steps': '{cost:.2f}',
        'ms': '{median_ms:.1f}', 'peak GiB': '{peak_gib:.1f}', 'agrees': '{agrees}', 'loss': '{loss_rel:+.0e}',
        'norm': '{norm_rel:+.2%}', 'cosine': '{cosine:.5f}'})


def memory_table(rows):
    sizes = sorted({B for r in rows for B in r.get('peaks', {})})
    return table(rows, {
        'peak GiB with rows:': '{peer}', **{str(B): f'{{peaks[{B}]:.1f}}' for B in sizes}, 'largest': '{batch}'})


# ---- kernels -----------------------------------------------------------------------------------------------


def kernel_cases(c):
    """{kernel: () -> (arguments that get gradients, the others, unit, cost, {way: function} besides ours and the
    reference)}. The cost is what forward and backward together must move (bytes) or compute (FLOP). One entry each;
    entries that kernels.py does not have are left out."""
    N, D, V, H, Hkv, hd = c.batch * c.seq_len, c.n_embd, c.vocab_size, c.n_head, c.n_kv_head, c.n_embd // c.n_head
    dtype = torch.bfloat16 if c.device == 'cuda' else torch.float32
    rand = lambda *shape, dtype=dtype: torch.randn(shape, device=c.device).mul_(0.1).to(dtype).requires_grad_()
    row = D * dtype.itemsize
    batch = make_batch(SimpleNamespace(**vars(c) | dict(packed=True)), c.batch).to(c.device)
    rows, a, targets = (batch.noise[k] for k in ('rows', 'a', 'targets'))
    M = len(rows)

    def liger(name, *more):             # imported when called: without Liger only that line fails
        return lambda *x: getattr(importlib.import_module('liger_kernel.ops'), name).apply(*x, *more)

    def rope_qkv():
        tables = K.rope_tables(batch.pos, hd, 1e6)
        double = [torch.cat([x, x], -1).to(dtype) for x in tables]

        def ligers(qkv):
            q, k, v = qkv.split([H, Hkv, Hkv], 2)
            q, k = liger('LigerRopeFunction')(q.transpose(1, 2), k.transpose(1, 2), *double)
            return q.transpose(1, 2), k.transpose(1, 2), v
        qkv = rand(c.batch, c.seq_len, H + 2 * Hkv, hd)
        return [qkv], [*tables, H, Hkv], 'bytes', 4 * qkv.nbytes, dict(liger=ligers)

    def attention():
        q, k, v = (rand(c.batch, h, c.seq_len, hd) for h in (H, Hkv, Hkv))
        sdpa = lambda mask: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=H != Hkv)
        swap = lambda f: lambda q, k, v: f(q, k, v).transpose(1, 2)
        flex, varlen = (swap(attention_of(kind, batch.doc)) for kind in ('flex', 'varlen'))
        return [q, k, v], [batch.ranges], 'FLOP', 14 * H * hd * visible_pairs(batch.doc), {
            'SDPA, mask': sdpa(attention_of('', batch.doc)), 'SDPA, all pairs': sdpa(None),
            'flex': torch.compile(flex, dynamic=False), 'varlen': varlen}

    wide, small = lambda: rand(c.batch, c.seq_len, D), lambda: rand(c.batch, D)
    cases = dict(
        rms_norm=lambda: ([rand(N, D), rand(D, dtype=torch.float32)], [1e-6], 'bytes', 5 * N * row, dict(
            liger=liger('LigerRMSNormFunction', 1e-6, 0.0, 'llama', False))),
        add_rms_norm=lambda: (
            [rand(N, D), rand(N, D), rand(D, dtype=torch.float32)], [1e-6], 'bytes', 8 * N * row, dict(
                liger=liger('LigerFusedAddRMSNormFunction', 1e-6, 0.0, 'llama', False))),
        rope_qkv=rope_qkv,
        swiglu=lambda: ([rand(N, 2 * c.n_ff)], [], 'bytes', 8 * N * c.n_ff * dtype.itemsize, dict(
            liger=liger('LigerFusedGateUpSiLUMulFunction'))),
        linear_cross_entropy=lambda: (
            [rand(M, D), rand(V, D, dtype=torch.float32)], [targets, a, None, V - 1], 'FLOP', 6 * M * V * D,
            dict(liger=lambda h, w: LigerCE.apply(h, w.to(h.dtype), targets, a, True))),
        cosine_alignment=lambda: (
            [rand(N, D)], [rand(N, D).detach(), a, rows, rows], 'bytes', 5 * M * row + N * row, {}),
        modulate=lambda: ([wide(), small(), small()], [], 'bytes', 5 * N * row, {}),
        add_modulate=lambda: ([wide(), wide(), small(), small(), small()], [], 'bytes', 9 * N * row, {}),
        attention=attention)
    return {name: make for name, make in cases.items() if hasattr(K, f'{name}_ref')}


def median_ms(f, on_gpu, n=30):
    """Median of n calls, each with a cold L2 cache; before each the GPU sleeps while Python launches: what counts is
    the work, not the launch. On a CPU of three calls."""
    if not on_gpu:
        marks = [time.perf_counter()]
        for _ in range(3): f(); marks.append(time.perf_counter())
        return float(np.median(np.diff(marks))) * 1e3
    cache, times = torch.empty(256 << 20, dtype=torch.int8, device='cuda'), []
    for _ in range(3): f()
    for _ in range(n):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(2_000_000)                                    # cycles: about a millisecond
        start.record(); f(); end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def measure(f, inputs, answer, on_gpu):
    """-> outputs and gradients, facts: forward and backward ms, MiB at the peak on top of the inputs, the largest
    relative error of an output or gradient against `answer` (None: nothing to compare with)."""
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu: torch.cuda.reset_peak_memory_stats()
    outs = f(*inputs)
    outs = [y for y in ([outs] if torch.is_tensor(outs) else outs) if y.requires_grad]
    torch.manual_seed(0)
    douts = [torch.randn(y.shape, device=y.device).to(y) for y in outs]     # randn_like goes by strides
    backward = lambda: torch.autograd.grad(outs, inputs, douts, retain_graph=True)
    found = [x.detach() for x in (*outs, *backward())]
    peak = (torch.cuda.max_memory_allocated() - before) / 2 ** 20 if on_gpu else None
    errors = [((x - y).float().norm() / y.float().norm()).item() for x, y in zip(found, answer or [])]
    return found, dict(peak_mib=peak, rel_error=max(errors, default=None), backward_ms=median_ms(backward, on_gpu),
                       forward_ms=median_ms(lambda: f(*inputs), on_gpu))


def error_line(e): return ' '.join(f'{type(e).__name__}: {e}'.split())[:300]


def rooflines(on_gpu):
    """FLOP/s of a matmul and bytes/s of a copy, measured now."""
    n, how = (8192, dict(device='cuda', dtype=torch.bfloat16)) if on_gpu else (256, {})
    x, (src, dst) = torch.randn(n, n, **how), torch.zeros(2, 8, n, n, **how)        # 1 GiB each
    return {'FLOP': 2e3 * n ** 3 / median_ms(lambda: torch.mm(x, x), on_gpu),
            'bytes': 2e3 * dst.nbytes / median_ms(lambda: dst.copy_(src), on_gpu)}


def run_kernels(c):
    """After every kernel yield its name and all rows so far."""
    on_gpu = c.device == 'cuda'
    importlib.import_module('torch._functorch.config').donated_buffer = False       # backwards run many times here
    roof = rooflines(on_gpu)
    rows = [dict(kernel='roof', way='matmul', teraflops=roof['FLOP'] / 1e12),
            dict(kernel='roof', way='copy', gb_per_s=roof['bytes'] / 1e9)]
    for name, make in kernel_cases(c).items():
        torch.compiler.reset()
        inputs, rest, unit, cost, others = make()
        ours, ref = ((lambda *x, f=getattr(K, f), rest=rest: f(*x, *rest)) for f in (name, f'{name}_ref'))
        answer = None
        for way, f in dict(reference=ref, compiled=torch.compile(ref, dynamic=False), ours=ours, **others).items():
            rows.append(dict(kernel=name, way=way))
            try:
                with torch.autocast('cuda', torch.bfloat16, enabled=on_gpu):
                    found, facts = measure(f, inputs, answer, on_gpu)
                answer = answer or found
                rate = cost / (facts['forward_ms'] + facts['backward_ms']) * 1e3
                rows[-1] |= facts | dict(of_roof=rate / roof[unit])
                rows[-1] |= dict(teraflops=rate / 1e12) if unit == 'FLOP' else dict(gb_per_s=rate / 1e9)
            except (Exception, SystemExit) as e: rows[-1]['error'] = error_line(e)
            found = None
            gc.collect()
        yield name, rows


def kernel_table(rows):
    return table(rows, {
        'kernel': '{kernel}: {way}', 'forward ms': '{forward_ms:.3f}', 'backward ms': '{backward_ms:.3f}',
        'TFLOP/s': '{teraflops:.0f}', 'GB/s': '{gb_per_s:.0f}', 'of the roof': '{of_roof:.0%}',
        'peak MiB': '{peak_mib:.0f}', 'error': '{rel_error:.0e}'})


# ---- the sandbox of eval.py --------------------------------------------------------------------------------

def run_sandbox(c):
    """HumanEval's own solutions: in this process, in a new Python each, in the sandbox. Yields as run_kernels does."""
    import benchmarks
    import sandbox
    jobs = [(benchmarks.program(p, p.answer), p.test, p.setup) for p in benchmarks.load('humaneval')]
    bare = [f'{solution}\n{test}' for solution, test, _ in jobs]

    def here(): return sum(exec(program, {'__name__': 'test'}) is None for program in bare)
    def new_python(): return sum(subprocess.run([sys.executable, '-c', program]).returncode == 0 for program in bare)
    def sandboxed(workers): return sum(v.passed for _, v in sandbox.execute_many(jobs, workers=workers))
    rows, cores = [], len(os.sched_getaffinity(0))
    ways = {'exec, no isolation': here, 'a new Python each': new_python,
            'sandbox, 1 worker': lambda: sandboxed(1), f'sandbox, {cores} workers': lambda: sandboxed(cores)}
    for way, run in ways.items():
        started = time.perf_counter()
        passed, seconds = run(), time.perf_counter() - started
        rows.append(dict(way=way, passed=passed, programs=len(jobs), programs_per_s=len(jobs) / seconds,
                         ms=1e3 * seconds / len(jobs)))
        yield way, rows


def sandbox_table(rows):
    return table(rows, {'way': '{way}', 'passed': '{passed}', 'programs/s': '{programs_per_s:.0f}',
                        'ms each': '{ms:.1f}'})


# ---- sampling from a latent diffusion model ------------------------------------------------------------------


def latent_objective(c, path, tokens, adaln):
    """The LDLM of a config file with `tokens` per chunk, a latent each; random weights on the device, matrices in bf16
    on a GPU. What starts at zero is drawn, too: with zeros in its way a weight could not matter."""
    settings = runpy.run_path(path)
    encoder = Encoder(find(settings['encoder']) or settings['encoder'], settings.get('encoder_layer', -3)).load()
    known = {f.name for f in dataclasses.fields(LatentConfig)} & settings.keys()
    cfg = LatentConfig(**{k: settings[k] for k in known} | dict(
        vocab_size=encoder.vocab_size, feature_dim=encoder.width, max_seq_len=1 + tokens, n_latents=tokens,
        prefix_len=0, dit_adaln=adaln))
    with torch.device('meta'): model = LatentModel(cfg)
    model = model.in_dtype(torch.bfloat16 if c.device == 'cuda' else torch.float32).to_empty(device=c.device)
    for x in model.buffers(): x.zero_()
    model.timesteps = AdaptiveTimesteps().to(c.device)
    torch.manual_seed(c.seed)
    with torch.no_grad():
        model.init_weights()
        for p in model.parameters():
            if not p.any(): p.normal_(std=0.02)
    return LDLM(encoder, model, **{k: settings[k] for k in ('sigma_dec', 'tangent_d') if k in settings}).eval()


@torch.no_grad()
def plain_loop(o, z, n_steps):
    """The peer: DDIM as one writes it first, from noise z (B, K, latent_dim) -> token_states, tokens (B, L)."""
    m, (times, factors) = o.model, o.grid(n_steps)
    z_hat = torch.zeros_like(z)
    with torch.autocast('cuda', torch.bfloat16, enabled=z.is_cuda):
        for t, (a, b, _) in zip(times.tolist(), factors.tolist()):
            z_hat = m.denoise(z, m.modulations(torch.full((len(z),), t, device=z.device)), z_hat)
            z = a * z + b * z_hat
        states = m.token_states(m.decode(z))
        return states, m.head(states).argmax(-1)


def latent_cost(sampler, B):
    """Bytes of weights and of per-step constants that a generation must read, floating point operations of its
    products. Read at every step: the denoiser without what depends on t alone; once: decoder, token decoder, head."""
    m, once, per_step, flop = sampler.m, 0, 0, 0
    n_steps, L, n_latents = len(sampler.steps), m.cfg.chunk_len, m.cfg.n_latents
    for name, p in m.named_parameters():
        if name.startswith(('encoder', 'dit_time', 'dit_mod')) or '.adaln.' in name: continue
        if sampler.start is not None and name.startswith(('decoder.0.self_', 'decoder_queries')): continue
        in_dit = name.startswith('dit')
        of_latents = in_dit or name.startswith('decoder') and ('kv_proj' in name or name.startswith('decoder_in'))
        rows, steps = n_latents if of_latents else L, n_steps if in_dit else 1          # what p multiplies, how often
        if in_dit: per_step += p.nbytes
        else: once += p.nbytes
        if p.ndim == 2 and not name.endswith(('_pos', '_queries')): flop += 2 * B * rows * p.numel() * steps
    per_step += sum(x.nbytes for x in tree_leaves(sampler.steps[0]) if torch.is_tensor(x))
    if sampler.start is not None: once += sampler.start[:1].nbytes
    return once + n_steps * per_step, flop


@torch.no_grad()
def weights_that_matter(o, n_steps=3):
    """10% of noise on one tensor at a time: by how much do the logits change? All but the encoder's must."""
    seeds, moved = torch.arange(1, device=o.model.head.weight.device), {}

    def logits():
        sampler = Sampler(o, 1, n_steps)
        return K.head_logits(sampler.states(sampler.latents(seeds))[0, :4], sampler.m.head.weight)
    want = logits()
    assert torch.equal(want, logits()), "not the same twice"
    for name, p in o.model.named_parameters():
        old = p.clone()
        p.mul_(1 + 0.1 * torch.randn_like(p))
        moved[name] = ((logits() - want).norm() / want.norm()).item()
        p.copy_(old)
    still = [n for n, x in moved.items() if x == 0 and not n.startswith('encoder')]
    least = min((x, n) for n, x in moved.items() if not n.startswith('encoder'))
    return dict(tensors=sum(not n.startswith('encoder') for n in moved), without_effect=still, least=list(least),
                encoder_moves=max(x for n, x in moved.items() if n.startswith('encoder')))


def in_torch(f):
    """f with the references in place of our kernels: Inductor fuses what it can see."""
    def call(*args, **kw):
        with mock.patch.object(K, 'KERNELS', 'torch'): return f(*args, **kw)
    return call


def latent_sampler(o, way, B, n_steps, mode):
    """-> a function of seeds, a Sampler."""
    compiled = mode if way.startswith('compiled') else ''
    if compiled: torch.compiler.reset()
    sampler = Sampler(o, B, n_steps, compiled=compiled, persistent=way != 'kernels')
    if way == 'compiled': sampler.step, sampler.decode = in_torch(sampler.step), in_torch(sampler.decode)
    return sampler


def run_ldlm(c):
    """All batches and numbers of steps at the first number of tokens, fewer beyond and with adaLN; compiled ways and
    kernels for the first batch. Yields as run_kernels does."""
    on_gpu, numbers = c.device == 'cuda', lambda text: list(map(int, text.split(',')))
    roof = rooflines(on_gpu)
    rows = [dict(shape='roof', way='copy', gb_per_s=roof['bytes'] / 1e9, teraflops=roof['FLOP'] / 1e12)]
    for path, adaln in itertools.product(c.shapes.split(','), (False, True)):
        shape = Path(path).stem.removeprefix('ldlm_') + ' adaLN' * adaln
        for tokens in numbers(c.latents):
            if adaln and tokens != numbers(c.latents)[0]: continue
            o, first = latent_objective(c, path, tokens, adaln), tokens == numbers(c.latents)[0]
            if first:
                rows.append(dict(shape=shape, way='weights', parameters=o.model.n_params()) | weights_that_matter(o))
                yield f'{shape}: weights', rows
            for B, n_steps in itertools.product(numbers(c.batches), numbers(c.n_steps)):
                plain = first and B == numbers(c.batches)[0]
                if adaln and not plain or not first and n_steps != numbers(c.n_steps)[0]: continue
                for way in c.ways.split(','):
                    if way == 'eager' and not first or way not in ('eager', 'graph') and not plain: continue
                    rows.append(dict(shape=shape, way=way, tokens=tokens, batch=B, steps=n_steps))
                    try: rows[-1] |= time_latents(o, way, B, n_steps, roof, c.mode, compared=first)
                    except (Exception, SystemExit) as e: rows[-1]['error'] = error_line(e)
                    if on_gpu: torch.cuda.empty_cache()
                yield f'{shape}: {tokens} tokens, batch {B}, {n_steps} steps', rows
            o = None
            gc.collect()


def time_latents(o, way, B, n_steps, roof, mode, compared):
    """Noise to tokens. rel_error: of the token states, against the plain loop; same: the graph's tokens, as a share,
    that are those of the same sampler without a graph."""
    device, cfg = o.model.head.weight.device, o.model.cfg
    on_gpu, shape = device.type == 'cuda', (cfg.n_latents, cfg.latent_dim)
    seeds, facts = torch.arange(B, device=device), {}
    sampler = latent_sampler(o, way, B, n_steps, mode)
    if way == 'eager': run = lambda: plain_loop(o, torch.randn(B, *shape, device=device), n_steps)
    else:
        run = lambda: sampler(seeds)
        started = time.time()
        tokens = run()
        facts = dict(first_s=time.time() - started, same=(run() == tokens).float().mean().item())
        if compared:
            want = plain_loop(o, K.row_noise(seeds, shape), n_steps)[0].float()
            got = sampler.states(sampler.latents(seeds)).float()
            facts['rel_error'] = ((got - want).norm() / want.norm()).item()
    n = min(30, max(5, round(1000 / median_ms(run, on_gpu, 3))))
    ms = median_ms(run, on_gpu, n)
    n_bytes, flop = latent_cost(sampler, B)
    limits = dict(bytes=1e3 * n_bytes / roof['bytes'], FLOP=1e3 * flop / roof['FLOP'])
    bound = max(limits, key=limits.get)
    return facts | dict(ms=ms, tokens_per_s=1e3 * B * cfg.chunk_len / ms, read_bytes=n_bytes, flop=flop, bound=bound,
                        limit_ms=limits[bound], limit_tokens_per_s=1e3 * B * cfg.chunk_len / limits[bound],
                        of_limit=limits[bound] / ms)


def ldlm_table(rows):
    shown = [r | dict(what=f"{r['shape']}: {r['way']}", gb=r.get('read_bytes', 0) / 1e9 or None) for r in rows]
    proofs = [f"{r['shape']}: {r['parameters'] / 1e9:.3f}B parameters; of {r['tensors']} tensors outside the encoder "
              f"{len(r['without_effect'])} without effect on the logits, the least by {r['least'][0]:.1e} "
              f"({r['least'][1]})" for r in rows if r['way'] == 'weights']
    roof = "measured now: copies of {gb_per_s:,.0f} GB/s, products of {teraflops:.0f} TFLOP/s".format(**rows[0])
    return '\n'.join([table([r for r in shown if r['way'] not in ('weights', 'copy')], {
        'shape: way': '{what}', 'tokens': '{tokens}', 'batch': '{batch}', 'steps': '{steps}', 'ms': '{ms:.3f}',
        'tok/s': '{tokens_per_s:,.0f}', 'reads GB': '{gb:.2f}', 'limit tok/s': '{limit_tokens_per_s:,.0f}',
        'by': '{bound}', 'of limit': '{of_limit:.0%}', 'error': '{rel_error:.0e}', 'graph = eager': '{same:.1%}'}),
        roof, *proofs])


if __name__ == '__main__':
    what = 'train'                  # train, align, memory, kernels, sandbox, ldlm: the first word of the command line
    peers = ''                      # comma list; default: those that suit the rows
    packed = False                  # rows of several documents; else a row is one document
    doc_len = 300.0                 # their mean length; lognormal, sigma 1
    largest = False                 # train: each peer at the largest micro-batch that fits
    min_batch = 1                   # memory: where the search for it begins
    max_batch = 512                 # where it ends
    batch = 16                      # rows per micro-batch
    seq_len = 1024
    vocab_size = 151936             # from here on the shape of Qwen2.5-0.5B
    n_layer = 24
    n_head = 14
    n_kv_head = 2
    n_embd = 896
    n_ff = 4864
    residual = 'fp32'               # residual stream of the hf and liger peers: what autocast makes it, or bf16 as ours
    rounds = 2                      # turns of each peer
    warmup = 10                     # steps before the clock starts, in each turn
    steps = 25                      # timed steps per turn
    profile = False                 # train: kernels by GPU time, a chrome trace
    peak_tflops = 989.0             # dense bf16 peak of the device, for MFU
    shapes = 'config/ldlm_qwen3_6_35b_a3b.py,config/ldlm_qwen3_6_27b.py'                # from here on: ldlm
    latents = '64,128,256'          # tokens of a chunk, a latent for each
    batches = '1,4,16,64'           # the first with all ways
    n_steps = '10,4'                # of the denoiser
    ways = 'graph,kernels,eager,compiled'   # eager: the plain loop; graph: ldlm.Sampler; kernels: it without
                                    # persistent.py; compiled: torch.compile fuses the references of these kernels
                                    # there; compiled_kernels: the kernels themselves
    mode = 'default'                # of torch.compile, or max-autotune-no-cudagraphs
    seed = 0
    device = ''                     # cuda or cpu; default: cuda when there is one
    out_dir = 'out/bench'
    result = ''                     # results/x.json; default: out_dir/<what>.json
    from configurator import configure
    words = sys.argv[1:]
    if words and words[0].isalpha(): words[0] = f'--what={words[0]}'
    config = configure(globals(), words)
    started = time.time()
    tables = dict(train=train_table, align=align_table, memory=memory_table, kernels=kernel_table,
                  sandbox=sandbox_table, ldlm=ldlm_table)
    others = dict(kernels=run_kernels, sandbox=run_sandbox, ldlm=run_ldlm)
    if what not in tables: raise SystemExit(f"say python bench.py {', '.join(tables)}, not {what!r}")
    first_of_align = list(PEERS).index('ours')
    config['peers'] = peers = peers or ('ours' if profile else ','.join(
        list(PEERS)[first_of_align:] if what == 'align' else
        ('hf_eager', 'hf_compile_compact', 'flex', 'varlen', 'liger_tuned', 'ours_eager', 'ours') if packed else
        (name for name in list(PEERS)[:first_of_align + 1] if 'attn' not in PEERS[name])))
    config['device'] = device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device not in ('cpu', 'cuda') or device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit(f"device must be cpu, or cuda where there is one, got {device!r}")
    if mode not in ('default', 'max-autotune-no-cudagraphs'):
        raise SystemExit(f"mode must be default or max-autotune-no-cudagraphs, got {mode!r}")
    if result and Path(result).is_dir(): raise SystemExit(f"result must be a file, {result} is a directory")
    for name in peers.split(','):
        if name not in PEERS: raise SystemExit(f"unknown peer {name!r}: --peers is a comma list of {', '.join(PEERS)}")
        if 'align' in PEERS[name] and what != 'align': raise SystemExit(f"{name} is for python bench.py align")
        if 'attn' in PEERS[name] and not packed: raise SystemExit(f"{name} is for packed rows: add --packed=true")
    if min(batch, min_batch, seq_len, rounds, steps) < 1 or warmup < 0 or n_embd % n_head or n_head % n_kv_head:
        raise SystemExit("counts must be at least 1, n_embd a multiple of n_head, n_head of n_kv_head")
    if device == 'cpu' and (largest or what == 'memory'): raise SystemExit("memory is measured on GPUs only")
    if residual not in ('fp32', 'bf16'): raise SystemExit(f"residual must be fp32 or bf16, got {residual!r}")
    for name in ('latents', 'batches', 'n_steps'):
        if not re.fullmatch('[1-9][0-9]*(,[1-9][0-9]*)*', config[name]):
            raise SystemExit(f"{name} must be a comma list of numbers from 1, got {config[name]!r}")
    if set(ways.split(',')) - {'graph', 'kernels', 'eager', 'compiled', 'compiled_kernels'}:
        raise SystemExit(f"ways is a comma list of graph, kernels, eager, compiled, compiled_kernels, got {ways!r}")
    for file in shapes.split(','):
        if what == 'ldlm' and not Path(file).is_file(): raise SystemExit(f"shapes: no such file: {file!r}")
        if what == 'ldlm' and (not file.endswith('.py') or 'encoder' not in runpy.run_path(file)):
            raise SystemExit(f"shapes: {file} is no config of a latent diffusion model: it has no encoder")
        if what == 'ldlm' and device == 'cpu' and '_qwen3_6_' in file:
            raise SystemExit("shapes of billions of parameters; a CPU can time --shapes=config/ldlm_quickstart.py")
    path = Path(result or f'{out_dir}/{what}.json')
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    for done, rows in others.get(what, run_peers)(SimpleNamespace(**config)):
        facts = provenance(device, started)                             # a run cut short leaves what it has
        for package in ('transformers', 'liger-kernel', 'triton'):
            try: facts['versions'][package] = version(package)
            except PackageNotFoundError: facts['versions'][package] = None
        del facts['peak_gib']                                           # of this process; the rows have their own
        write_json(path, facts | dict(results=rows, config=config))
        print(f'{time.time() - started:4.0f} s: {done}', flush=True)
    print(tables[what](rows), f'wrote {path}', sep='\n')
