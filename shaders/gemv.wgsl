// Products of one weight matrix with few rows of activations. A group of LANES threads computes
// four output features, or eight if PAIR, for TOKENS activation rows and reads each weight once.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "include/sum_{sum}.wgsl"
#include "format/{weight}.wgsl"
#include "include/dot_rows.wgsl"

struct Params {
    n_tokens: u32,
    n_rows: u32,         // padded output features; half of the weight rows if GATED
    n_chunks: u32,       // 16-byte chunks in a weight row
    scales_per_row: u32,
    x_stride4: u32,      // row strides in vec4s
    out_stride4: u32,
    out_col4: u32,       // first output column in vec4s
    grid_x: u32,
    norm_cols: u32,      // true width, over which the mean is taken, if NORM
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
// [n_rows (x2) / 4, n_chunks, 4]
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;         // [rows, scales_per_row]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;     // [n_rows / 4] if BIAS
@group(0) @binding(4) var<storage, read> x: array<act4>;             // [n_tokens, x_stride4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;     // [n_tokens, out_stride4]
@group(0) @binding(6) var<storage, read> gain: array<vec4<f32>>;     // [x_stride4] if NORM

override BIAS: bool = false;
override ADD: bool = false;    // out += product, else out = product
override GATED: bool = false;  // out = silu(first half) * second half; needs two sets
override PAIR: bool = false;   // the second set is the next four rows

// Normalised but for the factor of the whole row, which comes last.
fn activation(t: u32, row: u32, col4: u32) -> vec4<f32> {
    let v = act_load(x[row * p.x_stride4 + col4]);
    if (!NORM) {
        return v;
    }
    squares[t] += dot(v, v);
    return v * gain[col4];
}

fn biased(row: u32, sum: vec4<f32>) -> vec4<f32> {
    if (BIAS) {
        return sum + bias[row / 4u];
    }
    return sum;
}

fn store(token: u32, row: u32, value: vec4<f32>) {
    var y = value;
    let at = token * p.out_stride4 + p.out_col4 + row / 4u;
    if (ADD) {
        y += out_load(out[at]);
    }
    out[at] = out_store(y);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % LANES;
    let rows = select(4u, 8u, PAIR);
    let row = ((group.x + group.y * p.grid_x) * (THREADS / LANES) + lid / LANES) * rows;
    let live = row < p.n_rows;
    let read_row = select(0u, row, live);
    let token = group.z * TOKENS;
    let n_live = min(TOKENS, p.n_tokens - token);
    dot_rows(read_row, select(p.n_rows, 4u, PAIR) + read_row, token, n_live, lane);
    sum_dots(lid);
    for (var t = 0u; t < TOKENS; t++) {
        if (live && lane == t % LANES && t < n_live) {
            var scale = 1.0;
            if (NORM) {
                scale = inverseSqrt(squares_of(t, lid) / f32(p.norm_cols) + p.eps);
            }
            var y = biased(row, dots_of(t, 0u, lid) * scale);
            if (GATED) {
                y = y / (1.0 + exp(-y)) * (dots_of(t, 1u, lid) * scale);
            }
            store(token + t, row, y);
            if (PAIR) {
                store(token + t, row + 4u, biased(row + 4u, dots_of(t, 1u, lid) * scale));
            }
        }
    }
}
