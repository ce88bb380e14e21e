// Few tokens times 4-bit weights on Hopper; in each FORM bit-equal however many are read with a row.
//
// What it computes, and the layout of its operands, is told in w4a16_hopper.py. Here is how.
//
// A pair of blocks (a cluster) takes 512 output features, 256 each, over a range of chunks of 128
// inputs, and goes on to the next 512 where its range does (stream_k.cuh). One thread of a block
// copies weights for itself, another one half of each chunk of x for both. GROUPS warpgroups share
// four tiles of 64 features: codes are opened in registers and are the left operand of wgmma, x in
// shared memory the right one, so that features are the long side. In which numbers, FORM tells.
//
// Weights are constants, so their copies start before the kernel in front has ended
// (programmatic dependent launch); only x waits for it.
//
// Comes after FORM, which is w4a16_digits.cuh, w4a16_halves.cuh or w4a16_floats.cuh. Set in front of both:
//   TOKENS   tokens of the tile, a multiple of 8, at most 64
//   STAGES   chunks in flight
//   REGISTERS  of a thread at the start; COPIERS_HAVE, CONSUMERS_HAVE after it
//   GROUPS   warpgroups that multiply, 2 or 4
//   BF16     y is bfloat16 instead of float16
//   SCALE    type of scales: 0 float16, 1 bfloat16, 2 float32
//   ZEROS    zeros are stored; else every zero is 8
//   SPANS    groups in a chunk: 2 for groups of 64, else 1
//   WGMMA_*  the product's instruction for that many tokens, see w4a16_hopper.py

// x in shared memory as wgmma reads it: rows of 128 bytes, swizzled in blocks of 8 rows.
// PTX ISA, matrix descriptor: addresses in units of 16 bytes; the low word alone tells where.
__device__ __forceinline__ u32 descriptor_low(u32 at) { return at >> 4 | 1u << 16; }
constexpr u64 DESCRIPTOR_HIGH = u64{64} << 32 | u64{1} << 62;

__device__ __forceinline__ void multiply(Part (&sum)[PART], const u32 (&a)[4], u64 b, int adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " WGMMA_ADDS ", 0;\n" WGMMA_LINE "\n}"
                 : WGMMA_SUMS(sum)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

// Where a consumer is in the ring of stages.
struct Ring {
    u32 stages, full, empty;
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// What a thread holds of a tile of 64 features and one piece of a chunk's inputs.
struct Tile {
    u32 words[8 / PIECES];
    Factors factors;

    // Read one of this warpgroup's tiles, of the chunk that the ring is at. Pieces under one scale
    // are read one after the other.
    __device__ __forceinline__ void load(const Ring& ring, int which, int piece) {
        static_assert(TILES == 1 || PIECES == SPANS, "factors are kept from piece to piece");
        const int tile = threadIdx.x / 128 * TILES + which, thread = threadIdx.x % 128;
        const u32 words_at = ring.stages + ring.stage * STAGE_BYTES + X_BYTES;
        const u32 scales_from = words_at + WORD_BYTES, zeros_from = scales_from + ALL_SCALES;
#pragma unroll
        for (int i = 0; i < 8 / PIECES; i += 4) {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                         : "r"(words_at + (tile * 2 + piece + i / 4) * 2048 + thread * 16));
        }
        if (piece % (PIECES / SPANS) != 0) return;
        const u32 pair = tile * 32 + thread / 32 * 8 + thread % 32 / 4;
        factors.load(scales_from, zeros_from, piece / (PIECES / SPANS) * (ROWS / 2) + pair);
    }
};

// A tile's product under way: its left operand, and what it is scaled by.
struct Product {
    Factors factors;
    u32 a[STEPS][4];
    u32 stage;

    __device__ __forceinline__ void open(const Tile& tile) {
        factors = tile.factors;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) open_step(tile.words, i, tile.factors, a[i]);
        // Here, and not between the instructions that use them, which would wait for them.
#pragma unroll
        for (int i = 0; i < STEPS * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
    }

    // Start it with a piece of the ring's chunk. adds: to what part has.
    __device__ __forceinline__ void start(Part (&part)[PART], const Ring& ring, int piece, bool adds) {
        stage = ring.stages + ring.stage * STAGE_BYTES;
        const u32 b = descriptor_low(stage);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            multiply(part, a[i], DESCRIPTOR_HIGH | (b + step_at(piece * STEPS + i)), adds || i > 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    // Add it to its sum; it has ended.
    __device__ __forceinline__ void add(Part (&part)[PART], float (&sum)[HELD]) {
#pragma unroll
        for (int i = 0; i < PART; ++i) asm volatile("" : "+" PART_REGISTER(part[i])::"memory");
        add_part(part, factors, stage, sum);
    }
};

// Add the products of COUNT chunks to the sums of a warpgroup's tiles. While one product runs the
// next one's codes are opened.
//
// held: the first tile of the ring's chunk; at the end that of the next chunk, if there is one.
// more: chunks of the whole range from the ring's on. The last ones are not released: nobody waits
// for them, and the other block may have ended.
template <u32 COUNT>
__device__ __forceinline__ void take(float (&sum)[TILES][HELD], Tile& held, const Boost& boost,
                                     Ring& ring, u32 more) {
    constexpr int A_CHUNK = TILES * PIECES, PRODUCTS = A_CHUNK * static_cast<int>(COUNT);
    constexpr int PARTS = CHAINED ? TILES : PRODUCTS;
    Product product[PRODUCTS];
    Part part[PARTS][PART];
    const auto end = [&](int i, u32 empty) {
        if (!CHAINED || i >= PRODUCTS - TILES) product[i].add(part[i % PARTS], sum[i % TILES]);
        if (i % A_CHUNK == A_CHUNK - 1) {
            __syncwarp();
            const bool awaited = more > STAGES + i / A_CHUNK;
            if (awaited && threadIdx.x % 32 < 2) barrier_arrive_at(empty, threadIdx.x % 32);
        }
    };
    u32 left = 0;
#pragma unroll
    for (int i = 0; i < PRODUCTS; ++i) {
        const int next = (i + 1) % A_CHUNK;
        const u32 left_before = left;
        if (i % A_CHUNK / TILES % (PIECES / SPANS) == 0) held.factors.prepare(boost);
        product[i].open(held);
        if (UNDER_WAY == 1 && i > 0) {
            products_wait<0>();
            end(i - 1, left_before);
        }
        product[i].start(part[i % PARTS], ring, i % A_CHUNK / TILES, CHAINED && i >= TILES);
        left = ring.empty + 8 * ring.stage;
        if (next == 0) ring.next();
        if (i < PRODUCTS - 1 || more > COUNT) {
            if (next == 0) barrier_wait(ring.full + 8 * ring.stage, ring.phase);
            held.load(ring, next % TILES, next / TILES);
        }
        if (UNDER_WAY == 2 && i > 0) {
            products_wait<1>();
            end(i - 1, left_before);
        }
    }
    products_wait<0>();
    end(PRODUCTS - 1, left);
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
    product(const __grid_constant__ TensorMap x, const float* x_scales, u32 x_stride,
            const u8* __restrict__ words, const u8* __restrict__ scales,
            const u8* __restrict__ zeros, const u32* __restrict__ boosts, float4* parts, u32* counters,
            u16* y, u32 n, u32 n_out, u32 tiles, u32 chunks, u32 chunks_per_step) {
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
            Place to{stages, full, empty};
            u32 at = chunk;
#pragma unroll 1
            for (u32 i = 0; i < count; ++i) {
                barrier_wait(to.empty, to.phase);
                barrier_expect(to.full, X_BYTES + X_SCALES);
                copy_x(to.at, &x, x_scales, x_stride, at, rank, to.full);
                to.next();
                if (++at == chunks) at = 0;
            }
        }
        __syncwarp();
        pair_arrive();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS_HAVE));
        const Share share{parts, counters, &arrived, rank, pair, pairs, chunks, units};
        // Of the range's first tile and its last; those between are whole.
        const Owners of_first = owners_of(share, begin / chunks);
        const Owners of_last = owners_of(share, (end - 1) / chunks);
        // Of the block's part of a tile, a warp's first row in its first 64.
        const auto feature_in = [&](u32 tile) {
            return (tile * 2 + rank) * ROWS + threadIdx.x / 128 * 64 * TILES + threadIdx.x % 128 / 32 * 16;
        };
        const auto boost_of = [&](u32 tile) {
            Boost made;
            made.load(boosts, feature_in(tile) / 2 + threadIdx.x % 32 / 4);
            return made;
        };
        Boost next_boost = boost_of(begin / chunks);
        asm volatile("griddepcontrol.wait;" ::: "memory");
        Ring ring{stages, full, empty};
        float sum[TILES][HELD];
        barrier_wait(ring.full, ring.phase);
        Tile held;
        held.load(ring, 0, 0);
        for (u32 unit = begin; unit < end;) {
            const u32 tile = unit / chunks, from = unit;
            const Boost boost = next_boost;
            next_boost = boost_of(min(tile + 1, tiles - 1));
            const u32 until = min(end, (tile + 1) * chunks);
#pragma unroll
            for (int i = 0; i < TILES * HELD; ++i) sum[i / HELD][i % HELD] = 0.0f;
            for (; unit + AT_ONCE <= until; unit += AT_ONCE) {
                take<AT_ONCE>(sum, held, boost, ring, end - unit);
            }
            if constexpr (AT_ONCE > 2) {
                for (; unit + 2 <= until; unit += 2) take<2>(sum, held, boost, ring, end - unit);
            }
            for (; unit < until; ++unit) take<1>(sum, held, boost, ring, end - unit);
            if (unit == end) pair_arrive();
            const Owners owners = from == begin ? of_first : of_last;
            if (until - from == chunks || add_parts<CONSUMERS, READS>(sum, share, owners, tile, n)) {
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    boost.undo(sum[i]);
                    store(sum[i], y, n, n_out, feature_in(tile) + i * 64);
                }
            }
        }
    }
    pair_wait();  // the other has all that this block copied for it, and arrives here no more
}
