// Products of one weight matrix with many rows of activations, in tiles.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "format/{weight}.wgsl"
#include "include/tile_{tile}.wgsl"
#include "include/bands.wgsl"

struct Params {
    n_tokens: u32,
    n_rows: u32,         // padded output features
    n_chunks: u32,       // 16-byte chunks in a weight row
    scales_per_row: u32,
    x_stride4: u32,      // row strides in vec4s
    out_stride4: u32,
    out_col4: u32,       // first output column in vec4s
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;  // [n_rows / 4, n_chunks, 4]
@group(0) @binding(2) var<storage, read> scales: array<f32>;         // [n_rows, scales_per_row]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;     // [n_rows / 4] if BIAS
@group(0) @binding(4) var<storage, read> x: array<x_vec>;            // [n_tokens, x_stride4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;     // [n_tokens, out_stride4]

override BIAS: bool = false;
override ADD: bool = false;  // out += product, else out = product
// Weight rows are gates, then ups; out = silu(gate) * up. Not every tile can.
override GATED: bool = false;

var<private> first_token: u32;
var<private> first_row: u32;
var<private> n_out: u32;  // features of the output

fn x_source(i: u32) -> u32 {
    let token = first_token + i;
    return select(NO_ROW, token * p.x_stride4, token < p.n_tokens);
}

fn store(i: u32, tile_row: u32, sum: vec4<f32>) {
    let token = first_token + i;
    let row = first_row + tile_row;
    if (token >= p.n_tokens || row >= n_out) {
        return;
    }
    var y = sum;
    if (BIAS) {
        y += bias[row / 4u];
    }
    let at = token * p.out_stride4 + p.out_col4 + row / 4u;
    if (ADD) {
        y += out_load(out[at]);
    }
    out[at] = out_store(y);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) lid: u32) {
    let place = banded(group, grid);
    n_out = p.n_rows;
    var tile_rows = TILE_ROWS;
    if (GATED) {
        n_out /= 2u;
        tile_rows /= 2u;
    }
    first_row = place.x * tile_rows;
    first_token = place.y * TILE_TOKENS;
    tile(first_row, n_out - 4u, lid);
}
