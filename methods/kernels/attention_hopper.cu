// Pieces of attention on Hopper; attention_hopper.py tells what they are and what is asked of them.

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
    const int piece = blockIdx.x / (task.tiles * GROUPS), first = tile * ROWS, rows = task.nodes * SHARED;
    const int decided = static_cast<int>(*task.base) / STEP;
    const int size = decided <= task.fine_steps ? STEP : STEPS * STEP;
    const int start = piece * size, end = min(start + size, decided * STEP);
    // What is decided stands: on its way before the kernel ahead has ended.
    if (start < end) {
        if (tile == 0 && threadIdx.x < 2) fetch_ahead(task, group, start + STEP, end, threadIdx.x);
        copy_step(task, group, start, 0, keys);
        copies_close();
        copy_step(task, group, start, 1, values);
        copies_close();
    }
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
            so_far.take<false>(weights, values, task.scale);
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
        for (int item = threadIdx.x; item < (start + STEP - stop) * CHUNKS; item += THREADS) {
            // Times a weight of 0, which not every number would survive.
            put(values + place(stop - start + item / CHUNKS, item % CHUNKS), uint4{0, 0, 0, 0});
        }
        if (head < SHARED) query.put_at(queries, head, chunk);
        copies_close();
        meet<0>();
        Weights weights;
        weights.score(queries, keys, task.scale, end - start, SHARED);
        Piece piece;
        piece.take<true>(weights, values, task.scale);
        const int at = (decided / STEP <= task.fine_steps ? decided / STEP : task.own_at) + step;
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
