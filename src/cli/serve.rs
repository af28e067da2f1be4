//! `moewe serve`: flags, the socket, signals. The server itself is in the library.

use std::{net::IpAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use moewe::{
    engine::Policy,
    llm::PlannedLlm,
    server::{App, Death, ServerConfig, listen},
    text::ToolFormat,
};
use tokio::{net::TcpListener, sync::watch};

use super::options::ModelArgs;
use crate::{DEVICE_LOST, OUT_OF_MEMORY};

/// Steps between timings of the router: rare, as a timed step waits between its kernels.
const ROUTING_TIMING_INTERVAL: u64 = 256;

/// Options of `moewe serve`.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on; others than loopback need --api-key or --insecure
    #[arg(long, default_value = "127.0.0.1", env = "MOEWE_HOST")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000, env = "MOEWE_PORT")]
    port: u16,
    /// The model's name for clients [default: --model, or its directory]
    #[arg(long)]
    served_model_name: Option<String>,
    /// Key that clients must send; may be repeated
    #[arg(long, env = "MOEWE_API_KEY", hide_env_values = true, value_delimiter = ',')]
    api_key: Vec<String>,
    /// File with one key per line
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// Listen beyond loopback without a key
    #[arg(long)]
    insecure: bool,
    /// Show /metrics without a key
    #[arg(long)]
    metrics_public: bool,
    /// Count each expert of each layer in /metrics
    #[arg(long)]
    expert_metrics: bool,
    /// Let POST /admin/experts load safetensors files of this folder; needs --api-key
    #[arg(long)]
    expert_dir: Option<PathBuf>,
    /// Room in each layer for so many experts that POST /admin/experts adds
    #[arg(long, default_value_t = 0, requires = "expert_dir")]
    spare_experts: usize,
    /// Origins whose web pages may call, or *
    #[arg(long, value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// Host names that requests may name beside localhost, when listening on loopback
    #[arg(long, value_delimiter = ',')]
    allowed_hosts: Vec<String>,
    /// Sequences that run together
    #[arg(long, default_value_t = 16)]
    max_num_seqs: usize,
    /// Who runs first when not all can: fcfs, first come first served, or priority, requests of the
    /// lowest `priority`
    #[arg(long, value_enum, default_value = "fcfs")]
    scheduling_policy: SchedulingPolicy,
    /// How the model writes tool calls: as its chat template says, <tool_call>s, or bare JSON
    #[arg(long, value_enum, default_value = "auto")]
    tool_call_parser: ToolCallParser,
    /// Requests that may be open, running and waiting; more are refused with 503
    #[arg(long, default_value_t = 256)]
    max_queue: usize,
    /// Connections that may be open
    #[arg(long, default_value_t = 4096)]
    max_connections: usize,
    /// Seconds that a request may take [default: any]
    #[arg(long)]
    request_timeout: Option<u64>,
    /// Seconds for open requests to end after a signal; a second signal ends them at once
    #[arg(long, default_value_t = 30)]
    shutdown_timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum SchedulingPolicy {
    Fcfs,
    Priority,
}

/// By the names of vLLM's parsers, too.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ToolCallParser {
    Auto,
    #[value(alias = "qwen")]
    Hermes,
    #[value(alias = "llama3_json")]
    Json,
}

impl Serve {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.config()?;
        let mut options = self.model.options(None)?;
        options.max_num_seqs = self.max_num_seqs.max(1);
        options.spare_experts = self.spare_experts;
        options.engine.policy = match self.scheduling_policy {
            SchedulingPolicy::Fcfs => Policy::Fcfs,
            SchedulingPolicy::Priority => Policy::Priority,
        };
        options.engine.routing_timing_interval = ROUTING_TIMING_INTERVAL;
        options.engine.max_queue = self.max_queue * 16;
        let mut first = Some(self.model.load(options.clone())?);
        let open = move || match first.take() {
            Some(llm) => Ok(llm),
            None => PlannedLlm::new(options.clone())?.load(&|_| {}),
        };
        let app = App::start(Box::new(open), config)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::bind((self.host, self.port)).await;
            let listener = listener
                .with_context(|| format!("cannot listen on {}:{}", self.host, self.port))?;
            eprintln!("serving {} on http://{}", app.model_name(), listener.local_addr()?);
            let (first, second) = signals()?;
            listen(listener, app.clone(), first, second).await?;
            anyhow::Ok(())
        })?;
        // Tasks of clients that never read must not keep the process.
        runtime.shutdown_timeout(Duration::from_secs(1));
        Ok(match app.engine.death() {
            None => ExitCode::SUCCESS,
            Some(Death::DeviceLost) => ExitCode::from(DEVICE_LOST),
            Some(Death::OutOfMemory) => ExitCode::from(OUT_OF_MEMORY),
        })
    }

    fn config(&self) -> anyhow::Result<ServerConfig> {
        let mut api_keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = std::fs::read_to_string(path).context("--api-key-file cannot be read")?;
            api_keys.extend(text.lines().map(|line| line.trim().to_owned()));
        }
        api_keys.retain(|key| !key.is_empty());
        let loopback = self.host.is_loopback();
        ensure!(
            loopback || !api_keys.is_empty() || self.insecure,
            "{} is open to the network: give --api-key, or --insecure if that is meant",
            self.host
        );
        ensure!(
            self.expert_dir.is_none() || !api_keys.is_empty(),
            "--expert-dir lets callers change the model: give --api-key"
        );
        let given = self.model.checkpoint.model.as_deref().unwrap_or(moewe::llm::DEFAULT_MODEL);
        let given = std::path::Path::new(given);
        // A directory is known by its last part, a hub model by its whole id.
        let name = if given.is_dir() { given.file_name() } else { Some(given.as_os_str()) };
        let name = name.map_or("moewe".into(), |name| name.to_string_lossy());
        Ok(ServerConfig {
            model_name: self.served_model_name.clone().unwrap_or(name.into_owned()),
            api_keys,
            metrics_public: self.metrics_public,
            allowed_origins: self.allowed_origins.clone(),
            allowed_hosts: loopback.then(|| self.allowed_hosts.clone()),
            max_jobs: self.max_queue.max(1),
            max_connections: self.max_connections.max(1),
            request_timeout: self.request_timeout.map(Duration::from_secs),
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout),
            per_expert_metrics: self.expert_metrics,
            expert_dir: self.expert_dir.clone(),
            prefix_caching: !self.model.no_prefix_caching,
            priorities: self.scheduling_policy == SchedulingPolicy::Priority,
            tool_format: match self.tool_call_parser {
                ToolCallParser::Auto => None,
                ToolCallParser::Hermes => Some(ToolFormat::Hermes),
                ToolCallParser::Json => Some(ToolFormat::Json),
            },
            ..ServerConfig::default()
        })
    }
}

/// Futures of the first and the second SIGTERM or Ctrl-C.
fn signals() -> anyhow::Result<(impl Future<Output = ()>, impl Future<Output = ()>)> {
    let (count, seen) = watch::channel(0u32);
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        loop {
            #[cfg(unix)]
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            #[cfg(not(unix))]
            let _ = tokio::signal::ctrl_c().await;
            count.send_modify(|count| *count += 1);
        }
    });
    let nth = |n: u32| {
        let mut seen = seen.clone();
        async move {
            let _ = seen.wait_for(|&count| count >= n).await;
        }
    };
    Ok((nth(1), nth(2)))
}
