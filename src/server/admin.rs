//! `POST /admin/experts`: experts of a safetensors file take the place of loaded ones or join them,
//! while requests run. Off unless the server was given a folder of such files, and never without a
//! key.

use std::{
    fs::File,
    io::Read,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use serde_json::{Value, json};

use crate::{
    model::{ModelSpec, NewExperts, pack_experts},
    parallel::PackedExpert,
    weights::Checkpoint,
};

use super::{ApiError, App, app::read_fields, blocking};

/// Room for a file's header beside its weights, bytes.
const HEADER_BYTES: u64 = 64 << 20;

pub(super) async fn take_experts(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let Some(dir) = app.config.expert_dir.clone() else {
        let message = "experts cannot be replaced here; start the server with --expert-dir";
        return Err(ApiError::new(StatusCode::NOT_FOUND, message));
    };
    if app.config.api_keys.is_empty() {
        let message = "experts are replaced with a key only; start the server with --api-key";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let _admission = app.admit()?;
    let mut fields = read_fields(&app, request).await?;
    let file = fields.string("file")?;
    let file = file.ok_or_else(|| ApiError::field("file", "file is missing"))?;
    let owned = app.clone();
    let new = blocking(move || pack(&owned, &dir, &file)).await?;
    let layers: Vec<usize> = app.spec.moe_layers().map(|(index, _)| index).collect();
    let names = |e: &PackedExpert| json!({"layer": layers[e.layer], "expert": e.expert});
    let is_added = |e: &&PackedExpert| e.expert >= new.n_before;
    let added: Vec<Value> = new.experts.iter().filter(is_added).map(names).collect();
    let replaced = new.experts.iter().filter(|e| !is_added(e)).map(names);
    let answer = json!({"replaced": replaced.collect::<Vec<_>>(), "added": added});
    app.engine.take_experts(new).await?;
    Ok(Json(answer))
}

/// Reads, checks and packs all experts of a file; nothing has changed when this fails.
fn pack(app: &App, dir: &Path, file: &str) -> Result<NewExperts, ApiError> {
    let wrong = |why: String| ApiError::field("file", why);
    let parts: Vec<Component<'_>> = Path::new(file).components().collect();
    if !matches!(parts[..], [Component::Normal(name)] if name == file) {
        return Err(wrong("file must be the name of a file in the folder of experts".to_owned()));
    }
    let limit = largest_file(&app.spec);
    let bytes = read(dir.join(file), limit).map_err(|e| wrong(format!("{file:?}: {e}")))?;
    let source = Checkpoint::from_bytes(file, bytes).map_err(|e| wrong(e.to_string()))?;
    let mut spec = app.spec.clone();
    spec.set_present(app.engine.stats().experts.n_present);
    pack_experts(&spec, app.precision, &source).map_err(|e| wrong(e.to_string()))
}

/// Into memory: a mapped file that somebody cuts off would take the server down.
fn read(path: PathBuf, limit: u64) -> std::io::Result<Vec<u8>> {
    // A pipe in place of a file would block for ever.
    if !std::fs::metadata(&path)?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(std::io::Error::other("it is larger than all experts of the model")),
        false => Ok(bytes),
    }
}

/// All experts in f32.
fn largest_file(spec: &ModelSpec) -> u64 {
    let layers = spec.moe_layers().map(|(_, moe)| {
        moe.routing.n_experts as u64 * 3 * (spec.hidden_size * moe.intermediate_size) as u64 * 4
    });
    layers.sum::<u64>() + HEADER_BYTES
}
