// Few tokens times 4-bit weights on Hopper, bit-equal however many tokens are read with a row.
//
// What it computes, and the layout of its operands, is told in w4a16_hopper.py. Here is how.
//
// A pair of blocks (a cluster) takes 512 output features, 256 each, over a range of chunks of 128
// inputs, and goes on to the next 512 where its range does (stream-K, Osama et al.,
// arXiv 2301.03598). One thread of a block copies ahead: weights for itself, one half of each chunk
// of x for both. Four warpgroups of 64 features multiply: codes are opened in registers and are
// the left operand of wgmma, x in shared memory the right one, so that features are the long side.
// Weights are rounded to x's dtype as the scheme has them; a product's sum runs through a whole tile.
//
// Weights are constants, so their copies start before the kernel in front has ended
// (programmatic dependent launch); only x waits for it.
//
// Set by the compiler's command line:
//   TOKENS   columns of the tile, a multiple of 8, at most 64
//   STAGES   chunks in flight
//   BF16     x and y are bfloat16 instead of float16
//   ZEROS    zeros are stored; else every zero is 8
//   SPANS    groups in a chunk: 2 for groups of 64, else 1
//   WGMMA_*  the product's instruction for that many tokens, see w4a16_hopper.py

constexpr int ROWS = 256;           // output features of a block
constexpr int CHUNK = 128;          // inputs of a stage
constexpr int CONSUMERS = 512;      // threads that multiply: four warpgroups of 64 features
constexpr int BLOCKS = TOKENS / 8;
constexpr int HELD = TOKENS / 2;  // sums of a thread
constexpr int X_BYTES = TOKENS * CHUNK * 2;
constexpr int WORD_BYTES = ROWS * CHUNK / 2;
constexpr int ALL_SCALES = ROWS * SPANS * 2;
constexpr int ALL_ZEROS = ZEROS ? ROWS * SPANS : 0;
constexpr int STAGE_BYTES = (X_BYTES + WORD_BYTES + ALL_SCALES + ALL_ZEROS + 1023) / 1024 * 1024;

// x in shared memory as wgmma reads it: rows of 128 bytes, swizzled in blocks of 8 rows.
// PTX ISA, matrix descriptor: addresses in units of 16 bytes; the low word alone tells where.
__device__ __forceinline__ u32 descriptor_low(u32 at) { return at >> 4 | 1u << 16; }
constexpr u64 DESCRIPTOR_HIGH = u64{64} << 32 | u64{1} << 62;

__device__ __forceinline__ void multiply(float (&sum)[HELD], const u32 (&a)[4], u64 b) {
    asm volatile(WGMMA_LINE
                 : WGMMA_SUMS(sum)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ u32 picked(u32 word, u32 mask, u32 base) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(base));
    return out;
}

__device__ __forceinline__ u32 times(u32 value, u32 scale) {
    u32 out;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(value), "r"(scale));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(value), "r"(scale));
#endif
    return out;
}

// What opens the codes of a group: of rows g (0) and g + 8 (1) of a warp, each number twice.
struct Group {
    u32 zero[2], scale[2];
};

// The weights of 16 inputs in rows g and g + 8: codes less zeros, times scales, in x's dtype.
//
// Set into the mantissa of 1024 (float16) or 128 (bfloat16) a code is exact, and `zero` is that
// number plus the zero. In float16 a code four bits up is worth 16 and is scaled down.
__device__ __forceinline__ void open_codes(u32 word, const Group& group, u32 (&a)[4]) {
#if BF16
    constexpr u32 BASE = 0x43004300, MASK = 0x000f000f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = picked(word >> 4 * i, MASK, BASE);
        asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(group.zero[i % 2]));
        a[i] = times(a[i], group.scale[i % 2]);
    }
#else
    constexpr u32 BASE = 0x64006400, LOW = 0x000f000f, HIGH = 0x00f000f0, SIXTEENTH = 0x2c002c00;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 shifted = word >> 4 * i;
        a[i] = picked(shifted, LOW, BASE);
        a[i + 1] = picked(shifted, HIGH, BASE);
        asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(group.zero[0]));
        asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[i + 1]) : "r"(SIXTEENTH), "r"(group.zero[1]));
        a[i] = times(a[i], group.scale[0]);
        a[i + 1] = times(a[i + 1], group.scale[1]);
    }
#endif
}

__device__ __forceinline__ u32 zero_constant(u32 zero, int high) {
    // float16, high: -(64 + zero), whose last place is 1/16.
    const u32 one = BF16 ? 0x4300u + zero : high ? 0xd400u + (zero << 4) : 0x6400u + zero;
    return one * 0x00010001u;
}

__device__ __forceinline__ Group group_at(u32 scales_at, u32 zeros_at, int row) {
    Group made;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
        u16 scale;
        u32 zero = 8;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(scales_at + (row + 8 * high) * 2));
        if constexpr (ZEROS) {
            asm volatile("ld.shared.u8 %0, [%1];" : "=r"(zero) : "r"(zeros_at + row + 8 * high));
        }
        made.scale[high] = scale * 0x00010001u;
        made.zero[high] = zero_constant(zero, high);
    }
    return made;
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

// What a thread holds of its 64 features and half a chunk of inputs.
struct Half {
    u32 word[4];
    Group group;
};

// Read a half of the chunk that the ring is at.
template <int HALF>
__device__ __forceinline__ void load(Half& half, const Ring& ring) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const u32 words_at = ring.stages + ring.stage * STAGE_BYTES + X_BYTES;
    const u32 scales_at = words_at + WORD_BYTES, zeros_at = scales_at + ALL_SCALES;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(half.word[0]), "=r"(half.word[1]), "=r"(half.word[2]), "=r"(half.word[3])
                 : "r"(words_at + (warpgroup * 2 + HALF) * 2048 + thread * 16));
    if (HALF == 0 || SPANS == 2) {
        const int row = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
        half.group = group_at(scales_at, zeros_at, HALF * ROWS + row);
    }
}

// Open the codes of half a chunk and start to add their product with x to the sum.
template <int HALF>
__device__ __forceinline__ void start(float (&sum)[HELD], u32 (&a)[4][4], const Half& half, u32 x_at) {
    const u32 b = descriptor_low(x_at) + HALF * (X_BYTES / 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) open_codes(half.word[i], half.group, a[i]);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply(sum, a[i], DESCRIPTOR_HIGH | (b + i * 2));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void leave(const Ring& ring, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 < 2) barrier_arrive_at(ring.empty + 8 * stage, threadIdx.x % 32);
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
__device__ __forceinline__ bool add_parts(float (&sum)[HELD], float4* parts, u32* counters,
                                          u32* arrived, int tile, int pair, int pairs, int chunks,
                                          int units, u32 rank) {
    const int first = pair_of(tile * chunks, pairs, units);
    const int last = pair_of(tile * chunks + chunks - 1, pairs, units);
    const auto part_of = [&](int other) {
        // A pair's range starts in one tile and may end in another: a place for each.
        const int place = start_of(other, pairs, units) >= tile * chunks ? 0 : 1;
        return parts + (static_cast<long long>(other * 2 + rank) * 2 + place) * BLOCKS * CONSUMERS +
               threadIdx.x;
    };
    float4* own = part_of(pair);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const float* four = sum + i * 4;
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
    for (int i = 0; i < HELD; ++i) sum[i] = 0.0f;
#pragma unroll(TOKENS <= 16 ? 4 : 1)
    for (int other = first; other <= last; ++other) {
        const float4* part = part_of(other);
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            const float4 value = __ldcg(part + i * CONSUMERS);
            float* four = sum + i * 4;
            four[0] += value.x, four[1] += value.y, four[2] += value.z, four[3] += value.w;
        }
    }
    if (threadIdx.x == 0) *counter = 0;  // ready for the next launch
    return true;
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
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 2 * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    pair_sync();

    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMERS) {
            u64 once;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            const auto copy_weights = [&](int unit, int stage) {
                const long long tile = unit / chunks * 2 + rank;
                const int chunk = unit % chunks;
                const u32 to = stages + stage * STAGE_BYTES + X_BYTES, barrier = full + 8 * stage;
                barrier_expect(barrier, X_BYTES + WORD_BYTES + ALL_SCALES + ALL_ZEROS);
                copy_in(to, words + (tile * chunks + chunk) * WORD_BYTES, WORD_BYTES, barrier, once);
                // A step holds one chunk's scales, of two spans or as one of several under a group.
                const int steps = (chunks + chunks_per_group - 1) / chunks_per_group;
                const long long step = tile * steps + chunk / chunks_per_group;
                copy_in(to + WORD_BYTES, scales + step * ALL_SCALES, ALL_SCALES, barrier, once);
                if constexpr (ZEROS) {
                    copy_in(to + WORD_BYTES + ALL_SCALES, zeros + step * ALL_ZEROS, ALL_ZEROS,
                            barrier, once);
                }
            };
            const auto copy_x = [&](int unit, int stage) {
                const u32 half = rank * (X_BYTES / 2);
                const int input = unit % chunks * CHUNK + static_cast<int>(rank) * (CHUNK / 2);
                copy_to_pair(stages + stage * STAGE_BYTES + half, &x, input, full + 8 * stage);
            };
            const int ahead = min(end - begin, STAGES);
            for (int i = 0; i < ahead; ++i) copy_weights(begin + i, i);
            asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int i = 0; i < ahead; ++i) copy_x(begin + i, i);
            for (int i = ahead; i < end - begin; ++i) {
                barrier_wait_pair(empty + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                copy_weights(begin + i, i % STAGES);
                copy_x(begin + i, i % STAGES);
            }
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
        asm volatile("griddepcontrol.wait;" ::: "memory");
        Ring ring{stages, full, empty};
        float sum[HELD];
        u32 a[2][4][4];
        Half half;
        barrier_wait(ring.full, ring.phase);
        load<0>(half, ring);
        for (int unit = begin; unit < end;) {
            const int tile = unit / chunks, from = unit;
            const int until = min(end, (tile + 1) * chunks);
#pragma unroll
            for (int i = 0; i < HELD; ++i) sum[i] = 0.0f;
            // A product runs while the codes of the next are opened; then it is waited for.
            int left = -1;
            for (; unit < until; ++unit) {
                const u32 x_at = ring.stages + ring.stage * STAGE_BYTES;
                start<0>(sum, a[0], half, x_at);
                load<1>(half, ring);
                products_wait<1>();
                if (left >= 0) leave(ring, left);
                start<1>(sum, a[1], half, x_at);
                left = ring.stage;
                ring.next();
                if (unit + 1 < end) {
                    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
                    load<0>(half, ring);
                }
                products_wait<1>();
            }
            products_wait<0>();
            leave(ring, left);
#pragma unroll
            for (int i = 0; i < HELD; ++i) asm volatile("" : "+f"(sum[i])::"memory");
            const bool whole = from == tile * chunks && until == (tile + 1) * chunks;
            if (whole || add_parts(sum, parts, counters, &arrived, tile, pair, pairs, chunks,
                                   units, rank)) {
                const int row = static_cast<int>(threadIdx.x) / 32 * 16;  // of the block, a warp's first
                store(sum, y, n, n_out, (tile * 2 + static_cast<int>(rank)) * ROWS + row);
            }
        }
    }
    pair_sync();  // a block's barriers stand until the other has arrived at them
}
