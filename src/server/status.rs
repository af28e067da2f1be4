//! Probes, metrics and the numbers of the dashboard.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{engine::Engine, text::ToolFormat};

use super::{ApiError, App, ServerConfig, metrics::kv_usage};

/// How long a deep look at the health counts: probes must not become a load.
const PROOF_COUNTS: Duration = Duration::from_secs(1);

/// `GET /health` and `/ready`: 200 means that a token can be produced now; with `?deep=1`, that
/// one just was.
pub(super) async fn health(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<StatusCode, ApiError> {
    if app.is_draining() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    if !app.engine.is_healthy(app.config.stall_timeout) {
        return Err(ApiError::unavailable("the engine does not answer"));
    }
    if is_deep(&query.unwrap_or_default())? {
        let mut proven = app.proven.lock().await;
        if proven.is_none_or(|at| at.elapsed() > PROOF_COUNTS) {
            if !app.engine.prove(app.config.deep_timeout).await {
                return Err(ApiError::unavailable("the engine produced no token in time"));
            }
            *proven = Some(Instant::now());
        }
    }
    Ok(StatusCode::OK)
}

/// Whether a query says `deep=1`, and nothing else of the kind.
fn is_deep(query: &str) -> Result<bool, ApiError> {
    let mut values = query.split('&').filter_map(|part| match part.split_once('=') {
        Some((name, value)) => (name == "deep").then_some(value),
        None => (part == "deep").then_some(""),
    });
    match (values.next(), values.next()) {
        (None, _) | (Some("0" | "false"), None) => Ok(false),
        (Some("1" | "true"), None) => Ok(true),
        _ => Err(ApiError::field("deep", "deep must be 1 or 0, once")),
    }
}

/// `GET /info`: what is served, on what, within which limits.
pub(super) async fn info(State(app): State<Arc<App>>) -> Json<Value> {
    let mut info = app.info.clone();
    // More may have joined since the start.
    let stats = app.engine.stats();
    info["model"]["experts"] = stats.experts.n_present.into();
    info["bytes"]["expert_weights"] = stats.expert_bytes_used.into();
    Json(info)
}

/// What [`info`] answers.
pub(super) fn info_of(engine: &mut Engine, config: &ServerConfig, tools: ToolFormat) -> Value {
    let max_model_len = engine.max_model_len();
    let stats = engine.stats();
    let runner = engine.runner();
    let (limits, device) = (*runner.limits(), runner.device());
    let (name, driver) = (device.describe(), device.driver());
    let (memory, tier) = (device.memory_bytes(), device.caps().tier().to_string());
    let model = runner.model();
    let (spec, precision) = (&model.spec, model.precision);
    let top_k = spec.moe_layers().map(|(_, moe)| moe.routing.top_k).max();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": {
            "id": config.model_name,
            "architecture": spec.architecture,
            "layers": spec.layers.len(),
            "moe_layers": spec.moe_layers().count(),
            "experts": spec.n_present(),
            "experts_per_token": top_k,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "expert_weights": precision.experts.to_string(),
            "tool_format": format!("{tools:?}").to_lowercase(),
        },
        "device": {"name": name, "driver": driver, "tier": tier, "memory_bytes": memory},
        "limits": {
            "max_model_len": max_model_len,
            "max_num_seqs": limits.max_sequences,
            "max_num_batched_tokens": limits.max_tokens,
            "max_queue": config.max_jobs,
            "max_body_bytes": config.max_body_bytes,
        },
        "kv_cache": {
            "blocks": stats.kv_blocks_total,
            "block_size": stats.block_size,
            "block_bytes": stats.kv_block_bytes,
            "prefix_caching": config.prefix_caching,
        },
        "bytes": {
            "device": stats.device_bytes,
            "expert_banks": stats.expert_bytes,
            "expert_weights": stats.expert_bytes_used,
        },
    })
}

/// `GET /ping`: 200 means that the process is alive.
pub(super) async fn ping() -> StatusCode {
    StatusCode::OK
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.metrics.render(&app.engine.stats());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// `GET /load`: vLLM's `server_load`, and what the dashboard draws.
pub(super) async fn load(State(app): State<Arc<App>>) -> Json<Value> {
    let stats = app.engine.stats();
    Json(json!({
        "server_load": app.engine.n_open(),
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_cache_usage": kv_usage(&stats),
        "kv_blocks_used": stats.kv_blocks_used,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generated_tokens,
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
        "preemptions": stats.preemptions,
    }))
}
