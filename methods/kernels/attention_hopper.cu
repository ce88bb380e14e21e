// Pieces of attention on Hopper; attention_hopper.py tells what they are and what is asked of them.
//
// In front come DIM, GROUPS, SHARED (query heads of a key-value head), BF16, the instructions SCORE and WEIGH, and
// the list of their sums. PTX ISA: cp.async, wgmma (128-byte swizzles), griddepcontrol.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int STEP = 64, THREADS = 128, HEADS = GROUPS * SHARED;
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
    int nodes, scratch, depth, capacity, size, tiles, shared_blocks, hop, own_at, fine;
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

// How many scratch slots a node sees, itself included; by every warp for itself.
__device__ __forceinline__ int length_of(const Task& task, int node) {
    if (task.depth == 0) return task.scratch + node + 1;
    int length = 0;
    for (int first = 0; first < task.depth; first += 32) {
        const int column = first + threadIdx.x % 32;
        const bool there = column < task.depth && task.ancestors[node * task.depth + column] >= 0;
        length += __popc(__ballot_sync(~0u, there));
    }
    return length;
}

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

// read: keys; weights of those behind them are 0.
__device__ __forceinline__ void weigh(const Weights& weights, u32 values, int read, float (&own)[32]) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        if (16 * k >= read) break;
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
    __device__ __forceinline__ void take(const Weights& step, u32 values, int read, float scale) {
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
            weigh(step, values + half * COLUMNS, read, own);
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

// Keys (kind 0) or values (1) of a step's slots. A pass of the block takes whole rows, a multiple of 8, so that
// addresses of all passes differ by constants.
__device__ __forceinline__ void copy_step(const Task& task, int group, int start, int kind, u32 to) {
    constexpr int PASS = THREADS / CHUNKS;
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const u16* from = entry(task, group, start + row) + kind * task.stride_kind + chunk * 8;
    const u32 first = to + place(row, chunk);
#pragma unroll
    for (int pass = 0; pass < STEP / PASS; ++pass) copy(first + pass * PASS * 128, from + pass * PASS * DIM);
}

// Bring what lies at slots `from` ... `end` into the L2 cache.
__device__ __forceinline__ void fetch_ahead(const Task& task, int group, int from, int end, int kind) {
    if (from >= end) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(entry(task, group, from) + kind * task.stride_kind),
                 "r"((end - from) * DIM * 2)
                 : "memory");
}

// Queries of a tile, turned. Rows behind the end are left as they are: nobody reads what comes of them.
__device__ __forceinline__ void put_queries(const Task& task, int group, int first, int end, u32 to) {
    constexpr int PASSES = ROWS * CHUNKS / 2 / THREADS;
    Turn turns[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int item = threadIdx.x + pass * THREADS, at = first + item / (CHUNKS / 2), node = at / SHARED;
        if (at >= end) continue;
        const u16* head = query_of(task, node, group, at % SHARED);
        turns[pass].fetch(task, head, task.positions[node], item % (CHUNKS / 2));
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int item = threadIdx.x + pass * THREADS, row = item / (CHUNKS / 2);
        if (first + row < end) turns[pass].put_at(to, row, item % (CHUNKS / 2));
    }
}

// One piece of decided keys for one tile of rows.
__device__ __forceinline__ void share(const Task& task, u32 keys, u32 values, u32 queries) {
    const int tile = blockIdx.x % task.tiles, group = blockIdx.x / task.tiles % GROUPS;
    const int piece = blockIdx.x / (task.tiles * GROUPS), start = piece * task.size;
    const int first = tile * ROWS, rows = task.nodes * SHARED;
    // What is decided stands: on its way before the kernel ahead has ended, and before it is known to be decided.
    const bool there = start + STEP <= task.capacity;
    if (tile == 0 && threadIdx.x < 2) {
        fetch_ahead(task, group, start + STEP, min(start + task.size, task.capacity), threadIdx.x);
    }
    if (there) copy_step(task, group, start, 0, keys);
    copies_close();
    if (there) copy_step(task, group, start, 1, values);
    copies_close();
    const int decided = static_cast<int>(*task.base) / STEP * STEP, end = min(start + task.size, decided);
    wait_for_earlier();
    if (start < end) {
        put_queries(task, group, first, rows, queries);
        Piece so_far;
        so_far.clear();
        for (int at = start; at < end; at += STEP) {
            const bool more = at + STEP < end;
            Weights weights;
            meet<1>();
            weights.score(queries, keys, task.scale, STEP, rows - first);
            __syncthreads();
            if (more) copy_step(task, group, at + STEP, 0, keys);
            copies_close();
            meet<1>();
            so_far.take<false>(weights, values, STEP, task.scale);
            __syncthreads();
            if (more) copy_step(task, group, at + STEP, 1, values);
            copies_close();
        }
        so_far.write(task, piece, group, first, rows);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Keys and values of positions `from` ... `end`, which are not decided, into rows from `row` on: earlier scratch as
// the cache has it, and what is of this very read as projected, turned here.
__device__ __forceinline__ void put_path(const Task& task, int node, int group, int base, int from, int end, int row,
                                         long long newest, int length, u32 keys, u32 values) {
    for (int item = threadIdx.x; item < (end - from) * (CHUNKS / 2); item += THREADS) {
        const int at = from + item / (CHUNKS / 2), chunk = item % (CHUNKS / 2), to = row + item / (CHUNKS / 2);
        const int slot = task.depth ? task.ancestors[node * task.depth + at - base] : at - base;
        const u32 low = place(to, chunk), high = place(to, chunk + CHUNKS / 2);
        const u16* value;
        if (slot >= task.scratch) {
            const u16* key = task.qkv + (slot - task.scratch) * WIDTH + (HEADS + group) * DIM;
            Turn turn;
            turn.fetch(task, key, newest - (base + length - 1 - at), chunk);
            turn.put_at(keys, to, chunk);
            value = key + GROUPS * DIM + chunk * 8;
        } else {
            const u16* key = entry(task, group, base + slot) + chunk * 8;
            copy(keys + low, key);
            copy(keys + high, key + DIM / 2);
            value = key + task.stride_kind;
        }
        copy(values + low, value);
        copy(values + high, value + DIM / 2);
    }
}

// Each hop-th step of one node's own path, which begins with the step in which what is decided ends.
__device__ __forceinline__ void own(const Task& task, u32 keys, u32 values, u32 queries) {
    const int rest = blockIdx.x - task.shared_blocks, group = rest % GROUPS;
    const int node = rest / GROUPS % task.nodes, first = rest / (GROUPS * task.nodes);
    const int base = static_cast<int>(*task.base), decided = base / STEP * STEP;
    if (first == 0) {
        for (int item = threadIdx.x; item < (base - decided) * CHUNKS; item += THREADS) {
            const int row = item / CHUNKS, chunk = item % CHUNKS;
            const u16* from = entry(task, group, decided + row) + chunk * 8;
            copy(keys + place(row, chunk), from);
            copy(values + place(row, chunk), from + task.stride_kind);
        }
    }
    wait_for_earlier();
    const int length = length_of(task, node), end = base + length, steps = (end - decided - 1) / STEP + 1;
    const long long newest = task.positions[node];
    for (int step = first; step < steps; step += task.hop) {
        const int start = decided + step * STEP, stop = min(end, start + STEP), from = max(start, base);
        const int head = threadIdx.x / (CHUNKS / 2), chunk = threadIdx.x % (CHUNKS / 2);
        Turn query;
        if (head < SHARED) query.fetch(task, query_of(task, node, group, head), newest, chunk);
        __syncthreads();  // all have read the step before
        put_path(task, node, group, base, from, stop, from - start, newest, length, keys, values);
        const int read = (stop - start + 15) / 16 * 16;  // keys
        for (int item = threadIdx.x; item < (start + read - stop) * CHUNKS; item += THREADS) {
            // Times a weight of 0, which not every number would survive.
            put(values + place(stop - start + item / CHUNKS, item % CHUNKS), uint4{0, 0, 0, 0});
        }
        if (head < SHARED) query.put_at(queries, head, chunk);
        copies_close();
        meet<0>();
        Weights weights;
        weights.score(queries, keys, task.scale, end - start, SHARED);
        Piece piece;
        piece.take<true>(weights, values, read, task.scale);
        const int at = task.fine ? decided / STEP + step : task.own_at + step;
        piece.write(task, at, group, node * SHARED, (node + 1) * SHARED);
        // The node's own entry, which nobody reads in this launch, goes to its slot.
        if (stop == end && threadIdx.x < 2 * CHUNKS) {
            const int kind = threadIdx.x / CHUNKS, part = threadIdx.x % CHUNKS;
            u16* to = entry(task, group, base + task.scratch + node) + kind * task.stride_kind + part * 8;
            *reinterpret_cast<uint4*>(to) = taken((kind ? values : keys) + place(end - 1 - start, part));
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attend(const __grid_constant__ Task task) {
    extern __shared__ unsigned char shared[];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const u32 keys = (shared_address(shared) + 1023) / 1024 * 1024, values = keys + MATRIX, queries = values + MATRIX;
    if (static_cast<int>(blockIdx.x) < task.shared_blocks) {
        share(task, keys, values, queries);
    } else {
        own(task, keys, values, queries);
    }
}
