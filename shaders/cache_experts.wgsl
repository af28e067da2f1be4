// Decides which of the chosen experts must come to the device, and whose slots they get: one turn
// of a layer that has slots for some of its experts. A single workgroup, since each choice depends
// on all others. Experts beyond the slots take later turns, by their numbers.

struct Params {
    n: u32,          // tokens * top_k
    n_experts: u32,
    n_slots: u32,
    turn: u32,
    by_uses: u32,    // 1: the expert used least goes, 0: the one not used for longest
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<i32>;             // [tokens, top_k]
// Header; slot + 1 of each expert, 0 elsewhere; expert + 1 of each slot; turn of each expert's last
// use; its uses. [HEADER + 3 n_experts + n_slots]
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
// Number of moves, 0; then expert and slot of each. [1 + n_slots, 2]
@group(0) @binding(3) var<storage, read_write> moves: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<i32>;       // [tokens, top_k]

const THREADS: u32 = 256u;
const HEADER: u32 = 8u;
const MOST_EXPERTS: u32 = 1024u;
const WORDS: u32 = MOST_EXPERTS / 32u;
// Uses older than so many turns count half.
const HALF_LIFE: u32 = 64u;
const NEVER: u32 = 0xffffffffu;

// Bits of experts: chosen by any token; of those, served in this turn; of those, not in a slot.
var<workgroup> chosen: array<atomic<u32>, WORDS>;
var<workgroup> wanted: array<atomic<u32>, WORDS>;
var<workgroup> missing: array<atomic<u32>, WORDS>;
// The last by number. [missing experts]
var<workgroup> coming: array<u32, MOST_EXPERTS>;
// Who keeps a slot for longer: the greater one. [n_slots]
var<workgroup> worth: array<vec2<u32>, MOST_EXPERTS>;

fn bit(e: u32) -> u32 { return 1u << (e % 32u); }

// Chosen and missing experts with lower numbers.
fn chosen_before(e: u32) -> u32 {
    var n = countOneBits(atomicLoad(&chosen[e / 32u]) & (bit(e) - 1u));
    for (var w = 0u; w < e / 32u; w++) {
        n += countOneBits(atomicLoad(&chosen[w]));
    }
    return n;
}

fn missing_before(e: u32) -> u32 {
    var n = countOneBits(atomicLoad(&missing[e / 32u]) & (bit(e) - 1u));
    for (var w = 0u; w < e / 32u; w++) {
        n += countOneBits(atomicLoad(&missing[w]));
    }
    return n;
}

fn is_wanted(e: u32) -> bool { return (atomicLoad(&wanted[e / 32u]) & bit(e)) != 0u; }

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) lid: u32) {
    let slot_of = HEADER;
    let expert_of = slot_of + p.n_experts;
    let last_use = expert_of + p.n_slots;
    let n_uses = last_use + p.n_experts;
    for (var w = lid; w < WORDS; w += THREADS) {
        atomicStore(&chosen[w], 0u);
        atomicStore(&wanted[w], 0u);
        atomicStore(&missing[w], 0u);
    }
    workgroupBarrier();
    for (var i = lid; i < p.n; i += THREADS) {
        let id = ids[i];
        if (id >= 0 && u32(id) < p.n_experts) {
            atomicOr(&chosen[u32(id) / 32u], bit(u32(id)));
        }
    }
    workgroupBarrier();
    let n_chosen = chosen_before(MOST_EXPERTS - 1u);
    let first = p.turn * p.n_slots;
    let n_wanted = min(max(n_chosen, first) - first, p.n_slots);
    let now = state[0] + 1u;
    if (n_wanted > 0u) {
        for (var e = lid; e < p.n_experts; e += THREADS) {
            var uses = state[n_uses + e];
            if (now % HALF_LIFE == 0u) {
                uses /= 2u;
            }
            let is_chosen = (atomicLoad(&chosen[e / 32u]) & bit(e)) != 0u;
            if (is_chosen && chosen_before(e) / p.n_slots == p.turn) {
                atomicOr(&wanted[e / 32u], bit(e));
                if (state[slot_of + e] == 0u) {
                    atomicOr(&missing[e / 32u], bit(e));
                }
                state[last_use + e] = now;
                uses += 1u;
            }
            state[n_uses + e] = uses;
        }
    }
    storageBarrier();
    workgroupBarrier();
    for (var e = lid; e < p.n_experts; e += THREADS) {
        if ((atomicLoad(&missing[e / 32u]) & bit(e)) != 0u) {
            coming[missing_before(e)] = e;
        }
    }
    for (var s = lid; s < p.n_slots; s += THREADS) {
        let held = state[expert_of + s];
        var value = vec2(0u);
        if (held > 0u) {
            value = vec2(1u + select(0u, state[n_uses + held - 1u], p.by_uses != 0u),
                         state[last_use + held - 1u]);
            if (is_wanted(held - 1u)) {
                value.x = NEVER;
            }
        }
        worth[s] = value;
    }
    workgroupBarrier();
    let n_missing = missing_before(MOST_EXPERTS - 1u);
    for (var s = lid; s < p.n_slots && n_missing > 0u; s += THREADS) {
        let mine = worth[s];
        if (mine.x == NEVER) {
            continue;
        }
        var rank = 0u;
        for (var t = 0u; t < p.n_slots; t++) {
            let other = worth[t];
            let is_less = other.x < mine.x || (other.x == mine.x && other.y < mine.y);
            let is_same = all(other == mine) && t < s;
            rank += select(0u, 1u, is_less || is_same);
        }
        if (rank < n_missing) {
            let expert = coming[rank];
            let held = state[expert_of + s];
            if (held > 0u) {
                state[slot_of + held - 1u] = 0u;
            }
            state[slot_of + expert] = s + 1u;
            state[expert_of + s] = expert + 1u;
            moves[2u + 2u * rank] = expert;
            moves[3u + 2u * rank] = s;
        }
    }
    storageBarrier();
    workgroupBarrier();
    for (var i = lid; i < p.n; i += THREADS) {
        let id = ids[i];
        var slot = -1;
        if (id >= 0 && u32(id) < p.n_experts && is_wanted(u32(id))) {
            slot = i32(state[slot_of + u32(id)]) - 1;
        }
        out[i] = slot;
    }
    if (lid == 0u) {
        moves[0] = n_missing;
        moves[1] = 0u;
        if (n_wanted > 0u) {
            state[0] = now;
            state[1] += n_wanted - n_missing;
            state[2] += n_missing;
            state[3] += select(0u, 1u, n_missing > 0u);
            state[4] += select(0u, 1u, p.turn > 0u);
        }
    }
}
