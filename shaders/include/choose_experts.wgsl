// Chooses a token's experts from its logits, optionally of the best groups only (DeepSeek-V3 and
// vLLM's grouped_topk), in one order for all devices. Expects THREADS, at least top_k, n_group and
// n_experts / 4, the outputs `ids` and `routed`, and in scope `logit_bits(token, expert)` and
// `bias_bits(expert)`.
#include "include/pick_{pick}.wgsl"

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

// Zeros and subnormals, which some devices flush, are equal.
fn order(choice: vec4<f32>) -> vec4<u32> {
    var bits = bitcast<vec4<u32>>(choice);
    bits = select(bits, vec4(0u), (bits & vec4(INFINITY)) == vec4(0u));
    return select(bits | vec4(SIGN), ~bits, bits >= vec4(SIGN));
}

fn choice_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key ^ SIGN, key >= SIGN));
}

// Scores of this thread's experts, zero where not live. All threads must call it together.
fn score(logit: vec4<f32>, live: vec4<bool>, lid: u32, n_quads: u32) -> vec4<f32> {
    if (SOFTMAX) {
        let peak = most_of(select(vec4(LOWEST), logit, live), lid, n_quads);
        let power = select(vec4(0.0), exp(logit - peak), live);
        // At least 1, from the peak; less only if no logit is finite.
        return power / max(total_of(power, lid, n_quads), 1.0);
    }
    if (SIGMOID) {
        // exp never overflows so.
        let power = exp(-abs(logit));
        let logistic = select(power, vec4(1.0), logit >= vec4(0.0)) / (1.0 + power);
        return select(vec4(0.0), logistic, live);
    }
    return logit;
}

// Stores what is in a slot, if anything can be chosen at all. `sum` is of all slots' weights.
fn store(at: u32, expert: u32, weight: f32, sum: f32, any_possible: bool) {
    var w = 0.0;
    if (any_possible) {
        w = weight * p.scale;
        if (p.renormalize != 0u) {
            w /= sum + 1e-20;
        }
    } else if (p.renormalize != 0u) {
        w = 1.0 / f32(p.top_k);
    }
    ids[at] = i32(expert);
    routed[at] = w;
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
    pick(token, s, key, lid, n_quads);
}

// What padding gets.
fn choose_none(token: u32, lid: u32) {
    if (lid < p.top_k) {
        ids[token * p.top_k + lid] = -1;
        routed[token * p.top_k + lid] = 0.0;
    }
}
