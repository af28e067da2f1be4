// Routes each token to top_k experts. One workgroup per token.
#include "include/choose_experts.wgsl"

struct Params {
    n_tokens: u32,
    n_experts: u32,
    top_k: u32,
    n_group: u32,      // 1: no groups
    topk_group: u32,
    stride: u32,       // of logits
    renormalize: u32,
    grid_x: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;        // [n_tokens, stride] f32 bits
@group(0) @binding(2) var<storage, read> bias: array<u32>;          // [n_experts] f32 bits if BIAS
@group(0) @binding(3) var<storage, read> tokens: array<vec4<u32>>;  // [n_tokens]: _, slot, _, _
@group(0) @binding(4) var<storage, read_write> ids: array<i32>;     // [n_tokens, top_k]
@group(0) @binding(5) var<storage, read_write> routed: array<f32>;  // [n_tokens, top_k]

override THREADS: u32 = 64u;  // at least top_k, n_group and n_experts / 4

fn logit_bits(token: u32, expert: u32) -> u32 {
    return logits[token * p.stride + expert];
}

fn bias_bits(expert: u32) -> u32 {
    return bias[expert];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.x + group.y * p.grid_x;
    if (token >= p.n_tokens) {
        return;
    }
    if (tokens[token].y == PADDING) {
        choose_none(token, lid);
        return;
    }
    choose(token, lid);
}
