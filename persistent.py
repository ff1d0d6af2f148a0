"""All steps of latent sampling for a single text as one kernel. For Hopper GPUs, in Gluon, Triton's lower level.

For a batch of one the sampler reads all weights of the denoiser in every step, for 64 rows at most: the memory bus is
the limit, and it idles at the beginning of each of a block's eight kernels. Here one program per multiprocessor stays
for all steps; a barrier in memory stands where a kernel would end, and weights keep coming over it. (Plain Triton's
loads begin with the loop that uses them.)

    words        tile: 64 columns of a product; pair: 16 KB, two tiles of 64 inputs of weights or of 64 columns of
                 activations; unit: what a program computes at a time; part: a quarter of the inputs of a tile
    weights      a warp of its own reads a program's share through a ring in shared memory, a pair at a time. In memory
                 the first pairs of all programs come first, then the second ...: what is read at one time lies
                 together. No more than two pairs per program are on the way, and (below 32 heads) one while it waits
                 for others: a full queue would hold up all else
    activations  from the L2 cache, where they are asked to stay, three pairs ahead
    products     a program has 48 columns of q, k and v, 96 of gate and up, or a part of a tile of o, down, out and,
                 with adaLN, in. The four programs of such a tile wait for each other, then each adds up a quarter of
                 its rows and does what comes next with them. No atomic additions: the same bits come out every time
    norms        the weights of an RMSNorm go into the input of a product, what it divides by into the result; adaLN's
                 shifts become biases
    attention    a head per program; what QK-norm divides by goes into the scores, its weights into the rotation

LOG.md tells what was tried, and how long each part takes.
"""
import math

import torch
import torch.nn.functional as F
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

sync = getattr(gl, 'barrier', None) or gl.thread_barrier                # names of Triton 3.9, of 3.6
load_tile = getattr(tma, 'async_load', None) or tma.async_copy_global_to_shared
load_async = getattr(async_copy, 'async_load', None) or async_copy.async_copy_global_to_shared
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))               # of weights in shared memory
NARROW = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))                  # of activations: as in memory, 16 columns
PAIR = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # ... and each thread copies 16 bytes
QUARTER = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0]))       # a quarter of a tile's rows (16, 64)
SUMS = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))  # (tiles, 64)
SUMS_OF_HEAD = gl.constexpr(gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0]))          # (4, 64)
SUMS_OF_QUARTER = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))        # (tiles, 16)
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))     # (64, 64) of a product
MMA32 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
MMA16 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
# head size, parts; pairs of weights in shared memory, of activations (a power of 2), of weights on the way
HD, PARTS, RING, SLOTS, FLIGHT = 128, 4, 10, 4, 2


@gluon.jit
def ask_for_quiet(quiet, yes: gl.constexpr):
    """From now on this program's weights come one pair at a time (yes), or FLIGHT."""
    quiet.store(gl.full([1], yes, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))


@gluon.jit
def look(counter):
    """What a counter is now; what others wrote before they added to it can be read then."""
    return gl.inline_asm_elementwise('ld.acquire.gpu.global.b32 $0, [$1];', '=r,l', [counter], dtype=gl.int32,
                                     is_pure=False, pack=1)


@gluon.jit
def everyone(bar, quiet, P: gl.constexpr):
    """All programs are here, and see what the others wrote. Program 0 adds what makes the sum 2^31: the sign flips,
    and nothing has to be reset, not even between launches."""
    ask_for_quiet(quiet, 1)
    sync()
    step = gl.where(gl.program_id(0) == 0, 2147483649 - P, 1).to(gl.int32)
    old = gl.atomic_add(bar, step, sem='acq_rel', scope='gpu')
    now = old
    while (now ^ old) >= 0: now = look(bar)
    sync()
    ask_for_quiet(quiet, 0)


@gluon.jit
def zero():
    """0, but no compiler knows it."""
    return gl.inline_asm_elementwise('mov.b32 $0, $1;', '=r,r', [gl.to_tensor(0)], dtype=gl.int32, is_pure=False,
                                     pack=1)


@gluon.jit
def anew(pointer):
    """The same pointer. Addresses that are made of it are made here, not before all loops, in registers that others
    need (LOG.md: what spilling costs). Times 16, so that the alignment stays known."""
    return pointer + zero() * 16


# ---- weights -------------------------------------------------------------------------------------------------


@gluon.jit
def read_product(w, first, units: gl.constexpr, pairs: gl.constexpr, PARTS: gl.constexpr, ring, n, FLIGHT: gl.constexpr,
                 QUIET: gl.constexpr, P: gl.constexpr):
    """This program's pairs of a product's weights, through the ring; n: how many were read before. ring: the pairs;
    barriers, which are there and which are no longer needed; whether quiet was asked for."""
    tiles, full, free, quiet = ring
    RING: gl.constexpr = tiles.shape[0]
    LEN: gl.constexpr = (pairs + PARTS - 1) // PARTS
    for unit in range(gl.program_id(0), units, P):
        for k in range(gl.minimum(pairs - unit % PARTS * LEN, LEN)):
            slot, late = n % RING, n - FLIGHT                           # `late` is there, `slot` no longer needed
            mbarrier.wait(full.index(late % RING), late // RING & 1, pred=late >= 0)
            mbarrier.wait(free.index(slot), n // RING & 1 ^ 1, pred=n >= RING)
            if QUIET:                                                   # the pair before is there, too
                alone = gl.max(quiet.load(gl.BlockedLayout([1], [32], [1], [0])), 0) > 0
                mbarrier.wait(full.index((n + RING - 1) % RING), (n - 1) // RING & 1, pred=alone & (n >= 1))
            mbarrier.expect(full.index(slot), 16384)
            load_tile(w, [(first + k * units + unit) * 128, 0], full.index(slot), tiles.index(slot))
            n += 1
    return n


@gluon.jit
def read_weights(w, ring, n_steps, layers, H: gl.constexpr, N_FF: gl.constexpr, GATES: gl.constexpr,
                 PARTS: gl.constexpr, ADALN: gl.constexpr, FLIGHT: gl.constexpr, P: gl.constexpr):
    """All that this program's `compute` will use, in that order."""
    O: gl.constexpr = 8 * H * (3 * H // 4)                              # first pairs of o, gate and up, down; all
    FF: gl.constexpr = O + 2 * H * H
    DOWN: gl.constexpr = FF + GATES * (3 * H // 2)
    ALL: gl.constexpr = DOWN + 2 * H * PARTS * ((N_FF // 128 + PARTS - 1) // PARTS)
    QUIET: gl.constexpr = H < 32                                        # with 16 heads 8% faster, with 40 4% slower
    n = 0
    for _ in range(n_steps):
        if ADALN:
            n = read_product(w, layers * ALL + 2 * H * H, 2 * H * PARTS, 2 * H, PARTS, ring, n, FLIGHT, QUIET, P)
        for layer in range(layers):
            n = read_product(w, layer * ALL, 8 * H, 3 * H // 4, 1, ring, n, FLIGHT, QUIET, P)
            n = read_product(w, layer * ALL + O, 2 * H * PARTS, H, PARTS, ring, n, FLIGHT, QUIET, P)
            n = read_product(w, layer * ALL + FF, GATES, 3 * H // 2, 1, ring, n, FLIGHT, QUIET, P)
            n = read_product(w, layer * ALL + DOWN, 2 * H * PARTS, N_FF // 128, PARTS, ring, n, FLIGHT, QUIET, P)
        n = read_product(w, layers * ALL, 2 * H * PARTS, H, PARTS, ring, n, FLIGHT, QUIET, P)


@gluon.jit
def weights(ring, turn):
    """The pair of tiles whose turn it is, when it is there, its slot, and the turn of the next; a turn is (slot, parity
    of the round)."""
    tiles, full, free, quiet = ring
    slot, parity = turn
    mbarrier.wait(full.index(slot), parity)
    last = slot + 1 == tiles.shape[0]
    return tiles.index(slot), slot, (gl.where(last, 0, slot + 1), gl.where(last, parity ^ 1, parity))


@gluon.jit
def used(ring, slot, pred):
    """What is in this slot may be overwritten."""
    mbarrier.arrive(ring[2].index(slot), pred=pred)


# ---- activations ---------------------------------------------------------------------------------------------


@gluon.jit
def place(first, N: gl.constexpr, L: gl.constexpr, W: gl.constexpr):
    """Where columns first to first + N of 64 rows lie, in layout L: W columns of all rows, the next W columns ..."""
    row, col = gl.arange(0, 64, layout=gl.SliceLayout(1, L)), gl.arange(0, N, layout=gl.SliceLayout(0, L))
    return first * 64 + (row * W)[:, None] + (col // W * 64 * W + col % W)[None, :]


@gluon.jit
def keep(to, x):
    """For other programs to read soon: asked to stay in the L2 cache."""
    gl.store(to, x.to(to.dtype.element_ty), eviction_policy='evict_last')


@gluon.jit
def keep_wide(to, first, x, N: gl.constexpr, slot):
    """Columns first to first + N of activations: through shared memory, so that each thread writes 16 bytes."""
    part = slot.slice(0, 64).slice(0, N, 1)
    part.store(x.to(to.dtype.element_ty))
    sync()
    keep(to + place(first, N, PAIR, 16), part.load(PAIR))


@gluon.jit
def fetch(x, pair, slots, n, more):
    """A pair of x, the n-th to be fetched; not more: nothing, for `arrived` to count."""
    i, j = gl.arange(0, 128, layout=gl.SliceLayout(1, PAIR)), gl.arange(0, 64, layout=gl.SliceLayout(0, PAIR))
    # as place(..., 16) has it, two tiles
    at = (i // 64 * 4096 + i % 64 * 16)[:, None] + (j // 16 * 1024 + j % 16)[None, :]
    if more: load_async(slots.index(n & (slots.shape[0] - 1)), x + pair * 8192 + at, eviction_policy='evict_last')
    async_copy.commit_group()


@gluon.jit
def fetch_first(x, pair, slots, n):
    for i in gl.static_range(slots.shape[0] - 1): fetch(x, pair + i, slots, i, i < n)


@gluon.jit
def arrived(on_the_way: gl.constexpr):
    """All that was fetched but the last `on_the_way` is there, and the matrix units see it."""
    async_copy.wait_group(on_the_way)
    fence_async_shared()
    sync()


@gluon.jit
def dot(x, w, acc):
    acc = mma(x.slice(0, 64), w.slice(0, 64).permute((1, 0)), acc, is_async=True)
    return mma(x.slice(64, 64), w.slice(64, 64).permute((1, 0)), acc, is_async=True)


@gluon.jit
def product(x, first, n, slots, ring, turn):
    """Pairs first to first + n of x, of which fetch_first was called, times the next n weights -> (64, 64) fp32."""
    SLOTS: gl.constexpr = slots.shape[0]
    z, done = gl.zeros((64, 64), gl.float32, layout=MMA), 0
    for i in range(n):
        arrived(SLOTS - 2)
        tile, slot, turn = weights(ring, turn)
        z = mma_wait(2, deps=(dot(slots.index(i & (SLOTS - 1)), tile, z),))     # those of the iteration before are done
        sync()
        used(ring, done, i > 0)
        fetch(x, first + i + SLOTS - 1, slots, i + SLOTS - 1, i + SLOTS - 1 < n)
        done = slot
    z = mma_wait(0, deps=(z,))
    sync()
    used(ring, done, True)
    return z, turn


@gluon.jit
def wide_product(x, pairs: gl.constexpr, slots, ring, turn, S: gl.constexpr, BIG: gl.constexpr, SMALL: gl.constexpr):
    """All pairs of x, of which fetch_first was called, times the next weights: 2 S and S columns -> (64, 2 S) and
    (64, S) fp32. 3 pairs of weights meet EACH pairs of x: the first has the 2 S columns for the first half of them, the
    third those for the second half, the second the S columns for all."""
    SLOTS: gl.constexpr = slots.shape[0]
    EACH: gl.constexpr = 64 // S                                        # pairs of x to 3 of weights
    z, y = gl.zeros((64, 2 * S), gl.float32, layout=BIG), gl.zeros((64, S), gl.float32, layout=SMALL)
    old_small, old_big = 0, 0
    for i in range(pairs // EACH):
        for h in gl.static_range(EACH):
            n = i * EACH + h
            arrived(SLOTS - 2)
            pair = slots.index(n & (SLOTS - 1))
            if h == 0:
                big, slot, turn = weights(ring, turn)
                small, new_small, turn = weights(ring, turn)
            if h == EACH // 2: big, new_big, turn = weights(ring, turn)
            for j in gl.static_range(2):
                part = pair.slice(64 * j, 64)
                z = mma(part, big.slice((2 * h + j) % EACH * 2 * S, 2 * S).permute((1, 0)), z, is_async=True)
                y = mma(part, small.slice((2 * h + j) * S, S).permute((1, 0)), y, is_async=True)
            z, y = mma_wait(4, deps=(z, y))                             # those of the iteration before are done
            sync()
            if h == 0:
                used(ring, old_small, i > 0)
                used(ring, old_big, i > 0)
            if h == EACH // 2: used(ring, slot, True)
            fetch(x, n + SLOTS - 1, slots, n + SLOTS - 1, n + SLOTS - 1 < pairs)
        old_small, old_big = new_small, new_big
    z, y = mma_wait(0, deps=(z, y))
    sync()
    used(ring, old_small, True)
    used(ring, old_big, True)
    return z, y, turn


@gluon.jit
def quarter_at(tile, part, W: gl.constexpr):
    """Where a quarter of the rows of a tile lies, as `place` has it."""
    row = part * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, QUARTER))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, QUARTER))[None, :]
    return tile * 4096 + col // W * 64 * W + row * W + col % W


@gluon.jit
def sum_of_parts(z, quiet, parts, tile, part, count, PARTS: gl.constexpr):
    """z (64, 64): a part of a tile's sum. Waits for the other parts -> a quarter of the rows of their sum (16, 64),
    always in the same order."""
    ask_for_quiet(quiet, 1)
    keep(parts + (tile * PARTS + part) * 4096 + place(0, 64, MMA, 8), z)
    sync()
    old = gl.atomic_add(count + tile, 1, sem='acq_rel', scope='gpu')
    now, all_in = old + 1, (old | PARTS - 1) + 1
    while now - all_in < 0: now = look(count + tile)
    sync()
    at = parts + tile * (PARTS * 4096) + quarter_at(0, part, 8)
    s = gl.load(at)
    for i in gl.static_range(1, PARTS): s += gl.load(at + i * 4096)
    return s


@gluon.jit
def next_input(v, weight, tile, part, x, y, squares):
    """v, 16 rows and 64 columns of the residual stream -> x; times the weights of its norm -> y; and its sums of
    squares."""
    v = v.to(x.dtype.element_ty)
    keep(x + quarter_at(tile, part, 8), v)
    v = v.to(gl.float32)
    keep(y + quarter_at(tile, part, 16), v * weight[None, :])
    keep(squares + tile * 64 + part * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, QUARTER)), gl.sum(v * v, 1))


@gluon.jit
def vector(x, tile):
    """64 elements for the columns of a tile."""
    return gl.load(x + tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, QUARTER)), eviction_policy='evict_last')


@gluon.jit
def summed_product(a, pairs: gl.constexpr, unit, shares, count, slots, ring, turn, PARTS: gl.constexpr):
    """A part of a's pairs times weights, for a tile of 64 columns -> a quarter of the rows of the whole product."""
    LEN: gl.constexpr = (pairs + PARTS - 1) // PARTS
    tile, part = unit // PARTS, unit % PARTS
    n = gl.minimum(pairs - part * LEN, LEN)
    fetch_first(a, part * LEN, slots, n)
    ask_for_quiet(ring[3], 0)
    z, turn = product(a, part * LEN, n, slots, ring, turn)
    return sum_of_parts(z, ring[3], shares, tile, part, count, PARTS), turn


@gluon.jit
def add_product(a, pairs: gl.constexpr, unit, gate, weight, x, y, squares, shares, count, slots, ring, turn,
                PARTS: gl.constexpr, ADALN: gl.constexpr):
    """x += gate * (a times weights), for a tile of 64 columns and a part of a's pairs."""
    tile, part = unit // PARTS, unit % PARTS
    old = gl.load(x + quarter_at(tile, part, 8), eviction_policy='evict_last').to(gl.float32)
    scale = vector(weight, tile)
    if ADALN: g = vector(gate, tile)
    s, turn = summed_product(a, pairs, unit, shares, count, slots, ring, turn, PARTS)
    next_input(old + (s * g[None, :] if ADALN else s), scale, tile, part, x, y, squares)
    return turn


@gluon.jit
def sums(squares, tiles: gl.constexpr, TILES: gl.constexpr, rows: gl.constexpr, L: gl.constexpr):
    """The sums of squares of each tile, or quarter of a head -> (TILES, rows), 0 beyond `tiles`."""
    i, j = gl.arange(0, TILES, layout=gl.SliceLayout(1, L)), gl.arange(0, rows, layout=gl.SliceLayout(0, L))
    return gl.load(squares + i[:, None] * 64 + j[None, :], (i < tiles)[:, None], 0.0, eviction_policy='evict_last')


@gluon.jit
def inverse_rms(sums, n: gl.constexpr, eps: gl.constexpr):
    """Of rows of n elements, from the sums of squares of their parts (parts, rows) -> (rows,)."""
    return gl.rsqrt(gl.sum(sums, 0) * (1 / n) + eps)


@gluon.jit
def scaled(z, scale, L: gl.constexpr):
    return z * gl.convert_layout(scale, gl.SliceLayout(1, L))[:, None]


@gluon.jit
def swiglu(z, S: gl.constexpr):
    """Of columns gate, up, gate, up ... -> silu(gate) up (64, S)."""
    g, u = gl.split(gl.reshape(z, (64, S, 2)))
    return g * u / (1 + gl.exp(-g))


@gluon.jit
def attend(qkv, o, squares, h, slots, scale: gl.constexpr, eps: gl.constexpr, M: gl.constexpr, H: gl.constexpr):
    """Head h, for all M rows. squares: of the 4 quarters of each query and key, before QK-norm."""
    first = zero()
    for n in gl.static_range(3): fetch(qkv, n * H + h, slots, first + n, True)
    q, k = sums(squares + h * 256, 4, 4, 64, SUMS_OF_HEAD), sums(squares + (H + h) * 256, 4, 4, 64, SUMS_OF_HEAD)
    rq = gl.convert_layout(inverse_rms(q, 128, eps) * scale, gl.SliceLayout(1, MMA))
    rk = gl.convert_layout(inverse_rms(k, 128, eps), gl.SliceLayout(0, MMA))
    seen = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA)) < M
    arrived(1)
    s = dot(slots.index(first), slots.index(first + 1), gl.zeros((64, 64), gl.float32, layout=MMA))
    s = gl.where(seen[None, :], mma_wait(0, deps=(s,)) * rq[:, None] * rk[None, :], -float('inf'))
    p = gl.exp2(s - gl.max(s, 1)[:, None])
    l = (1 / gl.sum(p, 1))[:, None]
    p = gl.convert_layout(p.to(o.dtype.element_ty), gl.DotOperandLayout(0, MMA, 2))
    arrived(0)
    for half in gl.static_range(2):
        y = mma(p, slots.index(first + 2).slice(64 * half, 64), gl.zeros((64, 64), gl.float32, layout=MMA)) * l
        keep_wide(o, 128 * h + 64 * half, y, 64, slots.index(first + half))     # where q and k were
    sync()


@gluon.jit
def compute(ring, slots, table, noise, f32, bf16, counts, n_steps, layers, stride, scale: gl.constexpr,
            eps: gl.constexpr, M: gl.constexpr, H: gl.constexpr, N_FF: gl.constexpr, GATES: gl.constexpr,
            TILES: gl.constexpr, PARTS: gl.constexpr, ADALN: gl.constexpr, NOISY: gl.constexpr, P: gl.constexpr):
    """A step is [in, with adaLN], in each layer qkv, attention, o, gate and up, down, then out; a barrier before each.
    table: fp32 constants, in the order of Steps.table; f32, bf16: what the programs tell each other."""
    D: gl.constexpr = H * 128
    Y: gl.constexpr = D * 64                                            # in bf16: x, y twice, qkv, att, hid, inputs
    QKV: gl.constexpr = 3 * D * 64
    ATT: gl.constexpr = 6 * D * 64
    HID: gl.constexpr = 7 * D * 64
    INPUTS: gl.constexpr = HID + (N_FF + 128) * 64
    SHARES: gl.constexpr = D * 64                                       # in f32: z, parts, squares of x twice, of heads
    SQUARES: gl.constexpr = (1 + PARTS) * D * 64
    HEADS: gl.constexpr = SQUARES + 2 * D
    start = layers * 32768                                              # in table: self_cond, or the bias of dit_in
    factors = start + D
    time = factors + 4 * n_steps
    norms = time + (0 if ADALN else n_steps * D)                        # from here on for each step, `stride` apart
    gates = (2 * layers + 2) * D                                        # from `now`; the D before are dit_out's bias
    qkv_bias = gates + 2 * layers * D
    ff_bias = qkv_bias + 3 * layers * D
    bar, count = counts, counts + 32
    pid, turn = gl.program_id(0), (0, 0)
    i32, j32 = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA32)), gl.arange(0, 32, layout=gl.SliceLayout(0, MMA32))
    j64, j16 = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA)), gl.arange(0, 16, layout=gl.SliceLayout(0, MMA16))
    # the first block of a step has input and sums of squares of its own: they are made while the old are read
    for unit in range(pid, 2 * H * PARTS, P):
        tile, part = unit // PARTS, unit % PARTS
        v = gl.load(f32 + quarter_at(tile, part, 8))
        if ADALN:
            keep(bf16 + INPUTS + quarter_at(tile, part, 16), v)
            keep(bf16 + INPUTS + D * 64 + quarter_at(tile, part, 16), gl.zeros_like(v))
        else:
            v += vector(table + time, tile)[None, :]
            next_input(v, vector(table + norms, tile), tile, part, bf16, bf16 + Y + D * 64, f32 + SQUARES + D)
    for step in range(n_steps):
        now = norms + step * stride
        if ADALN:
            everyone(bar, ring[3], P)
            for unit in range(pid, 2 * H * PARTS, P):
                f, b, t = anew(f32), anew(bf16), anew(table)
                tile, part = unit // PARTS, unit % PARTS
                weight, v = vector(t + now, tile), vector(t + start, tile)
                s, turn = summed_product(b + INPUTS, 2 * H, unit, f + SHARES, count, slots, ring, turn, PARTS)
                next_input(s + v[None, :], weight, tile, part, b, b + Y + D * 64, f + SQUARES + D)
        for layer in range(layers):
            first, norm = (layer == 0).to(gl.int32) * D, now + 2 * layer * D
            everyone(bar, ring[3], P)
            for unit in range(pid, 8 * H, P):                           # 32 columns of q or k, 16 of v
                f, b, t = anew(f32), anew(bf16), anew(table)
                fetch_first(b + Y + first * 64, 0, slots, H)
                s = sums(f + SQUARES + first, 2 * H, TILES, 64, SUMS)
                rotation = t + (layer * 8 + unit // (4 * H) * 4 + unit % 4) * 4096 + i32[:, None] * 32 + j32[None, :]
                own = gl.load(rotation, eviction_policy='evict_last')
                partner = gl.load(rotation + 2048, eviction_policy='evict_last')
                if ADALN:
                    t += now + qkv_bias + layer * 3 * D
                    q_bias, v_bias = gl.load(t + unit * 32 + j32), gl.load(t + 2 * D + unit * 16 + j16)
                r = inverse_rms(s, D, eps)
                q, v, turn = wide_product(b + Y + first * 64, H, slots, ring, turn, 16, MMA32, MMA16)
                q, v = scaled(q, r, MMA32), scaled(v, r, MMA16)
                if ADALN: q, v = q + q_bias[None, :], v + v_bias[None, :]
                f, b = anew(f32), anew(bf16)
                keep(f + HEADS + unit * 64 + i32, gl.sum(q * q, 1))
                q1, q2 = gl.split(gl.reshape(q, (64, 16, 2)))
                q = q * own + gl.convert_layout(gl.reshape(gl.join(q2, q1), (64, 32)), MMA32) * partner
                keep_wide(b + QKV, 32 * unit, q, 32, slots.index(0))
                keep_wide(b + QKV, 2 * D + 16 * unit, v, 16, slots.index(1))
                sync()
            everyone(bar, ring[3], P)
            for h in range(pid, H, P):
                f, b = anew(f32), anew(bf16)
                attend(b + QKV, b + ATT, f + HEADS, h, slots, scale, eps, M, H)
            everyone(bar, ring[3], P)
            for unit in range(pid, 2 * H * PARTS, P):
                f, b, t = anew(f32), anew(bf16), anew(table)
                turn = add_product(b + ATT, H, unit, t + norm + gates, t + norm + D, b, b + Y, f + SQUARES, f + SHARES,
                                   count, slots, ring, turn, PARTS, ADALN)
            everyone(bar, ring[3], P)
            for unit in range(pid, GATES, P):                           # 48 columns of gate, 48 of up
                f, b = anew(f32), anew(bf16)
                fetch_first(b + Y, 0, slots, H)
                s = sums(f + SQUARES, 2 * H, TILES, 64, SUMS)
                if ADALN:
                    t = anew(table) + now + ff_bias + (layer * GATES + unit) * 96
                    v_bias, u_bias = gl.load(t + j64), gl.load(t + 64 + j32)
                r = inverse_rms(s, D, eps)
                v, u, turn = wide_product(b + Y, H, slots, ring, turn, 32, MMA, MMA32)
                v, u = scaled(v, r, MMA), scaled(u, r, MMA32)
                if ADALN: v, u = v + v_bias[None, :], u + u_bias[None, :]
                keep_wide(b + HID, 48 * unit, swiglu(v, 32), 32, slots.index(0))
                keep_wide(b + HID, 48 * unit + 32, swiglu(u, 16), 16, slots.index(1))
                sync()
            everyone(bar, ring[3], P)
            for unit in range(pid, 2 * H * PARTS, P):
                f, b, t = anew(f32), anew(bf16), anew(table)
                turn = add_product(b + HID, N_FF // 128, unit, t + norm + gates + D, t + norm + 2 * D, b, b + Y,
                                   f + SQUARES, f + SHARES, count, slots, ring, turn, PARTS, ADALN)
        everyone(bar, ring[3], P)
        for unit in range(pid, 2 * H * PARTS, P):
            f, b, t = anew(f32), anew(bf16), anew(table)
            tile, part = unit // PARTS, unit % PARTS
            r = inverse_rms(sums(f + SQUARES + part * 16, 2 * H, TILES, 16, SUMS_OF_QUARTER), D, eps)
            at, factor = quarter_at(tile, part, 8), t + factors + 4 * step
            z = gl.load(factor) * gl.load(f + at)
            if NOISY: z += gl.load(factor + 2) * gl.load(noise + step * D * 64 + at)
            v, turn = summed_product(b + Y, H, unit, f + SHARES, count, slots, ring, turn, PARTS)
            z_hat = scaled(v, r, QUARTER) + vector(t + now + gates - D, tile)[None, :]
            z += gl.load(factor + 1) * z_hat
            gl.store(f + at, z)
            if ADALN:
                keep(b + INPUTS + quarter_at(tile, part, 16), z)
                keep(b + INPUTS + D * 64 + quarter_at(tile, part, 16), z_hat * gl.load(factor + 3))
            else:
                v = z + z_hat * vector(t + start, tile)[None, :]
                v += vector(t + time + gl.minimum(step + 1, n_steps - 1) * D, tile)[None, :]
                next_input(v, vector(t + now, tile), tile, part, b, b + Y + D * 64, f + SQUARES + D)


@gluon.jit
def steps_kernel(w, table, noise, f32, bf16, counts, n_steps, layers, stride, scale: gl.constexpr, eps: gl.constexpr,
                 M: gl.constexpr, H: gl.constexpr, N_FF: gl.constexpr, GATES: gl.constexpr, TILES: gl.constexpr,
                 PARTS: gl.constexpr, ADALN: gl.constexpr, NOISY: gl.constexpr, RING: gl.constexpr,
                 SLOTS: gl.constexpr, FLIGHT: gl.constexpr, P: gl.constexpr):
    tiles = gl.allocate_shared_memory(w.dtype, [RING, 128, 64], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    slots = gl.allocate_shared_memory(w.dtype, [SLOTS, 128, 64], NARROW)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    sync()
    quiet = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ask_for_quiet(quiet, 0)
    ring = (tiles, full, free, quiet)
    gl.warp_specialize([
        (compute, (ring, slots, table, noise, f32, bf16, counts, n_steps, layers, stride, scale, eps, M, H, N_FF, GATES,
                   TILES, PARTS, ADALN, NOISY, P)),
        (read_weights, (w, ring, n_steps, layers, H, N_FF, GATES, PARTS, ADALN, FLIGHT, P))], [1], [40])


# ---- packing, launching --------------------------------------------------------------------------------------


def units_of(w, parts):
    """(N, K) -> what units of 64 columns and a part of K read: (units, pairs, 128, 64)."""
    w = F.pad(w, (0, -w.shape[1] % 128)).unflatten(0, (-1, 64)).unflatten(2, (-1, 2, 64))
    w = w.permute(0, 2, 3, 1, 4).flatten(2, 3)                          # (N / 64, pairs, 128, 64)
    return F.pad(w, (0, 0, 0, 0, 0, -w.shape[1] % parts)).unflatten(1, (parts, -1)).flatten(0, 1)


def wide_units(big, small):
    """(units, 2 S, K), (units, S, K) -> what units of 3 S columns read: (units, pairs, 128, 64)."""
    S = small.shape[1]
    tiles = lambda w: w.unflatten(2, (-1, 128 // S, 64)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    first, second = tiles(big).chunk(2, 2)                              # (units, groups, 128, 64)
    return torch.stack([first, tiles(small), second], 2).flatten(1, 2)


def pack(products):
    """(units, pairs, 128, 64) each -> (T * 128, 64): the first pairs of all units, then the second ..., by product."""
    return torch.cat([units.transpose(0, 1).flatten(0, 2) for units in products])


def rows_of_block(block):
    """The matrices of a DiTBlock with outputs in the kernel's order: q and k, v, o, gate and up, down."""
    attn, mlp = block.attn, block.mlp
    D = attn.o_proj.weight.shape[0]
    qk, v = attn.qkv_proj.weight.split([2 * D, D])
    qk = qk.unflatten(0, (-1, 2, HD // 2)).transpose(1, 2).flatten(0, 2)        # partners of a rotation are neighbours
    gate_up = torch.stack(mlp.gate_up_proj.weight.chunk(2), 1).flatten(0, 1)    # gate, up, gate, up ...
    return qk, v, attn.o_proj.weight, F.pad(gate_up, (0, 0, 0, -len(gate_up) % 96)), mlp.down_proj.weight


def products_of_block(block):
    """What the units of a DiTBlock's four products read."""
    qk, v, o, gate_up, down = rows_of_block(block)
    return [wide_units(qk.unflatten(0, (-1, 32)), v.unflatten(0, (-1, 16))), units_of(o, PARTS),
            wide_units(*gate_up.unflatten(0, (-1, 96)).split([64, 32], 1)), units_of(down, PARTS)]


def pays(cfg, device):
    """Whether `Steps` can do it, at sizes like those where it is faster than kernel after kernel."""
    c, pairs = cfg, -(-cfg.n_ff // 128)
    return (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9 and not c.prefix_len
            and c.latent_dim == c.n_embd == c.n_head * HD >= 1024 and c.n_embd % (PARTS * HD) == 0
            and c.n_latents <= 64 and pairs > -(-pairs // PARTS) * (PARTS - 1))         # no part of down is empty


class Steps:
    """All steps of sampling with a LatentModel in bf16 for which `pays` holds. steps: of each, what
    LatentModel.modulations makes of its time, and a, b, c: z = a z + b z_hat + c noise."""

    def __init__(self, m, steps, self_cond):
        c, device = m.cfg, m.head.weight.device
        self.M, D, self.H, self.layers, self.eps = c.n_latents, c.n_embd, c.n_head, c.n_layer, c.norm_eps
        self.P = torch.cuda.get_device_properties(device).multi_processor_count
        cos, sin = (x[0].float() for x in m._rot('latents', 1))         # (M, HD / 2)
        products, rotations = [], []
        for block in m.dit:
            products += products_of_block(block)
            for w1, w2 in (norm.weight.float().chunk(2) for norm in (block.attn.q_norm, block.attn.k_norm)):
                own = torch.stack([cos * w1, cos * w2], 2).view(self.M, 4, 32)
                partner = torch.stack([-sin * w2, sin * w1], 2).view(self.M, 4, 32)
                rotations.append(F.pad(torch.stack([own, partner], 1).permute(2, 1, 0, 3), (0, 0, 0, 64 - self.M)))
        products += [units_of(w, PARTS) for w in (m.dit_out.weight, *([m.dit_in.weight] if c.dit_adaln else []))]
        self.packed = pack(products)
        self.n_ff, self.gates = -(-c.n_ff // 128) * 128, -(-c.n_ff // 48)  # columns of hid that down reads, units of 48
        modulations, *factors = zip(*steps)
        self.n_steps, self.adaln, self.noisy = len(steps), c.dit_adaln, any(factors[2])
        factors = torch.tensor([[*map(float, f), float(self_cond)] for f in zip(*factors)], device=device)
        if c.dit_adaln: start, each = [m.dit_in.bias, factors], self._of_steps(m, modulations)
        else:
            start = [m.dit_self_cond * bool(self_cond), factors, *(last for _, last in modulations)]
            each = torch.cat([*(w for b in m.dit for w in (b.attn_norm.weight, b.mlp_norm.weight)), m.dit_norm.weight,
                              m.dit_out.bias.float()])
        self.stride = each.shape[-1] if c.dit_adaln else 0
        # rotations; self_cond or the bias of dit_in; of all steps a, b, c, self_cond and, without adaLN, the time; of
        # each step, or once for all, norms, the bias of dit_out and, with adaLN, gates, biases of qkv, of gate and up
        self.table = torch.cat([x.float().flatten() for x in (*rotations, *start, each)])
        zeros = lambda n, dtype: torch.zeros(n, device=device, dtype=dtype)
        self.f32 = zeros(D * 64 * (1 + PARTS) + 2 * D + 4 * D, torch.float32)   # z, parts, squares of x, of heads
        self.bf16 = zeros((9 * D + self.n_ff + 128) * 64, self.packed.dtype)    # x, y twice, qkv, att, hid, inputs
        self.counts = zeros(32 + D // 64, torch.int32)                          # of everyone, of parts
        self.noise = zeros(self.noisy * len(steps) * D * 64, torch.float32).view(-1, D // 8, 64, 8)
        self.z = self.f32[:D * 64].view(D // 8, 64, 8)

    def _of_steps(self, m, modulations):
        """With adaLN: of each step, 1 + scale of all norms, the bias of dit_out, gates, and the shifts times the
        matrices behind them, which are biases then (n_steps, numbers)."""
        blocks, last = zip(*modulations)
        scale1, shift1, gate1, scale2, shift2, gate2 = (
            torch.stack([torch.cat([step[i][k] for step in blocks]) for i in range(self.layers)]).float()
            for k in range(6))                                          # (layers, n_steps, D)
        scale, shift = (torch.cat([step[k] for step in last]).float() for k in range(2))
        by_step = lambda *x: torch.stack(x, 1).flatten(0, 1).transpose(0, 1).flatten(1)     # layer after layer
        rows = [rows_of_block(block) for block in m.dit]
        qkv = [x @ torch.cat([qk, v]).float().T for x, (qk, v, *_) in zip(shift1, rows)]
        ff = [x @ gate_up.float().T for x, (_, _, _, gate_up, _) in zip(shift2, rows)]
        bias = shift @ m.dit_out.weight.float().T + m.dit_out.bias
        return torch.cat([by_step(1 + scale1, 1 + scale2), 1 + scale, bias, by_step(gate1, gate2), *qkv, *ff], 1)

    def _columns(self, x):
        """(..., M, D) -> (..., D / 8, M, 8)."""
        return x.unflatten(-1, (-1, 8)).transpose(-2, -3)

    def __call__(self, z, noise=None):
        """z (1, M, D) fp32 -> z behind all steps. noise: (n_steps, M, D), if it has factors."""
        if self.M < 64: self.z.zero_()
        self.z[:, :self.M] = self._columns(z[0])
        if self.noisy: self.noise[:, :, :self.M] = self._columns(noise)
        steps_kernel[(self.P,)](
            TensorDescriptor.from_tensor(self.packed, [128, 64], SWIZZLED.value), self.table,
            self.noise, self.f32, self.bf16, self.counts, self.n_steps, self.layers, self.stride,
            HD ** -0.5 * math.log2(math.e), self.eps, self.M, self.H, self.n_ff, self.gates,
            triton.next_power_of_2(2 * self.H), PARTS, self.adaln, self.noisy, RING, SLOTS, FLIGHT, self.P, num_warps=4,
            launch_cooperative_grid=True)
        return self.z[:, :self.M].transpose(0, 1).flatten(1)[None]
