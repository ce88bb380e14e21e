// Few tokens times 4-bit weights on Hopper, bit-equal however many tokens are read with a row.
//
// What it computes, and the layout of its operands, is told in w4a16_hopper.py. Here is how.
//
// A pair of blocks (a cluster) takes 512 output features, 256 each, over a range of chunks of 128
// inputs, and goes on to the next 512 where its range does (stream_k.cuh). One thread of a block
// copies weights for itself, another one half of each chunk of x for both. Two warpgroups multiply,
// each two tiles of 64 features: codes are opened in registers and are the left operand of wgmma, x
// in shared memory the right one, so that features are the long side. Each group's product is exact
// in the codes and is scaled in float32.
//
// Weights are constants, so their copies start before the kernel in front has ended
// (programmatic dependent launch); only x waits for it.
//
// Set in front of this text:
//   TOKENS   columns of the tile, a multiple of 8, at most 64
//   STAGES   chunks in flight
//   REGISTERS  of a thread at the start; COPIERS_HAVE, CONSUMERS_HAVE after it
//   BF16     x and y are bfloat16 instead of float16
//   SCALE    type of scales: 0 float16, 1 bfloat16, 2 float32
//   ZEROS    zeros are stored; else every zero is 8
//   SPANS    groups in a chunk: 2 for groups of 64, else 1
//   WGMMA_*  the product's instruction for that many tokens, see w4a16_hopper.py

constexpr int ROWS = 256;           // output features of a block
constexpr int CHUNK = 128;          // inputs of a stage
constexpr int CONSUMERS = 256;      // threads that multiply: two warpgroups, each two tiles of 64
constexpr int HELD = TOKENS / 2;  // accumulators of a thread
constexpr u32 AT_ONCE = TOKENS <= 48 ? 2 : 1;  // chunks between two waits for everything
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int X_BYTES = TOKENS * CHUNK * 2;
constexpr int WORD_BYTES = ROWS * CHUNK / 2;
constexpr int ALL_SCALES = ROWS * SPANS * SCALE_BYTES;
constexpr int ALL_ZEROS = ZEROS ? ROWS * SPANS : 0;
constexpr int STAGE_BYTES = (X_BYTES + WORD_BYTES + ALL_SCALES + ALL_ZEROS + 1023) / 1024 * 1024;

// x in shared memory as wgmma reads it: rows of 128 bytes, swizzled in blocks of 8 rows.
// PTX ISA, matrix descriptor: addresses in units of 16 bytes; the low word alone tells where.
__device__ __forceinline__ u32 descriptor_low(u32 at) { return at >> 4 | 1u << 16; }
constexpr u64 DESCRIPTOR_HIGH = u64{64} << 32 | u64{1} << 62;

__device__ __forceinline__ void multiply(float (&sum)[HELD], const u32 (&a)[4], u64 b, int adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " WGMMA_ADDS ", 0;\n" WGMMA_LINE "\n}"
                 : WGMMA_SUMS(sum)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

__device__ __forceinline__ u32 picked(u32 word, u32 mask, u32 base) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(base));
    return out;
}

// The codes of 16 inputs, less their zeros, of rows g (low) and g + 8 (high) of a warp.
//
// Set into the mantissa of 1024 (float16) or 128 (bfloat16) a code is exact; `low` and `high` are
// that number plus the zero, twice. In float16 a code four bits up is worth 16 and is scaled down.
__device__ __forceinline__ void open_codes(u32 word, u32 low, u32 high, u32 (&a)[4]) {
#if BF16
    constexpr u32 BASE = 0x43004300, MASK = 0x000f000f;
    a[0] = picked(word, MASK, BASE);
    a[1] = picked(word >> 4, MASK, BASE);
    a[2] = picked(word >> 8, MASK, BASE);
    a[3] = picked(word >> 12, MASK, BASE);
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[0]) : "r"(low));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[1]) : "r"(high));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[2]) : "r"(low));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[3]) : "r"(high));
#else
    constexpr u32 BASE = 0x64006400, LOW = 0x000f000f, HIGH = 0x00f000f0, SIXTEENTH = 0x2c002c00;
    const u32 upper = word >> 8;
    a[0] = picked(word, LOW, BASE);
    a[1] = picked(word, HIGH, BASE);
    a[2] = picked(upper, LOW, BASE);
    a[3] = picked(upper, HIGH, BASE);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[0]) : "r"(low));
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[1]) : "r"(SIXTEENTH), "r"(high));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[2]) : "r"(low));
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[3]) : "r"(SIXTEENTH), "r"(high));
#endif
}

__device__ __forceinline__ u32 low_constant(u32 zero) {
    return ((BF16 ? 0x4300u : 0x6400u) + zero) * 0x00010001u;
}

__device__ __forceinline__ u32 high_constant(u32 zero) {
    // float16: -(64 + zero), whose last place is 1/16.
    return (BF16 ? 0x4300u + zero : 0xd400u + (zero << 4)) * 0x00010001u;
}

__device__ __forceinline__ float scale_at(u32 at, int row) {
    float value;
    if constexpr (SCALE == 2) {
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at + row * 4));
    } else {
        u16 bits;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at + row * 2));
        if constexpr (SCALE == 1) {
            value = __uint_as_float(static_cast<u32>(bits) << 16);
        } else {
            asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        }
    }
    return value;
}

__device__ __forceinline__ u32 zero_at(u32 at, int row) {
    u32 value;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(at + row));
    return value;
}

// Where a consumer is in the ring of stages.
struct Ring {
    u32 stages, full, empty;
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// What a thread holds of a tile of 64 features and one span of inputs.
struct Tile {
    u32 word[2 / SPANS][4];
    float scale[2];  // of rows g and g + 8
    u32 low, high;
};

// Read a tile (0 or 1 of this warpgroup) of a span of the chunk that the ring is at.
template <int SPAN, int TILE>
__device__ __forceinline__ Tile load(const Ring& ring) {
    const int tile = threadIdx.x / 128 * 2 + TILE, thread = threadIdx.x % 128;
    const int row = SPAN * ROWS + tile * 64 + thread / 32 * 16 + thread % 32 / 4;
    const u32 words_at = ring.stages + ring.stage * STAGE_BYTES + X_BYTES;
    const u32 scales_at = words_at + WORD_BYTES, zeros_at = scales_at + ALL_SCALES;
    Tile made;
#pragma unroll
    for (int half = 0; half < 2 / SPANS; ++half) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(made.word[half][0]), "=r"(made.word[half][1]),
                       "=r"(made.word[half][2]), "=r"(made.word[half][3])
                     : "r"(words_at + (tile * 2 + SPAN + half) * 2048 + thread * 16));
    }
    made.scale[0] = scale_at(scales_at, row);
    made.scale[1] = scale_at(scales_at, row + 8);
    made.low = low_constant(8), made.high = high_constant(8);
    if constexpr (ZEROS) {
        made.low = low_constant(zero_at(zeros_at, row));
        made.high = high_constant(zero_at(zeros_at, row + 8));
    }
    return made;
}

// A tile's product under way: where it goes, what it is scaled by, and its left operand.
struct Product {
    float part[HELD];
    float scale[2];
    u32 a[8 / SPANS][4];

    // Open a tile's codes and start its product with a span of x.
    __device__ __forceinline__ void start(const Tile& tile, u32 b) {
        scale[0] = tile.scale[0], scale[1] = tile.scale[1];
#pragma unroll
        for (int i = 0; i < 8 / SPANS; ++i) {
            open_codes(tile.word[i / 4][i % 4], tile.low, tile.high, a[i]);
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 8 / SPANS; ++i) {
            multiply(part, a[i], DESCRIPTOR_HIGH | (b + i / 4 * (X_BYTES / 32) + i % 4 * 2), i > 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    // Add a product that has ended to its sum.
    __device__ __forceinline__ void add_to(float (&sum)[HELD]) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) asm volatile("" : "+f"(part[i])::"memory");
#pragma unroll
        for (int i = 0; i < HELD; ++i) sum[i] = fmaf(scale[i / 2 % 2], part[i], sum[i]);
    }
};

// Add the products of COUNT chunks to the sums of a warpgroup's two tiles. While one tile's product
// runs the next one's codes are opened.
//
// tile: the first of the ring's chunk; at the end that of the next chunk, if there is one.
// more: chunks of the whole range from the ring's on. The last ones are not released: nobody waits
// for them, and the other block may have ended.
template <u32 COUNT>
__device__ __forceinline__ void take(float (&sum)[2][HELD], Tile& tile, Ring& ring, u32 more) {
    constexpr int PRODUCTS = 2 * SPANS * static_cast<int>(COUNT);
    Product product[PRODUCTS];
    u32 left = ring.empty + 8 * ring.stage;
#pragma unroll
    for (int i = 0; i <= PRODUCTS; ++i) {
        const bool ends_span = i % 2 == 1, ends_chunk = i % (2 * SPANS) == 2 * SPANS - 1;
        const u32 left_before = left;
        if (i < PRODUCTS) {
            const int span = i / 2 % SPANS;
            const u32 x_at = ring.stages + ring.stage * STAGE_BYTES;
            product[i].start(tile, descriptor_low(x_at) + span * (X_BYTES / 32));
            if (ends_chunk) {
                left = ring.empty + 8 * ring.stage;
                ring.next();
                if (i < PRODUCTS - 1 || more > COUNT) {
                    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
                    tile = load<0, 0>(ring);
                }
            } else if (ends_span) {
                tile = load<SPANS - 1, 0>(ring);
            } else if (span == 0) {
                tile = load<0, 1>(ring);
            } else {
                tile = load<SPANS - 1, 1>(ring);
            }
        }
        if (i > 0) {
            i < PRODUCTS ? products_wait<1>() : products_wait<0>();
            product[i - 1].add_to(sum[(i - 1) % 2]);
            if (i % (2 * SPANS) == 0) {
                __syncwarp();
                const u32 empty = i < PRODUCTS ? left_before : left;
                const bool awaited = more >= STAGES + i / (2 * SPANS);
                if (awaited && threadIdx.x % 32 < 2) barrier_arrive_at(empty, threadIdx.x % 32);
            }
        }
    }
}

// Where one that copies is in the ring of stages. It steps by additions alone: what a chunk's
// copies cost must stay below what the chunk takes to arrive.
struct Place {
    u32 at, full, empty;  // of the stage
    u32 stage = 0, phase = 1;  // nobody waits in the first round: a barrier begins after its phase 1

    __device__ __forceinline__ void next() {
        at += STAGE_BYTES, full += 8, empty += 8, ++stage;
        if (stage == STAGES) {
            at -= STAGES * STAGE_BYTES, full -= 8 * STAGES, empty -= 8 * STAGES;
            stage = 0, phase ^= 1;
        }
    }
};

// The thread that copies words, scales and zeros of a block's chunks, from one on.
struct Weights {
    const u8 *words, *scales, *zeros;
    Place to;
    // A step holds one chunk's scales, of two spans or as one of several under a group.
    u32 chunk, chunks, in_step, chunks_per_step, steps;
    u64 once;

    __device__ __forceinline__ void copy() {
        barrier_wait(to.empty, to.phase);
        barrier_expect(to.full, WORD_BYTES + ALL_SCALES + ALL_ZEROS);
        copy_in(to.at, words, WORD_BYTES, to.full, once);
        copy_in(to.at + WORD_BYTES, scales, ALL_SCALES, to.full, once);
        if constexpr (ZEROS) {
            copy_in(to.at + WORD_BYTES + ALL_SCALES, zeros, ALL_ZEROS, to.full, once);
        }
        to.next();
        words += WORD_BYTES;
        ++chunk, ++in_step;
        if (chunk == chunks) {  // on to the next tile, over the other block's part of it
            words += u64{chunks} * WORD_BYTES;
            scales += u64{steps + 1} * ALL_SCALES, zeros += u64{steps + 1} * ALL_ZEROS;
            chunk = in_step = 0;
        } else if (in_step == chunks_per_step) {
            scales += ALL_SCALES, zeros += ALL_ZEROS;
            in_step = 0;
        }
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __maxnreg__(REGISTERS)
    product(const __grid_constant__ TensorMap x, const u8* __restrict__ words,
            const u8* __restrict__ scales, const u8* __restrict__ zeros, float4* parts,
            u32* counters, u16* y, u32 n, u32 n_out, u32 tiles, u32 chunks, u32 chunks_per_step) {
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    __shared__ u32 arrived;
    asm volatile("griddepcontrol.launch_dependents;");
    const u32 stages = (shared_address(raw) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const u32 rank = rank_in_pair(), pair = blockIdx.x / 2, pairs = gridDim.x / 2;
    const u32 units = tiles * chunks;
    const u32 begin = start_of(pair, pairs, units), end = start_of(pair + 1, pairs, units);
    const u32 count = end - begin, ahead = min(count, u32{STAGES}), chunk = begin % chunks;

    const u32 steps = (chunks + chunks_per_step - 1) / chunks_per_step;
    const u64 block = begin / chunks * 2 + rank, step = block * steps + chunk / chunks_per_step;
    Weights weights{words + (block * chunks + chunk) * WORD_BYTES, scales + step * ALL_SCALES,
                    zeros + step * ALL_ZEROS, {stages + X_BYTES, full, empty},
                    chunk, chunks, chunk % chunks_per_step, chunks_per_step, steps, 0};
    if (threadIdx.x == CONSUMERS) {
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 2);  // whoever copies weights, and x
            barrier_init(empty + 8 * stage, 2 * CONSUMERS / 32);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // for the copies of this block
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(weights.once));
#pragma unroll 1
        for (u32 i = 0; i < ahead; ++i) weights.copy();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the other's of x
    }
    __syncwarp();
    pair_arrive();
    pair_wait();

    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPIERS_HAVE));
        if (threadIdx.x == CONSUMERS) {
#pragma unroll 1
            for (u32 i = ahead; i < count; ++i) weights.copy();
        } else if (threadIdx.x == CONSUMERS + 32) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            Place to{stages + rank * (X_BYTES / 2), full, empty};
            u32 column = chunk * CHUNK + rank * (CHUNK / 2);
#pragma unroll 1
            for (u32 i = 0; i < count; ++i) {
                barrier_wait(to.empty, to.phase);
                barrier_expect(to.full, X_BYTES);
                copy_to_pair(to.at, &x, static_cast<int>(column), to.full);
                to.next();
                column += CHUNK;
                if (column >= chunks * CHUNK) column -= chunks * CHUNK;
            }
        }
        __syncwarp();
        pair_arrive();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS_HAVE));
        asm volatile("griddepcontrol.wait;" ::: "memory");
        const Share share{parts, counters, &arrived, rank, pair, pairs, chunks, units};
        Ring ring{stages, full, empty};
        float sum[2][HELD];
        barrier_wait(ring.full, ring.phase);
        Tile held = load<0, 0>(ring);
        for (u32 unit = begin; unit < end;) {
            const u32 tile = unit / chunks, from = unit;
            const u32 until = min(end, (tile + 1) * chunks);
#pragma unroll
            for (int i = 0; i < HELD; ++i) sum[0][i] = sum[1][i] = 0.0f;
            for (; unit + AT_ONCE <= until; unit += AT_ONCE) {
                take<AT_ONCE>(sum, held, ring, end - unit);
            }
            for (; unit < until; ++unit) take<1>(sum, held, ring, end - unit);
            if (unit == end) pair_arrive();
            if (until - from == chunks || add_parts<CONSUMERS, 16>(sum, share, tile)) {
                // Of the block, a warp's first in its first tile.
                const u32 row = threadIdx.x / 128 * 128 + threadIdx.x % 128 / 32 * 16;
                const u32 feature = (tile * 2 + rank) * ROWS + row;
                store(sum[0], y, n, n_out, feature);
                store(sum[1], y, n, n_out, feature + 64);
            }
        }
    }
    pair_wait();  // the other has all that this block copied for it, and arrives here no more
}
