"""experiments/persistent_block.py: what its programs read is what they need; it compiles for a Hopper GPU; and runs."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton', minversion='3.6')
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ('', 'experiments')]
import persistent_block as B  # noqa: E402

import kernels as K  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize('P', [5, 132])
def test_streams(P):
    """Each program takes its pairs of tiles one after the other, as the kernel does: the products come out right."""
    torch.manual_seed(0)
    D, n_ff, parts = 256, 200, 2
    (block,), _ = B.random_blocks(1, D, n_ff, 'cpu', torch.float64)
    qkv, down, gate_up, x, h = block[1], block[7], block[6], torch.randn(3, D).double(), torch.randn(3, n_ff).double()
    products = [B.units_of(qkv, 1), B.units_of(down, parts), B.gate_up_units(gate_up)]
    packed, starts, counts = B.pack(products, P)
    assert counts.sum() * 128 == len(packed) and (starts == counts.cumsum(0) - counts).all()
    at = starts.clone()
    def take(p):
        at[p] += 1
        return packed[(at[p] - 1) * 128: at[p] * 128]
    pair = lambda x, k: torch.nn.functional.pad(x, (0, -x.shape[1] % 128))[:, 128 * k: 128 * k + 128].split(64, 1)
    def program_of(unit, n):                                            # `share`, the other way round
        mine = [p for p in range(P) if (unit < n if n >= P else (p * n + P - 1) // P == unit and unit * P // n == p)]
        return unit % P if n >= P else mine[0]
    got = {}
    for i, units in enumerate(products):
        for unit in range(len(units)):
            p = program_of(unit, len(units))
            if i < 2:
                n_parts, source = (1, x) if i == 0 else (parts, h)
                length = math.ceil(math.ceil(source.shape[1] / 128) / n_parts)
                z, first = 0, unit % n_parts * length
                for k in range(first, first + len(units[unit])):
                    tile, (a, b) = take(p), pair(source, k)
                    z = z + a @ tile[:64].T + b @ tile[64:].T
                got[i, unit // n_parts] = got.get((i, unit // n_parts), 0) + z
            else:
                z, y = 0, 0
                for k in range(0, D // 128, 2):
                    tiles = take(p), take(p), take(p)
                    for half in range(2):
                        for j, a in enumerate(pair(x, k + half)):
                            z = z + a @ tiles[half][64 * j: 64 * j + 64].T
                            y = y + a @ tiles[2][64 * half + 32 * j: 64 * half + 32 * j + 32].T
                got[i, unit] = torch.cat([z, y], 1)                     # gate, up, gate, up, ...
    assert (at == starts + counts).all()
    join = lambda i, n: torch.cat([got[i, u] for u in range(sum(k[0] == i for k in got))], 1)[:, :n]
    torch.testing.assert_close(join(0, 3 * D), x @ qkv.T)
    torch.testing.assert_close(join(1, D), h @ down.T)
    gate, up = (x @ gate_up.T).chunk(2, 1)
    torch.testing.assert_close(join(2, 2 * n_ff), torch.stack([gate, up], 2).flatten(1))


def compile_for_hopper(path):
    """-> stack and local memory in bytes, shared memory, the PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    fn = B.blocks_kernel
    constants = dict(scale=0.1, eps=1e-6, M=64, H=16, F=5504, GATES=114, BLOCK=2048, PARTS=B.PARTS, RING=B.RING,
                     SLOTS=B.SLOTS, FLIGHT=B.FLIGHT, WITHOUT='', P=132)
    kinds = dict.fromkeys(fn.arg_names, '*bf16') | dict.fromkeys(('norms', 'turns', 'parts', 'squares'), '*fp32')
    kinds |= dict.fromkeys(('starts', 'counts', 'bar'), '*i32') | dict(n_blocks='i32', layers='i32')
    kinds |= dict(w=f'tensordesc<bf16[128,64],{B.SWIZZLED.value!r}>') | dict.fromkeys(constants, 'constexpr')
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
    """At the 35B shape without spills, in the shared memory that there is, with Hopper's matrix units and copies."""
    done = subprocess.run([sys.executable, __file__, tmp_path / 'cubin'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stack, local, shared, ptx = json.loads(done.stdout)
    assert stack == local == 0 and 150 << 10 < shared <= 227 << 10
    for what in ('wgmma.mma_async', 'cp.async.bulk.tensor', 'cp.async.cg'): assert what in ptx, what
    assert ptx.count('fence.proxy.async') >= 5      # between what cp.async wrote and the matrix units that read it


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows, D, n_ff, n, times', [
    (64, 2048, 5464, 2, 2), (50, 512, 900, 3, 1), (1, 1024, 2728, 1, 3), (8, 512, 1024, 2, 1)])
@torch.no_grad()
def test_persistent_blocks(rows, D, n_ff, n, times):
    """Against the sampler's kernels and cuBLAS, also with blocks that come again; the same bits each time."""
    torch.manual_seed(0)
    blocks, last = B.random_blocks(n, D, n_ff, 'cuda', torch.bfloat16)
    x = torch.randn(rows, D, device='cuda').bfloat16()
    rot = K.rope_tables(torch.arange(rows, device='cuda')[None], B.HD, 1e4)
    ours = B.Blocks(blocks, last, rot[0][0], rot[1][0])
    got, want = ours(x, n * times), B.plain(x, blocks * times, last, rot)
    assert (got - want).float().norm() < 0.02 * want.float().norm()
    for flight in (1, 2, 8): assert torch.equal(ours(x, n * times, flight=flight), got)


if __name__ == '__main__': print(json.dumps(compile_for_hopper(sys.argv[1])))
