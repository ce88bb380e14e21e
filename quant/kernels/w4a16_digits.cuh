// Products of w4a16_hopper.cu by int8: codes less their zeros times both digits of x in block
// floating point (quant/block_float.py), which are columns of one product. It is exact.
//
// A product of floats whose left operand comes from registers takes 44 to 48 cycles beside warps
// that open codes, though 64 columns need but 32 (LOG.md). One of int8 has twice the inputs and, by
// the digits, twice the columns: half as many of them, and 64 cycles for what had 96. Opening takes
// a third of the instructions, adding up four times as many, so that few tokens gain and many lose.
//
// Set in front: as for w4a16_hopper.cu.

typedef int Part;
constexpr int PART = 2 * HELD;      // sums of a product that a thread has: of one digit, then the other
constexpr int PIECES = SPANS;       // products of a tile and chunk
constexpr int STEPS = 4 / PIECES;   // of 32 inputs, of a product
constexpr bool CHAINED = false;     // a tile's products of several chunks are one sum
constexpr int READS = TOKENS <= 16 ? 24 : 16;  // of 16 bytes, of parts of sums, at once
// Chunks between two waits for everything.
constexpr u32 AT_ONCE = TOKENS <= 8 ? 4 : TOKENS <= 40 ? 2 : 1;
// Products of a warpgroup: of wide ones, there are no registers for two.
constexpr int UNDER_WAY = TOKENS <= 40 ? 2 : 1;
constexpr float OPENED_TO = ZEROS ? 1.0f : 16.0f;  // times what codes are

// Of x, from the start of a chunk on: 128 inputs a row. In units of 16 bytes.
__device__ __forceinline__ u32 step_at(int i) { return i * 2; }

__device__ __forceinline__ void copy_x(u32 to, const TensorMap* x, const float* scales, u32 stride,
                                       u32 chunk, u32 rank, u32 barrier) {
    copy_plane_to_pair(to + rank * (X_BYTES / 2), x, chunk * CHUNK, rank, barrier);
    copy_in(to + X_SCALES_AT, scales + u64{chunk} * stride, X_SCALES, barrier);
}

typedef NoBoost Boost;

// Of rows g and g + 8 of a warp.
struct Factors {
    float scale[2];
    u32 zeros[2];  // four times in a word

    __device__ __forceinline__ void load(u32 at, u32 zeros_from, u32 pair) {
        scales_at(at, pair, scale);
        scale[0] *= 1.0f / OPENED_TO, scale[1] *= 1.0f / OPENED_TO;
        if constexpr (ZEROS) {
            const u32 both = zeros_at(zeros_from, pair);
            zeros[0] = (both & 255) * 0x01010101u, zeros[1] = (both >> 8) * 0x01010101u;
        }
    }

    __device__ __forceinline__ void prepare(const Boost&) {}
};

// Four codes, less their zero, as bytes. Without zeros stored a nibble is its code less 8, in two's
// complement, and is opened to 16 times that.
__device__ __forceinline__ u32 opened(u32 nibbles, u32 zero) {
#if ZEROS
    constexpr u32 SIGNS = 0x80808080;  // so that no byte borrows of the next
    u32 raised;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(raised) : "r"(nibbles), "r"(0x0f0f0f0f), "r"(SIGNS));
    return (raised - zero) ^ SIGNS;
#else
    return nibbles & 0xf0f0f0f0;
#endif
}

// The codes of 32 inputs, less their zeros, of rows g and g + 8 of a warp.
__device__ __forceinline__ void open_step(const u32* words, int step, const Factors& factors, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 word = words[2 * step + i];
        a[2 * i] = opened(ZEROS ? word : word << 4, factors.zeros[0]);
        a[2 * i + 1] = opened(ZEROS ? word >> 4 : word, factors.zeros[1]);
    }
}

// Scale a product that has ended and add it to its sum. stage: of its chunk.
__device__ __forceinline__ void add_part(const Part (&part)[PART], const Factors& factors, u32 stage,
                                         float (&sum)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        float by_token[2];
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(by_token[0]), "=f"(by_token[1])
                     : "r"(stage + X_SCALES_AT + (i * 2 + threadIdx.x % 4 * 2) * 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int whole = part[i + j] * 256 + part[HELD + i + j];
            sum[i + j] = fmaf(static_cast<float>(whole), factors.scale[j / 2] * by_token[j % 2], sum[i + j]);
        }
    }
}
