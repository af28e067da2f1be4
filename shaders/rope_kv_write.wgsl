// Query and key normalisation, rotary embedding (Su et al. 2021) and the write of keys and values
// into the paged cache (vLLM's reshape_and_cache), in one pass over rows of the fused projection.
// LANES threads own one head of one token, a thread one vec4 of it.
#include "include/out_{out}.wgsl"
#include "include/sum_{sum}.wgsl"
#include "include/turn.wgsl"

struct Params {
    n_tokens: u32,
    n_heads: u32,
    n_kv_heads: u32,
    qkv_stride4: u32,  // row strides in vec4s
    q_stride4: u32,
    n_slots: u32,      // in the cache; a token with a slot beyond is padding
    block_size: u32,
    n_positions: u32,  // rows of the table
    rotary_dim: u32,
    norm_dim: u32,     // true head_dim
    grid_y: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;     // [n_tokens, qkv_stride4]
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>;    // q weights, then k weights
@group(0) @binding(3) var<storage, read> table: array<f32>;         // [n_positions, rotary_dim]
@group(0) @binding(4) var<storage, read> tokens: array<vec4<u32>>;  // (position, slot, sequence, 0)
@group(0) @binding(5) var<storage, read_write> q: array<vec4<f32>>; // [n_tokens, q_stride4]
// [n_blocks, n_kv_heads, block_size, HEAD4]
@group(0) @binding(6) var<storage, read_write> k_cache: array<out4>;
@group(0) @binding(7) var<storage, read_write> v_cache: array<out4>;

override HEAD4: u32 = 16u;           // head_dim / 4
override LANES: u32 = 16u;           // HEAD4 rounded up to a power of two, at most 64
override SUBLANES: u32 = 1u;         // of them that add up without a barrier of the workgroup
override QK_NORM: u32 = 0u;          // 0: none, 1: each head, 2: all heads of a projection together

const THREADS: u32 = 64u;

var<workgroup> staged: array<f32, 256>;      // [THREADS / LANES heads, 4 * LANES]
var<workgroup> squares: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.y + group.z * p.grid_y;
    if (token >= p.n_tokens) {
        return;
    }
    // Loads that wait for nothing come first.
    let t = tokens[token];
    let lane = lid % LANES;
    let head = group.x * (THREADS / LANES) + lid / LANES;  // of q, then k, then v
    let n_normed = p.n_heads + p.n_kv_heads;
    let live = lane < HEAD4 && head < n_normed + p.n_kv_heads;
    let normed = live && head < n_normed;
    let row = token * p.qkv_stride4;
    var x = vec4(0.0);
    if (live) {
        x = qkv[row + head * HEAD4 + lane];
    }
    var weight = vec4(1.0);
    if (QK_NORM != 0u && normed) {
        let first = select(select(HEAD4, 0u, head < p.n_heads), head * HEAD4, QK_NORM == 2u);
        weight = norm[first + lane];
    }
    let slot = t.y;
    if (slot >= p.n_slots) {
        return;
    }
    let angles = min(t.x, p.n_positions - 1u) * p.rotary_dim;
    var cosines = vec4(1.0);
    var sines = vec4(0.0);
    for (var c = 0u; c < 4u; c++) {
        let e = lane * 4u + c;
        if (normed && e < p.rotary_dim) {
            let pair = turn_of(e).pair;
            cosines[c] = table[angles + pair];
            sines[c] = table[angles + p.rotary_dim / 2u + pair];
        }
    }
    if (QK_NORM != 0u) {
        var sum = dot(x, x);
        if (QK_NORM == 2u && head < n_normed) {
            sum = 0.0;
            let is_q = head < p.n_heads;
            let base = row + select(p.n_heads * HEAD4, 0u, is_q);
            let n = select(p.n_kv_heads, p.n_heads, is_q) * HEAD4;
            for (var i = lane; i < n; i += LANES) {
                let v = qkv[base + i];
                sum += dot(v, v);
            }
        }
        sum = sum_lanes(sum, lid, SUBLANES);
        if (lid % SUBLANES == 0u) {
            squares[lid / SUBLANES] = sum;
        }
        // The weight before the rotation, the scale after it: one barrier serves both.
        x *= weight;
    }
    for (var c = 0u; c < 4u; c++) {
        staged[lid * 4u + c] = x[c];
    }
    workgroupBarrier();
    if (head == 0u) {
        for (var i = p.n_heads * HEAD4 + lane; i < p.q_stride4; i += LANES) {
            q[token * p.q_stride4 + i] = vec4(0.0);
        }
    }
    if (!live) {
        return;
    }
    let block = slot / p.block_size;
    let offset = slot % p.block_size;
    if (head >= n_normed) {
        let at = (block * p.n_kv_heads + head - n_normed) * p.block_size + offset;
        v_cache[at * HEAD4 + lane] = out_store(x);
        return;
    }
    var y = x * cosines;
    for (var c = 0u; c < 4u; c++) {
        let e = lane * 4u + c;
        if (e < p.rotary_dim) {
            let turn = turn_of(e);
            y[c] += turn.sign * staged[(lid - lane) * 4u + turn.partner] * sines[c];
        }
    }
    if (QK_NORM != 0u) {
        var sum = 0.0;
        for (var i = 0u; i < LANES / SUBLANES; i++) {
            sum += squares[(lid - lane) / SUBLANES + i];
        }
        let n_heads = select(p.n_kv_heads, p.n_heads, head < p.n_heads);
        let n = p.norm_dim * select(1u, n_heads, QK_NORM == 2u);
        y *= inverseSqrt(sum / f32(n) + p.eps);
    }
    if (head < p.n_heads) {
        q[token * p.q_stride4 + head * HEAD4 + lane] = y;
    } else {
        let at = (block * p.n_kv_heads + head - p.n_heads) * p.block_size + offset;
        k_cache[at * HEAD4 + lane] = out_store(y);
    }
}
