// x of w4a16_hopper.cu as it is, for w4a16_halves.cuh and w4a16_floats.cuh, which come after it.

// Of x, from the start of a chunk on: 64 inputs a row, halves of a chunk behind each other. In
// units of 16 bytes.
__device__ __forceinline__ u32 step_at(int i) { return i / 4 * (X_BYTES / 32) + i % 4 * 2; }

__device__ __forceinline__ void copy_x(u32 to, const TensorMap* x, const float*, u32, u32 chunk, u32 rank,
                                       u32 barrier) {
    const u32 column = chunk * CHUNK + rank * (CHUNK / 2);
    copy_to_pair(to + rank * (X_BYTES / 2), x, static_cast<int>(column), barrier);
}

// (word & mask) ^ base
__device__ __forceinline__ u32 picked(u32 word, u32 mask, u32 base) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(word), "r"(mask), "r"(base));
    return out;
}
