// Products of few tokens with the matrices of their experts. A slot is one (token, expert) pair,
// token * top_k + j. A group of LANES threads computes four output features of one slot, or, if
// COMBINE, four of one token, or eight if PAIR.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "include/sum_{sum}.wgsl"
#include "format/{weight}.wgsl"
#include "include/dot_rows.wgsl"

struct Params {
    n_rows: u32,         // padded output features; half of an expert's weight rows unless COMBINE
    n_chunks: u32,       // 16-byte chunks in a weight row
    scales_per_row: u32,
    x_stride4: u32,      // row strides in vec4s
    out_stride4: u32,
    top_k: u32,
    first_expert: i32,   // global id of the bank's first expert
    n_experts: i32,      // in the bank
}

@group(0) @binding(0) var<uniform> p: Params;
// [experts, rows / 4, n_chunks, 4]
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;  // [n_experts, rows, scales_per_row]
@group(0) @binding(3) var<storage, read> x: array<act4>;      // [tokens or slots, x_stride4]
@group(0) @binding(4) var<storage, read> ids: array<i32>;     // [tokens, top_k], -1: skip
@group(0) @binding(5) var<storage, read> routed: array<f32>;  // [tokens, top_k] if COMBINE
@group(0) @binding(6) var<storage, read_write> out: array<out4>;  // [slots or tokens, out_stride4]

// out += weighted sum over slots, else silu(gate) * up per slot, which needs two sets. If SHARE is
// larger than LANES, groups of LANES threads share out the slots of a token instead of the rows.
override COMBINE: bool = false;
override PAIR: bool = false;  // eight output features if COMBINE: the second set is the next four

fn activation(t: u32, row: u32, col4: u32) -> vec4<f32> {
    return act_load(x[row * p.x_stride4 + col4]);
}

// The slot's expert as an index into the bank, or -1 where it is elsewhere.
fn bank_expert(slot: u32) -> i32 {
    let expert = ids[slot] - p.first_expert;
    return select(-1, expert, expert >= 0 && expert < p.n_experts);
}

fn gated(slot: u32, row: u32, live: bool, lid: u32) {
    let expert = bank_expert(slot);
    if (expert < 0) {
        return;
    }
    let gate_row = u32(expert) * 2u * p.n_rows + row;
    dot_rows(gate_row, gate_row + p.n_rows, slot / p.top_k, 1u, lid % LANES);
    sum_dots(lid);
    if (live && lid % SHARE == 0u) {
        let gate = dots_of(0u, 0u, lid);
        let up = dots_of(0u, 1u, lid);
        out[slot * p.out_stride4 + row / 4u] = out_store(gate / (1.0 + exp(-gate)) * up);
    }
}

fn combine(token: u32, row: u32, live: bool, lid: u32) {
    // What is added to is read first, so that nothing waits for it in the end.
    let at = token * p.out_stride4 + row / 4u;
    var sum = vec4(0.0);
    var next = vec4(0.0);  // of the next four rows
    if (live && lid % SHARE == 0u) {
        sum = out_load(out[at]);
        if (PAIR) {
            next = out_load(out[at + 1u]);
        }
    }
    let first = token * p.top_k + lid % SHARE / LANES;
    for (var slot = first; slot < (token + 1u) * p.top_k; slot += SHARE / LANES) {
        let expert = bank_expert(slot);
        if (expert >= 0) {
            let expert_row = u32(expert) * p.n_rows + row;
            dot_rows(expert_row, expert_row + 4u, slot, 1u, lid % LANES);
            sum += routed[slot] * dots[0];
            if (PAIR) {
                next += routed[slot] * dots[1];
            }
        }
    }
    dots[0] = sum;
    if (PAIR) {
        dots[1] = next;
    }
    sum_dots(lid);
    if (live && lid % SHARE == 0u) {
        out[at] = out_store(dots_of(0u, 0u, lid));
        if (PAIR) {
            out[at + 1u] = out_store(dots_of(0u, 1u, lid));
        }
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = (group.x * (THREADS / SHARE) + lid / SHARE) * select(4u, 8u, PAIR);
    let live = row < p.n_rows;
    let read_row = select(0u, row, live);
    if (COMBINE) {
        combine(group.y, read_row, live, lid);
    } else {
        gated(group.y, read_row, live, lid);
    }
}
