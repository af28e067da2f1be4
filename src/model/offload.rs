//! Experts that stay in the host's memory and visit the device in turn: each layer has slots there,
//! which kernels give to the experts that the router chose, and fill from the host's memory. The
//! host takes no part in it.

use crate::{
    Result,
    device::{DType, Device, Recording, Tensor},
    kernels::{CacheExperts, FetchExperts, Matrix},
    parallel::{CacheLayer, CachePolicy, CacheSlots, ParallelError},
};

use super::{
    ModelSpec, Precision,
    banks::{BankShape, Banks, names},
    loader::Loader,
};

/// A layer's experts at home, and what is known of its slots.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// In the host's memory.
    banks: Banks,
    n_places: usize,
    /// Fewer than places.
    n_slots: usize,
    policy: CachePolicy,
    expert_bytes: u64,
    /// See [`CacheExperts::state`]. U32 `[CacheExperts::words]`
    state: Tensor,
    /// See [`CacheExperts::moves`]. U32 `[1 + n_slots, 2]`
    moves: Tensor,
}

/// Slots of each layer for a cache of so many bytes.
///
/// # Errors
/// [`ParallelError::CacheTooSmall`] unless every layer has a slot for each expert of a token.
pub fn cache_slots(spec: &ModelSpec, precision: Precision, bytes: u64) -> Result<usize> {
    let of_all = expert_bytes(spec, precision);
    let most = spec.moe_layers().map(|(_, moe)| moe.routing.top_k).max().unwrap_or(0);
    let slots = bytes / of_all.max(1);
    if slots < most as u64 {
        return Err(ParallelError::CacheTooSmall { bytes, least: of_all * most as u64 }.into());
    }
    Ok((slots as usize).min(spec.n_experts()))
}

/// Bytes that one expert takes in all layers together.
pub fn expert_bytes(spec: &ModelSpec, precision: Precision) -> u64 {
    let of_layer = |(index, moe)| {
        BankShape::of(spec, moe, names(|_| false, spec, index).1, precision).expert_bytes()
    };
    spec.moe_layers().map(of_layer).sum()
}

impl Home {
    /// Loads experts, in this order, into the first of so many places in the host's memory. All of
    /// a layer's slots are empty.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        shape: &BankShape,
        held: &[usize],
        n_places: usize,
        slots: CacheSlots,
    ) -> Result<Self> {
        let banks = loader.on_host(|loader| shape.load(loader, held, n_places))?;
        let CacheSlots { n: n_slots, policy } = slots;
        if n_places > CacheExperts::MOST_EXPERTS {
            let most = CacheExperts::MOST_EXPERTS;
            return Err(ParallelError::CacheTooMany { n_experts: n_places, most }.into());
        }
        let words = CacheExperts::words(n_places, n_slots);
        Ok(Self {
            banks,
            n_places,
            n_slots,
            policy,
            expert_bytes: shape.expert_bytes(),
            state: loader.alloc("expert slots", &[words], DType::U32)?,
            moves: loader.alloc("expert moves", &[1 + n_slots, 2], DType::U32)?,
        })
    }

    /// Where the experts stay.
    pub(super) fn banks(&self) -> &Banks {
        &self.banks
    }

    /// Slots that the device has for them.
    pub(super) fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// What the kernels have counted. U32 `[CacheExperts::COUNTERS]`
    pub(super) fn counters(&self) -> Tensor {
        self.state.reshape(&[CacheExperts::COUNTERS])
    }

    /// The layer's size.
    pub(super) fn size(&self) -> CacheLayer {
        let Self { n_places, n_slots, expert_bytes, .. } = *self;
        CacheLayer { slots: n_slots as u64, experts: n_places as u64, expert_bytes }
    }

    /// Empties the slots: what they hold is no longer what is at home.
    pub(super) fn forget(&self, device: &mut Device) {
        let tables = CacheExperts::tables(self.n_places, self.n_slots);
        let zeros = vec![0; (tables.end - tables.start) as usize];
        device.write_at(&self.state, tables.start, &zeros);
    }

    /// Turns that a layer may take in which so many experts are chosen, each once or more.
    pub(super) fn turns(&self, n_chosen: usize) -> usize {
        n_chosen.min(self.n_places).div_ceil(self.n_slots)
    }

    /// Brings the experts of a turn into `slots`; `ids` are places at home, and `slot_ids` become
    /// slots, -1 for experts of other turns. I32 `[n, top_k]` both
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        slots: &Banks,
        turn: usize,
        ids: Tensor,
        slot_ids: Tensor,
    ) {
        let &Self { ref banks, n_places, n_slots, policy, state, moves, .. } = self;
        rec.push(CacheExperts {
            ids,
            state,
            moves,
            out: slot_ids,
            n_experts: n_places,
            n_slots,
            turn,
            by_uses: policy == CachePolicy::Lfu,
        });
        let most_moves = ids.len().min(n_slots);
        for (home, slots) in [(&banks.gate_up, &slots.gate_up), (&banks.down, &slots.down)] {
            for &(from, home) in home {
                for &(to, slots) in slots {
                    fetch(rec, moves, most_moves, (from, home), (to, slots));
                }
            }
        }
    }
}

/// Weights, and scales where there are some.
fn fetch(
    rec: &mut Recording,
    moves: Tensor,
    most_moves: usize,
    (from, home): (usize, Matrix),
    (to, slots): (usize, Matrix),
) {
    let (from, to) = (from..from + home.n_experts, to..to + slots.n_experts);
    let mut push = |home, slots| {
        let (from, to) = (from.clone(), to.clone());
        rec.push(FetchExperts { moves, most_moves, from, home, to, slots });
    };
    push(home.weights, slots.weights);
    if home.scales != home.weights {
        push(home.scales, slots.scales);
    }
}
