// Causal attention of single tokens over the paged cache: a workgroup, or several, for each token
// and group of HEADS query heads.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "include/paged_cache.wgsl"
#include "include/attend_token.wgsl"

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;       // [n_tokens, q_stride4]
// [n_blocks, n_kv_heads, block_size, HEAD4]
@group(0) @binding(2) var<storage, read> k_cache: array<act4>;
@group(0) @binding(3) var<storage, read> v_cache: array<act4>;
@group(0) @binding(4) var<storage, read> tokens: array<vec4<u32>>;  // (position, slot, sequence, 0)
@group(0) @binding(5) var<storage, read> block_tables: array<u32>;  // [n_sequences, max_blocks]
@group(0) @binding(6) var<storage, read_write> out: array<out4>;    // [n_tokens, out_stride4]
@group(0) @binding(7) var<storage, read_write> parts: array<atomic<u32>>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.y + group.z * p.grid_y;
    if (token >= p.n_items) {
        return;
    }
    let share = p.n_heads / p.n_kv_heads;  // query heads of a key/value head
    let n_groups = (share + HEADS - 1u) / HEADS;  // of query heads
    let heads_id = group.x / PARTS;
    let part = group.x % PARTS;
    let kv_head = heads_id / n_groups;
    let first_head = heads_id % n_groups * HEADS;
    let n_live = min(HEADS, share - first_head);
    let head_at = (kv_head * share + first_head) * HEAD4;
    let out_at = token * p.out_stride4;
    if (group.x == 0u) {
        for (var i = p.n_heads * HEAD4 + lid; i < p.out_stride4; i += THREADS) {
            out[out_at + i] = out_store(vec4(0.0));
        }
    }
    // Loads that wait for nothing come first.
    let t = tokens[token];
    for (var i = lid; i < HEADS * HEAD4; i += THREADS) {
        var v = vec4(0.0);
        if (i < n_live * HEAD4) {
            v = q[token * p.q_stride4 + head_at + i] * p.scale;
        }
        queries[i] = v;
    }
    if (t.y == PADDING) {
        if (part > 0u) {
            return;
        }
        for (var i = lid; i < n_live * HEAD4; i += THREADS) {
            out[out_at + head_at + i] = out_store(vec4(0.0));
        }
        return;
    }
    let end = t.x + 1u;
    let start = end - min(end, p.window);
    let n_parts = parts_of(end - start);
    if (part >= n_parts) {
        return;
    }
    let heads = token * (p.n_kv_heads * n_groups) + heads_id;
    let span = Span(t.z, kv_head, start, end, part, n_parts, heads, n_live, out_at + head_at);
    attend(span, first_row_of(span, lid), LOWEST, Sums(), lid);
}
