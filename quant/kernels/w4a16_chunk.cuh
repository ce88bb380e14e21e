// A chunk of w4a16_hopper.cu in shared memory: x, words, scales, zeros, then scales of x.
//
// Set in front: as for w4a16_hopper.cu; X_A_TOKEN, bytes of a token's inputs, and X_SCALE_BYTES.

constexpr int ROWS = 256;           // output features of a block
constexpr int CHUNK = 128;          // inputs of a stage
constexpr int CONSUMERS = 128 * GROUPS;  // threads that multiply
constexpr int TILES = 4 / GROUPS;   // of 64 features, of a warpgroup
constexpr int HELD = TOKENS / 2;    // sums of a thread, of a tile
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int X_BYTES = TOKENS * X_A_TOKEN;
constexpr int X_SCALES = TOKENS * X_SCALE_BYTES;
constexpr int WORD_BYTES = ROWS * CHUNK / 2;
constexpr int ALL_SCALES = ROWS * SPANS * SCALE_BYTES;
constexpr int ALL_ZEROS = ZEROS ? ROWS * SPANS : 0;
constexpr int X_SCALES_AT = X_BYTES + WORD_BYTES + ALL_SCALES + ALL_ZEROS;
constexpr int STAGE_BYTES = (X_SCALES_AT + X_SCALES + 1023) / 1024 * 1024;

// Two numbers of float16.
__device__ __forceinline__ void floats_of(u32 both, float (&each)[2]) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(each[0]), "=f"(each[1])
        : "r"(both));
}

// For a form that takes scales as they are, where another has a factor a row.
struct NoBoost {
    __device__ __forceinline__ void load(const u32*, u32) {}
    __device__ __forceinline__ void undo(float (&)[HELD]) const {}
};

// Of rows g and g + 8 of a warp, which lie side by side: the scales as floats.
__device__ __forceinline__ void scales_at(u32 at, u32 pair, float (&value)[2]) {
    if constexpr (SCALE == 2) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(value[0]), "=f"(value[1])
                     : "r"(at + pair * 8));
        return;
    }
    u32 both;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(at + pair * 4));
    if constexpr (SCALE == 1) {
        value[0] = __uint_as_float(both << 16), value[1] = __uint_as_float(both & 0xffff0000);
    } else {
        floats_of(both, value);
    }
}

// Likewise the zeros: a byte each.
__device__ __forceinline__ u32 zeros_at(u32 at, u32 pair) {
    u16 both;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(at + pair * 2));
    return both;
}
