// Rows of activations rounded to int8, each with a scale of its own: scale = max |x| / 127,
// q = round(x / scale). One workgroup per row; the row is read twice, the second time from cache.
#include "include/act_{act}.wgsl"
requires packed_4x8_integer_dot_product;

struct Params {
    n_rows: u32,
    cols4: u32,      // columns of out in vec4s, which x has twice if GATED
    x_stride4: u32,
    grid_x: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<act4>;         // [n_rows, x_stride4]
// Four int8 a word, then the scale's bits and three words without meaning: [n_rows, cols4 + 4]
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

override THREADS: u32 = 128u;
// Rows of x are gates, then ups; silu(gate) * up is rounded.
override GATED: bool = false;

// As bits, which order absolute values and put NaN above all.
var<workgroup> largest: atomic<u32>;

// Below, a row counts as zero: bits of 2^-100, whose inverse is still finite.
const TINY: u32 = 0x0d800000u;
const INFINITE: u32 = 0x7f800000u;

fn value(row: u32, col4: u32) -> vec4<f32> {
    let at = row * p.x_stride4 + col4;
    let v = act_load(x[at]);
    if (GATED) {
        return v / (1.0 + exp(-v)) * act_load(x[at + p.cols4]);
    }
    return v;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = group.x + group.y * p.grid_x;
    if (row >= p.n_rows) {
        return;
    }
    if (lid == 0u) {
        atomicStore(&largest, 0u);
    }
    workgroupBarrier();
    var bits = vec4(0u);
    for (var i = lid; i < p.cols4; i += THREADS) {
        bits = max(bits, bitcast<vec4<u32>>(value(row, i)) & vec4(0x7fffffffu));
    }
    atomicMax(&largest, max(max(bits.x, bits.y), max(bits.z, bits.w)));
    workgroupBarrier();
    let most = atomicLoad(&largest);
    let scale = bitcast<f32>(most) * (1.0 / 127.0);
    // Times a power of two that brings the largest to 1 to 4: adapters divide by inverting, and the
    // inverse of the largest numbers would be zero.
    let small = bitcast<f32>((254u - min(most >> 23u, 253u)) << 23u);
    let inverse = 127.0 / (bitcast<f32>(most) * small);
    let finite = most >= TINY && most < INFINITE;
    let base = row * (p.cols4 + 4u);
    for (var i = lid; i < p.cols4; i += THREADS) {
        let q = select(vec4(0), vec4<i32>(round(value(row, i) * small * inverse)), finite);
        out[base + i] = pack4xI8(q);
    }
    if (lid == 0u) {
        // Zero times that of a row which is not finite is not a number, nor are its sums.
        out[base + p.cols4] = bitcast<u32>(select(0.0, scale, most >= TINY));
    }
}
