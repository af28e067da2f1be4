// One token per row of logits, in vLLM's order (v1/sample/sampler.py): mask, biases, penalties,
// greedy or temperature, min_p, top_k, top_p, and a draw by the Gumbel trick. Tokens are ordered by
// (logit descending, id ascending) and never sorted: a prefix of that order is found by radix
// selection on (rank, id), seven digits of 8 bits, with histograms of integers in workgroup memory.
// Integer sums have no order, so the result is deterministic.
//
// One workgroup does that for a row, or several look at a slice of it each, and in a second launch
// one chooses. If nothing cuts the order off, each slice has drawn a token already.
#include "include/gumbel.wgsl"
#include "include/sampling_row.wgsl"

struct Params {
    n_rows: u32,
    n_vocab: u32,
    stride4: u32,        // row stride of logits and scratch, in vec4s
    counts_rows: u32,
    counts_stride: u32,
    mask_stride: u32,    // words
    grid_x: u32,
    slice4: u32,         // vec4s of a slice
    n_slices: u32,       // of a row, at most THREADS
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<vec4<f32>>;         // [n_rows, stride4]
@group(0) @binding(2) var<storage, read> rows: array<SamplingRow>;         // [n_rows]
@group(0) @binding(3) var<storage, read> masks: array<u32>;                // [.., mask_stride]
@group(0) @binding(4) var<storage, read> biases: array<vec2<u32>>;         // (token, bits)
// [counts_rows, counts_stride]
@group(0) @binding(5) var<storage, read_write> counts: array<u32>;
@group(0) @binding(6) var<storage, read_write> scratch: array<vec4<f32>>;  // [n_rows, stride4]
@group(0) @binding(7) var<storage, read_write> ids: array<u32>;            // [n_rows]
@group(0) @binding(8) var<storage, read_write> slices: array<Tally>;       // [n_rows, n_slices]

override STAGE: u32 = WHOLE;
const WHOLE: u32 = 0u;   // slices are rows
const TALLY: u32 = 1u;   // first of two launches
const CHOOSE: u32 = 2u;  // second

const THREADS: u32 = 256u;
override LOADS: u32 = 1u;             // vec4s of logits that a thread has under way
const MOST_LOADS: u32 = 4u;
const GROUPS: u32 = 16u;              // threads of the first half of a reduction
const LOWEST: f32 = -3.4028234e38;    // stands for a token that cannot be chosen
const LIMIT: f32 = 3e38;              // logits are clamped to +-LIMIT, penalised ones too
const EXCLUDED: f32 = -3.2e38;        // between LOWEST and -LIMIT
const NO_ID: u32 = 0x7fffffffu;
const INVALID: u32 = 0x80000000u;     // bit of ids: the row is not to be trusted
const PROMPT: u32 = 0x80000000u;      // bit of counts: the token is in the prompt
const NO_MASK: u32 = 0xffffffffu;
const FORBIDDEN: u32 = 0xff800000u;   // bias that forbids a token: -infinity
const GREEDY_BELOW: f32 = 1e-5;       // temperature

// What a thread, and then the workgroup, knows of the tokens that it has seen.
struct Tally {
    score: f32,  // the best token's
    least: f32,  // the least of the threads' best scores: THREADS tokens score no less
    id: u32,     // the best token; NO_ID if none can be chosen
    fault: u32,  // 1 if a logit is NaN or +infinity
}

// Where a histogram crosses the amount asked for. 64-bit numbers are (low, high) words.
struct Crossing {
    bucket: u32,
    need: vec2<u32>,   // what is still to come from the bucket
    total: vec2<u32>,  // what the bucket holds
}

const NOTHING: Tally = Tally(LOWEST, LOWEST, NO_ID, 0u);

var<workgroup> tallies: array<Tally, THREADS>;
var<workgroup> low: array<atomic<u32>, 256>;   // histogram, 64 bits a bucket
var<workgroup> high: array<atomic<u32>, 256>;
var<workgroup> sums: array<vec2<u32>, GROUPS>;
var<workgroup> crossing: Crossing;

fn merge(a: Tally, b: Tally) -> Tally {
    var best = a;
    if (b.score > a.score || (b.score == a.score && b.id < a.id)) {
        best.score = b.score;
        best.id = b.id;
    }
    best.least = min(a.least, b.least);
    best.fault = a.fault | b.fault;
    return best;
}

// The workgroup's tally, in every thread.
fn merge_all(mine: Tally, lid: u32) -> Tally {
    var tally = mine;
    tallies[lid] = tally;
    workgroupBarrier();
    if (lid < GROUPS) {
        for (var i = lid + GROUPS; i < THREADS; i += GROUPS) {
            tally = merge(tally, tallies[i]);
        }
        tallies[lid] = tally;
    }
    workgroupBarrier();
    if (lid == 0u) {
        for (var i = 1u; i < GROUPS; i++) {
            tally = merge(tally, tallies[i]);
        }
        tallies[0] = tally;
    }
    return workgroupUniformLoad(&tallies[0]);
}

// The tally with four more tokens' scores; ids ascend, so that an equal score does not win.
fn with_scores(old: Tally, scores: vec4<f32>, id: u32) -> Tally {
    var tally = old;
    let best = max(max(scores.x, scores.y), max(scores.z, scores.w));
    if (best > tally.score) {
        var lane = select(3u, 2u, scores.z == best);
        lane = select(lane, 1u, scores.y == best);
        tally.id = id + select(lane, 0u, scores.x == best);
        tally.score = best;
    }
    return tally;
}

// Whether a row is drawn from all of its tokens.
fn is_uncut(s: SamplingRow) -> bool {
    return s.min_p <= 0.0 && (s.top_k == 0u || s.top_k >= p.n_vocab) && s.top_p >= 1.0;
}

// Four logits after mask and biases.
fn constrained(raw: vec4<f32>, i: u32, s: SamplingRow) -> vec4<f32> {
    var y = raw;
    if (s.mask_row != NO_MASK) {
        let bits = masks[s.mask_row * p.mask_stride + i / 8u] >> (i % 8u * 4u);
        let allowed = ((vec4(bits) >> vec4(0u, 1u, 2u, 3u)) & vec4(1u)) != vec4(0u);
        y = select(vec4(LOWEST), y, allowed);
    }
    // The first bias from these tokens on, by bisection.
    var at = s.bias_start;
    let end = at + s.n_biases;
    var above = end;
    while (at < above) {
        let middle = (at + above) / 2u;
        if (biases[middle].x < i * 4u) {
            at = middle + 1u;
        } else {
            above = middle;
        }
    }
    for (; at < end && biases[at].x < i * 4u + 4u; at++) {
        let here = vec4(0u, 1u, 2u, 3u) == vec4(biases[at].x - i * 4u);
        let forbidden = biases[at].y == FORBIDDEN;
        let bias = bitcast<f32>(select(biases[at].y, 0u, forbidden));
        let sum = clamp(y + bias, vec4(-LIMIT), vec4(LIMIT));
        let biased = select(sum, vec4(LOWEST), vec4(forbidden));
        y = select(y, biased, here & (y != vec4(LOWEST)));
    }
    return y;
}

fn penalised(logit: f32, id: u32, s: SamplingRow) -> f32 {
    if (logit == LOWEST) {
        return LOWEST;
    }
    let count = counts[s.counts_row * p.counts_stride + id];
    let generated = count & ~PROMPT;
    var y = logit;
    if (count != 0u) {
        y = select(y * s.repetition_penalty, y / s.repetition_penalty, y > 0.0);
    }
    if (generated != 0u) {
        y -= s.frequency_penalty * f32(generated) + s.presence_penalty;
    }
    return clamp(y, -LIMIT, LIMIT);
}

// First pass over vec4s from..to of a row: finds the greatest penalised logit and, if the row is to
// be drawn from, leaves the penalised logits in scratch. In the same launch each thread later reads
// only what it wrote here.
fn prepare(base: u32, slice: vec2<u32>, lid: u32, s: SamplingRow, greedy: bool) -> Tally {
    var tally = NOTHING;
    for (var first = slice.x + lid; first < slice.y; first += LOADS * THREADS) {
        var loaded: array<vec4<f32>, MOST_LOADS>;
        for (var j = 0u; j < LOADS; j++) {
            loaded[j] = logits[base + min(first + j * THREADS, p.stride4 - 1u)];
        }
        for (var j = 0u; j < LOADS; j++) {
            let i = first + j * THREADS;
            if (i >= slice.y) {
                break;
            }
            let x = loaded[j];
            let bits = bitcast<vec4<u32>>(x);
            let id = vec4(i * 4u) + vec4(0u, 1u, 2u, 3u);
            let real = id < vec4(p.n_vocab);
            let finite = (bits & vec4(0x7f800000u)) != vec4(0x7f800000u);
            if (any(real & !finite & (bits != vec4(0xff800000u)))) {
                tally.fault = 1u;
            }
            var y = select(vec4(LOWEST), clamp(x, vec4(-LIMIT), vec4(LIMIT)), real & finite);
            if (s.mask_row != NO_MASK || s.n_biases > 0u) {
                y = constrained(y, i, s);
            }
            if (s.counts_row < p.counts_rows) {
                y = vec4(penalised(y.x, id.x, s), penalised(y.y, id.y, s),
                         penalised(y.z, id.z, s), penalised(y.w, id.w, s));
            }
            tally = with_scores(tally, y, i * 4u);
            if (!greedy) {
                scratch[base + i] = y;
            }
        }
    }
    tally.least = tally.score;
    return merge_all(tally, lid);
}

// The row's tally from those of its slices, in every thread.
fn merge_slices(row: u32, lid: u32) -> Tally {
    var tally = NOTHING;
    if (lid < p.n_slices) {
        tally = slices[row * p.n_slices + lid];
    }
    // The greatest bound is the best: every slice has enough tokens for it.
    tally.least = -tally.least;
    tally = merge_all(tally, lid);
    tally.least = -tally.least;
    return tally;
}

// Bits that ascend as the logit falls; both zeros are one.
fn rank_of(y: f32) -> u32 {
    if (y == 0.0) {
        return 0x7fffffffu;
    }
    let bits = bitcast<u32>(y);
    return select(bits ^ 0x7fffffffu, bits, bits >= 0x80000000u);
}

fn logit_of(rank: u32) -> f32 {
    return bitcast<f32>(select(rank ^ 0x7fffffffu, rank, rank >= 0x80000000u));
}

// Whether a token is in the prefix that ends with `last` = (rank, id).
fn within(rank: u32, id: u32, last: vec2<u32>) -> bool {
    return rank < last.x || (rank == last.x && id <= last.y);
}

// Probability relative to the most probable token, in units of 2^-31.
fn mass_of(y: f32, peak: f32, temperature: f32) -> u32 {
    return u32(exp(max(y - peak, -1e30) / temperature) * 0x1p31f + 0.5);
}

fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let sum = a.x + b.x;
    return vec2(sum, a.y + b.y + select(0u, 1u, sum < a.x));
}

fn subtract(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn bucket_of(i: u32) -> vec2<u32> {
    return vec2(atomicLoad(&low[i]), atomicLoad(&high[i]));
}

// At least 1, at most total.
fn share_of(total: vec2<u32>, share: f32) -> vec2<u32> {
    let part = ceil((f32(total.y) * 0x1p32f + f32(total.x)) * share);
    let words = floor(part * 0x1p-32f);
    let need = vec2(max(u32(part - words * 0x1p32f), select(1u, 0u, words > 0.0)), u32(words));
    return vec2(select(need, total, less(total, need)));
}

// The bucket in which the histogram's running sum reaches `need`, in every thread. The first time
// `need` is a count (by_mass: a share, as bits) of the whole histogram.
fn find_crossing(need: vec2<u32>, first: bool, by_mass: bool, lid: u32) -> Crossing {
    if (lid < GROUPS) {
        var sum = vec2(0u);
        for (var i = lid * 16u; i < lid * 16u + 16u; i++) {
            sum = add(sum, bucket_of(i));
        }
        sums[lid] = sum;
    }
    workgroupBarrier();
    if (lid == 0u) {
        var rest = need;
        if (first) {
            var total = vec2(0u);
            for (var g = 0u; g < GROUPS; g++) {
                total = add(total, sums[g]);
            }
            if (by_mass) {
                rest = share_of(total, bitcast<f32>(need.x));
            } else if (less(total, rest)) {
                rest = total;
            }
        }
        var g = 0u;
        while (g < GROUPS - 1u && less(sums[g], rest)) {
            rest = subtract(rest, sums[g]);
            g++;
        }
        var i = g * 16u;
        while (i < g * 16u + 15u && less(bucket_of(i), rest)) {
            rest = subtract(rest, bucket_of(i));
            i++;
        }
        crossing = Crossing(i, rest, bucket_of(i));
    }
    return workgroupUniformLoad(&crossing);
}

// The end (rank, id) of the shortest prefix of the tokens up to `last` that holds s.top_k tokens
// (by_mass: the share s.top_p of their mass); of all of them if they are too few.
fn select_prefix(base: u32, lid: u32, s: SamplingRow, peak: f32, last: vec2<u32>, by_mass: bool)
    -> vec2<u32> {
    var need = vec2(select(s.top_k, bitcast<u32>(s.top_p), by_mass), 0u);
    var found = vec2(0u);               // leading digits of the end
    var known = vec2(0u, 0xff000000u);  // mask of those digits; ids have three
    for (var d = 0u; d < 7u; d++) {
        let of_rank = d < 4u;
        let shift = select(16u - 8u * (d - 4u), 24u - 8u * d, of_rank);
        atomicStore(&low[lid], 0u);
        atomicStore(&high[lid], 0u);
        workgroupBarrier();
        for (var i = lid; i * 4u < p.n_vocab; i += THREADS) {
            let y = scratch[base + i];
            if (rank_of(max(max(y.x, y.y), max(y.z, y.w))) > last.x) {
                continue;
            }
            for (var c = 0u; c < 4u; c++) {
                let id = i * 4u + c;
                let rank = rank_of(y[c]);
                let open = ((vec2(rank, id) ^ found) & known) == vec2(0u);
                if (all(open) && within(rank, id, last)) {
                    let weight = select(1u, mass_of(y[c], peak, s.temperature), by_mass);
                    let bucket = (select(id, rank, of_rank) >> shift) & 255u;
                    // 64-bit addition: the sum is below a summand exactly if it wrapped.
                    if (weight != 0u && atomicAdd(&low[bucket], weight) + weight < weight) {
                        atomicAdd(&high[bucket], 1u);
                    }
                }
            }
        }
        workgroupBarrier();
        let at = find_crossing(need, d == 0u, by_mass, lid);
        need = at.need;
        let digit = vec2(select(0u, 1u, of_rank), select(1u, 0u, of_rank));
        found |= digit * (at.bucket << shift);
        known |= digit * (255u << shift);
        // Done if no token of the bucket can be left out; those of one rank weigh the same.
        var unit = 1u;
        if (by_mass && d == 3u) {
            unit = mass_of(logit_of(found.x), peak, s.temperature);
        }
        if (less(at.total, add(at.need, vec2(unit, 0u)))) {
            break;
        }
    }
    // The rest of the bucket may reach beyond what was looked at.
    let end = found | ~known;
    return select(last, end, within(end.x, end.y, last));
}

// Four tokens' logits / temperature + noise.
fn scores_of(y: vec4<f32>, i: u32, s: SamplingRow, peak: f32) -> vec4<f32> {
    let noise = gumbel(philox(vec4(i, s.step, 0u, 0u), vec2(s.seed_low, s.seed_high)));
    return max(y - peak, vec4(-1e30)) / s.temperature + noise;
}

// The token with the greatest score among those of a slice up to `last`.
fn draw(base: u32, slice: vec2<u32>, lid: u32, s: SamplingRow, peak: f32, last: vec2<u32>)
    -> Tally {
    var tally = NOTHING;
    for (var i = slice.x + lid; i < slice.y; i += THREADS) {
        let y = scratch[base + i];
        let id = i * 4u;
        let kept = vec4(within(rank_of(y.x), id, last), within(rank_of(y.y), id + 1u, last),
                        within(rank_of(y.z), id + 2u, last), within(rank_of(y.w), id + 3u, last));
        if (any(kept)) {
            let scores = scores_of(y, i, s, peak);
            tally = with_scores(tally, select(vec4(LOWEST), scores, kept), id);
        }
    }
    return merge_all(tally, lid);
}

// The token with the greatest score among those that the slices have drawn.
fn draw_again(base: u32, row: u32, lid: u32, s: SamplingRow, peak: f32) -> Tally {
    var tally = NOTHING;
    if (lid < p.n_slices) {
        tally.id = slices[row * p.n_slices + lid].id;
    }
    if (tally.id != NO_ID) {
        let i = tally.id / 4u;
        tally.score = scores_of(scratch[base + i], i, s, peak)[tally.id % 4u];
    }
    return merge_all(tally, lid);
}

// The token of a row with a temperature, whose most probable token is `top`.
fn choose(base: u32, row: u32, lid: u32, s: SamplingRow, top: Tally) -> u32 {
    let all = vec2(0u, (p.n_vocab + 3u) / 4u);
    if (STAGE == CHOOSE && is_uncut(s)) {
        return draw_again(base, row, lid, s, top.score).id;
    }
    var floor_logit = EXCLUDED;
    if (s.min_p > 0.0) {
        floor_logit = clamp(top.score + s.temperature * log(s.min_p), EXCLUDED, top.score);
    }
    var last = vec2(rank_of(floor_logit), 0xffffffffu);
    if (s.top_k > 0u && s.top_k < p.n_vocab) {
        // So many tokens are no less than top.least that the search can begin there.
        if (s.top_k <= THREADS && top.least > floor_logit) {
            last.x = rank_of(top.least);
        }
        last = select_prefix(base, lid, s, top.score, last, false);
    }
    if (s.top_p < 1.0) {
        last = select_prefix(base, lid, s, top.score, last, true);
    }
    return draw(base, all, lid, s, top.score, last).id;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let index = group.x + group.y * p.grid_x;
    let n_slices = select(1u, p.n_slices, STAGE == TALLY);
    let row = index / n_slices;
    if (row >= p.n_rows) {
        return;
    }
    let s = rows[row];
    let base = row * p.stride4;
    let greedy = s.temperature < GREEDY_BELOW || s.top_k == 1u;
    var top: Tally;
    if (STAGE == CHOOSE) {
        top = merge_slices(row, lid);
    } else {
        let start = index % n_slices * p.slice4;
        let slice = vec2(start, min(start + p.slice4, (p.n_vocab + 3u) / 4u));
        top = prepare(base, slice, lid, s, greedy);
        if (STAGE == TALLY) {
            if (!greedy && top.id != NO_ID && is_uncut(s)) {
                let last = vec2(rank_of(EXCLUDED), 0xffffffffu);
                top.id = draw(base, slice, lid, s, top.score, last).id;
            }
            if (lid == 0u) {
                slices[index] = top;
            }
            return;
        }
    }
    var id = top.id;
    if (!greedy && id != NO_ID) {
        id = choose(base, row, lid, s, top);
    }
    if (lid != 0u) {
        return;
    }
    let none = id == NO_ID;
    if (none || top.fault != 0u) {
        ids[row] = select(id, 0u, none) | INVALID;
        return;
    }
    ids[row] = id;
    if (s.counts_row < p.counts_rows) {
        counts[s.counts_row * p.counts_stride + id] += 1u;
    }
}
