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

// Whether squares of activations are summed, too.
override NORM: bool = false;

// This thread's part of the sums, [TOKENS, SETS].
var<private> dots: array<vec4<f32>, 16>;
var<private> squares: array<f32, 8>;

// Sums over SUBLANES threads. [THREADS / SUBLANES, TOKENS * SETS] and [.., TOKENS]
var<workgroup> part_dots: array<vec4<f32>, 256>;
var<workgroup> part_squares: array<f32, 128>;

// The same chunk of four neighbouring rows.
struct Quad { w0: vec4<u32>, w1: vec4<u32>, w2: vec4<u32>, w3: vec4<u32> }

fn load_quad(row: u32, c: u32) -> Quad {
    let at = row * p.n_chunks + c;
    return Quad(weights[at], weights[at + p.n_chunks], weights[at + 2u * p.n_chunks],
                weights[at + 3u * p.n_chunks]);
}

// Product of up to 16 weights of a chunk, from the vec4 `begin` on. Written out, since an indexed
// vector is slow where a driver does not unroll the loop.
fn chunk_dot(chunk: vec4<u32>, begin: u32, x: mat4x4<f32>) -> f32 {
    var sum = dot(weight4(chunk, begin), x[0]);
    if (CHUNK > 4u) {
        sum += dot(weight4(chunk, begin + 1u), x[1]);
    }
    if (CHUNK > 8u) {
        sum += dot(weight4(chunk, begin + 2u), x[2]);
        sum += dot(weight4(chunk, begin + 3u), x[3]);
    }
    return sum;
}

// Products of four rows with the same activations.
fn quad_dot(q: Quad, begin: u32, x: mat4x4<f32>) -> vec4<f32> {
    return vec4(chunk_dot(q.w0, begin, x), chunk_dot(q.w1, begin, x),
                chunk_dot(q.w2, begin, x), chunk_dot(q.w3, begin, x));
}

// Up to 16 activations from the vec4 `col` on.
fn activations(t: u32, x_row: u32, col: u32) -> mat4x4<f32> {
    var x: mat4x4<f32>;
    x[0] = activation(t, x_row, col);
    if (CHUNK > 4u) {
        x[1] = activation(t, x_row, col + 1u);
    }
    if (CHUNK > 8u) {
        x[2] = activation(t, x_row, col + 2u);
        x[3] = activation(t, x_row, col + 3u);
    }
    return x;
}

// Adds the products of a chunk with the activations of token t.
fn add_token(t: u32, x_row: u32, c: u32, w: Quad, up: Quad, scale: vec4<f32>,
             up_scale: vec4<f32>) {
    let col = c * (CHUNK / 4u);
    let x = activations(t, x_row, col);
    var sum = quad_dot(w, 0u, x);
    var up_sum = vec4(0.0);
    if (SETS == 2u) {
        up_sum = quad_dot(up, 0u, x);
    }
    if (CHUNK > 16u) {
        let x = activations(t, x_row, col + 4u);
        sum += quad_dot(w, 4u, x);
        if (SETS == 2u) {
            up_sum += quad_dot(up, 4u, x);
        }
    }
    dots[t * SETS] += scale * sum;
    if (SETS == 2u) {
        dots[t * SETS + 1u] += up_scale * up_sum;
    }
}

// Adds the products of one chunk. One token is written out, since an array that is indexed at run
// time is slow where a driver does not unroll the loop.
fn add_chunk(row: u32, up_row: u32, x_row: u32, n_live: u32, c: u32) {
    let w = load_quad(row, c);
    var up = w;
    if (SETS == 2u) {
        up = load_quad(up_row, c);
    }
    var scale = vec4(1.0);
    var up_scale = vec4(1.0);
    if (!scale_is_per_row()) {
        scale = scales4(row, c);
        up_scale = scales4(up_row, c);
    }
    if (TOKENS == 1u) {
        add_token(0u, x_row, c, w, up, scale, up_scale);
        return;
    }
    for (var t = 0u; t < TOKENS; t++) {
        add_token(t, x_row + min(t, n_live - 1u), c, w, up, scale, up_scale);
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

// Adds up over SHARE threads. All threads of the workgroup must call it together, once.
fn sum_dots(lid: u32) {
    for (var i = 0u; i < TOKENS * SETS; i++) {
        dots[i] = sum4_lanes(dots[i], lid, SUBLANES);
    }
    if (NORM) {
        for (var t = 0u; t < TOKENS; t++) {
            squares[t] = sum_lanes(squares[t], lid, SUBLANES);
        }
    }
    if (SHARE > SUBLANES) {
        if (lid % SUBLANES == 0u) {
            for (var i = 0u; i < TOKENS * SETS; i++) {
                part_dots[lid / SUBLANES * (TOKENS * SETS) + i] = dots[i];
            }
            for (var t = 0u; t < TOKENS; t++) {
                part_squares[lid / SUBLANES * TOKENS + t] = squares[t];
            }
        }
        workgroupBarrier();
    }
}

// The complete sums of token t and a set of rows.
fn dots_of(t: u32, rows: u32, lid: u32) -> vec4<f32> {
    let i = t * SETS + rows;
    if (SHARE == SUBLANES) {
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
    if (SHARE == SUBLANES) {
        return squares[t];
    }
    let first = lid / SHARE * (SHARE / SUBLANES);
    var sum = 0.0;
    for (var s = first; s < first + SHARE / SUBLANES; s++) {
        sum += part_squares[s * TOKENS + t];
    }
    return sum;
}
