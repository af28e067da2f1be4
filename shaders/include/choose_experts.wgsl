// Chooses a token's experts from its logits, optionally of the best groups only (DeepSeek-V3 and
// vLLM's grouped_topk), with a whole workgroup. Every selection is by rank, the number of better
// ones, which each thread counts for itself: few barriers, and one order for all devices. Expects
// THREADS, at least top_k, n_group and n_experts / 4, the outputs `ids` and `routed`, and in scope
// `logit_bits(token, expert)` and `bias_bits(expert)`.

override BIAS: bool = false;
override SOFTMAX: bool = false;
override SIGMOID: bool = false;

const PADDING: u32 = 0xffffffffu;   // slot of a token that is none
const INFINITY: u32 = 0x7f800000u;  // bits; those of NaN and infinities include them
const SIGN: u32 = 0x80000000u;
const LOWEST: f32 = -3.4028234e38;

// Choice scores as integers of the same order. Floats begin above these two.
const NOTHING: u32 = 0u;  // past the last expert
const NEVER: u32 = 1u;    // minus infinity: not finite, or in a dropped group

var<workgroup> scores: array<vec4<f32>, 256>;  // [n_experts / 4]
var<workgroup> keys: array<vec4<u32>, 256>;    // [n_experts / 4]
var<workgroup> group_keys: array<u32, 32>;     // [n_group]
var<workgroup> chosen: array<u32, 64>;         // [top_k]

// Zeros and subnormals, which some devices flush, are equal.
fn order(choice: vec4<f32>) -> vec4<u32> {
    var bits = bitcast<vec4<u32>>(choice);
    bits = select(bits, vec4(0u), (bits & vec4(INFINITY)) == vec4(0u));
    return select(bits | vec4(SIGN), ~bits, bits >= vec4(SIGN));
}

fn choice_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key ^ SIGN, key >= SIGN));
}

fn key_of(expert: u32) -> u32 {
    return keys[expert / 4u][expert % 4u];
}

// Scores of this thread's experts, zero where not live. All threads must call it together.
fn score(logit: vec4<f32>, live: vec4<bool>, lid: u32, n_quads: u32) -> vec4<f32> {
    if (SOFTMAX) {
        scores[lid] = select(vec4(LOWEST), logit, live);
        workgroupBarrier();
        var most = scores[0];
        for (var q = 1u; q < n_quads; q++) {
            most = max(most, scores[q]);
        }
        let peak = max(max(most.x, most.y), max(most.z, most.w));
        workgroupBarrier();
        let power = select(vec4(0.0), exp(logit - peak), live);
        scores[lid] = power;
        workgroupBarrier();
        var sums = scores[0];
        for (var q = 1u; q < n_quads; q++) {
            sums += scores[q];
        }
        workgroupBarrier();
        // At least 1, from the peak; less only if no logit is finite.
        return power / max(dot(sums, vec4(1.0)), 1.0);
    }
    if (SIGMOID) {
        // exp never overflows so.
        let power = exp(-abs(logit));
        let logistic = select(power, vec4(1.0), logit >= vec4(0.0)) / (1.0 + power);
        return select(vec4(0.0), logistic, live);
    }
    return logit;
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

fn store(at: u32, slot: u32) {
    var weight = 0.0;
    if (key_of(chosen[0]) != NEVER) {
        weight = weight_of(chosen[slot]) * p.scale;
        if (p.renormalize != 0u) {
            var sum = 0.0;
            for (var j = 0u; j < p.top_k; j++) {
                sum += weight_of(chosen[j]);
            }
            weight /= sum + 1e-20;
        }
    } else if (p.renormalize != 0u) {
        weight = 1.0 / f32(p.top_k);
    }
    ids[at] = i32(chosen[slot]);
    routed[at] = weight;
}

// All threads of the workgroup must call it together.
fn choose(token: u32, lid: u32) {
    // This thread's four experts.
    let n_quads = (p.n_experts + 3u) / 4u;
    let experts = vec4(lid * 4u) + vec4(0u, 1u, 2u, 3u);
    var x_bits = vec4(INFINITY);
    var b_bits = vec4(0u);
    for (var c = 0u; c < 4u; c++) {
        if (experts[c] < p.n_experts) {
            x_bits[c] = logit_bits(token, experts[c]);
            if (BIAS) {
                b_bits[c] = bias_bits(experts[c]);
            }
        }
    }
    let live = (x_bits & vec4(INFINITY)) != vec4(INFINITY);
    let logit = bitcast<vec4<f32>>(select(vec4(0u), x_bits, live));
    let s = score(logit, live, lid, n_quads);
    let possible = live & ((b_bits & vec4(INFINITY)) != vec4(INFINITY));
    let b = bitcast<vec4<f32>>(select(vec4(0u), b_bits, possible));
    var key = select(vec4(NEVER), order(s + b), possible);
    key = select(vec4(NOTHING), key, experts < vec4(p.n_experts));
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
        store(token * p.top_k + lid, lid);
    }
}

// What padding gets.
fn choose_none(token: u32, lid: u32) {
    if (lid < p.top_k) {
        ids[token * p.top_k + lid] = -1;
        routed[token * p.top_k + lid] = 0.0;
    }
}
