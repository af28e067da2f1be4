//! Checkpoints: where tensors come from and how they are packed for the device.
//!
//! A [`Source`] yields one named tensor at a time in the dtype of its file; a [`WeightFormat`]
//! packs it row by row for the kernels. Nothing here knows a model, a layer or a GPU.

mod checkpoint;
mod dummy;
mod files;
mod format;
#[cfg(all(feature = "hub", not(target_arch = "wasm32")))]
pub mod hub;
mod integers;
mod safetensors;
mod source;

use std::path::PathBuf;

pub use checkpoint::Checkpoint;
pub use dummy::DummySource;
pub(crate) use dummy::mix;
#[cfg(not(target_arch = "wasm32"))]
pub use files::Directory;
pub use files::{FileBytes, Files, read_bounded};
pub use format::{Encoded, PAD, WeightFormat, padded};
pub use safetensors::{Entry, Header};
pub use source::{MemorySource, Source, SourceDtype, SourceTensor, scale_name};

/// A checkpoint that cannot be read, or a tensor in it that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file or directory that the system refuses to read.
    #[error("cannot read {path:?}: {cause}; check that it exists and that you may read it")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// A directory without weights.
    #[error(
        "{dir:?} has neither model.safetensors nor model.safetensors.index.json; give the \
         directory of a safetensors checkpoint (convert .bin or .pth files first)"
    )]
    NoCheckpoint {
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// A safetensors header that cannot be parsed.
    #[error("the safetensors header of {file:?} is invalid: {cause}; download the file again")]
    Header {
        /// The safetensors file.
        file: PathBuf,
        /// What is wrong, in one phrase.
        cause: String,
    },
    /// A header entry that contradicts itself, its neighbours or the file.
    #[error("tensor {name:?} in {file:?} is invalid: {cause}; download the file again")]
    Entry {
        /// The safetensors file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong, in one phrase.
        cause: String,
    },
    /// A file whose length is not what its header says.
    #[error(
        "{file:?} has {actual} bytes where its header describes {expected}; the file is cut off \
         or damaged, download it again"
    )]
    Length {
        /// The safetensors file.
        file: PathBuf,
        /// Bytes that the header accounts for, itself included.
        expected: u64,
        /// Bytes of the file.
        actual: u64,
    },
    /// A `model.safetensors.index.json` that cannot be used.
    #[error("the shard index {file:?} is invalid: {cause}; download it again")]
    Index {
        /// The index file.
        file: PathBuf,
        /// What is wrong, in one phrase.
        cause: String,
    },
    /// A shard that the index names and the directory lacks.
    #[error("{index:?} names the shard {shard:?}, which is absent; download the missing file")]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard, as the index spells it.
        shard: String,
    },
    /// A tensor that the index promises and the shard lacks.
    #[error(
        "the index says that tensor {name:?} is in {file:?}, but it is not; index and shards are \
         of different versions, download all of them again"
    )]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        name: String,
    },
    /// One tensor in two shards.
    #[error(
        "tensor {name:?} is in both {first:?} and {second:?}; shards of different checkpoints are \
         mixed, download them again into an empty directory"
    )]
    Duplicate {
        /// The tensor.
        name: String,
        /// The shard read first.
        first: PathBuf,
        /// The shard that repeats it.
        second: PathBuf,
    },
    /// A tensor that the model needs and the checkpoint lacks.
    #[error(
        "tensor {name:?} is not in {file:?}{}; check that config.json belongs to these weights",
        close_names(.close)
    )]
    Missing {
        /// The tensor.
        name: String,
        /// Where it was searched.
        file: PathBuf,
        /// Up to three names that resemble it, the closest first.
        close: Vec<String>,
    },
    /// A tensor whose shape is not what the model's configuration implies.
    #[error(
        "tensor {name:?} in {file:?} has shape {actual:?} where the model needs {expected:?}; \
         check that config.json belongs to these weights"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Where it is.
        file: PathBuf,
        /// Shape that the model asked for.
        expected: Vec<usize>,
        /// Shape in the file.
        actual: Vec<usize>,
    },
    /// A tensor of a dtype that no kernel takes.
    #[error(
        "tensor {name:?} in {file:?} has dtype {dtype}, but weights must be F32, F16, BF16, or I8 \
         or U8 (pairs of int4) with a tensor {name}_scale beside; use a checkpoint that is not \
         quantised, or quantise one with `moewe quantize`"
    )]
    Dtype {
        /// The tensor.
        name: String,
        /// Where it is.
        file: PathBuf,
        /// Its dtype, as the file spells it.
        dtype: String,
    },
    /// Scales whose count fits no way of sharing them.
    #[error(
        "quantised tensor {name:?} of shape {shape:?} has {n_scales} scales, but it takes one per \
         32, 64 or 128 columns, or one per row of int8; quantise the model again"
    )]
    Scales {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Scales beside it.
        n_scales: usize,
    },
    /// Bytes whose count does not follow from shape and dtype.
    #[error(
        "tensor {name:?} of shape {shape:?} and dtype {dtype:?} was given {actual} bytes; give \
         exactly the product of the shape times the size of the dtype"
    )]
    Bytes {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype.
        dtype: SourceDtype,
        /// Bytes that were given.
        actual: usize,
    },
    /// A tensor beyond what memory can address or this library accepts.
    #[error("tensor {name:?} of shape {shape:?} is too large; check the sizes in config.json")]
    TooLarge {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A NaN or infinity among the weights.
    #[error(
        "tensor {name:?} holds {value} at row {row}, column {col}; the checkpoint is damaged or \
         its training diverged, download it again or use another one"
    )]
    NonFinite {
        /// The tensor.
        name: String,
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The text of a weight format that does not exist.
    #[error(
        "{text:?} is no weight format; use f32, f16, w8a8, w8a16, or w8a16-g32, -g64, -g128, or \
         w4a16-g32, -g64, -g128"
    )]
    Format {
        /// What was given.
        text: String,
    },
    /// A model id, revision or cache that cannot be used with the hub.
    #[error("{what} {text:?} cannot be used: {cause}")]
    HubInput {
        /// Which input: "model id", "revision", "cache".
        what: &'static str,
        /// What was given.
        text: String,
        /// What is wrong and what to give instead.
        cause: String,
    },
    /// A file that the cache lacks while no download is allowed.
    #[error(
        "{id:?} at revision {revision:?} is not complete in the cache {cache:?} ({what} is \
         absent); download it once with the network allowed (unset HF_HUB_OFFLINE)"
    )]
    NotCached {
        /// The model id.
        id: String,
        /// The revision.
        revision: String,
        /// The cache directory.
        cache: PathBuf,
        /// The first file that is absent.
        what: String,
    },
    /// A download that failed.
    #[error(
        "cannot download {what} of {id:?} at revision {revision:?}: {cause}; check the id, the \
         revision and the network, and for a gated model accept its licence and set HF_TOKEN"
    )]
    Download {
        /// The model id.
        id: String,
        /// The revision.
        revision: String,
        /// The file, or "the file list".
        what: String,
        /// What the client said.
        cause: String,
    },
}

/// The part of a sentence that offers `close`, empty where there is nothing to offer.
fn close_names(close: &[String]) -> String {
    if close.is_empty() { String::new() } else { format!(" (close names: {})", close.join(", ")) }
}

/// Runs both halves of a task, in parallel where there are threads.
fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    #[cfg(not(target_arch = "wasm32"))]
    return rayon::join(a, b);
    #[cfg(target_arch = "wasm32")]
    return (a(), b());
}

/// What `f` makes of each item, in parallel where there are threads.
pub(crate) fn map_all<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        items.par_iter().map(f).collect()
    }
    #[cfg(target_arch = "wasm32")]
    return items.iter().map(f).collect();
}
