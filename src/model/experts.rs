//! The mixture of experts: router, routed experts in one of two regimes, shared expert.

use std::collections::HashMap;

use crate::{
    Result,
    device::{Caps, Device, Recording, Tensor},
    kernels::{
        AlignShape, Aligned, CombineExperts, ExpertGemm, ExpertGemv, ExpertMode, GroupedTopk,
        MapExperts, Matrix, Norm, RmsNorm, Route, Routing, Scoring, SiluMul, Store, align_experts,
    },
    parallel::{ExpertLayout, Owners},
    weights::{WeightFormat, padded},
};

use super::{
    ModelSpec, MoeSpec, Precision, SharedSpec,
    banks::{BankShape, Banks, ExpertNames, names, singles},
    linear::Linear,
    loader::{Cols, Heads, Loader, Rows},
    mlp::Mlp,
    regime::ExpertShape,
    scratch::{Buffers, Routed, StepInputs},
};

/// Blocks of the aligned regime, smallest to largest.
pub(super) const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 16..=128;

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

/// The experts of a layer that a device holds.
#[derive(Debug, Clone)]
pub(super) struct RoutedExperts {
    banks: Banks,
    shape: ExpertShape,
    /// Places in the banks.
    n_held: usize,
    /// Experts by place, none where they come and go.
    held: Vec<usize>,
    /// Where to find which; global ids are places in the banks if absent.
    map: Option<Tensor>,
    /// Whether other devices hold the rest, so that their sums come in.
    is_shared_out: bool,
    /// Whether one launch multiplies the blocks of many experts, rather than of each in turn.
    block_align: bool,
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
    /// cut before and after those that are.
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
        let Some(map) = self.routed.map else {
            self.routed.record(rec, buffers, x, ids, weights, residual);
            return self.record_shared(rec, inputs, buffers, x, residual);
        };
        let local_ids = buffers.local_ids.reshape(&[n, routing.top_k]);
        rec.cut();
        rec.push(MapExperts { ids, map, out: local_ids });
        self.routed.record(rec, buffers, x, local_ids, weights, residual);
        if self.routed.is_shared_out {
            // While the others compute.
            self.record_shared(rec, inputs, buffers, x, residual);
            rec.cut();
            let (x, ids) = (buffers.rows(buffers.partial, n), buffers.rows(buffers.one_slot, n));
            rec.push(CombineExperts { x, ids, out: residual });
        } else {
            // Not between the cuts: what stands there may run several times.
            rec.cut();
            self.record_shared(rec, inputs, buffers, x, residual);
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

impl RoutedExperts {
    /// Loads what `layout` says of layer `moe_index` among those that have experts.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        shape: &BankShape,
        routing: Routing,
        layout: &ExpertLayout,
        moe_index: usize,
    ) -> Result<Self> {
        let mut table = |(cols, map): (usize, Vec<i32>)| {
            loader.table("expert map", &[routing.n_experts, cols], &map)
        };
        let (held, n_held, map) = match layout {
            ExpertLayout::All => ((0..routing.n_experts).collect(), routing.n_experts, None),
            ExpertLayout::Share(share) => {
                let held = share.owners[moe_index].held(share.rank).to_vec();
                (held, share.places(moe_index), Some(table(share.map(moe_index))?))
            }
            ExpertLayout::Cached(slots) => {
                let nowhere = [1, -1].repeat(routing.n_experts);
                (Vec::new(), (*slots).min(routing.n_experts), Some(table((2, nowhere))?))
            }
        };
        Ok(Self {
            banks: shape.load(loader, &held, n_held)?,
            shape: ExpertShape {
                hidden: shape.hidden,
                width: shape.width,
                n_experts: routing.n_experts,
                top_k: routing.top_k,
                format: shape.format,
            },
            n_held,
            held,
            map,
            is_shared_out: matches!(layout, ExpertLayout::Share(..)),
            block_align: true,
        })
    }

    /// See [`super::Model::with_block_align`].
    pub(super) fn set_block_align(&mut self, on: bool) {
        self.block_align = on;
    }

    /// The experts' weights.
    pub(super) fn banks(&self) -> &Banks {
        &self.banks
    }

    /// Number of places in the banks, and the table that says what is in them, if not all is here.
    pub(super) fn places(&self) -> (usize, Option<Tensor>) {
        (self.n_held, self.map)
    }

    /// Puts experts where `new` has them on `rank`; `packed` has those that move, by number.
    pub(super) fn rearrange(
        &mut self,
        device: &mut Device,
        (old, new): (&Owners, &Owners),
        rank: usize,
        packed: &HashMap<usize, Vec<u8>>,
    ) {
        for (place, expert) in new.changes(old, rank) {
            self.banks.write(device, place, &packed[&expert]);
        }
        self.held = new.held(rank).to_vec();
        if let Some(map) = &self.map {
            device.write(map, &new.map(rank, map.cols()));
        }
    }

    /// Where an expert stays in the banks, if it does.
    pub(super) fn place(&self, expert: usize) -> Option<usize> {
        self.held.iter().position(|&held| held == expert)
    }

    /// Bytes of the banks: allocated, and without padding.
    pub(super) fn bytes(&self, hidden: usize) -> (u64, u64) {
        self.banks.bytes(hidden, self.shape.width)
    }

    /// Adds the weighted outputs of the experts that are here for `x` `[n, hidden]` to `out`.
    /// `ids` are places in the banks, -1 where an expert is elsewhere.
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        buffers: &Buffers,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
    ) {
        if self.n_held == 0 {
            return;
        }
        match self.block_size(rec, x) {
            1 => self.record_few(rec, buffers, x, ids, weights, out),
            _ => self.record_many(rec, buffers, x, ids, weights, out),
        }
    }

    fn block_size(&self, rec: &Recording, x: Tensor) -> usize {
        self.shape.block_tokens(rec.caps(), x.dtype, x.rows())
    }

    /// Two launches, indexed by expert id.
    fn record_few(
        &self,
        rec: &mut Recording,
        buffers: &Buffers,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        residual: Tensor,
    ) {
        let (_, inner) = buffers.gated(ids.len(), self.shape.width);
        for &(first_expert, bank) in &self.banks.gate_up {
            let (label, mode) = ("gate_up", ExpertMode::Gated);
            rec.push(ExpertGemv {
                label,
                bank,
                first_expert,
                x,
                ids,
                weights: None,
                out: inner,
                mode,
            });
        }
        for &(first_expert, bank) in &self.banks.down {
            rec.push(ExpertGemv {
                label: "down",
                bank,
                first_expert,
                x: inner,
                ids,
                weights: Some(weights),
                out: residual,
                mode: ExpertMode::Combine,
            });
        }
    }

    /// Tokens sorted by expert once, then tiles of each expert's tokens: of all experts in one
    /// launch, or without block alignment in a launch for each, of as many blocks as it would have
    /// if every token chose it.
    fn record_many(
        &self,
        rec: &mut Recording,
        buffers: &Buffers,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        residual: Tensor,
    ) {
        let (n_slots, n_held, block_size) = (ids.len(), self.n_held, self.block_size(rec, x));
        let (both, inner) = buffers.gated(n_slots, self.shape.width);
        let out = buffers.rows(buffers.slots_hidden, n_slots);
        let aligned: Aligned = buffers.aligned.expect("allocated for models with experts");
        let aligned =
            aligned.reshape(AlignShape { n_entries: n_slots, n_experts: n_held, block_size });
        align_experts(rec, ids, n_held, block_size, &aligned);
        let gated = ExpertGemm::gates(rec.caps(), x.dtype);
        let blocks_each = ids.rows().div_ceil(block_size);
        let gemm = |label, first_expert, bank: Matrix, x, divide, weights, out, gated| ExpertGemm {
            label,
            bank,
            first_expert,
            x,
            divide,
            sorted_token_ids: aligned.sorted_token_ids,
            expert_ids: aligned.expert_ids,
            num_tokens_post_pad: aligned.num_tokens_post_pad,
            weights,
            out,
            gated,
            block_size,
            most_blocks: (!self.block_align).then(|| bank.n_experts * blocks_each),
            n_slots,
        };
        let launches = |banks: &[(usize, Matrix)]| match self.block_align {
            true => banks.to_vec(),
            false => singles(banks, rec.caps()),
        };
        let (gate_up, down) = (launches(&self.banks.gate_up), launches(&self.banks.down));
        for (first, bank) in gate_up {
            let out = if gated { inner } else { both };
            rec.push(gemm("gate_up", first, bank, x, self.shape.top_k, None, out, gated));
        }
        if !gated {
            rec.push(SiluMul { x: both, out: inner });
        }
        for (first, bank) in down {
            rec.push(gemm("down", first, bank, inner, 1, Some(weights), out, false));
        }
        rec.push(CombineExperts { x: out, ids, out: residual });
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
            routed: RoutedExperts::load(loader, &shape, routing, &ExpertLayout::All, 0)?,
            shared: None,
        })))
    }
}

/// Routers stay in f32: a rounded logit may choose another expert.
fn router(loader: &mut Loader<'_>, rows: Rows, hidden: usize) -> Result<Linear> {
    loader.linear(&[rows], Cols::all(hidden), WeightFormat::F32, false)
}
