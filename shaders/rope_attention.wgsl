// rope_kv_write and attention_decode in one launch, for tokens of different sequences. A workgroup
// normalises and rotates the queries of its heads and the key that they share; the first of those
// that share it writes key and value to the cache. Nobody reads these from there: attention begins
// with the token itself, as the softmax over a single position, and goes on with those before it.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "include/cache_row.wgsl"
#include "include/turn.wgsl"
#include "include/attend_token.wgsl"

struct Params {
    n_tokens: u32,
    n_heads: u32,
    n_kv_heads: u32,
    block_size: u32,   // positions in a block
    max_blocks: u32,   // blocks in a row of the block tables
    tables: u32,       // first word of the block tables
    qkv_stride4: u32,  // row strides in vec4s
    out_stride4: u32,
    n_positions: u32,  // rows of the table of angles
    rotary_dim: u32,
    norm_dim: u32,     // true head_dim
    window: u32,       // latest positions that a token sees, itself included
    grid_y: u32,
    eps: f32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;   // [n_tokens, qkv_stride4]
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>;  // q weights, then k weights
@group(0) @binding(3) var<storage, read> angles: array<f32>;      // [n_positions, rotary_dim]
// (position, slot, sequence, 0) of each token, and from p.tables on [n_sequences, max_blocks]
@group(0) @binding(4) var<storage, read> places: array<u32>;
// [n_blocks, n_kv_heads, block_size, HEAD4]
@group(0) @binding(5) var<storage, read_write> k_cache: array<act4>;
@group(0) @binding(6) var<storage, read_write> v_cache: array<act4>;
@group(0) @binding(7) var<storage, read_write> out: array<out4>;  // [n_tokens, out_stride4]
@group(0) @binding(8) var<storage, read_write> parts: array<atomic<u32>>;

override QK_NORM: bool = false;  // of each head

const MOST_ROWS: u32 = 384u;  // HEADS * HEAD4 <= 256, and two more heads

// Heads of q, then k, then v. [HEADS + 2, HEAD4]
var<workgroup> staged: array<vec4<f32>, MOST_ROWS>;
var<workgroup> part_squares: array<f32, 128>;  // [HEADS + 2, LANES / SUBLANES]
var<workgroup> newest: array<vec4<f32>, 128>;  // key, then value, as in the cache. [2, HEAD4]

fn block_at(i: u32) -> u32 {
    return places[p.tables + i];
}

// Element e of the head staged at `base`.
fn staged_at(base: u32, e: u32) -> f32 {
    return staged[base + e / 4u][e % 4u];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.y + group.z * p.grid_y;
    if (token >= p.n_tokens) {
        return;
    }
    let share = p.n_heads / p.n_kv_heads;         // query heads of a key/value head
    let n_groups = (share + HEADS - 1u) / HEADS;  // of query heads
    let heads_id = group.x / PARTS;
    let part = group.x % PARTS;
    let kv_head = heads_id / n_groups;
    let first_head = heads_id % n_groups * HEADS;
    let n_live = min(HEADS, share - first_head);
    let head = kv_head * share + first_head;
    let out_at = token * p.out_stride4;
    let position = places[4u * token];
    let slot = places[4u * token + 1u];
    let sequence = places[4u * token + 2u];
    if (group.x == 0u) {
        for (var i = p.n_heads * HEAD4 + lid; i < p.out_stride4; i += THREADS) {
            out[out_at + i] = out_store(vec4(0.0));
        }
    }
    if (slot == PADDING) {
        if (part == 0u) {
            for (var i = lid; i < n_live * HEAD4; i += THREADS) {
                out[out_at + head * HEAD4 + i] = out_store(vec4(0.0));
            }
        }
        return;
    }
    let seen = min(position, p.window - 1u);  // positions before
    let n_parts = parts_of(seen);
    if (part >= n_parts) {
        return;
    }
    let heads = token * (p.n_kv_heads * n_groups) + heads_id;
    let span = Span(sequence, kv_head, position - seen, position, part, n_parts, heads, n_live,
                    out_at + head * HEAD4);
    let first_row = first_row_of(span, lid);

    let lane = lid % LANES;
    var cosines = vec4(1.0);
    var sines = vec4(0.0);
    let turned = min(position, p.n_positions - 1u) * p.rotary_dim;
    for (var c = 0u; c < 4u; c++) {
        let e = lane * 4u + c;
        if (e < p.rotary_dim) {
            let turn = turn_of(e);
            cosines[c] = angles[turned + turn.pair];
            sines[c] = turn.sign * angles[turned + p.rotary_dim / 2u + turn.pair];
        }
    }
    // Heads of q, then k, then v: LANES threads for each, as many at once as there are.
    let n_rows = HEADS + 2u;
    let at_once = THREADS / LANES;
    for (var first = 0u; first < n_rows; first += at_once) {
        let r = first + lid / LANES;
        let is_q = r < HEADS;
        let source = select(p.n_heads + (r - HEADS) * p.n_kv_heads + kv_head, head + r, is_q);
        var x = vec4(0.0);
        if (lane < HEAD4 && (r < n_live || (r >= HEADS && r < n_rows))) {
            x = qkv[token * p.qkv_stride4 + source * HEAD4 + lane];
        }
        let squares = sum_lanes(dot(x, x), lid, SUBLANES);
        if (r < n_rows && lid % SUBLANES == 0u) {
            part_squares[(r * LANES + lane) / SUBLANES] = squares;
        }
        if (QK_NORM && lane < HEAD4 && r <= HEADS) {
            x *= norm[select(HEAD4, 0u, is_q) + lane];
        }
        if (r < n_rows && lane < HEAD4) {
            staged[r * HEAD4 + lane] = x;
        }
    }
    workgroupBarrier();
    for (var r = lid / LANES; r < n_rows; r += at_once) {
        if (lane >= HEAD4) {
            continue;
        }
        let base = r * HEAD4;
        var y = staged[base + lane];
        if (r <= HEADS) {
            y *= cosines;
            for (var c = 0u; c < 4u; c++) {
                let e = lane * 4u + c;
                if (e < p.rotary_dim) {
                    y[c] += staged_at(base, turn_of(e).partner) * sines[c];
                }
            }
            if (QK_NORM) {
                var squares = 0.0;
                for (var i = 0u; i < LANES / SUBLANES; i++) {
                    squares += part_squares[r * (LANES / SUBLANES) + i];
                }
                y *= inverseSqrt(squares / f32(p.norm_dim) + p.eps);
            }
        }
        if (r < HEADS) {
            queries[base + lane] = y * p.scale;
        } else {
            // As the cache rounds it.
            let stored = act_store(y);
            newest[(r - HEADS) * HEAD4 + lane] = act_load(stored);
            if (part == 0u && first_head == 0u) {
                let at = slot_row(slot / p.block_size, kv_head, slot % p.block_size) + lane;
                if (r == HEADS) {
                    k_cache[at] = stored;
                } else {
                    v_cache[at] = stored;
                }
            }
        }
    }
    workgroupBarrier();

    // The score of the token itself, in every thread of a head.
    let n_subs = threads_of_head();
    let own = lid / n_subs;
    var score = 0.0;
    for (var i = lid % n_subs; i < HEAD4; i += n_subs) {
        score += dot(queries[own * HEAD4 + i], newest[i]);
    }
    score = sum_lanes(score, lid, SUBLANES);
    if (lid % SUBLANES == 0u) {
        maxima[lid / SUBLANES] = score;
    }
    workgroupBarrier();
    score = 0.0;
    for (var i = 0u; i < n_subs / SUBLANES; i++) {
        score += maxima[own * (n_subs / SUBLANES) + i];
    }
    var peak = LOWEST;
    var sums = Sums();
    if (part == 0u) {
        peak = score;
        if (lid < LANES) {
            for (var h = 0u; h < HEADS; h++) {
                sums.weights[h] = 1.0;
                sums.values[h] = newest[HEAD4 + min(lid, HEAD4 - 1u)];
            }
        }
    }
    attend(span, first_row, peak, sums, lid);
}
