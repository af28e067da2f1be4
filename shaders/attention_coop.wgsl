// Causal attention of tiles of up to 32 successive tokens over the paged cache, in cooperative
// matrices of 16 x 16 (FlashAttention, Dao et al. 2022). A subgroup of 32 threads takes the tile
// for one query head; HEADS of them, which have a key head in common, share the staged keys and
// values, 32 positions at a time. Scores pass through workgroup memory, where each thread owns a
// row: it keeps the row's sum and a reference that its powers are relative to. The outputs stay in
// matrices, which no thread can scale by row: they take a way through workgroup memory too, but
// only when a score exceeds its row's reference by LIMIT.
enable f16;
enable wgpu_cooperative_matrix;
#include "include/out_{out}.wgsl"
#include "include/paged_cache.wgsl"

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;       // [n_tokens, q_stride4]
// [n_blocks, n_kv_heads, block_size, HEAD4]
@group(0) @binding(2) var<storage, read> k_cache: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read> v_cache: array<vec4<f16>>;
// [n_tiles] of (first row, number of rows, sequence, position of the first row)
@group(0) @binding(4) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> block_tables: array<u32>;  // [n_sequences, max_blocks]
@group(0) @binding(6) var<storage, read_write> out: array<out4>;    // [n_tokens, out_stride4]

override HEADS: u32 = 2u;  // 1 or 2

alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixSum = coop_mat16x16<f32, C>;

const ROWS: u32 = 32u;
const KEYS: u32 = 32u;
// From row to row of staged heads (128 columns at most), powers, scores and sums, in vec4s: eight
// rows lie in different memory banks.
const STRIDE: u32 = 34u;
const POWER_STRIDE: u32 = 10u;
const SCORE_STRIDE: u32 = 9u;
const SUM_STRIDE: u32 = 5u;
const LOWEST: f32 = -1e38;
// Powers of two up to this stay in the finite range of f16.
const LIMIT: f32 = 12.0;

// Rows of q, k and v. Powers replace the keys.
const K_AT: u32 = 2u * ROWS * STRIDE;
const V_AT: u32 = K_AT + KEYS * STRIDE;
var<workgroup> staged: array<vec4<f16>, V_AT + KEYS * STRIDE>;
// Scores. Sums take their place.
var<workgroup> scores: array<vec4<f32>, 2u * ROWS * SCORE_STRIDE>;
var<workgroup> grows: u32;  // whether some row's reference has grown

// The outputs of the subgroup's head: two matrices of rows, eight of columns.
var<private> o00: MatrixSum; var<private> o01: MatrixSum;
var<private> o02: MatrixSum; var<private> o03: MatrixSum;
var<private> o04: MatrixSum; var<private> o05: MatrixSum;
var<private> o06: MatrixSum; var<private> o07: MatrixSum;
var<private> o10: MatrixSum; var<private> o11: MatrixSum;
var<private> o12: MatrixSum; var<private> o13: MatrixSum;
var<private> o14: MatrixSum; var<private> o15: MatrixSum;
var<private> o16: MatrixSum; var<private> o17: MatrixSum;

fn stage_q(tile: vec4<u32>, first_head: u32, lid: u32) {
    for (var i = lid; i < HEADS * ROWS * HEAD4; i += HEADS * 32u) {
        let col = i % HEAD4;
        let row = i / HEAD4 % ROWS;
        let head = i / (HEAD4 * ROWS);
        let token = tile.x + min(row, tile.y - 1u);
        let x = q[token * p.q_stride4 + (first_head + head) * HEAD4 + col];
        staged[(head * ROWS + row) * STRIDE + col] = vec4<f16>(x);
    }
}

// Keys and values of the positions from `first` on; past `end` the last one.
fn stage_kv(sequence: u32, kv_head: u32, first: u32, end: u32, lid: u32) {
    for (var i = lid; i < KEYS * HEAD4 / 2u; i += HEADS * 32u) {
        let col = i % (HEAD4 / 2u) * 2u;
        let key = i / (HEAD4 / 2u);
        let at = cache_row(sequence, kv_head, min(first + key, end - 1u)) + col;
        let to = K_AT + key * STRIDE + col;
        staged[to] = k_cache[at];
        staged[to + 1u] = k_cache[at + 1u];
        staged[to + KEYS * STRIDE] = v_cache[at];
        staged[to + KEYS * STRIDE + 1u] = v_cache[at + 1u];
    }
}

// Scores of 32 rows and 32 keys, to workgroup memory.
fn multiply_scores(q_at: u32, s_at: u32) {
    var s00: MatrixSum;
    var s01: MatrixSum;
    var s10: MatrixSum;
    var s11: MatrixSum;
    for (var i = 0u; i < HEAD4; i += 4u) {
        let a0 = coopLoadT<MatrixA>(&staged[q_at + i], STRIDE);
        let a1 = coopLoadT<MatrixA>(&staged[q_at + 16u * STRIDE + i], STRIDE);
        let b0 = coopLoad<MatrixB>(&staged[K_AT + i], STRIDE);
        let b1 = coopLoad<MatrixB>(&staged[K_AT + 16u * STRIDE + i], STRIDE);
        s00 = coopMultiplyAdd(a0, b0, s00);
        s01 = coopMultiplyAdd(a0, b1, s01);
        s10 = coopMultiplyAdd(a1, b0, s10);
        s11 = coopMultiplyAdd(a1, b1, s11);
    }
    let stride = SCORE_STRIDE;
    let at00 = s_at;
    let at01 = s_at + 4u;
    let at10 = s_at + 16u * SCORE_STRIDE;
    let at11 = at10 + 4u;
    let t00 = s00;
    let t01 = s01;
    let t10 = s10;
    let t11 = s11;
    coopStoreT(t00, &scores[at00], stride);
    coopStoreT(t01, &scores[at01], stride);
    coopStoreT(t10, &scores[at10], stride);
    coopStoreT(t11, &scores[at11], stride);
}

struct Row {
    reference: f32,
    sum: f32,
    factor: f32,  // of what was summed before
}

// Scores of four keys in the thread's row, and which of them it sees.
fn score4(at: u32, key: u32, position: u32) -> vec4<f32> {
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    let sees = (keys <= vec4(position)) & (vec4(position) - keys < vec4(p.window));
    return select(vec4(LOWEST), scores[at] * (p.scale * 1.44269504), sees);
}

fn power4(score: vec4<f32>, reference: f32) -> vec4<f32> {
    return select(vec4(0.0), exp2(score - reference), score > vec4(LOWEST));
}

// Powers of the thread's row of scores at `at`, to the staged row `to`.
fn soften(before: Row, at: u32, to: u32, key: u32, position: u32) -> Row {
    let s0 = score4(at, key, position);
    let s1 = score4(at + 1u, key + 4u, position);
    let s2 = score4(at + 2u, key + 8u, position);
    let s3 = score4(at + 3u, key + 12u, position);
    let s4 = score4(at + 4u, key + 16u, position);
    let s5 = score4(at + 5u, key + 20u, position);
    let s6 = score4(at + 6u, key + 24u, position);
    let s7 = score4(at + 7u, key + 28u, position);
    let most4 = max(max(max(s0, s1), max(s2, s3)), max(max(s4, s5), max(s6, s7)));
    let most = max(max(most4.x, most4.y), max(most4.z, most4.w));
    var row = before;
    row.factor = 1.0;
    if (most > row.reference + LIMIT) {
        row.factor = exp2(row.reference - most);
        row.reference = most;
    }
    let p0 = power4(s0, row.reference);
    let p1 = power4(s1, row.reference);
    let p2 = power4(s2, row.reference);
    let p3 = power4(s3, row.reference);
    let p4 = power4(s4, row.reference);
    let p5 = power4(s5, row.reference);
    let p6 = power4(s6, row.reference);
    let p7 = power4(s7, row.reference);
    let sums = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7));
    row.sum = row.sum * row.factor + (sums.x + sums.y) + (sums.z + sums.w);
    staged[to] = vec4<f16>(p0);
    staged[to + 1u] = vec4<f16>(p1);
    staged[to + 2u] = vec4<f16>(p2);
    staged[to + 3u] = vec4<f16>(p3);
    staged[to + 4u] = vec4<f16>(p4);
    staged[to + 5u] = vec4<f16>(p5);
    staged[to + 6u] = vec4<f16>(p6);
    staged[to + 7u] = vec4<f16>(p7);
    return row;
}

// Adds the products of powers with 16 columns of values.
fn add_values(a: MatrixA, b: MatrixA, v_at: u32, sum: MatrixSum) -> MatrixSum {
    let v0 = coopLoadT<MatrixB>(&staged[v_at], STRIDE);
    let v1 = coopLoadT<MatrixB>(&staged[v_at + 16u * STRIDE], STRIDE);
    return coopMultiplyAdd(b, v1, coopMultiplyAdd(a, v0, sum));
}

fn multiply_values(p_at: u32) {
    let a0 = coopLoadT<MatrixA>(&staged[p_at], POWER_STRIDE);
    let b0 = coopLoadT<MatrixA>(&staged[p_at + 4u], POWER_STRIDE);
    let a1 = coopLoadT<MatrixA>(&staged[p_at + 16u * POWER_STRIDE], POWER_STRIDE);
    let b1 = coopLoadT<MatrixA>(&staged[p_at + 16u * POWER_STRIDE + 4u], POWER_STRIDE);
    o00 = add_values(a0, b0, V_AT, o00);
    o10 = add_values(a1, b1, V_AT, o10);
    if (HEAD4 > 4u) {
        o01 = add_values(a0, b0, V_AT + 4u, o01);
        o11 = add_values(a1, b1, V_AT + 4u, o11);
    }
    if (HEAD4 > 8u) {
        o02 = add_values(a0, b0, V_AT + 8u, o02);
        o12 = add_values(a1, b1, V_AT + 8u, o12);
    }
    if (HEAD4 > 12u) {
        o03 = add_values(a0, b0, V_AT + 12u, o03);
        o13 = add_values(a1, b1, V_AT + 12u, o13);
    }
    if (HEAD4 > 16u) {
        o04 = add_values(a0, b0, V_AT + 16u, o04);
        o14 = add_values(a1, b1, V_AT + 16u, o14);
    }
    if (HEAD4 > 20u) {
        o05 = add_values(a0, b0, V_AT + 20u, o05);
        o15 = add_values(a1, b1, V_AT + 20u, o15);
    }
    if (HEAD4 > 24u) {
        o06 = add_values(a0, b0, V_AT + 24u, o06);
        o16 = add_values(a1, b1, V_AT + 24u, o16);
    }
    if (HEAD4 > 28u) {
        o07 = add_values(a0, b0, V_AT + 28u, o07);
        o17 = add_values(a1, b1, V_AT + 28u, o17);
    }
}

// Sums on their way through workgroup memory, in the place of scores: the first and the second
// matrix of rows of 16 columns.
fn put(top: MatrixSum, bottom: MatrixSum, at: u32) {
    let stride = SUM_STRIDE;
    let low = at + 16u * SUM_STRIDE;
    let d0 = top;
    let d1 = bottom;
    coopStoreT(d0, &scores[at], stride);
    coopStoreT(d1, &scores[low], stride);
    workgroupBarrier();
}

// Scales the thread's row of 16 columns.
fn scale_row(at: u32, factor: f32) {
    scores[at] *= factor;
    scores[at + 1u] *= factor;
    scores[at + 2u] *= factor;
    scores[at + 3u] *= factor;
    workgroupBarrier();
}

fn top(at: u32) -> MatrixSum { return coopLoadT<MatrixSum>(&scores[at], SUM_STRIDE); }
fn bottom(at: u32) -> MatrixSum {
    return coopLoadT<MatrixSum>(&scores[at + 16u * SUM_STRIDE], SUM_STRIDE);
}

// Scales all rows. `at`: where the subgroup may put sums, `own`: where the thread's row is there.
fn scale_rows(at: u32, own: u32, factor: f32) {
    put(o00, o10, at);
    scale_row(own, factor);
    o00 = top(at);
    o10 = bottom(at);
    if (HEAD4 > 4u) {
        put(o01, o11, at);
        scale_row(own, factor);
        o01 = top(at);
        o11 = bottom(at);
    }
    if (HEAD4 > 8u) {
        put(o02, o12, at);
        scale_row(own, factor);
        o02 = top(at);
        o12 = bottom(at);
    }
    if (HEAD4 > 12u) {
        put(o03, o13, at);
        scale_row(own, factor);
        o03 = top(at);
        o13 = bottom(at);
    }
    if (HEAD4 > 16u) {
        put(o04, o14, at);
        scale_row(own, factor);
        o04 = top(at);
        o14 = bottom(at);
    }
    if (HEAD4 > 20u) {
        put(o05, o15, at);
        scale_row(own, factor);
        o05 = top(at);
        o15 = bottom(at);
    }
    if (HEAD4 > 24u) {
        put(o06, o16, at);
        scale_row(own, factor);
        o06 = top(at);
        o16 = bottom(at);
    }
    if (HEAD4 > 28u) {
        put(o07, o17, at);
        scale_row(own, factor);
        o07 = top(at);
        o17 = bottom(at);
    }
}

// Writes 16 columns of the thread's row.
fn store(m0: MatrixSum, m1: MatrixSum, col4: u32, at: u32, own: u32, to: u32, row: Row,
         live: bool) {
    put(m0, m1, at);
    if (live) {
        for (var i = 0u; i < 4u; i++) {
            out[to + col4 + i] = out_store(scores[own + i] / row.sum);
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(HEADS * 32u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let item = group.y + group.z * p.grid_y;
    if (item >= p.n_items) {
        return;
    }
    // The longest first.
    let tile = tiles[p.n_items - 1u - item];
    if (tile.y == 0u) {
        return;
    }
    let first_head = group.x * HEADS;
    let head = first_head + lid / 32u;
    let kv_head = first_head / (p.n_heads / p.n_kv_heads);
    let lane = lid % 32u;
    let position = tile.w + lane;
    let q_at = lid / 32u * ROWS * STRIDE;
    let s_at = lid / 32u * ROWS * SCORE_STRIDE;
    let p_at = K_AT + lid / 32u * ROWS * POWER_STRIDE;
    let sums = lid / 32u * ROWS * SCORE_STRIDE;
    let own = sums + lane * SUM_STRIDE;
    var row = Row(LOWEST, 0.0, 1.0);
    stage_q(tile, first_head, lid);
    let end = tile.w + tile.y;
    let start = tile.w + 1u - min(tile.w + 1u, p.window);
    for (var first = start; first < end; first += KEYS) {
        stage_kv(tile.z, kv_head, first, end, lid);
        if (lid == 0u) {
            grows = 0u;
        }
        workgroupBarrier();
        multiply_scores(q_at, s_at);
        workgroupBarrier();
        row = soften(row, s_at + lane * SCORE_STRIDE, p_at + lane * POWER_STRIDE, first, position);
        if (row.factor != 1.0 && first > start) {
            grows = 1u;
        }
        if (workgroupUniformLoad(&grows) != 0u) {
            scale_rows(sums, own, row.factor);
        }
        multiply_values(p_at);
        workgroupBarrier();
    }
    let live = lane < tile.y;
    let to = (tile.x + min(lane, tile.y - 1u)) * p.out_stride4 + head * HEAD4;
    store(o00, o10, 0u, sums, own, to, row, live);
    if (HEAD4 > 4u) {
        store(o01, o11, 4u, sums, own, to, row, live);
    }
    if (HEAD4 > 8u) {
        store(o02, o12, 8u, sums, own, to, row, live);
    }
    if (HEAD4 > 12u) {
        store(o03, o13, 12u, sums, own, to, row, live);
    }
    if (HEAD4 > 16u) {
        store(o04, o14, 16u, sums, own, to, row, live);
    }
    if (HEAD4 > 20u) {
        store(o05, o15, 20u, sums, own, to, row, live);
    }
    if (HEAD4 > 24u) {
        store(o06, o16, 24u, sums, own, to, row, live);
    }
    if (HEAD4 > 28u) {
        store(o07, o17, 28u, sums, own, to, row, live);
    }
    if (live && head == 0u) {
        for (var i = p.n_heads * HEAD4; i < p.out_stride4; i++) {
            out[to + i] = out_store(vec4(0.0));
        }
    }
}
