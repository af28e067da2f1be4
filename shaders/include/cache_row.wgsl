// Where keys and values of a position lie in the paged cache (Kwon et al. 2023). Expects
// p.max_blocks, p.block_size, p.n_kv_heads, and `block_at(i)`, word i of the block tables
// [n_sequences, max_blocks], in scope.
override HEAD4: u32 = 16u;  // head_dim / 4

// Index of the first vec4 of a head's row in k_cache and v_cache.
fn cache_row(sequence: u32, kv_head: u32, position: u32) -> u32 {
    return slot_row(block_at(sequence * p.max_blocks + position / p.block_size), kv_head,
                    position % p.block_size);
}

fn slot_row(block: u32, kv_head: u32, offset: u32) -> u32 {
    return ((block * p.n_kv_heads + kv_head) * p.block_size + offset) * HEAD4;
}
