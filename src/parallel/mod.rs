//! Experts that are not all on one device: who owns them, how activations reach their owners, and
//! which of them a device holds for now. A leaf: it knows devices and banks, neither layers'
//! recordings nor requests.

mod balance;
mod cache;
#[cfg(feature = "mpi")]
pub mod cluster;
mod exchange;
mod owners;
mod placement;
mod rebalance;
pub mod simulate;

pub use balance::{Cluster, balancedness, is_improvement, preserve_slots, rebalance, replicate};
pub use cache::{CacheLayer, CacheOptions, CachePolicy, CacheSlots, CacheStats, CacheTally};
pub use exchange::{Exchange, ExchangeStats, Handoff, PackedExpert, Rows, Sharded, Worker};
pub use owners::{ExpertLayout, Owners, Share};
pub use placement::{Placement, Rank};
pub use rebalance::{EplbOptions, EplbStats, Rebalancer};

/// Experts that cannot be spread as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParallelError {
    /// An expert that nobody would hold, or that does not exist.
    #[error("the placement of {n_experts} experts {cause}; each must be on one device or more")]
    Placement {
        /// Experts of the layer.
        n_experts: usize,
        /// What is wrong.
        cause: String,
    },
    /// A placement file that says something else.
    #[error("the placement file cannot be used: {cause}")]
    PlacementFile {
        /// What is wrong.
        cause: String,
    },
    /// More experts than all devices hold together.
    #[error("a layer's {n_experts} experts need as many slots, and all devices have {n_slots}")]
    NoRoom {
        /// Experts of the layer.
        n_experts: usize,
        /// Slots of all devices.
        n_slots: usize,
    },
    /// A cache too small for what one token needs.
    #[error(
        "an expert cache of {bytes} bytes is too small: a token's experts need {least} bytes over \
         all layers; give --expert-cache-memory at least that"
    )]
    CacheTooSmall {
        /// What was given.
        bytes: u64,
        /// What a token needs.
        least: u64,
    },
    /// The name of a policy that does not exist.
    #[error("{text:?} is no cache policy; use lru or lfu")]
    CachePolicy {
        /// What was given.
        text: String,
    },
    /// A job of several hosts that cannot go on.
    #[error("the MPI job: {cause}")]
    Cluster {
        /// What is wrong.
        cause: String,
    },
    /// A simulation without the numbers that it needs.
    #[error("this cannot be simulated: {cause}")]
    Simulate {
        /// What is missing.
        cause: String,
    },
    /// A file of experts that this model cannot take.
    #[error("the experts cannot be taken: {cause}")]
    NewExperts {
        /// What is wrong.
        cause: String,
    },
    /// A cache for more experts than its kernel knows.
    #[error(
        "an expert cache knows {most} experts of a layer at most, and this one has {n_experts}"
    )]
    CacheTooMany {
        /// Experts of the layer.
        n_experts: usize,
        /// The limit.
        most: usize,
    },
    /// A device that computes experts for another one failed.
    #[error("device {rank}, which holds some of the experts, failed: {source}")]
    Worker {
        /// Which one; 0 is the primary.
        rank: usize,
        /// What it said.
        source: Box<crate::Error>,
    },
}

impl ParallelError {
    /// That the device of a rank said this.
    pub(crate) fn worker(rank: usize, error: crate::Error) -> Self {
        Self::Worker { rank, source: Box::new(error) }
    }
}
