//! Experts that are not all on one device: who owns them, how activations reach their owners, and
//! which of them a device holds for now. A leaf: it knows devices and banks, neither layers'
//! recordings nor requests.

mod exchange;
mod owners;

pub use exchange::{Exchange, ExchangeStats, Handoff, Rows, Sharded, Worker};
pub use owners::{ExpertLayout, Owners};

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
    /// A device that computes experts for another one failed.
    #[error("device {rank}, which holds some of the experts, failed: {cause}")]
    Worker {
        /// Which one; 0 is the primary.
        rank: usize,
        /// What it said.
        cause: String,
    },
}
