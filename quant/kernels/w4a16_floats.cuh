// Products of w4a16_hopper.cu by 16-bit floats: codes less their zeros times x, both as they are.
//
// Set in front: as for w4a16_hopper.cu.

typedef float Part;
constexpr int PART = HELD;          // sums of a product that a thread has
constexpr int STEPS = 8 / SPANS;    // of 16 inputs, of a product
constexpr u32 AT_ONCE = TOKENS <= 48 ? 2 : 1;  // chunks between two waits for everything
constexpr int UNDER_WAY = 2;        // products of a warpgroup
constexpr float OPENED_TO = 1.0f;   // times what codes are

// Of x, from the start of a chunk on: 64 inputs a row, halves of a chunk behind each other. In
// units of 16 bytes.
__device__ __forceinline__ u32 step_at(int span, int step) {
    const int i = span * STEPS + step;
    return i / 4 * (X_BYTES / 32) + i % 4 * 2;
}

__device__ __forceinline__ void copy_x(u32 to, const TensorMap* x, const float*, u32, u32 chunk, u32 rank,
                                       u32 barrier) {
    const u32 column = chunk * CHUNK + rank * (CHUNK / 2);
    copy_to_pair(to + rank * (X_BYTES / 2), x, static_cast<int>(column), barrier);
}

__device__ __forceinline__ u32 picked(u32 word, u32 mask, u32 base) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(word), "r"(mask), "r"(base));  // (w & m) ^ b
    return out;
}

// Set into the mantissa of 1024 (float16) or 128 (bfloat16) a code is exact. In float16 a code four
// bits up is worth 16 and is scaled down, after which that number is 64 and its last place 1/16.
__device__ __forceinline__ Zeros zeros_of(u32 low, u32 high) {
    return {{((BF16 ? 0x4300u : 0x6400u) + low) * 0x00010001u,
             (BF16 ? 0x4300u + high : 0xd400u + (high << 4)) * 0x00010001u}};
}

// The codes of 16 inputs, less their zeros, of rows g and g + 8 of a warp.
//
// Where no zeros are stored a nibble is its code with the highest bit turned, see w4a16_hopper.py.
__device__ __forceinline__ void open_step(const u32 (&words)[8 / SPANS], int step, const Zeros& zeros,
                                          u32 (&a)[4]) {
    const u32 word = words[step];
    constexpr u32 FLIP = ZEROS ? 0 : 0x00080008;
#if BF16
    constexpr u32 BASE = 0x43004300 ^ FLIP, MASK = 0x000f000f;
    a[0] = picked(word, MASK, BASE);
    a[1] = picked(word >> 4, MASK, BASE);
    a[2] = picked(word >> 8, MASK, BASE);
    a[3] = picked(word >> 12, MASK, BASE);
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[0]) : "r"(zeros.of[0]));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[1]) : "r"(zeros.of[1]));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[2]) : "r"(zeros.of[0]));
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[3]) : "r"(zeros.of[1]));
#else
    constexpr u32 BASE = 0x64006400, LOW = 0x000f000f, HIGH = 0x00f000f0, SIXTEENTH = 0x2c002c00;
    const u32 upper = word >> 8;
    a[0] = picked(word, LOW, BASE ^ FLIP);
    a[1] = picked(word, HIGH, BASE ^ FLIP << 4);
    a[2] = picked(upper, LOW, BASE ^ FLIP);
    a[3] = picked(upper, HIGH, BASE ^ FLIP << 4);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[0]) : "r"(zeros.of[0]));
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[1]) : "r"(SIXTEENTH), "r"(zeros.of[1]));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[2]) : "r"(zeros.of[0]));
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[3]) : "r"(SIXTEENTH), "r"(zeros.of[1]));
#endif
}

// Scale a product that has ended and add it to its sum.
__device__ __forceinline__ void add_part(const Part (&part)[PART], const float (&scale)[2], u32,
                                         float (&sum)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum[i] = fmaf(scale[i / 2 % 2], part[i], sum[i]);
}
