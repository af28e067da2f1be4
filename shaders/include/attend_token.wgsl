// Attention of one token and HEADS query heads of one key/value head over cached positions, with an
// online softmax (Milakov and Gimelshein 2018); keys and values are read once for all heads. A tile
// has one position per thread for the softmax; for the values, threads lie across the head
// (coalesced) and split the positions.
//
// With PARTS > 1, several workgroups share the tiles of a long context (Dao et al. 2023, "flash
// decoding"), and the last of them to finish adds up what they have found. Parts pass between
// workgroups, so a storage barrier has to order them for the whole device.
//
// Expects `k_cache`, `v_cache`, `out` and `parts` in scope. The latter has counters of the parts
// that are done, zero before and after, one for each token and group of heads, then bits of what
// parts have found, with the largest score and the sum of a head behind its values:
// [n_tokens * groups of heads, PARTS, HEADS, 4 * HEAD4 + 2].
#include "include/sum_{sum}.wgsl"

override LANES: u32 = 16u;  // threads across a head: HEAD4 as a power of two, at least 4
override HEADS: u32 = 1u;   // query heads at once: a power of two, at most 8; HEADS * HEAD4 <= 256
override PARTS: u32 = 1u;   // workgroups that share the tiles, at most

override THREADS: u32 = 128u;  // at most MOST, at least LANES and HEADS

// Threads that add up together: at most LANES and threads_of_head().
override SUBLANES: u32 = 4u;

// Threads that share a row of keys: at most SUBLANES; a divisor of HEAD4.
override KEY_LANES: u32 = 1u;

const MOST: u32 = 128u;
const COUNTERS: u32 = 64u;  // at the front of `parts`
const PADDING: u32 = 0xffffffffu;
const LOWEST: f32 = -1e38;

var<workgroup> queries: array<vec4<f32>, 256>;       // [HEADS, HEAD4], scaled
var<workgroup> scores: array<f32, 1024>;             // [HEADS, THREADS]
var<workgroup> probs: array<f32, 1024>;              // [HEADS, THREADS], not yet normalised
var<workgroup> rows: array<u32, MOST>;               // of the tile's positions in the cache
var<workgroup> maxima: array<f32, MOST>;             // [HEADS, n_maxima]
var<workgroup> rescale: array<f32, 8>;               // [HEADS]: what a larger maximum costs
var<workgroup> partials: array<vec4<f32>, MOST>;     // [THREADS / LANES, LANES]
var<workgroup> n_done: u32;

// [HEADS] of this split and lane
struct Sums {
    weights: array<f32, 8>,
    values: array<vec4<f32>, 8>,
}

// Scores of position j of the tile, whose keys lie at `row`, by KEY_LANES threads.
fn write_score(j: u32, row: u32, lid: u32) {
    let lane = lid % KEY_LANES;
    var s: array<f32, 8>;
    for (var i = 0u; i < HEAD4 / KEY_LANES; i++) {
        let at = i * KEY_LANES + lane;
        let k = act_load(k_cache[row + at]);
        for (var h = 0u; h < HEADS; h++) {
            s[h] += dot(k, queries[h * HEAD4 + at]);
        }
    }
    for (var h = 0u; h < HEADS; h++) {
        let sum = sum_lanes(s[h], lid, KEY_LANES);
        if (lane == 0u) {
            scores[h * THREADS + j] = sum;
        }
    }
}

// Adds the values of positions j, j + step, ...
fn add_values(sums: ptr<function, Sums>, j: u32, step: u32, v0: vec4<f32>, v1: vec4<f32>,
              v2: vec4<f32>, v3: vec4<f32>) {
    for (var h = 0u; h < HEADS; h++) {
        let at = h * THREADS + j;
        let w = vec4(probs[at], probs[at + step], probs[at + 2u * step], probs[at + 3u * step]);
        (*sums).weights[h] += w.x + w.y + w.z + w.w;
        (*sums).values[h] += w.x * v0 + w.y * v1 + w.z * v2 + w.w * v3;
    }
}

// Index of what a part has found for head h, in words.
fn part_at(group: u32, part: u32, h: u32) -> u32 {
    return COUNTERS + ((group * PARTS + part) * HEADS + h) * (4u * HEAD4 + 2u);
}

fn part_load(at: u32) -> f32 {
    return bitcast<f32>(atomicLoad(&parts[at]));
}

fn part_store(at: u32, value: f32) {
    atomicStore(&parts[at], bitcast<u32>(value));
}

// Adds up what the parts of a group of heads have found.
fn combine(group: u32, n_parts: u32, n_live: u32, out_at: u32, lid: u32) {
    for (var i = lid; i < n_live * HEAD4; i += THREADS) {
        let h = i / HEAD4;
        var peak = LOWEST;
        for (var part = 0u; part < n_parts; part++) {
            peak = max(peak, part_load(part_at(group, part, h) + 4u * HEAD4));
        }
        var sum = 0.0;
        var y = vec4(0.0);
        for (var part = 0u; part < n_parts; part++) {
            let at = part_at(group, part, h);
            let weight = exp(part_load(at + 4u * HEAD4) - peak);
            sum += weight * part_load(at + 4u * HEAD4 + 1u);
            let v = at + i % HEAD4 * 4u;
            y += weight * vec4(part_load(v), part_load(v + 1u), part_load(v + 2u),
                               part_load(v + 3u));
        }
        out[out_at + i] = out_store(y / sum);
    }
}

// Cached positions that a token attends to, and who else does it.
struct Span {
    sequence: u32,
    kv_head: u32,
    start: u32,
    end: u32,       // exclusive; perhaps `start`
    part: u32,      // of the tiles, this one and
    n_parts: u32,   // how many
    heads_id: u32,  // of the token and group of heads
    n_heads: u32,   // of the group's HEADS that exist
    out_at: u32,    // where the output of the group's first head belongs
}

// How many parts share `n` positions.
fn parts_of(n: u32) -> u32 {
    return clamp((n + THREADS - 1u) / THREADS, 1u, PARTS);
}

// Threads of one head's softmax, side by side.
fn threads_of_head() -> u32 {
    return THREADS / HEADS;
}

// The cache's row of this thread's position in a tile.
fn row_of(span: Span, tile: u32, lid: u32) -> u32 {
    return cache_row(span.sequence, span.kv_head, min(tile + lid, max(span.end, 1u) - 1u));
}

// The row in the first tile, so that callers can look it up early.
fn first_row_of(span: Span, lid: u32) -> u32 {
    return row_of(span, span.start + span.part * THREADS, lid);
}

// Attends with `queries`; `first_sums` are of positions seen before, relative to `first_peak`, the
// largest of their scores for this thread's head in the softmax. All threads must call it together.
fn attend(span: Span, first_row: u32, first_peak: f32, first_sums: Sums, lid: u32) {
    let part = span.part;
    let n_parts = span.n_parts;
    let v_lane = min(lid % LANES, HEAD4 - 1u);
    let split = lid / LANES;
    let n_splits = THREADS / LANES;  // at most THREADS / 4, so that j + 3 * n_splits < THREADS
    let n_subs = threads_of_head();
    let softmax_head = lid / n_subs;
    let n_maxima = min(n_subs, 16u);  // partial maxima of a head's tile
    if (KEY_LANES == 1u) {
        workgroupBarrier();  // for `queries`
    }
    var row = first_row;
    var peak = first_peak;
    var sums = first_sums;
    for (var tile = span.start + part * THREADS; tile < span.end; tile += n_parts * THREADS) {
        let n = min(THREADS, span.end - tile);
        let own_row = row;
        row = row_of(span, tile + n_parts * THREADS, lid);
        var early: array<act4, 4>;
        if (KEY_LANES == 1u) {
            write_score(lid, own_row, lid);
            workgroupBarrier();
            rows[lid] = own_row;
        } else {
            rows[lid] = own_row;
            workgroupBarrier();
            // The first values are under way while the scores are computed.
            early[0] = v_cache[rows[split] + v_lane];
            early[1] = v_cache[rows[split + n_splits] + v_lane];
            early[2] = v_cache[rows[split + 2u * n_splits] + v_lane];
            early[3] = v_cache[rows[split + 3u * n_splits] + v_lane];
            for (var first = 0u; first < n; first += THREADS / KEY_LANES) {
                let j = first + lid / KEY_LANES;
                write_score(j, rows[j], lid);
            }
            workgroupBarrier();
        }
        if (lid < HEADS * n_maxima) {
            var partial = LOWEST;
            for (var j = lid % n_maxima; j < n; j += n_maxima) {
                partial = max(partial, scores[lid / n_maxima * THREADS + j]);
            }
            maxima[lid] = partial;
        }
        workgroupBarrier();
        var new_peak = peak;
        for (var i = 0u; i < n_maxima; i++) {
            new_peak = max(new_peak, maxima[softmax_head * n_maxima + i]);
        }
        for (var j = lid % n_subs; j < THREADS; j += n_subs) {
            let at = softmax_head * THREADS + j;
            probs[at] = select(0.0, exp(scores[at] - new_peak), j < n);
        }
        if (lid % n_subs == 0u) {
            rescale[softmax_head] = exp(peak - new_peak);
        }
        peak = new_peak;
        workgroupBarrier();
        for (var h = 0u; h < HEADS; h++) {
            sums.weights[h] *= rescale[h];
            sums.values[h] *= rescale[h];
        }
        var begin = split;
        if (KEY_LANES > 1u) {
            add_values(&sums, split, n_splits, act_load(early[0]), act_load(early[1]),
                       act_load(early[2]), act_load(early[3]));
            begin += 4u * n_splits;
        }
        for (var j = begin; j < n; j += 4u * n_splits) {
            // Four loads in flight; beyond n the probability is zero.
            let v0 = act_load(v_cache[rows[j] + v_lane]);
            let v1 = act_load(v_cache[rows[j + n_splits] + v_lane]);
            let v2 = act_load(v_cache[rows[j + 2u * n_splits] + v_lane]);
            let v3 = act_load(v_cache[rows[j + 3u * n_splits] + v_lane]);
            add_values(&sums, j, n_splits, v0, v1, v2, v3);
        }
        if (KEY_LANES > 1u) {
            // Before `rows` change.
            workgroupBarrier();
        }
    }

    // Add up what the splits have.
    workgroupBarrier();
    for (var h = 0u; h < HEADS; h++) {
        scores[h * THREADS + lid] = sums.weights[h];
    }
    if (lid % n_subs == 0u) {
        rescale[softmax_head] = peak;
    }
    for (var h = 0u; h < HEADS; h++) {
        partials[lid] = sums.values[h];
        workgroupBarrier();
        if (lid < HEAD4 && h < span.n_heads) {
            var sum = 0.0;
            var y = vec4(0.0);
            for (var i = lid; i < THREADS; i += LANES) {
                sum += scores[h * THREADS + i];
                y += partials[i];
            }
            if (n_parts == 1u) {
                out[span.out_at + h * HEAD4 + lid] = out_store(y / sum);
            } else {
                let at = part_at(span.heads_id, part, h);
                for (var c = 0u; c < 4u; c++) {
                    part_store(at + lid * 4u + c, y[c]);
                }
                if (lid == 0u) {
                    part_store(at + 4u * HEAD4, rescale[h]);
                    part_store(at + 4u * HEAD4 + 1u, sum);
                }
            }
        }
        workgroupBarrier();
    }
    if (n_parts == 1u) {
        return;
    }
    storageBarrier();
    if (lid == 0u) {
        n_done = atomicAdd(&parts[span.heads_id], 1u) + 1u;
    }
    if (workgroupUniformLoad(&n_done) < n_parts) {
        return;
    }
    storageBarrier();
    combine(span.heads_id, n_parts, span.n_heads, span.out_at, lid);
    if (lid == 0u) {
        atomicStore(&parts[span.heads_id], 0u);
    }
}
