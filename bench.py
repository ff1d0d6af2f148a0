"""Speed and memory, side by side with other people's code on the same machine in the same call.

    python bench.py train                   # one MDM training step of a 0.5B model: ours, transformers, Liger
    python bench.py train --packed=true     # rows of several documents; FlexAttention and varlen attention join in
    python bench.py train --largest=true    # each peer at the largest micro-batch that fits
    python bench.py train --profile=true    # where the milliseconds of our step go; a chrome trace in out_dir
    python bench.py memory                  # peak memory over micro-batches of 1, 2, 4, ... rows
    python bench.py kernels                 # each kernel against its reference, torch.compile of that, and Liger
    python bench.py train --device=cpu --vocab_size=512 --n_layer=2 --n_embd=64 --n_head=4 --n_ff=128 \\
        --batch=4 --seq_len=64 --warmup=1 --steps=2 --peers=hf_eager,ours_eager       # a rehearsal

Every peer is a process. All start together, then take turns on the device, A B ... B A; who waits keeps its weights
on the CPU. Same weights, ids, masks and t for all; fp32 masters, bf16 autocast; a step is forward, backward, clipping
to 1.0, fused AdamW, zero_grad. Noise and attention masks are made before the clock starts. A time counts only if loss
and gradient agree with an fp32 reference computed row by row. MFU counts what has to be computed, for everybody: the
head at masked rows, attention inside documents.
"""
import gc
import importlib.metadata
import inspect
import math
import multiprocessing
import re
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import kernels as K
from checkpoint import provenance, write_json
from data import Batch
from mdm import MDM
from model import ModelConfig, Transformer

PEERS = dict(                                   # compact: only masked rows reach the head
    hf_eager=dict(),
    hf_eager_compact=dict(compact=True),
    hf_compile=dict(compiled=True),
    hf_compile_compact=dict(compiled=True, compact=True),
    liger=dict(liger='as shipped'),
    liger_compact=dict(liger='as shipped', compact=True),
    liger_tuned=dict(liger='tuned', compact=True),
    flex=dict(attn='flex', compiled=True, compact=True),        # these two need packed rows
    varlen=dict(attn='varlen', compiled=True, compact=True),
    ours_eager=dict(),
    ours=dict(compiled=True))
DENSE = 'hf_eager,hf_eager_compact,hf_compile,hf_compile_compact,liger,liger_compact,liger_tuned,ours_eager,ours'
PACKED = 'hf_eager,hf_compile_compact,flex,varlen,liger_tuned,ours_eager,ours'

# ---- the common task ---------------------------------------------------------------------------------------


def model_config(c):
    return ModelConfig(c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.n_ff, c.n_embd // c.n_head,
                       rope_theta=1e6, qkv_bias=True, tied=True, causal=False, max_seq_len=32768)


def make_batch(c, B):
    """Random ids with MDM's noise, a function of the seed alone. Documents have lognormal lengths of mean doc_len
    if packed, else each is a row. The mask token is the last id."""
    rng, T = np.random.default_rng(c.seed), c.seq_len
    doc, pos = np.zeros((B, T), np.int64), np.tile(np.arange(T), (B, 1))
    for b in range(B if c.packed else 0):
        ends = np.cumsum(rng.lognormal(math.log(c.doc_len) - 0.5, 1.0, T).astype(int) + 2)
        doc[b] = np.searchsorted(ends, np.arange(T), side='right')
        pos[b] -= np.concatenate([[0], ends])[doc[b]]
    ids = rng.integers(0, c.vocab_size - 1, (B, T))
    ids, doc, pos = map(torch.from_numpy, (ids, doc, pos))
    batch = Batch(ids, K.document_ranges(doc) if c.packed else None, pos, doc, pos > 0, torch.arange(B),
                  int((pos > 0).sum()))
    with torch.device('meta'): objective = MDM(Transformer(model_config(c)), c.vocab_size - 1)
    return objective.prepare(batch, c.seed)


def step_flops(c, batch):
    """6 per weight and token, the head at masked rows only, 12 H hd per layer and visible pair (query, key)."""
    with torch.device('meta'): weights = Transformer(model_config(c)).n_params(embedding=False)
    pairs = sum(int(n) ** 2 for row in batch.doc for n in row.bincount())
    return 6 * (weights * batch.ids.numel() + float(batch.noise['real'].sum()) * c.vocab_size * c.n_embd
                ) + 12 * c.n_layer * c.n_embd * pairs


# ---- peers -------------------------------------------------------------------------------------------------


class LigerCE(torch.autograd.Function):
    """sum_i w_i CE_i by Liger's fused kernel with the weights folded into the gradient of its forward. Its public
    reduction='none' runs the head a second time in the backward (0.8) or is wrong (0.7). As shipped, under autocast,
    it casts the fp32 head in every chunk of 128 rows; tuned: a bf16 head, fp32 sums, chunks of 2,048 rows."""
    @staticmethod
    def forward(ctx, h, head, targets, w, tuned):
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
        more = dict(accum_dtype=torch.float32, chunk_mem_const=16) if tuned else {}
        ce, _, _, _, dh, dhead, _ = fused_linear_cross_entropy_forward(
            h, head, targets, reduction='none', token_grad_output=w, compute_gradients=True,
            weight_requires_grad=True, **more)
        ctx.save_for_backward(dh, dhead)
        return (ce * w).sum()

    @staticmethod
    def backward(ctx, g):
        dh, dhead = ctx.saved_tensors
        return dh * g.to(dh.dtype), dhead * g.to(dhead.dtype), None, None, None


def flex(module, q, k, v, mask, **unused):
    from torch.nn.attention.flex_attention import flex_attention
    return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=True).transpose(1, 2), None


def varlen(module, q, k, v, mask, **unused):
    from torch.nn.attention.varlen import varlen_attn
    starts, longest = mask
    gqa = dict(enable_gqa=True) if 'enable_gqa' in inspect.signature(varlen_attn).parameters else {}
    rows = [x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]             # (B T, heads, hd)
    y = varlen_attn(*rows, starts, starts, longest, longest, **gqa)
    return y.view(len(q), -1, *y.shape[1:]), None


def attention_mask(kind, doc):
    """What the attention of that kind takes as its mask: doc (B, T), one document per row -> None."""
    B, T = doc.shape
    if kind == 'flex':
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(lambda b, h, i, j: doc[b, i] == doc[b, j], B, None, T, T, device=doc.device)
    if kind == 'varlen':
        new = F.pad(doc.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().squeeze(1)
        starts = F.pad(new, (0, 1), value=doc.numel()).int()
        return starts, int(starts.diff().max())
    return (doc[:, :, None] == doc[:, None])[:, None] if doc.any() else None            # SDPA: (B, 1, T, T)


def load_hf(weights, spec):
    from transformers import AttentionInterface, Qwen2ForCausalLM
    if spec.get('liger'):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
        apply_liger_kernel_to_qwen2(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    AttentionInterface.register('flex_documents', flex)
    AttentionInterface.register('varlen_documents', varlen)
    attn = f"{spec['attn']}_documents" if 'attn' in spec else 'sdpa'
    model = Qwen2ForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation=attn)
    for layer in model.model.layers: layer.self_attn.is_causal = False
    return model


def hf_loss(model, batch, spec, residual, first=0, last=None):
    """-> loss(): sum of w CE over the masked tokens of rows first..last of the batch, with the usual building blocks.
    Compact rows are padded to a multiple of 64, which the matrix units want."""
    noise, T, mask_id = batch.noise, batch.ids.shape[1], model.config.vocab_size - 1
    last = last or len(batch.ids)
    xt, pos = noise['xt'][first:last], batch.pos[first:last]
    mask = {'full_attention': attention_mask(spec.get('attn'), batch.doc[first:last])}  # a dict is taken as it is
    mine = (noise['real'] > 0) & (noise['rows'] // T >= first) & (noise['rows'] // T < last)
    rows, w = noise['rows'][mine] - first * T, noise['a'][mine]
    targets = batch.ids[first:last].flatten()
    if spec.get('compact'):
        pad = (0, -len(rows) % 64)
        rows, w = F.pad(rows, pad), F.pad(w, pad)
        targets = targets[rows]
    else: rows, w = None, torch.zeros(targets.shape, device=w.device).index_add_(0, rows, w)
    if spec.get('liger'): targets = torch.where(w > 0, targets, -100)
    tuned = spec.get('liger') == 'tuned'

    def loss():
        x = model.model.embed_tokens(xt)
        if residual != 'fp32': x = x.to(getattr(torch, residual))
        h = model.model(inputs_embeds=x, position_ids=pos, attention_mask=mask, use_cache=False).last_hidden_state
        h = h.flatten(0, 1) if rows is None else h.flatten(0, 1)[rows]
        if spec.get('liger'):
            head = model.lm_head.weight
            if tuned: h, head = h.bfloat16(), head.bfloat16()
            return LigerCE.apply(h, head, targets, w, tuned)            # keeps the mask column: 1 of V
        z = model.lm_head(h).float()
        z.detach()[:, mask_id] = -torch.inf         # never predicted, as in ours; its gradient is softmax = 0 anyway
        return (F.cross_entropy(z, targets, reduction='none') * w).sum()
    return torch.compile(loss, dynamic=False) if spec.get('compiled') else loss


class Peer:
    """One way to take the step. Lives in its own process, where `serve` calls its methods."""

    def __init__(self, name, config, weights):
        c, self.spec = SimpleNamespace(**config), PEERS.get(name, {})
        self.c, self.ours, self.opt, self.loss = c, name.startswith('ours'), None, None
        self.on_gpu = c.device == 'cuda'
        self.autocast = torch.autocast('cuda', torch.bfloat16) if self.on_gpu else nullcontext()
        self.model = Transformer.from_pretrained(weights) if self.ours else load_hf(weights, self.spec)
        if self.ours: self.obj = MDM(self.model, c.vocab_size - 1)
        self.model.train()
        self.params = list(self.model.parameters())
        if self.on_gpu: torch.set_num_threads(1)                        # as train.py

    def setup(self, B):
        """The device is ours: bring the weights, make the batch and the loss function of that size."""
        self.loss = None
        torch.compiler.reset()
        self.model.to(self.c.device)
        batch = make_batch(self.c, B).to(self.c.device)
        if not self.ours: self.loss = hf_loss(self.model, batch, self.spec, self.c.residual)
        else:
            if self.spec.get('compiled'):
                for block in self.model.layers: block.compile(dynamic=False)
            self.loss = lambda: self.obj(batch)[0]

    def park(self):
        """Give the device back."""
        self.opt = None
        for p in self.params: p.grad = None
        self.model.cpu()
        gc.collect()
        if self.on_gpu: torch.cuda.empty_cache()

    def reference(self, B, file):
        """Loss and gradient in fp32 by transformers, row by row, into `file`."""
        self.model.to(self.c.device)
        batch, total = make_batch(self.c, B).to(self.c.device), 0.0
        for i in range(B):
            loss = hf_loss(self.model, batch, dict(compact=True), 'fp32', i, i + 1)()
            loss.backward()
            total += loss.item()
        save_file({n: p.grad for n, p in self.model.named_parameters()}, file, metadata=dict(loss=repr(total)))
        self.park()

    def gradients(self):
        """Under Hugging Face's names. Ours: the views of a twin whose parameters are the gradients."""
        grads = {n: p.grad for n, p in self.model.named_parameters()}
        if not self.ours: return grads
        with torch.device('meta'): twin = Transformer(self.model.cfg)
        twin.load_state_dict(grads, assign=True)
        return twin._hf_views()

    def gate(self, B, file):
        """Loss and gradient of the first step against the reference, and how long that step took (compilation)."""
        self.setup(B)
        self.wait(); started = time.time()
        with self.autocast: loss = self.loss()
        loss.backward()
        self.wait(); seconds = time.time() - started
        facts = compare(loss.item(), self.gradients(), file) | dict(first_step_s=seconds)
        for p in self.params: p.grad = None
        return facts

    def step(self):
        with self.autocast: loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)

    def wait(self):
        if self.on_gpu: torch.cuda.synchronize()

    def warm(self, n):
        """Weights on the device, an optimizer, n steps."""
        self.model.to(self.c.device)
        if self.opt is None:
            groups = [dict(params=[p for p in self.params if p.ndim >= 2], weight_decay=0.1),
                      dict(params=[p for p in self.params if p.ndim < 2], weight_decay=0.0)]
            self.opt = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=self.on_gpu)
        for _ in range(n): self.step()

    def time(self, warmup, steps):
        """Milliseconds of each step, between events on the device, and the peak of its memory meanwhile."""
        self.warm(warmup)
        self.wait()
        if not self.on_gpu:
            marks = [time.perf_counter()]
            for _ in range(steps): self.step(); marks.append(time.perf_counter())
            return dict(ms=(np.diff(marks) * 1e3).tolist(), peak_gib=None)
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]: self.step(); mark.record()
        self.wait()
        ms = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
        return dict(ms=ms, peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)

    def memory(self, B):
        """Peak GiB of three steps, None if they do not fit."""
        try:
            self.setup(B)
            self.warm(1)
            return self.time(1, 1)['peak_gib']
        except RuntimeError as e:                                       # torch.OutOfMemoryError, cuBLAS's own
            if not re.search('out of memory|ALLOC_FAILED', str(e)): raise
        finally:
            self.loss = None
            self.park()                                                 # after a failure, too
        return None

    def profile(self, steps, trace=''):
        """[(kernel, ms per step, calls per step)], longest first; `trace`: a chrome trace of these steps."""
        self.warm(2)
        self.wait()
        with torch.profiler.profile() as prof:
            for _ in range(steps): self.step()
            self.wait()
        if trace: prof.export_chrome_trace(trace)
        spent = [(e.key, (e.self_device_time_total if self.on_gpu else e.self_cpu_time_total) / 1e3 / steps,
                  e.count / steps) for e in prof.key_averages()
                 if ('CUDA' in str(e.device_type)) == self.on_gpu and not getattr(e, 'is_user_annotation', False)]
        return sorted(spent, key=lambda k: -k[1])


def compare(loss, grads, file):
    """Against the reference in `file`: relative differences of loss and gradient norm, cosine of the whole gradient,
    the worst cosine of one tensor (not part of the gate: some gradients are almost zero)."""
    dot = norm = ref_norm = 0.0
    worst = (1.0, '')
    with safe_open(file, 'pt') as f:
        ref_loss = float(f.metadata()['loss'])
        if set(f.keys()) != set(grads): raise RuntimeError(f"other parameters: {set(f.keys()) ^ set(grads)}")
        for name, g in grads.items():
            g, r = g.flatten().double(), f.get_tensor(name).to(g.device).flatten().double()
            gr, gg, rr = (g @ r).item(), (g @ g).item(), (r @ r).item()
            dot, norm, ref_norm = dot + gr, norm + gg, ref_norm + rr
            worst = min(worst, (gr / math.sqrt(gg * rr) if gg * rr > 0 else float(gg == rr), name))
    facts = dict(loss=loss, loss_rel=loss / ref_loss - 1, norm_rel=math.sqrt(norm / ref_norm) - 1,
                 cosine=dot / math.sqrt(norm * ref_norm) if norm > 0 else 0.0, worst_cosine=list(worst))
    return facts | dict(agrees=abs(facts['loss_rel']) < 2e-3 and abs(facts['norm_rel']) < 0.01
                        and facts['cosine'] > 0.999)


def serve(conn, *args):
    """The process of a peer: answer (method, arguments) until None comes. Errors are answers."""
    torch.set_num_threads(2)                                            # while all of them load
    peer = failure = None
    try: peer = Peer(*args)
    except (Exception, SystemExit) as e: failure = f'{type(e).__name__}: {e}'       # the others go on
    while (request := conn.recv()) is not None:
        method, values = request
        try:
            if failure: raise RuntimeError(failure)
            conn.send((True, getattr(peer, method)(*values)))
        except (Exception, SystemExit) as e: conn.send((False, f'{type(e).__name__}: {e}'[:500]))


class Remote:
    """A Peer in a process of its own."""
    def __init__(self, *args):
        spawn = multiprocessing.get_context('spawn')
        self.conn, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, *args))
        self.process.start()
        theirs.close()

    def __getattr__(self, method):
        def call(*values):
            try:
                self.conn.send((method, values))
                ok, answer = self.conn.recv()
            except (EOFError, OSError):
                self.process.join(10)
                raise RuntimeError(f"the process died with exit code {self.process.exitcode}") from None
            if not ok: raise RuntimeError(answer)
            return answer
        return call

    def close(self):
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


# ---- train and memory --------------------------------------------------------------------------------------


def run_peers(c, config, names, report):
    """Take turns. report(rows) is called after every turn, so that an interrupted run leaves what it has."""
    rows = {name: dict(peer=name, batch=c.batch, ms=[], round_ms=[]) for name in names}
    with TemporaryDirectory() as tmp:
        torch.manual_seed(c.seed)
        Transformer(model_config(c)).save_pretrained(tmp)
        file, gated = f'{tmp}/reference.safetensors', c.what == 'train'
        peers = {name: Remote(name, config, tmp) for name in [*['reference'] * gated, *names]}
        try:
            if gated: peers['reference'].reference(c.batch, file)
            for i in range(c.rounds if gated else 1):
                for name in names[::-1] if i % 2 else names:
                    if 'error' in rows[name]: continue
                    try: take_turn(c, peers[name], rows[name], i, file)
                    except RuntimeError as e:
                        rows[name]['error'] = str(e)
                        peers[name].close()                             # frees whatever it holds
                    report(list(rows.values()))
        finally:
            for peer in peers.values(): peer.close()


def take_turn(c, peer, row, i, file):
    """Turn i of one peer: the gate and the search for a size at the first, then the clock."""
    if c.what == 'memory' or c.largest and i == 0:
        if c.what == 'train': row.update(peer.gate(c.batch, file))
        row['peaks'] = peaks = search(peer.memory, 1 if c.what == 'memory' else c.batch, c.max_batch)
        row['batch'] = max((B for B, peak in peaks.items() if peak is not None), default=0)
        if c.what == 'memory': return
        if not row['batch']: raise RuntimeError(f"not even {c.batch} rows fit")
        peer.setup(row['batch'])
    elif i == 0: row.update(peer.gate(c.batch, file))
    got = peer.time(c.warmup, c.steps)
    row['ms'] += got['ms']
    row['round_ms'].append(statistics.median(got['ms']))
    row['peak_gib'] = max(got['peak_gib'] or 0, row.get('peak_gib') or 0) or None
    if i == 0:
        trace = c.profile and f"{c.out_dir}/{row['peer']}.trace.json.gz"
        spent = peer.profile(3, trace or '')
        row['attention'] = sorted({short(k) for k, ms, _ in spent if group(k) == 'attention' and ms > 0.01})
        if c.profile: print(profile_table(spent), f"trace: {trace}", sep='\n')
    peer.park()
    low, ms, high = np.percentile(row['ms'], [10, 50, 90])
    batch = make_batch(c, row['batch'])
    row.update(median_ms=ms, p10_ms=low, p90_ms=high, tokens_per_s=batch.ids.numel() / ms * 1e3,
               mfu=step_flops(c, batch) / ms * 1e3 / (c.peak_tflops * 1e12) if c.device == 'cuda' else None)


def search(peak_of, start, most):
    """{rows: peak GiB, or None where they do not fit}: doubling up to `most`, then bisection until what fits and what
    does not are within 1/16."""
    tried, B = {}, start
    while True:
        tried[B] = peak_of(B)
        fit = max((b for b, peak in tried.items() if peak is not None), default=0)
        bad = min((b for b, peak in tried.items() if peak is None), default=None)
        if bad is None and fit == most or bad == 1 or bad and fit and bad - fit <= max(1, fit // 16): return tried
        B = min(2 * fit, most) if bad is None else (fit + bad) // 2


KINDS = dict(attention='flash|fmha|sdpa|attention|attn|flex', matmul='gemm|nvjet|cutlass|xmma|cublas|::mm|addmm|::bmm',
             optimizer='adam|multi_tensor|lpnorm', copies='memcpy|memset|copy_', fused='triton', other='')


def group(kernel):
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def short(kernel):
    """Without template arguments, return type and namespaces."""
    name = re.sub(r'\(.*', '', re.sub(r'<.*', '', kernel.removeprefix('void ')))
    return name.split('::')[-1][:80] or kernel[:80]


def profile_table(spent, n=15):
    total = sum(ms for _, ms, _ in spent)
    kinds = {kind: sum(ms for k, ms, _ in spent if group(k) == kind) for kind in KINDS}
    return table([('kernel', 'ms/step', 'share', 'calls')]
                 + [(short(k), f'{ms:.2f}', f'{ms / total:.1%}', f'{calls:.0f}') for k, ms, calls in spent[:n]]
                 + [(f'all {kind}', f'{ms:.2f}', f'{ms / total:.1%}', '') for kind, ms in kinds.items() if ms]
                 + [('everything', f'{total:.2f}', '', '')])


def table(rows):
    """Aligned columns; the first row is the head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(f'{cell!s:{w}}' if i == 0 else f'{cell!s:>{w}}' for i, (cell, w) in enumerate(zip(row, widths)))
             for row in rows]
    return '\n'.join(line.rstrip() for line in lines)


def number(value, form):
    return '-' if value is None else format(value, form)


def train_table(rows):
    """A peer that disagrees has no speed; one that failed has its error below the table."""
    ours = next((r for r in rows if r['peer'] == 'ours' and r.get('agrees') and 'tokens_per_s' in r), None)
    out = [('peer', 'rows', 'tok/s', 'ms', 'p10', 'p90', 'peak GiB', 'MFU', 'ours is', 'first step', 'loss', 'norm',
            'cosine')]
    for r in rows:
        if 'error' in r or not r['ms']: continue
        ok = r['agrees']
        out.append((r['peer'], r['batch'], f"{r['tokens_per_s']:,.0f}" if ok else 'DISAGREES',
                    *(f'{r[k]:.1f}' if ok else '-' for k in ('median_ms', 'p10_ms', 'p90_ms')),
                    number(r['peak_gib'], '.1f'), number(r['mfu'], '.1%'),
                    f"{ours['tokens_per_s'] / r['tokens_per_s']:.2f} x" if ours and ok else '-',
                    f"{r['first_step_s']:.0f} s", f"{r['loss_rel']:+.0e}", f"{r['norm_rel']:+.1%}", f"{r['cosine']:.5f}"))
    lines = [table(out)] + [f"{r['peer']}: attention by {', '.join(r['attention'])}" for r in rows if r.get('attention')]
    return '\n'.join(lines + [f"{r['peer']}: FAILED, {r['error']}" for r in rows if 'error' in r])


def memory_table(rows):
    """Peak GiB of one training step, by rows in the micro-batch."""
    sizes = sorted({B for r in rows for B in r.get('peaks', {})})
    out = [('peak GiB at rows =', *sizes, 'largest')]
    for r in rows:
        if 'peaks' in r:
            peaks = {B: number(p, '.1f') if p is not None else 'OOM' for B, p in r['peaks'].items()}
            out.append((r['peer'], *(peaks.get(B, '') for B in sizes), r['batch']))
    return '\n'.join([table(out)] + [f"{r['peer']}: FAILED, {r['error']}" for r in rows if 'error' in r])


# ---- kernels -----------------------------------------------------------------------------------------------


def kernel_cases(c):
    """name -> () -> (arguments, {who: function}, unit, forward cost, backward cost). The cost is what must be moved
    (bytes) or computed (FLOP): the roofline. One entry per kernel of kernels.py; one that is not there is left out."""
    N, D, V, H, Hkv, hd = c.batch * c.seq_len, c.n_embd, c.vocab_size, c.n_head, c.n_kv_head, c.n_embd // c.n_head
    dtype = torch.bfloat16 if c.device == 'cuda' else torch.float32
    size, M = dtype.itemsize, N // 2                                    # M: masked rows
    rand = lambda *shape, dtype=dtype: torch.randn(shape, device=c.device, dtype=dtype).requires_grad_()
    ones = lambda n: torch.ones(n, device=c.device).requires_grad_()
    batch = make_batch(SimpleNamespace(**vars(c) | dict(packed=True)), c.batch).to(c.device)
    pairs = sum(int(n) ** 2 for row in batch.doc.cpu() for n in row.bincount())

    def liger(name):                    # imported where it is used: an absent Liger is an error of that line only
        return lambda *args: getattr(importlib.import_module('liger_kernel.ops'), name).apply(*args)

    def rms_norm():
        return ([rand(N, D), ones(D)], dict(
            ours=lambda x, w: K.rms_norm(x, w, 1e-6), ref=lambda x, w: K.rms_norm_ref(x, w, 1e-6),
            liger=lambda x, w: liger('LigerRMSNormFunction')(x, w, 1e-6, 0.0, 'llama', False)),
            'bytes', 2 * N * D * size, 3 * N * D * size)

    def swiglu():
        return ([rand(N, 2 * c.n_ff)], dict(
            ours=K.swiglu, ref=K.swiglu_ref, liger=liger('LigerFusedGateUpSiLUMulFunction')),
            'bytes', 3 * N * c.n_ff * size, 5 * N * c.n_ff * size)

    def linear_cross_entropy():         # the forward computes the gradients, too
        targets, a = torch.randint(0, V - 1, (M,), device=c.device), torch.rand(M, device=c.device)
        with_column = lambda f: lambda h, w: f(h, w.to(h.dtype), targets, a, skip_col=V - 1)[0]
        return ([rand(M, D), (0.02 * rand(V, D, dtype=torch.float32)).detach().requires_grad_()], dict(
            ours=with_column(K.linear_cross_entropy), ref=with_column(K.linear_cross_entropy_ref),
            liger=lambda h, w: LigerCE.apply(h, w.to(h.dtype), targets, a, True)),
            'FLOP', 6 * M * V * D, 0)

    def attention():
        q, k = rand(c.batch, H, c.seq_len, hd), rand(c.batch, Hkv, c.seq_len, hd)
        mask, blocks = K.ranges_to_mask(batch.ranges), attention_mask('flex', batch.doc)
        dense = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=H != Hkv)
        return ([q, k, rand(*k.shape)], dict(
            ours=lambda q, k, v: K.attention(q, k, v, batch.ranges),
            ref=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=H != Hkv),
            flex=torch.compile(lambda q, k, v: flex(None, q, k, v, blocks)[0].transpose(1, 2), dynamic=False),
            without_documents=dense),
            'FLOP', 4 * H * hd * pairs, 10 * H * hd * pairs)

    return {f.__name__: f for f in (rms_norm, swiglu, linear_cross_entropy, attention) if hasattr(K, f.__name__)}


def median_ms(f, device):
    """Median over many calls, each with a cold L2 cache on a GPU."""
    if device == 'cuda':
        from triton.testing import do_bench
        return do_bench(f, return_mode='median')
    times = []
    for _ in range(3):
        started = time.perf_counter(); f()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def measure(c, arguments, f, answer):
    """Forward and backward ms, peak MiB on top of the arguments, relative error against `answer`, the outputs and
    gradients of the reference (None: this is the reference)."""
    on_gpu = c.device == 'cuda'
    if on_gpu: torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
    outs = f(*arguments)
    outs = [outs] if torch.is_tensor(outs) else [y for y in outs if y.requires_grad]
    torch.manual_seed(0)
    backs = [torch.randn_like(y) for y in outs]
    backward = lambda: torch.autograd.grad(outs, arguments, backs, retain_graph=True)
    found = [x.detach() for x in (*outs, *backward())]
    peak = (torch.cuda.max_memory_allocated() - before) / 2 ** 20 if on_gpu else None
    errors = [((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(found, answer or found)]
    return found, dict(forward_ms=median_ms(lambda: f(*arguments), c.device), backward_ms=median_ms(backward, c.device),
                       peak_mib=peak, error=max(errors))


def run_kernels(c, report):
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False                      # compiled backwards run more than once here
    n = 8192 if c.device == 'cuda' else 256
    x = torch.randn(n, n, device=c.device, dtype=torch.bfloat16 if c.device == 'cuda' else torch.float32)
    y = torch.empty(16, *x.shape, device=c.device, dtype=x.dtype)
    roof = {'FLOP': 2 * n ** 3 / median_ms(lambda: x @ x, c.device) * 1e3,
            'bytes': 2 * y.nbytes / median_ms(lambda: y.copy_(x), c.device) * 1e3}
    del x, y
    rows = []
    for name, make in kernel_cases(c).items():
        arguments, ways, unit, forward, backward = make()
        ways = dict(ref=ways['ref'], compiled=torch.compile(ways['ref'], dynamic=False)) | ways
        answer = None
        for way, f in ways.items():
            row = dict(kernel=name, way=way, unit=unit)
            try:
                found, facts = measure(c, arguments, f, answer)
                answer = answer or found
                both = facts['forward_ms'] + facts['backward_ms']
                row |= facts | dict(forward_share=forward / facts['forward_ms'] * 1e3 / roof[unit],
                                    backward_share=backward / facts['backward_ms'] * 1e3 / roof[unit],
                                    rate=(forward + backward) / both * 1e3)
            except (Exception, SystemExit) as e: row['failure'] = f'{type(e).__name__}: {e}'[:300]
            rows.append(row)
            report(dict(roofline=roof, rows=rows))
            gc.collect()
        del arguments, ways, answer


def kernel_table(results):
    roof = results['roofline']
    out = [('kernel', 'way', 'forward ms', 'backward ms', 'rate', 'of the roof: fwd', 'bwd', 'peak MiB', 'error')]
    for r in results['rows']:
        if 'failure' in r: continue
        rate = f"{r['rate'] / 1e12:.0f} TFLOP/s" if r['unit'] == 'FLOP' else f"{r['rate'] / 1e9:.0f} GB/s"
        out.append((r['kernel'], r['way'], f"{r['forward_ms']:.3f}", f"{r['backward_ms']:.3f}", rate,
                    f"{r['forward_share']:.0%}", f"{r['backward_share']:.0%}", number(r['peak_mib'], '.0f'),
                    f"{r['error']:.0e}"))
    failed = [f"{r['kernel']}, {r['way']}: FAILED, {r['failure']}" for r in results['rows'] if 'failure' in r]
    return '\n'.join([table(out), f"roofline: matmul {roof['FLOP'] / 1e12:.0f} TFLOP/s, "
                      f"copy {roof['bytes'] / 1e12:.2f} TB/s", *failed])


if __name__ == '__main__':
    what = 'train'                  # train, memory or kernels: the first word of the command line
    peers = ''                      # comma list; default: all that fit the rows
    packed = False                  # rows of several documents; else a row is one document
    doc_len = 300.0                 # their mean length; lognormal, sigma 1
    largest = False                 # train: each peer at the largest micro-batch that fits
    max_batch = 512                 # the search for it ends there
    batch = 16                      # rows per micro-batch
    seq_len = 1024
    vocab_size = 151936             # the shape of Qwen2.5-0.5B
    n_layer = 24
    n_head = 14
    n_kv_head = 2
    n_embd = 896
    n_ff = 4864
    residual = 'fp32'               # transformers' residual stream: fp32 (what autocast makes of it) or bfloat16 (as ours)
    rounds = 2                      # turns of each peer: A B .. B A
    warmup = 10                     # steps before the clock starts, in each turn
    steps = 25                      # timed steps of a turn
    profile = False                 # train: our step's kernels by GPU time, a chrome trace in out_dir
    peak_tflops = 989.0             # dense bf16 peak of the device, for MFU
    seed = 0
    device = ''                     # cuda or cpu; default: cuda when there is one
    out_dir = 'out/bench'
    result = ''                     # results/x.json; default: in out_dir
    from configurator import configure
    words = sys.argv[1:]
    if words and words[0].isalpha(): words[0] = f'--what={words[0]}'
    config = configure(globals(), words)
    started, modes = time.time(), ('train', 'memory', 'kernels')
    if what not in modes: raise SystemExit(f"say python bench.py {' or '.join(modes)}, not {what!r}")
    if not peers: config['peers'] = 'ours' if profile else PACKED if packed else DENSE
    for name in config['peers'].split(','):
        if name not in PEERS: raise SystemExit(f"unknown peer {name!r}: --peers is a comma list of {', '.join(PEERS)}")
        if 'attn' in PEERS[name] and not packed: raise SystemExit(f"{name} is for packed rows: add --packed=true")
    if n_embd % n_head or n_head % n_kv_head or min(batch, seq_len, rounds, warmup, steps) < 1:
        raise SystemExit("n_embd must be a multiple of n_head, that of n_kv_head; counts must be at least 1")
    if residual not in ('fp32', 'bfloat16'): raise SystemExit(f"residual must be fp32 or bfloat16, got {residual!r}")
    config['device'] = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    c = SimpleNamespace(**config)
    path = Path(result or f'{out_dir}/{what}.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    def report(results):
        """Everything so far into the file, the newest table on the screen."""
        facts = provenance(c.device, started)
        for package in ('transformers', 'liger_kernel', 'triton'):
            try: facts['versions'][package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError: facts['versions'][package] = None
        write_json(path, facts | dict(results=results, config=config))
        show = dict(train=train_table, memory=memory_table, kernels=kernel_table)[what]
        print(f"\n{time.time() - started:.0f} s\n{show(results)}", flush=True)
    if what == 'kernels': run_kernels(c, report)
    else: run_peers(c, config, config['peers'].split(','), report)
    print(f"wrote {path}")
