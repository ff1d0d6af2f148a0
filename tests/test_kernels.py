"""The Triton kernels against their references in fp64: on a GPU, or in Triton's interpreter, which a subprocess runs
because it must be chosen before triton is imported. And, without any GPU, what the compiler makes of them for an H100.

A kernel here gets odd sizes, strided inputs, buffers full of NaN instead of fresh ones, and a random gradient for
every output; its inputs must be unchanged afterwards.
"""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels as K
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if GPU else 'cpu'
kernel = pytest.mark.skipif(not (GPU or INTERPRETED), reason='needs a GPU or the interpreter: a subprocess does it')
DTYPES = [torch.float32, torch.bfloat16]
TOL = {torch.float32: 1e-5, torch.bfloat16: 0.012 if GPU else 0.03}          # the interpreter truncates to bf16


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN: what a kernel forgets to write shows."""
    def poisoned(make):
        def fresh(*args, **kw):
            t = make(*args, **kw)
            return t.fill_(float('nan')) if t.is_floating_point() and t.device.type != 'meta' else t
        return fresh
    if GPU or INTERPRETED:
        for owner, name in ((torch, 'empty'), (torch, 'empty_like'), (torch.Tensor, 'new_empty')):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def small(monkeypatch):
    """Loops that take one turn at small sizes take several."""
    monkeypatch.setattr(K, 'PROGRAMS', 3)
    monkeypatch.setattr(K, 'CE_ROWS', dict(BLOCK=256, GROUP=16, num_warps=4))
    monkeypatch.setattr(K, 'SWIGLU', dict(BLOCK=128, num_warps=4))


def close(got, want, tol, what=''):
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"{what} {got.shape=} {want.shape=}"
    error = (got - want).abs().max().item() if got.numel() else 0.0
    size = max(want.abs().max().item() if want.numel() else 0.0, 1e-30)
    assert error <= tol * size, f"{what} error {error:.3g} of {size:.3g}"


def check(fn, ref, *inputs, tol=None, **settings):
    """Outputs and gradients of fn against those of ref in fp64; the tolerance is relative to the largest entry."""
    g = torch.Generator().manual_seed(1)
    exact = [x if x is None or not x.is_floating_point() else x.detach().double().requires_grad_(x.requires_grad)
             for x in inputs]
    before = [None if x is None else x.detach().clone() for x in inputs]
    tuples = lambda y: y if isinstance(y, tuple) else (y,)
    got, want = tuples(fn(*inputs, **settings)), tuples(ref(*exact, **settings))
    up = [torch.randn(y.shape, generator=g).to(y.device, y.dtype) for y in got]
    low = min((x.dtype for x in inputs if x is not None and x.is_floating_point()), key=lambda d: d.itemsize)
    for i, (a, b) in enumerate(zip(got, want, strict=True)): close(a, b, tol or TOL[low], f'output {i}')
    leaves = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    grad = lambda ys, xs: torch.autograd.grad(ys, [xs[i] for i in leaves], [u.to(y.dtype) for u, y in zip(up, ys)])
    for i, a, b in zip(leaves, grad(got, inputs), grad(want, exact)):
        assert a.dtype == inputs[i].dtype
        close(a, b, tol or TOL[low], f'gradient of input {i}')
    for x, old in zip(inputs, before): assert x is None or torch.equal(x, old), "an input was changed"
    return got


def randn(*shape, seed=0, dtype=torch.float32, grad=True, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * scale).to(DEVICE, dtype).requires_grad_(grad)


# -- the kernels of a block ----------------------------------------------------------------------------------


@kernel
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(7, 896), (2, 3, 70), (1, 3)])
def test_rms_norm(shape, dtype, small):
    x, residual = (randn(*shape, seed=i, dtype=dtype) for i in (0, 1))
    weight = 1 + randn(shape[-1], seed=2, scale=0.5, grad=False)                # fp32 masters beside bf16
    weight.requires_grad_()
    check(K.rms_norm, K.rms_norm_ref, x, weight, eps=1e-6)
    check(K.rms_norm, K.rms_norm_ref, x.detach() * 1e-4, weight, eps=1e-6)      # where eps counts
    check(K.add_rms_norm, K.add_rms_norm_ref, x, residual, weight, eps=1e-6)
    if shape == (7, 896): check(K.rms_norm, K.rms_norm_ref, x.detach().repeat(1, 2)[:, ::2].requires_grad_(), weight,
                                eps=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='the interpreter truncates to bf16')
def test_rms_norm_rounds_as_hugging_face(small):
    """Bit for bit (but for ties that the order of a sum decides): the sum is rounded before the norm, the norm before
    the weight."""
    x, residual = (randn(64, 896, seed=i, dtype=torch.bfloat16, grad=False) for i in (0, 1))
    weight = randn(896, seed=2, grad=False)
    (y, s), (y_ref, s_ref) = (f(x, residual, weight, 1e-6) for f in (K.add_rms_norm, K.add_rms_norm_ref))
    assert torch.equal(s, s_ref) and (y == y_ref).float().mean() > 0.999
    assert (K.rms_norm(x, weight, 1e-6) == K.rms_norm_ref(x, weight, 1e-6)).float().mean() > 0.999
    for late in (K.add_rms_norm_ref(x.float(), residual.float(), weight, 1e-6)[0].bfloat16(),
                 K.rms_norm_ref(s_ref.float(), weight, 1e-6).bfloat16()): assert (late == y_ref).float().mean() < 0.9


@kernel
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('H, HKV, hd', [(2, 1, 64), (1, 1, 24), (2, 0, 16), (0, 1, 16)])
def test_rope_qkv(H, HKV, hd, normed, dtype, small):
    """Positions differ between rows; the widths of heads need not be powers of 2; there may be no q, or no k and v."""
    B, T = 2, 35
    qkv = randn(B, T, H + 2 * HKV, hd, dtype=dtype)
    pos = torch.arange(T).repeat(B, 1) + torch.tensor([[0], [100]])
    cos, sin = K.rope_tables(pos.to(DEVICE), hd, 1e4)
    weights = [(1 + randn(hd, seed=i, grad=False)).requires_grad_() if normed else None for i in (1, 2)]
    fn = lambda *x: K.rope_qkv(*x[:3], H, HKV, *x[3:])
    ref = lambda *x: K.rope_qkv_ref(*x[:3], H, HKV, *x[3:])
    q, k, v = check(fn, ref, qkv, cos, sin, *weights)
    assert torch.equal(v, qkv[:, :, H + HKV:]) and (not HKV or v.data_ptr() != qkv[:, :, H + HKV:].data_ptr())
    if normed and dtype == torch.float32:                       # the gradients come in attention's layout
        y = torch.cat([x.transpose(1, 2) for x in fn(qkv, cos, sin, *weights)], 1)
        up = randn(*y.shape, seed=5, grad=False)
        want = torch.cat([x.transpose(1, 2) for x in ref(qkv, cos, sin, *weights)], 1)
        close(*(torch.autograd.grad(z, qkv, up)[0] for z in (y, want)), tol=1e-5)


@kernel
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(2, 2, 300), (1, 256), (3, 2)])
def test_swiglu(shape, dtype, small):
    check(K.swiglu, K.swiglu_ref, randn(*shape, dtype=dtype))
    check(K.swiglu, K.swiglu_ref, randn(*shape, dtype=dtype, scale=100))        # sigmoid saturates, nothing overflows


@kernel
@pytest.mark.parametrize('dtype', DTYPES)
def test_modulate(dtype, small):
    B, T, D = 2, 5, 70
    x, h = (randn(B, T, D, seed=i, dtype=dtype) for i in (0, 1))
    scale, shift, gate = randn(B, 3 * D, seed=2, dtype=dtype, grad=False).chunk(3, -1)          # strided, as in a DiT
    scale, shift, gate = (t.detach().requires_grad_() for t in (scale, shift, gate))
    check(K.modulate, K.modulate_ref, x, scale, shift)
    check(K.add_modulate, K.add_modulate_ref, x, h, gate, scale, shift)
    one = [t.detach()[:1].requires_grad_() for t in (gate, scale, shift)]                       # for all
    check(K.modulate, K.modulate_ref, x, *one[1:])
    check(K.add_modulate, K.add_modulate_ref, x, h, *one)


@kernel
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16 if GPU else torch.float16], ids=['fp32', '16 bits'])
@pytest.mark.parametrize('B, N, M, M2, H, hd', [(2, 5, 5, 0, 3, 24), (1, 70, 70, 9, 2, 64), (3, 17, 66, 0, 2, 32),
                                                (2, 3, 1, 70, 1, 6)])
def test_rope_attention(B, N, M, M2, H, hd, dtype, monkeypatch):
    """Of one projection and of two, tiles and blocks that are not full, some or none of the other keys seen."""
    own = randn(B, N, 3 * H, hd, dtype=dtype, grad=False)
    q, kv = own[:, :, :H], own[:, :, H:] if N == M else randn(B, M, 2 * H, hd, seed=1, dtype=dtype, grad=False)
    rots = [K.rope_tables(torch.arange(n, device=DEVICE).expand(B, n) * 1.5 - 3, hd, 1e2) for n in (N, M)]
    q_weight, k_weight = (1 + randn(hd, seed=i, grad=False) / 2 for i in (2, 3))
    other = tuple(randn(B, M2, H, hd, seed=i, dtype=dtype, grad=False) for i in (4, 5)) if M2 else None
    mask = torch.ones(B, 1, 1, M2 + M, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :max(M2 - 1, 0)], mask[1:, ..., :M2] = False, False
    exact = lambda t: t.double() if torch.is_tensor(t) else t and tuple(map(exact, t))
    for seen, few in ((mask, 0), (mask, 1 << 13), (None, 0)):
        monkeypatch.setattr(K, 'ROPE_ATTENTION_FEW', few)
        got = K.rope_attention(q, kv, *rots, q_weight, k_weight, 1e-6, other, seen)
        want = K.rope_attention_ref(*map(exact, (q, kv, *rots, q_weight, k_weight)), 1e-6, exact(other), seen)
        assert got.dtype == dtype
        close(got, want, TOL.get(dtype, 2e-3))               # the interpreter's product of bf16 is wrong
    for wrong in (dict(kv=kv[:, :, H:]), dict(mask=mask.float()), dict(mask=mask[..., 1:]),
                  dict(mask=mask.expand(-1, -1, N + 1, -1)), dict(other=(kv[:, :, :H].double(),) * 2)):
        with pytest.raises(AssertionError): K.rope_attention(**dict(
            q=q, kv=kv, rot=rots[0], kv_rot=rots[1], q_weight=q_weight, k_weight=k_weight, eps=1e-6) | wrong)


@kernel
@pytest.mark.parametrize('N, V, D', [(3, 301, 40), (70, 129, 16), (1, 5, 3)])
def test_head_argmax(N, V, D):
    """Rows, columns and depth that fill no tile; the best column first or last, or with all logits below zero."""
    h, weight = (randn(n, D, seed=n, grad=False) for n in (N, V))
    for w in (weight, -weight.abs()):
        for x in (h, h.abs()): assert torch.equal(K.head_argmax(x, w), K.head_argmax_ref(x, w))
    for best in (0, V - 1):
        w = weight.clone()
        w[best] = 10 * h[0]
        assert K.head_argmax(h, w)[0] == best


@kernel
@pytest.mark.parametrize('n', [1, 2, 2047, 4098])
def test_row_noise(n):
    """Odd rows, blocks that are not full, seeds and streams with the highest bit. The hash is that of Python's integers
    (lowbias32): one wrong bit is another number. No row depends on its neighbours."""
    seeds = torch.tensor([0, 5, 2 ** 31, 2 ** 62 - 1, 2 ** 40 + 5, -3], device=DEVICE)
    for stream in (0, 1, 15, 2 ** 31 - 2):
        got = K.row_noise(seeds, (n,), stream)
        close(got, K.row_noise_ref(seeds, (n,), stream), 1e-6 if GPU else 2e-6)
        assert torch.equal(got[2:4], K.row_noise(seeds[2:4], (n,), stream))

    def mix(x):
        x = (x ^ x >> 16) * 0x7feb352d % 2 ** 32
        x = (x ^ x >> 15) * 0x846ca68b % 2 ** 32
        return x ^ x >> 16
    seed, key = 2 ** 62 - 1, mix(16 * 0x9e3779b1 % 2 ** 32)
    key ^= mix(mix(seed % 2 ** 32) ^ seed >> 32)
    u, v = ((mix((mix(i ^ key) + key) % 2 ** 32) + 0.5) / 2 ** 32 for i in (0, 1))
    want = (-2 * np.log(u)) ** 0.5 * np.cos(2 * np.pi * v)
    for f in (K.row_noise, K.row_noise_ref): assert abs(f(seeds, (n,), 15)[3, 0].item() - want) < 1e-5
    assert K.row_noise(seeds[:0], (n,)).shape == (0, n) and K.row_noise(seeds, (3, n)).shape == (6, 3, n)


# -- the losses ----------------------------------------------------------------------------------------------


def ce_inputs(share, with_b, scale=1.0, N=8, D=12, V=1017, skip_col=3, seed=0):
    """Half of the unused rows make infinite logits; the first row is unused unless all are used."""
    g = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(N, D, generator=g) * scale, torch.randn(V, D, generator=g)
    y = torch.randint(4, V - 1, (N,), generator=g)
    used = torch.randperm(N, generator=g) < round(share * N)
    if share < 1: used[0] = False
    a, b = torch.rand(N, generator=g) * used, (torch.randn(N, generator=g) * used if with_b else None)
    if with_b: a[1] = 0                                                         # used through b alone
    h[~used], y[~used] = 1e38, skip_col or 0
    return [t if t is None else t.to(DEVICE) for t in (h, weight, y, a, b)]


@kernel
@pytest.mark.parametrize('with_b', [False, True], ids=['a', 'a+b*p'])
@pytest.mark.parametrize('skip_col', [None, 3, 1016])
@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('scale', [1, 300])
def test_linear_cross_entropy(with_b, skip_col, share, scale, small):
    h, weight, y, a, b = ce_inputs(share, with_b, scale, skip_col=skip_col)
    h.requires_grad_(), weight.requires_grad_()
    before = [t if t is None else t.detach().clone() for t in (h, weight, y, a, b)]
    loss, ce = K.linear_cross_entropy(h, weight, y, a, b, skip_col, chunk=3)
    used = (a != 0) | (False if b is None else b != 0)
    exact = [t.detach().double().requires_grad_() for t in (h[used], weight)]
    want, rows = K.linear_cross_entropy_ref(*exact, y[used], a[used].double(), None if b is None else b[used].double(),
                                            skip_col)
    tol = 1e-5 if scale == 1 else 1e-4
    close(loss, want, tol, 'loss')
    close(ce[used], rows, tol, 'ce')
    assert not ce[~used].any() and not ce.requires_grad
    for factor in (3.0, 0.5):                                                   # a kept graph answers twice
        dh, dweight = torch.autograd.grad(loss * factor, (h, weight), retain_graph=True)
        dh_want, dweight_want = torch.autograd.grad(want * factor, exact, retain_graph=True)
        close(dh[used], dh_want, 4 * tol, 'dh')
        close(dweight, dweight_want, 4 * tol, 'dweight')
        assert not dh[~used].any()
        if skip_col is not None: assert not dweight[skip_col].any()
    for t, old in zip((h, weight, y, a, b), before): assert t is None or torch.equal(t, old), "an input was changed"


@kernel
def test_linear_cross_entropy_frozen_tied_and_empty(small):
    h, weight, y, a, _ = ce_inputs(1.0, False)
    _, ce = K.linear_cross_entropy(h, weight, y, a)
    close(ce, F.cross_entropy(h @ weight.T, y, reduction='none'), 1e-5)
    h.requires_grad_(), weight.requires_grad_()
    full = torch.autograd.grad(K.linear_cross_entropy(h, weight, y, a)[0], (h, weight))
    assert torch.equal(torch.autograd.grad(K.linear_cross_entropy(h, weight.detach(), y, a)[0], h)[0], full[0])
    assert torch.equal(torch.autograd.grad(K.linear_cross_entropy(h.detach(), weight, y, a)[0], weight)[0], full[1])
    ids = y.flip(0)
    tied = torch.autograd.grad(K.linear_cross_entropy(F.embedding(ids, weight), weight, y, a)[0], weight)[0]
    exact = weight.detach().double().requires_grad_()
    close(tied, torch.autograd.grad(K.linear_cross_entropy_ref(exact[ids], exact, y, a.double())[0], exact)[0], 1e-5)
    loss, ce = K.linear_cross_entropy(h[:0], weight, y[:0], a[:0])
    assert loss == 0 and len(ce) == 0 and not torch.autograd.grad(loss, weight)[0].any()


@kernel
@pytest.mark.parametrize('dtype', DTYPES)
def test_cosine_alignment(dtype, small):
    """Selected rows, others in the teacher, padding that repeats a row; a state of norm 0."""
    student, teacher = randn(9, 70, dtype=dtype), randn(11, 70, seed=1, dtype=dtype, grad=False)
    rows = torch.tensor([4, 0, 7, 2, 0, 0], device=DEVICE)
    weights = torch.tensor([0.5, 1.5, 1.0, 2.0, 0.0, 0.0], device=DEVICE)
    fn = lambda f: lambda s, t, w: f(s, t, w, rows, rows + 1)
    check(fn(K.cosine_alignment), fn(K.cosine_alignment_ref), student, teacher, weights)
    every = torch.rand(9, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check(K.cosine_alignment, K.cosine_alignment_ref, student, teacher[:9], every)
    if dtype == torch.float32:
        student = student.detach().clone().index_fill_(0, rows[:1], 0.0).requires_grad_()
        loss = K.cosine_alignment(student, teacher, weights, rows, rows + 1)
        assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()
    nothing = K.cosine_alignment(student, teacher, weights[:0], rows[:0], rows[:0])
    assert nothing == 0 and not torch.autograd.grad(nothing, student)[0].any()


def test_references():
    """Where a reference is not the formula itself: PyTorch's own functions, rows repeated with a weight, rounding."""
    g = torch.Generator().manual_seed(0)
    student, teacher, w = torch.randn(5, 8, generator=g), torch.randn(6, 8, generator=g), torch.rand(4, generator=g)
    rows = torch.tensor([3, 0, 3, 2])
    want = (w * (1 - F.cosine_similarity(student[rows], teacher[rows + 1]))).sum()
    torch.testing.assert_close(K.cosine_alignment_ref(student, teacher, w, rows, rows + 1), want)
    x, scale, shift = student.view(1, 5, 8), torch.randn(1, 8, generator=g), torch.randn(1, 8, generator=g)
    want = F.rms_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(K.modulate_ref(x, scale, shift), want)
    low = [t.bfloat16() for t in (x, scale, shift)]                             # rounded once, at the end
    assert torch.equal(K.modulate_ref(*low), K.modulate_ref(*(t.float() for t in low)).bfloat16())
    y, s = K.add_modulate_ref(x, x, shift, scale, shift)
    torch.testing.assert_close(s, x * (1 + shift[:, None]))
    assert torch.equal(y, K.modulate_ref(s, scale, shift))
    y, s = K.add_rms_norm_ref(student.bfloat16(), teacher[:5].bfloat16(), w.repeat(2), 1e-6)
    assert torch.equal(s, student.bfloat16() + teacher[:5].bfloat16())
    assert torch.equal(y, w.repeat(2).bfloat16() * F.rms_norm(s.float(), (8,), eps=1e-6).bfloat16())


# -- glue ----------------------------------------------------------------------------------------------------


@kernel
@pytest.mark.parametrize('amp', [False, True], ids=['fp32', 'bf16'])
def test_compile_and_checkpoint(amp, monkeypatch):
    """A small model, end to end: kernels against references, and not a bit changes when every block is compiled (in
    one graph), recomputed in the backward, or both."""
    monkeypatch.undo()                                                          # no poison in compiled code
    torch.manual_seed(0)
    model = Transformer(ModelConfig(64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16,
                                    qk_norm=True, causal=False)).to(DEVICE)
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            h = model.hidden(ids).flatten(0, 1)
            loss, _ = K.linear_cross_entropy(h, model.head_weight, ids.flatten(), torch.full((10,), 0.1, device=DEVICE))
        return torch.autograd.grad(loss, list(model.parameters()))
    want = gradients()
    monkeypatch.setattr(K, 'KERNELS', 'torch')
    for a, b in zip(want, gradients()): assert (a - b).norm() < (0.06 if amp else 1e-5) * b.norm()
    monkeypatch.undo()
    same = lambda a, b: torch.equal(a, b) or GPU and (a - b).norm() < 0.02 * b.norm()   # Inductor rounds elsewhere
    model.activation_checkpointing = True
    assert all(map(same, gradients(), want))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.layers: block.compile(dynamic=False, fullgraph=True, backend='inductor' if GPU else 'aot_eager')
    for model.activation_checkpointing in (True, False):
        assert all(map(same, gradients(), want))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1          # all blocks share it


BROKEN = K.triton.__version__ is None or K.triton.__version__ < '3.7' and np.lib.NumpyVersion(np.__version__) >= '2.4.0'


@pytest.mark.skipif(GPU or INTERPRETED or BROKEN, reason='on a GPU; or no Triton; or 3.6, which numpy 2.4 breaks')
def test_in_the_interpreter():
    """Everything marked `kernel` above, in a process whose triton interprets."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider', __file__], cwd=ROOT,
                          env=os.environ | dict(TRITON_INTERPRET='1', KERNELS='triton'), capture_output=True, text=True)
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason='asks for what the interpreter has')
def test_which_path(monkeypatch):
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert K.active('cpu') == 'torch (no Triton on cpu)' and K.rms_norm(x.double(), weight, 1e-6).dtype == torch.float64
    monkeypatch.setattr(K, 'KERNELS', 'triton')
    with pytest.raises(SystemExit, match='KERNELS=triton on cpu needs TRITON_INTERPRET=1'): K.rms_norm(x, weight, 1e-6)
    monkeypatch.setattr(K, 'INTERPRET', True)
    with pytest.raises(SystemExit, match='the kernels compute in fp32, not torch.float64: KERNELS=torch does'):
        K.rms_norm(x.double(), weight, 1e-6)
    with pytest.raises(SystemExit, match='rows of 20000 numbers do not fit'): K._row_block(20_000)
    monkeypatch.setattr(K, 'KERNELS', 'torch')
    assert K.active('cpu') == 'torch (KERNELS=torch)'
    with pytest.raises(AssertionError, match='weight.shape'): K.rms_norm(x, weight[:4], 1e-6)


@kernel
def test_what_a_kernel_saves_has_no_gradient(small):
    """Statistics for the backward are outputs of the operators, too; a wrong gradient of them would be silent."""
    x, gate = randn(2, 3, 16), randn(2, 16)
    cos, sin = K.rope_tables(torch.arange(3, device=DEVICE)[None].repeat(2, 1), 8, 1e4)
    q = randn(2, 3, 2, 8).transpose(1, 2)
    for saved in (K._rms_norm(x.view(6, 16), None, gate[0], 1e-6)[2], K._modulate(x, None, None, gate, gate, 1e-6)[2],
                  K._rope_qkv(randn(2, 3, 4, 8), cos, sin, gate[0, :8], gate[0, :8], 2, 1, 1e-6)[3],
                  K._attention(q, q, q, *K.document_ranges(torch.zeros(2, 3, device=DEVICE).long()), 1.0)[1]):
        assert not saved.requires_grad
    none = randn(0, 5, 16)
    assert K.modulate(none, none[:, 0], none[:, 0]).shape == none.shape                     # an empty batch


def test_no_launch_while_tracing(monkeypatch):
    """AOTAutograd traces with fake tensors and without gradients, and does not always say that it compiles."""
    class Kernel:
        def __getitem__(self, grid): raise RuntimeError('launched')
    monkeypatch.setattr(K, '_swiglu_fwd', Kernel())
    with torch.no_grad(), FakeTensorMode() as mode:
        assert K._swiglu(mode.from_tensor(torch.ones(2, 6))).shape == (2, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match='launched'): K._swiglu(torch.ones(2, 6))


@pytest.mark.skipif(INTERPRETED or K.triton.__version__ is None, reason='needs the real compiler')
def test_inductor_gets_the_kernels(monkeypatch):
    """The graphs of compiled code hold the kernels, and PyTorch knows which arguments each call writes: the outputs
    alone, and fewer where there is no residual, gate or QK-norm. Of an argument that it thinks written, Inductor would
    make a copy."""
    monkeypatch.undo()                                                          # no poison in compiled code
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    h100, written = SimpleNamespace(get_current_target=lambda: GPUTarget('cuda', 90, 32)), {}
    if not GPU: monkeypatch.setattr(driver, '_active', h100)
    monkeypatch.setattr(K, 'use_triton', lambda x: True)
    monkeypatch.setattr(K.triton.JITFunction, 'run', lambda *args, **kw: None)  # traced, not launched
    def look(graph, inputs):
        for node in graph.graph.nodes:
            assert 'dlm' not in str(node.target)
            if 'triton_kernel_wrapper' not in str(node.target): continue
            kernel = kernel_side_table.get_kernel(node.kwargs['kernel_idx'])
            written.setdefault(kernel.fn.__name__, set()).add(' '.join(node.kwargs['tensors_to_clone']))
        return make_boxed_func(graph)
    how = dict(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    model = Transformer(ModelConfig(64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16,
                                    qk_norm=True, causal=False)).to(DEVICE)
    model.layers[0].compile(**how)
    ids = torch.zeros(1, 8, device=DEVICE).long()
    model.hidden(ids, K.document_ranges(ids)).sum().backward()
    x, gate = randn(2, 5, 32), randn(2, 32)
    y, s = torch.compile(K.add_modulate, **how)(x, x, gate, gate, gate)
    (y + s).sum().backward()
    cos, sin = K.rope_tables(torch.arange(5, device=DEVICE)[None].repeat(2, 1), 16, 1e4)
    bare = dict(modulate=(x, gate, gate), rms_norm=(x, gate[0], 1e-6), rope_qkv=(x.view(2, 5, 2, 16), cos, sin, 0, 1))
    for name, args in bare.items():                                             # without residual, gate, QK-norm
        y = torch.compile(getattr(K, name), **how)(*args)
        sum(out.sum() for out in (y if isinstance(y, tuple) else [y]) if out is not None).backward()
    qkv, w = randn(2, 5, 3, 16, grad=False), randn(16, grad=False)

    def attend(qkv, *other):
        return K.rope_attention(qkv[:, :, :1], qkv[:, :, 1:], (cos, sin), (cos, sin), w, w, 1e-6, other or None)
    with torch.no_grad():
        for other in ((), (qkv[:, :, :1], qkv[:, :, :1])): torch.compile(attend, **how)(qkv, *other)
    assert written == dict(
        _rope_attention_fwd={'o'},
        _rms_norm_fwd={'y rstd', 'y s rstd'}, _rope_fwd={'q k v', 'q k v rstd'}, _modulate_fwd={'y rstd', 'y s rstd'},
        _rms_norm_bwd={'dx dw'}, _rope_bwd={'dqkv', 'dqkv dw'}, _attention_bwd_dq={'dq delta'}, _swiglu_fwd={'y'},
        _swiglu_bwd={'dgate_up'}, _attention_fwd={'o lse'}, _attention_bwd_dkdv={'dk dv'},
        _modulate_bwd={'dx dscale dshift', 'dx dh dgate dscale dshift'})


# -- what the compiler makes of them -------------------------------------------------------------------------

ROW, WIDE = (K._row_block(D) if K.triton.__version__ else {} for D in (896, 5120))
SHAPES = [                                                                      # Qwen2.5-0.5B, and Qwen3's head width
    ('_rms_norm_fwd', dict(eps=1e-6, ADD=True) | ROW), ('_rms_norm_bwd', dict(ADD=True) | ROW),
    ('_rms_norm_fwd', dict(eps=1e-6, ADD=False, residual=None) | ROW),
    ('_rms_norm_bwd', dict(ADD=False, ds=None) | ROW), ('_rms_norm_bwd', dict(ADD=True) | WIDE),
    ('_rope_fwd', dict(eps=1e-6, NORM=True), (14, 2, 64)), ('_rope_bwd', dict(NORM=True), (14, 2, 64)),
    ('_rope_fwd', dict(eps=1e-6, NORM=False, q_weight=None, k_weight=None), (14, 2, 64)),
    ('_rope_bwd', dict(NORM=False, qkv=None, q_weight=None, k_weight=None, rstd=None), (14, 2, 64)),
    ('_rope_bwd', dict(NORM=True), (16, 8, 128)),
    ('_swiglu_fwd', dict(F=4864) | K.SWIGLU), ('_swiglu_bwd', dict(F=4864) | K.SWIGLU),
    ('_ce_rows', dict(HAS_B=True, GRAD=True) | K.CE_ROWS),
    ('_ce_rows', dict(HAS_B=False, b=None, GRAD=True) | K.CE_ROWS),
    ('_ce_rows', dict(HAS_B=False, b=None, GRAD=False) | K.CE_ROWS),
    ('_cosine_fwd', dict(eps=1e-6) | ROW), ('_cosine_bwd', dict(eps=1e-6) | ROW),
    ('_modulate_fwd', dict(eps=1e-6, ADD=True) | ROW), ('_modulate_bwd', dict(ADD=True) | ROW),
    ('_modulate_bwd', dict(ADD=True) | WIDE),
    ('_modulate_fwd', dict(eps=1e-6, ADD=False, h=None, gate=None) | ROW),
    ('_modulate_bwd', dict(ADD=False, ds=None, h=None, gate=None) | ROW)]
TYPES = {'*fp32': 'weight rstd cos sin q_weight k_weight dw a b ce w saved loss weights g dscale dshift dgate',
         '*i64': 'targets rows teacher_rows', 'i32': 'n_rows n_tokens skip_col T n V'}         # others: *bf16
TYPES = {arg: kind for kind, args in TYPES.items() for arg in args.split()}


@pytest.mark.skipif(INTERPRETED or K.triton.__version__ is None, reason='needs the real compiler')
@pytest.mark.parametrize('capability, shared_memory', [(90, 227 << 10), (80, 163 << 10)], ids=['H100', 'A100'])
def test_compiles_without_spills(capability, shared_memory, tmp_path):
    """For a GPU that need not be here: registers suffice, shared memory too, and bf16 moves 16 bytes at a time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    cuobjdump = Path(K.triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    for name, constants, *heads in SHAPES:
        if heads: constants = constants | K._rope_grid(1, 1, *heads[0])[1]
        fn, warps = getattr(K, name), constants['num_warps']
        types = [('constexpr' if arg in constants else TYPES.get(arg, '*bf16')) for arg in fn.arg_names]
        source = ASTSource(
            fn, dict(zip(fn.arg_names, types)),
            {(i,): constants[arg] for i, arg in enumerate(fn.arg_names) if arg in constants},
            {(i,): [['tt.divisibility', 16]] for i, arg in enumerate(fn.arg_names) if types[i][0] == '*' or arg == 'V'})
        done = K.triton.compile(source, GPUTarget('cuda', capability, 32), dict(num_warps=warps))
        (tmp_path / 'cubin').write_bytes(done.asm['cubin'])
        usage = subprocess.run([cuobjdump, '-res-usage', tmp_path / 'cubin'], capture_output=True, text=True).stdout
        usage = {k: int(v) for k, v in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
        assert usage['STACK'] == usage['LOCAL'] == 0 and usage['REG'] * warps * 32 <= 65536, f"{name} {usage}"
        assert done.metadata.shared <= shared_memory, f"{name} {done.metadata.shared}"
        stores = name != '_cosine_fwd' and constants.get('GRAD', True)                  # else numbers per row alone
        for way in ('ld', 'st')[:1 + stores]: assert f'{way}.global.v4.b32' in done.asm['ptx'], f"{name} {way}"


@pytest.mark.skipif(INTERPRETED or K.triton.__version__ is None, reason='needs the real compiler')
@pytest.mark.parametrize('dtype, capability, shared_memory', [
    ('bf16', 90, 227 << 10), ('bf16', 86, 99 << 10), ('fp32', 90, 227 << 10), ('fp32', 86, 99 << 10)])
def test_head_argmax_compiles(dtype, capability, shared_memory):
    """Without spills, bf16 with matrix units, its weight on the way in asynchronous copies of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    how, fn = K._head_argmax_tiles(2 if dtype == 'bf16' else 4), K._head_argmax
    tiles = {k: v for k, v in how.items() if k.isupper()} | dict(D=2048)
    kinds = dict(h=f'*{dtype}', weight=f'*{dtype}', best='*fp32', place='*i64', N='i32', V='i32')
    source = ASTSource(fn, kinds | dict.fromkeys(tiles, 'constexpr'), {(fn.arg_names.index(k),): v
                                                                     for k, v in tiles.items()},
                       {(i,): [['tt.divisibility', 16]] for i in (0, 1, 2, 3, 5)})
    options = {k: v for k, v in how.items() if k.islower()}
    done = K.triton.compile(source, GPUTarget('cuda', capability, 32), options)
    ptx = done.asm['ptx']
    assert 'cp.async.cg.shared.global' in ptx and (dtype == 'fp32' or 'wgmma' in ptx or 'mma.sync' in ptx)
    assert 'st.local' not in ptx and done.metadata.shared <= shared_memory


# -- at full size --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_offsets_beyond_int32():
    """N V = 2.5e9 logits in one chunk: the last rows are as right as the first."""
    N, D, V = 16_512, 64, 151_936
    h, weight = randn(N, D, dtype=torch.bfloat16), randn(V, D, seed=1, scale=0.1)
    y, a = torch.arange(N, device=DEVICE), torch.full((N,), 1 / N, device=DEVICE)
    loss, ce = K.linear_cross_entropy(h, weight, y, a, skip_col=V - 1, chunk=N)
    dh, dweight = torch.autograd.grad(loss, (h, weight))
    few = torch.cat([torch.arange(64), torch.arange(N - 64, N)]).to(DEVICE)
    exact = [t.detach().double().requires_grad_() for t in (h[few], weight)]
    want, rows = K.linear_cross_entropy_ref(*exact, y[few], a[few].double(), None, V - 1)
    close(ce[few], rows, 0.01)
    close(dh[few], torch.autograd.grad(want, exact[0])[0], 0.03)
    assert dweight.isfinite().all() and not dweight[V - 1].any() and loss.isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_full_width_and_the_same_bits_twice():
    """The shapes of a 0.5B model, more rows than programs; no order of summation is left to chance."""
    B, T = 4, 1024
    x, r = (randn(B, T, 896, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    weight = (1 + randn(896, seed=2, grad=False)).requires_grad_()
    cos, sin = K.rope_tables(torch.arange(T, device=DEVICE).expand(B, T), 64, 1e6)
    qkv = randn(B, T, 18, 64, dtype=torch.bfloat16)
    norms = [(1 + randn(64, seed=i, grad=False)).requires_grad_() for i in (1, 2)]
    scale, shift, gate = (randn(B, 896, seed=i, dtype=torch.bfloat16) for i in (3, 4, 5))
    h, head = randn(500, 896, dtype=torch.bfloat16), randn(151_936, 896, seed=1, scale=0.02)
    y, a = torch.arange(500, device=DEVICE), torch.full((500,), 0.1, device=DEVICE)
    rows = torch.randperm(B * T, generator=torch.Generator().manual_seed(0))[:2000].to(DEVICE)
    cases = [(lambda *t: K.add_rms_norm(*t, 1e-6), lambda *t: K.add_rms_norm_ref(*t, 1e-6), (x, r, weight)),
             (lambda *t: K.rope_qkv(*t[:3], 14, 2, *t[3:]), lambda *t: K.rope_qkv_ref(*t[:3], 14, 2, *t[3:]),
              (qkv, cos, sin, *norms)),
             (K.swiglu, K.swiglu_ref, (randn(B, T, 2 * 4864, dtype=torch.bfloat16),)),
             (K.modulate, K.modulate_ref, (x, scale, shift)),
             (K.add_modulate, K.add_modulate_ref, (x, r, gate, scale, shift)),
             (lambda *t: K.cosine_alignment(*t, torch.ones(2000, device=DEVICE, dtype=torch.float32), rows, rows),
              lambda *t: K.cosine_alignment_ref(*t, 1.0, rows, rows), (x.flatten(0, 1), r.detach().flatten(0, 1))),
             (lambda *t: K.linear_cross_entropy(*t, y, a, chunk=200)[0],
              lambda *t: K.linear_cross_entropy_ref(*t, y, a)[0], (h, head))]
    for fn, ref, inputs in cases:
        check(fn, ref, *inputs)
        leaves, twice = [t for t in inputs if t.requires_grad], []
        for _ in range(2):
            out = fn(*inputs)
            out = sum(t.float().square().sum() for t in (out if isinstance(out, tuple) else (out,)))
            twice.append(torch.autograd.grad(out, leaves))
        assert all(map(torch.equal, *twice))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
@pytest.mark.parametrize('N', [1, 64, 128, 700])
def test_head_argmax_at_full_size(N):
    """248,320 columns in bf16: what it picks is the largest logit, up to the order of summation in fp32."""
    h, weight = (randn(n, 2048, seed=n, dtype=torch.bfloat16, grad=False) for n in (N, 248_320))
    z = h.float() @ weight.float().T
    got = K.head_argmax(h, weight)
    assert got.shape == (N,) and (z.gather(1, got[:, None]).squeeze(1) - z.max(1).values).abs().max() < 1e-2
    assert (got == z.argmax(1)).float().mean() > 0.99
