//! `GET /openapi.json`: the API in the terms that generators and fuzzers read.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::App;

/// The document with the served model's limits. It is kept by hand; tests compare its paths with
/// [`super::ROUTES`].
pub(super) async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    // The file is part of the binary, and a test parses it.
    let mut document: Value =
        serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap_or_default();
    let schemas = &mut document["components"]["schemas"];
    schemas["TokenId"]["maximum"] = json!(app.n_token_ids().saturating_sub(1));
    schemas["NewTokens"]["maximum"] = json!(app.max_model_len.saturating_sub(1));
    if !app.config.priorities {
        schemas["Priority"] = json!({"type": "integer", "minimum": 0, "maximum": 0});
    }
    Json(document)
}
