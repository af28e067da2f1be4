//! Who may call: keys, host names, origins of web pages; and the id that names each request.
//! Everything needs a key unless it is listed here.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{Choice, ConstantTimeEq};

use super::{ApiError, App, socket::MAX_HEADER_BYTES, unix_seconds};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Paths that need no key: probes and the page that asks for the key.
const PUBLIC: &[&str] = &["/", "/health", "/ping", "/ready"];

/// Runs before every endpoint, unknown paths included.
pub(super) async fn control(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).cloned().unwrap_or_else(new_id);
    let origin = request.headers().get(header::ORIGIN).cloned();
    let origin = origin.filter(|origin| allows_origin(&app, origin));
    let preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match check(&app, &request, preflight) {
        Err(error) => error.into_response(),
        Ok(()) if preflight => preflight_answer(request.headers()),
        Ok(()) => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        let exposed = HeaderValue::from_static("x-request-id");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    response
}

fn check(app: &App, request: &Request, preflight: bool) -> Result<(), ApiError> {
    let headers = request.headers();
    // hyper bounds what it reads at a time, which may be a little more.
    let lines = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
    if lines.sum::<usize>() > MAX_HEADER_BYTES {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Err(ApiError::new(status, super::socket::too_large()));
    }
    if !allows_host(app, headers) {
        let message = "this host name is not allowed; use localhost, or add it to --allowed-hosts";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let path = request.uri().path();
    let public = preflight
        || PUBLIC.contains(&path)
        || (path == "/metrics" && app.config.metrics_public)
        || app.config.api_keys.is_empty();
    if public || has_key(app, headers) {
        return Ok(());
    }
    let message = "the API key is missing or wrong; send `Authorization: Bearer KEY`";
    Err(ApiError::new(StatusCode::UNAUTHORIZED, message))
}

/// Compares with all keys, so that the time tells neither which key nor how much of it was right.
fn has_key(app: &App, headers: &HeaderMap) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.as_bytes().split_at_checked(7));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let given = bearer.map(|(_, key)| key).or(headers.get("x-api-key").map(|v| v.as_bytes()));
    let Some(given) = given else { return false };
    let keys = app.config.api_keys.iter();
    keys.fold(Choice::from(0), |found, key| found | key.as_bytes().ct_eq(given)).into()
}

fn allows_host(app: &App, headers: &HeaderMap) -> bool {
    let (Some(allowed), Some(host)) = (&app.config.allowed_hosts, headers.get(header::HOST)) else {
        return true;
    };
    let host = host.to_str().map(host_name).unwrap_or("");
    is_local(host) || allowed.iter().any(|name| name.eq_ignore_ascii_case(host))
}

fn allows_origin(app: &App, origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let host = origin.split_once("://").map_or("", |(_, rest)| host_name(rest));
    is_local(host) || app.config.allowed_origins.iter().any(|o| o == "*" || o == origin)
}

/// `name` of `name:port`, with the brackets of IPv6 removed.
fn host_name(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or(""),
        None => authority.split(':').next().unwrap_or(""),
    }
}

fn is_local(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    ["localhost", "127.0.0.1", "::1"].contains(&host.as_str()) || host.ends_with(".localhost")
}

fn preflight_answer(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    let methods = HeaderValue::from_static("GET, POST, OPTIONS");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    let names = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let names = names.unwrap_or(HeaderValue::from_static("authorization, content-type"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
    response
}

/// Unique within this server, and across restarts by the time.
pub(super) fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:x}{:08x}", unix_seconds(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn new_id() -> HeaderValue {
    HeaderValue::from_str(&unique()).unwrap_or(HeaderValue::from_static("request"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_found_and_only_this_machine_is_local() {
        for host in ["localhost:8000", "127.0.0.1", "[::1]:80", "a.localhost"] {
            assert!(is_local(host_name(host)), "{host}");
        }
        for host in ["evil.com", "localhost.evil.com", "127.0.0.1.nip.io:8000", ""] {
            assert!(!is_local(host_name(host)), "{host}");
        }
    }
}
