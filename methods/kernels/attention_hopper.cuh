// A step of attention on Hopper: what a launch is told, turning, weights, and pieces.
//
// In front come DIM, GROUPS, SHARED (query heads of a key-value head), BF16, the instructions SCORE and WEIGH, and
// the list of their sums. PTX ISA: cp.async, wgmma (128-byte swizzles), griddepcontrol.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int STEP = 64, STEPS = 4, THREADS = 128, HEADS = GROUPS * SHARED;
constexpr int ROWS = 64;  // of a tile
constexpr int CHUNKS = DIM / 8;         // of 16 bytes, of a row
constexpr int MATRIX = STEP * DIM * 2;  // bytes of a step's keys, its values, or a tile's queries
constexpr int COLUMNS = STEP * 64 * 2;  // bytes of 64 columns of them, which lie together, a row in 128 bytes
constexpr long long WIDTH = (HEADS + 2 * GROUPS) * DIM;

// The only score whose weight is 0 whatever the others are.
#define UNSEEN __int_as_float(0xff800000)
#if BF16
#define KIND "bf16x2"
#else
#define KIND "f16x2"
#endif

// What a launch reads and writes. Strides are in numbers; slots lie side by side.
struct Task {
    const u16 *qkv, *cos, *sin;
    const long long* positions;
    u16* cache;
    const long long* base;
    const int* ancestors;
    float *tops, *totals, *sums;
    long long stride_kind, stride_group;
    float scale;
    int nodes, scratch, depth, tiles, shared_blocks, hop, own_at, fine_steps;
};

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 both;
    asm("cvt.rn." KIND ".f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// As Triton's exp2.
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* at) {
    return static_cast<u32>(__cvta_generic_to_shared(at));
}

// Where a chunk of a row lies in a matrix: as wgmma reads it, swizzled.
__device__ __forceinline__ u32 place(int row, int chunk) {
    return chunk / 8 * COLUMNS + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

__device__ __forceinline__ void copy(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Meet, once all but the newest OPEN groups of copies are there and what was put can be read by wgmma.
template <int OPEN>
__device__ __forceinline__ void meet() {
    asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" ::"n"(OPEN) : "memory");
    __syncthreads();
}

__device__ __forceinline__ void put(u32 to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 taken(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// .rn keeps the compiler from fusing a product into a sum: each is rounded, as torch rounds.
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 c;
    asm("mul.rn." KIND " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

__device__ __forceinline__ u32 plus(u32 a, u32 b) {
    u32 c;
    asm("add.rn." KIND " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 c;
    asm("sub.rn." KIND " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// A chunk of a head, the one half a head on, and their angles, which are the same for both.
struct Turn {
    uint4 low, high, cos, sin;

    __device__ __forceinline__ void fetch(const Task& task, const u16* head, long long position, int chunk) {
        low = *reinterpret_cast<const uint4*>(head + chunk * 8);
        high = *reinterpret_cast<const uint4*>(head + DIM / 2 + chunk * 8);
        cos = __ldg(reinterpret_cast<const uint4*>(task.cos + position * DIM + chunk * 8));
        sin = __ldg(reinterpret_cast<const uint4*>(task.sin + position * DIM + chunk * 8));
    }

    __device__ __forceinline__ void put_at(u32 to, int row, int chunk) const {
        put(to + place(row, chunk), uint4{minus(times(low.x, cos.x), times(high.x, sin.x)),
                                          minus(times(low.y, cos.y), times(high.y, sin.y)),
                                          minus(times(low.z, cos.z), times(high.z, sin.z)),
                                          minus(times(low.w, cos.w), times(high.w, sin.w))});
        put(to + place(row, chunk + CHUNKS / 2), uint4{plus(times(high.x, cos.x), times(low.x, sin.x)),
                                                       plus(times(high.y, cos.y), times(low.y, sin.y)),
                                                       plus(times(high.z, cos.z), times(low.z, sin.z)),
                                                       plus(times(high.w, cos.w), times(low.w, sin.w))});
    }
};

__device__ __forceinline__ const u16* query_of(const Task& task, int node, int group, int head) {
    return task.qkv + node * WIDTH + (group * SHARED + head) * DIM;
}

__device__ __forceinline__ u16* entry(const Task& task, int group, long long slot) {
    return task.cache + group * task.stride_group + slot * DIM;
}

// What wgmma must know of a matrix whose columns (of keys) or rows (of values) it adds over.
__device__ __forceinline__ u64 described(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(COLUMNS >> 4) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}

// A step's weights, as wgmma's left operand, of a warp's rows g and g + 8: the highest score, and their sum.
struct Weights {
    u32 of[STEP / 16][4];
    float top[2], total[2];

    // Score keys. Those from `seen` on are not seen. rows: of the tile that are asked for.
    __device__ __forceinline__ void score(u32 queries, u32 keys, float scale, int seen, int rows) {
        float own[STEP / 2];
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            const u32 at = k / 4 * COLUMNS + k % 4 * 32;
            asm volatile(SCORE : SUMS(own) : "l"(described(queries + at)), "l"(described(keys + at)), "r"(k));
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" : SUMS(own)::"memory");
        if (static_cast<int>(threadIdx.x) / 32 * 16 >= rows) return;
        float lift[2];
        top[0] = top[1] = UNSEEN;
#pragma unroll
        for (int i = 0; i < STEP / 2; ++i) {
            if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= seen) own[i] = UNSEEN;
            top[i / 2 % 2] = fmaxf(top[i / 2 % 2], own[i]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
            lift[h] = __fmul_rn(-top[h], scale);
            total[h] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < STEP / 2; ++i) {
            own[i] = power(__fmaf_rn(own[i], scale, lift[i / 2 % 2]));
            total[i / 2 % 2] = __fadd_rn(total[i / 2 % 2], own[i]);
            if (i % 2) of[i / 8][i / 2 % 4] = rounded(own[i - 1], own[i]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            total[h] = __fadd_rn(total[h], __shfl_xor_sync(~0u, total[h], 1));
            total[h] = __fadd_rn(total[h], __shfl_xor_sync(~0u, total[h], 2));
        }
    }
};

__device__ __forceinline__ void weigh(const Weights& weights, u32 values, float (&own)[32]) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        const u32(&a)[4] = weights.of[k];
        asm volatile(WEIGH
                     : SUMS(own)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described(values + k * 2048)), "r"(k));
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" : SUMS(own)::"memory");
}

// What has been seen by a warp's rows g and g + 8, and by weights a thread's share of values: sum[4 * j + i] is of
// row g + i / 2 * 8, number 8 * j + 2 * t + i % 2 of a head.
struct Piece {
    float top[2], total[2], sum[DIM / 2];

    // Nothing seen.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int h = 0; h < 2; ++h) top[h] = UNSEEN, total[h] = 0.f;
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) sum[i] = 0.f;
    }

    // Take a later step as methods.kernels.combine.merge does, bit for bit, so nothing is changed by what was nothing.
    // 64 numbers of a head at once, so that registers suffice. ALONE: there is no other step.
    template <bool ALONE>
    __device__ __forceinline__ void take(const Weights& step, u32 values, float scale) {
        float kept[2], added[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (ALONE) {
                top[h] = step.top[h], total[h] = step.total[h];
                continue;
            }
            const float highest = fmaxf(top[h], step.top[h]);
            kept[h] = top[h] == UNSEEN ? 0.f : power(__fmul_rn(__fsub_rn(top[h], highest), scale));
            added[h] = power(__fmul_rn(__fsub_rn(step.top[h], highest), scale));
            total[h] = __fmaf_rn(total[h], kept[h], __fmul_rn(step.total[h], added[h]));
            top[h] = highest;
        }
#pragma unroll
        for (int half = 0; half < DIM / 64; ++half) {
            float own[32];
            weigh(step, values + half * COLUMNS, own);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float& so_far = sum[32 * half + i];
                so_far = ALONE ? own[i] : __fmaf_rn(so_far, kept[i / 2 % 2], __fmul_rn(own[i], added[i / 2 % 2]));
            }
        }
    }

    // first, end: rows of a group, which count nodes, then heads; those of the tile, and how many there are.
    __device__ __forceinline__ void write(const Task& task, int piece, int group, int first, int end) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + threadIdx.x / 32 * 16 + lane / 4 + 8 * h;
            if (row >= end) continue;
            const long long at = (static_cast<long long>(piece) * task.nodes + row / SHARED) * HEADS +
                                 group * SHARED + row % SHARED;
            if (lane % 4 == 0) {
                task.tops[at] = top[h];
                task.totals[at] = total[h];
            }
            float* to = task.sums + at * DIM + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < DIM / 8; ++j) {
                *reinterpret_cast<float2*>(to + 8 * j) = float2{sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]};
            }
        }
    }
};

