//! The routed experts of a layer that a device holds, in one of two regimes: few tokens, each
//! indexed by its experts, or many, sorted by expert. Knows no router.

use std::collections::HashMap;

use crate::{
    Result,
    device::{DType, Device, Recording, Tensor},
    kernels::{
        AlignShape, Aligned, CombineExperts, ExpertGemm, ExpertGemv, ExpertMode, Matrix,
        QuantizeRows, Routing, SiluMul, align_experts,
    },
    parallel::{ExpertLayout, Owners},
};

use super::{
    banks::{BankShape, Banks, singles},
    loader::Loader,
    offload::Home,
    regime::ExpertShape,
    scratch::Buffers,
};

/// Blocks of the aligned regime, smallest to largest.
pub(super) const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 16..=128;

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

    /// Which expert is where, if other devices hold the rest. I32 `[experts, replicas]`
    pub(super) fn map(&self) -> Option<Tensor> {
        self.map
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
        let input = self.shape.input(x.dtype);
        let gated = ExpertGemm::gates(rec.caps(), input);
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
        // The same memory for one product's input and then for the other's.
        let quantized = |rec: &mut Recording, x: Tensor, gated: bool| {
            let cols = x.cols() / if gated { 2 } else { 1 };
            let out = buffers.quantized(x.rows(), cols);
            rec.push(QuantizeRows { x, gated, out });
            out
        };
        let int8 = input == DType::I8;
        let x = if int8 { quantized(rec, x, false) } else { x };
        for (first, bank) in gate_up {
            let out = if gated { inner } else { both };
            rec.push(gemm("gate_up", first, bank, x, self.shape.top_k, None, out, gated));
        }
        let inner = match (gated, int8) {
            (true, _) => inner,
            (false, true) => quantized(rec, both, true),
            (false, false) => {
                rec.push(SiluMul { x: both, out: inner });
                inner
            }
        };
        for (first, bank) in down {
            rec.push(gemm("down", first, bank, inner, 1, Some(weights), out, false));
        }
        rec.push(CombineExperts { x: out, ids, out: residual });
    }
}
