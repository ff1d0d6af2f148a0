"""Each kernel beside its reference and torch.compile(reference), at the shapes of a 0.5B model. Needs a GPU.

    python experiments/kernel_tiles.py [tokens]      # one JSON object per line

Milliseconds are the GPU's own (sum of its kernels, L2 flushed before each call), cpu_us is what a call costs Python.
"""
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.profiler import ProfilerActivity, profile

import kernels as K

if not all(map(str.isdigit, sys.argv[1:])): raise SystemExit(__doc__)
if not torch.cuda.is_available(): raise SystemExit("kernel_tiles.py needs a GPU")
tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
B, T, D, V, FF, H, HKV, HD = tokens // 1024, 1024, 896, 151_936, 4864, 14, 2, 64
torch.manual_seed(0)
flush = torch.zeros(256 << 20, device='cuda', dtype=torch.int8)
say = lambda **line: print(json.dumps(line), flush=True)
in_tuple = lambda y: y if isinstance(y, tuple) else (y,)


def randn(*shape, dtype=torch.bfloat16): return torch.randn(shape, device='cuda', dtype=dtype).requires_grad_()


def measure(fn, n=20):
    """GPU milliseconds and CPU microseconds per call."""
    for _ in range(5): fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n): fn()
    cpu = (time.perf_counter() - start) / n * 1e6
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(n): flush.bitwise_not_(); fn()
        torch.cuda.synchronize()
    gpu = sum(e.self_device_time_total for e in prof.key_averages() if 'bitwise_not' not in e.key)
    return round(gpu / n / 1e3, 4), round(cpu)


def peak(fn):
    """GiB above what is there before."""
    fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    return round((torch.cuda.max_memory_allocated() - before) / 2 ** 30, 3)


def time_path(fn, inputs):
    """Of one way to compute it: forward without and with gradient, backward."""
    leaves, outs = [x for x in inputs if x.requires_grad], in_tuple(fn(*inputs))
    ups = [torch.randn_like(y) for y in outs]
    gib = peak(lambda: torch.autograd.grad(in_tuple(fn(*inputs)), leaves, ups))
    forward, forward_cpu = measure(lambda: fn(*inputs))
    backward, backward_cpu = measure(lambda: torch.autograd.grad(outs, leaves, ups, retain_graph=True))
    return dict(forward_ms=forward, backward_ms=backward, forward_cpu_us=forward_cpu, backward_cpu_us=backward_cpu,
                peak_gib=gib)


def compare(name, ours, ref, inputs, forward_gb, backward_gb):
    """forward_gb, backward_gb: what must move at least."""
    for path, fn in dict(triton=ours, reference=ref, compiled=torch.compile(ref, dynamic=False)).items():
        torch._dynamo.reset()
        t = time_path(fn, inputs)
        say(kernel=name, path=path, **t, forward_gbs=round(forward_gb / t['forward_ms'] * 1e3),
            backward_gbs=round(backward_gb / t['backward_ms'] * 1e3))


def memory_bound():
    row = tokens * D * 2 / 1e9
    x, r, weight = randn(B, T, D), randn(B, T, D), randn(D, dtype=torch.float32)
    compare('rms_norm', lambda *t: K.rms_norm(*t, 1e-6), lambda *t: K.rms_norm_ref(*t, 1e-6), (x, weight),
            2 * row, 3 * row)
    compare('add_rms_norm', lambda *t: K.add_rms_norm(*t, 1e-6), lambda *t: K.add_rms_norm_ref(*t, 1e-6),
            (x, r, weight), 4 * row, 4 * row)
    cos, sin = K.rope_tables(torch.arange(T, device='cuda').expand(B, T), HD, 1e6)
    qkv, norms = randn(B, T, H + 2 * HKV, HD), [randn(HD, dtype=torch.float32) for _ in range(2)]
    size = qkv.numel() * 2 / 1e9
    for name, extra, more in (('rope_qkv', [], 0), ('rope_qkv+norm', norms, size)):
        compare(name, lambda *t: K.rope_qkv(*t[:3], H, HKV, *t[3:]), lambda *t: K.rope_qkv_ref(*t[:3], H, HKV, *t[3:]),
                (qkv, cos, sin, *extra), 2 * size, 2 * size + more)
    size = tokens * FF * 2 / 1e9
    compare('swiglu', K.swiglu, K.swiglu_ref, (randn(B, T, 2 * FF),), 3 * size, 5 * size)
    scale, shift, gate = (randn(B, D) for _ in range(3))
    compare('modulate', K.modulate, K.modulate_ref, (x, scale, shift), 2 * row, 3 * row)
    compare('add_modulate', K.add_modulate, K.add_modulate_ref, (x, r, gate, scale, shift), 4 * row, 5 * row)
    n = tokens // 2
    rows, w = torch.randperm(tokens, device='cuda')[:n], torch.full((n,), 1 / n, device='cuda')
    compare('cosine_alignment', lambda s, t: K.cosine_alignment(s, t, w, rows, rows),
            lambda s, t: K.cosine_alignment_ref(s, t, w, rows, rows),
            (randn(tokens, D), randn(tokens, D).detach()), row, 2.5 * row)


def cross_entropy():
    """The row kernel alone (three passes over the logits) in several shapes, then the whole loss in several chunks."""
    n, default = tokens // 2, K.CE_ROWS
    logits = torch.randn(n, V, device='cuda', dtype=torch.bfloat16)
    y, a = torch.randint(V - 1, (n,), device='cuda'), torch.full((n,), 1 / n, device='cuda')
    for block, warps in [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)]:
        K.CE_ROWS = default | dict(BLOCK=block, num_warps=warps)
        ms, _ = measure(lambda: K._ce_rows_triton(logits, y, a, None, V - 1, True))
        alone, _ = measure(lambda: K._ce_rows_triton(logits, y, a, None, V - 1, False))
        say(kernel='_ce_rows', rows=n, **K.CE_ROWS, ms=ms, without_gradient_ms=alone,
            gbs=round(3 * logits.numel() * 2 / 1e6 / ms))
    logits, K.CE_ROWS = None, default
    h, head = randn(n, D), randn(V, D, dtype=torch.float32)
    for chunk in (n, n // 2, n // 4, n // 8):
        torch.cuda.empty_cache()
        loss = lambda chunk=chunk: K.linear_cross_entropy(h, head, y, a, None, V - 1, chunk)[0]
        step = lambda loss=loss: torch.autograd.grad(loss(), (h, head))
        say(kernel='linear_cross_entropy', rows=n, chunk=chunk, ms=measure(step)[0], peak_gib=peak(step))
    with torch.no_grad(): say(kernel='linear_cross_entropy', rows=n, no_grad_ms=measure(loss)[0])


say(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=K.triton.__version__, tokens=tokens,
    path=K.active('cuda'))
memory_bound()
cross_entropy()
