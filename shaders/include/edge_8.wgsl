// Cooperative matrices of 8 x 8 (Apple). Metal loads them from arrays of scalars only.
enable wgpu_cooperative_matrix;

const EDGE: u32 = 8u;
alias MatrixX = coop_mat8x8<f16, A>;
alias MatrixW = coop_mat8x8<f16, B>;
alias MatrixSum = coop_mat8x8<f32, C>;

var<workgroup> staged: array<f16, 4u * STAGED>;
var<workgroup> sums: array<f32, 4u * SUMS>;
fn stage4(at: u32, v: vec4<f16>) {
    staged[4u * at] = v.x;
    staged[4u * at + 1u] = v.y;
    staged[4u * at + 2u] = v.z;
    staged[4u * at + 3u] = v.w;
}
fn sums4(at: u32) -> vec4<f32> {
    let i = 4u * at;
    return vec4(sums[i], sums[i + 1u], sums[i + 2u], sums[i + 3u]);
}

// The matrix of activations, of weights at a vec4 of `staged`.
fn x_matrix(at: u32, lid: u32) -> MatrixX {
    return coopLoadT<MatrixX>(&staged[4u * at], STRIDE * 4u);
}
fn w_matrix(at: u32) -> MatrixW { return coopLoad<MatrixW>(&staged[4u * at], STRIDE * 4u); }

// Stores a matrix at a vec4 of `sums`.
fn put(sum: MatrixSum, at: u32, lid: u32) {
    let d = sum;
    let to = 4u * at;
    let stride = SUM_STRIDE * 4u;
    coopStoreT(d, &sums[to], stride);
}
