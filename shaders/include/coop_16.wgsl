// A tile of 16 tokens: each subgroup holds FM x FN matrices, SG_M subgroups share the tokens; STEP
// columns are staged at a time.
const TILE_TOKENS: u32 = 16u;
const FM: u32 = 16u / EDGE;
const FN: u32 = 32u / EDGE;
const SG_M: u32 = 1u;
const STEP: u32 = 64u;
