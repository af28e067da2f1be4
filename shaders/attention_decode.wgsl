// Causal attention of single tokens over the paged cache, with an online softmax (Milakov and
// Gimelshein 2018). One workgroup per token and HEADS query heads of one key/value head, so that
// keys and values are read once for all of them. A tile has one position per thread for the
// scores; for the values, threads lie across the head (coalesced) and split the positions.
//
// With PARTS > 1, several workgroups share the tiles of a long context (Dao et al. 2023, "flash
// decoding"), and the last of them to finish adds up what they have found. Parts pass between
// workgroups, so a storage barrier has to order them for the whole device.
#include "include/act_{act}.wgsl"
#include "include/out_{out}.wgsl"
#include "include/paged_cache.wgsl"

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;       // [n_tokens, q_stride4]
// [n_blocks, n_kv_heads, block_size, HEAD4]
@group(0) @binding(2) var<storage, read> k_cache: array<act4>;
@group(0) @binding(3) var<storage, read> v_cache: array<act4>;
@group(0) @binding(4) var<storage, read> tokens: array<vec4<u32>>;  // (position, slot, sequence, 0)
@group(0) @binding(5) var<storage, read> block_tables: array<u32>;  // [n_sequences, max_blocks]
@group(0) @binding(6) var<storage, read_write> out: array<out4>;    // [n_tokens, out_stride4]
// Bits of what parts have found, with the largest score and the sum of a head behind its values.
// [n_tokens * groups of heads, PARTS, HEADS, 4 * HEAD4 + 2]
@group(0) @binding(7) var<storage, read_write> parts: array<atomic<u32>>;
// How many parts are done, zero before and after. [n_tokens * groups of heads]
@group(0) @binding(8) var<storage, read_write> done: array<atomic<u32>>;

override LANES: u32 = 16u;  // threads across a head: HEAD4 as a power of two, at least 4
override HEADS: u32 = 1u;   // query heads at once: a power of two, at most 8; HEADS * HEAD4 <= 256
override PARTS: u32 = 1u;   // workgroups that share the tiles, at most

override THREADS: u32 = 128u;  // at most MOST, at least LANES and HEADS

const MOST: u32 = 128u;
const PADDING: u32 = 0xffffffffu;
const LOWEST: f32 = -1e38;

var<workgroup> queries: array<vec4<f32>, 256>;       // [HEADS, HEAD4], scaled
var<workgroup> scores: array<f32, 1024>;             // [HEADS, THREADS]
var<workgroup> probs: array<f32, 1024>;              // [HEADS, THREADS], not yet normalised
var<workgroup> rows: array<u32, MOST>;            // of the tile's positions in the cache
var<workgroup> maxima: array<f32, MOST>;          // [HEADS, n_maxima]
var<workgroup> rescale: array<f32, 8>;               // [HEADS]: what a larger maximum costs
var<workgroup> partials: array<vec4<f32>, MOST>;  // [THREADS / LANES, LANES]
var<workgroup> n_done: u32;

fn write_scores(row: u32, live: bool, lid: u32) {
    var s: array<f32, 8>;
    if (live) {
        for (var i = 0u; i < HEAD4; i++) {
            let k = act_load(k_cache[row + i]);
            for (var h = 0u; h < HEADS; h++) {
                s[h] += dot(k, queries[h * HEAD4 + i]);
            }
        }
    }
    for (var h = 0u; h < HEADS; h++) {
        scores[h * THREADS + lid] = s[h];
    }
}

// Index of what a part has found for head h, in words.
fn part_at(group: u32, part: u32, h: u32) -> u32 {
    return ((group * PARTS + part) * HEADS + h) * (4u * HEAD4 + 2u);
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

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = group.y + group.z * p.grid_y;
    if (token >= p.n_items) {
        return;
    }
    let share = p.n_heads / p.n_kv_heads;  // query heads of a key/value head
    let n_groups = (share + HEADS - 1u) / HEADS;  // of query heads
    let heads_id = group.x / PARTS;
    let part = group.x % PARTS;
    let kv_head = heads_id / n_groups;
    let first_head = heads_id % n_groups * HEADS;
    let n_live = min(HEADS, share - first_head);
    let head_at = (kv_head * share + first_head) * HEAD4;
    let out_at = token * p.out_stride4;
    if (group.x == 0u) {
        for (var i = p.n_heads * HEAD4 + lid; i < p.out_stride4; i += THREADS) {
            out[out_at + i] = out_store(vec4(0.0));
        }
    }
    let t = tokens[token];
    if (t.y == PADDING) {
        if (part > 0u) {
            return;
        }
        for (var i = lid; i < n_live * HEAD4; i += THREADS) {
            out[out_at + head_at + i] = out_store(vec4(0.0));
        }
        return;
    }
    let end = t.x + 1u;
    let start = end - min(end, p.window);
    let n_parts = min(PARTS, (end - start + THREADS - 1u) / THREADS);
    if (part >= n_parts) {
        return;
    }
    for (var i = lid; i < HEADS * HEAD4; i += THREADS) {
        var v = vec4(0.0);
        if (i < n_live * HEAD4) {
            v = q[token * p.q_stride4 + head_at + i] * p.scale;
        }
        queries[i] = v;
    }
    workgroupBarrier();

    let v_lane = min(lid % LANES, HEAD4 - 1u);
    let split = lid / LANES;
    let n_splits = THREADS / LANES;  // at most THREADS / 4, so that j + 3 * n_splits < THREADS
    let n_subs = THREADS / HEADS;  // threads of one head's softmax
    let softmax_head = lid / n_subs;
    let n_maxima = min(n_subs, 16u);  // partial maxima of a head's tile
    var peak = LOWEST;
    var sums: array<f32, 8>;       // [HEADS] of this split
    var acc: array<vec4<f32>, 8>;  // [HEADS] of this split and lane
    for (var tile = start + part * THREADS; tile < end; tile += n_parts * THREADS) {
        let n = min(THREADS, end - tile);
        let row = cache_row(t.z, kv_head, min(tile + lid, t.x));
        write_scores(row, lid < n, lid);
        workgroupBarrier();
        rows[lid] = row;
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
            sums[h] *= rescale[h];
            acc[h] *= rescale[h];
        }
        for (var j = split; j < n; j += 4u * n_splits) {
            // Four loads in flight; beyond n the probability is zero.
            let v0 = act_load(v_cache[rows[j] + v_lane]);
            let v1 = act_load(v_cache[rows[j + n_splits] + v_lane]);
            let v2 = act_load(v_cache[rows[j + 2u * n_splits] + v_lane]);
            let v3 = act_load(v_cache[rows[j + 3u * n_splits] + v_lane]);
            for (var h = 0u; h < HEADS; h++) {
                let at = h * THREADS + j;
                let w = vec4(probs[at], probs[at + n_splits], probs[at + 2u * n_splits],
                             probs[at + 3u * n_splits]);
                sums[h] += w.x + w.y + w.z + w.w;
                acc[h] += w.x * v0 + w.y * v1 + w.z * v2 + w.w * v3;
            }
        }
    }

    // Add up what the splits have.
    workgroupBarrier();
    for (var h = 0u; h < HEADS; h++) {
        scores[h * THREADS + lid] = sums[h];
    }
    if (lid % n_subs == 0u) {
        rescale[softmax_head] = peak;
    }
    let heads_at = token * (p.n_kv_heads * n_groups) + heads_id;
    for (var h = 0u; h < HEADS; h++) {
        partials[lid] = acc[h];
        workgroupBarrier();
        if (lid < HEAD4 && h < n_live) {
            var sum = 0.0;
            var y = vec4(0.0);
            for (var i = lid; i < THREADS; i += LANES) {
                sum += scores[h * THREADS + i];
                y += partials[i];
            }
            if (n_parts == 1u) {
                out[out_at + head_at + h * HEAD4 + lid] = out_store(y / sum);
            } else {
                let at = part_at(heads_at, part, h);
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
        n_done = atomicAdd(&done[heads_at], 1u) + 1u;
    }
    if (workgroupUniformLoad(&n_done) < n_parts) {
        return;
    }
    storageBarrier();
    combine(heads_at, n_parts, n_live, out_at + head_at, lid);
    if (lid == 0u) {
        atomicStore(&done[heads_at], 0u);
    }
}
