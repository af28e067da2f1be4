// Chooses within a subgroup that has all experts, four a thread, and no groups of them: the best of
// those that are left, top_k times. Other subgroups do the same with nothing, and store nothing.

fn most_of(v: vec4<f32>, lid: u32, n_quads: u32) -> f32 {
    return subgroupMax(max(max(v.x, v.y), max(v.z, v.w)));
}

fn total_of(v: vec4<f32>, lid: u32, n_quads: u32) -> f32 {
    return subgroupAdd(dot(v, vec4(1.0)));
}

// Stores the experts with the greatest keys and their scores; this thread has four of each.
fn pick(token: u32, s: vec4<f32>, own_keys: vec4<u32>, lid: u32, n_quads: u32) {
    var left = own_keys;
    let experts = vec4(lid * 4u) + vec4(0u, 1u, 2u, 3u);
    var own = 0u;           // what this thread's slot gets
    var own_weight = 0.0;
    var sum = 0.0;
    var any_possible = false;
    for (var slot = 0u; slot < p.top_k; slot++) {
        let best = subgroupMax(max(max(left.x, left.y), max(left.z, left.w)));
        let equal = select(vec4(0xffffffffu), experts, left == vec4(best));
        let expert = subgroupMin(min(min(equal.x, equal.y), min(equal.z, equal.w)));
        let here = experts == vec4(expert);
        // One thread has it, the others add nothing.
        let weight = subgroupAdd(dot(select(vec4(0.0), s, here & vec4(best != NEVER)), vec4(1.0)));
        left = select(left, vec4(NOTHING), here);
        any_possible = any_possible || best != NEVER;
        sum += weight;
        if (lid == slot) {
            own = expert;
            own_weight = weight;
        }
    }
    if (lid < p.top_k) {
        store(token * p.top_k + lid, own, own_weight, sum, any_possible);
    }
}
