// How pairs of blocks share a product (stream-K, Osama et al., arXiv 2301.03598), and store it.
//
// A tile is what a pair computes at once; a unit is one chunk of inputs of a tile, and units are
// numbered tile by tile. Every pair takes as many units in a row, give or take one; which, depends
// on the shape and the number of pairs alone. A tile that lies in several ranges comes in parts,
// which are added in the order of the pairs.
//
// Comes after hopper.cuh. Set in front of it: BF16, y is bfloat16 instead of float16; GATED, of every
// 16 features the first 8 are gates and the last 8 are what they gate, and y is silu(gate) * up.

// Where the range of a pair starts. units * pairs < 2^32.
__device__ __forceinline__ u32 start_of(u32 pair, u32 pairs, u32 units) { return pair * units / pairs; }

__device__ __forceinline__ u32 pair_of(u32 unit, u32 pairs, u32 units) {
    u32 pair = unit * pairs / units;
    while (start_of(pair + 1, pairs, units) <= unit) ++pair;
    return pair;
}

// What a block must know to add its part of a tile to the others'.
struct Share {
    float4* parts;  // [pairs, 2 (rank), 2 (place), float4 a thread, CONSUMERS]
    u32* counters;  // [tiles, 2 (rank)], 0 between launches
    u32* arrived;   // of the block, in shared memory
    u32 rank, pair, pairs, chunks, units;
};

// Wait for the first CONSUMERS threads of the block.
template <int CONSUMERS>
__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

// Leave a part of a tile's sums for the block that comes last, which adds all parts up in order.
//
// sum: of this thread, of TILES tiles of 64 features. READS: how many 16 bytes a thread may read at
// once, as it has registers for. True: this block came last and has the whole.
template <int CONSUMERS, int READS, int TILES, int HELD>
__device__ __forceinline__ bool add_parts(float (&sum)[TILES][HELD], const Share& share, u32 tile) {
    constexpr int EACH = HELD / 4, FOURS = TILES * EACH;
    // Reads that are under way together, 16 bytes each: of so many parts.
    constexpr int AT_ONCE = FOURS < READS ? READS / FOURS : 1;
    const u32 start = tile * share.chunks;
    const u32 first = pair_of(start, share.pairs, share.units);
    const u32 last = pair_of(start + share.chunks - 1, share.pairs, share.units);
    const auto part_of = [&](u32 pair) {
        // A pair's range starts in one tile and may end in another: a place for each.
        const u32 place = start_of(pair, share.pairs, share.units) >= start ? 0 : 1;
        return share.parts + ((pair * 2 + share.rank) * 2 + place) * (FOURS * CONSUMERS) + threadIdx.x;
    };
    float4* own = part_of(share.pair);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
        const float* four = sum[i / EACH] + i % EACH * 4;
        __stcg(own + i * CONSUMERS, make_float4(four[0], four[1], four[2], four[3]));
    }
    consumers_sync<CONSUMERS>();
    u32* counter = share.counters + tile * 2 + share.rank;
    if (threadIdx.x == 0) {
        // Of all threads' parts, which the barrier put before this.
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(*share.arrived)
                     : "l"(counter)
                     : "memory");
    }
    consumers_sync<CONSUMERS>();
    if (*share.arrived != last - first) return false;
#pragma unroll
    for (int i = 0; i < TILES * HELD; ++i) sum[i / HELD][i % HELD] = 0.0f;
#pragma unroll 1
    for (u32 pair = first; pair <= last; pair += AT_ONCE) {
        float4 value[AT_ONCE][FOURS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float4* part = part_of(min(pair + j, last));
#pragma unroll
            for (int i = 0; i < FOURS; ++i) value[j][i] = __ldcg(part + i * CONSUMERS);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (pair + j > last) break;
#pragma unroll
            for (int i = 0; i < FOURS; ++i) {
                float* four = sum[i / EACH] + i % EACH * 4;
                four[0] += value[j][i].x, four[1] += value[j][i].y;
                four[2] += value[j][i].z, four[3] += value[j][i].w;
            }
        }
    }
    if (threadIdx.x == 0) *counter = 0;  // ready for the next launch
    return true;
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

#if GATED
// silu of a pair of y's type, in float32 and rounded to that type. Instruction by instruction what
// Triton makes of a step's own kernel, which does this where layers do not: the same bits.
__device__ __forceinline__ float silu(float gate) {
    float power;
    asm("{\n.reg .f32 scaled;\n"
        "mul.rn.f32 scaled, %1, 0fBFB8AA3B;\n"  // -log2(e)
        "ex2.approx.f32 %0, scaled;\n}"
        : "=f"(power)
        : "f"(gate));
    return __fdiv_rn(gate, __fadd_rn(power, 1.0f));
}

__device__ __forceinline__ u32 gated_pair(u32 gates, u32 ups) {
    float first, second;
    u32 out;
#if BF16
    first = __uint_as_float(gates << 16), second = __uint_as_float(gates & 0xffff0000u);
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(rounded_pair(silu(first), silu(second))), "r"(ups));
#else
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(first), "=f"(second)
        : "r"(gates));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(rounded_pair(silu(first), silu(second))), "r"(ups));
#endif
    return out;
}
#endif

// Turn 8 features of a warp so that a thread holds two of one token, and store what is real.
__device__ __forceinline__ void store_pair(u32 pair, u16* y, u32 n, u32 n_out, u32 block, u32 feature) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
    const u32 token = block * 8 + threadIdx.x % 32 / 4, column = feature + threadIdx.x % 4 * 2;
    if (token < n && column < n_out) {
        *reinterpret_cast<u32*>(y + static_cast<u64>(token) * n_out + column) = pair;
    }
}

// Round a warp's 16 features, gate 8 by the others where that is asked for, and store them.
//
// sum: as wgmma leaves it, so that a thread has features g and g + 8 of two tokens. y: [n, n_out].
// row: the warp's first of the weight's rows.
template <int HELD>
__device__ __forceinline__ void store(const float (&sum)[HELD], u16* y, u32 n, u32 n_out, u32 row) {
#pragma unroll
    for (int block = 0; block < HELD / 4; ++block) {
        const u32 first = rounded_pair(sum[block * 4], sum[block * 4 + 1]);
        const u32 second = rounded_pair(sum[block * 4 + 2], sum[block * 4 + 3]);
#if GATED
        store_pair(gated_pair(first, second), y, n, n_out, block, row / 2);
#else
        store_pair(first, y, n, n_out, block, row);
        store_pair(second, y, n, n_out, block, row + 8);
#endif
    }
}
