// Parameters of attention over the paged cache (Kwon et al. 2023), and where a position's keys and
// values lie in it. Expects `block_tables` in scope.

struct Params {
    n_items: u32,      // tokens or tiles of them
    n_heads: u32,
    n_kv_heads: u32,
    block_size: u32,   // positions in a block
    max_blocks: u32,   // blocks in a row of block_tables
    q_stride4: u32,    // row strides in vec4s
    out_stride4: u32,
    window: u32,       // latest positions that a token sees, itself included
    grid_y: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;

fn block_at(i: u32) -> u32 {
    return block_tables[i];
}

#include "include/cache_row.wgsl"
