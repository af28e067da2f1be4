// Dot products of four neighbouring weight rows, or of SETS times four, with up to 8 activation
// rows, 16 bytes of weights a lane and load. Expects `weights`, a weight format and
// `activation(t, row, col4)`, the vec4 of an activation row, in scope.

override THREADS: u32 = 64u;

// Tokens that share one reading of the weights; at most 8.
override TOKENS: u32 = 1u;

// 2: rows further down, the ups of gates, at the same time.
override SETS: u32 = 1u;

// Threads that share the chunks of a row, those that add up to its sum, and those that do so
// without a barrier of the workgroup: powers of two.
override LANES: u32 = 8u;
override SHARE: u32 = 8u;
override SUBLANES: u32 = 8u;

// Chunks in a row, to unroll the loop over them: all loads of a lane are under way at once, which
// hides the latency of a GPU's memory but makes long code. 0: as many as the parameters say.
override CHUNKS: u32 = 0u;

// Whether code is kept short: a CPU's driver takes seconds to compile loops that it unrolls.
override SHORT: bool = false;

// Whether squares of activations are summed, too.
override NORM: bool = false;

// This thread's part of the sums, [TOKENS, SETS].
var<private> dots: array<vec4<f32>, 16>;
var<private> squares: array<f32, 8>;

// Sums over SUBLANES threads. [THREADS / SUBLANES, TOKENS * SETS] and [.., TOKENS]
var<workgroup> part_dots: array<vec4<f32>, 256>;
var<workgroup> part_squares: array<f32, 128>;

// Adds the products of vec4 `i` of a chunk, with `i` written out by callers: an indexed vector is
// slow where a driver does not unroll loops, and so is an indexed array, hence the case of one
// token. Weights are unpacked once for all tokens.
fn add_vec4(w: Quad, u: Quad, i: u32, x_row: u32, n_live: u32, c: u32) {
    let col4 = c * (CHUNK / 4u) + i;
    let rows = quad_vec4(w, i);
    var up_rows = rows;
    if (SETS == 2u) {
        up_rows = quad_vec4(u, i);
    }
    if (TOKENS == 1u) {
        let x = activation(0u, x_row, col4);
        dots[0] = add_products(dots[0], rows, w.scale, x);
        if (SETS == 2u) {
            dots[1] = add_products(dots[1], up_rows, u.scale, x);
        }
        return;
    }
    for (var t = 0u; t < select(TOKENS, n_live, SHORT); t++) {
        let x = activation(t, x_row + min(t, n_live - 1u), col4);
        dots[t * SETS] = add_products(dots[t * SETS], rows, w.scale, x);
        if (SETS == 2u) {
            dots[t * SETS + 1u] = add_products(dots[t * SETS + 1u], up_rows, u.scale, x);
        }
    }
}

fn add_products(sum: vec4<f32>, rows: mat4x4<f32>, scale: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    if (SHORT || !scale_is_per_row()) {
        return sum + scale * (x * rows);
    }
    // GPUs multiply and add in one operation, also what the sum begins with.
    let r = transpose(rows);
    let half = fma(vec4(x.y), r[1], fma(vec4(x.x), r[0], sum));
    return fma(vec4(x.w), r[3], fma(vec4(x.z), r[2], half));
}

// A chunk of each of four neighbouring rows.
struct Quad {
    c0: vec4<u32>,
    c1: vec4<u32>,
    c2: vec4<u32>,
    c3: vec4<u32>,
    scale: vec4<f32>,
}

fn load_quad(row: u32, c: u32) -> Quad {
    let at = row * p.n_chunks + c * 4u;
    var scale = vec4(1.0);
    if (!scale_is_per_row()) {
        scale = scales4(row, c);
    }
    return Quad(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u], scale);
}

// Vec4 `i` of each row, as columns.
fn quad_vec4(quad: Quad, i: u32) -> mat4x4<f32> {
    return mat4x4(weight4(quad.c0, i), weight4(quad.c1, i), weight4(quad.c2, i),
                  weight4(quad.c3, i));
}

// Adds the products of one chunk.
fn add_chunk(row: u32, up_row: u32, x_row: u32, n_live: u32, c: u32) {
    let w = load_quad(row, c);
    var u = w;
    if (SETS == 2u) {
        u = load_quad(up_row, c);
    }
    add_vec4(w, u, 0u, x_row, n_live, c);
    if (CHUNK > 4u) {
        add_vec4(w, u, 1u, x_row, n_live, c);
    }
    if (CHUNK > 8u) {
        add_vec4(w, u, 2u, x_row, n_live, c);
        add_vec4(w, u, 3u, x_row, n_live, c);
    }
    if (CHUNK > 16u) {
        add_vec4(w, u, 4u, x_row, n_live, c);
        add_vec4(w, u, 5u, x_row, n_live, c);
        add_vec4(w, u, 6u, x_row, n_live, c);
        add_vec4(w, u, 7u, x_row, n_live, c);
    }
}

fn scales4(row: u32, c: u32) -> vec4<f32> {
    return vec4(weight_scale(row, c), weight_scale(row + 1u, c),
                weight_scale(row + 2u, c), weight_scale(row + 3u, c));
}

// Sets `dots` for rows row..row+4, up_row..up_row+4 if there are two sets, and activation rows
// x_row..x_row+n_live, over the chunks lane, lane + LANES, ...
fn dot_rows(row: u32, up_row: u32, x_row: u32, n_live: u32, lane: u32) {
    for (var i = 0u; i < TOKENS * SETS; i++) {
        dots[i] = vec4(0.0);
    }
    for (var t = 0u; t < TOKENS; t++) {
        squares[t] = 0.0;
    }
    if (CHUNKS > 0u) {
        for (var i = 0u; i < CHUNKS / LANES; i++) {
            add_chunk(row, up_row, x_row, n_live, lane + i * LANES);
        }
        if (lane < CHUNKS % LANES) {
            add_chunk(row, up_row, x_row, n_live, CHUNKS - CHUNKS % LANES + lane);
        }
    } else {
        for (var c = lane; c < p.n_chunks; c += LANES) {
            add_chunk(row, up_row, x_row, n_live, c);
        }
    }
    if (scale_is_per_row()) {
        let scale = scales4(row, 0u);
        for (var t = 0u; t < TOKENS; t++) {
            dots[t * SETS] *= scale;
        }
        if (SETS == 2u) {
            let up_scale = scales4(up_row, 0u);
            for (var t = 0u; t < TOKENS; t++) {
                dots[t * SETS + 1u] *= up_scale;
            }
        }
    }
}

// Whether threads of a subgroup share out the sums while they add up.
fn sums_halve() -> bool {
    return CAN_PASS && !SHORT && SUBLANES >= TOKENS * SETS;
}

// Whether sums pass through workgroup memory.
fn sums_staged() -> bool {
    return SHARE > SUBLANES || (sums_halve() && TOKENS * SETS > 1u);
}

// Of the first 2 * half sums a thread keeps its half, to which its neighbour adds, and passes its
// parts of the other half on.
fn halve_dots(half: u32, lid: u32) {
    if (half >= TOKENS * SETS) {
        return;
    }
    let step = max(SUBLANES / (TOKENS * SETS), 1u) * half;
    let upper = (lid & step) != 0u;
    for (var i = 0u; i < half; i++) {
        let passed = select(dots[i + half], dots[i], upper);
        dots[i] = select(dots[i], dots[i + half], upper) + pass4(passed, step);
    }
}

// Adds up over SHARE threads. All threads of the workgroup must call it together, once.
fn sum_dots(lid: u32) {
    if (sums_halve()) {
        // So that each step passes half of what the one before did, instead of all sums.
        halve_dots(8u, lid);
        halve_dots(4u, lid);
        halve_dots(2u, lid);
        halve_dots(1u, lid);
        let rest = max(SUBLANES / (TOKENS * SETS), 1u);
        dots[0] = sum4_lanes(dots[0], lid, rest);
        if (sums_staged() && lid % rest == 0u) {
            part_dots[lid / rest] = dots[0];
        }
    } else {
        for (var i = 0u; i < TOKENS * SETS; i++) {
            dots[i] = sum4_lanes(dots[i], lid, SUBLANES);
        }
        if (sums_staged() && lid % SUBLANES == 0u) {
            for (var i = 0u; i < TOKENS * SETS; i++) {
                part_dots[lid / SUBLANES * (TOKENS * SETS) + i] = dots[i];
            }
        }
    }
    if (NORM) {
        for (var t = 0u; t < TOKENS; t++) {
            squares[t] = sum_lanes(squares[t], lid, SUBLANES);
        }
        if (sums_staged() && lid % SUBLANES == 0u) {
            for (var t = 0u; t < TOKENS; t++) {
                part_squares[lid / SUBLANES * TOKENS + t] = squares[t];
            }
        }
    }
    if (sums_staged()) {
        workgroupBarrier();
    }
}

// The complete sums of token t and a set of rows.
fn dots_of(t: u32, rows: u32, lid: u32) -> vec4<f32> {
    let i = t * SETS + rows;
    if (!sums_staged()) {
        return dots[i];
    }
    let first = lid / SHARE * (SHARE / SUBLANES);
    var sum = vec4(0.0);
    for (var s = first; s < first + SHARE / SUBLANES; s++) {
        sum += part_dots[s * (TOKENS * SETS) + i];
    }
    return sum;
}

// The complete sum of the squares of token t.
fn squares_of(t: u32, lid: u32) -> f32 {
    if (!sums_staged()) {
        return squares[t];
    }
    let first = lid / SHARE * (SHARE / SUBLANES);
    var sum = 0.0;
    for (var s = first; s < first + SHARE / SUBLANES; s++) {
        sum += part_squares[s * TOKENS + t];
    }
    return sum;
}
