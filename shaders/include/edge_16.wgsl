// Cooperative matrices of 16 x 16, which drivers load from arrays of vectors.
enable wgpu_cooperative_matrix;

const EDGE: u32 = 16u;
alias MatrixX = coop_mat16x16<f16, A>;
alias MatrixW = coop_mat16x16<f16, B>;
alias MatrixSum = coop_mat16x16<f32, C>;

var<workgroup> staged: array<vec4<f16>, STAGED>;
var<workgroup> sums: array<vec4<f32>, SUMS>;
fn stage4(at: u32, v: vec4<f16>) { staged[at] = v; }
fn sums4(at: u32) -> vec4<f32> { return sums[at]; }

// The matrix of activations, of weights at a vec4 of `staged`.
fn x_matrix(at: u32, lid: u32) -> MatrixX {
    return coopLoadT<MatrixX>(&staged[at], STRIDE);
}
fn w_matrix(at: u32) -> MatrixW { return coopLoad<MatrixW>(&staged[at], STRIDE); }

// Stores a matrix at a vec4 of `sums`.
fn put(sum: MatrixSum, at: u32, lid: u32) {
    let d = sum;
    let to = at;
    let stride = SUM_STRIDE;
    coopStoreT(d, &sums[to], stride);
}
