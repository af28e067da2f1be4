//! The mixture of experts: router, routed experts, shared expert.

use crate::{
    Result,
    device::{Caps, Recording, Tensor},
    kernels::{
        CombineExperts, GroupedTopk, MapExperts, Norm, RmsNorm, Route, Routing, Scoring, Store,
    },
    parallel::ExpertLayout,
    weights::{WeightFormat, padded},
};

use super::{
    ModelSpec, MoeSpec, Precision, SharedSpec,
    banks::{BankShape, ExpertNames, names},
    linear::Linear,
    loader::Loader,
    mlp::Mlp,
    routed_experts::RoutedExperts,
    rows::{Cols, Heads, Rows},
    scratch::{Buffers, Routed, StepInputs},
};

/// A feed-forward layer of experts.
#[derive(Debug, Clone)]
pub(super) struct Experts {
    pub(super) router: Linear,
    pub(super) correction_bias: Option<CorrectionBias>,
    /// Among the experts that are there.
    pub(super) choice: Routing,
    routed: RoutedExperts,
    shared: Option<Shared>,
}

/// What is added to scores for the choice of experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct CorrectionBias {
    /// F32 `[experts]`
    pub(super) alone: Tensor,
    /// F32 `[padded hidden + experts]`: behind the weights of the norm before the router
    pub(super) after_norm: Tensor,
}

#[derive(Debug, Clone)]
enum Shared {
    /// Added as it is.
    Plain(Mlp, usize),
    /// Weighted by the sigmoid of a gate: a mixture with a single expert that is always chosen.
    Gated(Box<Experts>),
}

impl Experts {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        spec: &ModelSpec,
        moe: &MoeSpec,
        index: usize,
        precision: Precision,
        layout: &ExpertLayout,
    ) -> Result<Self> {
        let (hidden, r, n) = (spec.hidden_size, moe.routing, moe.n_present());
        let (prefix, names) = names(|name| loader.contains(name), spec, index);
        let bias = (format!("{prefix}.gate.e_score_correction_bias"), n, None);
        let correction_bias = match moe.correction_bias {
            false => None,
            true => {
                let norm = format!("model.layers.{index}.post_attention_layernorm.weight");
                let alone = loader.vector_with_room(std::slice::from_ref(&bias), moe.n_spare)?;
                let whole = Heads { dim: hidden, stride: padded(hidden) };
                let parts = [(norm, hidden, Some(whole)), bias];
                let after_norm = loader.vector_with_room(&parts, moe.n_spare)?;
                Some(CorrectionBias { alone, after_norm })
            }
        };
        let shared = match &moe.shared {
            None => None,
            Some(shared) => {
                let prefix = format!("{prefix}.{}", spec.names.shared);
                Some(Shared::load(loader, hidden, shared, &prefix, precision)?)
            }
        };
        let shape = BankShape::of(spec, moe, names, precision);
        let moe_index = spec.moe_layers().take_while(|&(i, _)| i < index).count();
        Ok(Self {
            router: router(
                loader,
                Rows::with_room(format!("{prefix}.gate"), n, r.n_experts),
                hidden,
            )?,
            correction_bias,
            choice: moe.choice(),
            routed: RoutedExperts::load(loader, &shape, r, layout, moe_index)?,
            shared,
        })
    }

    /// The routed experts.
    pub(super) fn routed(&self) -> &RoutedExperts {
        &self.routed
    }

    /// The routed experts, to move some.
    pub(super) fn routed_mut(&mut self) -> &mut RoutedExperts {
        &mut self.routed
    }

    /// Whether the router of `n` tokens normalises them on the way.
    pub(super) fn normalises(&self, caps: &Caps, n: usize) -> bool {
        n <= Route::MOST_TOKENS
            && !caps.twins
            && self.router.single().is_some()
            && Route::serves(caps, &self.choice)
    }

    /// Adds the experts' weighted outputs for `norm(residual)` `[n, hidden]` to `residual`; without
    /// a norm, for what `buffers.normed` holds. Where not all experts are here, the recording is
    /// cut before and after those that are, and [`Experts::record_others`] has to follow.
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        inputs: &StepInputs,
        buffers: &Buffers,
        routed: Routed,
        norm: Option<Norm>,
        residual: Tensor,
    ) {
        let n = residual.rows();
        let routing = self.choice;
        let (ids, weights) = routed.rows(n, routing.top_k);
        let x = buffers.rows(buffers.normed, n);
        let tokens = inputs.tokens.reshape(&[n, 4]);
        if let (true, Some(norm), Some(router)) =
            (self.normalises(rec.caps(), n), norm, self.router.single())
        {
            let bias = self.correction_bias;
            rec.push(Route {
                x: residual,
                norm: Norm { weight: bias.map_or(norm.weight, |b| b.after_norm), ..norm },
                has_bias: bias.is_some(),
                router,
                tokens,
                scratch: buffers.rows(buffers.route, n),
                ids,
                weights,
                normed: x,
                routing,
            });
        } else {
            if let Some(norm) = norm {
                rec.push(RmsNorm { x: residual, rows: None, norm, out: x });
            }
            let logits = buffers.rows(routed.logits, n);
            self.router.record(rec, "router", x, logits, Store::Set);
            let bias = self.correction_bias.map(|b| b.alone);
            rec.push(GroupedTopk { logits, bias, tokens, ids, weights, routing });
        }
        let Some(map) = self.routed.map() else {
            self.routed.record(rec, buffers, x, ids, weights, residual);
            return self.record_shared(rec, inputs, buffers, x, residual);
        };
        let local_ids = buffers.local_ids.reshape(&[n, routing.top_k]);
        rec.cut();
        rec.push(MapExperts { ids, map, out: local_ids });
        self.routed.record(rec, buffers, x, local_ids, weights, residual);
        // While the others compute.
        self.record_shared(rec, inputs, buffers, x, residual);
        rec.cut();
    }

    /// Adds what other devices computed of these rows to `residual`, behind a cut that
    /// [`Experts::record`] made.
    pub(super) fn record_others(&self, rec: &mut Recording, buffers: &Buffers, residual: Tensor) {
        if self.routed.map().is_some() {
            let n = residual.rows();
            let (x, ids) = (buffers.rows(buffers.partial, n), buffers.rows(buffers.one_slot, n));
            rec.push(CombineExperts { x, ids, out: residual });
        }
    }

    fn record_shared(
        &self,
        rec: &mut Recording,
        inputs: &StepInputs,
        buffers: &Buffers,
        x: Tensor,
        residual: Tensor,
    ) {
        match &self.shared {
            None => {}
            Some(Shared::Plain(mlp, width)) => mlp.record(rec, x, residual, buffers, *width),
            Some(Shared::Gated(gated)) => {
                gated.record(rec, inputs, buffers, buffers.shared_gate, None, residual);
            }
        }
    }
}

impl Shared {
    fn load(
        loader: &mut Loader<'_>,
        hidden: usize,
        spec: &SharedSpec,
        prefix: &str,
        precision: Precision,
    ) -> Result<Self> {
        let width = spec.intermediate_size;
        if !spec.gated {
            let mlp = Mlp::load(loader, prefix, hidden, width, precision.rest)?;
            return Ok(Self::Plain(mlp, width));
        }
        let routing = Routing {
            scoring: Scoring::Sigmoid,
            n_experts: 1,
            top_k: 1,
            n_group: 1,
            topk_group: 1,
            renormalize: false,
            scale: 1.0,
        };
        let shape = BankShape {
            names: ExpertNames::Single(prefix.to_owned()),
            n_experts: 1,
            hidden,
            width,
            format: precision.rest,
        };
        Ok(Self::Gated(Box::new(Experts {
            router: router(loader, Rows::all(format!("{prefix}_gate"), 1), hidden)?,
            correction_bias: None,
            choice: routing,
            routed: RoutedExperts::load(loader, &shape, routing, &ExpertLayout::default(), 0)?,
            shared: None,
        })))
    }
}

/// Routers stay in f32: a rounded logit may choose another expert.
fn router(loader: &mut Loader<'_>, rows: Rows, hidden: usize) -> Result<Linear> {
    loader.linear(&[rows], Cols::all(hidden), WeightFormat::F32, false)
}
