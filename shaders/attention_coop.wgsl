// Causal attention of tiles of up to 32 successive tokens over the paged cache, in cooperative
// matrices of 16 x 16 (FlashAttention, Dao et al. 2022). Two subgroups of 32 threads take the tile
// for one query head, 16 tokens each; HEADS heads, which have a key head in common, share the
// staged keys and values, 32 positions at a time. Scores pass through workgroup memory, where two
// neighbouring threads own a row: they keep its sum and a reference that its powers are relative
// to. The outputs stay in matrices, which no thread can scale by row: they take a way through
// workgroup memory too, but only when a score exceeds its row's reference by LIMIT.
//
// Matrices are written out as variables of `main`: drivers keep those of the module in memory.
enable f16;
enable wgpu_cooperative_matrix;
#include "include/out_{out}.wgsl"
#include "include/paged_cache.wgsl"

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;       // [n_tokens, q_stride4]
// Eight f16 at a time. [n_blocks, n_kv_heads, block_size, HEAD4 / 2]
@group(0) @binding(2) var<storage, read> k_cache: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v_cache: array<vec4<u32>>;
// [n_tiles] of (first row, number of rows, sequence, position of the first row)
@group(0) @binding(4) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> block_tables: array<u32>;  // [n_sequences, max_blocks]
@group(0) @binding(6) var<storage, read_write> out: array<out4>;    // [n_tokens, out_stride4]

override HEADS: u32 = 2u;  // 1 or 2
override BLOCK_SIZE: u32 = 16u;  // as p.block_size, but divided by at no cost

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

// Rows of k and v, before them those of q. Powers replace the keys.
const LOW: u32 = 16u * STRIDE;  // the second matrix of rows
const V_AT: u32 = KEYS * STRIDE;
var<workgroup> staged: array<vec4<f16>, 2u * KEYS * STRIDE>;
// Scores of each subgroup. Sums take their place.
var<workgroup> scores: array<vec4<f32>, 2u * ROWS * SCORE_STRIDE>;
var<workgroup> grows: u32;  // whether some row's reference has grown

// Queries, scaled so that their products are exponents of two.
fn stage_q(tile: vec4<u32>, first_head: u32, lid: u32) {
    for (var i = lid; i < HEADS * ROWS * HEAD4; i += HEADS * 64u) {
        let col = i % HEAD4;
        let row = i / HEAD4 % ROWS;
        let head = i / (HEAD4 * ROWS);
        let token = tile.x + min(row, tile.y - 1u);
        let x = q[token * p.q_stride4 + (first_head + head) * HEAD4 + col];
        staged[(head * ROWS + row) * STRIDE + col] = vec4<f16>(x * (p.scale * 1.44269504));
    }
}

// Keys and values that a thread stages.
struct Loads {
    k0: vec4<u32>, k1: vec4<u32>, k2: vec4<u32>, k3: vec4<u32>,
    k4: vec4<u32>, k5: vec4<u32>, k6: vec4<u32>, k7: vec4<u32>,
    v0: vec4<u32>, v1: vec4<u32>, v2: vec4<u32>, v3: vec4<u32>,
    v4: vec4<u32>, v5: vec4<u32>, v6: vec4<u32>, v7: vec4<u32>,
}

// Of the thread's groups of eight columns the i-th, counted over all keys.
fn group(i: u32, lid: u32) -> u32 { return lid + i * HEADS * 64u; }
fn exists(i: u32) -> bool { return i * HEADS * 64u < KEYS * HEAD4 / 2u; }

// Where that group lies in the cache; past `end` that of the last position.
fn source(i: u32, tile: vec4<u32>, kv_head: u32, first: u32, lid: u32) -> u32 {
    let at = min(group(i, lid), KEYS * HEAD4 / 2u - 1u);
    let position = min(first + at / (HEAD4 / 2u), tile.w + tile.y - 1u);
    let block = block_tables[tile.z * p.max_blocks + position / BLOCK_SIZE];
    let row = (block * p.n_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE;
    return row * (HEAD4 / 2u) + at % (HEAD4 / 2u);
}

// Keys and values of the positions from `first` on.
fn load(tile: vec4<u32>, kv_head: u32, first: u32, lid: u32) -> Loads {
    var x: Loads;
    let at0 = source(0u, tile, kv_head, first, lid);
    x.k0 = k_cache[at0];
    x.v0 = v_cache[at0];
    if (exists(1u)) {
        let at = source(1u, tile, kv_head, first, lid);
        x.k1 = k_cache[at];
        x.v1 = v_cache[at];
    }
    if (exists(2u)) {
        let at = source(2u, tile, kv_head, first, lid);
        x.k2 = k_cache[at];
        x.v2 = v_cache[at];
    }
    if (exists(3u)) {
        let at = source(3u, tile, kv_head, first, lid);
        x.k3 = k_cache[at];
        x.v3 = v_cache[at];
    }
    if (exists(4u)) {
        let at = source(4u, tile, kv_head, first, lid);
        x.k4 = k_cache[at];
        x.v4 = v_cache[at];
    }
    if (exists(5u)) {
        let at = source(5u, tile, kv_head, first, lid);
        x.k5 = k_cache[at];
        x.v5 = v_cache[at];
    }
    if (exists(6u)) {
        let at = source(6u, tile, kv_head, first, lid);
        x.k6 = k_cache[at];
        x.v6 = v_cache[at];
    }
    if (exists(7u)) {
        let at = source(7u, tile, kv_head, first, lid);
        x.k7 = k_cache[at];
        x.v7 = v_cache[at];
    }
    return x;
}

fn stage_kv(i: u32, k: vec4<u32>, v: vec4<u32>, lid: u32) {
    let at = group(i, lid);
    if (exists(i) && at < KEYS * HEAD4 / 2u) {
        let to = at / (HEAD4 / 2u) * STRIDE + at % (HEAD4 / 2u) * 2u;
        staged[to] = vec4<f16>(vec4(unpack2x16float(k.x), unpack2x16float(k.y)));
        staged[to + 1u] = vec4<f16>(vec4(unpack2x16float(k.z), unpack2x16float(k.w)));
        staged[to + V_AT] = vec4<f16>(vec4(unpack2x16float(v.x), unpack2x16float(v.y)));
        staged[to + V_AT + 1u] = vec4<f16>(vec4(unpack2x16float(v.z), unpack2x16float(v.w)));
    }
}

// Adds the products of 16 columns of queries with those of 16 keys.
fn add_scores(queries: MatrixA, k_at: u32, sum: MatrixSum) -> MatrixSum {
    return coopMultiplyAdd(queries, coopLoad<MatrixB>(&staged[k_at], STRIDE), sum);
}

struct Row {
    reference: f32,
    sum: f32,     // of the thread's keys
    factor: f32,  // of what was summed before
}

// Scores of four keys in the thread's row; LOWEST for those that it does not see.
fn score4(at: u32, key: u32, position: u32) -> vec4<f32> {
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    let sees = (keys <= vec4(position)) & (vec4(position) - keys < vec4(p.window));
    return select(vec4(LOWEST), scores[at], sees);
}

fn power4(score: vec4<f32>, reference: f32) -> vec4<f32> {
    return select(vec4(0.0), exp2(score - reference), score > vec4(LOWEST));
}

// Powers of the thread's half row of scores at `at`, to the staged row `to`.
fn soften(before: Row, at: u32, to: u32, key: u32, position: u32) -> Row {
    let s0 = score4(at, key, position);
    let s1 = score4(at + 1u, key + 4u, position);
    let s2 = score4(at + 2u, key + 8u, position);
    let s3 = score4(at + 3u, key + 12u, position);
    let most4 = max(max(s0, s1), max(s2, s3));
    let half = max(max(most4.x, most4.y), max(most4.z, most4.w));
    let most = max(half, subgroupShuffleXor(half, 1u));
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
    let sums = (p0 + p1) + (p2 + p3);
    row.sum = row.sum * row.factor + (sums.x + sums.y) + (sums.z + sums.w);
    staged[to] = vec4<f16>(p0);
    staged[to + 1u] = vec4<f16>(p1);
    staged[to + 2u] = vec4<f16>(p2);
    staged[to + 3u] = vec4<f16>(p3);
    return row;
}

// Adds the products of powers with 16 columns of values.
fn add_values(a: MatrixA, b: MatrixA, v_at: u32, sum: MatrixSum) -> MatrixSum {
    let v0 = coopLoadT<MatrixB>(&staged[v_at], STRIDE);
    let v1 = coopLoadT<MatrixB>(&staged[v_at + LOW], STRIDE);
    return coopMultiplyAdd(b, v1, coopMultiplyAdd(a, v0, sum));
}

// Puts sums of 16 columns in the place of the subgroup's scores.
fn put(sum: MatrixSum, at: u32) {
    let stride = SUM_STRIDE;
    let d = sum;
    coopStoreT(d, &scores[at], stride);
    workgroupBarrier();
}

// Sums of 16 columns, scaled by row. `at`: where the subgroup may put sums, `own`: where the
// thread's half row is there.
fn scaled(sum: MatrixSum, at: u32, own: u32, factor: f32) -> MatrixSum {
    put(sum, at);
    scores[own] *= factor;
    scores[own + 1u] *= factor;
    workgroupBarrier();
    return coopLoadT<MatrixSum>(&scores[at], SUM_STRIDE);
}

// Writes 16 columns of the thread's row.
fn store(sum: MatrixSum, col4: u32, at: u32, own: u32, to: u32, scale: f32, live: bool) {
    put(sum, at);
    if (live) {
        out[to + col4] = out_store(scores[own] * scale);
        out[to + col4 + 1u] = out_store(scores[own + 1u] * scale);
    }
    workgroupBarrier();
}

@compute @workgroup_size(HEADS * 64u)
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
    let kv_head = first_head / (p.n_heads / p.n_kv_heads);
    let subgroup = lid / 32u;
    let head = first_head + subgroup / 2u;
    let token = subgroup % 2u * 16u + lid % 32u / 2u;  // of the tile: the thread's row
    let half = lid % 2u;
    let position = tile.w + token;
    let s_at = subgroup * 16u * SCORE_STRIDE;
    let p_at = subgroup * 16u * POWER_STRIDE;
    let s_own = s_at + lid % 32u / 2u * SCORE_STRIDE + half * 4u;
    let p_own = p_at + lid % 32u / 2u * POWER_STRIDE + half * 4u;
    let own = s_at + lid % 32u / 2u * SUM_STRIDE + half * 2u;
    let end = tile.w + tile.y;
    let start = tile.w + 1u - min(tile.w + 1u, p.window);
    stage_q(tile, first_head, lid);
    workgroupBarrier();
    let q_at = subgroup * LOW;
    var q0: MatrixA; var o0: MatrixSum;
    var q1: MatrixA; var o1: MatrixSum;
    var q2: MatrixA; var o2: MatrixSum;
    var q3: MatrixA; var o3: MatrixSum;
    var q4: MatrixA; var o4: MatrixSum;
    var q5: MatrixA; var o5: MatrixSum;
    var q6: MatrixA; var o6: MatrixSum;
    var q7: MatrixA; var o7: MatrixSum;
    q0 = coopLoadT<MatrixA>(&staged[q_at], STRIDE);
    if (HEAD4 > 4u) {
        q1 = coopLoadT<MatrixA>(&staged[q_at + 4u], STRIDE);
    }
    if (HEAD4 > 8u) {
        q2 = coopLoadT<MatrixA>(&staged[q_at + 8u], STRIDE);
    }
    if (HEAD4 > 12u) {
        q3 = coopLoadT<MatrixA>(&staged[q_at + 12u], STRIDE);
    }
    if (HEAD4 > 16u) {
        q4 = coopLoadT<MatrixA>(&staged[q_at + 16u], STRIDE);
    }
    if (HEAD4 > 20u) {
        q5 = coopLoadT<MatrixA>(&staged[q_at + 20u], STRIDE);
    }
    if (HEAD4 > 24u) {
        q6 = coopLoadT<MatrixA>(&staged[q_at + 24u], STRIDE);
    }
    if (HEAD4 > 28u) {
        q7 = coopLoadT<MatrixA>(&staged[q_at + 28u], STRIDE);
    }
    var row = Row(LOWEST, 0.0, 1.0);
    for (var first = start; first < end; first += KEYS) {
        let next = load(tile, kv_head, first, lid);
        workgroupBarrier();
        stage_kv(0u, next.k0, next.v0, lid);
        stage_kv(1u, next.k1, next.v1, lid);
        stage_kv(2u, next.k2, next.v2, lid);
        stage_kv(3u, next.k3, next.v3, lid);
        stage_kv(4u, next.k4, next.v4, lid);
        stage_kv(5u, next.k5, next.v5, lid);
        stage_kv(6u, next.k6, next.v6, lid);
        stage_kv(7u, next.k7, next.v7, lid);
        if (lid == 0u) {
            grows = 0u;
        }
        workgroupBarrier();
        var s0: MatrixSum; var s1: MatrixSum;
        s0 = add_scores(q0, 0u, s0);
        s1 = add_scores(q0, LOW, s1);
        if (HEAD4 > 4u) {
            s0 = add_scores(q1, 4u, s0);
            s1 = add_scores(q1, LOW + 4u, s1);
        }
        if (HEAD4 > 8u) {
            s0 = add_scores(q2, 8u, s0);
            s1 = add_scores(q2, LOW + 8u, s1);
        }
        if (HEAD4 > 12u) {
            s0 = add_scores(q3, 12u, s0);
            s1 = add_scores(q3, LOW + 12u, s1);
        }
        if (HEAD4 > 16u) {
            s0 = add_scores(q4, 16u, s0);
            s1 = add_scores(q4, LOW + 16u, s1);
        }
        if (HEAD4 > 20u) {
            s0 = add_scores(q5, 20u, s0);
            s1 = add_scores(q5, LOW + 20u, s1);
        }
        if (HEAD4 > 24u) {
            s0 = add_scores(q6, 24u, s0);
            s1 = add_scores(q6, LOW + 24u, s1);
        }
        if (HEAD4 > 28u) {
            s0 = add_scores(q7, 28u, s0);
            s1 = add_scores(q7, LOW + 28u, s1);
        }
        let stride = SCORE_STRIDE;
        let at1 = s_at + 4u;
        let d0 = s0;
        let d1 = s1;
        coopStoreT(d0, &scores[s_at], stride);
        coopStoreT(d1, &scores[at1], stride);
        workgroupBarrier();
        row = soften(row, s_own, p_own, first + half * 16u, position);
        if (row.factor != 1.0 && first > start) {
            grows = 1u;
        }
        if (workgroupUniformLoad(&grows) != 0u) {
            o0 = scaled(o0, s_at, own, row.factor);
            if (HEAD4 > 4u) {
                o1 = scaled(o1, s_at, own, row.factor);
            }
            if (HEAD4 > 8u) {
                o2 = scaled(o2, s_at, own, row.factor);
            }
            if (HEAD4 > 12u) {
                o3 = scaled(o3, s_at, own, row.factor);
            }
            if (HEAD4 > 16u) {
                o4 = scaled(o4, s_at, own, row.factor);
            }
            if (HEAD4 > 20u) {
                o5 = scaled(o5, s_at, own, row.factor);
            }
            if (HEAD4 > 24u) {
                o6 = scaled(o6, s_at, own, row.factor);
            }
            if (HEAD4 > 28u) {
                o7 = scaled(o7, s_at, own, row.factor);
            }
        }
        let a = coopLoadT<MatrixA>(&staged[p_at], POWER_STRIDE);
        let b = coopLoadT<MatrixA>(&staged[p_at + 4u], POWER_STRIDE);
        o0 = add_values(a, b, V_AT, o0);
        if (HEAD4 > 4u) {
            o1 = add_values(a, b, V_AT + 4u, o1);
        }
        if (HEAD4 > 8u) {
            o2 = add_values(a, b, V_AT + 8u, o2);
        }
        if (HEAD4 > 12u) {
            o3 = add_values(a, b, V_AT + 12u, o3);
        }
        if (HEAD4 > 16u) {
            o4 = add_values(a, b, V_AT + 16u, o4);
        }
        if (HEAD4 > 20u) {
            o5 = add_values(a, b, V_AT + 20u, o5);
        }
        if (HEAD4 > 24u) {
            o6 = add_values(a, b, V_AT + 24u, o6);
        }
        if (HEAD4 > 28u) {
            o7 = add_values(a, b, V_AT + 28u, o7);
        }
    }
    workgroupBarrier();
    let live = token < tile.y;
    let scale = 1.0 / (row.sum + subgroupShuffleXor(row.sum, 1u));
    let to = (tile.x + min(token, tile.y - 1u)) * p.out_stride4 + head * HEAD4 + half * 2u;
    store(o0, 0u, s_at, own, to, scale, live);
    if (HEAD4 > 4u) {
        store(o1, 4u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 8u) {
        store(o2, 8u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 12u) {
        store(o3, 12u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 16u) {
        store(o4, 16u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 20u) {
        store(o5, 20u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 24u) {
        store(o6, 24u, s_at, own, to, scale, live);
    }
    if (HEAD4 > 28u) {
        store(o7, 28u, s_at, own, to, scale, live);
    }
    if (live && head == 0u && half == 0u) {
        for (var i = p.n_heads * HEAD4; i < p.out_stride4; i++) {
            out[to + i] = out_store(vec4(0.0));
        }
    }
}
