// Normalises few tokens, multiplies them with the router and chooses their experts. A workgroup
// computes the logits of some experts of one token; the last of a token's workgroups to finish
// chooses. One more workgroup of each token stores its normalised row for the experts.
//
// Logits pass between workgroups, so a storage barrier has to order them for the whole device.
#include "include/out_{out}.wgsl"
#include "include/sum_{sum}.wgsl"
#include "format/f32.wgsl"
#include "include/dot_rows.wgsl"
#include "include/choose_experts.wgsl"

struct Params {
    n_rows: u32,          // of weights, with padding
    n_chunks: u32,        // 16-byte chunks in a weight row
    x_stride4: u32,       // row stride in vec4s
    scratch_stride: u32,
    n_groups: u32,        // workgroups that compute a token's logits
    norm_cols: u32,       // true width, over which the mean is taken
    n_experts: u32,
    top_k: u32,
    n_group: u32,         // of experts
    topk_group: u32,
    renormalize: u32,
    eps: f32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;  // [n_rows / 4, n_chunks, 4]
// Weights of the norm [x_stride4], then if BIAS what is added for the choice [n_experts]
@group(0) @binding(2) var<storage, read> vectors: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;        // [n_tokens, x_stride4]
@group(0) @binding(4) var<storage, read> tokens: array<vec4<u32>>;   // [n_tokens]: _, slot, _, _
// Bits of logits; the last is how many workgroups are done, zero before and after. [n_tokens, _]
@group(0) @binding(5) var<storage, read_write> scratch: array<atomic<u32>>;
@group(0) @binding(6) var<storage, read_write> ids: array<i32>;      // [n_tokens, top_k]
@group(0) @binding(7) var<storage, read_write> routed: array<f32>;   // [n_tokens, top_k]
@group(0) @binding(8) var<storage, read_write> normed: array<out4>;  // [n_tokens, x_stride4]

var<workgroup> n_done: u32;

fn activation(t: u32, row: u32, col4: u32) -> vec4<f32> {
    let v = x[row * p.x_stride4 + col4];
    squares[t] += dot(v, v);
    return v * vectors[col4];
}

fn logit_bits(token: u32, expert: u32) -> u32 {
    return atomicLoad(&scratch[token * p.scratch_stride + expert]);
}

fn bias_bits(expert: u32) -> u32 {
    return bitcast<u32>(vectors[p.x_stride4 + expert / 4u][expert % 4u]);
}

fn store_normed(token: u32, lid: u32) {
    let row = token * p.x_stride4;
    var sum = 0.0;
    for (var i = lid; i < p.x_stride4; i += THREADS) {
        sum += dot(x[row + i], x[row + i]);
    }
    let part = sum_lanes(sum, lid, SUBLANES);
    if (lid % SUBLANES == 0u) {
        part_squares[lid / SUBLANES] = part;
    }
    workgroupBarrier();
    sum = 0.0;
    for (var i = 0u; i < THREADS / SUBLANES; i++) {
        sum += part_squares[i];
    }
    let factor = inverseSqrt(sum / f32(p.norm_cols) + p.eps);
    for (var i = lid; i < p.x_stride4; i += THREADS) {
        normed[row + i] = out_store(x[row + i] * factor * vectors[i]);
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.y;
    if (group.x == p.n_groups) {
        store_normed(token, lid);
        return;
    }
    if (tokens[token].y == PADDING) {
        if (group.x == 0u) {
            choose_none(token, lid);
        }
        return;
    }
    let row = (group.x * (THREADS / LANES) + lid / LANES) * 4u;
    let live = row < p.n_rows;
    let read_row = select(0u, row, live);
    dot_rows(read_row, read_row, token, 1u, lid % LANES);
    sum_dots(lid);
    let at = token * p.scratch_stride;
    if (live && lid % LANES == 0u) {
        let factor = inverseSqrt(squares_of(0u, lid) / f32(p.norm_cols) + p.eps);
        let logits = bitcast<vec4<u32>>(dots_of(0u, 0u, lid) * factor);
        for (var c = 0u; c < 4u; c++) {
            atomicStore(&scratch[at + row + c], logits[c]);
        }
    }
    storageBarrier();
    if (lid == 0u) {
        n_done = atomicAdd(&scratch[at + p.scratch_stride - 1u], 1u) + 1u;
    }
    if (workgroupUniformLoad(&n_done) < p.n_groups) {
        return;
    }
    storageBarrier();
    choose(token, lid);
    if (lid == 0u) {
        atomicStore(&scratch[at + p.scratch_stride - 1u], 0u);
    }
}
