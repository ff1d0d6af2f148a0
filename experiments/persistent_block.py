"""Blocks of a denoiser for 64 rows as one persistent kernel, against cuBLAS and the kernels of ldlm.py. A Hopper GPU.

    python experiments/persistent_block.py --result=results/persistent_block.json

At batch 1 the sampler reads a block's weights, 101 MB at the 35B shape, for 64 rows: 34 us at an H100's bandwidth, but
a block takes 60. Here one program per multiprocessor stays for all blocks; a barrier in memory stands where a kernel
would end. Gluon, Triton's lower level, because plain Triton cannot keep loads in flight across a barrier:

    weights      cut into tiles of 64 x 64, in the order in which a program reads them: its share is one stream. A warp
                 of its own reads it through a ring of 10 pairs of tiles in shared memory, over barriers and blocks
    products     64 rows times 64 columns per unit of work, gate and up together 96; o and down are also cut into 4
                 parts of their inputs, whose sums the norm that follows adds up: the same bits every time
    activations  in tiles, too; a pair at a time from the L2 cache, three ahead
    attention    one head per program. Queries and keys come rotated and weighted from their product, in whose columns
                 the partners of a rotation are neighbours; their norms are applied to the scores

flight: how many pairs of weights a program has on the way. `without` leaves out a part, for its time: what comes out
is then wrong. LOG.md says what was learnt.
"""
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import kernels as K
from bench import median_ms, rooflines
from checkpoint import provenance, write_json

sync = getattr(gl, 'barrier', None) or gl.thread_barrier                # names of Triton 3.9, of 3.6
load_tile = getattr(tma, 'async_load', None) or tma.async_copy_global_to_shared
load_async = getattr(async_copy, 'async_load', None) or async_copy.async_copy_global_to_shared
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PAIR = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ROW = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))     # (64, 64) of a product
MMA32 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
MMA16 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
HD, PARTS, RING, SLOTS, FLIGHT = 128, 4, 10, 4, 2


@gluon.jit
def everyone(bar, P: gl.constexpr):
    """All programs are here, and see what the others wrote. Program 0 adds what makes the sum 2^31: the sign flips."""
    sync()
    step = gl.where(gl.program_id(0) == 0, 2147483649 - P, 1).to(gl.int32)
    old = gl.atomic_add(bar, step, sem='acq_rel', scope='gpu')
    now = old
    while (now ^ old) >= 0:
        now = gl.inline_asm_elementwise('ld.acquire.gpu.global.b32 $0, [$1];', '=r,l', [bar], dtype=gl.int32,
                                        is_pure=False, pack=1)
    sync()


@gluon.jit
def share(n: gl.constexpr, P: gl.constexpr):
    """Which of n units of work is this program's first; n if none. Fewer units than programs are spread over all of
    them, as neighbours share a part of the chip's network (measured: as fast as without)."""
    pid = gl.program_id(0)
    if n >= P: return pid
    unit = (pid * n + P - 1) // P
    return gl.where((unit < n) & (unit * P // n == pid), unit, n)


@gluon.jit
def read_weights(w, tiles, full, free, first, count, total, FLIGHT: gl.constexpr):
    """One warp: `total` pairs of weights, over and over those from first to first + count, through the ring. At most
    FLIGHT are on the way: more would come sooner, but all else would queue behind them."""
    RING: gl.constexpr = tiles.shape[0]
    ahead = first
    for n in range(total):
        slot, late = n % RING, n - FLIGHT
        mbarrier.wait(full.index(late % RING), late // RING & 1, pred=late >= 0)
        mbarrier.wait(free.index(slot), n // RING & 1 ^ 1, pred=n >= RING)
        mbarrier.expect(full.index(slot), 16384)
        load_tile(w, [ahead * 128, 0], full.index(slot), tiles.index(slot))
        ahead = gl.where(ahead + 1 == first + count, first, ahead + 1)


@gluon.jit
def weights(ring, turn, WITHOUT: gl.constexpr):
    """The pair of weights whose turn it is, when it is there, its slot, and the turn of the next; a turn is (slot,
    parity of the round)."""
    tiles, full, free = ring
    slot, parity = turn
    if WITHOUT != 'weights': mbarrier.wait(full.index(slot), parity)
    last = slot + 1 == tiles.shape[0]
    return tiles.index(slot), slot, (gl.where(last, 0, slot + 1), gl.where(last, parity ^ 1, parity))


@gluon.jit
def used(ring, slot, pred):
    """What is in this slot may be overwritten."""
    mbarrier.arrive(ring[2].index(slot), count=1, pred=pred)


@gluon.jit
def fetch(x, pair, slots, n, more, WITHOUT: gl.constexpr):
    i, j = gl.arange(0, 128, layout=gl.SliceLayout(1, PAIR)), gl.arange(0, 64, layout=gl.SliceLayout(0, PAIR))
    if more and WITHOUT != 'activations':
        load_async(slots.index(n & (slots.shape[0] - 1)), x + pair * 8192 + i[:, None] * 64 + j[None, :])
    async_copy.commit_group()


@gluon.jit
def arrived(on_the_way: gl.constexpr):
    """All that was fetched but the last pairs is there, and the matrix units see it."""
    async_copy.wait_group(on_the_way)
    fence_async_shared()
    sync()


@gluon.jit
def dot(x, w, acc):
    acc = mma(x.slice(0, 64), w.slice(0, 64).permute((1, 0)), acc, is_async=True)
    return mma(x.slice(64, 64), w.slice(64, 64).permute((1, 0)), acc, is_async=True)


@gluon.jit
def product(x, first, n, slots, ring, turn, WITHOUT: gl.constexpr):
    """Pairs first to first + n of x times the next n weights -> (64, 64) fp32."""
    SLOTS: gl.constexpr = slots.shape[0]
    for i in gl.static_range(SLOTS - 1): fetch(x, first + i, slots, i, i < n, WITHOUT)
    z, done = gl.zeros((64, 64), gl.float32, layout=MMA), 0
    for i in range(n):
        arrived(SLOTS - 2)
        tile, slot, turn = weights(ring, turn, WITHOUT)
        z = mma_wait(2, deps=(dot(slots.index(i & (SLOTS - 1)), tile, z),))     # those of the turn before are done
        sync()
        used(ring, done, i > 0)
        fetch(x, first + i + SLOTS - 1, slots, i + SLOTS - 1, i + SLOTS - 1 < n, WITHOUT)
        done = slot
    z = mma_wait(0, deps=(z,))
    sync()
    used(ring, done, True)
    return z, turn


@gluon.jit
def product_in_parts(x, pairs: gl.constexpr, out, PARTS: gl.constexpr, D: gl.constexpr, slots, ring, turn,
                     M: gl.constexpr, WITHOUT: gl.constexpr, P: gl.constexpr):
    """x times this program's weights -> out (PARTS, M, D): the sums over each part of x's pairs."""
    LEN: gl.constexpr = (pairs + PARTS - 1) // PARTS
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
    for unit in range(share(D // 64 * PARTS, P), D // 64 * PARTS, P):
        at = unit % PARTS * LEN
        z, turn = product(x, at, gl.minimum(pairs - at, LEN), slots, ring, turn, WITHOUT)
        gl.store(out + (unit % PARTS * M + row) * D + unit // PARTS * 64 + col, z, row < M)
    return turn


@gluon.jit
def silu_gate(z, N: gl.constexpr, L: gl.constexpr):
    """Of columns gate, up, gate, up ... -> silu(gate) up (64, N)."""
    g, u = gl.split(gl.reshape(z, (64, N, 2)))
    return gl.convert_layout(g * u / (1 + gl.exp(-g)), L)


@gluon.jit
def gate_up(x, n, slots, ring, turn, WITHOUT: gl.constexpr):
    """The first 2n pairs of x times the next 3n weights: of every 3, two are 64 columns, the third another 32 for both
    pairs of x. In the columns gate and up take turns. -> silu(gate) up (64, 32) and (64, 16)."""
    SLOTS: gl.constexpr = slots.shape[0]
    for i in gl.static_range(SLOTS - 1): fetch(x, i, slots, i, i < 2 * n, WITHOUT)
    z, y = gl.zeros((64, 64), gl.float32, layout=MMA), gl.zeros((64, 32), gl.float32, layout=MMA32)
    done, done1, done2 = 0, 0, 0
    for i in range(n):
        tile, slot, turn = weights(ring, turn, WITHOUT)
        tile1, slot1, turn = weights(ring, turn, WITHOUT)
        tile2, slot2, turn = weights(ring, turn, WITHOUT)
        for h in gl.static_range(2):
            arrived(SLOTS - 2)
            pair = slots.index((2 * i + h) & (SLOTS - 1))
            z = dot(pair, tile1 if h else tile, z)
            for j in gl.static_range(2):
                y = mma(pair.slice(64 * j, 64), tile2.slice(64 * h + 32 * j, 32).permute((1, 0)), y, is_async=True)
            z, y = mma_wait(4, deps=(z, y))
            sync()
            if h == 0:
                used(ring, done, i > 0)
                used(ring, done1, i > 0)
                used(ring, done2, i > 0)
            fetch(x, 2 * i + h + SLOTS - 1, slots, 2 * i + h + SLOTS - 1, 2 * i + h + SLOTS - 1 < 2 * n, WITHOUT)
        done, done1, done2 = slot, slot1, slot2
    z, y = mma_wait(0, deps=(z, y))
    sync()
    used(ring, done, True)
    used(ring, done1, True)
    used(ring, done2, True)
    return silu_gate(z, 32, MMA32), silu_gate(y, 16, MMA16), turn


@gluon.jit
def store_tile(to, z, first, N: gl.constexpr, L: gl.constexpr, M: gl.constexpr):
    """z (64, N) to columns first to first + N of a tensor in tiles."""
    row, col = gl.arange(0, 64, layout=gl.SliceLayout(1, L))[:, None], gl.arange(0, N, layout=gl.SliceLayout(0, L))
    col = (first + col)[None, :]
    gl.store(to + col // 64 * 4096 + row * 64 + col % 64, z.to(to.dtype.element_ty), row < M)


@gluon.jit
def add_norm(parts, x, y, weight, eps: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
             BLOCK: gl.constexpr, P: gl.constexpr):
    """x += the sum of its parts; y = norm(x), in tiles. A row per program."""
    col = gl.arange(0, BLOCK, layout=ROW)
    for row in range(share(M, P), M, P):
        v = gl.load(x + row * D + col, col < D, 0.0).to(gl.float32)
        scale = gl.load(weight + col, col < D, 0.0)
        if PARTS > 0:
            h = gl.load(parts + row * D + col, col < D, 0.0)
            for s in gl.static_range(1, PARTS): h += gl.load(parts + (s * M + row) * D + col, col < D, 0.0)
            v = (v + h).to(x.dtype.element_ty).to(gl.float32)
            gl.store(x + row * D + col, v.to(x.dtype.element_ty), col < D)
        scale = scale / gl.sqrt(gl.sum(v * v, 0) / D + eps)
        gl.store(y + col // 64 * 4096 + row * 64 + col % 64, (v * scale).to(y.dtype.element_ty), col < D)


@gluon.jit
def attend(qkv, o, squares, scale: gl.constexpr, eps: gl.constexpr, M: gl.constexpr, H: gl.constexpr, P: gl.constexpr,
           slots):
    i, j = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)), gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))
    for h in range(share(H, P), H, P):
        for n in gl.static_range(3): fetch(qkv, n * H + h, slots, n, True, '')
        q_squares, k_squares = squares + 2 * h * 64, squares + 2 * (H + h) * 64
        rq = scale / gl.sqrt((gl.load(q_squares + i) + gl.load(q_squares + 64 + i)) / 128 + eps)
        rk = 1 / gl.sqrt((gl.load(k_squares + j) + gl.load(k_squares + 64 + j)) / 128 + eps)
        arrived(1)
        s = dot(slots.index(0), slots.index(1), gl.zeros((64, 64), gl.float32, layout=MMA))
        s = mma_wait(0, deps=(s,)) * rq[:, None] * rk[None, :]
        s = gl.where((j < M)[None, :], s, -float('inf'))
        p = gl.exp2(s - gl.max(s, 1)[:, None])
        l = gl.sum(p, 1)[:, None]
        p = gl.convert_layout(p.to(o.dtype.element_ty), gl.DotOperandLayout(0, MMA, 2))
        arrived(0)
        for half in gl.static_range(2):
            y = mma(p, slots.index(2).slice(64 * half, 64), gl.zeros((64, 64), gl.float32, layout=MMA)) / l
            to = o + (2 * h + half) * 4096 + i[:, None] * 64 + j[None, :]
            gl.store(to, y.to(o.dtype.element_ty), (i < M)[:, None])
        sync()


@gluon.jit
def compute(ring, slots, norms, turns, x, y, qkv, att, hid, parts, squares, bar, n_blocks, layers, scale: gl.constexpr,
            eps: gl.constexpr, M: gl.constexpr, H: gl.constexpr, F: gl.constexpr, GATES: gl.constexpr,
            BLOCK: gl.constexpr, PARTS: gl.constexpr, WITHOUT: gl.constexpr, P: gl.constexpr):
    D: gl.constexpr = H * 128
    turn = (0, 0)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
    add_norm(parts, x, y, norms, eps, 0, D, M, BLOCK, P)
    for block in range(n_blocks):
        layer = block % layers
        everyone(bar, P)
        for unit in range(share(6 * H, P), 6 * H, P):
            at = turns + (layer * 4 + gl.minimum(unit // (2 * H), 1) * 2 + unit % 2) * 8192 + row * 64 + col
            own, partner = gl.load(at), gl.load(at + 4096)
            z, turn = product(y, 0, D // 128, slots, ring, turn, WITHOUT)
            if unit < 4 * H:                                            # queries and keys
                gl.store(squares + unit * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)), gl.sum(z * z, 1))
                z1, z2 = gl.split(gl.reshape(z, (64, 32, 2)))
                z = z * own + gl.convert_layout(gl.reshape(gl.join(z2, z1), (64, 64)), MMA) * partner
            gl.store(qkv + unit * 4096 + row * 64 + col, z.to(qkv.dtype.element_ty), row < M)
        everyone(bar, P)
        if WITHOUT != 'attention': attend(qkv, att, squares, scale, eps, M, H, P, slots)
        everyone(bar, P)
        turn = product_in_parts(att, D // 128, parts, PARTS, D, slots, ring, turn, M, WITHOUT, P)
        everyone(bar, P)
        if WITHOUT != 'norms': add_norm(parts, x, y, norms + (2 * layer + 1) * D, eps, PARTS, D, M, BLOCK, P)
        everyone(bar, P)
        for unit in range(share(GATES, P), GATES, P):
            z, u, turn = gate_up(y, D // 256, slots, ring, turn, WITHOUT)
            store_tile(hid, z, 48 * unit, 32, MMA32, M)
            store_tile(hid, u, 48 * unit + 32, 16, MMA16, M)
        everyone(bar, P)
        turn = product_in_parts(hid, F // 128, parts, PARTS, D, slots, ring, turn, M, WITHOUT, P)
        everyone(bar, P)
        norm = norms + gl.where(block == n_blocks - 1, 2 * layers, 2 * ((block + 1) % layers)) * D
        if WITHOUT != 'norms': add_norm(parts, x, y, norm, eps, PARTS, D, M, BLOCK, P)


@gluon.jit
def blocks_kernel(w, starts, counts, norms, turns, x, y, qkv, att, hid, parts, squares, bar, n_blocks, layers,
                  scale: gl.constexpr, eps: gl.constexpr, M: gl.constexpr, H: gl.constexpr, F: gl.constexpr,
                  GATES: gl.constexpr, BLOCK: gl.constexpr, PARTS: gl.constexpr, RING: gl.constexpr,
                  SLOTS: gl.constexpr, FLIGHT: gl.constexpr, WITHOUT: gl.constexpr, P: gl.constexpr):
    tiles = gl.allocate_shared_memory(w.dtype, [RING, 128, 64], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    slots = gl.allocate_shared_memory(w.dtype, [SLOTS, 128, 64], SWIZZLED)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    sync()
    first, count = gl.load(starts + gl.program_id(0)), gl.load(counts + gl.program_id(0))
    total = 0 if WITHOUT == 'weights' else count // layers * n_blocks
    gl.warp_specialize([
        (compute, ((tiles, full, free), slots, norms, turns, x, y, qkv, att, hid, parts, squares, bar, n_blocks, layers,
                   scale, eps, M, H, F, GATES, BLOCK, PARTS, WITHOUT, P)),
        (read_weights, (w, tiles, full, free, first, count, total, FLIGHT))], [1], [40])


def units_of(w, parts):
    """(N, K) -> what units of 64 columns and a part of K read: a list of (pairs, 128, 64)."""
    w = F.pad(w, (0, -w.shape[1] % 128)).unflatten(0, (-1, 64)).unflatten(2, (-1, 2, 64))
    return [part for unit in w.permute(0, 2, 3, 1, 4).flatten(2, 3) for part in unit.split(-(-len(unit) // parts))]


def gate_up_units(w):
    """(2 F, K), gate first -> what units of 96 columns, 48 of gate and up in turn, read: a list of (pairs, 128, 64)."""
    w = torch.stack(w.chunk(2), 1).flatten(0, 1)
    w = F.pad(w, (0, 0, 0, -w.shape[0] % 96)).unflatten(0, (-1, 96)).unflatten(2, (-1, 4, 64))
    most, rest = w.permute(0, 2, 3, 1, 4).split([64, 32], 3)            # (units, K / 256, 4, 64 or 32, 64)
    return list(torch.cat([most.flatten(2, 3).unflatten(2, (2, 128)), rest.flatten(2, 3)[:, :, None]], 2).flatten(1, 2))


def pack(products, P):
    """products: their units, in order of use -> the weights in the order in which the programs read them (T * 128, 64),
    each program's first pair and number of pairs."""
    streams = [[] for _ in range(P)]
    for units in products:
        for i, unit in enumerate(units): streams[i % P if len(units) >= P else i * P // len(units)].append(unit)
    counts = torch.tensor([sum(map(len, stream)) for stream in streams], dtype=torch.int32)
    packed = torch.cat(sum(streams, [])).flatten(0, 1)
    return packed, *(t.to(packed.device) for t in (counts.cumsum(0, dtype=torch.int32) - counts, counts))


class Blocks:
    """blocks: (attn_norm, qkv, q_norm, k_norm, o, mlp_norm, gate_up, down) each; last: the norm behind them. cos and
    sin (M, 64): rotations. A call is one kernel, and copies of its input and output."""

    def __init__(self, blocks, last, cos, sin):
        self.M, D = len(cos), blocks[0][1].shape[1]
        self.H, self.n, device, dtype = D // HD, len(blocks), cos.device, blocks[0][1].dtype
        assert D % 256 == 0 and self.M <= 64, f"{D=} {self.M=}"
        self.P = torch.cuda.get_device_properties(device).multi_processor_count
        products, turns = [], []
        for _, qkv, q_norm, k_norm, o, _, gate_up, down in blocks:
            qk, v = qkv.split([2 * D, D])                               # partners of a rotation become neighbours
            qkv = torch.cat([qk.unflatten(0, (2 * self.H, 2, HD // 2)).transpose(1, 2).flatten(0, 2), v])
            products += [units_of(qkv, 1), units_of(o, PARTS), gate_up_units(gate_up), units_of(down, PARTS)]
            assert len(products[-1]) == len(products[-3]) == D // 64 * PARTS, "too few inputs for so many parts"
            for w1, w2 in (q_norm.chunk(2), k_norm.chunk(2)):
                own = torch.stack([cos * w1, cos * w2], 2).view(self.M, 2, 64)
                partner = torch.stack([-sin * w2, sin * w1], 2).view(self.M, 2, 64)
                turns.append(F.pad(torch.stack([own, partner], 1).permute(2, 1, 0, 3), (0, 0, 0, 64 - self.M)))
        self.packed, self.starts, self.counts = pack(products, self.P)
        n_ff = blocks[0][7].shape[1]
        self.F, self.gates = -(-n_ff // 128) * 128, -(-n_ff // 48)      # columns of hid that down reads, units of 48
        self.turns = torch.stack(turns).float().contiguous()
        self.norms = torch.stack([v for b in blocks for v in (b[0], b[5])] + [last]).float()
        zeros = lambda n: torch.zeros(n, 64, 64, device=device, dtype=dtype)
        self.y, self.qkv, self.att, self.hid = (zeros(n) for n in (D // 64, 3 * D // 64, D // 64, self.F // 64 + 1))
        self.parts = torch.empty(PARTS, self.M, D, device=device)
        self.squares = torch.empty(4 * self.H, 64, device=device)
        self.bar = torch.zeros(1, dtype=torch.int32, device=device)

    def __call__(self, x, n_blocks, without='', flight=FLIGHT):
        """x (M, D) -> the last norm's output (M, D) behind n_blocks of the blocks, in turn."""
        assert 1 <= flight <= RING, f"{flight=}"
        blocks_kernel[(self.P,)](
            TensorDescriptor.from_tensor(self.packed, [128, 64], SWIZZLED.value), self.starts, self.counts, self.norms,
            self.turns, x.clone(), self.y, self.qkv, self.att, self.hid, self.parts, self.squares, self.bar, n_blocks,
            self.n, HD ** -0.5 * math.log2(math.e), 1e-6, self.M, self.H, self.F, self.gates,
            triton.next_power_of_2(x.shape[1]), PARTS, RING, SLOTS, flight, without, self.P, num_warps=4,
            launch_cooperative_grid=True)
        return self.y.transpose(0, 1).flatten(1)[:self.M]


def plain(x, blocks, last, rot):
    """What the sampler does: cuBLAS and the kernels of kernels.py."""
    x, delta = x[None], None
    norm = lambda w, x, delta: (K.rms_norm(x, w, 1e-6), x) if delta is None else K.add_rms_norm(delta, x, w, 1e-6)
    for attn_norm, qkv, q_norm, k_norm, o, mlp_norm, gate_up, down in blocks:
        y, x = norm(attn_norm, x, delta)
        y = F.linear(y, qkv).unflatten(2, (-1, HD))
        H = y.shape[2] // 3
        y = K.rope_attention(y[:, :, :H], y[:, :, H:], rot, rot, q_norm, k_norm, 1e-6)
        y, x = norm(mlp_norm, F.linear(y.flatten(2), o), x)
        delta = F.linear(K.swiglu(F.linear(y, gate_up)), down)
    return norm(last, x, delta)[0][0]


def random_blocks(n, D, n_ff, device, dtype):
    matrix = lambda *shape: (torch.randn(*shape, device=device) / shape[1] ** 0.5).to(dtype)
    norm = lambda n: 1 + 0.1 * torch.randn(n, device=device)
    return [(norm(D), matrix(3 * D, D), norm(HD), norm(HD), matrix(D, D), norm(D), matrix(2 * n_ff, D), matrix(D, n_ff))
            for _ in range(n)], norm(D)


def in_graph(f):
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f()
    return graph.replay


if __name__ == '__main__':
    n_embd = 2048                   # of config/ldlm_qwen3_6_35b_a3b.py
    n_ff = 5464
    rows = 64
    layers = 4                      # different ones, 400 MB: none is left in the L2 cache when its turn comes again
    steps = 10                      # times all layers
    result = ''                     # results/x.json
    from configurator import configure
    config = configure(globals(), sys.argv[1:])
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("persistent_block.py needs a Hopper GPU")
    if n_embd % 256 or not 1 <= rows <= 64: raise SystemExit("n_embd must be a multiple of 256, rows from 1 to 64")
    if min(n_embd, n_ff, layers, steps) < 1: raise SystemExit("n_embd, n_ff, layers and steps must be at least 1")
    for size in (-(-n_embd // HD), -(-n_ff // HD)):
        if size <= -(-size // PARTS) * (PARTS - 1):
            raise SystemExit(f"n_embd or n_ff: {size} pairs of tiles cannot be cut into {PARTS} parts of one length")
    started, n = time.time(), layers * steps
    torch.manual_seed(0)
    with torch.no_grad():
        blocks, last = random_blocks(layers, n_embd, n_ff, 'cuda', torch.bfloat16)
        x = torch.randn(rows, n_embd, device='cuda').bfloat16()
        rot = K.rope_tables(torch.arange(rows, device='cuda')[None], HD, 1e4)
        ours, want = Blocks(blocks, last, rot[0][0], rot[1][0]), plain(x, blocks, last, rot).float()
        n_bytes = sum(w.nbytes for b in blocks for w in b) / layers
        roof = rooflines(True)['bytes']
        results = [dict(way='limit', us=1e6 * n_bytes / roof, mb=n_bytes / 1e6, gb_per_s=roof / 1e9)]
        us = lambda f, *args: 1e3 * median_ms(in_graph(lambda: f(*args)), True) / n
        results.append(dict(way='plain', us=us(plain, x, blocks * steps, last, rot)))
        got = ours(x, layers).float()
        facts = dict(rel_error=((got - want).norm() / want.norm()).item(),
                     same=all(torch.equal(ours(x, layers).float(), got) for _ in range(10)))
        for flight in (1, 2, 3, 4, 8):
            row = dict(way='persistent', flight=flight, us=us(ours, x, n, '', flight))
            results.append(row | facts if flight == FLIGHT else row)
        for without in ('weights', 'activations', 'attention', 'norms'):
            results.append(dict(way='persistent', flight=FLIGHT, without=without, us=us(ours, x, n, without)))
    for row in results: print(row)
    if result:
        facts = provenance('cuda', started)
        facts['versions']['triton'] = triton.__version__
        write_json(Path(result), facts | dict(results=results, config=config))
