// Few tokens times 16-bit weights on Hopper, bit-equal however many tokens are read with a row.
//
// What it computes is told in w16a16_hopper.py, how pairs of blocks share it in stream_k.cuh.
//
// A pair of blocks (a cluster) takes 2 * ROWS output features, ROWS each, over a range of chunks of
// 64 inputs. One thread of a block copies ahead: weights for itself and every other chunk of x for
// both, each one TMA box, swizzled as wgmma reads it. Two warpgroups multiply, each a half of the
// rows: weights are the left operand and x the right one, so that features are the long side. Sums
// stay in the tensor cores' float32 from a range's start to its end.
//
// Memory bounds this, so it must never rest. Weights are constants: as many as the ring of stages
// holds are under way before the kernel in front has ended (programmatic dependent launch); only x
// waits for it. Registers are kept to half of a multiprocessor's, and shared memory below what it
// has, so that this block can be there while that kernel still runs.
//
// Set in front of this text:
//   TOKENS   columns of the tile, a multiple of 8, at most 64
//   ROWS     output features of a block, a multiple of 128
//   STAGES   chunks in flight
//   BF16     weights, x and y are bfloat16 instead of float16
//   WGMMA_*  the product's instruction for that many tokens, see w16a16_hopper.py

constexpr int CHUNK = 64;           // inputs of a stage: 128 bytes of a row
constexpr int CONSUMERS = 256;      // threads that multiply: two warpgroups
constexpr int TILES = ROWS / 128;   // of 64 features, of a warpgroup
constexpr int HELD = TOKENS / 2;    // accumulators of a thread, of a tile
constexpr u32 WEIGHT_BYTES = ROWS * CHUNK * 2;
constexpr u32 X_BYTES = TOKENS * CHUNK * 2;
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + X_BYTES;

// Rows of 128 bytes, swizzled in blocks of 8 rows. PTX ISA, matrix descriptor: addresses and the
// distance of blocks in units of 16 bytes.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return u64{64} << 32 | u64{1} << 62 | u64{1} << 16 | at >> 4;
}

__device__ __forceinline__ void multiply(float (&sum)[HELD], u64 weights, u64 x) {
    asm volatile("{\n.reg .pred adds;\nsetp.eq.u32 adds, 0, 0;\n" WGMMA_LINE "\n}"
                 : WGMMA_SUMS(sum)
                 : "l"(weights), "l"(x));
}

// Start the product of the chunk that lies at `stage`. PTX ISA: a swizzled row is stepped through
// by its address, 16 inputs at a time.
__device__ __forceinline__ void start(float (&sum)[TILES][HELD], u32 stage) {
    const u64 weights = descriptor(stage + threadIdx.x / 128 * (WEIGHT_BYTES / 2));
    const u64 x = descriptor(stage + WEIGHT_BYTES);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < CHUNK / 16; ++step) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            multiply(sum[tile], weights + tile * (64 * CHUNK * 2 / 16) + step * 2, x + step * 2);
        }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Tell both blocks of the pair that this warp has read a stage. Not of a range's last ones, which
// nobody waits for: the other block may have ended.
__device__ __forceinline__ void leave(u32 empty) {
    __syncwarp();
    if (threadIdx.x % 32 < 2) barrier_arrive_at(empty, threadIdx.x % 32);
}

// What the copying thread does; it goes through a range's units.
struct Copies {
    const TensorMap* x;
    const TensorMap* weights;
    u32 stages, full, empty;
    u32 rank, tile, chunk, chunks;
    u32 chunk_of_x;  // x trails behind at first
    u64 once;

    __device__ __forceinline__ void next_weights(u32 stage) {
        const u32 barrier = full + 8 * stage;
        barrier_expect(barrier, STAGE_BYTES);
        copy_box(stages + stage * STAGE_BYTES, weights, chunk * CHUNK, (tile * 2 + rank) * ROWS, barrier,
                 once);
        if (++chunk == chunks) chunk = 0, ++tile;
    }

    // Copy a chunk of x if it is this block's turn. at: of the range.
    __device__ __forceinline__ void next_x(u32 at, u32 stage) {
        if (at % 2 == rank) {
            copy_to_pair(stages + stage * STAGE_BYTES + WEIGHT_BYTES, x,
                         static_cast<int>(chunk_of_x * CHUNK), full + 8 * stage);
        }
        if (++chunk_of_x == chunks) chunk_of_x = 0;
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __maxnreg__(104)
    product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights,
            float4* parts, u32* counters, u16* y, u32 n, u32 n_out, u32 tiles, u32 chunks) {
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    __shared__ u32 arrived;
    asm volatile("griddepcontrol.launch_dependents;");
    const u32 stages = (shared_address(raw) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const u32 rank = rank_in_pair(), pair = blockIdx.x / 2, pairs = gridDim.x / 2;
    const u32 units = tiles * chunks;
    const u32 begin = start_of(pair, pairs, units), end = start_of(pair + 1, pairs, units);
    const u32 count = end - begin, ahead = min(count, u32{STAGES});
    const bool copies = threadIdx.x == CONSUMERS;

    Copies copy{&x, &weights, stages, full, empty, rank, begin / chunks, begin % chunks, chunks,
                begin % chunks, 0};
    if (copies) {
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 2 * CONSUMERS / 32);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // for the copies of this block
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(copy.once));
        for (u32 i = 0; i < ahead; ++i) copy.next_weights(i);
        asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the other's of x
    }
    __syncwarp();
    pair_arrive();
    pair_wait();

    if (threadIdx.x >= CONSUMERS) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (copies) {
            for (u32 i = 0; i < ahead; ++i) copy.next_x(i, i);
            u32 stage = 0, phase = 0;
            for (u32 i = ahead; i < count; ++i) {
                barrier_wait(empty + 8 * stage, phase);
                copy.next_weights(stage);
                copy.next_x(i, stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
        __syncwarp();
        pair_arrive();
    } else {
        const Share share{parts, counters, &arrived, rank, pair, pairs, chunks, units};
        // Of the range's first tile and its last; those between are whole.
        const Owners of_first = owners_of(share, begin / chunks);
        const Owners of_last = owners_of(share, (end - 1) / chunks);
        asm volatile("griddepcontrol.wait;" ::: "memory");
        u32 stage = 0, phase = 0;
        for (u32 unit = begin; unit < end;) {
            const u32 tile = unit / chunks;
            const u32 many = min(end, (tile + 1) * chunks) - unit;
            float sum[TILES][HELD];
#pragma unroll
            for (int i = 0; i < TILES * HELD; ++i) sum[i / HELD][i % HELD] = 0.0f;
            u32 before = 0;
            const u32 until = unit + many;
            for (; unit < until; ++unit) {
                barrier_wait(full + 8 * stage, phase);
                start(sum, stages + stage * STAGE_BYTES);
                products_wait<1>();
                if (before && unit + STAGES <= end) leave(before);
                before = empty + 8 * stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            products_wait<0>();
#pragma unroll
            for (int i = 0; i < TILES * HELD; ++i) {
                asm volatile("" : "+f"(sum[i / HELD][i % HELD])::"memory");
            }
            if (unit + STAGES <= end) leave(before);
            if (unit == end) pair_arrive();
            const Owners owners = until - many == begin ? of_first : of_last;
            if (many == chunks || add_parts<CONSUMERS, 8>(sum, share, owners, tile, n)) {
                const u32 warp = threadIdx.x / 128 * (ROWS / 2) + threadIdx.x % 128 / 32 * 16;
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    store(sum[i], y, n, n_out, (tile * 2 + rank) * ROWS + i * 64 + warp);
                }
            }
        }
    }
    pair_wait();  // the other has all that this block copied for it
}
