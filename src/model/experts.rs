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
    offload::Home,
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
    /// Where the experts stay, if the banks are slots that they visit in turn.
    home: Option<Home>,
    /// Places in the banks.
    n_here: usize,
    /// Experts by place, at home if they have one.
    held: Vec<usize>,
    /// Which is where, if other devices hold the rest and their sums come in; ids are places if
    /// absent.
    map: Option<Tensor>,
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
        let Some(map) = self.routed.map else {
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
        if self.routed.map.is_some() {
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

impl RoutedExperts {
    /// Loads what `layout` says of layer `moe_index` among those that have experts.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        shape: &BankShape,
        routing: Routing,
        layout: &ExpertLayout,
        moe_index: usize,
    ) -> Result<Self> {
        let (held, n_places, map) = match &layout.share {
            None => ((0..routing.n_experts).collect(), routing.n_experts, None),
            Some(share) => {
                let held = share.owners[moe_index].held(share.rank).to_vec();
                let (cols, map) = share.map(moe_index);
                let map = loader.table("expert map", &[routing.n_experts, cols], &map)?;
                (held, share.places(moe_index), Some(map))
            }
        };
        let home = match layout.slots.filter(|slots| slots.n < n_places) {
            Some(slots) => Some(Home::load(loader, shape, &held, n_places, slots)?),
            None => None,
        };
        let (banks, n_here) = match &home {
            Some(home) => (shape.load(loader, &[], home.n_slots())?, home.n_slots()),
            None => (shape.load(loader, &held, n_places)?, n_places),
        };
        Ok(Self {
            banks,
            home,
            shape: ExpertShape {
                hidden: shape.hidden,
                width: shape.width,
                n_experts: routing.n_experts,
                top_k: routing.top_k,
                format: shape.format,
            },
            n_here,
            held,
            map,
            block_align: true,
        })
    }

    /// See [`super::Model::with_block_align`].
    pub(super) fn set_block_align(&mut self, on: bool) {
        self.block_align = on;
    }

    /// Where the experts stay, if they visit the device in turn.
    pub(super) fn home(&self) -> Option<&Home> {
        self.home.as_ref()
    }

    /// The packed expert at a place.
    pub(super) fn read(&self, device: &mut Device, place: usize) -> Result<Vec<u8>> {
        self.home.as_ref().map_or(&self.banks, Home::banks).read(device, place)
    }

    /// Overwrites the expert at a place with a packed one.
    pub(super) fn write(&self, device: &mut Device, place: usize, packed: &[u8]) {
        self.home.as_ref().map_or(&self.banks, Home::banks).write(device, place, packed);
        if let Some(home) = &self.home {
            home.forget(device);
        }
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
            self.write(device, place, &packed[&expert]);
        }
        self.held = new.held(rank).to_vec();
        if let Some(map) = &self.map {
            device.write(map, &new.map(rank, map.cols()));
        }
    }

    /// The place where an expert stays, if it does.
    pub(super) fn place(&self, expert: usize) -> Option<usize> {
        self.held.iter().position(|&held| held == expert)
    }

    /// Bytes of the banks: allocated, and without padding and room for experts beyond the first
    /// `n_present`.
    pub(super) fn bytes(&self, n_present: usize) -> (u64, u64) {
        let n = match self.home {
            Some(_) => self.n_here,
            None => self.held.iter().filter(|&&expert| expert < n_present).count(),
        };
        self.banks.bytes(n, self.shape.hidden, self.shape.width)
    }

    /// Adds the weighted outputs of this device's experts for `x` `[n, hidden]` to `out`. `ids` are
    /// their places, -1 where an expert is elsewhere.
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        buffers: &Buffers,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
    ) {
        if self.n_here == 0 {
            return;
        }
        let Some(home) = &self.home else {
            return self.record_here(rec, buffers, x, ids, weights, out);
        };
        let slot_ids = buffers.slot_ids.reshape(&[ids.rows(), ids.cols()]);
        for turn in 0..home.turns(ids.len()) {
            home.record(rec, &self.banks, turn, ids, slot_ids);
            self.record_here(rec, buffers, x, slot_ids, weights, out);
        }
    }

    /// The same for experts in the banks.
    fn record_here(
        &self,
        rec: &mut Recording,
        buffers: &Buffers,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
    ) {
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
        let (n_slots, n_here, block_size) = (ids.len(), self.n_here, self.block_size(rec, x));
        let (both, inner) = buffers.gated(n_slots, self.shape.width);
        let out = buffers.rows(buffers.slots_hidden, n_slots);
        let aligned: Aligned = buffers.aligned.expect("allocated for models with experts");
        let aligned =
            aligned.reshape(AlignShape { n_entries: n_slots, n_experts: n_here, block_size });
        align_experts(rec, ids, n_here, block_size, &aligned);
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
            routed: RoutedExperts::load(loader, &shape, routing, &ExpertLayout::default(), 0)?,
            shared: None,
        })))
    }
}

/// Routers stay in f32: a rounded logit may choose another expert.
fn router(loader: &mut Loader<'_>, rows: Rows, hidden: usize) -> Result<Linear> {
    loader.linear(&[rows], Cols::all(hidden), WeightFormat::F32, false)
}
