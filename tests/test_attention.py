"""Attention over ranges against a softmax that is written out, in fp64 with autograd.

A case is a dense mask `visible` and the ranges that should mean the same. Where kernels.py has a constructor, the
ranges come from it and the mask from the words of its docstring; else `ranges_of` reads the ranges off the mask, in
every odd way that the contract allows. The same cases run on three machines: the torch path here; the Triton kernels
in their interpreter, in one subprocess that this file is the script of (`python tests/test_attention.py`), tiny, in
fp32 and fp16 (its bf16 dot is wrong); and on a GPU if there is one, larger.
"""
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import kernels as K
from ar import AR
from model import ModelConfig, Transformer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


# -- cases ---------------------------------------------------------------------------------------------------


def row(*lengths):
    """Document numbers of a row: 3, -2, 4 -> 0 0 0 . . 2 2 2 2 (negative: padding)."""
    return torch.cat([torch.full((abs(n),), i if n > 0 else -1) for i, n in enumerate(lengths)])


def documents(*rows, causal=False):
    doc = torch.stack(rows)
    run = F.pad(((doc[:, 1:] != doc[:, :-1]) | (doc[:, 1:] < 0)).cumsum(1), (1, 0))      # padding: each its own
    visible, ranges = run[:, :, None] == run[:, None], K.document_ranges(doc)
    return (visible.tril(), K.causal_ranges(ranges)) if causal else (visible, ranges)


def cached(pad, past, T):
    """The queries past..T-1 of rows with left padding, causal, over T keys."""
    visible, ranges = documents(*(row(-p, T - p) if p else row(T) for p in pad), causal=True)
    return visible[:, past:], K.last_queries(ranges, past)


def ranges_of(visible, seed=0, order=None):
    """R = 2 ranges of a mask whose rows and columns are at most two runs: in rising order (1), falling (-1) or by
    chance (None). A single run comes with an empty range or, by chance, in two pieces that overlap."""
    g = torch.Generator().manual_seed(seed)
    def pick(n): return int(torch.randint(n, (), generator=g))
    def spans(line):
        edge = F.pad(line.int(), (1, 1)).diff().nonzero().squeeze(1).tolist()
        runs = list(zip(edge[::2], edge[1::2]))
        assert len(runs) <= 2
        if order is None and len(runs) == 1 and runs[0][1] - runs[0][0] > 1 and pick(2):
            (start, end), = runs
            cut = start + 1 + pick(end - start - 1)
            runs = [(start, min(cut + pick(4), end)), (max(cut - pick(4), start), end)]
        runs += [((0, 0), (7, 2))[pick(2)] for _ in range(2 - len(runs))]
        return runs[::order or 1 - 2 * pick(2)]
    def table(mask): return torch.tensor([[spans(line) for line in m] for m in mask], dtype=torch.int32)
    return K.Ranges(table(visible), table(visible.mT))


def block_diffusion(doc, block, order):
    """[xt; x0]: xt sees its block of xt and the blocks of x0 before it; x0 sees x0 up to its own block."""
    pos = torch.cat([torch.arange(int((doc == d).sum())) for d in doc.unique_consecutive()])
    doc, block, clean = doc.repeat(2), (pos // block).repeat(2), torch.arange(2 * len(doc)) >= len(doc)
    q, k = (slice(None), None), (None, slice(None))
    visible = (doc[q] == doc[k]) & torch.where(clean[k], block[k] < block[q] + clean[q].long(),
                                               ~clean[q] & (block[q] == block[k]))
    return visible[None], ranges_of(visible[None], order=order)


def empty():
    """Nothing to see for the first 40 queries and some others; nobody looks at the keys 20..66."""
    visible = torch.zeros(1, 70, 70).bool()
    visible[0, 40:60, :20], visible[0, 64:, 67:] = True, True
    return visible, ranges_of(visible)


def band(T, width):
    i = torch.arange(T)
    visible = ((i[:, None] - i).abs() <= width)[None]
    return visible, ranges_of(visible, seed=1)


def two_windows(T):
    """Two far-away windows per query, which become one in some tiles: the block lists overlap."""
    i = torch.arange(T)
    a, b = (i[:, None] // 8 - i // 8).abs() <= 1, (i[:, None] + i - T).abs() <= 3
    visible = (a | b)[None]
    keep = F.pad(visible.int(), (1, 1)).diff().abs().sum(-1) <= 4                       # at most two runs
    visible = visible & keep[:, :, None] & keep[:, None]
    return visible, ranges_of(visible, seed=2)


@functools.cache
def cases(k):
    """name -> (mask, ranges, query heads, key heads, head_dim, dtype, gain of the logits); k stretches lengths."""
    f, h = torch.float32, torch.float16
    return {
        'whole': (*documents(row(70 * k)), 2, 2, 32, f, 1),
        'documents': (*documents(row(-3 * k, 20 * k, 1, 29 * k, 13 * k, -5 * k + 1)), 2, 1, 64, f, 1),
        'many': (*documents(row(*[1, 2, 7, -1, 3, 5, 11, 1] * (2 * k), 9)), 2, 2, 16, f, 1),
        'causal': (*documents(row(35 * k, 2, 32 * k, -1), causal=True), 2, 1, 32, f, 1),
        'padded': (*documents(row(-30 * k, 40 * k), row(11 * k, -59 * k)), 1, 1, 32, f, 1),
        'groups of 7': (*documents(row(12 * k, 8 * k, 10 * k, -1)), 7, 1, 16, f, 1),
        'cache': (*cached([0, 9 * k], 37 * k, 70 * k), 2, 1, 32, f, 1),
        'one query': (*cached([0, 5], 69 * k, 69 * k + 1), 4, 2, 32, f, 1),
        'empty': (*empty(), 2, 1, 32, f, 1),
        'band': (*band(70 * k, 10), 2, 1, 32, f, 1),
        'two windows': (*two_windows(72 * k), 2, 1, 32, f, 1),
        'block diffusion': (*block_diffusion(row(47 * k, 23 * k), 4, order=1), 1, 1, 16, f, 1),
        'odd head_dim': (*documents(row(17, 16)), 4, 2, 24, f, 1),
        'large logits': (*documents(row(20 * k, 13 * k)), 2, 2, 32, f, 30),
        'fp16 tiles': (*documents(row(70 * k, 74 * k, -6)), 2, 1, 64, h, 1),
        'fp16 block diffusion': (*block_diffusion(row(40 * k, 37 * k), 16, order=-1), 1, 1, 64, h, 1)}


# -- the oracle ----------------------------------------------------------------------------------------------


def softmax_attention(q, k, v, visible):
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    s = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible[:, None], -torch.inf)
    p = (s - s.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return p / p.sum(-1, keepdim=True).clamp(min=1e-300) @ v


@contextlib.contextmanager
def poisoned():
    """Outputs start as NaN: what no program writes shows."""
    new = torch.Tensor.new_empty
    def fresh(*args, **kw):
        t = new(*args, **kw)
        return t.fill_(torch.nan) if t.is_floating_point() else t
    torch.Tensor.new_empty = fresh
    try: yield
    finally: torch.Tensor.new_empty = new


def inputs(visible, H, Hkv, hd, dtype, gain, device, seed):
    """q, k, v as views: of one fused (B, T, H + 2 Hkv, hd), or of a cache that is NaN where it is not filled."""
    g = torch.Generator().manual_seed(seed)
    B, Tq, Tk = visible.shape
    def new(*shape): return torch.randn(shape, generator=g).to(device, dtype)
    if Tq == Tk:
        q, k, v = (x.transpose(1, 2) for x in new(B, Tq, H + 2 * Hkv, hd).split([H, Hkv, Hkv], 2))
        q *= gain
    else:
        q, k, v = new(B, Tq, H, hd).transpose(1, 2) * gain, new(B, Hkv, Tk + 5, hd), new(B, Hkv, Tk + 5, hd)
        for x in (k, v): x[:, :, Tk:] = torch.nan
        k, v = k[:, :, :Tk], v[:, :, :Tk]
    return q, k, v, new(B, Tq, H, hd).transpose(1, 2)


def errors(visible, ranges, H, Hkv, hd, dtype, gain=1, device='cpu', seed=0):
    """Largest error of o, dq, dk, dv, relative to the largest entry. NaN means NaN."""
    ranges = K.Ranges(*(r.to(device) for r in ranges))
    q, k, v, do = inputs(visible, H, Hkv, hd, dtype, gain, device, seed)
    before = [x.clone() for x in (q, k, v, do, *ranges)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned():
        o = K.attention(*leaves, ranges)
        grads = torch.autograd.grad(o, leaves, do)
    for a, b in zip(before, (q, k, v, do, *ranges)): assert torch.equal(a, b), "an input was modified"
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = softmax_attention(*exact, visible.to(device))
    pairs = zip('o dq dk dv'.split(), (o, *grads), (want, *torch.autograd.grad(want, exact, do.double())))
    out = {}
    for name, a, b in pairs:
        assert a.shape == b.shape and a.dtype == dtype, f"{name} {a.shape=} {b.shape=} {a.dtype=}"
        out[name] = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    nothing = ~visible.any(-1).to(device)
    assert not o.transpose(1, 2)[nothing].any(), "a query that sees nothing has an output"
    return out


def small(error, dtype, gain=1):
    limit = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2, torch.float64: 1e-12}[dtype]
    if gain > 1: limit *= 10            # softmax near one-hot: ds is a difference of nearly equal numbers
    assert all(e <= limit for e in error.values()), f"{error} > {limit}"                 # NaN is not small


# -- ranges --------------------------------------------------------------------------------------------------


def dense(spans, n):
    """(B, T, R, 2) -> (B, T, n), by loops."""
    mask = torch.zeros(*spans.shape[:2], n).bool()
    for b, line in enumerate(spans.tolist()):
        for i, ranges in enumerate(line):
            for start, end in ranges: mask[b, i, start:max(start, end)] = True
    return mask


@pytest.mark.parametrize('name', cases(1))
def test_ranges_and_their_transpose(name):
    """Both halves say what the mask says; the backward trusts by_key."""
    visible, ranges = cases(1)[name][:2]
    assert torch.equal(dense(ranges.by_query, visible.shape[2]), visible)
    assert torch.equal(dense(ranges.by_key, visible.shape[1]).mT, visible)
    assert torch.equal(K.ranges_to_mask(ranges)[:, 0], visible)
    assert all(r.dtype == torch.int32 for r in ranges)


# -- the torch path ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', cases(1))
def test_reference(name):
    visible, ranges, H, Hkv, hd, _, gain = cases(1)[name]
    small(errors(visible, ranges, H, Hkv, hd, torch.float64, gain), torch.float64)


def test_what_it_refuses():
    ranges = documents(row(6))[1]
    def call(H=2, Hkv=1, T=6, hd=8, **kw):
        return K.attention(torch.zeros(1, H, T, hd), *torch.zeros(2, 1, Hkv, 6, hd), ranges, **kw)
    assert call().shape == (1, 2, 6, 8)
    for bad in (dict(H=3, Hkv=2), dict(T=5), dict(causal=True)):
        with pytest.raises(AssertionError): call(**bad)
    with pytest.raises(AssertionError, match='stride'):
        K.attention(torch.zeros(1, 1, 8, 6).mT, *torch.zeros(2, 1, 1, 6, 8), ranges)


# -- Triton, interpreted -------------------------------------------------------------------------------------


def tiny_model(causal=False, **kw):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=31, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16,
                                   causal=causal, **kw))


def model_grads(model, ids, ranges):
    model.zero_grad()
    h = model.hidden(ids, ranges)
    (h * h.detach().cos()).sum().backward()
    return [h.detach(), *(p.grad.clone() for p in model.parameters())]


def composition(device, backend, autocast=False):
    """Blocks plain, checkpointed, compiled, and both, against the torch path. No dense mask is built."""
    doc = row(13, 20, -7)[None].to(device)
    ids = torch.randint(31, doc.shape, generator=torch.Generator().manual_seed(1)).to(device)
    model = tiny_model().to(device)
    blocks = list(model.layers)
    def run():
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model_grads(model, ids, K.document_ranges(doc))
    kernels, K.KERNELS = K.KERNELS, 'torch'
    want = run()
    K.KERNELS, to_mask, K.ranges_to_mask = kernels, K.ranges_to_mask, None
    def rechecked(f): return lambda *args: checkpoint(f, *args, use_reentrant=False)
    def compiled(f): return torch.compile(f, dynamic=False, fullgraph=True, backend=backend)
    ways = dict(plain=lambda f: f, checkpoint=rechecked, compile=compiled, both=lambda f: compiled(rechecked(f)))
    out = {}
    for name, way in ways.items():
        for b in blocks: b.forward = way(type(b).forward.__get__(b))
        out[name] = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-2)).item() for a, b in zip(run(), want))
    K.ranges_to_mask = to_mask
    return out


def sampling(device):
    """Greedy AR decoding with a cache: prompts of three lengths, one query per step. The same tokens twice."""
    model = AR(tiny_model(causal=True, tied=False).to(device), separator=1)
    kernels, out = K.KERNELS, []
    for K.KERNELS in (kernels, 'torch'):
        out.append(model.sample([[5, 3, 8], [7], []], max_new_tokens=4, temperature=0)[0])
    K.KERNELS = kernels
    return out


def expanded(device):
    """The gradient of a sum has no strides at all."""
    visible, ranges, H, Hkv, hd, dtype, _ = cases(1)['documents']
    q, k, v, _ = inputs(visible, H, Hkv, hd, dtype, 1, device, 3)
    v.requires_grad_()
    got, = torch.autograd.grad(K.attention(q, k, v, K.Ranges(*(r.to(device) for r in ranges))).sum(), v)
    want, = torch.autograd.grad(softmax_attention(q.double(), k.double(), v.double(), visible.to(device)).sum(), v)
    return (got - want).abs().max().item()


def interpret():
    """What the subprocess prints."""
    out = {}
    for name, (*case, dtype, gain) in cases(1).items():
        try: out[name] = errors(*case, dtype, gain, seed=len(name))
        except Exception as e: out[name] = f'{type(e).__name__}: {e}'
    *case, dtype, gain = cases(1)['groups of 7']
    out |= dict(composition=composition('cpu', 'aot_eager'), sampling=sampling('cpu'), expanded=expanded('cpu'))
    print(json.dumps(out))


def compile_for(arch, hopper, op, hd, R):
    """Registers, bytes of stack (spills) and of shared memory of one kernel, compiled without a GPU."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    kernel = dict(fwd=K._attention_fwd, dq=K._attention_bwd_dq, dkdv=K._attention_bwd_dkdv)[op]
    BM, BN, num_warps, num_stages = K.ATTENTION_TILES[op, hd][not hopper]
    constants, aligned = dict(scale=0.18, G=7, R=R, HD=hd, BM=BM, BN=BN), {}
    types = dict.fromkeys(constants, 'constexpr') | dict.fromkeys(('by_query', 'by_key'), '*i32')
    types |= dict.fromkeys('qb qh qt kb kh kt vb vh vt Tq Tk'.split(), 'i32') | dict(lse='*fp32', delta='*fp32')
    signature = {name: types.get(name, '*bf16') for name in kernel.arg_names}
    for i, name in enumerate(kernel.arg_names):
        if name not in (*constants, 'Tq', 'Tk'): aligned[i,] = [['tt.divisibility', 16]]
    binary = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget('cuda', arch, 32),
                     options=dict(num_warps=num_warps, num_stages=num_stages))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(binary.asm['cubin']); f.flush()
        tool = Path(nvidia.__file__).parent / 'bin/cuobjdump'
        usage = subprocess.run([tool, '-res-usage', f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    return registers, stack, binary.metadata.shared


def compile_all():
    shapes = [(op, hd, 2) for op in ('fwd', 'dq', 'dkdv') for hd in (64, 128)] + [('dkdv', 64, 1)]
    for arch, hopper in ((90, True), (80, False)):
        for shape in shapes: print(json.dumps([arch, *shape, *compile_for(arch, hopper, *shape)]), flush=True)


@pytest.fixture(scope='module')
def subprocesses():
    """Both at once, started at the first test that needs one."""
    clean = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'KERNELS')}
    def start(what, **env):
        return subprocess.Popen([sys.executable, __file__, what], env=clean | env | dict(OMP_NUM_THREADS='1'),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = dict(interpret=start('interpret', TRITON_INTERPRET='1', KERNELS='triton'), compile=start('compile'))
    yield running
    for process in running.values(): process.kill()


@pytest.fixture(scope='module')
def interpreted(subprocesses):
    out, err = subprocesses['interpret'].communicate()
    assert subprocesses['interpret'].returncode == 0, err[-2000:]
    return json.loads(out)


version = getattr(K.triton, '__version__', '')
needs_triton = pytest.mark.skipif(not version, reason='no Triton here')
needs_interpreter = pytest.mark.skipif(
    not version or (version.startswith('3.6') and np.lib.NumpyVersion(np.__version__) >= '2.4.0'),
    reason="no Triton here, or one whose interpreter fails in `range` with this numpy")


@needs_interpreter
@pytest.mark.parametrize('name', cases(1))
def test_interpreted(interpreted, name):
    assert isinstance(interpreted[name], dict), interpreted[name]
    small(interpreted[name], *cases(1)[name][5:])


@needs_interpreter
def test_composition(interpreted):
    """Autograd, checkpointing and torch.compile around the operator, in a model; and sampling with a cache."""
    small(interpreted['composition'], torch.float32, gain=10)
    ours, torchs = interpreted['sampling']
    assert ours == torchs
    assert interpreted['expanded'] < 1e-5


@needs_triton
def test_no_spills(subprocesses):
    """The bf16 kernels, compiled for sm_90 and sm_80: all registers, and shared memory that the card has (sm_80's
    tiles are also for cards with 99 KB)."""
    out, err = subprocesses['compile'].communicate()
    assert subprocesses['compile'].returncode == 0, err[-2000:]
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 14
    for arch, *what, registers, stack, shared in results:
        assert stack == 0, f"{arch} {what} spills: {registers} registers, {stack} bytes of stack"
        assert shared <= {90: 227, 80: 99}[arch] * 1024, f"{arch} {what}: {shared} bytes of shared memory"


# -- Triton on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('name', cases(1))
def test_gpu(name):
    for k in (1, 11):
        *case, _, gain = cases(k)[name]
        small(errors(*case, torch.bfloat16, gain, 'cuda', seed=k), torch.bfloat16, gain)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('hd,dtype', [(64, torch.float16), (64, torch.float32), (128, torch.bfloat16),
                                      (256, torch.bfloat16)], ids=str)
@pytest.mark.parametrize('name', ['causal', 'block diffusion'])
def test_gpu_head_dims_and_dtypes(name, hd, dtype):
    visible, ranges, *_ = cases(11)[name]
    small(errors(visible, ranges, 4, 2, hd, dtype, 1, 'cuda'), dtype)


@pytest.mark.gpu
@on_gpu
def test_gpu_same_bits():
    visible, ranges = documents(row(300, 500, 224), row(1000, -24))
    ranges = K.Ranges(*(r.cuda() for r in ranges))
    q, k, v, do = inputs(visible, 14, 2, 64, torch.bfloat16, 1, 'cuda', 0)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    def run():
        o = K.attention(*leaves, ranges)
        return o, *torch.autograd.grad(o, leaves, do)
    first = run()
    for _ in range(5): assert all(map(torch.equal, first, run()))
    assert first[0].transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('autocast', [False, True])
def test_gpu_composition(autocast):
    out = composition('cuda', 'inductor', autocast)
    assert max(out.values()) < (5e-2 if autocast else 1e-3), out
    ours, torchs = sampling('cuda')
    assert ours == torchs
    assert expanded('cuda') < 1e-4


@pytest.mark.gpu
@on_gpu
def test_gpu_operator():
    """PyTorch's own checks of a custom operator: schema, fake shapes and strides, autograd, dynamic shapes."""
    q, k, v = (torch.randn(1, 2, 128, 64, device='cuda', requires_grad=True) for _ in range(3))    # fills its tiles
    ranges = K.document_ranges(torch.zeros(1, 128, device='cuda').long())
    torch.library.opcheck(K._attention.op, (q, k, v, *ranges, 0.18))


if __name__ == '__main__':
    dict(interpret=interpret, compile=compile_all)[sys.argv[1]]()
