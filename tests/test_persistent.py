"""persistent.py: what its programs read is what they need; it compiles for a Hopper GPU; there it samples what the
sampler's other kernels do."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip('triton', minversion='3.6')
sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels as K  # noqa: E402
import persistent as P  # noqa: E402
from encoder import Encoder  # noqa: E402
from ldlm import LDLM, LatentConfig, LatentModel, Sampler  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def model(n_latents=64, n_embd=1024, n_ff=2728, n_layer=1, device='cpu', **kw):
    """Of random weights, none of them zero."""
    torch.manual_seed(0)
    sizes = dict(perceiver_layers=1, decoder_layers=1, perceiver_block='split', perceiver_skip=False, dit_adaln=False)
    with torch.device(device):
        m = LatentModel(LatentConfig(100, 64, 1 + n_latents, n_embd=n_embd, n_head=n_embd // 128, n_ff=n_ff,
                                     n_layer=n_layer, **sizes | kw))
    with torch.no_grad():
        for p in m.parameters():
            if not p.any(): p.normal_(std=0.02)
            if p.ndim == 1: p.add_(0.1 * torch.randn_like(p))
    return m


def test_packed_weights():
    """Read as the programs do, a pair of tiles after the other, the products come out right."""
    m, x = model(), torch.randn(3, 1024)
    attn, mlp, hid = m.dit[0].attn, m.dit[0].mlp, torch.randn(3, 2728)
    products = P.products_of_block(m.dit[0])
    packed, firsts = P.pack(products), [0]
    for p in products: firsts.append(firsts[-1] + p.shape[0] * p.shape[1])
    assert len(packed) == 128 * firsts[-1]
    tile = lambda i, unit, k: packed[(firsts[i] + k * len(products[i]) + unit) * 128:][:128]
    inputs = lambda x, k: F.pad(x, (0, -x.shape[1] % 128))[:, 64 * k: 64 * k + 64]

    def wide(i, unit, S):
        each, z, y = 64 // S, 0, 0
        for group in range(1024 // 128 // each):
            first, small, second = (tile(i, unit, 3 * group + n) for n in range(3))
            big = torch.cat([first, second]).split(2 * S)
            for n in range(2 * each):
                z = z + inputs(x, 2 * each * group + n) @ big[n].T
                y = y + inputs(x, 2 * each * group + n) @ small[n * S: n * S + S].T
        return z, y
    qk, v = zip(*(wide(0, unit, 16) for unit in range(64)))
    want = (x @ attn.qkv_proj.weight.T).split([2048, 1024], 1)
    halves = torch.cat(qk, 1).unflatten(1, (16, 64, 2))                 # partners of a rotation are neighbours
    torch.testing.assert_close(halves.transpose(2, 3).flatten(1), want[0])
    torch.testing.assert_close(torch.cat(v, 1), want[1])
    gate_up = torch.cat([torch.cat(wide(2, unit, 32), 1) for unit in range(57)], 1)[:, :2 * 2728]
    torch.testing.assert_close(gate_up.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1), x @ mlp.gate_up_proj.weight.T)

    for i, source, w in ((1, x, attn.o_proj.weight), (3, hid, mlp.down_proj.weight)):
        pairs = -(-source.shape[1] // 128)
        length, got = -(-pairs // P.PARTS), []
        for column in range(16):
            got.append(0)
            for part in range(P.PARTS):
                for k in range(min(pairs - part * length, length)):
                    for h, w_tile in enumerate(tile(i, column * P.PARTS + part, k).split(64)):
                        got[-1] = got[-1] + inputs(source, 2 * (part * length + k) + h) @ w_tile.T
        torch.testing.assert_close(torch.cat(got, 1), source @ w.T)


def test_where_it_is_used(monkeypatch):
    """Only for what it can do; on a CPU it is not even imported."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert P.pays(model().cfg, 'cuda') and P.pays(model(dit_adaln=True).cfg, 'cuda')
    for other in (dict(n_latents=65), dict(n_embd=1152), dict(n_embd=512, n_ff=1364),
                  dict(prefix_len=8, max_seq_len=73), dict(latent_dim=128), dict(n_ff=640)):
        kw = dict(n_latents=64, n_embd=1024, n_ff=2728, dit_adaln=False, max_seq_len=65) | other
        assert not P.pays(LatentConfig(100, 64, n_head=kw['n_embd'] // 128, **kw), 'cuda'), other
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    assert not P.pays(model().cfg, 'cuda')
    assert Sampler(LDLM(Encoder('random:64:100', -1), model()).eval(), 1, 2).all_steps is None


def compile_for_hopper(path, adaln):
    """-> stack and local memory in bytes, shared memory, the PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    fn = P.steps_kernel
    constants = dict(scale=0.1, eps=1e-6, M=64, H=16, N_FF=5504, GATES=114, TILES=32, PARTS=P.PARTS, ADALN=adaln,
                     NOISY=True, RING=P.RING, SLOTS=P.SLOTS, FLIGHT=P.FLIGHT, P=132)
    kinds = dict.fromkeys(fn.arg_names, '*fp32') | dict(bf16='*bf16', counts='*i32')
    kinds |= dict.fromkeys(('n_steps', 'layers', 'stride'), 'i32')
    kinds |= dict(w=f'tensordesc<bf16[128,64],{P.SWIZZLED.value!r}>') | dict.fromkeys(constants, 'constexpr')
    source = GluonASTSource(
        fn, kinds, {(fn.arg_names.index(k),): v for k, v in constants.items()},
        {(i,): [['tt.divisibility', 16]] for i, name in enumerate(fn.arg_names) if kinds[name][0] == '*'})
    done = triton.compile(source, GPUTarget('cuda', 90, 32), dict(num_warps=4, launch_cooperative_grid=True))
    Path(path).write_bytes(done.asm['cubin'])
    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    usage = subprocess.run([cuobjdump, '-res-usage', path], capture_output=True, text=True).stdout
    return *map(int, re.findall(r'(?:STACK|LOCAL):(\d+)', usage)), done.metadata.shared, done.asm['ptx']


@pytest.mark.skipif(K.INTERPRET, reason='needs the real compiler')
def test_compiles_for_hopper(tmp_path):
    """At the 35B shape with few spills or none, in the shared memory that there is, with Hopper's matrix units."""
    done = subprocess.run([sys.executable, __file__, tmp_path / 'cubin'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for stack, local, shared, ptx in json.loads(done.stdout):
        assert stack <= 128 and local == 0 and 150 << 10 < shared <= 227 << 10, (stack, local, shared)
        for what in ('wgmma.mma_async', 'cp.async.bulk.tensor', 'cp.async.cg'): assert what in ptx, what
        assert ptx.count('fence.proxy.async') >= 5  # between what cp.async wrote and the matrix units that read it


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows, n_embd, n_ff, n_layer, eta, adaln, programs', [
    (64, 2048, 5464, 2, 0.0, False, 0), (64, 2048, 5464, 2, 1.0, True, 0), (50, 1024, 2728, 4, 1.0, False, 114),
    (1, 1536, 3000, 3, 0.5, True, 0), (64, 2560, 6824, 1, 1.0, False, 130), (64, 5120, 13656, 1, 0.0, True, 0)])
@torch.no_grad()
def test_samples_as_kernel_after_kernel(rows, n_embd, n_ff, n_layer, eta, adaln, programs, monkeypatch):
    """Several steps against the sampler's other kernels, and the same bits each time: eager, captured, replayed, and
    however many weights are on the way."""
    o = LDLM(Encoder('random:64:100', -1), model(rows, n_embd, n_ff, n_layer, 'cuda', dit_adaln=adaln)).eval()
    one, many = (Sampler(o, 1, 6, eta=eta, persistent=persistent) for persistent in (True, False))
    assert one.all_steps and not many.all_steps
    one.all_steps.P = programs or one.all_steps.P
    for seed in (1, 2):
        seeds = torch.tensor([seed], device='cuda')
        got, want = one.latents(seeds), many.latents(seeds)
        assert (got - want).norm() < 0.02 * want.norm()
        assert all(torch.equal(one.latents(seeds), got) for _ in range(3))
        tokens = [one(seeds) for _ in range(3)]
        assert all(torch.equal(tokens[0], t) for t in tokens) and (tokens[0] == many(seeds)).float().mean() > 0.8
    for counts in (2 ** 31 - 8, -8):                                    # they go on for ever
        one.all_steps.counts[32:] = counts
        assert torch.equal(one.latents(seeds), got)
    for flight in (1, 8) if rows == 50 else ():
        monkeypatch.setattr(P, 'FLIGHT', flight)
        assert torch.equal(one.latents(seeds), got)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason='needs a Hopper GPU')
@torch.no_grad()
def test_seeing_every_step_first():
    """As kernel after kernel; then one step without self-conditioning in one kernel, captured by the second call."""
    o = LDLM(Encoder('random:64:100', -1), model(device='cuda'), self_cond=False).eval()
    seeds, seen = torch.tensor([3], device='cuda'), []
    one, many = (Sampler(o, 1, 1, persistent=persistent) for persistent in (True, False))
    assert torch.equal(one(seeds, see=seen.append), many(seeds)) and len(seen) == 1
    want = many.latents(seeds)
    assert (one.latents(seeds) - want).norm() < 0.02 * want.norm()
    assert torch.equal(one(seeds), one(seeds))


if __name__ == '__main__': print(json.dumps([compile_for_hopper(sys.argv[1], adaln) for adaln in (False, True)]))
