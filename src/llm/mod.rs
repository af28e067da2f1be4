//! A model ready to talk: files found and read, memory planned, weights loaded, and text in and
//! out around the engine. What programs and the command line start from.

mod answer;
mod builder;
mod files;
#[cfg(not(target_arch = "wasm32"))]
mod grammar;
mod measure;
mod memory;
mod prompt;
#[cfg(not(target_arch = "wasm32"))]
mod quantize;
#[cfg(feature = "mpi")]
mod remote;
mod spread;
#[cfg(not(target_arch = "wasm32"))]
mod tools;

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    Result,
    device::{Device, DeviceChoice, Faults, Tier},
    engine::{Engine, EngineConfig, Runner, SamplingParams},
    model::{KvCache, Limits, Model, ModelSpec, Precision, pack_experts},
    parallel::{CacheOptions, EplbOptions},
    text::{ChatTemplate, Tokenizer},
    weights::{Checkpoint, DummySource, Files, Source, WeightFormat},
};

pub use answer::{Answer, Generation};
pub use builder::LlmBuilder;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use files::read_json;
pub use files::{DEFAULT_MODEL, FilesError, locate};
#[cfg(not(target_arch = "wasm32"))]
pub use grammar::{Grammar, GrammarCompiler, GrammarError};
pub use memory::MemoryPlan;
pub use prompt::chat_prompt;
#[cfg(not(target_arch = "wasm32"))]
pub use quantize::{Quantized, quantize};
#[cfg(feature = "mpi")]
pub use remote::serve_experts;
pub use spread::ExpertPlacement;
use spread::Spread;
#[cfg(not(target_arch = "wasm32"))]
pub use tools::{tell_tools, tool_format, tool_grammar};

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    Safetensors,
    /// Random numbers in the shapes of config.json.
    Dummy,
}

/// What to load and how.
#[derive(Debug, Clone)]
pub struct LlmOptions {
    /// A directory, or `owner/name` on the hub; the default model if absent.
    pub model: Option<String>,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
    /// Never ask the hub; use its cache.
    pub offline: bool,
    /// Which adapter.
    pub device: DeviceChoice,
    /// Further devices that hold a share of the experts; the primary one holds the first share
    /// and everything else.
    pub expert_devices: Vec<DeviceChoice>,
    /// Which experts go where.
    pub expert_placement: ExpertPlacement,
    /// Let the other ranks of this MPI job hold shares of the experts, and wait so long for each
    /// answer of theirs; needs the feature `mpi`.
    pub mpi: Option<Duration>,
    /// Split steps of so many tokens and more in two, so that the trip of one part to other devices
    /// hides behind the work of the other.
    pub dual_batch_tokens: usize,
    /// Move experts between the devices as their work asks for.
    pub eplb: Option<EplbOptions>,
    /// Keep all experts in the host's memory, and so many bytes of them on each device.
    pub expert_cache: Option<CacheOptions>,
    /// Room for so many more experts in each layer, see [`Llm::take_experts`].
    pub spare_experts: usize,
    /// Highest tier of the adapter to use, for tests and to rule a tier out; all if absent.
    pub tier: Option<Tier>,
    /// Packing of the experts' weights, see [`Precision::of`]; if absent, that of a checkpoint
    /// which [`quantize`] wrote, else int8 with one scale per output channel.
    pub weights: Option<WeightFormat>,
    /// Packing of all other matrices but the routers, which stay in f32; what goes with `weights`
    /// if absent.
    pub dense_weights: Option<WeightFormat>,
    /// Multiply the tokens of all experts in one launch, see [`Model::with_block_align`].
    pub moe_block_align: bool,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Whether to load tokenizer and chat template; token ids work without.
    pub text: bool,
    /// Longest context, tokens, cut to the model's own; that, but at most 4096, if absent.
    pub max_model_len: Option<usize>,
    /// Tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Sequences of a step.
    pub max_num_seqs: usize,
    /// Rows of logits of a step; at least one per sequence.
    pub max_logits: usize,
    /// Positions of a cache block.
    pub block_size: usize,
    /// Device memory to stay within, bytes; what the device reports if absent.
    pub memory_limit: Option<u64>,
    /// Share of the device's memory to use.
    pub gpu_memory_utilization: f32,
    /// Size of the key/value cache, bytes; what is left beside weights and activations if absent,
    /// but never more than all sequences at full length need.
    pub kv_cache_memory: Option<u64>,
    /// How the engine schedules.
    pub engine: EngineConfig,
}

impl Default for LlmOptions {
    fn default() -> Self {
        Self {
            model: None,
            revision: None,
            offline: false,
            device: DeviceChoice::Auto,
            expert_devices: Vec::new(),
            expert_placement: ExpertPlacement::Linear,
            mpi: None,
            dual_batch_tokens: DUAL_BATCH_TOKENS,
            eplb: None,
            expert_cache: None,
            spare_experts: 0,
            tier: None,
            weights: None,
            dense_weights: None,
            moe_block_align: true,
            load_format: LoadFormat::Safetensors,
            text: true,
            max_model_len: None,
            max_num_batched_tokens: 512,
            max_num_seqs: 1,
            max_logits: 1,
            block_size: 16,
            memory_limit: None,
            gpu_memory_utilization: 0.92,
            kv_cache_memory: None,
            engine: EngineConfig::default(),
        }
    }
}

impl LlmOptions {
    /// Opens an adapter, without what lies above [`LlmOptions::tier`].
    pub(crate) async fn open(&self, choice: &DeviceChoice) -> Result<Device> {
        let mut device = Device::open(choice).await?;
        if let Some(tier) = self.tier {
            device.shrink(tier);
        }
        Ok(device)
    }

    /// Number formats of the model.
    pub fn precision(&self) -> Precision {
        let usual = Precision::of(self.weights.unwrap_or(WeightFormat::W8 { group: None }));
        Precision { rest: self.dense_weights.unwrap_or(usual.rest), ..usual }
    }
}

/// A model whose files are read and whose memory is planned, not yet loaded.
#[derive(Debug)]
pub struct PlannedLlm {
    /// The model's directory.
    pub dir: PathBuf,
    /// What the network looks like.
    pub spec: ModelSpec,
    /// What it will take.
    pub memory: MemoryPlan,
    files: Box<dyn Files>,
    device: Device,
    spread: Spread,
    limits: Limits,
    n_blocks: usize,
    max_model_len: usize,
    defaults: SamplingParams,
    options: LlmOptions,
}

/// A loaded model with its tokenizer and chat template.
#[derive(Debug)]
pub struct Llm {
    /// The model's directory.
    pub dir: PathBuf,
    /// Runs requests.
    pub engine: Engine,
    /// Text to tokens and back; `None` where [`LlmOptions::text`] is off or a dummy model has none.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// How a conversation becomes a prompt.
    pub template: Option<ChatTemplate>,
    /// Sampling as the model's generation_config.json suggests.
    pub defaults: SamplingParams,
}

impl PlannedLlm {
    /// Finds the model, opens the device and plans memory.
    ///
    /// # Errors
    /// [`crate::Error`] for files that are missing or wrong and for models that cannot fit.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new(options: LlmOptions) -> Result<Self> {
        let dir = files::resolve(&options)?;
        let files = Box::new(crate::weights::Directory(dir.clone()));
        pollster::block_on(Self::from_files(files, dir, options))
    }

    /// As [`PlannedLlm::new`], for files that lie anywhere; `dir` is what errors call the place.
    ///
    /// # Errors
    /// Those of [`PlannedLlm::new`].
    pub async fn from_files(
        files: Box<dyn Files>,
        dir: PathBuf,
        mut options: LlmOptions,
    ) -> Result<Self> {
        options.block_size = options.block_size.clamp(1, MAX_STEP_TOKENS);
        let files::Config { spec, defaults, weights } = files::read_config(&*files, &dir)?;
        let spec = spec.with_spare_experts(options.spare_experts)?;
        options.weights = options.weights.or(weights);
        let device = options.open(&options.device).await?;
        let longest = options.max_model_len.unwrap_or(spec.max_position.min(DEFAULT_MAX_LEN));
        let max_model_len = longest.clamp(1, spec.max_position);
        let max_blocks = max_model_len.div_ceil(options.block_size);
        let limits = Limits {
            max_tokens: options.max_num_batched_tokens.clamp(1, MAX_STEP_TOKENS),
            max_sequences: options.max_num_seqs.max(1),
            max_logits: options.max_logits.max(options.max_num_seqs),
            max_blocks,
            max_penalized: options.max_num_seqs.clamp(1, 32),
        }
        .fit(&spec, &device.caps());
        let spread = Spread::open(&options, &device, &spec, &limits).await?;
        let limits = spread.fit(limits, &spec);
        let layout = spread.layout();
        let (memory, n_blocks) =
            memory::plan(&options, &spec, &limits, max_model_len, &layout, &device)?;
        Ok(Self {
            dir,
            spec,
            memory,
            files,
            device,
            spread,
            limits,
            n_blocks,
            max_model_len,
            defaults,
            options,
        })
    }

    /// Adapter, backend and tier, or why the CPU computes.
    pub fn device(&self) -> String {
        match (&self.device, &self.options.device) {
            (Device::Cpu(_), DeviceChoice::Auto) => {
                "cpu: no Vulkan, Metal or DX12 adapter was found, so this will be slow".into()
            }
            _ => self.device.describe(),
        }
    }

    /// Devices beside the primary one, as [`PlannedLlm::device`].
    pub fn expert_devices(&self) -> Vec<String> {
        self.spread.describe()
    }

    /// What was measured of each device, in words, where [`ExpertPlacement::Balanced`] asked for
    /// it.
    pub fn measurements(&self) -> &[String] {
        self.spread.measurements()
    }

    /// Makes the primary device fail, for tests.
    pub fn faults(&self) -> Faults {
        self.device.faults()
    }

    /// Loads weights; `progress` hears of bytes uploaded.
    ///
    /// # Errors
    /// [`crate::Error`] for broken checkpoints, tokenizers and templates, and device failures.
    pub fn load(mut self, progress: &dyn Fn(u64)) -> Result<Llm> {
        let dummy = self.options.load_format == LoadFormat::Dummy;
        let (tokenizer, template) = match self.options.text {
            true => self.read_text(dummy)?,
            false => (None, None),
        };
        let source: Box<dyn Source> = match self.options.load_format {
            LoadFormat::Safetensors => Box::new(Checkpoint::from_files(&*self.files, &self.dir)?),
            LoadFormat::Dummy => Box::new(DummySource::new(self.options.engine.seed)),
        };
        let precision = self.options.precision();
        let kv = KvCache::alloc(
            &mut self.device,
            &self.spec,
            self.n_blocks,
            self.options.block_size,
            precision.activations,
        )?;
        let layout = self.spread.layout();
        let exchange = self.spread.load(&self.options, &self.spec, &*source, &self.limits)?;
        let model = Model::load_part(
            self.spec,
            &*source,
            &mut self.device,
            precision,
            self.max_model_len,
            &layout,
            progress,
        )?
        .with_block_align(self.options.moe_block_align);
        let mut runner = Runner::new(self.device, model, kv, self.limits)?;
        if let Some(exchange) = exchange {
            let least = self.options.dual_batch_tokens;
            runner = runner.with_exchange(exchange).with_dual_batches(least);
        }
        let mut engine = Engine::new(runner, self.options.engine);
        if let Some(balancer) = self.spread.balancer() {
            engine = engine.with_balancer(balancer);
        }
        Ok(Llm { dir: self.dir, engine, tokenizer, template, defaults: self.defaults })
    }

    /// The tokenizer, which only a dummy model may lack, and the chat template.
    fn read_text(&self, dummy: bool) -> Result<(Option<Arc<Tokenizer>>, Option<ChatTemplate>)> {
        let read = |name| files::read(&*self.files, &self.dir, name);
        let config = read("tokenizer_config.json")?;
        let template =
            ChatTemplate::from_bytes(read("chat_template.jinja")?.as_deref(), config.as_deref())?;
        let tokenizer = match read("tokenizer.json")? {
            Some(json) => Some(Arc::new(Tokenizer::from_bytes(&json, config.as_deref())?)),
            None if dummy => None,
            None => return Err(FilesError::NoTokenizer { dir: self.dir.clone() }.into()),
        };
        Ok((tokenizer, template))
    }
}

/// Tokens of a step, and positions of a block, at most: keeps sizes far from overflow.
const MAX_STEP_TOKENS: usize = 1 << 20;

/// Tokens from which a step over several devices is split in two. Below, two halves take longer
/// than the whole and a trip: experts' weights are read for each.
pub const DUAL_BATCH_TOKENS: usize = 256;

/// Context when neither the user nor a small model limits it.
const DEFAULT_MAX_LEN: usize = 4096;

impl Llm {
    /// Plans and loads in one go, silently.
    ///
    /// # Errors
    /// Those of [`PlannedLlm::new`] and [`PlannedLlm::load`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(options: LlmOptions) -> Result<Self> {
        PlannedLlm::new(options)?.load(&|_| {})
    }

    /// Takes the experts that `source` has, while requests run, all or none: those whose numbers
    /// the model has replace its own, those that follow join them
    /// ([`LlmOptions::spare_experts`]). Returns their layers and numbers.
    ///
    /// # Errors
    /// Those of [`crate::model::pack_experts`] and [`Engine::take_experts`].
    pub fn take_experts(&mut self, source: &dyn Source) -> Result<Vec<(usize, usize)>> {
        let model = self.engine.runner().model();
        let new = pack_experts(&model.spec, model.precision, source)?;
        let layers: Vec<usize> = model.spec.moe_layers().map(|(index, _)| index).collect();
        self.engine.take_experts(&new)?;
        Ok(new.experts.iter().map(|e| (layers[e.layer], e.expert)).collect())
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`FilesError::NoTokenizer`] for dummy models that have none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        let missing = || FilesError::NoTokenizer { dir: self.dir.clone() };
        Ok(self.tokenizer.as_ref().ok_or_else(missing)?)
    }

    /// A compiler of grammars for structured answers, to be kept: making it reads the whole
    /// vocabulary.
    ///
    /// # Errors
    /// [`FilesError::NoTokenizer`], [`GrammarError`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn grammar_compiler(&mut self) -> Result<GrammarCompiler> {
        let tokenizer = self.tokenizer()?.clone();
        let spec = &self.engine.runner().model().spec;
        Ok(GrammarCompiler::new(&tokenizer, spec.vocab_size, &spec.eos_token_ids)?)
    }
}
