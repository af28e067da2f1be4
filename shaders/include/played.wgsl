// Cooperative matrices as 32 threads could play them: so tests run their tiles where no adapter has
// any. A thread has successive sums of a row. Operands are where they lie in `staged`.
struct MatrixX {
    at: u32,
    lane: u32,
}
alias MatrixW = u32;
const PER_LANE: u32 = EDGE * EDGE / 32u;
const ROW_LANES: u32 = EDGE / PER_LANE;
struct MatrixSum {
    parts: array<f32, PER_LANE>,
}

var<workgroup> staged: array<vec4<f16>, STAGED>;
var<workgroup> sums: array<vec4<f32>, SUMS>;
fn stage4(at: u32, v: vec4<f16>) { staged[at] = v; }
fn sums4(at: u32) -> vec4<f32> { return sums[at]; }

fn x_matrix(at: u32, lid: u32) -> MatrixX { return MatrixX(at, lid % 32u); }
fn w_matrix(at: u32) -> MatrixW { return at; }

fn coopMultiplyAdd(a: MatrixX, b: MatrixW, before: MatrixSum) -> MatrixSum {
    let row = a.at + a.lane / ROW_LANES * STRIDE;
    var sum = before;
    // Compilers would unroll loops of known length, again for each product of a tile.
    let n = min(PER_LANE, p.n_chunks * PER_LANE);
    for (var i = 0u; i < n; i++) {
        let col = b + (a.lane % ROW_LANES * PER_LANE + i) * STRIDE;
        for (var k = 0u; k < EDGE / 4u; k++) {
            sum.parts[i] += dot(vec4<f32>(staged[row + k]), vec4<f32>(staged[col + k]));
        }
    }
    return sum;
}

fn put(sum: MatrixSum, at: u32, lid: u32) {
    let lane = lid % 32u;
    for (var i = 0u; i < PER_LANE; i++) {
        let col = lane % ROW_LANES * PER_LANE + i;
        sums[at + lane / ROW_LANES * SUM_STRIDE + col / 4u][col % 4u] = sum.parts[i];
    }
}
