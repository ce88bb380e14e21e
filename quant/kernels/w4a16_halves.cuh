// Products of w4a16_hopper.cu in float16, sums of 512 inputs too: scales are multiplied into codes.
//
// Wide reads are bound by the ports of registers and by power (LOG.md): while tensor cores add in
// float32 other instructions get a quarter of their slots. In float16 half as much of sums is read
// and written; with its scale in it a weight is rounded to float16, and sums need no scaling. Four
// warpgroups of a tile each keep tensor cores fed.
//
// Set in front: as for w4a16_hopper.cu.

typedef u32 Part;                   // two sums
constexpr int PART = HELD / 2;
static_assert(TILES == 1, "a boost is one tile's");
constexpr int PIECES = 2;           // products of a tile and chunk
constexpr int STEPS = 8 / PIECES;   // of 16 inputs, of a product
constexpr bool CHAINED = true;      // a tile's products of several chunks are one sum
constexpr int READS = 8;            // of 16 bytes, of parts of sums, at once
constexpr u32 AT_ONCE = 4;          // chunks of a sum in float16
constexpr int UNDER_WAY = 2;        // products of a warpgroup

__device__ __forceinline__ void twice(u32 both, u32 (&each)[2]) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "mov.b32 %0, {low, low};\nmov.b32 %1, {high, high};\n}"
        : "=r"(each[0]), "=r"(each[1])
        : "r"(both));
}

// What a row's scales are multiplied by besides 2^15, so that weights and sums are normal numbers;
// a half for each of rows g and g + 8.
struct Boost {
    u32 both;

    // pair: of rows, counted over the whole weight.
    __device__ __forceinline__ void load(const u32* boosts, u32 pair) { both = __ldg(boosts + pair); }

    // Undo it, 2^15 and what codes are worth: of row g 2^-24, of g + 8 2^-20.
    __device__ __forceinline__ void undo(float (&sum)[HELD]) const {
        float each[2];
        floats_of(both, each);
#pragma unroll
        for (int i = 0; i < HELD; ++i) sum[i] *= (i / 2 % 2 ? 0x1p5f : 0x1p9f) / each[i / 2 % 2];
    }
};

// Of rows g and g + 8 of a warp.
struct Factors {
    u32 halves;       // scales as they are, of both, in float16
    float floats[2];  // or in float32
    u32 codes;        // of zeros, if they are stored
    u32 scale[2];     // of one row each, twice in a word
    u32 zeros[2];     // what is added: minus 8 scales; if zeros are stored, their codes, taken off

    __device__ __forceinline__ void load(u32 at, u32 zeros_from, u32 pair) {
        if constexpr (SCALE == 0) {
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(halves) : "r"(at + pair * 4));
        } else {
            scales_at(at, pair, floats);
        }
        if constexpr (ZEROS) codes = zeros_at(zeros_from, pair);
    }

    // A group whose weights are all 0 may have any scale: it is cut off at the largest number.
    __device__ __forceinline__ void prepare(const Boost& boost) {
        u32 both;
        if constexpr (SCALE == 0) {
            asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(halves), "r"(boost.both));
            asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(both) : "r"(0x78007800));  // 2^15
            asm("min.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(both) : "r"(0x7bff7bff));
        } else {
            float factor[2];
            floats_of(boost.both, factor);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                factor[i] = fminf(fmaxf(floats[i] * factor[i] * 0x1p15f, -65504.0f), 65504.0f);
            }
            asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(factor[0]), "f"(factor[1]));
        }
        twice(both, scale);
        if constexpr (ZEROS) {
            twice((codes & 15) | (codes & 0xf00) << 12, zeros);
        } else {
            u32 less;  // 8 of a code's units: -2^-21 and -2^-17
            asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(less) : "r"(both), "r"(0x80808008));
            twice(less, zeros);
        }
    }
};

// 16 weights of each row: scale times code less zero, rounded; once, if the scale is of float16 and
// no less than a 256th of its row's largest.
//
// As float16 a code's bits are so many of the smallest numbers, 2^-24; of row g + 8, four bits up,
// of 2^-20. Where no zeros are stored a nibble is its code with the highest bit turned. See
// w4a16_hopper.py.
__device__ __forceinline__ void open_step(const u32* words, int step, const Factors& factors, u32 (&a)[4]) {
    constexpr u32 FLIP = ZEROS ? 0 : 0x00080008;
    const u32 word = words[step], upper = word >> 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int up = i % 2 * 4;
        a[i] = picked(i < 2 ? word : upper, 0x000f000f << up, FLIP << up);
        if constexpr (ZEROS) {
            asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(factors.zeros[i % 2]));
            asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(factors.scale[i % 2]));
        } else {
            asm("fma.rn.f16x2 %0, %0, %1, %2;"
                : "+r"(a[i])
                : "r"(factors.scale[i % 2]), "r"(factors.zeros[i % 2]));
        }
    }
}

// Add a product that has ended to its sum.
__device__ __forceinline__ void add_part(const Part (&part)[PART], const Factors&, u32, float (&sum)[HELD]) {
#pragma unroll
    for (int i = 0; i < PART; ++i) {
        float two[2];
        floats_of(part[i], two);
        sum[2 * i] += two[0], sum[2 * i + 1] += two[1];
    }
}
