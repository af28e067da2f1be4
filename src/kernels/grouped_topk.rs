//! The router's choice of experts. One rule covers Mixtral, Qwen, OLMoE (no groups) and DeepSeek
//! (groups, bias). Knows logits only: neither the router's weights nor what experts compute.

use rayon::prelude::*;

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{grid_2d, has_subgroup_sums};

/// Limits of the shader's workgroup memory.
const MAX_EXPERTS: usize = 1024;
pub(super) const MAX_TOP_K: usize = 64;
pub(crate) const MAX_GROUPS: usize = 32;

/// How scores follow from logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// The logistic function of each logit.
    Sigmoid,
    /// The logits themselves.
    None,
}

/// How a model routes: vLLM's `grouped_topk`, of which plain top-k is the case of one group.
///
/// 1. `score = scoring(logit)`, in f32; `choice = score + bias`.
/// 2. Experts form `n_group` runs of equal length. A group counts as its best choice, or with a
///    bias as the sum of its best two (equal ones count twice). The best `topk_group` groups stay.
/// 3. The `top_k` best choices in them, in descending order, are the experts; their scores,
///    without bias, are the weights.
/// 4. If `renormalize`, weights are divided by their sum (plus 1e-20). Then comes `scale`.
///
/// The lower id wins every tie; zeros of both signs and subnormals are equal. An expert whose
/// logit or bias is not finite has choice minus infinity and weight 0, as have those of dropped
/// groups; a softmax is taken over the finite logits. If no choice is left, the experts are
/// `0..top_k` with weights `1 / top_k` if `renormalize`, else 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Scores from logits.
    pub scoring: Scoring,
    /// Experts; at most 1024.
    pub n_experts: usize,
    /// Experts of a token; at most 64.
    pub top_k: usize,
    /// Groups of experts, at most 32; 0 or 1 for none.
    pub n_group: usize,
    /// Groups that stay, if there are groups.
    pub topk_group: usize,
    /// Whether the weights are made to sum to 1.
    pub renormalize: bool,
    /// Factor of the weights, after renormalisation.
    pub scale: f32,
}

/// Chooses each token's experts and their weights; see [`Routing`].
#[derive(Debug, Clone, Copy)]
pub struct GroupedTopk {
    /// F32 `[n, >= n_experts]`
    pub logits: Tensor,
    /// Added for the choice only, F32 `[>= n_experts]`
    pub bias: Option<Tensor>,
    /// U32 `[n, 4]`: position, slot, sequence, 0. Slot `u32::MAX` marks padding, which gets
    /// ids -1 and weights 0.
    pub tokens: Tensor,
    /// I32 `[n, top_k]`
    pub ids: Tensor,
    /// F32 `[n, top_k]`
    pub weights: Tensor,
    /// The model's rule.
    pub routing: Routing,
}

/// The include that chooses: on a GPU one subgroup does it without barriers, where it has all
/// experts.
pub(super) fn pick(routing: &Routing, caps: &Caps) -> &'static str {
    let threads = routing.n_experts.div_ceil(4).max(routing.top_k) as u32;
    let fits = caps.subgroups.is_some_and(|(least, _)| threads <= least);
    let alone = fits && !caps.software && has_subgroup_sums(caps) && routing.n_group <= 1;
    if alone { "subgroup" } else { "workgroup" }
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct GroupedTopkParams {
        n_tokens: u32,
        n_experts: u32,
        top_k: u32,
        n_group: u32,
        topk_group: u32,
        stride: u32,
        renormalize: u32,
        grid_x: u32,
        scale: f32,
    }
}

impl GroupedTopk {
    fn check(&self) {
        let Self { logits, bias, tokens, ids, weights, routing } = *self;
        let Routing { n_experts, top_k, n_group, topk_group, .. } = routing;
        let n = logits.rows();
        assert!((1..=MAX_EXPERTS).contains(&n_experts), "{routing:?}");
        assert!((1..=MAX_TOP_K.min(n_experts)).contains(&top_k), "{routing:?}");
        if n_group > 1 {
            assert!(n_group <= MAX_GROUPS && n_experts.is_multiple_of(n_group), "{routing:?}");
            assert!((1..=n_group).contains(&topk_group), "{routing:?}");
            assert!(top_k <= topk_group * (n_experts / n_group), "{routing:?}");
        }
        assert!(logits.cols() >= n_experts, "{logits} for {n_experts} experts");
        assert!(bias.is_none_or(|bias| bias.len() >= n_experts), "{bias:?}");
        assert_eq!((tokens.rows(), tokens.cols()), (n, 4), "{tokens}");
        for out in [ids, weights] {
            assert_eq!((out.rows(), out.cols()), (n, top_k), "{out}");
        }
    }
}

impl Kernel for GroupedTopk {
    const NAME: &'static str = "grouped_topk";
    type Params = GroupedTopkParams;

    fn launch(&self, caps: &Caps) -> Launch<GroupedTopkParams> {
        self.check();
        let Self { logits, bias, tokens, ids, weights, routing } = *self;
        let (grid_x, grid_y) = grid_2d(logits.rows() as u32, caps);
        Launch {
            shader: Shader::new(Self::NAME)
                .slot("pick", pick(&routing, caps))
                .set("THREADS", (routing.n_experts as u32).next_power_of_two().clamp(64, 256))
                .set("BIAS", bias.is_some())
                .set("SOFTMAX", routing.scoring == Scoring::Softmax)
                .set("SIGMOID", routing.scoring == Scoring::Sigmoid),
            params: GroupedTopkParams {
                n_tokens: logits.rows() as u32,
                n_experts: routing.n_experts as u32,
                top_k: routing.top_k as u32,
                n_group: routing.n_group.max(1) as u32,
                topk_group: routing.topk_group as u32,
                stride: logits.cols() as u32,
                renormalize: routing.renormalize.into(),
                grid_x,
                scale: routing.scale,
            },
            bindings: vec![
                Binding::read(logits),
                Binding::read(bias.unwrap_or(logits)),
                Binding::read(tokens),
                Binding::write(ids),
                Binding::write(weights),
            ],
            grid: [grid_x, grid_y, 1],
        }
    }

    fn twin(p: &GroupedTopkParams, io: &Io<'_>) {
        let option = |name| io.shader.override_value(name) == Some(1);
        let scoring = match (option("SOFTMAX"), option("SIGMOID")) {
            (true, _) => Scoring::Softmax,
            (_, true) => Scoring::Sigmoid,
            _ => Scoring::None,
        };
        let (logits, bias, tokens) = (io.read::<f32>(0), io.read::<f32>(1), io.read::<u32>(2));
        let bias = option("BIAS").then_some(&bias[..p.n_experts as usize]);
        let (mut ids, mut weights) = (io.write::<i32>(3), io.write::<f32>(4));
        let k = p.top_k as usize;
        let rows = ids.par_chunks_mut(k).zip(weights.par_chunks_mut(k));
        let rows = rows.zip(logits.par_chunks(p.stride as usize)).zip(tokens.par_chunks(4));
        rows.take(p.n_tokens as usize).for_each(|(((ids, weights), logits), token)| {
            if token[1] == u32::MAX {
                ids.fill(-1);
                weights.fill(0.0);
            } else {
                route(p, scoring, &logits[..p.n_experts as usize], bias, ids, weights);
            }
        });
    }
}

/// One token.
pub(super) fn route(
    p: &GroupedTopkParams,
    scoring: Scoring,
    logits: &[f32],       // [n_experts]
    bias: Option<&[f32]>, // [n_experts]
    ids: &mut [i32],      // [top_k]
    weights: &mut [f32],  // [top_k]
) {
    let scores = scores(scoring, logits);
    let mut choices = scores.clone();
    for (e, choice) in choices.iter_mut().enumerate() {
        let bias = bias.map_or(0.0, |bias| bias[e]);
        let finite = logits[e].is_finite() && bias.is_finite();
        *choice = if finite { normal(*choice + bias) } else { f32::NEG_INFINITY };
    }
    if p.n_group > 1 {
        let size = (p.n_experts / p.n_group) as usize;
        let group_score = |choices: &[f32]| match (bias, &descending(choices)[..]) {
            (Some(_), &[first, second, ..]) => normal(choices[first] + choices[second]),
            (_, order) => choices[order[0]],
        };
        let group_scores: Vec<f32> = choices.chunks(size).map(group_score).collect();
        for &dropped in &descending(&group_scores)[p.topk_group as usize..] {
            choices[dropped * size..][..size].fill(f32::NEG_INFINITY);
        }
    }
    let order = descending(&choices);
    let chosen = &order[..p.top_k as usize];
    let possible = |e: usize| choices[e] > f32::NEG_INFINITY;
    let weight = |e: usize| if possible(e) { f64::from(scores[e]) } else { 0.0 };
    let sum: f64 = chosen.iter().map(|&e| weight(e)).sum();
    for ((&e, id), out) in chosen.iter().zip(ids).zip(weights) {
        *id = e as i32;
        *out = match (possible(chosen[0]), p.renormalize != 0) {
            (true, true) => (weight(e) / (sum + 1e-20) * f64::from(p.scale)) as f32,
            (true, false) => (weight(e) * f64::from(p.scale)) as f32,
            (false, true) => 1.0 / p.top_k as f32,
            (false, false) => 0.0,
        };
    }
}

/// Zero for logits that are not finite.
fn scores(scoring: Scoring, logits: &[f32]) -> Vec<f32> {
    let finite = |x: f32| if x.is_finite() { f64::from(x) } else { f64::NEG_INFINITY };
    let peak = logits.iter().map(|&x| finite(x)).fold(f64::from(f32::MIN), f64::max);
    let sum: f64 = logits.iter().map(|&x| (finite(x) - peak).exp()).sum();
    let score = |&x: &f32| match scoring {
        _ if !x.is_finite() => 0.0,
        Scoring::Softmax => ((finite(x) - peak).exp() / sum) as f32,
        Scoring::Sigmoid => (1.0 / (1.0 + (-finite(x)).exp())) as f32,
        Scoring::None => x,
    };
    logits.iter().map(score).collect()
}

/// Zero for zeros of both signs and for subnormals, which some GPUs flush.
fn normal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// Indices by descending value, the lower index first among equals.
fn descending(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

#[cfg(test)]
mod tests;
