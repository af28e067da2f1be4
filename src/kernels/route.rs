//! Normalisation, router and choice of experts for few tokens in one launch, which saves the time
//! between three small ones.

use rayon::prelude::*;

use crate::{
    device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params},
    weights::WeightFormat,
};

use super::{
    Matrix, Norm, Routing, Scoring, float_slot,
    grouped_topk::{GroupedTopkParams, MAX_GROUPS, MAX_TOP_K, pick, route},
    has_subgroup_sums,
    matrix::{RowShare, dot},
    rms_norm::normalise,
};

/// `normed = norm(x)`; experts and weights of each row by `routing` from `normed * router^T`, where
/// `normed` is not yet rounded.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// F32 `[n, cols]`
    pub x: Tensor,
    /// The normalisation. If there is a bias, it stands behind the weight: F32 `[cols + experts]`
    pub norm: Norm,
    /// Whether the choice adds that bias, see [`Routing`].
    pub has_bias: bool,
    /// F32 weights `[>= n_experts, cols]`
    pub router: Matrix,
    /// U32 `[n, 4]`: position, slot, sequence, 0. Slot `u32::MAX` marks padding, which gets
    /// ids -1 and weights 0.
    pub tokens: Tensor,
    /// Logits and, in the last column, a counter that is zero. F32 `[n, > router rows]`
    pub scratch: Tensor,
    /// I32 `[n, top_k]`
    pub ids: Tensor,
    /// F32 `[n, top_k]`
    pub weights: Tensor,
    /// F32 or F16 `[n, cols]`
    pub normed: Tensor,
    /// The model's rule.
    pub routing: Routing,
}

/// Workgroup memory that the shader takes at most, bytes; sums without subgroups take some of it.
fn workgroup_bytes(caps: &Caps) -> u32 {
    if has_subgroup_sums(caps) { 13 << 10 } else { 17 << 10 }
}

impl Route {
    /// Up to this many tokens one launch is faster than three; each reads the router for itself.
    pub const MOST_TOKENS: usize = 32;

    /// Whether devices with `caps` can run it for `routing`.
    pub fn serves(caps: &Caps, routing: &Routing) -> bool {
        caps.ordered_groups
            && caps.max_workgroup_bytes >= workgroup_bytes(caps)
            && routing.n_experts <= 256
            && routing.top_k <= MAX_TOP_K
            && routing.n_group <= MAX_GROUPS
    }
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct RouteParams {
        n_rows: u32,
        n_chunks: u32,
        x_stride4: u32,
        scratch_stride: u32,
        n_groups: u32,
        norm_cols: u32,
        n_experts: u32,
        top_k: u32,
        n_group: u32,
        topk_group: u32,
        renormalize: u32,
        eps: f32,
        scale: f32,
    }
}

impl Kernel for Route {
    const NAME: &'static str = "route";
    type Params = RouteParams;

    fn launch(&self, caps: &Caps) -> Launch<RouteParams> {
        let Self { x, norm, router, tokens, scratch, ids, weights, normed, routing, .. } = *self;
        assert_eq!(router.format, WeightFormat::F32, "routers stay in f32");
        assert!(scratch.cols() > router.rows, "{scratch} for {} rows", router.rows);
        let n = tokens.rows() as u32;
        let n_quads = router.rows as u32 / 4;
        let mut share = RowShare::of(caps, &router, n_quads * n, 1);
        // The choice takes a thread for four experts.
        share.threads = share.threads.max(64);
        let n_groups = n_quads.div_ceil(share.threads / share.lanes);
        Launch {
            shader: share
                .shader(Shader::new(Self::NAME), caps)
                .slot("pick", pick(&routing, caps))
                .slot("out", float_slot(normed.dtype, caps))
                .set("NORM", true)
                .set("BIAS", self.has_bias)
                .set("SOFTMAX", routing.scoring == Scoring::Softmax)
                .set("SIGMOID", routing.scoring == Scoring::Sigmoid),
            params: RouteParams {
                n_rows: router.rows as u32,
                n_chunks: router.n_chunks(),
                x_stride4: x.cols() as u32 / 4,
                scratch_stride: scratch.cols() as u32,
                n_groups,
                norm_cols: norm.cols as u32,
                n_experts: routing.n_experts as u32,
                top_k: routing.top_k as u32,
                n_group: routing.n_group.max(1) as u32,
                topk_group: routing.topk_group as u32,
                renormalize: routing.renormalize.into(),
                eps: norm.eps,
                scale: routing.scale,
            },
            bindings: vec![
                Binding::read(router.weights),
                Binding::read(norm.weight),
                Binding::read(x),
                Binding::read(tokens),
                Binding::write(scratch),
                Binding::write(ids),
                Binding::write(weights),
                Binding::write(normed),
            ],
            grid: [n_groups + 1, n, 1],
        }
    }

    fn twin(p: &RouteParams, io: &Io<'_>) {
        let option = |name| io.shader.override_value(name) == Some(1);
        let scoring = match (option("SOFTMAX"), option("SIGMOID")) {
            (true, _) => Scoring::Softmax,
            (_, true) => Scoring::Sigmoid,
            _ => Scoring::None,
        };
        let (bits, vectors, x) = (io.read::<u8>(0), io.floats(1), io.floats(2));
        let tokens = io.read::<[u32; 4]>(3);
        let stride = p.x_stride4 as usize * 4;
        let (gain, bias) = vectors.split_at(stride);
        let (n_experts, k) = (p.n_experts as usize, p.top_k as usize);
        let bias = option("BIAS").then(|| &bias[..n_experts]);
        let (n_rows, n_chunks) = (p.n_rows as usize, p.n_chunks as usize);
        let row = |row| WeightFormat::F32.interleaved_row(&bits, n_chunks * 4, row);
        let row = |i| bytemuck::pod_collect_to_vec(&row(i));
        let weights: Vec<Vec<f32>> = (0..n_rows).map(row).collect();
        let rule = GroupedTopkParams {
            n_tokens: 1,
            n_experts: p.n_experts,
            top_k: p.top_k,
            n_group: p.n_group,
            topk_group: p.topk_group,
            stride: p.n_experts,
            renormalize: p.renormalize,
            grid_x: 1,
            scale: p.scale,
        };
        for (t, token) in tokens.iter().take(io.grid[1] as usize).enumerate() {
            let x = normalise(&x[t * stride..][..stride], gain, p.norm_cols, p.eps);
            io.store(7, t * stride, &x);
            let (mut ids, mut routed) = (vec![-1; k], vec![0.0; k]);
            if token[1] != u32::MAX {
                let logits: Vec<f32> = weights.par_iter().map(|row| dot(row, &x) as f32).collect();
                io.store(4, t * p.scratch_stride as usize, &logits);
                let logits = &logits[..n_experts];
                route(&rule, scoring, logits, bias, &mut ids, &mut routed);
            }
            io.write::<i32>(5)[t * k..][..k].copy_from_slice(&ids);
            io.write::<f32>(6)[t * k..][..k].copy_from_slice(&routed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::{self, F16, F32, I32, U32},
        kernels::testing::{FORMATS, check},
        weights::padded,
    };

    const PLAIN: Routing = Routing {
        scoring: Scoring::Softmax,
        n_experts: 128,
        top_k: 8,
        n_group: 1,
        topk_group: 1,
        renormalize: true,
        scale: 1.0,
    };

    fn run(routing: Routing, cols: usize, has_bias: bool, n: usize, out: DType) {
        // f16 outputs differ by a rounding step of 2^-11, hence the wider bound.
        check(if out == F16 { 1e-6 } else { 1e-7 }, |bench, rec| {
            let router = bench.matrix(FORMATS[0], 1, routing.n_experts, cols);
            let x = bench.activations(n, cols, F32);
            let n_vectors = padded(cols) + if has_bias { routing.n_experts } else { 0 };
            let weight = bench.floats(&[n_vectors], F32, |bench, i| match i {
                i if i < cols || i >= padded(cols) => bench.value(),
                _ => 0.0,
            });
            let tokens: Vec<u32> =
                (0..n as u32).flat_map(|i| [i, if i == 1 { u32::MAX } else { i }, 0, 0]).collect();
            let norm = Norm { weight, cols, eps: 0.5 };
            let (shape, k) = ([n, router.rows + 4], routing.top_k);
            // The counter has to be zero.
            let scratch = bench.floats(&shape, F32, |_, _| 0.0);
            rec.push(Route {
                x,
                norm,
                has_bias,
                router,
                tokens: bench.ints(&[n, 4], U32, &tokens),
                scratch,
                ids: bench.ints(&[n, k], I32, &vec![77; n * k]),
                weights: bench.normal(&[n, k], F32),
                normed: bench.normal(&[n, padded(cols)], out),
                routing,
            });
            // The next layer finds the counter as this one did.
            let again = rec.dispatches[0].clone();
            rec.dispatches.push(again);
        });
    }

    #[test]
    fn plain_routing() {
        for (cols, n) in [(2048, 1), (100, 3), (512, 9)] {
            run(PLAIN, cols, false, n, F32);
        }
        run(PLAIN, 256, false, 2, F16);
    }

    #[test]
    fn few_and_many_experts() {
        for (n_experts, top_k) in [(1, 1), (5, 2), (60, 4), (256, 8)] {
            let routing = Routing { n_experts, top_k, renormalize: false, ..PLAIN };
            run(routing, 96, false, 4, F32);
        }
    }

    #[test]
    fn groups_and_bias() {
        let routing = Routing {
            scoring: Scoring::Sigmoid,
            n_experts: 64,
            n_group: 8,
            topk_group: 4,
            scale: 2.5,
            ..PLAIN
        };
        run(routing, 200, true, 5, F32);
    }
}
