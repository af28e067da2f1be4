//! Which path is which endpoint, and what surrounds them all: reading bodies, answering what no
//! endpoint takes.

use std::sync::Arc;

use axum::{
    Router,
    body::to_bytes,
    extract::Request,
    http::{StatusCode, header},
    middleware,
    response::Html,
    routing::{get, post},
};

use super::{
    ApiError, App, access, admin, chat_completions, completions, experts, fields::Fields, models,
    openapi, status, tokenize,
};

/// Method and path of every endpoint; the OpenAPI document lists the same.
pub const ROUTES: &[(&str, &str)] = &[
    ("get", "/"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{id}"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/health"),
    ("get", "/ping"),
    ("get", "/ready"),
    ("get", "/version"),
    ("get", "/info"),
    ("get", "/metrics"),
    ("get", "/load"),
    ("get", "/openapi.json"),
    ("get", "/moe/stats"),
    ("post", "/admin/experts"),
];

/// The whole server without its socket.
pub fn app(state: Arc<App>) -> Router {
    Router::new()
        .route("/", get(async || Html(include_str!("ui/index.html"))))
        .route("/v1/chat/completions", post(chat_completions::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::one))
        // Names such as `owner/name` hold a slash.
        .route("/v1/models/{owner}/{name}", get(models::one_of_owner))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(status::health))
        .route("/ping", get(status::ping))
        .route("/ready", get(status::health))
        .route("/version", get(status::version))
        .route("/info", get(status::info))
        .route("/metrics", get(status::metrics))
        .route("/load", get(status::load))
        .route("/openapi.json", get(openapi::document))
        .route("/moe/stats", get(experts::stats))
        .route("/admin/experts", post(admin::take_experts))
        .fallback(async || {
            ApiError::new(StatusCode::NOT_FOUND, "there is no such path; see /openapi.json")
        })
        .method_not_allowed_fallback(async || {
            let message = "this path does not take this method; see /openapi.json";
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .layer(middleware::from_fn_with_state(state.clone(), access::control))
        .with_state(state)
}

/// The fields of a JSON request, within the limits of size and time.
pub(super) async fn read_fields(app: &App, request: Request) -> Result<Fields, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|v| v.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = "the body must be JSON; send content-type: application/json";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let limit = app.config.max_body_bytes;
    let reading = to_bytes(request.into_body(), limit);
    let body = match tokio::time::timeout(app.config.body_timeout, reading).await {
        Err(_) => {
            let message = "the body did not arrive in time";
            return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
        }
        Ok(Err(error)) if is_too_long(&error) => {
            let message = format!("the body is larger than {limit} bytes");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        Ok(Err(_)) => {
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "the body ended too early"));
        }
        Ok(Ok(body)) => body,
    };
    Fields::parse(&body)
}

/// Whether reading a body stopped at its limit, which http-body-util says only in words.
fn is_too_long(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|source| source.to_string().contains("limit"))
}
