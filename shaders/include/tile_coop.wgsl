// A tile of TILE_TOKENS activation rows times TILE_ROWS weight rows by four subgroups of 32 threads,
// in cooperative matrices of 16 x 16: f16 operands, f32 sums. Both operands pass through workgroup
// memory STEP columns at a time; the next ones are in registers meanwhile. Weights are widened to
// f16 on the way; scales of whole rows are applied to the sums. Interface as in tile_simt.wgsl.
//
// If GATED, half of the tile's weight rows are gates and the other half the ups of the same
// features, and `store` gets silu(gate) * up: a tile has TILE_ROWS / 2 features.
//
// Matrices and prefetched vectors are written out one by one: drivers keep indexed arrays of them
// in memory. Conditions on constants vanish. Rows of padding are multiplied like others: branches
// around them cost more than they save.
enable f16;
enable wgpu_cooperative_matrix;
#include "include/coop_{coop}.wgsl"

alias MatrixX = coop_mat16x16<f16, A>;
alias MatrixW = coop_mat16x16<f16, B>;
alias MatrixSum = coop_mat16x16<f32, C>;
// Eight f16.
alias x_vec = vec4<u32>;

const THREADS: u32 = 128u;
const NO_ROW: u32 = 0xffffffffu;
// Columns of a row of matrices as a subgroup stores it, and its gates.
const SUM_COLS: u32 = FN * 16u;
const HALF: u32 = SUM_COLS / 2u;
const TILE_ROWS: u32 = 4u / SG_M * SUM_COLS;

// Columns at a time: 16-byte vectors of eight f16 in a row, chunks of packed weights in a row.
const STEP8: u32 = min(STEP, CHUNK * 8u) / 8u;
const STEP_CHUNKS: u32 = STEP8 * 8u / CHUNK;
// An odd number of vectors from row to row: eight rows then lie in different memory banks.
const STRIDE: u32 = STEP8 + 1u;
// Rows that all threads load together, and loads per thread and step.
const X_ROWS: u32 = THREADS / STEP8;
const W_ROWS: u32 = THREADS / STEP_CHUNKS;
const X_LOADS: u32 = (TILE_TOKENS + X_ROWS - 1u) / X_ROWS;
const W_LOADS: u32 = TILE_ROWS / W_ROWS;
// Tokens between two matrices of tokens of a subgroup.
const M_STEP: u32 = SG_M * 16u;
const SUM_STRIDE: u32 = SUM_COLS / 4u;

// First the bits of f16: [TILE_TOKENS + TILE_ROWS, STRIDE] rows of x and weights. Then f32 sums:
// [4 subgroups, 16 tokens, SUM_STRIDE].
const W_TILE: u32 = TILE_TOKENS * STRIDE;
var<workgroup> staged: array<vec4<f32>, max(W_TILE + TILE_ROWS * STRIDE, 64u * SUM_STRIDE)>;

// Where the thread's vectors of x and chunks of weights begin, and what it has prefetched.
var<private> x_at0: u32; var<private> x_at1: u32; var<private> x_at2: u32; var<private> x_at3: u32;
var<private> x0: vec4<u32>; var<private> x1: vec4<u32>;
var<private> x2: vec4<u32>; var<private> x3: vec4<u32>;
var<private> w_row0: u32; var<private> w_row1: u32; var<private> w_row2: u32; var<private> w_row3: u32;
var<private> w_row4: u32; var<private> w_row5: u32; var<private> w_row6: u32; var<private> w_row7: u32;
var<private> w0: vec4<u32>; var<private> w1: vec4<u32>;
var<private> w2: vec4<u32>; var<private> w3: vec4<u32>;
var<private> w4: vec4<u32>; var<private> w5: vec4<u32>;
var<private> w6: vec4<u32>; var<private> w7: vec4<u32>;

// The subgroup's sums: FM x FN matrices.
var<private> c00: MatrixSum; var<private> c01: MatrixSum;
var<private> c02: MatrixSum; var<private> c03: MatrixSum;
var<private> c10: MatrixSum; var<private> c11: MatrixSum;
var<private> c12: MatrixSum; var<private> c13: MatrixSum;
var<private> c20: MatrixSum; var<private> c21: MatrixSum;
var<private> c22: MatrixSum; var<private> c23: MatrixSum;
var<private> c30: MatrixSum; var<private> c31: MatrixSum;
var<private> c32: MatrixSum; var<private> c33: MatrixSum;

// Neighbouring threads take neighbouring rows: their stores go to different banks.
fn x_row(i: u32, lid: u32) -> u32 { return lid % 8u + lid / (8u * STEP8) * 8u + i * X_ROWS; }
fn x_col(lid: u32) -> u32 { return lid / 8u % STEP8; }
fn w_row(i: u32, lid: u32) -> u32 { return lid % 8u + lid / (8u * STEP_CHUNKS) * 8u + i * W_ROWS; }
fn w_col(lid: u32) -> u32 { return lid / 8u % STEP_CHUNKS; }

// The thread's i-th row of x, in vectors. Rows of padding read the first row, without a branch;
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

fn load_x(i: u32, at: u32, chunk: u32, lid: u32) -> vec4<u32> {
    if (i < X_LOADS) {
        let col = chunk * CHUNK / 8u + x_col(lid);
        if (STEP8 > 4u) {
            // The last step may be short: what follows counts as zero.
            let end = p.n_chunks * CHUNK / 8u;
            return select(vec4(0u), x[at + min(col, end - 1u)], col < end);
        }
        return x[at + col];
    }
    return vec4(0u);
}

fn load_w(i: u32, row: u32, chunk: u32, lid: u32) -> vec4<u32> {
    if (i < W_LOADS) {
        var at = chunk + w_col(lid);
        if (STEP8 > 4u) {
            at = min(at, p.n_chunks - 1u);
        }
        return weights[row * p.n_chunks + at];
    }
    return vec4(0u);
}

fn load_step(chunk: u32, lid: u32) {
    x0 = load_x(0u, x_at0, chunk, lid);
    x1 = load_x(1u, x_at1, chunk, lid);
    x2 = load_x(2u, x_at2, chunk, lid);
    x3 = load_x(3u, x_at3, chunk, lid);
    w0 = load_w(0u, w_row0, chunk, lid);
    w1 = load_w(1u, w_row1, chunk, lid);
    w2 = load_w(2u, w_row2, chunk, lid);
    w3 = load_w(3u, w_row3, chunk, lid);
    w4 = load_w(4u, w_row4, chunk, lid);
    w5 = load_w(5u, w_row5, chunk, lid);
    w6 = load_w(6u, w_row6, chunk, lid);
    w7 = load_w(7u, w_row7, chunk, lid);
}

fn stage_x(i: u32, v: vec4<u32>, lid: u32) {
    let row = x_row(i, lid);
    if (i < X_LOADS && (TILE_TOKENS % X_ROWS == 0u || row < TILE_TOKENS)) {
        staged[row * STRIDE + x_col(lid)] = bitcast<vec4<f32>>(v);
    }
}

fn halves(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4(pack2x16float(a.xy), pack2x16float(a.zw),
                                   pack2x16float(b.xy), pack2x16float(b.zw)));
}

fn stage_w(i: u32, v: vec4<u32>, row: u32, chunk: u32, lid: u32) {
    if (i < W_LOADS) {
        let to = W_TILE + w_row(i, lid) * STRIDE + w_col(lid) * (CHUNK / 8u);
        if (CHUNK == 8u) {
            staged[to] = bitcast<vec4<f32>>(v);
        } else {
            var scale = 1.0;
            if (!scale_is_per_row()) {
                scale = weight_scale(row, min(chunk + w_col(lid), p.n_chunks - 1u));
            }
            staged[to] = halves(weight4(v, 0u) * scale, weight4(v, 1u) * scale);
            staged[to + 1u] = halves(weight4(v, 2u) * scale, weight4(v, 3u) * scale);
        }
    }
}

fn stage_step(chunk: u32, lid: u32) {
    stage_x(0u, x0, lid);
    stage_x(1u, x1, lid);
    stage_x(2u, x2, lid);
    stage_x(3u, x3, lid);
    stage_w(0u, w0, w_row0, chunk, lid);
    stage_w(1u, w1, w_row1, chunk, lid);
    stage_w(2u, w2, w_row2, chunk, lid);
    stage_w(3u, w3, w_row3, chunk, lid);
    stage_w(4u, w4, w_row4, chunk, lid);
    stage_w(5u, w5, w_row5, chunk, lid);
    stage_w(6u, w6, w_row6, chunk, lid);
    stage_w(7u, w7, w_row7, chunk, lid);
}

// Adds the products of 16 staged columns.
fn multiply(x_at: u32, w_at: u32) {
    let b0 = coopLoad<MatrixW>(&staged[w_at], STRIDE);
    let b1 = coopLoad<MatrixW>(&staged[w_at + 16u * STRIDE], STRIDE);
    var b2: MatrixW;
    var b3: MatrixW;
    if (FN > 2u) {
        b2 = coopLoad<MatrixW>(&staged[w_at + 32u * STRIDE], STRIDE);
        b3 = coopLoad<MatrixW>(&staged[w_at + 48u * STRIDE], STRIDE);
    }
    {
        let a = coopLoadT<MatrixX>(&staged[x_at], STRIDE);
        c00 = coopMultiplyAdd(a, b0, c00);
        c01 = coopMultiplyAdd(a, b1, c01);
        if (FN > 2u) {
            c02 = coopMultiplyAdd(a, b2, c02);
            c03 = coopMultiplyAdd(a, b3, c03);
        }
    }
    if (FM > 1u) {
        let a = coopLoadT<MatrixX>(&staged[x_at + 1u * M_STEP * STRIDE], STRIDE);
        c10 = coopMultiplyAdd(a, b0, c10);
        c11 = coopMultiplyAdd(a, b1, c11);
        if (FN > 2u) {
            c12 = coopMultiplyAdd(a, b2, c12);
            c13 = coopMultiplyAdd(a, b3, c13);
        }
    }
    if (FM > 2u) {
        let a = coopLoadT<MatrixX>(&staged[x_at + 2u * M_STEP * STRIDE], STRIDE);
        c20 = coopMultiplyAdd(a, b0, c20);
        c21 = coopMultiplyAdd(a, b1, c21);
        if (FN > 2u) {
            c22 = coopMultiplyAdd(a, b2, c22);
            c23 = coopMultiplyAdd(a, b3, c23);
        }
    }
    if (FM > 3u) {
        let a = coopLoadT<MatrixX>(&staged[x_at + 3u * M_STEP * STRIDE], STRIDE);
        c30 = coopMultiplyAdd(a, b0, c30);
        c31 = coopMultiplyAdd(a, b1, c31);
        if (FN > 2u) {
            c32 = coopMultiplyAdd(a, b2, c32);
            c33 = coopMultiplyAdd(a, b3, c33);
        }
    }
}

// Passes a row of matrices, tokens `token`.. of the tile, to `store`.
fn store_row(m0: MatrixSum, m1: MatrixSum, m2: MatrixSum, m3: MatrixSum, token: u32, sg_row: u32,
             first: u32, last: u32, lid: u32) {
    let sums = lid / 32u * 16u * SUM_STRIDE;
    let stride = SUM_STRIDE;
    let at0 = sums;
    let at1 = sums + 4u;
    let at2 = sums + 8u;
    let at3 = sums + 12u;
    let d0 = m0;
    let d1 = m1;
    coopStoreT(d0, &staged[at0], stride);
    coopStoreT(d1, &staged[at1], stride);
    if (FN > 2u) {
        let d2 = m2;
        let d3 = m3;
        coopStoreT(d2, &staged[at2], stride);
        coopStoreT(d3, &staged[at3], stride);
    }
    workgroupBarrier();
    var cols4 = SUM_STRIDE;
    if (GATED) {
        cols4 = HALF / 4u;
    }
    for (var i = lid % 32u; i < 16u * cols4; i += 32u) {
        let t = i / cols4;
        let row4 = i % cols4;
        var sum = staged[sums + t * SUM_STRIDE + row4];
        if (GATED) {
            let feature = sg_row / 2u + row4 * 4u;
            let r = min(first + feature, last);
            var up = staged[sums + t * SUM_STRIDE + row4 + HALF / 4u];
            if (scale_is_per_row()) {
                sum *= row_scales(r);
                up *= row_scales(r + p.n_rows / 2u);
            }
            store(token + t, feature, sum / (1.0 + exp(-sum)) * up);
        } else {
            if (scale_is_per_row()) {
                sum *= row_scales(min(first + sg_row + row4 * 4u, last));
            }
            store(token + t, sg_row + row4 * 4u, sum);
        }
    }
    workgroupBarrier();
}

fn row_scales(row: u32) -> vec4<f32> {
    return vec4(weight_scale(row, 0u), weight_scale(row + 1u, 0u),
                weight_scale(row + 2u, 0u), weight_scale(row + 3u, 0u));
}

// Multiplies, and passes the sums to `store`. All threads of the workgroup must call it together.
fn tile(first: u32, last: u32, lid: u32) {
    let subgroup = lid / 32u;
    // Subgroups that share rows take every SG_M-th matrix of tokens.
    let sg_token = subgroup % SG_M * 16u;
    let sg_row = subgroup / SG_M * SUM_COLS;
    let x_at = sg_token * STRIDE;
    let w_at = W_TILE + sg_row * STRIDE;
    x_at0 = x_start(0u, lid);
    x_at1 = x_start(1u, lid);
    x_at2 = x_start(2u, lid);
    x_at3 = x_start(3u, lid);
    w_row0 = w_start(0u, first, last, lid);
    w_row1 = w_start(1u, first, last, lid);
    w_row2 = w_start(2u, first, last, lid);
    w_row3 = w_start(3u, first, last, lid);
    w_row4 = w_start(4u, first, last, lid);
    w_row5 = w_start(5u, first, last, lid);
    w_row6 = w_start(6u, first, last, lid);
    w_row7 = w_start(7u, first, last, lid);
    load_step(0u, lid);
    for (var chunk = 0u; chunk < p.n_chunks; chunk += STEP_CHUNKS) {
        stage_step(chunk, lid);
        workgroupBarrier();
        let next = chunk + STEP_CHUNKS;
        if (next < p.n_chunks) {
            load_step(next, lid);
        }
        multiply(x_at, w_at);
        multiply(x_at + 2u, w_at + 2u);
        if (STEP8 > 4u) {
            multiply(x_at + 4u, w_at + 4u);
            multiply(x_at + 6u, w_at + 6u);
        }
        if (STEP8 > 8u) {
            multiply(x_at + 8u, w_at + 8u);
            multiply(x_at + 10u, w_at + 10u);
            multiply(x_at + 12u, w_at + 12u);
            multiply(x_at + 14u, w_at + 14u);
        }
        workgroupBarrier();
    }
    store_row(c00, c01, c02, c03, sg_token, sg_row, first, last, lid);
    if (FM > 1u) {
        store_row(c10, c11, c12, c13, sg_token + M_STEP, sg_row, first, last, lid);
    }
    if (FM > 2u) {
        store_row(c20, c21, c22, c23, sg_token + 2u * M_STEP, sg_row, first, last, lid);
    }
    if (FM > 3u) {
        store_row(c30, c31, c32, c33, sg_token + 3u * M_STEP, sg_row, first, last, lid);
    }
}
