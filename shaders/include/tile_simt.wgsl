// A tile in f32. Both operands pass through workgroup memory, transposed, 16 columns at a time.
//
// Every tile expects `weights`, `x` and a weight format in scope, a function `x_source(i)` that
// tells at which vec4 of x the tile's i-th activation row begins (NO_ROW: there is none), a
// constant GATED (only tile_coop.wgsl can), and a function `store(i, row, sum)` for four
// neighbouring weight rows of the tile.
#include "include/share_{share}.wgsl"
#include "include/tile_sums.wgsl"

alias x_vec = act4;
alias sum4 = vec4<f32>;

const TILE_COLS: u32 = 16u;
const PART: u32 = min(CHUNK, TILE_COLS);  // columns of a chunk that are staged together
const TOKENS4: u32 = 8u;  // the tile's, in vec4s

var<workgroup> x_tile: array<vec4<f32>, 128>;  // [TILE_COLS, TOKENS4]
var<workgroup> w_tile: array<vec4<f32>, 512>;  // [TILE_COLS, ROWS4]

// First of the tile's four tokens whose activations thread `lid` stages.
fn staged_token(lid: u32) -> u32 { return lid % TOKENS4 * 4u; }

fn load_x(source: u32, at: u32) -> vec4<f32> {
    if (source != NO_ROW) {
        return act_load(x[source + at]);
    }
    return vec4(0.0);
}

// Columns col4 * 4.. of activation rows that begin at the vec4s `sources`.
fn stage_x(sources: vec4<u32>, col4: u32, lid: u32) {
    let part = lid / TOKENS4;
    if (part < TILE_COLS / 4u) {
        let at = col4 + part;
        let t = transpose(mat4x4(load_x(sources.x, at), load_x(sources.y, at),
                                 load_x(sources.z, at), load_x(sources.w, at)));
        let to = part * 4u * TOKENS4 + lid % TOKENS4;
        x_tile[to] = t[0];
        x_tile[to + TOKENS4] = t[1];
        x_tile[to + 2u * TOKENS4] = t[2];
        x_tile[to + 3u * TOKENS4] = t[3];
    }
}

// Columns `col`.. of weight rows `first`..; rows past `last` + 4 are repeats of the last four. Of
// a chunk that is longer than the tile's columns, a part.
fn stage_weights(first: u32, last: u32, col: u32, lid: u32) {
    for (var i = lid; i < ROWS4 * (TILE_COLS / PART); i += THREADS) {
        let row = min(first + i % ROWS4 * 4u, last);
        let c = i / ROWS4;
        let chunk = col / CHUNK + c;
        let at = row * p.n_chunks + chunk * 4u;
        let w0 = weights[at];
        let w1 = weights[at + 1u];
        let w2 = weights[at + 2u];
        let w3 = weights[at + 3u];
        let scale = vec4(weight_scale(row, chunk), weight_scale(row + 1u, chunk),
                         weight_scale(row + 2u, chunk), weight_scale(row + 3u, chunk));
        for (var j = 0u; j < PART / 4u; j++) {
            let begin = col % CHUNK / 4u + j;
            let t = transpose(mat4x4(weight4(w0, begin), weight4(w1, begin),
                                     weight4(w2, begin), weight4(w3, begin)));
            let to = (c * PART + 4u * j) * ROWS4 + i % ROWS4;
            w_tile[to] = t[0] * scale;
            w_tile[to + ROWS4] = t[1] * scale;
            w_tile[to + 2u * ROWS4] = t[2] * scale;
            w_tile[to + 3u * ROWS4] = t[3] * scale;
        }
    }
}

// Products of the tile's tokens with weight rows first..first + 128, of which last + 3 is the last
// one that exists. All threads of the workgroup must call it together.
fn tile_product(first: u32, last: u32, lid: u32) -> Sums {
    let i = staged_token(lid);
    let sources = vec4(x_source(i), x_source(i + 1u), x_source(i + 2u), x_source(i + 3u));
    var s = Sums();
    for (var col = 0u; col < p.n_chunks * CHUNK; col += TILE_COLS) {
        stage_x(sources, col / 4u, lid);
        stage_weights(first, last, col, lid);
        workgroupBarrier();
        for (var k = 0u; k < TILE_COLS; k++) {
            let w = w_tile[k * ROWS4 + lid % ROWS4];
            let x = x_quads(k * TOKENS4 + lid / ROWS4, 2u, lid);
            s.s0 += x[0].x * w; s.s1 += x[0].y * w; s.s2 += x[0].z * w; s.s3 += x[0].w * w;
            s.s4 += x[1].x * w; s.s5 += x[1].y * w; s.s6 += x[1].z * w; s.s7 += x[1].w * w;
            if (WIDE) {
                s.s8 += x[2].x * w; s.s9 += x[2].y * w;
                s.s10 += x[2].z * w; s.s11 += x[2].w * w;
                s.s12 += x[3].x * w; s.s13 += x[3].y * w;
                s.s14 += x[3].z * w; s.s15 += x[3].w * w;
            }
        }
        workgroupBarrier();
    }
    return s;
}

fn store_sum(i: u32, row: u32, sum: sum4) { store(i, row, sum); }
