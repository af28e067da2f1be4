//! Layer 3: the network in the papers' words. Layers hold handles to weights and write kernel
//! launches into a recording; they keep no state and know no requests.

pub mod arch;
mod attention;
mod banks;
mod config;
mod experts;
mod kv_cache;
mod linear;
mod loader;
mod mlp;
mod offload;
mod regime;
mod rope;
mod routed_experts;
mod rows;
mod scratch;
mod shard;
mod spec;
mod swap;
mod transformer;

pub use banks::expert_tensors;
pub use kv_cache::KvCache;
pub use loader::Precision;
pub use offload::{cache_slots, expert_bytes};
pub use regime::ExpertShape;
pub use rope::RopeScaling;
pub use scratch::{Limits, Scratch, Split, StepInputs, StepShape};
pub use shard::ExpertShard;
pub use spec::{AttentionSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, Names, SharedSpec};
pub use swap::{NewExperts, PackedRouter, pack_experts};
pub use transformer::Model;

/// A model that cannot be built from its files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// An architecture that moewe does not know.
    #[error("model_type {name:?} is not supported; supported are {supported}")]
    Architecture {
        /// The `model_type` in config.json.
        name: String,
        /// Known ones.
        supported: String,
    },
    /// A configuration value that cannot be right.
    #[error("config.json: {key}: {cause}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        cause: String,
    },
    /// int8 activations where they cannot be or bring nothing.
    #[error("w8a8 is for {what}; use w8a16")]
    Int8Activations {
        /// What they are for.
        what: &'static str,
    },
    /// Room for more experts where there can be none.
    #[error(
        "--spare-experts {n}: beside {n_experts} experts there is room for multiples of {unit} (a \
         group of the router), for 1024 experts and 32 groups in all"
    )]
    Spare {
        /// What was asked for.
        n: usize,
        /// Experts of a layer.
        n_experts: usize,
        /// Experts that come together.
        unit: usize,
    },
}
