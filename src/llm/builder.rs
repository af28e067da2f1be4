//! What to load and how, set one by one.

use crate::{
    device::DeviceChoice,
    engine::EngineConfig,
    parallel::{CacheOptions, EplbOptions},
    weights::WeightFormat,
};

use super::{ExpertPlacement, Llm, LlmOptions, LoadFormat};

/// Sets [`LlmOptions`] and loads the model; made by [`Llm::builder`].
#[derive(Debug, Clone, Default)]
pub struct LlmBuilder(LlmOptions);

macro_rules! setters {
    ($($(#[$doc:meta])* $field:ident: $argument:ty => $value:expr),* $(,)?) => {
        impl LlmBuilder {
            $($(#[$doc])*
            #[must_use]
            pub fn $field(mut self, $field: $argument) -> Self {
                self.0.$field = $value;
                self
            })*
        }
    };
}

setters! {
    /// A directory, or `owner/name` on the hub; the default model otherwise.
    model: impl Into<String> => Some(model.into()),
    /// Branch, tag or commit on the hub.
    revision: impl Into<String> => Some(revision.into()),
    /// Never ask the hub; use its cache.
    offline: bool => offline,
    /// Which adapter; the best one otherwise.
    device: DeviceChoice => device,
    /// Further devices that hold a share of the experts.
    expert_devices: Vec<DeviceChoice> => expert_devices,
    /// Which experts go where.
    expert_placement: ExpertPlacement => expert_placement,
    /// Split steps of so many tokens and more in two where experts are on several devices.
    dual_batch_tokens: usize => dual_batch_tokens,
    /// Move experts between the devices as their work asks for.
    eplb: EplbOptions => Some(eplb),
    /// Keep all experts in the host's memory, and so many bytes of them on the device.
    expert_cache: CacheOptions => Some(expert_cache),
    /// Room for so many more experts in each layer, for [`Llm::take_experts`].
    spare_experts: usize => spare_experts,
    /// Packing of the experts' weights; by default as a quantised checkpoint has them, else int8.
    weights: WeightFormat => Some(weights),
    /// Multiply the tokens of all experts in one launch; if not, in one for each expert.
    moe_block_align: bool => moe_block_align,
    /// Where weights come from.
    load_format: LoadFormat => load_format,
    /// Longest context, tokens.
    max_model_len: usize => Some(max_model_len),
    /// Tokens of a step.
    max_num_batched_tokens: usize => max_num_batched_tokens,
    /// Sequences of a step.
    max_num_seqs: usize => max_num_seqs,
    /// Positions of a cache block.
    block_size: usize => block_size,
    /// Device memory to stay within, bytes.
    memory_limit: u64 => Some(memory_limit),
    /// Share of the device's memory to use.
    gpu_memory_utilization: f32 => gpu_memory_utilization,
    /// Size of the key/value cache, bytes.
    kv_cache_memory: u64 => Some(kv_cache_memory),
    /// How the engine schedules.
    engine: EngineConfig => engine,
}

impl LlmBuilder {
    /// The options as set.
    pub fn options(self) -> LlmOptions {
        self.0
    }

    /// Loads the model.
    ///
    /// # Errors
    /// [`crate::Error`] for files that are missing or wrong and for models that do not fit.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn build(self) -> crate::Result<Llm> {
        Llm::open(self.0)
    }
}

impl Llm {
    /// Begins with the default model on the best adapter.
    ///
    /// ```
    /// # fn main() -> moewe::Result<()> {
    /// use moewe::{engine::SamplingParams, llm::Llm};
    ///
    /// let mut llm = Llm::builder().max_model_len(128).build()?;
    /// let params = SamplingParams { max_tokens: Some(8), ..SamplingParams::greedy() };
    /// let story = llm.complete("Once upon a time", params)?;
    /// assert_eq!(story.tokens.len(), 8);
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder() -> LlmBuilder {
        LlmBuilder::default()
    }
}
