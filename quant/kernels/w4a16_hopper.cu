// Few tokens times 4-bit weights on Hopper, bit-equal however many tokens are read with a row.
//
// What it computes, and the layout of its operands, is told in w4a16_hopper.py. Here is how.
//
// A pair of blocks (a cluster) takes 512 output features, 256 each, over a range of chunks of 128
// inputs, and goes on to the next 512 where its range does (stream-K, Osama et al.,
// arXiv 2301.03598). One thread of a block copies ahead: weights for itself, one half of each chunk
// of x for both. Two warpgroups multiply, each two tiles of 64 features: codes are opened in
// registers and are the left operand of wgmma, x in shared memory the right one, so that features
// are the long side. Each group's product is exact in the codes and is scaled in float32.
//
// Weights are constants, so their copies start before the kernel in front has ended
// (programmatic dependent launch); only x waits for it.
//
// Set in front of this text:
//   TOKENS   columns of the tile, a multiple of 8, at most 64
//   STAGES   chunks in flight
//   BF16     x and y are bfloat16 instead of float16
//   SCALE    type of scales: 0 float16, 1 bfloat16, 2 float32
//   ZEROS    zeros are stored; else every zero is 8
//   SPANS    groups in a chunk: 2 for groups of 64, else 1
//   WGMMA_*  the product's instruction for that many tokens, see w4a16_hopper.py

constexpr int ROWS = 256;           // output features of a block
constexpr int CHUNK = 128;          // inputs of a stage
constexpr int CONSUMERS = 256;      // threads that multiply: two warpgroups, each two tiles of 64
constexpr int BLOCKS = TOKENS / 8;
constexpr int HELD = TOKENS / 2;  // accumulators of a thread
constexpr int AT_ONCE = TOKENS <= 32 ? 2 : 1;  // chunks between two waits for everything
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

__device__ __forceinline__ u32 rounded_pair(float first, float second) {
    u32 out;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(out) : "f"(first), "f"(second));
#else
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(out) : "f"(first), "f"(second));
#endif
    return out;
}

// Where a consumer is in the ring of stages.
struct Ring {
    u32 stages, full, empty;
    int stage = 0;
    u32 phase = 0;

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
template <int COUNT>
__device__ __forceinline__ void take(float (&sum)[2][HELD], Tile& tile, Ring& ring, bool last) {
    constexpr int PRODUCTS = 2 * SPANS * COUNT;
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
                if (i < PRODUCTS - 1 || !last) {
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
                if (threadIdx.x % 32 < 2) barrier_arrive_at(empty, threadIdx.x % 32);
            }
        }
    }
}

// Where the range of a pair starts, of all units of work.
__device__ __forceinline__ int start_of(int pair, int pairs, int units) {
    return static_cast<int>(static_cast<long long>(pair) * units / pairs);
}

__device__ __forceinline__ int pair_of(int unit, int pairs, int units) {
    int pair = static_cast<int>(static_cast<long long>(unit) * pairs / units);
    while (start_of(pair + 1, pairs, units) <= unit) ++pair;
    return pair;
}

// Round, turn so that a thread holds two features of one token, and store what is real.
__device__ __forceinline__ void store(const float (&sum)[HELD], u16* y, int n, int n_out, int row) {
    const int lane = threadIdx.x % 32;
    const int feature = row + lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        const int token = block * 8 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pair = rounded_pair(sum[block * 4 + half * 2], sum[block * 4 + half * 2 + 1]);
            asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
            const int at = feature + half * 8;
            if (token < n && at < n_out) {
                *reinterpret_cast<u32*>(y + static_cast<long long>(token) * n_out + at) = pair;
            }
        }
    }
}

__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

// Leave a part of a tile's sum for the block that comes last, which adds all parts up in order.
__device__ __forceinline__ bool add_parts(float (&sum)[2][HELD], float4* parts, u32* counters,
                                          u32* arrived, int tile, int pair, int pairs, int chunks,
                                          int units, u32 rank) {
    const int first = pair_of(tile * chunks, pairs, units);
    const int last = pair_of(tile * chunks + chunks - 1, pairs, units);
    const auto part_of = [&](int other) {
        // A pair's range starts in one tile and may end in another: a place for each.
        const int place = start_of(other, pairs, units) >= tile * chunks ? 0 : 1;
        return parts + (static_cast<long long>(other * 2 + rank) * 2 + place) * 2 * BLOCKS * CONSUMERS +
               threadIdx.x;
    };
    float4* own = part_of(pair);
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; ++i) {
        const float* four = sum[i / BLOCKS] + i % BLOCKS * 4;
        __stcg(own + i * CONSUMERS, make_float4(four[0], four[1], four[2], four[3]));
    }
    consumers_sync();
    u32* counter = counters + tile * 2 + rank;
    if (threadIdx.x == 0) {
        // Of all threads' parts, which the barrier put before this.
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(*arrived)
                     : "l"(counter)
                     : "memory");
    }
    consumers_sync();
    if (*arrived != last - first) return false;
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum[0][i] = sum[1][i] = 0.0f;
#pragma unroll(TOKENS <= 16 ? 4 : 1)
    for (int other = first; other <= last; ++other) {
        const float4* part = part_of(other);
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; ++i) {
            const float4 value = __ldcg(part + i * CONSUMERS);
            float* four = sum[i / BLOCKS] + i % BLOCKS * 4;
            four[0] += value.x, four[1] += value.y, four[2] += value.z, four[3] += value.w;
        }
    }
    if (threadIdx.x == 0) *counter = 0;  // ready for the next launch
    return true;
}

// Where one that copies is in the ring of stages; it waits for a stage from the second round on.
struct Filled {
    u32 at, full, empty;  // of the stage
    int stage = 0;
    u32 phase = 1;  // the first wait of a barrier for phase 1 is none

    __device__ __forceinline__ void next() {
        at += STAGE_BYTES, full += 8, empty += 8, ++stage;
        if (stage == STAGES) {
            at -= STAGES * STAGE_BYTES, full -= 8 * STAGES, empty -= 8 * STAGES;
            stage = 0, phase ^= 1;
        }
    }
};

// Copy words, scales and zeros of `count` chunks, from one of a block's on. All counts go up by one
// each time: a chunk's copies must cost less than what they bring takes to arrive.
__device__ __forceinline__ void copy_weights(u32 stages, u32 full, u32 empty, const u8* words,
                                             const u8* scales, const u8* zeros, long long block,
                                             int chunk, int chunks, int chunks_per_group,
                                             int count) {
    u64 once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    // A step holds one chunk's scales, of two spans or as one of several under a group.
    const int steps = (chunks + chunks_per_group - 1) / chunks_per_group;
    int step = chunk / chunks_per_group, in_step = chunk % chunks_per_group;
    words += (block * chunks + chunk) * WORD_BYTES;
    scales += (block * steps + step) * ALL_SCALES;
    zeros += (block * steps + step) * ALL_ZEROS;
    Filled to{stages + X_BYTES, full, empty};
#pragma unroll 1
    for (; count > 0; --count) {
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
        if (chunk == chunks) {
            // The next tile's block of this rank: one of the other's lies between.
            words += static_cast<long long>(chunks) * WORD_BYTES;
            scales += static_cast<long long>(steps + 1) * ALL_SCALES;
            zeros += static_cast<long long>(steps + 1) * ALL_ZEROS;
            chunk = in_step = 0;
        } else if (in_step == chunks_per_group) {
            scales += ALL_SCALES, zeros += ALL_ZEROS;
            in_step = 0;
        }
    }
}

// Copy this block's half of x's chunks into both blocks of the pair.
__device__ __forceinline__ void copy_x(u32 stages, u32 full, u32 empty, const TensorMap* x,
                                       u32 rank, int chunk, int chunks, int count) {
    const int half = static_cast<int>(rank) * (CHUNK / 2);
    Filled to{stages + rank * (X_BYTES / 2), full, empty};
#pragma unroll 1
    for (; count > 0; --count) {
        barrier_wait(to.empty, to.phase);
        barrier_expect(to.full, X_BYTES);
        copy_to_pair(to.at, x, chunk * CHUNK + half, to.full);
        to.next();
        if (++chunk == chunks) chunk = 0;
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(CONSUMERS + 128, 1)
    product(const __grid_constant__ TensorMap x, const u8* __restrict__ words,
            const u8* __restrict__ scales, const u8* __restrict__ zeros, float4* parts,
            u32* counters, u16* y, int n, int n_out, int tiles, int chunks, int chunks_per_group) {
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    __shared__ u32 arrived;
    const u32 stages = (shared_address(raw) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const u32 rank = rank_in_pair();
    const int pair = blockIdx.x / 2, pairs = gridDim.x / 2;
    const int units = tiles * chunks;
    const int begin = start_of(pair, pairs, units), end = start_of(pair + 1, pairs, units);

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 2);  // whoever copies weights, and x
            barrier_init(empty + 8 * stage, 2 * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    pair_sync();

    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const int chunk = begin % chunks, count = end - begin;
        if (threadIdx.x == CONSUMERS) {
            copy_weights(stages, full, empty, words, scales, zeros, (begin / chunks) * 2 + rank,
                         chunk, chunks, chunks_per_group, count);
        } else if (threadIdx.x == CONSUMERS + 32) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            copy_x(stages, full, empty, &x, rank, chunk, chunks, count);
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        asm volatile("griddepcontrol.wait;" ::: "memory");
        Ring ring{stages, full, empty};
        float sum[2][HELD];
        barrier_wait(ring.full, ring.phase);
        Tile held = load<0, 0>(ring);
        for (int unit = begin; unit < end;) {
            const int tile = unit / chunks, from = unit;
            const int until = min(end, (tile + 1) * chunks);
#pragma unroll
            for (int i = 0; i < HELD; ++i) sum[0][i] = sum[1][i] = 0.0f;
            for (; unit + AT_ONCE <= until; unit += AT_ONCE) {
                take<AT_ONCE>(sum, held, ring, unit + AT_ONCE == end);
            }
            for (; unit < until; ++unit) take<1>(sum, held, ring, unit + 1 == end);
            const bool whole = from == tile * chunks && until == (tile + 1) * chunks;
            if (whole || add_parts(sum, parts, counters, &arrived, tile, pair, pairs, chunks,
                                   units, rank)) {
                // Of the block, a warp's first in its first tile.
                const int row = static_cast<int>(threadIdx.x) / 128 * 128 + threadIdx.x % 128 / 32 * 16;
                const int feature = (tile * 2 + static_cast<int>(rank)) * ROWS + row;
                store(sum[0], y, n, n_out, feature);
                store(sum[1], y, n, n_out, feature + 64);
            }
        }
    }
    pair_sync();  // a block's barriers stand until the other has arrived at them
}
