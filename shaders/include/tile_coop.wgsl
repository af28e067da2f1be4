// A tile of TILE_TOKENS activation rows times TILE_ROWS weight rows by four subgroups of 32
// threads, in cooperative matrices of EDGE x EDGE: f16 operands, f32 sums. Both operands pass
// through workgroup memory STEP columns at a time; the next ones are in registers meanwhile.
// Weights are widened to f16 on the way, those in f32 split into two f16 that add up to 22 bits;
// scales of whole rows are applied to the sums. Interface as in tile_simt.wgsl.
//
// If GATED, half of the tile's weight rows are gates and the other half the ups of the same
// features, and `store` gets silu(gate) * up: a tile has TILE_ROWS / 2 features.
//
// Matrices and prefetched vectors are written out one by one: drivers keep indexed arrays of them,
// and private variables, in memory. Conditions on constants vanish. If the second half of the
// tokens is padding, a loop of its own leaves it out; branches within a step cost more than they
// save. The loop over k is one on purpose: without it NVIDIA's compiler moves the loads of the next
// step behind the products.
enable f16;
#include "include/edge_{edge}.wgsl"
#include "include/coop_{coop}.wgsl"

alias x_vec = vec4<u32>;  // eight f16

const THREADS: u32 = 128u;
const NO_ROW: u32 = 0xffffffffu;
// Columns of a row of matrices as a subgroup stores it, and its gates.
const SUM_COLS: u32 = FN * EDGE;
const HALF: u32 = SUM_COLS / 2u;
const TILE_ROWS: u32 = 4u / SG_M * SUM_COLS;

// Columns at a time: in groups of eight, and chunks of packed weights in a row.
const STEP8: u32 = min(STEP, CHUNK * 8u) / 8u;
const STEP_CHUNKS: u32 = STEP8 * 8u / CHUNK;
// Steps that are loaded together. More bytes are under way with two, but beside the sums of large
// tiles, or scales of groups, there are no registers for them.
// What follows the last step is loaded in vain: with a branch, loads would not overlap products.
fn ahead() -> u32 {
    if (TILE_TOKENS <= 64u && scale_is_per_row()) {
        return 2u;
    }
    return 1u;
}
// From row to row in vec4s. With an odd number of groups eight rows lie in different memory banks.
const STRIDE: u32 = 2u * STEP8 + 2u;
// Rows that all threads load together, and loads per thread and step.
const X_ROWS: u32 = THREADS / STEP8;
const W_ROWS: u32 = THREADS / STEP_CHUNKS;
const X_LOADS: u32 = (TILE_TOKENS + X_ROWS - 1u) / X_ROWS;
const W_LOADS: u32 = TILE_ROWS / W_ROWS;
// Tokens between two matrices of tokens of a subgroup.
const M_STEP: u32 = SG_M * EDGE;
// Vec4s of a row of a matrix, and from row to row of two side by side as a subgroup stores them.
const QUADS: u32 = EDGE / 4u;
const SUM_STRIDE: u32 = 2u * QUADS + 1u;
// Scales of groups are multiplied by it, or f16 would lose bits of small ones; sums divided.
const GROUP_SCALE: f32 = 256.0;

// Rows of x, of weights, of what rounding them to f16 has left if they are f32.
const W_TILE: u32 = TILE_TOKENS * STRIDE;
const REST: u32 = TILE_ROWS * STRIDE;
const STAGED: u32 = W_TILE + REST * (1u + 4u / CHUNK);
// One subgroup's at a time: what a workgroup takes decides how many a processor holds. [EDGE]
const SUMS: u32 = EDGE * SUM_STRIDE;
// Scales of whole rows, read long before they are needed. [TILE_ROWS]
var<workgroup> row_scales: array<f32, TILE_ROWS>;
var<workgroup> halved: u32;  // whether the second half of the tokens is padding

// Neighbouring threads take neighbouring rows: their stores go to different banks.
fn x_row(i: u32, lid: u32) -> u32 { return lid % 8u + lid / (8u * STEP8) * 8u + i * X_ROWS; }
fn x_col(lid: u32) -> u32 { return lid / 8u % STEP8; }
fn w_row(i: u32, lid: u32) -> u32 { return lid % 8u + lid / (8u * STEP_CHUNKS) * 8u + i * W_ROWS; }
fn w_col(lid: u32) -> u32 { return lid / 8u % STEP_CHUNKS; }

// The thread's i-th row of x, in groups. Rows of padding read the first row, without a branch;
// their sums are not stored.
fn x_start(i: u32, lid: u32) -> u32 {
    let row = x_row(i, lid);
    var source = NO_ROW;
    if (i < X_LOADS && row < TILE_TOKENS) {
        source = x_source(row);
    }
    return select(source / 2u, 0u, source == NO_ROW);
}

// The weight row that the tile's row `row` is, past the last one of its kind a repeat of it.
fn weight_row(row: u32, first: u32, last: u32) -> u32 {
    if (GATED) {
        let feature = min(first + row / SUM_COLS * HALF + row % HALF, last + 3u);
        return feature + select(0u, p.n_rows / 2u, row % SUM_COLS >= HALF);
    }
    return min(first + row, last + 3u);
}

fn w_start(i: u32, first: u32, last: u32, lid: u32) -> u32 {
    return weight_row(w_row(i, lid), first, last);
}

// Column of the thread's group of eight; past the end of a row the last one.
fn x_group(chunk: u32, lid: u32) -> u32 { return chunk * CHUNK / 8u + x_col(lid); }

fn load_x(i: u32, at: u32, chunk: u32, lid: u32) -> vec4<u32> {
    if (i < X_LOADS) {
        return x[at + min(x_group(chunk, lid), p.n_chunks * CHUNK / 8u - 1u)];
    }
    return vec4(0u);
}

fn load_w(i: u32, row: u32, chunk: u32, lid: u32) -> vec4<u32> {
    if (i < W_LOADS) {
        let at = min(chunk + w_col(lid), p.n_chunks - 1u);
        return weights[(row / 4u * p.n_chunks + at) * 4u + row % 4u];
    }
    return vec4(0u);
}

// What follows a row counts as zero. Looking at a load any earlier would mean waiting for it.
fn stage_x(i: u32, v: vec4<u32>, chunk: u32, lid: u32) {
    let row = x_row(i, lid);
    if (i < X_LOADS && (TILE_TOKENS % X_ROWS == 0u || row < TILE_TOKENS)) {
        let to = row * STRIDE + 2u * x_col(lid);
        var halves = v;
        if (x_group(chunk, lid) >= p.n_chunks * CHUNK / 8u) {
            halves = vec4(0u);
        }
        stage4(to, x_order(halves.xy));
        stage4(to + 1u, x_order(halves.zw));
    }
}

// Four activations, in the order in which int_halves has weights.
fn x_order(halves: vec2<u32>) -> vec4<f16> {
    let v = vec4<f16>(vec4(unpack2x16float(halves.x), unpack2x16float(halves.y)));
    if (CHUNK >= 16u) {
        return v.xzyw;
    }
    return v;
}

// Four integers as f16, of columns 0, 2, 1, 3, as weight4 makes them.
fn int_halves(chunk: vec4<u32>, i: u32) -> vec4<f16> {
    var q = chunk[i % 4u];
    var mask = 0x00ff00ffu;
    var zero = 0x64806480u;
    if (CHUNK == 32u) {
        q = chunk[i / 2u] >> (i % 2u * 4u);
        mask = 0x000f000fu;
        zero = 0x64086408u;
    }
    mask += p.n_chunks >> 31u;
    let even = unpack2x16float((q & mask) ^ zero);
    let odd = unpack2x16float(((q >> 8u) & mask) ^ zero);
    return vec4<f16>(vec4(even, odd)) - vec2<f16>(unpack2x16float(zero)).x;
}

// Scales of groups are rounded to f16, which is little beside the rounding of integers.
fn weight_halves(chunk: vec4<u32>, i: u32, scale: f32) -> vec4<f16> {
    if (CHUNK < 16u) {
        return vec4<f16>(weight4(chunk, i));
    }
    if (scale_is_per_row()) {
        return int_halves(chunk, i);
    }
    return int_halves(chunk, i) * f16(scale);
}

fn stage_w(i: u32, v: vec4<u32>, row: u32, chunk: u32, lid: u32) {
    if (i < W_LOADS) {
        let to = W_TILE + w_row(i, lid) * STRIDE + w_col(lid) * (CHUNK / 4u);
        var scale = 1.0;
        if (!scale_is_per_row()) {
            scale = GROUP_SCALE * weight_scale(row, min(chunk + w_col(lid), p.n_chunks - 1u));
        }
        stage4(to, weight_halves(v, 0u, scale));
        if (CHUNK == 4u) {
            let w = weight4(v, 0u);
            stage4(to + REST, vec4<f16>(w - vec4<f32>(vec4<f16>(w))));
        }
        if (CHUNK > 4u) {
            stage4(to + 1u, weight_halves(v, 1u, scale));
        }
        if (CHUNK > 8u) {
            stage4(to + 2u, weight_halves(v, 2u, scale));
            stage4(to + 3u, weight_halves(v, 3u, scale));
        }
        if (CHUNK > 16u) {
            stage4(to + 4u, weight_halves(v, 4u, scale));
            stage4(to + 5u, weight_halves(v, 5u, scale));
            stage4(to + 6u, weight_halves(v, 6u, scale));
            stage4(to + 7u, weight_halves(v, 7u, scale));
        }
    }
}

// Passes two matrices of each subgroup's sums to `store`: tokens and features that begin `token`
// and `feature` after the subgroup's first; if GATED, the gates and the ups of EDGE features.
fn store_pair(m0: MatrixSum, m1: MatrixSum, token: u32, feature: u32, lid: u32) {
    for (var subgroup = 0u; subgroup < THREADS / 32u; subgroup++) {
        if (lid / 32u == subgroup) {
            put(m0, 0u, lid);
            put(m1, QUADS, lid);
        }
        workgroupBarrier();
        let sg_token = subgroup % SG_M * EDGE + token;
        if (GATED && lid < EDGE * QUADS) {
            let at = lid / QUADS * SUM_STRIDE + lid % QUADS;
            let row = subgroup / SG_M * SUM_COLS + feature + lid % QUADS * 4u;
            let gate = sums4(at) * scales_of(row);
            let up = sums4(at + QUADS) * scales_of(row + HALF);
            let y = gate / (1.0 + exp(-gate)) * up;
            let first = subgroup / SG_M * HALF + feature;
            store(sg_token + lid / QUADS, first + lid % QUADS * 4u, y);
        } else if (!GATED && lid < EDGE * 2u * QUADS) {
            let row = subgroup / SG_M * SUM_COLS + feature + lid % (2u * QUADS) * 4u;
            let sum = sums4(lid / (2u * QUADS) * SUM_STRIDE + lid % (2u * QUADS));
            store(sg_token + lid / (2u * QUADS), row, sum * scales_of(row));
        }
        workgroupBarrier();
    }
}

// Passes a row of matrices to `store`, tokens that begin `token` after the subgroup's first.
fn store_row(m0: MatrixSum, m1: MatrixSum, m2: MatrixSum, m3: MatrixSum, token: u32, lid: u32) {
    if (GATED && FN > 2u) {
        store_pair(m0, m2, token, 0u, lid);
        store_pair(m1, m3, token, EDGE, lid);
    } else {
        store_pair(m0, m1, token, 0u, lid);
        if (FN > 2u) {
            store_pair(m2, m3, token, 2u * EDGE, lid);
        }
    }
}

// Scales of four of the tile's rows that still have to be applied to their sums.
fn scales_of(row: u32) -> vec4<f32> {
    if (scale_is_per_row()) {
        return vec4(row_scales[row], row_scales[row + 1u], row_scales[row + 2u],
                    row_scales[row + 3u]);
    }
    return vec4(1.0 / GROUP_SCALE);
}

// Where a thread's rows of activations begin, and its weight rows.
struct Places {
    x0: u32, x1: u32, x2: u32, x3: u32,
    w0: u32, w1: u32, w2: u32, w3: u32, w4: u32, w5: u32, w6: u32, w7: u32,
}

fn places(first: u32, last: u32, lid: u32) -> Places {
    return Places(
        x_start(0u, lid), x_start(1u, lid), x_start(2u, lid), x_start(3u, lid),
        w_start(0u, first, last, lid), w_start(1u, first, last, lid),
        w_start(2u, first, last, lid), w_start(3u, first, last, lid),
        w_start(4u, first, last, lid), w_start(5u, first, last, lid),
        w_start(6u, first, last, lid), w_start(7u, first, last, lid),
    );
}

// What a thread reads for a step.
struct Loads {
    x0: vec4<u32>, x1: vec4<u32>, x2: vec4<u32>, x3: vec4<u32>,
    w0: vec4<u32>, w1: vec4<u32>, w2: vec4<u32>, w3: vec4<u32>,
    w4: vec4<u32>, w5: vec4<u32>, w6: vec4<u32>, w7: vec4<u32>,
}

fn load(at: Places, chunk: u32, lid: u32) -> Loads {
    return Loads(
        load_x(0u, at.x0, chunk, lid), load_x(1u, at.x1, chunk, lid),
        load_x(2u, at.x2, chunk, lid), load_x(3u, at.x3, chunk, lid),
        load_w(0u, at.w0, chunk, lid), load_w(1u, at.w1, chunk, lid),
        load_w(2u, at.w2, chunk, lid), load_w(3u, at.w3, chunk, lid),
        load_w(4u, at.w4, chunk, lid), load_w(5u, at.w5, chunk, lid),
        load_w(6u, at.w6, chunk, lid), load_w(7u, at.w7, chunk, lid),
    );
}

fn stage(v: Loads, at: Places, chunk: u32, lid: u32) {
    stage_x(0u, v.x0, chunk, lid);
    stage_x(1u, v.x1, chunk, lid);
    stage_x(2u, v.x2, chunk, lid);
    stage_x(3u, v.x3, chunk, lid);
    stage_w(0u, v.w0, at.w0, chunk, lid);
    stage_w(1u, v.w1, at.w1, chunk, lid);
    stage_w(2u, v.w2, at.w2, chunk, lid);
    stage_w(3u, v.w3, at.w3, chunk, lid);
    stage_w(4u, v.w4, at.w4, chunk, lid);
    stage_w(5u, v.w5, at.w5, chunk, lid);
    stage_w(6u, v.w6, at.w6, chunk, lid);
    stage_w(7u, v.w7, at.w7, chunk, lid);
}

// Matrices of columns in a step, those of what rounding f32 has left included.
const X_STEPS: u32 = 8u * STEP8 / EDGE;
const K_STEPS: u32 = X_STEPS * (1u + 4u / CHUNK);
fn x_place(k: u32) -> u32 { return k % X_STEPS * QUADS; }
fn w_place(k: u32) -> u32 { return k % X_STEPS * QUADS + k / X_STEPS * REST; }

// A subgroup's sums, FM x FN of them.
struct Sums {
    c00: MatrixSum, c01: MatrixSum, c02: MatrixSum, c03: MatrixSum,
    c10: MatrixSum, c11: MatrixSum, c12: MatrixSum, c13: MatrixSum,
    c20: MatrixSum, c21: MatrixSum, c22: MatrixSum, c23: MatrixSum,
    c30: MatrixSum, c31: MatrixSum, c32: MatrixSum, c33: MatrixSum,
}

// Adds the products of what is staged.
fn multiply(s: ptr<function, Sums>, x_at: u32, w_at: u32, lid: u32) {
    for (var k = 0u; k < K_STEPS; k++) {
        let w_to = w_at + w_place(k);
        let x_to = x_at + x_place(k);
        let b0 = w_matrix(w_to);
        let b1 = w_matrix(w_to + EDGE * STRIDE);
        var b2: MatrixW;
        var b3: MatrixW;
        if (FN > 2u) {
            b2 = w_matrix(w_to + 2u * EDGE * STRIDE);
            b3 = w_matrix(w_to + 3u * EDGE * STRIDE);
        }
        {
            let a = x_matrix(x_to, lid);
            (*s).c00 = coopMultiplyAdd(a, b0, (*s).c00);
            (*s).c01 = coopMultiplyAdd(a, b1, (*s).c01);
            if (FN > 2u) {
                (*s).c02 = coopMultiplyAdd(a, b2, (*s).c02);
                (*s).c03 = coopMultiplyAdd(a, b3, (*s).c03);
            }
        }
        if (FM > 1u) {
            let a = x_matrix(x_to + M_STEP * STRIDE, lid);
            (*s).c10 = coopMultiplyAdd(a, b0, (*s).c10);
            (*s).c11 = coopMultiplyAdd(a, b1, (*s).c11);
            if (FN > 2u) {
                (*s).c12 = coopMultiplyAdd(a, b2, (*s).c12);
                (*s).c13 = coopMultiplyAdd(a, b3, (*s).c13);
            }
        }
        if (FM > 2u) {
            let a = x_matrix(x_to + 2u * M_STEP * STRIDE, lid);
            (*s).c20 = coopMultiplyAdd(a, b0, (*s).c20);
            (*s).c21 = coopMultiplyAdd(a, b1, (*s).c21);
            if (FN > 2u) {
                (*s).c22 = coopMultiplyAdd(a, b2, (*s).c22);
                (*s).c23 = coopMultiplyAdd(a, b3, (*s).c23);
            }
        }
        if (FM > 3u) {
            let a = x_matrix(x_to + 3u * M_STEP * STRIDE, lid);
            (*s).c30 = coopMultiplyAdd(a, b0, (*s).c30);
            (*s).c31 = coopMultiplyAdd(a, b1, (*s).c31);
            if (FN > 2u) {
                (*s).c32 = coopMultiplyAdd(a, b2, (*s).c32);
                (*s).c33 = coopMultiplyAdd(a, b3, (*s).c33);
            }
        }
    }
}

// The same for the first half of the tokens.
fn multiply_half(s: ptr<function, Sums>, x_at: u32, w_at: u32, lid: u32) {
    for (var k = 0u; k < K_STEPS; k++) {
        let w_to = w_at + w_place(k);
        let x_to = x_at + x_place(k);
        let b0 = w_matrix(w_to);
        let b1 = w_matrix(w_to + EDGE * STRIDE);
        var b2: MatrixW;
        var b3: MatrixW;
        if (FN > 2u) {
            b2 = w_matrix(w_to + 2u * EDGE * STRIDE);
            b3 = w_matrix(w_to + 3u * EDGE * STRIDE);
        }
        {
            let a = x_matrix(x_to, lid);
            (*s).c00 = coopMultiplyAdd(a, b0, (*s).c00);
            (*s).c01 = coopMultiplyAdd(a, b1, (*s).c01);
            if (FN > 2u) {
                (*s).c02 = coopMultiplyAdd(a, b2, (*s).c02);
                (*s).c03 = coopMultiplyAdd(a, b3, (*s).c03);
            }
        }
        if (FM > 2u) {
            let a = x_matrix(x_to + M_STEP * STRIDE, lid);
            (*s).c10 = coopMultiplyAdd(a, b0, (*s).c10);
            (*s).c11 = coopMultiplyAdd(a, b1, (*s).c11);
            if (FN > 2u) {
                (*s).c12 = coopMultiplyAdd(a, b2, (*s).c12);
                (*s).c13 = coopMultiplyAdd(a, b3, (*s).c13);
            }
        }
    }
}

// Multiplies, and passes the sums to `store`. All threads of the workgroup must call it together.
fn tile(first: u32, last: u32, lid: u32) {
    let subgroup = lid / 32u;
    // Subgroups that share rows take every SG_M-th matrix of tokens.
    let x_at = subgroup % SG_M * EDGE * STRIDE;
    let w_at = W_TILE + subgroup / SG_M * SUM_COLS * STRIDE;
    let at = places(first, last, lid);
    var next = load(at, 0u, lid);
    var after: Loads;
    if (ahead() > 1u) {
        after = load(at, STEP_CHUNKS, lid);
    }
    if (scale_is_per_row()) {
        row_scales[lid] = weight_scale(weight_row(lid, first, last), 0u);
    }
    var s: Sums;
    if (lid == 0u) {
        halved = u32(FM > 1u && x_source(TILE_TOKENS / 2u) == NO_ROW);
    }
    let whole = workgroupUniformLoad(&halved) == 0u;
    if (whole) {
        for (var chunk = 0u; chunk < p.n_chunks; chunk += ahead() * STEP_CHUNKS) {
            stage(next, at, chunk, lid);
            workgroupBarrier();
            let second = after;
            next = load(at, chunk + ahead() * STEP_CHUNKS, lid);
            if (ahead() > 1u) {
                after = load(at, chunk + 3u * STEP_CHUNKS, lid);
            }
            multiply(&s, x_at, w_at, lid);
            workgroupBarrier();
            if (ahead() > 1u) {
                stage(second, at, chunk + STEP_CHUNKS, lid);
                workgroupBarrier();
                multiply(&s, x_at, w_at, lid);
                workgroupBarrier();
            }
        }
    } else {
        for (var chunk = 0u; chunk < p.n_chunks; chunk += ahead() * STEP_CHUNKS) {
            stage(next, at, chunk, lid);
            workgroupBarrier();
            let second = after;
            next = load(at, chunk + ahead() * STEP_CHUNKS, lid);
            if (ahead() > 1u) {
                after = load(at, chunk + 3u * STEP_CHUNKS, lid);
            }
            multiply_half(&s, x_at, w_at, lid);
            workgroupBarrier();
            if (ahead() > 1u) {
                stage(second, at, chunk + STEP_CHUNKS, lid);
                workgroupBarrier();
                multiply_half(&s, x_at, w_at, lid);
                workgroupBarrier();
            }
        }
    }
    store_row(s.c00, s.c01, s.c02, s.c03, 0u, lid);
    if ((FM > 1u) & (whole | (FM > 2u))) {
        store_row(s.c10, s.c11, s.c12, s.c13, M_STEP, lid);
    }
    if ((FM > 2u) & whole) {
        store_row(s.c20, s.c21, s.c22, s.c23, 2u * M_STEP, lid);
    }
    if ((FM > 3u) & whole) {
        store_row(s.c30, s.c31, s.c32, s.c33, 3u * M_STEP, lid);
    }
}
