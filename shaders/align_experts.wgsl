// Sorts (token, slot) entries by expert and pads each expert's segment to whole blocks (vLLM's
// moe_align_block_size), stably: entries of one expert keep their order. Two steps: count each
// workgroup's entries by expert; scatter them. Few entries are left to one workgroup, which takes
// both steps.

struct Params {
    n_entries: u32,      // tokens * top_k; also the sentinel
    n_experts: u32,
    block_size: u32,
    chunk: u32,          // entries at a time: n_experts times as many bits fit in `members`
    group_entries: u32,  // entries of a workgroup, whole chunks
    n_groups: u32,
    n_sorted: u32,       // length of sorted_token_ids
    n_blocks: u32,       // length of expert_ids
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;                      // [n_entries]
@group(0) @binding(2) var<storage, read_write> sorted_token_ids: array<u32>;   // [n_sorted]
@group(0) @binding(3) var<storage, read_write> expert_ids: array<i32>;         // [n_blocks]
@group(0) @binding(4) var<storage, read_write> num_tokens_post_pad: array<u32>; // [1]
@group(0) @binding(5) var<storage, read_write> counts: array<u32>;  // [n_groups, n_experts]

override COUNT: bool = true;
override SCATTER: bool = true;

const THREADS: u32 = 256u;

// Entries by expert, then the place of each expert's next one.
var<workgroup> places: array<atomic<u32>, 1024>;
var<workgroup> quad_totals: array<u32, THREADS>;
// Which of a chunk's entries an expert has, 32 in a word. [n_experts, chunk / 32]
var<workgroup> members: array<atomic<u32>, 2048>;

// Clears the workgroup's share of the outputs.
fn clear(group: u32, lid: u32) {
    let stride = p.n_groups * THREADS;
    for (var i = group * THREADS + lid; i < p.n_sorted; i += stride) {
        sorted_token_ids[i] = p.n_entries;
    }
    for (var i = group * THREADS + lid; i < p.n_blocks; i += stride) {
        expert_ids[i] = -1;
    }
}

fn count(group: u32, lid: u32) {
    for (var e = lid; e < p.n_experts; e += THREADS) {
        atomicStore(&places[e], 0u);
    }
    workgroupBarrier();
    let first = group * p.group_entries;
    let end = min(first + p.group_entries, p.n_entries);
    for (var i = first + lid; i < end; i += THREADS) {
        // Negative ids are large as u32.
        let expert = ids[i];
        if (expert < p.n_experts) {
            atomicAdd(&places[expert], 1u);
        }
    }
    workgroupBarrier();
}

// Finds where each expert's entries of this workgroup begin: behind those of lower experts, padded,
// and of earlier workgroups.
fn scan(group: u32, lid: u32) {
    var padded = vec4(0u);
    var earlier = vec4(0u);
    for (var c = 0u; c < 4u; c++) {
        let e = lid * 4u + c;
        if (e < p.n_experts) {
            var sum = 0u;
            if (COUNT) {
                sum = atomicLoad(&places[e]);
            } else {
                for (var g = 0u; g < p.n_groups; g++) {
                    let n = counts[g * p.n_experts + e];
                    sum += n;
                    earlier[c] += select(0u, n, g < group);
                }
            }
            padded[c] = (sum + p.block_size - 1u) / p.block_size * p.block_size;
        }
    }
    quad_totals[lid] = padded.x + padded.y + padded.z + padded.w;
    workgroupBarrier();
    var start = 0u;
    for (var t = 0u; t < min(lid, (p.n_experts + 3u) / 4u); t++) {
        start += quad_totals[t];
    }
    for (var c = 0u; c < 4u; c++) {
        if (lid * 4u + c < p.n_experts) {
            atomicStore(&places[lid * 4u + c], start + earlier[c]);
        }
        start += padded[c];
    }
    if (group == 0u && lid == THREADS - 1u) {
        num_tokens_post_pad[0] = start;
    }
}

// Writes a chunk's entries to their places. An entry that opens a block names its expert.
fn scatter(first: u32, lid: u32) {
    let words = p.chunk / 32u;
    for (var i = lid; i < p.n_experts * words; i += THREADS) {
        atomicStore(&members[i], 0u);
    }
    workgroupBarrier();
    let n = min(p.chunk, p.n_entries - first);
    for (var i = lid; i < n; i += THREADS) {
        let expert = ids[first + i];
        if (expert < p.n_experts) {
            atomicOr(&members[expert * words + i / 32u], 1u << (i % 32u));
        }
    }
    workgroupBarrier();
    for (var i = lid; i < n; i += THREADS) {
        let expert = ids[first + i];
        if (expert < p.n_experts) {
            let row = expert * words;
            let below = (1u << (i % 32u)) - 1u;
            var at = atomicLoad(&places[expert])
                + countOneBits(atomicLoad(&members[row + i / 32u]) & below);
            for (var w = 0u; w < i / 32u; w++) {
                at += countOneBits(atomicLoad(&members[row + w]));
            }
            sorted_token_ids[at] = first + i;
            if (at % p.block_size == 0u) {
                expert_ids[at / p.block_size] = i32(expert);
            }
        }
    }
    workgroupBarrier();
    for (var e = lid; e < p.n_experts; e += THREADS) {
        var more = 0u;
        for (var w = 0u; w < words; w++) {
            more += countOneBits(atomicLoad(&members[e * words + w]));
        }
        atomicAdd(&places[e], more);
    }
    workgroupBarrier();
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    if (COUNT) {
        clear(group.x, lid);
        count(group.x, lid);
        if (!SCATTER) {
            for (var e = lid; e < p.n_experts; e += THREADS) {
                counts[group.x * p.n_experts + e] = atomicLoad(&places[e]);
            }
        }
        storageBarrier();
    }
    if (SCATTER) {
        scan(group.x, lid);
        workgroupBarrier();
        let first = group.x * p.group_entries;
        for (var i = 0u; i < p.group_entries && first + i < p.n_entries; i += p.chunk) {
            scatter(first + i, lid);
        }
    }
}
