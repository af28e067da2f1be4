// A tile of 64 tokens: each subgroup holds FM x FN matrices, SG_M subgroups share the tokens; STEP
// columns are staged at a time.
const TILE_TOKENS: u32 = 64u;
const FM: u32 = 32u / EDGE;
const FN: u32 = 64u / EDGE;
const SG_M: u32 = 2u;
const STEP: u32 = 32u;
