// Products of many tokens with the matrices of their experts, in tiles. Tokens come
// sorted by expert in blocks (align_experts); a workgroup takes one block and some features.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "format/{weight}.wgsl"
#include "include/tile_{tile}.wgsl"
#include "include/bands.wgsl"

struct Params {
    n_rows: u32,         // padded output features of an expert
    n_chunks: u32,       // 16-byte chunks in a weight row
    scales_per_row: u32,
    x_stride4: u32,      // row strides in vec4s
    out_stride4: u32,
    n_slots: u32,        // tokens * top_k; slots from here on are padding
    divide: u32,         // slots that share a row of x
    block_size: u32,
    first_expert: i32,   // global id of the bank's first expert
    n_experts: i32,      // in the bank
}

@group(0) @binding(0) var<uniform> p: Params;
// [experts, rows / 4, n_chunks, 4]
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;  // [n_experts, n_rows, scales_per_row]
@group(0) @binding(3) var<storage, read> x: array<x_vec>;     // [n_slots / divide, x_stride4]
@group(0) @binding(4) var<storage, read> sorted_token_ids: array<u32>;     // [max_pad] slots
@group(0) @binding(5) var<storage, read> expert_ids: array<i32>;           // [blocks], -1: skip
@group(0) @binding(6) var<storage, read> num_tokens_post_pad: array<u32>;  // [1]
@group(0) @binding(7) var<storage, read> routed: array<f32>;               // [n_slots] if ROUTED
@group(0) @binding(8) var<storage, read_write> out: array<out4>;           // [n_slots, out_stride4]

override ROUTED: bool = false;  // multiply by the routed weights
// Rows of an expert are gates, then ups; store silu(gate) * up. Not every tile can.
override GATED: bool = false;

// The launch is for blocks of the bank's experts only, wherever they begin.
override FIND: bool = false;

var<private> first_position: u32;
var<private> first_row: u32;
var<private> n_out: u32;  // features of the output

fn x_source(i: u32) -> u32 {
    if (i >= p.block_size) {
        return NO_ROW;
    }
    let slot = sorted_token_ids[first_position + i];
    return select(NO_ROW, slot / p.divide * p.x_stride4, slot < p.n_slots);
}

fn store(i: u32, tile_row: u32, sum: vec4<f32>) {
    let slot = sorted_token_ids[first_position + i];
    let row = first_row + tile_row;
    if (slot >= p.n_slots || row >= n_out) {
        return;
    }
    var y = sum;
    if (ROUTED) {
        y *= routed[slot];
    }
    out[slot * p.out_stride4 + row / 4u] = out_store(y);
}

// Blocks before those of the bank: expert_ids ascend.
fn first_block() -> u32 {
    var low = 0u;
    var high = num_tokens_post_pad[0] / p.block_size;
    while (low < high) {
        let middle = (low + high) / 2u;
        if (expert_ids[middle] < p.first_expert) {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return low;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) lid: u32) {
    let place = banded(group, grid);
    var block = place.y;
    if (FIND) {
        block += first_block();
    }
    // Compared as a local: browsers hold no private variable for uniform, as barriers need it.
    let position = block * p.block_size;
    if (position >= num_tokens_post_pad[0]) {
        return;
    }
    first_position = position;
    let expert = expert_ids[block] - p.first_expert;
    if (expert < 0 || expert >= p.n_experts) {
        return;
    }
    let bank_row = u32(expert) * p.n_rows;
    n_out = p.n_rows;
    var tile_rows = TILE_ROWS;
    if (GATED) {
        n_out /= 2u;
        tile_rows /= 2u;
    }
    first_row = place.x * tile_rows;
    tile(bank_row + first_row, bank_row + n_out - 4u, lid);
}
