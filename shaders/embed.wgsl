// out[i] = row ids[i] - first_row of a table, unpacked. One workgroup per id; rows that are not in
// this part of the table are left as they are.
#include "format/{weight}.wgsl"

struct Params {
    n_ids: u32,
    first_row: u32,       // vocabulary id of the part's first row
    n_rows: u32,          // rows of this part
    n_chunks: u32,        // 16-byte chunks in a row
    scales_per_row: u32,
    stride4: u32,         // padded width of table and out, in vec4s
    grid_x: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;              // [n_ids]
@group(0) @binding(2) var<storage, read> sampled: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;    // [n_rows / 4, n_chunks, 4]
@group(0) @binding(4) var<storage, read> scales: array<f32>;           // [n_rows, scales_per_row]
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>;  // [n_ids, stride4]

const SAMPLED: u32 = 0x80000000u;  // bit of ids: an index into sampled
const LANES: u32 = 64u;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group.x + group.y * p.grid_x;
    if (i >= p.n_ids) {
        return;
    }
    var id = ids[i];
    if ((id & SAMPLED) != 0u) {
        id = sampled[id & ~SAMPLED] & ~SAMPLED;
    }
    let row = id - p.first_row;  // wraps for ids before the part
    if (row >= p.n_rows) {
        return;
    }
    for (var c = lid; c < p.stride4; c += LANES) {
        let chunk = c / (CHUNK / 4u);
        let at = (row / 4u * p.n_chunks + chunk) * 4u + row % 4u;
        let unpacked = weight4(weights[at], c % (CHUNK / 4u));
        out[i * p.stride4 + c] = unpacked * weight_scale(row, chunk);
    }
}
