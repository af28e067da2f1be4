//! Layer 5, HTTP only: OpenAI's endpoints over the engine's thread, vLLM's metrics, a dashboard.
//! [`app`] is a router that tests call without sockets; [`listen`] puts it on one.
//! Nothing here knows tensors or schedules.

mod access;
mod admin;
mod app;
mod chat_completions;
mod completions;
mod error;
mod experts;
mod failure;
mod fields;
mod generation;
mod grammar;
mod histogram;
mod job;
mod listen;
mod metrics;
mod models;
mod openapi;
mod sampling;
mod socket;
mod sse;
mod status;
mod tokenize;
mod tools;
mod worker;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    Result,
    engine::SamplingParams,
    llm::{GrammarCompiler, Llm, tool_format},
    model::{ModelSpec, Precision},
    text::{ChatTemplate, Tokenizer, ToolFormat},
};

pub use app::{ROUTES, app};
pub use error::ApiError;
pub use failure::Death;
pub use listen::listen;
pub use metrics::{Metrics, MetricsInfo};
pub use worker::{Build, EngineHandle};

/// Loads the model, at the start and again after its device was lost.
pub type Open = Box<dyn FnMut() -> Result<Llm> + Send>;

/// How to serve. Every limit has a test that reaches it.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The model's name for clients.
    pub model_name: String,
    /// Keys that open the API; it is open if there are none.
    pub api_keys: Vec<String>,
    /// `/metrics` needs no key.
    pub metrics_public: bool,
    /// Further origins whose web pages may call; `*` for all. Pages of this machine always may.
    pub allowed_origins: Vec<String>,
    /// Host names that requests may ask for, beside this machine's; any if absent. Set where the
    /// server listens on loopback, against DNS rebinding.
    pub allowed_hosts: Option<Vec<String>>,
    /// Largest request body, bytes.
    pub max_body_bytes: usize,
    /// Requests that may be open, running and waiting; more are refused with 503.
    pub max_jobs: usize,
    /// Connections that may be open; more wait to be accepted.
    pub max_connections: usize,
    /// Longest time for a request; none if absent.
    pub request_timeout: Option<Duration>,
    /// Longest time for a request's header.
    pub header_timeout: Duration,
    /// Longest time for a request's body.
    pub body_timeout: Duration,
    /// A client that takes nothing for so long is cut off.
    pub write_timeout: Duration,
    /// Silence after which a stream sends a comment.
    pub keep_alive: Duration,
    /// Silence of the engine's thread after which `/health` fails.
    pub stall_timeout: Duration,
    /// Time in which `/health?deep=1` must see a token.
    pub deep_timeout: Duration,
    /// Time for open requests to end after a signal.
    pub shutdown_timeout: Duration,
    /// Whether the engine shares prefixes; shown in `/metrics`.
    pub prefix_caching: bool,
    /// Whether the engine orders requests by their priority; they may bring one only then.
    pub priorities: bool,
    /// How the model writes tool calls; as its chat template says if absent.
    pub tool_format: Option<ToolFormat>,
    /// `/metrics` shows each expert of each layer.
    pub per_expert_metrics: bool,
    /// Folder of safetensors files that `POST /admin/experts` may load; it is off if absent.
    pub expert_dir: Option<PathBuf>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            model_name: "moewe".to_owned(),
            api_keys: Vec::new(),
            metrics_public: false,
            allowed_origins: Vec::new(),
            allowed_hosts: None,
            max_body_bytes: 32 << 20,
            max_jobs: 256,
            max_connections: 4096,
            request_timeout: None,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            deep_timeout: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(30),
            prefix_caching: true,
            priorities: false,
            tool_format: None,
            per_expert_metrics: false,
            expert_dir: None,
        }
    }
}

/// What all endpoints share.
#[derive(Debug)]
pub struct App {
    /// The engine's thread.
    pub engine: EngineHandle,
    /// What `/metrics` shows.
    pub metrics: Arc<Metrics>,
    config: ServerConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    /// How the model writes tool calls.
    tool_format: ToolFormat,
    /// The chat template shows tools; otherwise they are told in words.
    template_shows_tools: bool,
    /// None without a tokenizer.
    grammars: Option<GrammarCompiler>,
    defaults: SamplingParams,
    spec: ModelSpec,
    precision: Precision,
    vocab_size: usize,
    max_model_len: usize,
    created: u64,
    draining: AtomicBool,
    /// What `/info` says.
    info: serde_json::Value,
    /// When a deep look at the health last ended well; held while one is under way.
    proven: tokio::sync::Mutex<Option<std::time::Instant>>,
}

impl App {
    /// Loads the model and starts its thread.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn start(mut open: Open, config: ServerConfig) -> Result<Arc<Self>> {
        let mut llm = open()?;
        let max_model_len = llm.engine.max_model_len();
        let model = llm.engine.runner().model();
        let (spec, precision) = (model.spec.clone(), model.precision);
        let vocab_size = spec.vocab_size;
        let grammars = match llm.tokenizer {
            Some(_) => Some(llm.grammar_compiler()?),
            None => None,
        };
        let detected = llm.template.as_ref().map(tool_format);
        let tool_format = config.tool_format.or(detected).unwrap_or(ToolFormat::Hermes);
        let template_shows_tools = llm.template.as_ref().is_some_and(|t| t.mentions("tools"));
        let metrics = Arc::new(Metrics::new(MetricsInfo {
            model_name: config.model_name.clone(),
            max_model_len,
            prefix_caching: config.prefix_caching,
            per_expert: config.per_expert_metrics,
        }));
        let info = status::info_of(&mut llm.engine, &config, tool_format);
        let mut first = Some(llm.engine);
        let build: Build = Box::new(move || match first.take() {
            Some(engine) => Ok(engine),
            None => Ok(open()?.engine),
        });
        let engine = EngineHandle::start(build, metrics.clone(), config.max_jobs)?;
        Ok(Arc::new(Self {
            engine,
            metrics,
            config,
            tokenizer: llm.tokenizer,
            template: llm.template.map(Arc::new),
            tool_format,
            template_shows_tools,
            grammars,
            defaults: llm.defaults,
            spec,
            precision,
            vocab_size,
            max_model_len,
            created: unix_seconds(),
            draining: AtomicBool::new(false),
            info,
            proven: tokio::sync::Mutex::default(),
        }))
    }

    /// The model's name for clients.
    pub fn model_name(&self) -> &str {
        &self.config.model_name
    }

    /// From now on new requests are refused and `/health` fails.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn tokenizer(&self) -> Result<&Arc<Tokenizer>, ApiError> {
        self.tokenizer.as_ref().ok_or_else(error::no_tokenizer)
    }

    /// One more than the last token id that requests may name.
    fn n_token_ids(&self) -> usize {
        let known = self.tokenizer.as_ref().map(|tokenizer| tokenizer.vocab_size());
        known.unwrap_or(usize::MAX).min(self.vocab_size)
    }

    /// Admits a request, unless the server drains or is full.
    fn admit(&self) -> Result<worker::Admission, ApiError> {
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        self.engine.admit()
    }

    /// 404 unless `model`, where given, is the one that is served.
    fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        let name = &self.config.model_name;
        match model {
            Some(model) if model != name => Err(ApiError {
                status: axum::http::StatusCode::NOT_FOUND,
                message: format!("the model is not served here; ask for {name:?}"),
                param: Some("model"),
            }),
            _ => Ok(()),
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}

/// Runs CPU-bound work away from the threads that serve sockets.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |_| {
        let message = "the request could not be processed";
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, message)
    };
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}
