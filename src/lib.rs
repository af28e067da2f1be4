//! Mixture-of-Experts language models on any GPU, through WGSL compute shaders on wgpu.
//!
//! Start with [`llm::Llm`], which finds a model, plans its memory, loads it and generates text:
//!
//! ```no_run
//! use moewe::{engine::SamplingParams, llm::Llm};
//!
//! let mut llm = Llm::builder().max_model_len(256).build()?;
//! let prompt = llm.raw_prompt("Once upon a time")?;
//! let params = SamplingParams { max_tokens: Some(100), ..llm.defaults.clone() };
//! let answer = llm.generate(&prompt, params, vec!["The end".into()], |piece| {
//!     print!("{piece}");
//!     true
//! })?;
//! println!("\n{} tokens", answer.tokens.len());
//! # Ok::<(), moewe::Error>(())
//! ```
//!
//! Below it, a folder is a layer and imports point one way:
//!
//! | | |
//! | --- | --- |
//! | [`engine`] | who runs when: sequences, token budget, cache blocks |
//! | [`model`] | the network: layers hold handles to weights and write recordings |
//! | [`kernels`] | a WGSL shader, its launch and its CPU twin under one name |
//! | [`device`] | memory and dispatch; the only place that knows wgpu |
//!
//! [`weights`] (checkpoints and their packing), [`text`] (tokenizer, chat template, stream) and
//! [`parallel`] (experts over several devices) are leaves. [`evaluate`] holds a model against
//! references, [`bench`](mod@bench) measures it, [`server`] puts it behind OpenAI's HTTP interface.

pub mod bench;
pub mod device;
pub mod engine;
pub mod error;
#[cfg(not(target_arch = "wasm32"))]
pub mod evaluate;
pub mod kernels;
pub mod llm;
pub mod model;
pub mod parallel;
#[cfg(not(target_arch = "wasm32"))]
pub mod server;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
