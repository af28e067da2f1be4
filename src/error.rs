//! The library's error: one variant per layer, each with a sentence that names cause and cure.

use crate::{
    device::DeviceError, engine::EngineError, llm::FilesError, model::ModelError,
    parallel::ParallelError, text::TextError, weights::WeightsError,
};
#[cfg(not(target_arch = "wasm32"))]
use crate::{evaluate::EvaluateError, llm::GrammarError};

/// Anything that can go wrong between a request and its text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The adapter, its driver or its memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A request or its parameters.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A reference to compare with.
    #[cfg(not(target_arch = "wasm32"))]
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Where the model's files are.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// What an answer must look like.
    #[cfg(not(target_arch = "wasm32"))]
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The model's configuration.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Experts over several devices.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
    /// Checkpoint files and their tensors.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Tokenizer and chat template.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// Result of this library's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
