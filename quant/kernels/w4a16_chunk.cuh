// A chunk of w4a16_hopper.cu in shared memory: x, words, scales, zeros, then scales of x.
//
// Set in front: as for w4a16_hopper.cu; X_A_TOKEN, bytes of a token's inputs, and X_SCALE_BYTES.

constexpr int ROWS = 256;           // output features of a block
constexpr int CHUNK = 128;          // inputs of a stage
constexpr int CONSUMERS = 256;      // threads that multiply: two warpgroups, each two tiles of 64
constexpr int HELD = TOKENS / 2;    // sums of a thread, of a tile
constexpr int READS = TOKENS <= 16 ? 24 : 16;  // of 16 bytes, of parts of sums, at once
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int X_BYTES = TOKENS * X_A_TOKEN;
constexpr int X_SCALES = TOKENS * X_SCALE_BYTES;
constexpr int WORD_BYTES = ROWS * CHUNK / 2;
constexpr int ALL_SCALES = ROWS * SPANS * SCALE_BYTES;
constexpr int ALL_ZEROS = ZEROS ? ROWS * SPANS : 0;
constexpr int X_SCALES_AT = X_BYTES + WORD_BYTES + ALL_SCALES + ALL_ZEROS;
constexpr int STAGE_BYTES = (X_SCALES_AT + X_SCALES + 1023) / 1024 * 1024;

// What is taken off rows g and g + 8 of a warp, as often as a word wants it.
struct Zeros {
    u32 of[2];
};
