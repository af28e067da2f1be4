// A tile in integers: activations and weights in int8 with a scale per row, both through workgroup
// memory as they are packed, 32 columns at a time. Four columns are one instruction where adapters
// have it (dot4I8Packed), sums are i32, which rows below 130,000 columns cannot overflow, and the
// scales of both rows come last. Expects what tile_simt.wgsl does.
#include "include/tile_sums.wgsl"

alias x_vec = act16;
alias sum4 = vec4<i32>;

const TILE_CHUNKS: u32 = 2u;  // of 16 columns

var<workgroup> x_tile: array<act16, 64>;        // [TILE_CHUNKS, TILE_TOKENS]
var<workgroup> w_tile: array<act16, 256>;       // [TILE_CHUNKS, 4 neighbouring rows, ROWS4]
var<workgroup> x_scales: array<f32, 32>;        // [TILE_TOKENS]
var<workgroup> w_scales: array<vec4<f32>, 32>;  // [ROWS4]

// Sums of a token's columns with those of four weight rows.
fn dots(sum: sum4, x: act16, w: array<act16, 4>) -> sum4 {
    return vec4(act_dot(sum.x, x, w[0]), act_dot(sum.y, x, w[1]),
                act_dot(sum.z, x, w[2]), act_dot(sum.w, x, w[3]));
}

// Products of the tile's tokens with weight rows first..first + 128, of which last + 3 is the last
// one that exists. All threads of the workgroup must call it together.
fn tile_product(first: u32, last: u32, lid: u32) -> Sums {
    // Stages this chunk of each step for one token and for four weight rows.
    let part = lid / ROWS4;
    let source = x_source(lid % TILE_TOKENS);
    // Where there is no row, the first, whose sums nobody stores.
    let x_at = select(source, 0u, source == NO_ROW);
    let row = min(first + tile_row(lid), last);
    let to = part * 4u * ROWS4 + lid % ROWS4;
    if (part == 0u) {
        x_scales[lid] = act_scale(x[x_at + p.n_chunks]);
        w_scales[lid] = vec4(weight_scale(row, 0u), weight_scale(row + 1u, 0u),
                             weight_scale(row + 2u, 0u), weight_scale(row + 3u, 0u));
    }
    let token = tile_token(lid);
    var s = Sums();
    for (var chunk = 0u; chunk < p.n_chunks; chunk += TILE_CHUNKS) {
        let w_at = row * p.n_chunks + (chunk + part) * 4u;
        x_tile[lid] = x[x_at + chunk + part];
        w_tile[to] = weights[w_at];
        w_tile[to + ROWS4] = weights[w_at + 1u];
        w_tile[to + 2u * ROWS4] = weights[w_at + 2u];
        w_tile[to + 3u * ROWS4] = weights[w_at + 3u];
        workgroupBarrier();
        for (var c = 0u; c < TILE_CHUNKS; c++) {
            let at = c * 4u * ROWS4 + lid % ROWS4;
            let w = array(w_tile[at], w_tile[at + ROWS4],
                          w_tile[at + 2u * ROWS4], w_tile[at + 3u * ROWS4]);
            let t = c * TILE_TOKENS + token;
            s.s0 = dots(s.s0, x_tile[t], w); s.s1 = dots(s.s1, x_tile[t + 1u], w);
            s.s2 = dots(s.s2, x_tile[t + 2u], w); s.s3 = dots(s.s3, x_tile[t + 3u], w);
            s.s4 = dots(s.s4, x_tile[t + 8u], w); s.s5 = dots(s.s5, x_tile[t + 9u], w);
            s.s6 = dots(s.s6, x_tile[t + 10u], w); s.s7 = dots(s.s7, x_tile[t + 11u], w);
            if (WIDE) {
                s.s8 = dots(s.s8, x_tile[t + 16u], w); s.s9 = dots(s.s9, x_tile[t + 17u], w);
                s.s10 = dots(s.s10, x_tile[t + 18u], w); s.s11 = dots(s.s11, x_tile[t + 19u], w);
                s.s12 = dots(s.s12, x_tile[t + 24u], w); s.s13 = dots(s.s13, x_tile[t + 25u], w);
                s.s14 = dots(s.s14, x_tile[t + 26u], w); s.s15 = dots(s.s15, x_tile[t + 27u], w);
            }
        }
        workgroupBarrier();
    }
    return s;
}

fn store_sum(i: u32, row: u32, sum: sum4) {
    store(i, row, vec4<f32>(sum) * (x_scales[i] * w_scales[row / 4u]));
}
