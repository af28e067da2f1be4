// Chooses with a whole workgroup. Every selection is by rank, the number of better ones, which each
// thread counts for itself: few barriers.

var<workgroup> scores: array<vec4<f32>, 256>;  // [n_experts / 4]
var<workgroup> keys: array<vec4<u32>, 256>;    // [n_experts / 4]
var<workgroup> group_keys: array<u32, 32>;     // [n_group]
var<workgroup> chosen: array<u32, 64>;         // [top_k]

fn key_of(expert: u32) -> u32 {
    return keys[expert / 4u][expert % 4u];
}

fn most_of(v: vec4<f32>, lid: u32, n_quads: u32) -> f32 {
    scores[lid] = v;
    workgroupBarrier();
    var most = scores[0];
    for (var q = 1u; q < n_quads; q++) {
        most = max(most, scores[q]);
    }
    workgroupBarrier();
    return max(max(most.x, most.y), max(most.z, most.w));
}

fn total_of(v: vec4<f32>, lid: u32, n_quads: u32) -> f32 {
    scores[lid] = v;
    workgroupBarrier();
    var sums = scores[0];
    for (var q = 1u; q < n_quads; q++) {
        sums += scores[q];
    }
    workgroupBarrier();
    return dot(sums, vec4(1.0));
}

// Best choice of a group, or the sum of the best two if BIAS.
fn group_key(group: u32) -> u32 {
    let size = p.n_experts / p.n_group;
    var first = NOTHING;
    var second = NOTHING;
    for (var e = group * size; e < (group + 1u) * size; e++) {
        let key = key_of(e);
        second = max(second, min(first, key));
        first = max(first, key);
    }
    if (!BIAS || size == 1u || first == NEVER) {
        return first;
    }
    if (second == NEVER) {
        return NEVER;
    }
    return order(vec4(choice_of(first) + choice_of(second))).x;
}

fn group_rank(group: u32) -> u32 {
    let key = group_keys[group];
    var rank = 0u;
    for (var g = 0u; g < p.n_group; g++) {
        rank += u32(group_keys[g] > key - u32(g < group));
    }
    return rank;
}

// Experts that are chosen before this one: greater keys, and equal ones of lower ids.
fn expert_rank(expert: u32, n_quads: u32) -> u32 {
    let key = key_of(expert);
    let own = expert / 4u;
    let lower = vec4(0u, 1u, 2u, 3u) < vec4(expert % 4u);
    var better = vec4<u32>((keys[own] == vec4(key)) & lower);
    for (var q = 0u; q < n_quads; q++) {
        better += vec4<u32>(keys[q] > vec4(key - u32(q < own)));
    }
    return better.x + better.y + better.z + better.w;
}

fn weight_of(expert: u32) -> f32 {
    return select(0.0, scores[expert / 4u][expert % 4u], key_of(expert) != NEVER);
}

// Stores the experts with the greatest keys and their scores; this thread has four of each. All
// threads must call it together.
fn pick(token: u32, s: vec4<f32>, own_keys: vec4<u32>, lid: u32, n_quads: u32) {
    var key = own_keys;
    let experts = vec4(lid * 4u) + vec4(0u, 1u, 2u, 3u);
    scores[lid] = s;
    keys[lid] = key;
    workgroupBarrier();
    if (p.n_group > 1u) {
        if (lid < p.n_group) {
            group_keys[lid] = group_key(lid);
        }
        workgroupBarrier();
        for (var c = 0u; c < 4u; c++) {
            let in_group = experts[c] / (p.n_experts / p.n_group);
            if (in_group < p.n_group && group_rank(in_group) >= p.topk_group) {
                key[c] = NEVER;
            }
        }
        keys[lid] = key;
        workgroupBarrier();
    }
    for (var e = lid; e < p.n_experts; e += THREADS) {
        let rank = expert_rank(e, n_quads);
        if (rank < p.top_k) {
            chosen[rank] = e;
        }
    }
    workgroupBarrier();
    if (lid < p.top_k) {
        var sum = 0.0;
        for (var j = 0u; j < p.top_k; j++) {
            sum += weight_of(chosen[j]);
        }
        let expert = chosen[lid];
        store(token * p.top_k + lid, expert, weight_of(expert), sum, key_of(chosen[0]) != NEVER);
    }
}
