// Products of w4a16_hopper.cu in bfloat16: codes less their zeros times x, both as they are.
//
// Set in front: as for w4a16_hopper.cu.

typedef float Part;
constexpr int PART = HELD;          // sums of a product that a thread has
constexpr int PIECES = SPANS;       // products of a tile and chunk
constexpr int STEPS = 8 / PIECES;   // of 16 inputs, of a product
constexpr bool CHAINED = false;     // a tile's products of several chunks are one sum
constexpr int READS = 16;           // of 16 bytes, of parts of sums, at once
constexpr u32 AT_ONCE = TOKENS <= 48 ? 2 : 1;  // chunks between two waits for everything
constexpr int UNDER_WAY = 2;        // products of a warpgroup

typedef NoBoost Boost;

// Of rows g and g + 8 of a warp.
struct Factors {
    float scale[2];
    u32 zeros[2];  // twice in a word

    __device__ __forceinline__ void load(u32 at, u32 zeros_from, u32 pair) {
        scales_at(at, pair, scale);
        const u32 both = ZEROS ? zeros_at(zeros_from, pair) : 0x0808;
        zeros[0] = (0x4300 + (both & 255)) * 0x00010001u;
        zeros[1] = (0x4300 + (both >> 8)) * 0x00010001u;
    }

    __device__ __forceinline__ void prepare(const Boost&) {}
};

// The codes of 16 inputs, less their zeros. Set into the mantissa of 128 a code is exact.
//
// Where no zeros are stored a nibble is its code with the highest bit turned, see w4a16_hopper.py.
__device__ __forceinline__ void open_step(const u32* words, int step, const Factors& factors, u32 (&a)[4]) {
    constexpr u32 BASE = 0x43004300 ^ (ZEROS ? 0 : 0x00080008), MASK = 0x000f000f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = picked(words[step] >> 4 * i, MASK, BASE);
        asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(factors.zeros[i % 2]));
    }
}

// Scale a product that has ended and add it to its sum.
__device__ __forceinline__ void add_part(const Part (&part)[PART], const Factors& factors, u32,
                                         float (&sum)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum[i] = fmaf(factors.scale[i / 2 % 2], part[i], sum[i]);
}
