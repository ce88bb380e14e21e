// How pairs of blocks share a product (stream-K, Osama et al., arXiv 2301.03598), and store it.
//
// A tile is what a pair computes at once; a unit is one chunk of inputs of a tile, and units are
// numbered tile by tile. Every pair takes as many units in a row, give or take one; which, depends
// on the shape and the number of pairs alone. A tile that lies in several ranges comes in parts,
// which are added in the order of the pairs.
//
// Comes after hopper.cuh. Set in front of it: BF16, y is bfloat16 instead of float16.

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

// The pairs that have parts of a tile. A pair's range starts in one tile and may end in another: a
// place for each.
struct Owners {
    u32 first, last;
    u32 place_of_first;  // of the others it is 0
};

__device__ __forceinline__ Owners owners_of(const Share& share, u32 tile) {
    const u32 start = tile * share.chunks;
    const u32 first = pair_of(start, share.pairs, share.units);
    const u32 last = pair_of(start + share.chunks - 1, share.pairs, share.units);
    return {first, last, start_of(first, share.pairs, share.units) < start ? 1u : 0u};
}

// Wait for the first CONSUMERS threads of the block.
template <int CONSUMERS>
__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

// Leave a part of a tile's sums for the block that comes last, which adds all parts up in order.
//
// sum: of this thread, of TILES tiles of 64 features. owners: of the tile. n: real tokens; others
// are not passed on. READS: how many 16 bytes a thread may read at once, as it has registers for.
// True: this block came last and has the whole.
template <int CONSUMERS, int READS, int TILES, int HELD>
__device__ __forceinline__ bool add_parts(float (&sum)[TILES][HELD], const Share& share,
                                          const Owners& owners, u32 tile, u32 n) {
    constexpr int EACH = HELD / 4, FOURS = TILES * EACH;
    // Reads that are under way together, 16 bytes each: of so many parts.
    constexpr int AT_ONCE = FOURS < READS ? READS / FOURS : 1;
    const auto part_of = [&](u32 pair) {
        const u32 place = pair == owners.first ? owners.place_of_first : 0;
        return share.parts + ((pair * 2 + share.rank) * 2 + place) * (FOURS * CONSUMERS) + threadIdx.x;
    };
    const u32 token = threadIdx.x % 4 * 2;  // a thread's first of every 8
    float4* own = part_of(share.pair);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
        const float* four = sum[i / EACH] + i % EACH * 4;
        if (i % EACH * 8 + token >= n) continue;
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
    if (*share.arrived != owners.last - owners.first) return false;
#pragma unroll
    for (int i = 0; i < TILES * HELD; ++i) sum[i / HELD][i % HELD] = 0.0f;
#pragma unroll 1
    for (u32 pair = owners.first; pair <= owners.last; pair += AT_ONCE) {
        float4 value[AT_ONCE][FOURS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float4* part = part_of(min(pair + j, owners.last));
#pragma unroll
            for (int i = 0; i < FOURS; ++i) {
                value[j][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (i % EACH * 8 + token < n) value[j][i] = __ldcg(part + i * CONSUMERS);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (pair + j > owners.last) break;
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

// Round a warp's 16 features, turn so that a thread holds two of one token, store what is real.
//
// sum: as wgmma leaves it. y: [n, n_out]. row: the warp's first feature.
template <int HELD>
__device__ __forceinline__ void store(const float (&sum)[HELD], u16* y, u32 n, u32 n_out, u32 row) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < HELD / 4; ++block) {
        const u32 token = block * 8 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pair = rounded_pair(sum[block * 4 + half * 2], sum[block * 4 + half * 2 + 1]);
            asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
            const u32 feature = row + half * 8 + lane % 4 * 2;
            if (token < n && feature < n_out) {
                *reinterpret_cast<u32*>(y + static_cast<u64>(token) * n_out + feature) = pair;
            }
        }
    }
}
